"""Batches of rows of like length, in an order that only the seed and the epoch decide.

Padding is work thrown away. Sorting a window of shuffled rows by length leaves next to none, and shuffling the batches
keeps short and long ones mixed. The order is a pure function, so a resumed run goes on with the very next batch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

__all__ = ["bucketed", "padding"]

_WINDOW = 16  # batches sorted together: wide enough to fill them evenly, narrow enough to stay random


def bucketed(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The row numbers of every batch of an epoch; each row once."""
    draw = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    draw.shuffle(order)
    batches: list[list[int]] = []
    for start in range(0, len(order), batch_size * _WINDOW):
        window = sorted(order[start : start + batch_size * _WINDOW], key=lambda i: lengths[i])
        batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    draw.shuffle(batches)
    return batches


def padding(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """The share of computed positions that are padding."""
    computed = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    return 1.0 - sum(lengths[i] for batch in batches for i in batch) / computed if computed else 0.0
