"""The ledger's atomic statements: reserve, settle, sum up. Which windows and caps is `apprentice.budget`'s affair.

Invariant: in every cap window ``spent <= committed``, and no reservation lifts ``committed`` above the cap. A call
holds its worst case in ``committed`` from before it is sent until its end is recorded; if nobody lives to record it, it
is held forever, which is what "a reservation whose owner died counts as spent" means. There is no sweeper to err.
A call may be held before anybody has it to make (``next_call``); it has no request's id then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from decimal import ROUND_HALF_EVEN, ROUND_UP, Decimal
from functools import lru_cache
from itertools import starmap
from typing import Any

from sqlalchemy import Update, bindparam, case, delete, insert, select, update
from sqlalchemy.dialects.postgresql import insert as upsert

from apprentice.store.database import Transaction
from apprentice.store.records import NANO, CapWindow, NextCall, Reservation, Settlement, WindowState
from apprentice.store.tables import calls, cap_windows

__all__ = ["end_calls", "open_windows", "reserve", "to_nano", "window_states"]

# The share of a cap up to which calls may be held that have yet to come: what is left of it is for those who have one.
_AMPLE = Decimal("0.9")

_insert_call = (
    insert(calls)
    .values(
        task=bindparam("b_task"),
        provider=bindparam("b_provider"),
        model=bindparam("b_model"),
        request_id=bindparam("b_request_id"),
        owner=bindparam("b_owner"),
        day=bindparam("b_day"),
        worst_case=bindparam("b_worst_case"),
        created_at=bindparam("b_created_at"),
    )
    .returning(calls.c.seq)
)
# Known to both dialects' compilers, which spell ON CONFLICT alike.
_open_window = upsert(cap_windows).on_conflict_do_nothing(index_elements=["key"])
_lock_all = select(cap_windows.c.key).order_by(cap_windows.c.key).with_for_update()

_end_call = (
    update(calls)
    .where(calls.c.seq == bindparam("b_seq"), calls.c.state == "reserved")
    .values(
        state=bindparam("b_state"),
        request_id=bindparam("b_request_id"),
        cost=bindparam("b_cost"),
        input_tokens=bindparam("b_input"),
        output_tokens=bindparam("b_output"),
        cached_tokens=bindparam("b_cached"),
        cache_write_tokens=bindparam("b_cache_write"),
        reasoning_tokens=bindparam("b_reasoning"),
        ended_at=bindparam("b_at"),
    )
)

# With its moment: SQLite gives the number of a row that was deleted to the next one.
_forget_call = delete(calls).where(
    calls.c.seq == bindparam("b_seq"), calls.c.created_at == bindparam("b_at"), calls.c.state == "reserved"
)


def to_nano(amount: Decimal, *, up: bool = False) -> int:
    """Whole nano-dollars; ``up`` rounds away from zero, for what is held."""
    return int((amount * NANO).to_integral_value(ROUND_UP if up else ROUND_HALF_EVEN))


def from_nano(nano: int) -> Decimal:
    return Decimal(int(nano)) / NANO


@lru_cache(maxsize=32)
def _reserve_in(n: int) -> Update:
    """Hold an amount in ``n`` windows, in each only where it still fits under that window's cap.

    As a CASE and not as an OR of conditions: SQLite gives each branch of an OR a cursor of its own, six times as slow.
    """
    keys: list[Any] = [bindparam(f"b_key{i}") for i in range(n)]
    caps: list[Any] = [bindparam(f"b_cap{i}") for i in range(n)]
    whens = [(cap_windows.c.key == key, cap) for key, cap in zip(keys[:-1], caps[:-1], strict=True)]
    cap = case(*whens, else_=caps[-1]) if whens else caps[-1]
    return (
        update(cap_windows)
        .where(cap_windows.c.key.in_(keys), cap_windows.c.committed <= cap - bindparam("b_amount"))
        .values(committed=cap_windows.c.committed + bindparam("b_amount"))
    )


@lru_cache(maxsize=32)
def _end_in(n: int) -> Update:
    """Turn what a call held in ``n`` windows into what it cost."""
    return (
        update(cap_windows)
        .where(cap_windows.c.key.in_([bindparam(f"b_key{i}") for i in range(n)]))
        .values(
            committed=cap_windows.c.committed + bindparam("b_change"),
            spent=cap_windows.c.spent + bindparam("b_cost"),
        )
        .returning(cap_windows.c.key, cap_windows.c.spent, cap_windows.c.committed)
    )


@lru_cache(maxsize=32)
def _locked(n: int) -> Any:
    return _lock_all.where(cap_windows.c.key.in_([bindparam(f"b_key{i}") for i in range(n)]))


def _lock(tx: Transaction, keys: Sequence[str]) -> None:
    """On PostgreSQL, take the rows' locks in the order of their keys: transactions that do so cannot deadlock."""
    if tx.dialect_name == "postgresql" and keys:
        tx.run(_locked(len(keys)), {f"b_key{i}": key for i, key in enumerate(keys)})


def open_windows(tx: Transaction, windows: Iterable[CapWindow]) -> None:
    """Make sure that the windows' rows are there."""
    for w in sorted(windows, key=lambda w: w.key):
        row = {"key": w.key, "scope": w.scope, "period": w.period, "start": w.start, "spent": 0, "committed": 0}
        tx.run(_open_window, row)


