"""A second, cheap watch on every local answer, compared or not.

It sees signs that need no remote answer: outputs outside the schema, a confidence among the lowest tenth or the
highest, an input longer or shorter than nineteen in twenty used to be, or made of words not seen before. The first
``settle`` observations of a version set what is usual; after that each sign has a Shiryaev-Roberts detector on how
often it shows. A sign says that something changed, not that it got worse, so an alarm asks for spot checks and nothing
else.

How often a sign shows while all is usual is an estimate, and a detector is held to the upper end of it. At 2, 4, 8 and
16 times ``settle`` further observations it is looked at again, and only ever lowered: traffic that changes meanwhile
leaves a detector as blunt as it was, and no blunter.

Strictly above the highest tenth counts as sure, so of a confidence that many answers share none does; where that is the
highest of all, the sign waits for what was never seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from apprentice.confidence.drift import Detector

__all__ = ["LocalObservation", "Watch"]

# Of confidences and novelties. A limit and what is held against it are rounded alike, or ties would be no ties.
_DIGITS = 4
# In numbers of `settle` observations: when to look again at how often signs show.
_LOOKS = (2, 4, 8, 16)


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

    __slots__ = ("arl", "detectors", "first", "limits", "settle", "shown", "watched")

    def __init__(self, arl: float, settle: int = 200) -> None:
        self.arl = arl
        self.settle = settle
        self.first: list[list[float | None]] = []
        self.limits: dict[str, list[float]] = {}
        self.detectors: dict[str, Detector] = {}
        self.watched = 0
        self.shown: dict[str, int] = {}

    def add(self, seen: LocalObservation) -> list[str]:
        """Count one local answer; the signs that raise an alarm with it."""
        if not self.detectors:
            self.first.append(
                [
                    float(seen.valid),
                    round(seen.confidence, _DIGITS),
                    None if seen.input_length is None else float(seen.input_length),
                    None if seen.novelty is None else round(seen.novelty, _DIGITS),
                ]
            )
            if len(self.first) >= self.settle:
                self._learn()
            return []
        signs = self._signs(seen)
        alarms = [sign for sign, shows in signs.items() if self.detectors[sign].add(0.0 if shows else 1.0)]
        if alarms:
            self.forget()
        elif self.watched < _LOOKS[-1] * self.settle:
            self._count(signs)
        return alarms

    def forget(self) -> None:
        """Learn anew what is usual."""
        self.first = []
        self.limits = {}
        self.detectors = {}
        self.watched = 0
        self.shown = {}

    def _count(self, signs: Mapping[str, bool]) -> None:
        """Look again at how often the signs show, at set times."""
        self.watched += 1
        for sign, shows in signs.items():
            if shows:
                self.shown[sign] = self.shown.get(sign, 0) + 1
        if self.watched % self.settle == 0 and self.watched // self.settle in _LOOKS:
            for sign, detector in self.detectors.items():
                detector.level = max(detector.level, _level(self.shown.get(sign, 0), self.watched))

    def _learn(self) -> None:
        columns = ([row[i] for row in self.first] for i in (1, 2, 3))
        confidence, length, novelty = ([v for v in column if v is not None] for column in columns)
        self.limits = {"unsure": [_quantile(confidence, 0.1)], "sure": [_quantile(confidence, 0.9)]}
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
        for sign, shown in usual.items():
            self.detectors[sign] = Detector(_level(shown, len(self.first)), self.arl * len(usual))
        self.first = []

    def _signs(self, seen: LocalObservation) -> dict[str, bool]:
        confidence = round(seen.confidence, _DIGITS)
        signs = {
            "invalid": not seen.valid,
            "unsure": confidence < self.limits["unsure"][0],
            "sure": confidence > self.limits["sure"][0],
        }
        if "length" in self.limits and seen.input_length is not None:
            low, high = self.limits["length"]
            signs["length"] = not low <= seen.input_length <= high
        if "novelty" in self.limits and seen.novelty is not None:
            signs["novelty"] = round(seen.novelty, _DIGITS) > self.limits["novelty"][0]
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
            "watched": self.watched,
            "shown": self.shown,
        }

    @classmethod
    def load(cls, data: Mapping[str, Any], arl: float, settle: int = 200) -> Watch:
        """What ``dump`` gave; one from before there was a watch on high confidences learns anew what is usual."""
        watch = cls(arl, settle)
        if data["detectors"] and "sure" not in data["limits"]:
            return watch
        watch.first = [list(row) for row in data["first"]]
        watch.limits = {sign: list(limits) for sign, limits in data["limits"].items()}
        far = arl * len(data["detectors"])
        watch.detectors = {sign: Detector(level, far, sums) for sign, (level, _, sums) in data["detectors"].items()}
        watch.watched, watch.shown = data.get("watched", 0), dict(data.get("shown", {}))
        return watch


def _level(shown: int, count: int) -> float:
    """How seldom a sign shows at least, that showed so often: the lower end, as an estimate is no promise."""
    often = (shown + 2.0) / count + 2.5 * math.sqrt(max(shown, 1)) / count
    return 1.0 - min(0.9, often)


def _quantile(values: list[float], share: float) -> float:
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]
