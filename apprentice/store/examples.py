"""What the remote taught, in the order in which it became visible."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import Any

from sqlalchemy import bindparam, func, insert, select

from apprentice.schemas.schema import compact_json
from apprentice.store.database import Transaction
from apprentice.store.records import ExampleRecord
from apprentice.store.tables import examples

__all__ = ["add", "before", "count", "count_since", "newest_inputs", "page"]

_insert = insert(examples).returning(examples.c.seq)
_columns = [c for c in examples.columns if c.name != "seq"]
_page = (
    select(*_columns, examples.c.seq)
    .where(examples.c.task == bindparam("b_task"), examples.c.seq > bindparam("b_after"))
    .order_by(examples.c.seq)
    .limit(bindparam("b_limit"))
)
_count = select(func.count()).where(examples.c.task == bindparam("b_task"), examples.c.seq > bindparam("b_after"))
_extent = select(func.count(), func.max(examples.c.seq)).where(examples.c.task == bindparam("b_task"))

_count_since = select(func.count()).where(
    examples.c.task == bindparam("b_task"), examples.c.created_at >= bindparam("b_at")
)
_before = (
    select(*_columns, examples.c.seq)
    .where(examples.c.task == bindparam("b_task"), examples.c.created_at < bindparam("b_at"))
    .order_by(examples.c.seq.desc())
    .limit(bindparam("b_limit"))
)
_newest_inputs = (
    select(examples.c.input)
    .where(examples.c.task == bindparam("b_task"))
    .order_by(examples.c.seq.desc())
    .limit(bindparam("b_limit"))
)


def dumps(value: Any) -> str:
    """Compact JSON that any database can hold."""
    text = compact_json(value)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, which JSON allows and UTF-8 does not
            return json.dumps(value, separators=(",", ":"))
    return text


def add(tx: Transaction, example: ExampleRecord) -> int:
    if tx.dialect_name == "postgresql":
        # A sequence hands out numbers before transactions commit; without this a reader that has seen 6 could miss 5.
        tx.run_text(f"SELECT pg_advisory_xact_lock(7233, {zlib.crc32(example.task.encode()) - 2**31})")
    row = {
        "id": example.id,
        "task": example.task,
        "input": dumps(example.input),
        "output": dumps(example.output),
        "provider": example.provider,
        "model": example.model,
        "created_at": example.created_at,
    }
    return int(tx.run(_insert, row).fetchone()[0])


def page(tx: Transaction, task: str, after: int, limit: int) -> list[ExampleRecord]:
    rows = tx.run(_page, {"b_task": task, "b_after": after, "b_limit": limit}).fetchall()
    return [_record(row) for row in rows]


def _record(row: Sequence[Any]) -> ExampleRecord:
    return ExampleRecord(row[0], row[1], json.loads(row[2]), json.loads(row[3]), *row[4:])


def before(tx: Transaction, task: str, at: float, limit: int) -> list[ExampleRecord]:
    rows = tx.run(_before, {"b_task": task, "b_at": at, "b_limit": limit}).fetchall()
    return [_record(row) for row in rows]


def count_since(tx: Transaction, task: str, at: float) -> int:
    return int(tx.run(_count_since, {"b_task": task, "b_at": at}).fetchone()[0])


def count(tx: Transaction, task: str, after: int) -> int:
    return int(tx.run(_count, {"b_task": task, "b_after": after}).fetchone()[0])


def extent(tx: Transaction, task: str) -> tuple[int, int]:
    number, last = tx.run(_extent, {"b_task": task}).fetchone()
    return int(number), int(last or 0)


def newest_inputs(tx: Transaction, task: str, limit: int) -> list[str]:
    return [row[0] for row in tx.run(_newest_inputs, {"b_task": task, "b_limit": limit}).fetchall()]
