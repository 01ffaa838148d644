"""The ledger's atomic statements: reserve, settle, release. Which windows is `apprentice.money.budget`'s affair.

Invariants: no reservation lifts a window's ``committed`` above the cap that `caps` holds for it, ``spent`` never falls,
and ``committed - spent`` is what open calls hold. A bill may exceed what was held for it; it is counted in full, and
the window has no room until it has. A call holds its worst case from before it is sent until its end is recorded; if
nobody lives to record it, it is held until a person releases it, which is what "a reservation whose owner died counts
as spent" means. There is no sweeper to err.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, timedelta
from decimal import ROUND_HALF_EVEN, ROUND_UP, Decimal
from functools import lru_cache
from itertools import starmap
from typing import Any

from sqlalchemy import Update, bindparam, case, delete, func, insert, literal_column, select, update
from sqlalchemy.dialects.postgresql import insert as upsert

from apprentice.store.database import Transaction
from apprentice.store.records import NANO, CapChanges, CapWindow, Reservation, Settlement, WindowState
from apprentice.store.tables import calls, cap_windows, caps

__all__ = [
    "caps_in_force",
    "end_calls",
    "find_calls",
    "open_calls",
    "open_windows",
    "release_by_hand",
    "release_unsent",
    "reserve",
    "set_caps",
    "to_nano",
    "window_states",
]

# 64 bits hold a little more than twice that; no cap, price or bill of this world comes near.
_MOST_NANO = 4 * 10**18
_NO_WINDOWS = "-"  # of a call that was reserved under no cap; "" is a row that does not say

# Spelt out, so that both databases see that the partial index `calls_open` answers.
_is_open = calls.c.state == literal_column("'reserved'")

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
        windows=bindparam("b_windows"),
    )
    .returning(calls.c.seq)
)
# Known to both dialects' compilers, which spell ON CONFLICT alike.
_open_window = upsert(cap_windows).on_conflict_do_nothing(index_elements=["key"])
_open_cap = upsert(caps).on_conflict_do_nothing(index_elements=["key"])
_set_cap = upsert(caps)
_set_cap = _set_cap.on_conflict_do_update(
    index_elements=["key"],
    set_={"cap": _set_cap.excluded.cap, "configured_at": _set_cap.excluded.configured_at},
    where=_set_cap.excluded.configured_at >= caps.c.configured_at,
)
_caps = select(caps.c.key, caps.c.cap)
_lock_all = select(cap_windows.c.key).order_by(cap_windows.c.key).with_for_update()

_ending: dict[str, Any] = {
    "state": bindparam("b_state"),
    "cost": bindparam("b_cost"),
    "input_tokens": bindparam("b_input"),
    "output_tokens": bindparam("b_output"),
    "cached_tokens": bindparam("b_cached"),
    "cache_write_tokens": bindparam("b_cache_write"),
    "reasoning_tokens": bindparam("b_reasoning"),
    "ended_at": bindparam("b_at"),
}
_end_call = update(calls).where(calls.c.seq == bindparam("b_seq"), calls.c.state == "reserved").values(**_ending)
# A person took the owner for dead, and it lived to tell what the call cost.
_end_released_call = (
    update(calls)
    .where(calls.c.seq == bindparam("b_seq"), calls.c.state == "released", calls.c.reason != "")
    .values(**_ending)
)
_release_by_hand = (
    update(calls)
    .where(calls.c.seq == bindparam("b_seq"), calls.c.state == "reserved")
    .values(state="released", reason=bindparam("b_reason"), ended_at=bindparam("b_at"))
)
# With its moment: SQLite gives the number of a row that was deleted to the next one.
_forget_call = delete(calls).where(
    calls.c.seq == bindparam("b_seq"), calls.c.created_at == bindparam("b_at"), calls.c.state == "reserved"
)
_call_columns = (
    calls.c.seq,
    calls.c.task,
    calls.c.provider,
    calls.c.model,
    calls.c.request_id,
    calls.c.worst_case,
    calls.c.windows,
    calls.c.created_at,
    calls.c.owner,
    calls.c.day,
    calls.c.state,
)
_open_calls = select(*_call_columns).where(_is_open).order_by(calls.c.seq)
_find_calls = (
    select(*_call_columns)
    .where(calls.c.request_id == bindparam("b_request_id"), calls.c.provider == bindparam("b_provider"))
    .order_by(calls.c.seq)
)


def to_nano(amount: Decimal, *, up: bool = False) -> int:
    """Whole nano-dollars; ``up`` rounds away from zero, for what is held. At most what 64 bits hold with ease."""
    return min(int((amount * NANO).to_integral_value(ROUND_UP if up else ROUND_HALF_EVEN)), _MOST_NANO)


def from_nano(nano: int) -> Decimal:
    return Decimal(int(nano)) / NANO


_cap_here = (
    select(func.coalesce(caps.c.cap, _MOST_NANO))
    .where(caps.c.key == cap_windows.c.scope + "|" + cap_windows.c.period)
    .scalar_subquery()
)


def _keys(n: int) -> list[Any]:
    return [bindparam(f"b_key{i}") for i in range(n)]


def _named(keys: Iterable[str]) -> dict[str, Any]:
    return {f"b_key{i}": key for i, key in enumerate(keys)}


@lru_cache(maxsize=32)
def _reserve_in(n: int) -> Update:
    """Hold an amount in ``n`` windows, in each only where it still fits under the cap in force."""
    return (
        update(cap_windows)
        .where(cap_windows.c.key.in_(_keys(n)), cap_windows.c.committed <= _cap_here - bindparam("b_amount"))
        .values(committed=cap_windows.c.committed + bindparam("b_amount"))
    )


@lru_cache(maxsize=32)
def _end_in(n: int) -> Update:
    """Turn what a call held in ``n`` windows into what it cost."""
    return (
        update(cap_windows)
        .where(cap_windows.c.key.in_(_keys(n)))
        .values(
            committed=cap_windows.c.committed + bindparam("b_change"),
            spent=cap_windows.c.spent + bindparam("b_cost"),
        )
        .returning(cap_windows.c.key, cap_windows.c.spent, cap_windows.c.committed)
    )


@lru_cache(maxsize=32)
def _free_in(n: int) -> Update:
    """Give back an amount in those of ``n`` windows that held it: never below what is spent."""
    left = cap_windows.c.committed - bindparam("b_amount")
    return (
        update(cap_windows)
        .where(cap_windows.c.key.in_(_keys(n)))
        .values(committed=case((left < cap_windows.c.spent, cap_windows.c.spent), else_=left))
    )


@lru_cache(maxsize=32)
def _locked(n: int) -> Any:
    return _lock_all.where(cap_windows.c.key.in_(_keys(n)))


def _lock(tx: Transaction, keys: Sequence[str]) -> None:
    """On PostgreSQL, take the rows' locks in the order of their keys: transactions that do so cannot deadlock."""
    if tx.dialect_name == "postgresql" and keys:
        tx.run(_locked(len(keys)), _named(keys))


