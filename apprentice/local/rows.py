"""A training row: the tokens an engine would see for one example, and where the loss lies.

The trainers use this, the embedded engine decodes along the same boundaries; so what is learnt is what is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from apprentice.local.frame import Frame
from apprentice.local.skeleton import Skeleton

__all__ = ["Row", "training_row"]


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids, and for each whether the model decides it (the loss counts there). Both have the same length."""

    ids: list[int]
    decided: list[bool]


def training_row(tokenizer: Any, frame: Frame, skeleton: Skeleton, prompt: str, output: Mapping[str, Any]) -> Row:
    """Tokenise one example piece by piece: `compact_prompt` of its input, and an ``output`` that fits the skeleton.

    Raises ValueError if the output does not follow the skeleton.

    What follows the last decided piece is left out: no loss lies there, and an engine does not compute it either.
    """
    ids = frame.encode(tokenizer, prompt)
    decided = [False] * len(ids)
    for piece in skeleton.pieces(output):
        tokens = tokenizer(piece.text, add_special_tokens=False, split_special_tokens=True).input_ids
        ids += tokens
        decided += [piece.decided] * len(tokens)
    while decided and not decided[-1]:
        ids.pop()
        decided.pop()
    return Row(ids, decided)
