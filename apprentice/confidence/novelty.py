"""How much of an input is made of words that the task has not met before."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["Vocabulary"]

_WORD = re.compile(r"\w+")
_LONGEST = 20_000  # characters of one text that are looked at


class Vocabulary:
    """The words of some texts. Numbers count as one word: an order number is always new and says nothing."""

    __slots__ = ("_known",)

    def __init__(self, texts: Iterable[str]) -> None:
        self._known: set[str] = set()
        for text in texts:
            self._known |= _words(text)

    def novelty(self, text: str) -> float:
        """The share of the text's distinct words that are not known, in [0, 1]; 0 for a text without words."""
        words = _words(text)
        return len(words - self._known) / len(words) if words else 0.0


def _words(text: str) -> set[str]:
    found = _WORD.findall(text[:_LONGEST].casefold())
    return {"0" if word.isdigit() else word for word in found}
