"""Trained versions of tasks' local models, and which of them is champion."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sqlalchemy import bindparam, insert, select, update
from sqlalchemy.dialects.postgresql import insert as upsert

from apprentice.errors import ChosenMeanwhile, StoreError
from apprentice.secrets import scrub
from apprentice.store import states
from apprentice.store.database import Transaction
from apprentice.store.examples import dumps
from apprentice.store.records import (
    EventRecord,
    PromotedBy,
    PromotionRecord,
    StateChange,
    TaskState,
    VersionRecord,
    VersionStatus,
)
from apprentice.store.tables import promotions, versions

__all__ = ["add", "history", "of_task", "one", "promote", "set_status"]

_add = upsert(versions).on_conflict_do_nothing(index_elements=["task", "name"])
_columns = [c for c in versions.columns if c.name != "seq"]
_of_task = select(*_columns).where(versions.c.task == bindparam("b_task")).order_by(versions.c.seq)
_one = select(*_columns).where(versions.c.task == bindparam("b_task"), versions.c.name == bindparam("b_name"))
_set_status = (
    update(versions)
    .where(versions.c.task == bindparam("b_task"), versions.c.name == bindparam("b_name"))
    .values(status=bindparam("b_status"), reason=bindparam("b_reason"))
)
_leave_champions = (
    update(versions)
    .where(
        versions.c.task == bindparam("b_task"),
        versions.c.status == "champion",
        versions.c.name != bindparam("b_name"),
    )
    .values(status=bindparam("b_status"), reason=bindparam("b_reason"))
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


_promotion_columns = [c for c in promotions.columns if c.name != "seq"]
_add_promotion = insert(promotions)
_promotions = (
    select(*_promotion_columns, promotions.c.seq)
    .where(promotions.c.task == bindparam("b_task"))
    .order_by(promotions.c.seq)
)
_chosen_since = (
    select(promotions.c.version, promotions.c.by)
    .where(
        promotions.c.task == bindparam("b_task"),
        promotions.c.how != "gate",
        promotions.c.seq > bindparam("b_since"),
    )
    .order_by(promotions.c.seq.desc())
    .limit(1)
)


def history(tx: Transaction, task: str) -> list[PromotionRecord]:
    return [PromotionRecord(*row) for row in tx.run(_promotions, {"b_task": task}).fetchall()]


def promote(
    tx: Transaction,
    task: str,
    name: str,
    change: Callable[[TaskState, TaskState], StateChange],
    reason: str,
    at: float,
    *,
    how: PromotedBy,
    by: str,
    since: int | None,
) -> TaskState:
    """One event tells of it, with what ``change`` has to say of its promotion in it."""
    before = states.state(tx, task, lock=True)  # every writer of a task takes this lock first
    if since is not None:
        chosen = tx.run(_chosen_since, {"b_task": task, "b_since": since}).fetchone()
        if chosen is not None:
            raise ChosenMeanwhile(f"{chosen[1]} has made {chosen[0]} champion of {task!r} meanwhile; {name} waits")
    reason = scrub(reason)
    version = one(tx, task, name)
    if version is None:
        raise StoreError(f"task {task!r} has no version {name!r} in the store")
    left = "rolled_back" if how == "rollback" else "retired"
    why = f"rolled back to {name} by {by}: {reason}" if how == "rollback" else f"succeeded by {name}"
    tx.run(_leave_champions, {"b_task": task, "b_name": name, "b_status": left, "b_reason": why})
    set_status(tx, task, name, "champion", reason)
    previous = before.champion if before.champion != name else None
    row = {"task": task, "version": name, "previous": previous, "was": version.status, "how": how, "by": by}
    tx.run(_add_promotion, {**row, "reason": reason, "at": at})
    evidence = {**row, "because": version.reason, "reason": reason}
    del evidence["task"]

    def told(before: TaskState, own: TaskState) -> StateChange:
        new = change(before, own)
        said = {key: value for event in new.events if event.kind == "promoted" for key, value in event.evidence.items()}
        event = EventRecord(uuid.uuid4().hex, task, "promoted", "info", {**said, **evidence}, at)
        return replace(new, events=(event, *(other for other in new.events if other.kind != "promoted")))

    return states.promote(tx, task, name, told, at)
