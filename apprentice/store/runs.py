"""Training runs, the leases that keep two of them apart, and the fence that a lease is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, fields, replace
from typing import Any

from sqlalchemy import and_, bindparam, insert, or_, select, update
from sqlalchemy.dialects.postgresql import insert as upsert

from apprentice.errors import LeaseLost, StoreError, TrainingError
from apprentice.secrets import scrub
from apprentice.store.database import Database, Transaction
from apprentice.store.records import Lease, RunRecord
from apprentice.store.tables import leases, runs

__all__ = [
    "FencedDatabase",
    "acquire",
    "lease",
    "of_task",
    "open_run",
    "release",
    "renew",
    "start",
    "take",
    "update_run",
]

_insert = insert(runs)
_columns = [c for c in runs.columns if c.name != "seq"]
_one = select(*_columns).where(runs.c.id == bindparam("b_id")).with_for_update()
_of_task = select(*_columns).where(runs.c.task == bindparam("b_task")).order_by(runs.c.seq)
_open = select(*_columns).where(runs.c.task == bindparam("b_task"), runs.c.state == "running")
_changing = [
    c.name
    for c in _columns
    if c.name not in ("id", "task", "reason", "data_high_water", "started_at", "promotions_seen", "kind")
]
_update = (
    update(runs).where(runs.c.id == bindparam("b_id")).values({name: bindparam(f"b_{name}") for name in _changing})
)


def start(tx: Transaction, run: RunRecord) -> RunRecord:
    found = open_run(tx, run.task)
    if found is not None:
        raise StoreError(
            f"task {run.task!r} has an unfinished training run {found.id}; resume it, or end it with update_run"
        )
    tx.run(_insert, dict(zip((f.name for f in fields(run)), astuple(run), strict=True)))
    return run


def update_run(tx: Transaction, run_id: str, at: float, changes: dict[str, Any]) -> RunRecord:
    row = tx.run(_one, {"b_id": run_id}).fetchone()
    if row is None:
        raise StoreError(f"the store holds no training run {run_id!r}")
    before = RunRecord(*row)
    if before.state not in ("running", "waits_for_review"):
        raise TrainingError(f"the training run {run_id} is over ({before.state}); start another with apprentice coach")
    run = replace(before, **changes)
    run = replace(run, error=scrub(run.error))  # vendors and servers quote what they were sent
    if run.state != "running" and run.finished_at is None:
        run = replace(run, finished_at=at)
    tx.run(_update, {"b_id": run.id, **{f"b_{name}": getattr(run, name) for name in _changing}})
    return run


def of_task(tx: Transaction, task: str) -> list[RunRecord]:
    return [RunRecord(*row) for row in tx.run(_of_task, {"b_task": task}).fetchall()]


def open_run(tx: Transaction, task: str) -> RunRecord | None:
    row = tx.run(_open, {"b_task": task}).fetchone()
    return RunRecord(*row) if row else None


# A lease that nobody holds, that ran out, or that is the owner's own. Its token grows whenever it is taken.
_take = upsert(leases)
_acquire = _take.on_conflict_do_update(
    index_elements=["name"],
    set_={
        "owner": _take.excluded.owner,
        "token": leases.c.token + 1,
        "expires_at": _take.excluded.expires_at,
    },
    where=or_(leases.c.expires_at <= bindparam("b_now"), leases.c.owner == _take.excluded.owner),
).returning(leases.c.token)
_mine = and_(
    leases.c.name == bindparam("b_name"),
    leases.c.owner == bindparam("b_owner"),
    leases.c.token == bindparam("b_token"),
)
_renew = update(leases).where(_mine).values(expires_at=bindparam("b_expires_at"))
_lease = select(leases).where(leases.c.name == bindparam("b_name"))
# Shared, so that nobody can take the lease between this look and the end of the transaction.
_held = select(leases.c.token).where(_mine).with_for_update(read=True)
_taken = _take.on_conflict_do_update(
    index_elements=["name"],
    set_={"owner": _take.excluded.owner, "token": leases.c.token + 1, "expires_at": _take.excluded.expires_at},
).returning(leases.c.token)
# The row stays, so that the next token is larger.
_release = update(leases).where(_mine).values(expires_at=0.0)


def acquire(tx: Transaction, name: str, owner: str, ttl_s: float, now: float) -> Lease | None:
    values = {"name": name, "owner": owner, "token": 1, "expires_at": now + ttl_s, "b_now": now}
    row = tx.run(_acquire, values).fetchone()
    return Lease(name, owner, int(row[0]), now + ttl_s) if row else None


def take(tx: Transaction, name: str, owner: str, ttl_s: float, now: float) -> Lease:
    row = tx.run(_taken, {"name": name, "owner": owner, "token": 1, "expires_at": now + ttl_s}).fetchone()
    return Lease(name, owner, int(row[0]), now + ttl_s)


def lease(tx: Transaction, name: str, now: float) -> Lease | None:
    row = tx.run(_lease, {"b_name": name}).fetchone()
    found = Lease(*row) if row else None
    return found if found is not None and found.expires_at > now else None


def renew(tx: Transaction, lease: Lease, ttl_s: float, now: float) -> Lease | None:
    mine = {"b_name": lease.name, "b_owner": lease.owner, "b_token": lease.token}
    if tx.run(_renew, {**mine, "b_expires_at": now + ttl_s}).rowcount != 1:
        return None
    return replace(lease, expires_at=now + ttl_s)


def release(tx: Transaction, lease: Lease) -> None:
    tx.run(_release, {"b_name": lease.name, "b_owner": lease.owner, "b_token": lease.token})


class FencedDatabase:
    """A database that is written to only as long as a lease is held: each transaction looks first.

    A lease that ran out is still held while nobody else has taken it. Raises `LeaseLost`.
    """

    def __init__(self, database: Database, lease: Lease) -> None:
        self.url = database.url
        self.dialect_name = database.dialect_name
        self.read_only = database.read_only
        self.read = database.read
        self.driver_connection = database.driver_connection
        self._database = database
        self._lease = lease

    @contextmanager
    def write(self, *, durable: bool = False) -> Iterator[Transaction]:
        mine = {"b_name": self._lease.name, "b_owner": self._lease.owner, "b_token": self._lease.token}
        with self._database.write(durable=durable) as tx:
            if tx.run(_held, mine).fetchone() is None:
                raise LeaseLost(f"the lease {self._lease.name!r} was lost to another worker; nothing more is written")
            yield tx

    def close(self) -> None:
        """Nothing: whose database it is closes it."""
