"""A second, cheap watch on every local answer, compared or not.

It sees signs that need no remote answer: outputs outside the schema, a confidence among the lowest tenth, an input
longer or shorter than nineteen in twenty used to be, or made of words not seen before. The first ``settle``
observations of a version set what is usual; after that each sign has a Shiryaev-Roberts detector on how often it
shows. A sign says that something changed, not that it got worse, so an alarm asks for spot checks and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from apprentice.confidence.drift import Detector

__all__ = ["LocalObservation", "Watch"]

SIGNS = ("invalid", "unsure", "length", "novelty")


@dataclass(frozen=True, slots=True)
class LocalObservation:
    """One local answer.

    ``valid``: it fitted the output schema. ``served``: it was (or, without a spot check, would have been) returned.
    ``input_length`` in characters; ``novelty`` in [0, 1] is the share of the input that is new, None where unknown.
    ``unverified`` is how many answers nobody speaks for because of this one: 1 where the remote could not have been
    asked, 1 / p where a spot check drawn with probability p brought no answer.
    """

    confidence: float
    valid: bool = True
    served: bool = True
    input_length: int | None = None
    novelty: float | None = None
    unverified: float = 0.0


class Watch:
    """What is usual, and a detector for each sign."""

    __slots__ = ("arl", "detectors", "first", "limits", "settle")

    def __init__(self, arl: float, settle: int = 200) -> None:
        self.arl = arl
        self.settle = settle
        self.first: list[list[float | None]] = []
        self.limits: dict[str, list[float]] = {}
        self.detectors: dict[str, Detector] = {}

    def add(self, seen: LocalObservation) -> list[str]:
        """Count one local answer; the signs that raise an alarm with it."""
        if not self.detectors:
            self.first.append(
                [
                    float(seen.valid),
                    round(seen.confidence, 4),
                    None if seen.input_length is None else float(seen.input_length),
                    None if seen.novelty is None else round(seen.novelty, 4),
                ]
            )
            if len(self.first) >= self.settle:
                self._learn()
            return []
        alarms = [sign for sign, shows in self._signs(seen).items() if self.detectors[sign].add(0.0 if shows else 1.0)]
        if alarms:
            self.forget()
        return alarms

    def forget(self) -> None:
        """Learn anew what is usual."""
        self.first = []
        self.limits = {}
        self.detectors = {}

    def _learn(self) -> None:
        columns = [[row[i] for row in self.first if row[i] is not None] for i in range(len(SIGNS))]
        _, unsure, length, novelty = ([v for v in column if v is not None] for column in columns)
        self.limits = {"unsure": [_quantile(unsure, 0.1)]}
        if len(length) == len(self.first):
            self.limits["length"] = [_quantile(length, 0.025), _quantile(length, 0.975)]
        if len(novelty) == len(self.first):
            self.limits["novelty"] = [_quantile(novelty, 0.9)]
        usual = dict.fromkeys(("invalid", *self.limits), 0)
        for row in self.first:
            seen = LocalObservation(
                confidence=row[1] or 0.0,
                valid=bool(row[0]),
                input_length=None if row[2] is None else int(row[2]),
                novelty=row[3],
            )
            for sign, shows in self._signs(seen).items():
                usual[sign] += shows
        count = len(self.first)
        for sign, shown in usual.items():
            # The upper end of what the frequency may be: an estimate from a few hundred is no promise.
            often = (shown + 2.0) / count + 2.5 * (max(shown, 1.0) ** 0.5) / count
            self.detectors[sign] = Detector(1.0 - min(0.9, often), self.arl * len(usual))
        self.first = []

    def _signs(self, seen: LocalObservation) -> dict[str, bool]:
        signs = {"invalid": not seen.valid, "unsure": seen.confidence < self.limits["unsure"][0]}
        if "length" in self.limits and seen.input_length is not None:
            low, high = self.limits["length"]
            signs["length"] = not low <= seen.input_length <= high
        if "novelty" in self.limits and seen.novelty is not None:
            signs["novelty"] = seen.novelty > self.limits["novelty"][0]
        return signs

    def dump(self) -> dict[str, Any]:
        """JSON: the whole state."""
        return {
            "first": self.first,
            "limits": self.limits,
            "detectors": {
                sign: [round(d.level, 6), d.arl, [float(f"{held:.6g}") for held in d.sums]]
                for sign, d in self.detectors.items()
            },
        }

    @classmethod
    def load(cls, data: Mapping[str, Any], arl: float, settle: int = 200) -> Watch:
        """What ``dump`` gave."""
        watch = cls(arl, settle)
        watch.first = [list(row) for row in data["first"]]
        watch.limits = {sign: list(limits) for sign, limits in data["limits"].items()}
        far = arl * len(data["detectors"])
        watch.detectors = {sign: Detector(level, far, sums) for sign, (level, _, sums) in data["detectors"].items()}
        return watch


def _quantile(values: list[float], share: float) -> float:
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]
