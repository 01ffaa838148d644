"""Which local answers may be served: nested slices of the traffic, each certified by a betting process of its own.

A slice is the requests whose local confidence g is at least a threshold; the last one is everything. The served slice
is the largest certified one.

**Several slices, one error.** delta is divided over a few entry slices. When a slice is certified its share goes on
to the next larger one. This is a sequentially rejective graphical procedure (Bretz, Maurer, Brannath and Posch 2009),
which keeps the probability of certifying any slice wrongly at most delta without assuming that confidence means
anything; with one entry it is the fixed sequence from the most confident slice. Several entries cost a good model
log(1/share) more evidence, and save it from waiting for a slice of a tenth of the traffic where it is good on all.

**The grid is fixed before it is bet on**, until the next version: thresholds are confidences of the first comparisons
(normally the held-out ones of the gate), chosen without looking at their scores. Given that a threshold is the k-th
largest confidence, the comparisons above it are a plain sample of its slice; the one that set it is not, and does not
bet on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apprentice.confidence.certify import PRIOR, Wager, stakes

__all__ = ["Slice", "Slices", "grid"]

# Where delta enters, as shares of the traffic, and how it is divided.
ENTRIES: tuple[tuple[float, float], ...] = ((0.1, 0.3), (0.25, 0.3), (0.5, 0.2), (1.0, 0.2))
STEP = 0.05


@dataclass(frozen=True, slots=True)
class Slice:
    """What is known of one slice: ``share`` of the traffic, weighted ``agreement``, ``needed`` wealth to certify it."""

    threshold: float
    share: float
    agreement: float | None
    wealth: float
    needed: float
    certified: bool


def grid(confidences: Sequence[float], min_coverage: float, step: float = STEP) -> list[float]:
    """Descending thresholds of slices of ``min_coverage``, then ``step`` more each, of ``confidences``; then 0.0."""
    ranked = sorted(confidences, reverse=True)
    thresholds: list[float] = []
    share = min_coverage
    while share < 1.0 - step / 2 and ranked:
        threshold = ranked[min(len(ranked), max(1, math.ceil(share * len(ranked) - 1e-9))) - 1]
        if threshold > 0.0 and (not thresholds or threshold < thresholds[-1]):
            thresholds.append(threshold)
        share += step
    return [*thresholds, 0.0]


class Slices:
    """The betting processes of all slices, from the most confident to everything."""

    __slots__ = ("agreed", "certified", "delta", "seen", "shares", "thresholds", "wagers", "weights")

    def __init__(self, thresholds: Sequence[float], delta: float, confidences: Sequence[float] = ()) -> None:
        """``thresholds`` descend to 0.0; ``confidences`` are a sample of the traffic's, to place the entries."""
        self.thresholds = list(thresholds)
        self.delta = delta
        count = len(self.thresholds)
        self.wagers = [Wager() for _ in range(count)]
        self.weights = [0.0] * count
        self.agreed = [0.0] * count
        self.seen = 0.0
        self.certified: int | None = None
        sample = max(1, len(confidences))
        self.shares = [sum(g >= t for g in confidences) / sample for t in self.thresholds]
        self.shares[-1] = 1.0

    def entry_shares(self) -> list[float]:
        """The share of delta that each slice starts with; they sum to one."""
        held = [0.0] * len(self.thresholds)
        for place, part in ENTRIES:
            nearest = min(range(len(held)), key=lambda k: abs(self.shares[k] - place))
            held[nearest] += part
        return held

    def add(self, confidence: float, score: float, x: float, weight: float, *, skip: float | None = None) -> bool:
        """Let one comparison bet on every slice that holds it; whether a larger slice is certified now.

        ``skip`` is a threshold that this very comparison set.
        """
        factors = stakes(x, weight)
        self.seen += weight
        for k in range(len(self.thresholds) - 1, -1, -1):
            threshold = self.thresholds[k]
            if confidence < threshold:
                break
            self.weights[k] += weight
            self.agreed[k] += weight * score
            if threshold != skip:
                self.wagers[k].bet(factors)
        return self.settle()

    def needed(self) -> list[float]:
        """The wealth that certifies each slice, given what is certified already; infinite where no share has come."""
        held = self.entry_shares()
        last = len(held) - 1
        done = [False] * len(held)
        moved = True
        while moved:
            moved = False
            for k, wager in enumerate(self.wagers):
                if not done[k] and held[k] > 0.0 and wager.peak * held[k] * self.delta >= 1.0:
                    done[k] = moved = True
                    if k < last:
                        onward = next((j for j in range(k + 1, last + 1) if not done[j]), None)
                        if onward is not None:
                            held[onward] += held[k]
        return [1.0 / (share * self.delta) if share > 0.0 else math.inf for share in held]

    def settle(self) -> bool:
        """Certify what can be; whether the largest certified slice grew."""
        if not any(wager.peak * self.delta >= 1.0 for wager in self.wagers[self.certified or 0 :]):
            return False
        best = self.certified
        for k, needed in enumerate(self.needed()):
            if self.wagers[k].peak >= needed:
                best = k if best is None else max(best, k)
        grew = best != self.certified
        self.certified = best
        return grew

    def agreement(self, k: int) -> float | None:
        """Weighted agreement of slice ``k`` since the last restart; None before its first comparison."""
        return self.agreed[k] / self.weights[k] if self.weights[k] > 0.0 else None

    def share(self, k: int) -> float:
        """Share of the traffic in slice ``k``: measured, or the grid's own before there is anything to measure."""
        return self.weights[k] / self.seen if self.seen > 0.0 else self.shares[k]

    @property
    def threshold(self) -> float | None:
        """The least confidence that is served; None where nothing is certified."""
        return None if self.certified is None else self.thresholds[self.certified]

    def curve(self) -> list[Slice]:
        """Every slice with its figures, most confident first."""
        needed = self.needed()
        return [
            Slice(
                threshold=t,
                share=self.share(k),
                agreement=self.agreement(k),
                wealth=self.wagers[k].wealth,
                needed=needed[k],
                certified=self.certified is not None and k <= self.certified and self.wagers[k].peak >= needed[k],
            )
            for k, t in enumerate(self.thresholds)
        ]

    def restart(self) -> None:
        """Forget all evidence, keep the grid: what held before an alarm says nothing about the time after it."""
        count = len(self.thresholds)
        self.wagers = [Wager() for _ in range(count)]
        self.weights = [0.0] * count
        self.agreed = [0.0] * count
        self.seen = 0.0
        self.certified = None

    def hedge(self, stake: float) -> None:
        """Keep ``stake`` of what the evidence so far is worth, and start the rest afresh at 1.

        A mixture of two supermartingales is one. Used where evidence is shared with earlier attempts (``stake`` =
        1/attempts): it can then certify by itself with probability at most stake * delta.
        """
        for wager in self.wagers:
            wager.capital = [
                stake * held + (1.0 - stake) * start for held, start in zip(wager.capital, PRIOR, strict=True)
            ]
            wager.peak = max(1.0, wager.wealth)
        self.certified = None

    def dump(self) -> dict[str, Any]:
        """JSON: the whole state."""
        return {
            "delta": self.delta,
            "thresholds": self.thresholds,
            "shares": [round(share, 4) for share in self.shares],
            "capital": [[_short(c) for c in wager.capital] for wager in self.wagers],
            "peak": [_short(wager.peak) for wager in self.wagers],
            "weights": [round(w, 6) for w in self.weights],
            "agreed": [round(a, 6) for a in self.agreed],
            "seen": round(self.seen, 6),
            "certified": self.certified,
        }

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> Slices:
        """What ``dump`` gave."""
        slices = cls(data["thresholds"], data["delta"])
        slices.shares = list(data["shares"])
        slices.wagers = [Wager(c, p) for c, p in zip(data["capital"], data["peak"], strict=True)]
        slices.weights = list(data["weights"])
        slices.agreed = list(data["agreed"])
        slices.seen = data["seen"]
        slices.certified = data["certified"]
        return slices

    def replay(self, comparisons: Iterable[tuple[float, float, float, float]]) -> bool:
        """Bet (confidence, score, x, weight) of the comparisons that set the grid; whether something is certified.

        Of those that share a threshold's confidence exactly one set it, and exactly one does not bet on it.
        """
        setters = set(self.thresholds)
        grew = False
        for confidence, score, x, weight in comparisons:
            skip = confidence if confidence in setters else None
            setters.discard(confidence)
            grew = self.add(confidence, score, x, weight, skip=skip) or grew
        return grew


def _short(value: float) -> float:
    """Seven digits: what a capital needs to survive a million round trips through text within 1 %."""
    return float(f"{value:.7g}")
