"""Agreement and correlation: how alike two answerers are, and how much of that chance explains.

Let s be a comparison's score and c its chance score: the mean score of its local answer against K remote answers,
and of its remote answer against K local answers, given to other requests of the recent past. Then

    agreement    a   = mean(s)
    correlation  rho = 1 - mean(1 - s) / mean(1 - c)

which for labels is Cohen's kappa (Cohen 1960) in Krippendorff's form (1970), and is defined for every evaluator.
A ``Tally`` keeps the sums of both, so that a comparison enters or leaves in constant time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["CHANCE_DRAWS", "Estimate", "Tally", "chance", "effective_size", "wilson"]

CHANCE_DRAWS = 8
Z95 = 1.959964


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval and the number of comparisons behind it, weighted ones counting for less."""

    value: float
    low: float
    high: float
    n: float


class Tally:
    """Weighted sums over comparisons. ``remove`` undoes ``add``; nothing else is kept of a comparison."""

    __slots__ = ("d", "dd", "du", "n", "u", "uu", "w", "ww")

    def __init__(self, sums: Sequence[float] = (0.0,) * 8) -> None:
        self.n, self.w, self.ww, self.d, self.u, self.dd, self.du, self.uu = sums

    def sums(self) -> list[float]:
        """The whole state, for ``Tally(sums)``."""
        return [self.n, self.w, self.ww, self.d, self.u, self.dd, self.du, self.uu]

    def add(self, score: float, chance: float, weight: float = 1.0) -> None:
        """Count one comparison with its ``score``, its ``chance`` score and a weight in (0, 1]."""
        d = weight * (1.0 - score)
        u = weight * (1.0 - chance)
        self.n += 1.0
        self.w += weight
        self.ww += weight * weight
        self.d += d
        self.u += u
        self.dd += d * d
        self.du += d * u
        self.uu += u * u

    def remove(self, score: float, chance: float, weight: float = 1.0) -> None:
        """Take one comparison out again."""
        d = weight * (1.0 - score)
        u = weight * (1.0 - chance)
        self.n -= 1.0
        self.w -= weight
        self.ww -= weight * weight
        self.d -= d
        self.u -= u
        self.dd -= d * d
        self.du -= d * u
        self.uu -= u * u

    @property
    def effective(self) -> float:
        """See `effective_size`."""
        return effective_size(self.w, self.ww)

    @property
    def agreement(self) -> float | None:
        """mean(s); None before the first comparison."""
        return 1.0 - self.d / self.w if self.w > 0.0 else None

    @property
    def correlation(self) -> float | None:
        """rho, clipped to [-1, 1]; agreement itself where the answers do not vary and chance has nothing to explain."""
        if self.w <= 0.0:
            return None
        if self.u <= 1e-9 * self.w:
            return self.agreement
        return max(-1.0, 1.0 - self.d / self.u)

    def agreement_estimate(self) -> Estimate | None:
        """Agreement with the interval of Wilson (1927) on the effective sample size.

        Scores between 0 and 1 vary less than labels of the same mean, so the interval is then on the safe side.
        """
        a = self.agreement
        if a is None:
            return None
        low, high = wilson(a, self.effective)
        return Estimate(a, low, high, self.effective)

    def correlation_estimate(self) -> Estimate | None:
        """rho with an interval: Wilson's for the disagreement in the numerator, the delta method's share for chance.

        Wilson's does not collapse where nothing disagreed yet; the delta method adds what the spread of the chance
        scores, and their covariance with the scores, contribute.
        """
        rho = self.correlation
        a = self.agreement
        if rho is None or a is None:
            return None
        n = self.effective
        low, high = wilson(a, n)
        base = self.u / self.w
        if base <= 1e-9:
            return Estimate(rho, low, high, n)
        ratio = self.d / self.u
        whole = max(0.0, self.dd - 2.0 * ratio * self.du + ratio * ratio * self.uu) / (self.u * self.u)
        scores_alone = max(0.0, self.dd - self.d * self.d / max(self.n, 1.0)) / (self.u * self.u)
        extra = Z95 * Z95 * max(0.0, whole - scores_alone)
        down = math.hypot((a - low) / base, math.sqrt(extra))
        up = math.hypot((high - a) / base, math.sqrt(extra))
        return Estimate(rho, max(-1.0, rho - down), min(1.0, rho + up), n)


def effective_size(weights: float, squares: float) -> float:
    """Kish's effective sample size, (sum w)^2 / sum w^2: how many of equal weight tell as much. 0 of nothing."""
    return weights * weights / squares if squares > 0.0 else 0.0


def wilson(a: float, n: float, z: float = Z95) -> tuple[float, float]:
    if n <= 0.0:
        return 0.0, 1.0
    centre = (a + z * z / (2.0 * n)) / (1.0 + z * z / n)
    half = z / (1.0 + z * z / n) * math.sqrt(max(0.0, a * (1.0 - a) / n + z * z / (4.0 * n * n)))
    return max(0.0, centre - half), min(1.0, centre + half)


def chance(
    local: Any,
    remote: Any,
    reference: Sequence[tuple[Any, Any]],
    evaluate: Callable[[Any, Any], tuple[float, Mapping[str, float]]],
    draw: random.Random,
    draws: int = CHANCE_DRAWS,
) -> tuple[float, dict[str, float]]:
    """The chance score of one comparison, and that of each of its parts.

    ``reference`` holds (local, remote) answers to other requests, at least one; ``evaluate`` returns (score, parts).
    The draw is systematic: every n-th answer from a random start, which spreads over the whole window and costs one
    random number. Costs 2 * ``draws`` evaluations, whatever the window. Errors of ``evaluate`` pass through.
    """
    stride = max(1, len(reference) // draws)
    drawn = reference[int(draw.random() * stride) :: stride][:draws]
    total = 0.0
    parts: dict[str, float] = {}
    for other_local, other_remote in drawn:
        for score, of_parts in (evaluate(local, other_remote), evaluate(other_local, remote)):
            total += score
            if of_parts:
                for name, part in of_parts.items():
                    parts[name] = parts.get(name, 0.0) + part
    count = 2.0 * len(drawn)
    return total / count, {name: part / count for name, part in parts.items()}
