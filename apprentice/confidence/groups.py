"""Requests that repeat an earlier one: they count in every figure, and bet once.

Bets assume that comparisons come independently of one another. A request that was sent again by a client that retries,
or to every item of one order, brings no evidence that the first did not bring. So a certificate has to be reached
twice: by the bets on all comparisons, and by the bets on the first of each group alone. Whether a comparison is the
first is known before it is scored, so both are test supermartingales (see ``certify``), and whoever asks for both is
wrong no more often than with either.

Why not by the first ones alone: an input that makes up a quarter of the traffic would then hardly bet, and what the
model does to it would hardly count. By all comparisons it does.

A group is forgotten ``WINDOW`` comparisons after it bet, and bets again when it comes back. So a burst is caught, and a
task that has few different inputs goes on gathering evidence, if slowly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

__all__ = ["WINDOW", "Groups", "group_of"]

WINDOW = 200


def group_of(text: str) -> str:
    """The group of an input: alike are those that differ in case and white space only. 16 hexadecimal digits.

    Numbers and punctuation tell inputs apart: a task whose inputs are numbers would be one group without them.
    """
    folded = " ".join(text.casefold().split())
    return hashlib.blake2b(folded.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


class Groups:
    """Which groups have bet among the last ``window`` comparisons; no more are remembered."""

    __slots__ = ("_bet", "_count", "_window")

    def __init__(self, window: int = WINDOW) -> None:
        self._window = window
        self._count = 0
        self._bet: dict[str, int] = {}

    def first(self, group: str) -> bool:
        """Count one comparison; whether it is the first of its group. One without a group ("") always is."""
        self._count += 1
        while self._bet:
            oldest = next(iter(self._bet))
            if self._count - self._bet[oldest] < self._window:
                break
            del self._bet[oldest]
        if not group:
            return True
        if group in self._bet:
            return False
        self._bet[group] = self._count
        return True

    def dump(self) -> dict[str, Any]:
        """JSON: the whole state."""
        return {"count": self._count, "bet": self._bet}

    @classmethod
    def load(cls, data: Mapping[str, Any] | None) -> Groups:
        """What ``dump`` gave; nothing remembered for None."""
        groups = cls()
        if data is not None:
            groups._count, groups._bet = data["count"], dict(data["bet"])
        return groups
