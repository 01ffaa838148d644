"""What operators are told."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import bindparam, func, or_, select
from sqlalchemy.dialects.postgresql import insert as upsert

from apprentice.secrets import scrub_values
from apprentice.store.database import Transaction
from apprentice.store.examples import dumps
from apprentice.store.records import EventRecord
from apprentice.store.tables import events

__all__ = ["add", "add_unless_recent", "after", "latest"]

# An event is recorded once: several processes may notice the same thing and derive the same id.
_insert = upsert(events).on_conflict_do_nothing(index_elements=["id"])
_columns = [c for c in events.columns if c.name != "seq"]
_times = select(events.c.at).where(or_(*(events.c.id == bindparam(f"b_{n}") for n in (0, 1, 2))))
_lock = select(func.pg_advisory_xact_lock(func.hashtext(bindparam("b_matter"))))
_after = (
    select(*_columns, events.c.seq)
    .where(or_(bindparam("b_task") == "", events.c.task == bindparam("b_task")), events.c.seq > bindparam("b_after"))
    .order_by(events.c.seq)
    .limit(bindparam("b_limit"))
)
_latest = (
    select(*_columns, events.c.seq)
    .where(
        events.c.task == bindparam("b_task"),
        or_(bindparam("b_kind") == "", events.c.kind == bindparam("b_kind")),
        or_(bindparam("b_level") == "", events.c.level != bindparam("b_level")),
    )
    .order_by(events.c.seq.desc())
    .limit(1)
)


def add(tx: Transaction, records: Iterable[EventRecord]) -> int:
    """Returns how many of them are new. Those are in ``tx.events`` too, to be told to people after the commit."""
    new = 0
    for r in records:
        evidence = scrub_values(r.evidence)
        row = {"id": r.id, "task": r.task, "kind": r.kind, "level": r.level}
        if tx.run(_insert, {**row, "evidence": dumps(evidence), "at": r.at}).rowcount:
            tx.events.append(replace(r, evidence=evidence))
            new += 1
    return new


def add_unless_recent(tx: Transaction, record: EventRecord, quiet_s: float) -> float | None:
    """Add an event unless one about the same matter was added less than ``quiet_s`` seconds before it, by any process.

    Returns None if it was added, else when the earlier one happened. An id is MATTER:WINDOW; time is cut into windows
    of ``quiet_s``, so that an earlier event is in this window or in one beside it, at a known id.
    """
    matter, _, window = record.id.rpartition(":")
    if tx.dialect_name == "postgresql":  # SQLite has one writer at a time
        tx.run(_lock, {"b_matter": matter})
    ids = {f"b_{n}": f"{matter}:{int(window) + n - 1}" for n in (0, 1, 2)}
    for (at,) in tx.run(_times, ids).fetchall():
        if abs(record.at - at) < quiet_s:
            return float(at)
    return None if add(tx, [record]) else record.at


def after(tx: Transaction, task: str | None, since_seq: int, limit: int) -> list[EventRecord]:
    values = {"b_task": task or "", "b_after": since_seq, "b_limit": limit}
    return [_record(row) for row in tx.run(_after, values).fetchall()]


def latest(tx: Transaction, task: str, kind: str, but_level: str) -> EventRecord | None:
    """The newest of a task, of that kind, not of that level; "" is any kind, no level."""
    rows = tx.run(_latest, {"b_task": task, "b_kind": kind, "b_level": but_level}).fetchall()
    return _record(rows[0]) if rows else None


def _record(row: Sequence[Any]) -> EventRecord:
    return EventRecord(row[0], row[1], row[2], row[3], json.loads(row[4]), row[5], row[6])
