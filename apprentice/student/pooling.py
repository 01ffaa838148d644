"""The formulas of the combiner: what both halves say of a field becomes one distribution, and a chance to be right.

The halves' distributions are blended log-linearly: log p = a log p_head + b log p_lora + constant (a logarithmic
opinion pool, Genest and Zidek 1986). The weights hold the temperature, too: a + b below 1 flattens. How likely the
blend's answer is to agree is then a logistic regression on what the blend's own probability leaves out: what each half
gives to the answer, the margin, whether the halves agree, and how far the input lies from those that the head knows.

All of it takes one input or many: numbers are floats or [inputs], distributions [values] or [inputs, values]. One of
many comes out as it does by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

__all__ = ["FEATURES", "Floats", "Logistic", "Mode", "Numbers", "Places", "Seen", "logit", "pick"]

type Floats = NDArray[np.float64]
type Numbers = float | Floats
type Places = int | NDArray[np.int64]

FEATURES = {"head": 3, "lora": 2, "both": 5}
"""How many `Seen.features` gives, by the halves that answered."""
_LEAST = 1e-6
"""No probability is taken for less than this, and none for more than 1 minus this."""


def _clipped(p: Floats) -> Floats:
    """Probabilities, none of them 0 or 1."""
    return np.minimum(np.maximum(p, _LEAST), 1.0 - _LEAST)


def logit(p: Numbers) -> Numbers:
    """log(p / (1 - p)), of p clipped."""
    p = np.minimum(np.maximum(p, _LEAST), 1.0 - _LEAST)
    return cast(Numbers, np.log(p / (1.0 - p)))


def pick(p: Floats, at: Places) -> Numbers:
    """The probabilities of the values ``at``, an int or [inputs]."""
    return cast(Numbers, p[_index(p, at)])


def _index(p: Floats, at: Places) -> Any:
    return at if p.ndim == 1 else (np.arange(len(p)), at)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the halves say of one field: clipped probabilities, None for a missing half, and the distance.

    ``logs`` are the logarithms of the probabilities of each half that is there.
    """

    head: Floats | None
    lora: Floats | None
    distance: Numbers
    logs: tuple[Floats, ...]

    @classmethod
    def of(cls, head: Floats | None, lora: Floats | None, distance: Numbers) -> Seen:
        """From probabilities that may be 0 or 1."""
        head, lora = None if head is None else _clipped(head), None if lora is None else _clipped(lora)
        return cls(head, lora, distance, tuple(np.log(half) for half in (head, lora) if half is not None))

    @property
    def even(self) -> tuple[float, float]:
        """The weights with which the halves count alike."""
        if self.head is None or self.lora is None:
            return float(self.head is not None), float(self.lora is not None)
        return 0.5, 0.5

    def there(self, weights: tuple[float, float]) -> list[float]:
        """Of the head's and the adapter's weights those of the halves that are there."""
        return [w for w, half in zip(weights, (self.head, self.lora), strict=True) if half is not None]

    def blend(self, weights: tuple[float, float] | None = None) -> Floats:
        """The pooled distribution. ``weights`` are the head's and the adapter's; None: even ones."""
        each = self.there(self.even if weights is None else weights)
        logs = each[0] * self.logs[0]
        if len(each) == 2:
            logs = logs + each[1] * self.logs[1]
        p = np.exp(logs - logs.max(axis=-1, keepdims=True))
        return p / p.sum(axis=-1, keepdims=True)

    def features(self, p: Floats, at: Places) -> list[Numbers]:
        """What may tell more of the answers ``at`` than their probabilities in the blend ``p`` do."""
        others = p.copy()
        others[_index(p, at)] = 0.0
        features: list[Numbers] = [np.log(pick(p, at) + _LEAST) - np.log(others.max(axis=-1) + _LEAST)]
        if self.head is not None:
            features += [logit(pick(self.head, at)), self.distance]
        if self.lora is not None:
            features.append(logit(pick(self.lora, at)))
        if self.head is not None and self.lora is not None:
            features.append(1.0 * (self.head.argmax(axis=-1) == self.lora.argmax(axis=-1)))
        return features


@dataclass(frozen=True, slots=True)
class Logistic:
    """P = sigmoid(offset + constant + coefficients . (x - mean) / scale); the offset comes with each x."""

    constant: float
    mean: list[float]
    scale: list[float]
    coefficients: list[float]

    def __call__(self, offset: Numbers, x: Sequence[Numbers]) -> Numbers:
        total = offset + self.constant
        for value, mean, scale, coefficient in zip(x, self.mean, self.scale, self.coefficients, strict=True):
            total = total + coefficient * (value - mean) / scale
        return cast(Numbers, 1.0 / (1.0 + np.exp(-np.minimum(np.maximum(total, -30.0), 30.0))))

    @classmethod
    def of_json(cls, stored: Mapping[str, Any]) -> Logistic:
        """Read what `dataclasses.asdict` made. Raises ValueError, KeyError or TypeError where it is something else."""
        mean, scale, coefficients = ([float(v) for v in stored[name]] for name in ("mean", "scale", "coefficients"))
        if not len(mean) == len(scale) == len(coefficients) or min(scale, default=1.0) <= 0.0:
            raise ValueError("a regression's numbers do not belong together")
        return cls(float(stored["constant"]), mean, scale, coefficients)


@dataclass(frozen=True, slots=True)
class Mode:
    """What was learnt of the answers of one half, or of both.

    ``weights`` are by finite field, the head's and the adapter's, 0 for a half that is not there. ``right`` gives
    P(agrees) by field, ``whole`` that of the answer; what is missing there is believed as it is.
    """

    weights: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    right: Mapping[str, Logistic] = field(default_factory=dict)
    whole: Logistic | None = None

    def of_field(self, name: str, said: Numbers, features: Sequence[Numbers]) -> Numbers:
        """P(agrees) of a field's values that were ``said`` to be so probable."""
        right = self.right.get(name)
        return said if right is None else right(logit(said), features)

    def of_whole(self, joint: Numbers) -> Numbers:
        """The score to expect of answers, from the product of their fields' P(agrees)."""
        if self.whole is None:
            return joint
        offset = logit(joint)
        return self.whole(offset, [offset])
