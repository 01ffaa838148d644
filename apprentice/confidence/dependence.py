"""How far comparisons depend on those before them: the design effect, from means of batches.

The certificates are proved for scores that are independent of one another. Scores whose mean goes up and down say less:
n of them say what n / D independent ones say, where D, the design effect (Kish 1965), is the variance of their mean in
units of that of independent ones. It is estimated from the means of consecutive batches (Conway 1963; Geyer 1992,
section 3.2), of two sizes, and counts only where it is more than chance explains, so that independent scores lose
almost nothing.

What this is not: a proof. What goes up and down more slowly than what is remembered here cannot be seen. What is
remembered is bounded because a world that changed once, for good, must not look as if it went up and down for ever.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["Dependence"]

SIZE = 25
"""Scores in a batch. What lasts much longer than a batch shows in its mean."""
TOGETHER = 4
"""Batches that make a larger one: fewer, but what is slower shows in them more clearly."""
REMEMBERED = 32
"""Batches of which anything is known, a multiple of `TOGETHER`."""
FEWEST = 4
"""Batches of one size before it says anything."""
_QUANTILE = 1.645  # of the normal distribution: .95


class Dependence:
    """Takes scores in [0, 1] one after the other and remembers the last 800, in batches."""

    __slots__ = ("batches", "filled", "squares", "total")

    def __init__(self) -> None:
        self.batches: list[tuple[float, float]] = []  # sums of scores and of their squares
        self.filled = 0
        self.total = self.squares = 0.0  # of the batch that is being filled

    def add(self, score: float) -> None:
        """Take one score."""
        self.filled += 1
        self.total += score
        self.squares += score * score
        if self.filled == SIZE:
            self.batches.append((self.total, self.squares))
            self.filled, self.total, self.squares = 0, 0.0, 0.0
            if len(self.batches) >= REMEMBERED + TOGETHER:
                del self.batches[:TOGETHER]

    def design_effect(self) -> float:
        """How many of these scores say as much as one independent score; 1.0 where nothing speaks against that."""
        if len(self.batches) < FEWEST:
            return 1.0
        count = SIZE * len(self.batches)
        sums = [total for total, _ in self.batches]
        variance = sum(squares for _, squares in self.batches) / count - (sum(sums) / count) ** 2
        if variance <= 1e-9:
            return 1.0
        whole = len(sums) - len(sums) % TOGETHER
        larger = [sum(sums[at : at + TOGETHER]) for at in range(0, whole, TOGETHER)]
        return max(1.0, _effect(sums, SIZE * variance), _effect(larger, TOGETHER * SIZE * variance))

    def dump(self) -> dict[str, Any]:
        """JSON: the whole state."""
        return {
            "batches": [[round(total, 6), round(squares, 6)] for total, squares in self.batches],
            "filling": [self.filled, round(self.total, 6), round(self.squares, 6)],
        }

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> Dependence:
        """What ``dump`` gave."""
        one = cls()
        one.batches = [(total, squares) for total, squares in data["batches"]]
        one.filled, one.total, one.squares = data["filling"]
        return one


def _effect(sums: list[float], independent: float) -> float:
    """The variance of ``sums`` in units of what it would be of ``independent`` scores; 1.0 where chance explains it.

    The ratio is exceeded by chance once in twenty: chi-squared over its degrees of freedom (Wilson and Hilferty 1931).
    """
    freedom = len(sums) - 1
    if freedom < FEWEST - 1:
        return 1.0
    mean = sum(sums) / len(sums)
    found = sum((one - mean) ** 2 for one in sums) / freedom / independent
    ninth = 2.0 / (9.0 * freedom)
    return found if found > (1.0 - ninth + _QUANTILE * math.sqrt(ninth)) ** 3 else 1.0
