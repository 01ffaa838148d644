"""Requests answered by both models."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Container, Iterable, Sequence
from typing import Any

from sqlalchemy import bindparam, func, insert, select

from apprentice.confidence.correlation import effective_size
from apprentice.store.database import Transaction
from apprentice.store.examples import dumps
from apprentice.store.records import Compared, ComparisonRecord
from apprentice.store.tables import comparisons

__all__ = ["add", "by_half", "newest", "overbought", "recent_disagreements"]

_insert = insert(comparisons)
_columns = [c for c in comparisons.columns if c.name != "seq"]
_names = [c.name for c in (*_columns, comparisons.c.seq)]
_newest = (
    select(*_columns, comparisons.c.seq)
    .where(comparisons.c.task == bindparam("b_task"))
    .order_by(comparisons.c.seq.desc())
    .limit(bindparam("b_limit"))
)
_newest_of_version = _newest.where(comparisons.c.version == bindparam("b_version"))
_disagreements = (
    select(comparisons.c.request_id)
    .where(comparisons.c.task == bindparam("b_task"), comparisons.c.score < 1)
    .order_by(comparisons.c.seq.desc())
    .limit(bindparam("b_limit"))
)
# A deferred request was bought for sure, where a spot check would have been bought with the sampling rate.
_overbought = select(comparisons.c.request_id, comparisons.c.sampling_rate, comparisons.c.probability).where(
    comparisons.c.task == bindparam("b_task"),
    comparisons.c.seeded == 0,
    comparisons.c.sampling_rate < comparisons.c.probability,
)
_weight = 1.0 / comparisons.c.probability
# Held-out answers are none that a caller could have got, and what has no score agrees with nothing.
_by_half = (
    select(
        comparisons.c.task,
        comparisons.c.answered_by,
        comparisons.c.served,
        func.count(),
        func.sum(_weight),
        func.sum(_weight * comparisons.c.score),
        func.sum(_weight * _weight),
    )
    .where(
        comparisons.c.seeded == 0,
        comparisons.c.score.is_not(None),
        comparisons.c.probability > 0,
        comparisons.c.created_at >= bindparam("b_since"),
    )
    .group_by(comparisons.c.task, comparisons.c.answered_by, comparisons.c.served)
)


def add(tx: Transaction, records: Iterable[ComparisonRecord]) -> None:
    for r in records:
        row = {
            "id": r.id,
            "task": r.task,
            "request_id": r.request_id,
            "version": r.version,
            "score": r.score,
            "parts": dumps(r.parts),
            "confidence": r.confidence,
            "local": dumps(r.local),
            "remote": dumps(r.remote),
            "probability": r.probability,
            "sampling_rate": r.sampling_rate,
            "served": int(r.served),
            "seeded": int(r.seeded),
            "created_at": r.created_at,
            "answered_by": r.answered_by,
        }
        tx.run(_insert, row)


def newest(tx: Transaction, task: str, version: str | None, limit: int) -> list[ComparisonRecord]:
    values = {"b_task": task, "b_limit": limit}
    if version is None:
        rows = tx.run(_newest, values).fetchall()
    else:
        rows = tx.run(_newest_of_version, {**values, "b_version": version}).fetchall()
    return [_record(row) for row in rows]


def _record(row: tuple[Any, ...]) -> ComparisonRecord:
    values = dict(zip(_names, row, strict=True))
    for name in ("parts", "local", "remote"):
        values[name] = json.loads(values[name])
    for name in ("served", "seeded"):
        values[name] = bool(values[name])
    return ComparisonRecord(**values)


def recent_disagreements(tx: Transaction, task: str, limit: int) -> list[str]:
    return [r[0] for r in tx.run(_disagreements, {"b_task": task, "b_limit": limit}).fetchall()]


def overbought(tx: Transaction, task: str, request_ids: Container[str]) -> dict[str, tuple[float, float]]:
    cursor = tx.run(_overbought, {"b_task": task})
    found: dict[str, tuple[float, float]] = {}
    while rows := cursor.fetchmany(10_000):
        found.update((row[0], (row[1], row[2])) for row in rows if row[0] in request_ids)
    return found


def by_half(tx: Transaction, since: float) -> dict[tuple[str, str], tuple[Compared, Compared]]:
    """(task, half) -> what it was trusted with, and everything that was compared since then (Unix seconds)."""
    sums: defaultdict[tuple[str, str], dict[int, tuple[float, ...]]] = defaultdict(dict)
    for task, half, served, *of in tx.run(_by_half, {"b_since": since}).fetchall():
        sums[task, half][served] = tuple(of)
    return {
        key: (_compared(parts.get(1, _NOTHING)), _compared([sum(both) for both in zip(*parts.values(), strict=True)]))
        for key, parts in sums.items()
    }


_NOTHING = (0, 0.0, 0.0, 0.0)


def _compared(sums: Sequence[float]) -> Compared:
    n, weight, agreed, squares = sums
    return Compared(int(n), agreed / weight, effective_size(weight, squares)) if weight > 0.0 else Compared()
