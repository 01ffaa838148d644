"""Noticing that the served slice got worse.

``Guard`` is a Shiryaev-Roberts e-detector (Shin, Ramdas and Rinaldo 2024) on the spot checks of the served slice:

    R_t = (R_{t-1} + 1)(1 + lambda Y_t),   Y = m0 - s,   averaged over a grid of lambda

with m0 the agreement that the slice is held to. While agreement is at least m0, E[R_t] <= t, so the mean number of
comparisons until R reaches ARL is at least ARL. ``Watch`` does the same for cheap signs on every local answer; those
are only signs, so it asks for spot checks and decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

__all__ = ["Bets", "Change", "ChangeKind", "Detector", "Guard", "change_time", "expected_delay", "name_change"]

# As fractions of the largest admissible bet 1 / (1 - m0).
FRACTIONS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7)
MIXTURE = (0.1, 0.2, 0.25, 0.25, 0.15, 0.05)


class ChangeKind(StrEnum):
    """How the agreement went down: at once, or little by little."""

    SHIFT = "shift"
    DRIFT = "drift"


@dataclass(frozen=True, slots=True)
class Change:
    """What a look back at the recent scores says about an alarm."""

    kind: ChangeKind
    began: int
    """Comparisons before the alarm at which it seems to have begun."""
    before: float
    after: float


class Bets:
    """R_t for one stream of losses y >= -1, each of a mean of at most 0, given what came before, while all is well."""

    __slots__ = ("arl", "sums")

    def __init__(self, arl: float, sums: Sequence[float] | None = None) -> None:
        self.arl = arl
        self.sums = list(sums) if sums is not None else [0.0] * len(FRACTIONS)

    def bet(self, y: float) -> bool:
        """Count one loss; whether this is an alarm."""
        self.sums = sums = [(held + 1.0) * (1.0 + size * y) for held, size in zip(self.sums, FRACTIONS, strict=True)]
        # The mixture never exceeds its largest part, which is quicker to look at.
        return max(sums) >= self.arl and self.value >= self.arl

    @property
    def alarms(self) -> bool:
        """Whether what was counted so far is an alarm."""
        return max(self.sums) >= self.arl and self.value >= self.arl

    @property
    def value(self) -> float:
        """R, the mixture over the sizes of bet."""
        return sum(part * held for part, held in zip(MIXTURE, self.sums, strict=True))


class Detector(Bets):
    """R_t for one stream of scores in [0, 1] whose mean is promised to be at least ``level``."""

    __slots__ = ("level",)

    def __init__(self, level: float, arl: float, sums: Sequence[float] | None = None) -> None:
        super().__init__(arl, sums)
        self.level = level

    def add(self, score: float, weight: float = 1.0) -> bool:
        """Count one score; whether this is an alarm."""
        return self.bet(weight * (self.level - score) / max(1e-6, 1.0 - self.level))


# Falls that take longer to notice than this are not worth a closer figure.
_LONGEST_DELAY = 50_000


@lru_cache(maxsize=256)
def expected_delay(level: float, fall: float, arl: float) -> int:
    """About how many scores it takes a `Detector` to notice that the agreement fell by ``fall`` below its ``level``.

    For scores of 0 and 1, which vary most. Computed and not drawn: every part of the mixture grows by the mean of the
    logarithm of its factors. Luck makes a real one quicker: for falls of .05 to .20 below levels of .80 to .98 this is
    1.04 to 1.8 times the simulated mean, most where the fall is small and ``arl`` 1,000. At most 50,000.
    """
    after = max(0.0, level - fall)
    gain = level / max(1e-6, 1.0 - level)
    factors = [math.exp(after * math.log1p(-size) + (1.0 - after) * math.log1p(size * gain)) for size in FRACTIONS]
    sums = [0.0] * len(FRACTIONS)
    for count in range(1, _LONGEST_DELAY):
        sums = [(held + 1.0) * factor for held, factor in zip(sums, factors, strict=True)]
        if sum(part * held for part, held in zip(MIXTURE, sums, strict=True)) >= arl:
            return count
    return _LONGEST_DELAY


class Guard:
    """A detector with a memory of recent scores, so that an alarm can be named and dated."""

    __slots__ = ("detector", "memory", "recent")

    def __init__(self, level: float, arl: float, memory: int = 500) -> None:
        self.detector = Detector(level, arl)
        self.memory = memory
        self.recent: list[float] = []

    def add(self, score: float) -> Change | None:
        """Count one spot check of the served slice; the change, where this raises the alarm."""
        self.recent.append(score)
        if len(self.recent) > self.memory:
            del self.recent[0]
        if not self.detector.add(score):
            return None
        return name_change(self.recent, self.detector.level)

    def dump(self) -> dict[str, Any]:
        """JSON: the whole state."""
        return {
            "level": self.detector.level,
            "arl": self.detector.arl,
            "sums": [float(f"{held:.7g}") for held in self.detector.sums],
            "recent": [round(score, 4) for score in self.recent],
        }

    @classmethod
    def load(cls, data: Mapping[str, Any], arl: float, memory: int = 500) -> Guard:
        """What ``dump`` gave, held to today's ``arl``: the sums are evidence whatever they are compared with."""
        guard = cls(data["level"], arl, memory)
        guard.detector.sums = list(data["sums"])
        guard.recent = list(data["recent"])
        return guard


