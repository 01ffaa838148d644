"""Trained versions of tasks' local models, and which of them is champion."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from sqlalchemy import bindparam, select, update
from sqlalchemy.dialects.postgresql import insert as upsert

from apprentice.errors import StoreError
from apprentice.secrets import scrub
from apprentice.store import states
from apprentice.store.database import Transaction
from apprentice.store.examples import dumps
from apprentice.store.records import StateChange, TaskState, VersionRecord, VersionStatus
from apprentice.store.tables import versions

__all__ = ["add", "of_task", "one", "promote", "set_status"]

_add = upsert(versions).on_conflict_do_nothing(index_elements=["task", "name"])
_columns = [c for c in versions.columns if c.name != "seq"]
_of_task = select(*_columns).where(versions.c.task == bindparam("b_task")).order_by(versions.c.seq)
_one = select(*_columns).where(versions.c.task == bindparam("b_task"), versions.c.name == bindparam("b_name"))
_set_status = (
    update(versions)
    .where(versions.c.task == bindparam("b_task"), versions.c.name == bindparam("b_name"))
    .values(status=bindparam("b_status"), reason=bindparam("b_reason"))
)
_retire_champions = (
    update(versions)
    .where(
        versions.c.task == bindparam("b_task"),
        versions.c.status == "champion",
        versions.c.name != bindparam("b_name"),
    )
    .values(status="retired", reason=bindparam("b_reason"))
)


def add(tx: Transaction, v: VersionRecord) -> None:
    row = {
        "name": v.name,
        "task": v.task,
        "status": v.status,
        "adapter": v.adapter,
        "base_model": v.base_model,
        "trained_on": v.trained_on,
        "held_out": v.held_out,
        "data_digest": v.data_digest,
        "mlflow_version": v.mlflow_version,
        "reason": v.reason,
        "record": dumps(v.record),
        "created_at": v.created_at,
        "remote_model": v.remote_model,
    }
    tx.run(_add, row)


def _record(row: tuple[Any, ...]) -> VersionRecord:
    values = dict(zip((c.name for c in _columns), row, strict=True))
    return VersionRecord(**{**values, "record": json.loads(values["record"])})


def of_task(tx: Transaction, task: str) -> list[VersionRecord]:
    return [_record(row) for row in tx.run(_of_task, {"b_task": task}).fetchall()]


def one(tx: Transaction, task: str, name: str) -> VersionRecord | None:
    row = tx.run(_one, {"b_task": task, "b_name": name}).fetchone()
    return _record(row) if row else None


def set_status(tx: Transaction, task: str, name: str, status: VersionStatus, reason: str) -> None:
    values = {"b_task": task, "b_name": name, "b_status": status, "b_reason": scrub(reason)}
    if tx.run(_set_status, values).rowcount != 1:
        raise StoreError(f"task {task!r} has no version {name!r} in the store")


def promote(
    tx: Transaction,
    task: str,
    name: str,
    change: Callable[[TaskState, TaskState], StateChange],
    reason: str,
    at: float,
) -> TaskState:
    states.state(tx, task, lock=True)  # every writer of a task takes this lock first
    set_status(tx, task, name, "champion", reason)
    tx.run(_retire_champions, {"b_task": task, "b_name": name, "b_reason": f"succeeded by {name}"})
    return states.promote(tx, task, name, change, at)
