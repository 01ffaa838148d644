"""Certifying that few of *all* answers differ from the remote's, deferred ones included.

A deferred request is answered by the remote, so a slice of confidence at least t lets the share

    R(t) = P(g >= t and the local answer differs)

of all answers differ, and R(t) <= epsilon exactly where X = epsilon - 1{g >= t}(1 - s) has mean >= 0 over all traffic.
Every comparison bets on every slice: 1 - s is at risk inside it, nothing outside.

**No share of delta is lost to the number of slices.** X falls from a slice to each larger one for every single
comparison, and so does its wealth. Let t0 be the smallest slice with R >= epsilon. Whatever larger slice is certified
wrongly, the wealth of t0 has reached 1/delta as well, and that happens with probability at most delta. This holds for
all thresholds at once, those chosen from the very comparisons that bet included, since t0 depends on none of them
(fixed-sequence testing of nested hypotheses; compare Angelopoulos et al. 2021, Learn then Test). Capital is therefore
laid in and renewed for all slices at the same moment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from apprentice.confidence.certify import LOG_PRIOR, PRIOR, discounted, log_stakes, wealth

__all__ = ["Overall"]


class Overall:
    """A betting process for each of ``count`` nested slices, the most confident first, in one pass over the slices.

    A comparison is booked once, in the band of the smallest slice that holds it: with what it adds to the log capital
    of the slices that hold it, and what it adds to that of the smaller ones.
    """

    __slots__ = ("bases", "certified", "delta", "inside", "limit", "outside", "peaks")

    def __init__(self, limit: float, delta: float, count: int, stake: float) -> None:
        """``limit`` is epsilon, in (0, 1); ``stake`` the part of the capital that is laid in at the beginning."""
        self.limit, self.delta = limit, delta
        self.restart(count, stake)

    def restart(self, count: int, stake: float) -> None:
        """Forget all evidence about ``count`` slices."""
        self.inside = [[0.0] * len(LOG_PRIOR) for _ in range(count)]
        self.outside = [[0.0] * len(LOG_PRIOR) for _ in range(count)]
        self.bases = [[prior + math.log(stake) for prior in LOG_PRIOR] for _ in range(count)]
        self.peaks = [0.0] * count
        self.certified: int | None = None

    def add(self, k: int, score: float, weight: float) -> None:
        """Let one comparison bet; slice ``k`` is the smallest that holds it. ``weight`` as in `certify`."""
        at_risk = log_stakes(self.limit - (1.0 - score), weight)
        safe = log_stakes(self.limit, weight)
        self.inside[k] = [held + added for held, added in zip(self.inside[k], at_risk, strict=True)]
        self.outside[k] = [held + added for held, added in zip(self.outside[k], safe, strict=True)]

    def log_capital(self) -> list[list[float]]:
        """Log of the capital behind each size of bet, of every slice."""
        within = list(accumulate(self.inside, _plus))
        beyond = list(accumulate(reversed(self.outside[1:]), _plus, initial=[0.0] * len(LOG_PRIOR)))
        return [
            [sum(parts) for parts in zip(*of_slice, strict=True)]
            for of_slice in zip(self.bases, within, reversed(beyond), strict=True)
        ]

    def wealths(self) -> list[float]:
        """What the capital of every slice is worth now."""
        return [wealth(capital) for capital in self.log_capital()]

    def settle(self, design_effect: float = 1.0) -> None:
        """Look at every slice, and certify what has proved itself; see `certify.discounted`."""
        worths = [discounted(worth, design_effect) for worth in self.wealths()]
        self.peaks = [max(peak, worth) for peak, worth in zip(self.peaks, worths, strict=True)]
        for k, peak in enumerate(self.peaks):
            if peak * self.delta < 1.0:
                break
            self.certified = k if self.certified is None else max(self.certified, k)

    def renew(self, ruined: float, stake: float) -> bool:
        """Lay ``stake`` into all slices anew where the most confident one holds less than ``ruined``; whether it was.

        It loses least, so all the others have lost as much.
        """
        capital = self.log_capital()
        if wealth(capital[0]) >= ruined:
            return False
        start = math.log(stake)
        self.bases = [
            [base - held + prior + start for base, held, prior in zip(*of_slice, LOG_PRIOR, strict=True)]
            for of_slice in zip(self.bases, capital, strict=True)
        ]
        return True

    def hedge(self, stake: float, start: float) -> None:
        """Keep ``stake`` of what the evidence so far is worth, and begin again with ``start`` of the rest."""
        capital = self.log_capital()
        count = len(capital)
        self.restart(count, start)
        self.bases = [
            [
                math.log(stake * math.exp(min(held, 60.0)) + (1.0 - stake) * start * prior)
                for held, prior in zip(of_slice, PRIOR, strict=True)
            ]
            for of_slice in capital
        ]

    def dump(self) -> dict[str, Any]:
        """JSON: the whole state."""
        digits = {
            name: [[round(held, 6) for held in row] for row in getattr(self, name)]
            for name in ("inside", "outside", "bases")
        }
        peaks = [float(f"{min(peak, 1e300):.7g}") for peak in self.peaks]
        return {"limit": self.limit, "delta": self.delta, "certified": self.certified, "peaks": peaks, **digits}

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> Overall:
        """What ``dump`` gave."""
        one = cls(data["limit"], data["delta"], len(data["bases"]), 1.0)
        for name in ("inside", "outside", "bases", "peaks", "certified"):
            setattr(one, name, data[name])
        return one


def _plus(one: list[float], other: list[float]) -> list[float]:
    return [a + b for a, b in zip(one, other, strict=True)]
