"""What operators are told."""

from __future__ import annotations

import json
from collections.abc import Iterable

from sqlalchemy import bindparam, or_, select
from sqlalchemy.dialects.postgresql import insert as upsert

from apprentice.store.database import Transaction
from apprentice.store.examples import dumps
from apprentice.store.records import EventRecord
from apprentice.store.tables import events

__all__ = ["add", "after"]

# An event is recorded once: several processes may notice the same thing and derive the same id.
_insert = upsert(events).on_conflict_do_nothing(index_elements=["id"])
_columns = [c for c in events.columns if c.name != "seq"]
_after = (
    select(*_columns, events.c.seq)
    .where(or_(bindparam("b_task") == "", events.c.task == bindparam("b_task")), events.c.seq > bindparam("b_after"))
    .order_by(events.c.seq)
    .limit(bindparam("b_limit"))
)


def add(tx: Transaction, records: Iterable[EventRecord]) -> int:
    """Returns how many of them are new."""
    new = 0
    for r in records:
        row = {"id": r.id, "task": r.task, "kind": r.kind, "level": r.level}
        new += tx.run(_insert, {**row, "evidence": dumps(r.evidence), "at": r.at}).rowcount
    return new


def after(tx: Transaction, task: str | None, since_seq: int, limit: int) -> list[EventRecord]:
    values = {"b_task": task or "", "b_after": since_seq, "b_limit": limit}
    return [
        EventRecord(r[0], r[1], r[2], r[3], json.loads(r[4]), r[5], r[6]) for r in tx.run(_after, values).fetchall()
    ]