def set_caps(tx: Transaction, by_key: Mapping[str, Decimal | None], at: float) -> CapChanges:
    """Put caps in force (``scope|period`` -> USD, None for none), unless a newer configuration has spoken.

    Returns the caps that were in force and have changed: what they were, and what they are.
    """
    before = caps_in_force(tx)
    for key in sorted(by_key):
        cap = by_key[key]
        tx.run(_set_cap, {"key": key, "cap": None if cap is None else to_nano(cap), "configured_at": at})
    after = caps_in_force(tx)
    return {key: (cap, after[key]) for key, cap in before.items() if after[key] != cap}


def caps_in_force(tx: Transaction) -> dict[str, Decimal | None]:
    """Every cap by ``scope|period``."""
    return {key: None if cap is None else from_nano(cap) for key, cap in tx.run(_caps).fetchall()}


def open_windows(tx: Transaction, windows: Iterable[CapWindow]) -> None:
    """Make sure that the windows' rows are there, and caps for them."""
    for w in sorted(windows, key=lambda w: w.key):
        tx.run(_open_cap, {"key": f"{w.scope}|{w.period}", "cap": to_nano(w.cap), "configured_at": 0.0})
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
    keys = [w.key for w in windows]
    if windows:
        _lock(tx, keys)
        if tx.run(_reserve_in(len(keys)), {**_named(keys), "b_amount": amount}).rowcount != len(keys):
            return None
    row = {
        "b_task": task,
        "b_provider": provider,
        "b_model": model,
        "b_request_id": request_id,
        "b_owner": owner,
        "b_day": day,
        "b_worst_case": amount,
        "b_created_at": at,
        "b_windows": "\n".join(keys) or _NO_WINDOWS,
    }
    number = tx.run(_insert_call, row).fetchone()[0]
    return Reservation(number, task, provider, model, request_id, from_nano(amount), tuple(windows), at, owner)


def end_calls(tx: Transaction, settlements: Sequence[Settlement], at: float) -> list[list[WindowState] | None]:
    """Record how calls ended. A call ends once: ending it again changes nothing.

    The exception is a call that a person released whose owner was alive after all: what it cost counts. Returns, for
    each settlement, its windows as they are after it, or None where it had ended before.
    """
    _lock(tx, sorted({w.key for s in settlements for w in s.reservation.windows}))
    after: list[list[WindowState] | None] = [None] * len(settlements)
    # In the order of the totals that they change (see `migrations`), for the same reason.
    for i, s in sorted(enumerate(settlements), key=lambda pair: _total_of(pair[1])):
        after[i] = _end(tx, s, at)
    return after


