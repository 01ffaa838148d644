"""The last comparisons of the served slice, and sums over them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from apprentice.confidence.correlation import Tally

__all__ = ["Seen", "ServedWindow"]


class Seen(NamedTuple):
    """One comparison as numbers. ``weight`` is sampling_rate / probability."""

    confidence: float
    score: float
    chance: float
    weight: float
    parts: list[float]
    chances: list[float]


class ServedWindow:
    """The last ``size`` comparisons of the served slice; sums over all of them, and over their recent half."""

    __slots__ = ("recent", "rows", "size", "tally")

    def __init__(self, size: int, rows: Iterable[Seen] = ()) -> None:
        self.size = size
        self.rows: list[Seen] = []
        self.tally = Tally()
        self.recent = Tally()
        for seen in rows:
            self.add(seen)

    def add(self, seen: Seen) -> None:
        """Let the newest in, and the oldest out where there is no room."""
        half = self.size // 2
        self.rows.append(seen)
        self.tally.add(seen.score, seen.chance)
        self.recent.add(seen.score, seen.chance)
        if len(self.rows) > half:
            old = self.rows[-half - 1]
            self.recent.remove(old.score, old.chance)
        if len(self.rows) > self.size:
            old = self.rows.pop(0)
            self.tally.remove(old.score, old.chance)

    def falling(self, sensitivity: float) -> float:
        """How far the recent half's correlation is below the older's; 0 within ``sensitivity`` or noise."""
        half = self.size // 2
        if len(self.rows) < self.size or half < 2:
            return 0.0
        whole, recent = self.tally, self.recent
        base = whole.u / whole.w
        if base <= 1e-9:
            return 0.0
        older_count = whole.w - recent.w
        drop = (recent.d / recent.w - (whole.d - recent.d) / older_count) / base
        p = whole.d / whole.w
        noise = 1.645 * math.sqrt(max(0.0, p * (1.0 - p)) * (1.0 / recent.w + 1.0 / older_count)) / base
        return drop if drop > max(sensitivity, noise) else 0.0
