"""Where tasks stand: read cheaply by every request, changed under a lock by comparisons and promotions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import bindparam, select, update
from sqlalchemy.dialects.postgresql import insert as upsert

from apprentice.errors import StoreError
from apprentice.store import comparisons, events
from apprentice.store.database import Transaction
from apprentice.store.records import PolicyRow, StateChange, TaskState
from apprentice.store.tables import tasks

__all__ = ["apply", "ensure", "policies", "state", "update_state"]

_ensure = upsert(tasks).on_conflict_do_nothing(index_elements=["task"])
_state = select(tasks).where(tasks.c.task == bindparam("b_task"))
_state_locked = _state.with_for_update()
_policies = select(
    tasks.c.task,
    tasks.c.phase,
    tasks.c.champion,
    tasks.c.threshold,
    tasks.c.sampling_rate,
    tasks.c.revision,
    tasks.c.training_due,
)
_change = (
    update(tasks)
    .where(tasks.c.task == bindparam("b_task"))
    .values(
        phase=bindparam("b_phase"),
        champion=bindparam("b_champion"),
        threshold=bindparam("b_threshold"),
        sampling_rate=bindparam("b_sampling_rate"),
        trust=bindparam("b_trust"),
        revision=bindparam("b_revision"),
        training_due=bindparam("b_training_due"),
        updated_at=bindparam("b_at"),
    )
)


def ensure(tx: Transaction, names: Iterable[str], at: float) -> None:
    for name in sorted(names):
        row: dict[str, Any] = {"task": name, "phase": 1, "champion": None, "threshold": None, "sampling_rate": 1.0}
        tx.run(_ensure, {**row, "trust": "", "revision": 0, "training_due": None, "updated_at": at})


def state(tx: Transaction, task: str, *, lock: bool = False) -> TaskState:
    row = tx.run(_state_locked if lock else _state, {"b_task": task}).fetchone()
    if row is None:
        raise StoreError(f"the store holds no task {task!r}; call ensure_tasks with every configured name first")
    return TaskState(*row)


def policies(tx: Transaction) -> dict[str, PolicyRow]:
    return {row[0]: PolicyRow(*row) for row in tx.run(_policies).fetchall()}


def update_state(tx: Transaction, task: str, change: Callable[[TaskState], StateChange], at: float) -> TaskState:
    before = state(tx, task, lock=True)
    return apply(tx, before, change(before), at)


def apply(tx: Transaction, before: TaskState, new: StateChange, at: float) -> TaskState:
    """Write a change and what is recorded with it. ``before`` was read with its lock in this transaction."""
    after = TaskState(
        before.task,
        new.phase,
        new.champion,
        new.threshold,
        new.sampling_rate,
        new.trust,
        before.revision + 1,
        new.training_due,
        at,
    )
    tx.run(
        _change,
        {
            "b_task": after.task,
            "b_phase": after.phase,
            "b_champion": after.champion,
            "b_threshold": after.threshold,
            "b_sampling_rate": after.sampling_rate,
            "b_trust": after.trust,
            "b_revision": after.revision,
            "b_training_due": after.training_due,
            "b_at": at,
        },
    )
    comparisons.add(tx, new.comparisons)
    events.add(tx, new.events)
    return after
