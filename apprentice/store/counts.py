"""Requests by task, day, version and outcome: the only record of a purely local answer."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import bindparam, or_, select
from sqlalchemy.dialects.postgresql import insert as upsert

from apprentice.store.database import Transaction
from apprentice.store.records import Count
from apprentice.store.tables import counts

__all__ = ["add", "counted"]

_insert = upsert(counts)
_add = _insert.on_conflict_do_update(
    index_elements=["task", "day", "version", "outcome"],
    set_={
        "n": counts.c.n + _insert.excluded.n,
        "latency_s": counts.c.latency_s + _insert.excluded.latency_s,
    },
)
_counted = (
    select(counts)
    .where(
        or_(bindparam("b_task") == "", counts.c.task == bindparam("b_task")),
        counts.c.day >= bindparam("b_since"),
    )
    .order_by(counts.c.day, counts.c.task, counts.c.version, counts.c.outcome)
)


def add(tx: Transaction, rows: Iterable[Count]) -> None:
    # In key order: two transactions that add to the same rows cannot deadlock.
    for c in sorted(rows, key=lambda c: (c.task, c.day, c.version, c.outcome)):
        row = {"task": c.task, "day": c.day, "version": c.version, "outcome": c.outcome}
        tx.run(_add, {**row, "n": c.n, "latency_s": c.latency_s})


def counted(tx: Transaction, task: str | None, since: str | None) -> list[Count]:
    return [Count(*row) for row in tx.run(_counted, {"b_task": task or "", "b_since": since or ""}).fetchall()]
