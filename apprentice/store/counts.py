"""Requests by task, day, version and outcome, and by the half that answered: the only record of a local answer."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import bindparam, func, or_, select
from sqlalchemy.dialects.postgresql import insert as upsert

from apprentice.store.database import Transaction
from apprentice.store.records import Count
from apprentice.store.tables import counts, local_answers

__all__ = ["add", "by_half", "counted"]

_insert = upsert(counts)
_add = _insert.on_conflict_do_update(
    index_elements=["task", "day", "version", "outcome"],
    set_={
        "n": counts.c.n + _insert.excluded.n,
        "latency_s": counts.c.latency_s + _insert.excluded.latency_s,
    },
)
_insert_half = upsert(local_answers)
_add_half = _insert_half.on_conflict_do_update(
    index_elements=["task", "day", "version", "answered_by"],
    set_={"n": local_answers.c.n + _insert_half.excluded.n},
)
_by_half = (
    select(local_answers.c.task, local_answers.c.answered_by, func.sum(local_answers.c.n))
    .where(local_answers.c.day >= bindparam("b_since"))
    .group_by(local_answers.c.task, local_answers.c.answered_by)
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
    rows = sorted(rows, key=lambda c: (c.task, c.day, c.version, c.outcome))
    for c in rows:
        row = {"task": c.task, "day": c.day, "version": c.version, "outcome": c.outcome}
        tx.run(_add, {**row, "n": c.n, "latency_s": c.latency_s})
    for c in sorted(rows, key=lambda c: (c.task, c.day, c.version, c.answered_by)):
        if c.answered_by:
            row = {"task": c.task, "day": c.day, "version": c.version, "answered_by": c.answered_by}
            tx.run(_add_half, {**row, "n": c.n})


def counted(tx: Transaction, task: str | None, since: str | None) -> list[Count]:
    return [Count(*row) for row in tx.run(_counted, {"b_task": task or "", "b_since": since or ""}).fetchall()]


def by_half(tx: Transaction, since: str) -> dict[tuple[str, str], int]:
    """(task, half) -> how many of its answers callers got from a day on."""
    return {(task, half): int(n) for task, half, n in tx.run(_by_half, {"b_since": since}).fetchall()}
