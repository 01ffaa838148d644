"""Where tasks and their versions stand: read cheaply by every request, changed under a lock by comparisons.

What has been learnt belongs to a version (``version_states``); a task (``tasks``) says which one is wanted and whether
training is due. Whoever changes any of it holds the lock of the task's row.

**Beside older processes.** Those from before ``version_states`` read and write the champion's numbers in the task's
row. So they are written there too, with the same ``revision``; and where the task's row has the higher one, an older
process was the last to learn something of the champion, and it is the task's row that holds. Columns of ``tasks`` that
repeat a version's can go once no such process is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import and_, bindparam, delete, select, update
from sqlalchemy.dialects.postgresql import insert as upsert

from apprentice.confidence.decision import Policy
from apprentice.confidence.phases import Phase
from apprentice.errors import StoreError
from apprentice.store import comparisons, events
from apprentice.store.database import Transaction
from apprentice.store.records import StateChange, TaskPolicy, TaskState
from apprentice.store.tables import tasks, version_states

__all__ = ["ensure", "policies", "promote", "state", "update_state"]

# So many versions of a task are remembered beside its champion, those that learnt something last.
_KEPT = 16

_ensure = upsert(tasks).on_conflict_do_nothing(index_elements=["task"])
_numbers = ("phase", "threshold", "sampling_rate", "revision", "updated_at", "trust")
_task = select(tasks.c.champion, tasks.c.training_due, *(tasks.c[name] for name in _numbers)).where(
    tasks.c.task == bindparam("b_task")
)
_task_locked = _task.with_for_update()
_version = select(*(version_states.c[name] for name in _numbers)).where(
    version_states.c.task == bindparam("b_task"), version_states.c.version == bindparam("b_version")
)
_policies = select(
    tasks.c.task,
    tasks.c.champion,
    tasks.c.training_due,
    tasks.c.phase,
    tasks.c.threshold,
    tasks.c.sampling_rate,
    tasks.c.revision,
    version_states.c.version,
    version_states.c.phase,
    version_states.c.threshold,
    version_states.c.sampling_rate,
    version_states.c.revision,
).select_from(tasks.outerjoin(version_states, version_states.c.task == tasks.c.task))
_write_task = (
    update(tasks)
    .where(tasks.c.task == bindparam("b_task"))
    .values(
        champion=bindparam("b_champion"),
        training_due=bindparam("b_training_due"),
        **{name: bindparam(f"b_{name}") for name in _numbers},
    )
)
_write_due = update(tasks).where(tasks.c.task == bindparam("b_task")).values(training_due=bindparam("b_training_due"))
_add_version = upsert(version_states)
_write_version = _add_version.on_conflict_do_update(
    index_elements=["task", "version"], set_={name: _add_version.excluded[name] for name in _numbers}
)
_oldest = (
    select(version_states.c.version)
    .where(version_states.c.task == bindparam("b_task"))
    .order_by(version_states.c.updated_at.desc(), version_states.c.version)
    .offset(_KEPT)
)
_forget = delete(version_states).where(
    and_(version_states.c.task == bindparam("b_task"), version_states.c.version == bindparam("b_version"))
)


_NEW: dict[str, Any] = {
    "champion": None,
    "training_due": None,
    "phase": int(Phase.COLLECT),
    "threshold": None,
    "sampling_rate": 1.0,
    "revision": 0,
    "updated_at": 0.0,
    "trust": "",
}


def ensure(tx: Transaction, names: Iterable[str], at: float) -> None:
    for name in sorted(names):
        tx.run(_ensure, {**_NEW, "task": name, "updated_at": at})


def state(
    tx: Transaction, task: str, version: str | None = None, *, lock: bool = False, lent: bool = False
) -> TaskState:
    """A version's state, the champion's where none is named. With ``lent`` a task that is not there is a new one."""
    row: Any = tx.run(_task_locked if lock else _task, {"b_task": task}).fetchone()
    if row is None and lent:
        row = [_NEW[name] for name in ("champion", "training_due", *_numbers)]
    if row is None:
        raise StoreError(f"the store holds no task {task!r}; call ensure_tasks with every configured name first")
    champion, training_due, *copied = row
    version = version or champion
    own: Any = tx.run(_version, {"b_task": task, "b_version": version}).fetchone() if version else None
    if version == champion and (own is None or copied[3] > own[3]):
        own = copied
    return TaskState(task, champion, training_due, version, *(own or (int(Phase.SHADOW), None, 1.0, 0, 0.0, "")))


def policies(tx: Transaction) -> dict[str, TaskPolicy]:
    found: dict[str, TaskPolicy] = {}
    known: dict[str, dict[str, Policy]] = {}
    for task, champion, due, phase, threshold, rate, revision, version, *own in tx.run(_policies).fetchall():
        if task not in found:
            known[task] = {} if champion is None else {champion: Policy(Phase(phase), champion, threshold, rate)}
            found[task] = TaskPolicy(task, champion, due, known[task])
        if version is not None and (version != champion or own[3] >= revision):
            known[task][version] = Policy(Phase(own[0]), version, own[1], own[2])
    return found


def update_state(
    tx: Transaction, task: str, version: str | None, change: Callable[[TaskState], StateChange], at: float
) -> TaskState:
    before = state(tx, task, version, lock=True)
    return _apply(tx, before, change(before), before.revision + 1, at)


def promote(
    tx: Transaction, task: str, version: str, change: Callable[[TaskState, TaskState], StateChange], at: float
) -> TaskState:
    """Make ``version`` the one wanted; ``change`` sees the state of the champion before it, and its own."""
    before = state(tx, task, lock=True)
    if before.version is not None:
        _keep(tx, before)  # the task's row is about to speak of another
    own = state(tx, task, version)
    after = TaskState(task, version, None, version, own.phase, None, 1.0, own.revision, at, own.trust)
    written = _apply(tx, after, change(before, own), max(before.revision, own.revision) + 1, at)
    for (old,) in tx.run(_oldest, {"b_task": task}).fetchall():
        if old not in (version, before.version):
            tx.run(_forget, {"b_task": task, "b_version": old})
    return written


def _apply(tx: Transaction, before: TaskState, new: StateChange, revision: int, at: float) -> TaskState:
    """Write a change and what is recorded with it. ``before`` was read with its lock in this transaction."""
    after = TaskState(
        before.task,
        before.champion,
        new.training_due,
        before.version,
        new.phase,
        new.threshold,
        new.sampling_rate,
        revision,
        at,
        new.trust,
    )
    if after.version == after.champion:
        values = {f"b_{name}": getattr(after, name) for name in ("task", "champion", "training_due", *_numbers)}
        tx.run(_write_task, values)
    elif before.training_due != after.training_due:
        tx.run(_write_due, {"b_task": after.task, "b_training_due": after.training_due})
    if after.version is not None:
        _keep(tx, after)
    comparisons.add(tx, new.comparisons)
    events.add(tx, new.events)
    return after


def _keep(tx: Transaction, it: TaskState) -> None:
    tx.run(_write_version, {name: getattr(it, name) for name in ("task", "version", *_numbers)})