def _total_of(s: Settlement) -> tuple[str, ...]:
    return s.reservation.task, s.reservation.provider, s.reservation.model, s.state


def _end(tx: Transaction, s: Settlement, at: float) -> list[WindowState] | None:
    held = to_nano(s.reservation.worst_case)
    cost = held if s.state == "lost" else to_nano(s.cost)
    u = s.usage
    ended = {
        "b_seq": s.reservation.id,
        "b_state": s.state,
        "b_cost": cost,
        "b_input": u.input,
        "b_output": u.output,
        "b_cached": u.cached,
        "b_cache_write": u.cache_write,
        "b_reasoning": u.reasoning,
        "b_at": at,
    }
    if tx.run(_end_call, ended).rowcount != 1:
        if s.state == "released" or tx.run(_end_released_call, ended).rowcount != 1:
            return None
        held = 0
    keys = [w.key for w in s.reservation.windows]
    if not keys:
        return []
    changes = {**_named(keys), "b_change": cost - held, "b_cost": cost}
    return list(starmap(WindowState, tx.run(_end_in(len(keys)), changes).fetchall()))


def open_calls(tx: Transaction) -> list[Reservation]:
    """Every call that is held and has not ended, the oldest first. Its windows do not say how large their caps are."""
    return [_reservation(row) for row in tx.run(_open_calls).fetchall()]


def find_calls(tx: Transaction, request_id: str, provider: str) -> list[tuple[Reservation, str]]:
    """The calls of one request to a provider, each with its state. Looks at every call: for rare questions."""
    rows = tx.run(_find_calls, {"b_request_id": request_id, "b_provider": provider}).fetchall()
    return [(_reservation(row), row[10]) for row in rows]


def release_by_hand(tx: Transaction, number: int, reason: str, at: float) -> Reservation | None:
    """Give back what an open call holds, on a person's word; None where no such call is open."""
    held = next((call for call in open_calls(tx) if call.id == number), None)
    if held is None:
        return None
    _free(tx, held)
    tx.run(_release_by_hand, {"b_seq": number, "b_reason": reason, "b_at": at})
    return held


def release_unsent(tx: Transaction, is_over: Callable[[Reservation], bool]) -> list[Reservation]:
    """Forget calls that nobody had to make: an Apprentice of old held them ahead, under no request's id, and died."""
    over = [call for call in open_calls(tx) if not call.request_id and is_over(call)]
    for held in over:
        _free(tx, held)
        tx.run(_forget_call, {"b_seq": held.id, "b_at": held.created_at})
    return over


def _free(tx: Transaction, held: Reservation) -> None:
    keys = sorted(w.key for w in held.windows)
    if keys:
        _lock(tx, keys)
        tx.run(_free_in(len(keys)), {**_named(keys), "b_amount": to_nano(held.worst_case)})


def _window(key: str) -> CapWindow:
    scope, period, start = key.split("|")
    return CapWindow(key, scope, period, start, Decimal(0))


def _keys_of_old(task: str, day: str) -> list[str]:
    """The windows that a call may be held in whose row does not say; those that never were hold nothing."""
    on = date.fromisoformat(day)
    starts = {
        "daily": [on],
        "weekly": [on - timedelta(days=on.weekday()), on - timedelta(days=(on.weekday() + 1) % 7)],
        "monthly": [on.replace(day=1)],
    }
    dated = {f"{scope}|{period}|{start}" for scope in ("", task) for period, days in starts.items() for start in days}
    return sorted(dated | {"|total|", f"{task}|total|"})


def _reservation(row: Sequence[Any]) -> Reservation:
    number, task, provider, model, request_id, worst_case, windows, created_at, owner, day, _ = row
    keys = windows.split("\n") if windows else _keys_of_old(task, day)
    if windows == _NO_WINDOWS:
        keys = []
    held = tuple(_window(key) for key in keys)
    return Reservation(number, task, provider, model, request_id, from_nano(worst_case), held, created_at, owner)


def window_states(tx: Transaction, keys: Sequence[str]) -> dict[str, WindowState]:
    """The windows that exist among ``keys``."""
    if not keys:
        return {}
    rows = tx.run(_states(len(keys)), _named(keys)).fetchall()
    return {row[0]: WindowState(*row) for row in rows}


@lru_cache(maxsize=64)
def _states(n: int) -> Any:
    wanted = cap_windows.c.key.in_(_keys(n))
    return select(cap_windows.c.key, cap_windows.c.spent, cap_windows.c.committed).where(wanted)
