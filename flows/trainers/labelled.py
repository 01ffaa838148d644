"""Token rows as other trainers' libraries want them: every token with a label, -100 where no loss lies.

Handing tokens over, not chat messages, is what keeps their templates and masks out of it: they train on the very tokens
that serving decides.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from apprentice.local.frame import Frame
from apprentice.local.skeleton import Skeleton
from apprentice.schemas.schema import Schema
from flows.trainers import TrainingRow
from flows.trainers.encoding import TokenRow, encode

__all__ = ["IGNORED", "labelled", "write_labelled"]

IGNORED = -100


def labelled(row: TokenRow) -> dict[str, list[int]]:
    """``input_ids``, ``attention_mask`` and ``labels``, all of one length; the libraries shift labels themselves."""
    tokens = [*row.tokens, row.targets[-1]]
    labels = [IGNORED] * len(tokens)
    for position, target in zip(row.positions, row.targets, strict=True):
        labels[position + 1] = target
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


def write_labelled(
    rows: Iterable[TrainingRow],
    path: Path,
    tokenizer: Any,
    skeleton: Skeleton,
    max_length: int,
    input_schema: Schema | None = None,
) -> tuple[int, int]:
    """Write JSON Lines; returns how many rows there are, and how many were left out."""
    encoded, left_out = encode(rows, tokenizer, Frame.of_tokenizer(tokenizer), skeleton, max_length, input_schema)
    with path.open("w", encoding="utf-8") as file:
        for row in encoded:
            file.write(json.dumps(labelled(row)) + "\n")
    return len(encoded), left_out