def reserve(
    tx: Transaction,
    *,
    task: str,
    provider: str,
    model: str,
    request_id: str,
    owner: str,
    day: str,
    worst_case: Decimal,
    windows: Sequence[CapWindow],
    at: float,
) -> Reservation | None:
    """Hold ``worst_case`` in all windows, or in none and return None. The caller rolls back on None."""
    amount = to_nano(worst_case, up=True)
    if windows:
        _lock(tx, [w.key for w in windows])
        values: dict[str, Any] = {"b_amount": amount}
        for i, w in enumerate(windows):
            values[f"b_key{i}"] = w.key
            values[f"b_cap{i}"] = to_nano(w.cap)
        if tx.run(_reserve_in(len(windows)), values).rowcount != len(windows):
            return None
    held = Reservation(0, task, provider, model, request_id, from_nano(amount), tuple(windows), at)
    return _insert(tx, held, owner, day)


def _insert(tx: Transaction, held: Reservation, owner: str, day: str) -> Reservation:
    """Write a reservation down; returns it with its number."""
    row = {
        "b_task": held.task,
        "b_provider": held.provider,
        "b_model": held.model,
        "b_request_id": held.request_id,
        "b_owner": owner,
        "b_day": day,
        "b_worst_case": to_nano(held.worst_case),
        "b_created_at": held.created_at,
    }
    return held.numbered(tx.run(_insert_call, row).fetchone()[0])


def end_calls(
    tx: Transaction, settlements: Sequence[Settlement], at: float, next_call: NextCall | None = None
) -> tuple[list[list[WindowState]], Reservation | None]:
    """Record how calls ended. A call ends once: ending it again changes nothing.

    Returns, for each settlement, its windows as they are after it (empty where it had ended before); and, where
    ``next_call`` is given and the caps leave ample room, what is now held for one more call like the last.
    """
    _lock(tx, sorted({w.key for s in settlements for w in s.reservation.windows}))
    after: list[list[WindowState]] = [[] for _ in settlements]
    held: Reservation | None = None
    # In the order of the totals that they change (see `migrations`), for the same reason.
    for i, s in sorted(enumerate(settlements), key=lambda pair: _total_of(pair[1])):
        worst_case = to_nano(s.reservation.worst_case)
        cost = worst_case if s.state == "lost" else to_nano(s.cost)
        if not _end(tx, s, cost, at):
            continue
        more = next_call if i == len(settlements) - 1 else None
        states, is_held = _end_in_windows(tx, s.reservation.windows, cost - worst_case, cost, more)
        after[i] = states
        if more is not None and is_held:
            worst = from_nano(to_nano(more.worst_case, up=True))
            last = s.reservation
            following = Reservation(0, last.task, last.provider, last.model, "", worst, last.windows, at)
            held = _insert(tx, following, more.owner, more.day)
    return after, held


def _total_of(s: Settlement) -> tuple[str, ...]:
    return s.reservation.task, s.reservation.provider, s.reservation.model, s.state


def _end(tx: Transaction, s: Settlement, cost: int, at: float) -> bool:
    """Write down a call's end; False where it had ended before. One that nobody came to make leaves no row."""
    if s.state == "released" and not s.reservation.request_id:
        values = {"b_seq": s.reservation.id, "b_at": s.reservation.created_at}
        return tx.run(_forget_call, values).rowcount == 1
    u = s.usage
    ended = {
        "b_seq": s.reservation.id,
        "b_state": s.state,
        "b_request_id": s.reservation.request_id,
        "b_cost": cost,
        "b_input": u.input,
        "b_output": u.output,
        "b_cached": u.cached,
        "b_cache_write": u.cache_write,
        "b_reasoning": u.reasoning,
        "b_at": at,
    }
    return tx.run(_end_call, ended).rowcount == 1


def _end_in_windows(
    tx: Transaction, windows: Sequence[CapWindow], change: int, cost: int, next_call: NextCall | None
) -> tuple[list[WindowState], bool]:
    """Change what is committed and spent in these windows, and whether ``next_call`` is committed in them too.

    It is committed at once, in the same statement, and taken back in the rare case that it was too much: nobody
    else sees these rows before the transaction ends.
    """
    if not windows:
        return [], True
    more = to_nano(next_call.worst_case, up=True) if next_call is not None else 0
    keys: dict[str, Any] = {f"b_key{i}": w.key for i, w in enumerate(windows)}
    run = _end_in(len(windows))
    rows = tx.run(run, {**keys, "b_change": change + more, "b_cost": cost}).fetchall()
    if more:
        ample = {w.key: _ample(w.cap) for w in windows}
        if any(committed > ample[key] for key, _, committed in rows):
            rows = tx.run(run, {**keys, "b_change": -more, "b_cost": 0}).fetchall()
            more = 0
    return list(starmap(WindowState, rows)), bool(more)


@lru_cache(maxsize=256)
def _ample(cap: Decimal) -> int:
    """Up to where calls that have yet to come may fill a cap, in nano-dollars."""
    return to_nano(cap * _AMPLE)


def window_states(tx: Transaction, keys: Sequence[str]) -> dict[str, WindowState]:
    """The windows that exist among ``keys``."""
    if not keys:
        return {}
    rows = tx.run(_states(len(keys)), {f"b_key{i}": key for i, key in enumerate(keys)}).fetchall()
    return {row[0]: WindowState(*row) for row in rows}


@lru_cache(maxsize=64)
def _states(n: int) -> Any:
    wanted = cap_windows.c.key.in_([bindparam(f"b_key{i}") for i in range(n)])
    return select(cap_windows.c.key, cap_windows.c.spent, cap_windows.c.committed).where(wanted)