def change_time(alarm: float, checks: Sequence[float], began: int | None) -> float:
    """Since when evidence is of the time after a change.

    ``alarm`` is when it was noticed, ``checks`` are the times of the spot checks until then, the newest last, and
    ``began`` is how many of them came since the change (`Change.began`). Never later than ``alarm``; the oldest known
    check where fewer are known, and ``alarm`` itself where nothing dates the change: a later time only costs evidence.
    """
    known = [at for at in checks if at <= alarm]
    if not began or not known:
        return alarm
    return known[-min(began, len(known))]


def name_change(scores: Sequence[float], level: float) -> Change:
    """Whether a step or a ramp, starting from ``level``, fits ``scores`` better, and since when.

    Both are fitted by least squares at every possible beginning (at least three scores before the end): the step
    from ``level`` to the mean afterwards, the ramp from ``level`` downwards with a free slope. One free number each,
    so the smaller sum of squares wins.
    """
    count = len(scores)
    if count < 4:
        after = sum(scores) / count if count else level
        return Change(ChangeKind.SHIFT, count, level, after)
    best_step = best_ramp = (0.0, 0)
    total = 0.0
    first = 0.0
    # Walk the beginning from the end backwards: sums over scores[start:] of y, of position * y and of position^2.
    gain_step = gain_ramp = 0.0
    for start in range(count - 1, -1, -1):
        y = scores[start] - level
        # Every later score's position grows by one.
        first += total
        total += y
        first += y
        size = count - start
        if size < 3:
            continue
        squares = size * (size + 1) * (2 * size + 1) / 6.0
        gain_step = total * total / size if total < 0.0 else 0.0
        gain_ramp = first * first / squares if first < 0.0 else 0.0
        if gain_step > best_step[0]:
            best_step = (gain_step, start)
        if gain_ramp > best_ramp[0]:
            best_ramp = (gain_ramp, start)
    if best_step[0] >= best_ramp[0]:
        start = best_step[1]
        tail = scores[start:]
        return Change(ChangeKind.SHIFT, count - start, level, sum(tail) / len(tail))
    start = best_ramp[1]
    size = count - start
    slope = sum((i + 1) * (s - level) for i, s in enumerate(scores[start:])) / (
        size * (size + 1) * (2 * size + 1) / 6.0
    )
    return Change(ChangeKind.DRIFT, size, level, max(0.0, level + slope * size))
