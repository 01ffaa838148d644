"""Examples as token rows: the very tokens that serving sees, with the answers' decided tokens marked.

`apprentice.local.rows` knows where the loss lies; here its rows become what a training loop computes with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from apprentice.local.frame import Frame
from apprentice.local.rows import training_row
from apprentice.local.skeleton import Skeleton
from apprentice.prompts import compact_prompt
from apprentice.schemas.schema import Schema
from flows.trainers import TrainingRow

__all__ = ["TokenRow", "encode"]


@dataclass(frozen=True, slots=True)
class TokenRow:
    """``tokens`` [length]; the hidden state at ``positions[i]`` is to predict the token ``targets[i]``."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    targets: tuple[int, ...]


def encode(
    rows: Iterable[TrainingRow],
    tokenizer: Any,
    frame: Frame,
    skeleton: Skeleton,
    max_length: int,
    input_schema: Schema | None = None,
) -> tuple[list[TokenRow], int]:
    """Token rows, repeated as the rows ask, and how many rows were left out.

    Left out are rows longer than ``max_length`` tokens, and answers that do not follow the skeleton.

    The last token is only ever a target, so it is not among the row's tokens: serving never reads it either.
    """
    encoded: list[TokenRow] = []
    left_out = 0
    for row in rows:
        try:
            whole = training_row(tokenizer, frame, skeleton, compact_prompt(row.input, input_schema), row.output)
        except ValueError:  # an answer that no engine could have written; one row stops no run
            left_out += 1
            continue
        if len(whole.ids) > max_length:
            left_out += 1
            continue
        decided = [i for i, is_decided in enumerate(whole.decided) if is_decided]
        if decided:
            tokens = TokenRow(
                tuple(whole.ids[: decided[-1]]), tuple(i - 1 for i in decided), tuple(whole.ids[i] for i in decided)
            )
            encoded += [tokens] * row.repeat
    return encoded, left_out
