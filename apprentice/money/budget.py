"""Hard caps on what is spent: reserve the worst case before a call, settle to the actual price after it.

All money goes through one door, the `Account` of a request:

    with budget.account(task, request_id) as account:
        with account.call(provider, model, worst_case, wait_s=5.0) as call:
            call.sent()
            ...                             # a call that is not sent costs nothing,
            call.settle(price, usage)       # one whose end nobody knows costs its worst case
        account.complete(example)           # what it cost and what it brought, in one transaction

Both are closed on every way out, an exception, a cancellation and a signal among them.

A cap exists per calendar day, week and month and in total, for all tasks together and for each task. Every one of them
has a window in the store (`2026-03-01` of `daily`), and a call is reserved in all of its windows at once by one atomic
statement there (`apprentice.store.ledger`). So any number of processes keep a cap together, with no coordinator, and
what a process held when it died stays counted as spent, until a person releases it. The caps themselves lie beside the
windows: of several configurations the one that started last binds every process.

`windows_at` is the calendar, and pure: days begin at midnight in the configured zone, however long they last. A clock
that goes back finds yesterday's windows as they were left.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from types import TracebackType
from typing import Any, Self
from zoneinfo import ZoneInfo

from apprentice import secrets
from apprentice.errors import BudgetExceeded, StoreError
from apprentice.events.kinds import EventKind, Level
from apprentice.money.owner import is_dead, this_process
from apprentice.settings.config import BudgetSettings, Caps
from apprentice.store import (
    CapWindow,
    Count,
    EventRecord,
    ExampleRecord,
    Reservation,
    SecondAnswer,
    Settlement,
    StateChange,
    Store,
    TaskState,
    Usage,
    WindowState,
)
from apprentice.store.records import CapChanges

__all__ = ["NEVER", "Account", "Budget", "CapState", "PaidCall", "resets_at", "windows_at"]

logger = secrets.logger(__name__)

NEVER = datetime.max.replace(tzinfo=UTC)
"""When a total cap resets."""

_HEADROOM_TTL_S = 0.5
_CAPS_TTL_S = 1.0
# How often a call that waits for others to end looks at the store; those of this process wake it at once.
_FIRST_LOOK_S, _LAST_LOOK_S = 0.05, 0.5
_SOON_S = 5.0  # what a caller is told to wait while a cap is only held
# A call that has been open for longer than any deadline comes back by nobody.
_ABANDONED_S = 3600.0
_FADING = Decimal("0.9")
_SPARE = Decimal("0.80")  # of a cap; the last of it is for answers that somebody waits for
_NO_CAPS = Caps()
_PERIODS = ("daily", "weekly", "monthly", "total")
_WARN_AT: tuple[tuple[Decimal, Level], ...] = (
    (Decimal("0.95"), "critical"),
    (Decimal("0.80"), "warning"),
    (Decimal("0.50"), "info"),
)


@dataclass(frozen=True, slots=True)
class CapState:
    """One cap now, in USD. ``reserved`` is held by calls in flight, or by calls whose process died."""

    scope: str
    period: str
    cap: Decimal
    spent: Decimal
    reserved: Decimal
    resets_at: datetime

    @property
    def remaining(self) -> Decimal:
        return max(self.cap - self.spent - self.reserved, Decimal(0))


def period_start(day: date, period: str, week_start: str) -> date | None:
    """The first day of the period that ``day`` lies in; None for the total, which has no beginning."""
    match period:
        case "daily":
            return day
        case "weekly":
            return day - timedelta(days=(day.weekday() + (week_start == "sunday")) % 7)
        case "monthly":
            return day.replace(day=1)
    return None


def windows_at(day: date, scope: str, caps: Caps, week_start: str = "monday") -> tuple[CapWindow, ...]:
    """The windows of one scope ("" for all tasks, else a task's name) on a calendar day, one for each cap there is."""
    windows = []
    for period in _PERIODS:
        cap: Decimal | None = getattr(caps, period)
        if cap is not None:
            start = period_start(day, period, week_start)
            text = start.isoformat() if start else ""
            windows.append(CapWindow(f"{scope}|{period}|{text}", scope, period, text, cap))
    return tuple(windows)


def resets_at(window: CapWindow, zone: ZoneInfo) -> datetime:
    """The first moment after a window, in its zone."""
    if not window.start:
        return NEVER
    first = date.fromisoformat(window.start)
    match window.period:
        case "daily":
            after = first + timedelta(days=1)
        case "weekly":
            after = first + timedelta(days=7)
        case _:
            after = (first + timedelta(days=31)).replace(day=1)
    return datetime(after.year, after.month, after.day, tzinfo=zone)


@dataclass(frozen=True, slots=True)
class _Today:
    """A calendar day, the moments between which it lasts, and each task's windows on it."""

    day: date
    name: str
    begins: float
    ends: float
    windows: dict[str, tuple[CapWindow, ...]]


class Budget:
    """The caps of one process's configuration, kept together with every other process on the same store.

    ``task_caps`` maps a task to its own caps; ``clock`` gives Unix seconds, ``monotonic`` seconds for waiting;
    ``owner`` names this process in the ledger (default: as `apprentice.money.owner` does). A cap's marks, its
    exhaustion and bills above what was reserved are events in the store, once among all processes; the store tells its
    listener.
    Making one puts its caps in force, unless it ``looks_only``. Thread-safe; after a fork the child may go on using it.
    """

    def __init__(
        self,
        store: Store,
        settings: BudgetSettings,
        task_caps: Mapping[str, Caps] | None = None,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        owner: str = "",
        looks_only: bool = False,
    ) -> None:
        self._store = store
        self._settings = settings
        self._task_caps = dict(task_caps or {})
        self._clock = clock
        self._monotonic = monotonic
        self._given_owner = owner
        self._zone = ZoneInfo(settings.timezone)
        self._today_cache: _Today | None = None
        self._caps: dict[str, Caps] = {}
        self._caps_read_at = float("-inf")
        self._told: set[str] = set()
        self._headroom: dict[str, tuple[float, bool]] = {}
        self._typical: dict[str, Decimal] = {}
        self._above: dict[tuple[str, str], tuple[Decimal, float]] = {}
        self._begin_anew()
        if not looks_only:
            self._put_in_force(clock())

    def _put_in_force(self, at: float) -> None:
        def event(changes: CapChanges) -> EventRecord:
            evidence: dict[str, Any] = {"started": self.owner}
            for key, (before, now) in sorted(changes.items()):
                scope, period = key.split("|")
                name = f"{scope}.{period}" if scope else period
                evidence[name] = {"before": _usd(before), "now": _usd(now)}
            return _event(uuid.uuid4().hex, EventKind.CAPS_CHANGED, None, evidence, at)

        self._store.set_caps(self._own_caps(), at, event)
        for call in self._store.release_unsent(self._is_over):
            logger.info("gave back %s USD that %s held for a call it never made", call.worst_case, call.owner)

    def _own_caps(self) -> dict[str, Decimal | None]:
        """The caps of this process's configuration, by ``scope|period``."""
        return {
            f"{scope}|{period}": getattr(caps, period)
            for scope, caps in {"": self._settings, **self._task_caps}.items()
            for period in _PERIODS
        }

    def _begin_anew(self) -> None:
        self._pid = os.getpid()
        self._open: frozenset[str] = frozenset()
        self._freed = threading.Condition()
        self._queues: dict[str, threading.Lock] = {}
        self._late: list[Settlement] = []
        self._strays: dict[str, frozenset[int]] = {}

    def _check_fork(self) -> None:
        if self._pid != os.getpid():  # locks may be held by threads that are not here, and calls are the parent's
            self._begin_anew()

    @property
    def owner(self) -> str:
        """Who this process is in the ledger."""
        return self._given_owner or this_process()

    # the calendar

    def day(self) -> str:
        """Today's date in the budget's zone; counts and calls are kept by it."""
        return self._today().name

    def windows(self, task: str) -> tuple[CapWindow, ...]:
        """Every window that a call of ``task`` must fit in now, under the caps in force."""
        self._read_caps()
        today = self._today()
        windows = today.windows.get(task)
        if windows is None:
            start = self._settings.week_start
            common, own = self._caps.get("", _NO_CAPS), self._caps.get(task, _NO_CAPS)
            windows = windows_at(today.day, "", common, start) + windows_at(today.day, task, own, start)
            today.windows[task] = windows
        return windows

    def _today(self) -> _Today:
        now = self._clock()
        today = self._today_cache
        if today is None or not today.begins <= now < today.ends:
            day = datetime.fromtimestamp(now, self._zone).date()
            after = day + timedelta(days=1)
            begins = datetime(day.year, day.month, day.day, tzinfo=self._zone).timestamp()
            ends = datetime(after.year, after.month, after.day, tzinfo=self._zone).timestamp()
            today = self._today_cache = _Today(day, day.isoformat(), begins, ends, {})
        return today

    def _read_caps(self, *, now: bool = False) -> None:
        """Follow the caps in force, which a process that started later may have changed."""
        at = self._monotonic()
        if not now and 0 <= at - self._caps_read_at < _CAPS_TTL_S:
            return
        by_scope: dict[str, dict[str, Decimal]] = {}
        for key, cap in {**self._own_caps(), **self._store.caps()}.items():
            scope, _, period = key.partition("|")
            if cap is not None and period in _PERIODS:
                by_scope.setdefault(scope, {})[period] = cap
        caps = {scope: Caps(**by_period) for scope, by_period in by_scope.items()}
        if caps != self._caps:
            self._caps, self._today_cache, self._headroom = caps, None, {}
        self._caps_read_at = at

    # one request

    def account(self, task: str, request_id: str) -> Account:
        """The money of one request; ``request_id`` is its own. To be used in a ``with`` statement."""
        return Account(self, task, request_id)

    def reserve(
        self,
        task: str,
        provider: str,
        model: str,
        worst_case: Decimal,
        request_id: str,
        *,
        wait_s: float = 0.0,
    ) -> Reservation:
        """Hold ``worst_case`` (USD) in every cap. `Account.call` does so and sees to its end.

        While a cap is full of calls in flight, waits up to ``wait_s`` for one of them to end. Raises `BudgetExceeded`
        naming the cap that the call does not fit in. Where bills of this model were lately above their worst case, as
        much more is held.
        """
        self._check_fork()
        self._write_late()
        worst_case *= self._factor((provider, model))
        self._typical[task] = worst_case
        ends = self._monotonic() + wait_s
        queue = self._queues.setdefault(task, threading.Lock())
        if not queue.locked():  # who comes while others wait goes behind them
            held = self._try_reserve(task, provider, model, worst_case, request_id)
            if isinstance(held, Reservation):
                return held
            if wait_s <= 0 or not held.in_flight:
                raise held
        if not queue.acquire(timeout=max(ends - self._monotonic(), 0.0)):
            self._read_caps(now=True)
            held = self._try_reserve(task, provider, model, worst_case, request_id)
            if isinstance(held, Reservation):
                return held
            raise held
        try:
            look_s = _FIRST_LOOK_S
            while True:
                held = self._try_reserve(task, provider, model, worst_case, request_id)
                if isinstance(held, Reservation):
                    return held
                rest_s = ends - self._monotonic()
                if rest_s <= 0 or not held.in_flight:
                    raise held
                with self._freed:
                    self._freed.wait(min(look_s, rest_s))
                look_s = min(look_s * 1.5, _LAST_LOOK_S)
        finally:
            queue.release()

    def _try_reserve(
        self, task: str, provider: str, model: str, worst_case: Decimal, request_id: str
    ) -> Reservation | BudgetExceeded:
        while True:
            windows = self.windows(task)
            if any(w.key not in self._open for w in windows):
                self._store.open_windows(windows)
                self._open = self._open.union(w.key for w in windows)
            reservation = self._store.reserve(
                task=task,
                provider=provider,
                model=model,
                request_id=request_id,
                owner=self.owner,
                day=self.day(),
                worst_case=worst_case,
                windows=windows,
            )
            if reservation is not None:
                return reservation
            self._read_caps(now=True)  # it is the caps in force that refused
            windows = self.windows(task)
            states = self._store.window_states([w.key for w in windows])
            full = [w for w in windows if w.key in states and states[w.key].committed + worst_case > w.cap]
            if full:
                return self._refusal(task, full, states, worst_case)
            # Something was released in between, or a row was lost with the power: try again.
            self._open = self._open.intersection(states)

    def _refusal(
        self, task: str, full: Sequence[CapWindow], states: Mapping[str, WindowState], worst_case: Decimal
    ) -> BudgetExceeded:
        """Why a call does not fit: a cap is used up, or merely held by calls that are about to end."""
        in_flight = [call for call in self._store.open_calls() if not self._is_over(call)]
        waiting_for = None
        for w in full:
            state = states[w.key]
            coming = [call for call in in_flight if any(held.key == w.key for held in call.windows)]
            comes_back = min(sum((call.worst_case for call in coming), Decimal(0)), state.committed - state.spent)
            name = f"task:{w.period}" if w.scope else w.period
            what: dict[str, Any] = {
                "spent": state.spent,
                "held": state.committed - state.spent,
                "needs": worst_case,
            }
            resets = resets_at(w, self._zone)
            if state.committed - comes_back + worst_case > w.cap:
                self._headroom[task] = (self._clock(), False)
                self._tell_exhausted(w, state)
                wait_s = max(resets.timestamp() - self._clock(), 0.0) if resets < NEVER else None
                return BudgetExceeded(name, w.cap, resets, retry_after_s=None if worst_case > w.cap else wait_s, **what)
            waiting_for = BudgetExceeded(name, w.cap, resets, in_flight=len(coming), retry_after_s=_SOON_S, **what)
        assert waiting_for is not None
        return waiting_for

    def _is_over(self, call: Reservation) -> bool:
        """Whether nobody will end a call by itself any more."""
        return self._clock() - call.created_at > _ABANDONED_S or is_dead(call.owner) is True

    def settle(self, reservation: Reservation, actual: Decimal, usage: Usage) -> None:
        """Record what a call cost. Where it brought an answer, use `complete_remote` instead: one transaction."""
        self.end([Settlement(reservation, "settled", actual, usage)])

    def release(self, reservation: Reservation) -> None:
        """Give back what a call held that was certainly not billed."""
        self.end([Settlement(reservation, "released", Decimal(0))])

    def lost(self, reservation: Reservation) -> None:
        """Count as spent what a call held that may have been billed: nobody knows."""
        self.end([Settlement(reservation, "lost", reservation.worst_case)])

    def end(self, settlements: Sequence[Settlement]) -> None:
        """Record how calls ended that brought no answer. What the store cannot take now is tried again later."""
        self._check_fork()
        with self._freed:
            every, self._late = [*self._late, *settlements], []
        if every:
            try:
                windows = self._store.end_calls(every)
            except BaseException:
                with self._freed:
                    self._late = [*every, *self._late]
                raise
            self._ended(every, windows)

    def complete_remote(
        self,
        *,
        settlements: Sequence[Settlement],
        example: ExampleRecord | None = None,
        counts: Sequence[Count] = (),
        change: Callable[[TaskState], StateChange] | None = None,
        task: str | None = None,
        second: SecondAnswer | None = None,
    ) -> TaskState | None:
        """`Store.complete_remote`, with the warnings that the new totals call for."""
        done = self._store.complete_remote(
            settlements=settlements, example=example, counts=counts, change=change, task=task, second=second
        )
        self._ended(settlements, done.windows)
        return done.state

    def close(self) -> None:
        """Write what the store could not take when it ended; what it still cannot take is named in the log."""
        self._check_fork()
        self._write_late()
        for s in self._late:
            logger.error(
                "the end of call %s (%s, %s USD) could not be recorded; its %s USD stay held",
                s.reservation.id,
                s.state,
                s.cost,
                s.reservation.worst_case,
            )

    def _end_or_keep(self, settlements: Sequence[Settlement]) -> None:
        """`end` for whoever is on the way out: what the store cannot take is kept for the next call, or `close`."""
        try:
            self.end(settlements)
        except StoreError as error:
            logger.warning("how a call ended cannot be recorded yet: %s", error)

    def _give_back_strays(self, request_id: str, known: frozenset[int]) -> None:
        """Find what a request may hold beside what it knows of, and give it back, now or later."""
        self._strays[request_id] = known
        self._write_late()

    def _write_late(self) -> None:
        """Try again to record what the store could not take before."""
        if not self._late and not self._strays:
            return
        try:
            self.end([])
            for request_id, known in list(self._strays.items()):
                strays = [
                    Settlement(call, "released", Decimal(0))
                    for call in self._store.open_calls()
                    if call.request_id == request_id and call.owner == self.owner and call.id not in known
                ]
                self.end(strays)
                self._strays.pop(request_id, None)
        except StoreError as error:
            logger.warning("how some calls ended cannot be recorded yet: %s", error)

    # the caps

    def headroom(self, task: str) -> bool:
        """Whether what is spent leaves room for a call like the task's last one; at most half a second old.

        What is merely held is not counted: it comes back within seconds, and a call waits for it.
        """
        now = self._clock()
        seen = self._headroom.get(task)
        if seen is not None and 0 <= now - seen[0] < _HEADROOM_TTL_S:
            return seen[1]
        windows = self.windows(task)
        states = self._store.window_states([w.key for w in windows]) if windows else {}
        need = self._typical.get(task, Decimal(0))
        answer = all(
            (states[w.key].spent if w.key in states else Decimal(0)) + need <= w.cap and w.cap > 0 for w in windows
        )
        self._headroom[task] = (now, answer)
        return answer

    def has_spare(self, task: str) -> bool:
        """Whether a call that nobody waits for may be made: no cap is near its end, or would be with it.

        After it every cap must be below `_SPARE`, what calls in flight hold included, and have room for four more
        calls like it, so that no request has to wait for what it holds. False while this process made no call of the
        task, and cannot tell what one holds.
        """
        need = self._typical.get(task)
        if need is None:
            return False
        windows = self.windows(task)
        states = self._store.window_states([w.key for w in windows]) if windows else {}
        held = {w.key: states[w.key].committed if w.key in states else Decimal(0) for w in windows}
        return all(held[w.key] + need <= _SPARE * w.cap and held[w.key] + 5 * need <= w.cap for w in windows)

    def remaining(self) -> list[CapState]:
        """Every cap in force as it is now: those of all tasks first, then each task's own."""
        windows = {w.key: w for task in ("", *self._task_caps) for w in self.windows(task)}
        states = self._store.window_states(list(windows))
        caps = []
        for key, w in windows.items():
            state = states.get(key, WindowState(key, 0, 0))
            held = state.committed - state.spent
            caps.append(CapState(w.scope, w.period, w.cap, state.spent, held, resets_at(w, self._zone)))
        return caps

    # what is held

    def open_calls(self) -> list[Reservation]:
        """Every reservation that has not ended, of all processes, the oldest first."""
        return self._store.open_calls()

    def release_by_hand(self, number: int, reason: str) -> EventRecord:
        """Give back what an open call holds, because a person says so; returns the event that records it.

        Raises `StoreError` where no such call is open.
        """
        at = self._clock()

        def event(held: Reservation) -> EventRecord:
            evidence = {
                "reservation": held.id,
                "amount": str(held.worst_case),
                "provider": held.provider,
                "model": held.model,
                "request": held.request_id,
                "owner": held.owner,
                "reason": reason,
            }
            return _event(uuid.uuid4().hex, EventKind.RESERVATION_RELEASED, held.task, evidence, at)

        return self._store.release_by_hand(number, reason, event)

    # warnings

    def _ended(self, settlements: Sequence[Settlement], windows: Sequence[Sequence[WindowState] | None]) -> None:
        for settlement, states in zip(settlements, windows, strict=True):
            caps = {w.key: w for w in settlement.reservation.windows}
            cost = settlement.reservation.worst_case if settlement.state == "lost" else settlement.cost
            for state in states or ():
                self._warn(caps[state.key], state, cost)
            if states is not None and settlement.state == "settled":
                self._learn(settlement)
        with self._freed:
            self._freed.notify_all()

    def _factor(self, model: tuple[str, str]) -> Decimal:
        """How many times its worst case is held for a model's call.

        It halves every hour: where no cap has room for that much, no bill could show that it is too much.
        """
        factor, since = self._above.get(model, (Decimal(1), 0.0))
        hours = int(max(self._monotonic() - since, 0.0) // 3600)
        return max(factor / (1 << min(hours, 100)), Decimal(1))

    def _learn(self, settlement: Settlement) -> None:
        """Hold more for a model's next calls where a bill was above what was held for it, and tell people."""
        held = settlement.reservation
        model = (held.provider, held.model)
        factor = self._factor(model)
        if settlement.cost <= held.worst_case:
            if factor > 1 and settlement.cost * factor <= held.worst_case:
                self._above[model] = factor * _FADING, self._monotonic()
            return
        if held.worst_case:
            self._above[model] = factor * settlement.cost / held.worst_case, self._monotonic()
        used = settlement.usage
        evidence = {
            "provider": held.provider,
            "model": held.model,
            "request": held.request_id,
            "reserved": str(held.worst_case),
            "billed": str(settlement.cost),
            "input_tokens": used.input,
            "output_tokens": used.output,
        }
        hour = int(self._clock() // 3600)
        event_id = f"billed_above_reservation|{held.task}|{held.provider}|{held.model}|{hour}"
        kind = EventKind.BILLED_ABOVE_RESERVATION
        self._store.add_event(_event(event_id, kind, held.task, evidence, self._clock()))

    def _warn(self, window: CapWindow, state: WindowState, cost: Decimal) -> None:
        """Warn of the highest mark that this call carried the window's spending over; no other call does so again."""
        if state.spent * 2 < window.cap:  # below the lowest mark, as nearly always
            return
        for mark, level in _WARN_AT:
            if state.spent - cost < mark * window.cap <= state.spent:
                share = f"{mark:.0%}"
                self._tell(f"{window.key}|{share}", window, state, EventKind.BUDGET_WARNING, level, {"share": share})
                return

    def _tell_exhausted(self, window: CapWindow, state: WindowState) -> None:
        self._tell(f"{window.key}|exhausted", window, state, EventKind.BUDGET_EXHAUSTED, "critical", {})

    def _tell(
        self, event_id: str, window: CapWindow, state: WindowState, kind: EventKind, level: Level, more: dict[str, Any]
    ) -> None:
        told = f"{event_id}|{window.cap}"
        if told in self._told:
            return
        self._told.add(told)
        evidence = {
            "cap": window.period,
            "limit": str(window.cap),
            "spent": str(state.spent),
            "reserved": str(state.committed - state.spent),
            "resets_at": resets_at(window, self._zone).isoformat(),
            **more,
        }
        # Where the store has it, another process has said so.
        self._store.add_event(_event(told, kind, window.scope or None, evidence, self._clock(), level))


class Account:
    """What one request costs: its calls, one after the other, and how each ended.

    Used in a ``with`` statement. What `complete` did not record by then is recorded at its end, without an example.
    Not to be shared between threads; a forked child's copy does nothing.
    """

    def __init__(self, budget: Budget, task: str, request_id: str) -> None:
        self.task = task
        self.request_id = request_id
        self._budget = budget
        self._pid = os.getpid()
        self._pending: list[Settlement] = []
        self._recorded: list[Settlement] = []
        self._kept_open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._flush()

    def _flush(self) -> None:
        if self._pending and not self._kept_open and self._pid == os.getpid():
            pending, self._pending = self._pending, []
            self._recorded += pending
            self._budget._end_or_keep(pending)

    @property
    def cost(self) -> Decimal:
        """USD that its calls have cost so far; those of unknown end at their worst case."""
        return sum((s.cost for s in (*self._recorded, *self._pending)), Decimal(0))

    @property
    def usage(self) -> Usage:
        """Tokens that vendors reported for its calls so far."""
        return sum((s.usage for s in (*self._recorded, *self._pending)), Usage())

    @contextmanager
    def call(self, provider: str, model: str, worst_case: Decimal, *, wait_s: float = 0.0) -> Iterator[PaidCall]:
        """One call to a vendor that costs at most ``worst_case`` (USD), reserved before and ended after.

        Raises `BudgetExceeded` where it does not fit; see `Budget.reserve`.
        """
        self._flush()  # else it might wait for the room that its own last call holds
        call = None
        try:
            budget = self._budget
            held = budget.reserve(self.task, provider, model, worst_case, self.request_id, wait_s=wait_s)
            call = PaidCall(held)
            yield call
        except BudgetExceeded:
            raise
        except BaseException:
            if call is None and self._pid == os.getpid():
                # A signal, or a connection that broke, between the commit and its being heard of.
                known = frozenset(s.reservation.id for s in self._recorded)
                self._budget._give_back_strays(self.request_id, known)
            raise
        finally:
            if call is not None and self._pid == os.getpid():  # else it is the parent's, who goes on with it
                if call.settlement.state == "released":
                    self._budget._end_or_keep([call.settlement])  # at once: somebody may be waiting for the room
                else:
                    self._pending.append(call.settlement)

    def complete(
        self,
        example: ExampleRecord | None = None,
        *,
        counts: Sequence[Count] = (),
        change: Callable[[TaskState], StateChange] | None = None,
        second: SecondAnswer | None = None,
    ) -> TaskState | None:
        """Record what the calls cost and what they brought, all of it or nothing, durably.

        Raises `StoreError`; it may be called again then, and what was recorded after all is not recorded twice.
        """
        pending = tuple(self._pending)
        state = self._budget.complete_remote(
            settlements=pending, example=example, counts=counts, change=change, task=self.task, second=second
        )
        self._pending = self._pending[len(pending) :]
        self._recorded += pending
        return state

    def keep_open(self) -> None:
        """Do not end at the end of the with-block: whoever keeps the account calls `complete` until it succeeds.

        What was not recorded by the time the process ends stays held, at its worst case.
        """
        self._kept_open = True


class PaidCall:
    """One call to a vendor while it is held. How it ends is what was said last; see `Account.call`."""

    def __init__(self, held: Reservation) -> None:
        self.held = held
        self._settlement = Settlement(held, "released", Decimal(0))

    def sent(self) -> None:
        """From here on it may be on the bill, until something else is known."""
        self._settlement = Settlement(self.held, "lost", self.held.worst_case)

    def free(self) -> None:
        """It was certainly not billed: it never left, or the vendor's answer says so."""
        self._settlement = Settlement(self.held, "released", Decimal(0))

    def settle(self, cost: Decimal, usage: Usage) -> None:
        """The vendor said what it bills."""
        self._settlement = Settlement(self.held, "settled", cost, usage)

    @property
    def settlement(self) -> Settlement:
        """How it ends, as far as is known by now."""
        return self._settlement


def _usd(cap: Decimal | None) -> str | None:
    return None if cap is None else f"{cap.normalize():f}"


def _event(
    event_id: str,
    kind: EventKind,
    task: str | None,
    evidence: dict[str, Any],
    at: float,
    level: Level | None = None,
) -> EventRecord:
    return EventRecord(event_id, task, kind.value, level or kind.level, evidence, at)
