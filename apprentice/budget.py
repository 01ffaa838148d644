"""Hard caps on what is spent: reserve the worst case before a call, settle to the actual price after it.

A cap exists per calendar day, week and month and in total, for all tasks together and for each task. Every one of them
has a window in the store (`2026-03-01` of `daily`), and a call is reserved in all of its windows at once by one atomic
statement there (`apprentice.store.ledger`). So any number of processes keep a cap together, with no coordinator, and
what a process held when it died stays counted as spent.

A transaction for every reservation is a fifth of what the library adds to a call. So the transaction that records one
call may hold the next one's worst case too (``hold_next``): a process then holds, beside the calls in flight, at most
one more for each of them, gives back what nobody used within a second, and holds nothing so once a cap is nearly full.

`windows_at` is the calendar, and pure: days begin at midnight in the configured zone, however long they last. A clock
that goes back finds yesterday's windows as they were left.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal
from zoneinfo import ZoneInfo

from apprentice.config import BudgetSettings, Caps
from apprentice.errors import BudgetExceeded
from apprentice.store import (
    CapWindow,
    Count,
    EventRecord,
    ExampleRecord,
    NextCall,
    Reservation,
    Settlement,
    StateChange,
    Store,
    TaskState,
    Usage,
    WindowState,
)

__all__ = ["NEVER", "Budget", "CapState", "resets_at", "windows_at"]

logger = logging.getLogger(__name__)

NEVER = datetime.max.replace(tzinfo=UTC)
"""When a total cap resets."""

type Level = Literal["info", "warning", "critical"]

type _Kind = tuple[str, str, str]  # of calls: task, provider, model

_HEADROOM_TTL_S = 0.5
_FADING = Decimal("0.98")
_PERIODS = ("daily", "weekly", "monthly", "total")
_WARN_AT: tuple[tuple[Decimal, Level], ...] = (
    (Decimal("0.95"), "critical"),
    (Decimal("0.80"), "warning"),
    (Decimal("0.50"), "info"),
)


@dataclass(frozen=True, slots=True)
class CapState:
    """One cap now. ``reserved`` is held by calls in flight, or by calls whose process died."""

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

    ``task_caps`` maps a task to its own caps; ``clock`` gives Unix seconds; ``owner`` names this process in the ledger.
    ``announce`` hears of a cap's marks and of its exhaustion, once among all processes, after the store has the event.
    Thread-safe: it holds nothing but caches, and reservations that `put_back` returns.
    """

    def __init__(
        self,
        store: Store,
        settings: BudgetSettings,
        task_caps: Mapping[str, Caps] | None = None,
        *,
        clock: Callable[[], float] = time.time,
        owner: str = "",
        announce: Callable[[str, str | None, dict[str, Any], Level], None] | None = None,
    ) -> None:
        self._store = store
        self._settings = settings
        self._task_caps = dict(task_caps or {})
        self._clock = clock
        self._owner = owner
        self._announce = announce or _log
        self._zone = ZoneInfo(settings.timezone)
        self._today_cache: _Today | None = None
        self._open: frozenset[str] = frozenset()
        self._told: set[str] = set()
        self._headroom: dict[str, tuple[float, bool]] = {}
        self._typical: dict[str, Decimal] = {}
        self._pid = os.getpid()
        self._standing: dict[_Kind, list[Reservation]] = {}
        self._needed: dict[_Kind, Decimal] = {}

    # the calendar

    def day(self) -> str:
        """Today's date in the budget's zone; counts and calls are kept by it."""
        return self._today().name

    def windows(self, task: str) -> tuple[CapWindow, ...]:
        """Every window that a call of ``task`` must fit in now."""
        today = self._today()
        windows = today.windows.get(task)
        if windows is None:
            start = self._settings.week_start
            own = self._task_caps.get(task)
            windows = windows_at(today.day, "", self._settings, start) + (
                windows_at(today.day, task, own, start) if own is not None else ()
            )
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

    # one call

    def reserve(self, task: str, provider: str, model: str, worst_case: Decimal, request_id: str) -> Reservation:
        """Hold ``worst_case`` (USD) in every cap, or raise `BudgetExceeded` naming the one that it does not fit in."""
        self._need(task, provider, model, worst_case)
        windows = self.windows(task)
        while True:
            if any(w.key not in self._open for w in windows):
                self._store.open_windows(windows)
                self._open = self._open.union(w.key for w in windows)
            reservation = self._store.reserve(
                task=task,
                provider=provider,
                model=model,
                request_id=request_id,
                owner=self._owner,
                day=self.day(),
                worst_case=worst_case,
                windows=windows,
            )
            if reservation is not None:
                return reservation
            states = self._store.window_states([w.key for w in windows])
            for w in windows:
                # A row that is not there was lost with the power, after this process had created it.
                if w.key in states and states[w.key].committed + worst_case > w.cap:
                    self._headroom[task] = (self._clock(), False)
                    self._tell_exhausted(w, states[w.key])
                    name = f"task:{w.period}" if w.scope else w.period
                    raise BudgetExceeded(name, w.cap, resets_at(w, self._zone))
            # Something was released in between, or a row is missing: try again.
            self._open = self._open.intersection(states)

    def standing(
        self, task: str, provider: str, model: str, worst_case: Decimal, request_id: str
    ) -> Reservation | None:
        """A reservation of at least ``worst_case`` that an earlier call made for this one; it costs no transaction."""
        self._need(task, provider, model, worst_case)
        standing = self._standing_of((task, provider, model))
        try:
            held = standing.pop()
        except IndexError:
            return None
        if held.worst_case < worst_case or held.windows != self.windows(task):
            standing.insert(0, held)  # too little, or of another day: it is put back before long
            return None
        return Reservation(held.id, task, provider, model, request_id, held.worst_case, held.windows, held.created_at)

    def put_back(self, idle_s: float = 0.0) -> bool:
        """Release what was held for next calls and not used for ``idle_s`` seconds; True where some is still held."""
        now = self._clock()
        idle = []
        for held in self.held_ahead():
            if not 0 <= now - held.created_at < idle_s:
                with contextlib.suppress(ValueError):  # it has just been taken
                    self._standing_of(_kind(held)).remove(held)
                    idle.append(held)
        self.end([Settlement(held, "released", Decimal(0)) for held in idle])
        return bool(self.held_ahead())

    def held_ahead(self) -> list[Reservation]:
        """What this process holds for calls that have yet to come."""
        return [held for kind in list(self._standing) for held in self._standing_of(kind)]

    def _need(self, task: str, provider: str, model: str, worst_case: Decimal) -> None:
        """Remember what calls need: the most that one lately did, so that nearly all fit in what is held for them."""
        self._typical[task] = worst_case
        kind = (task, provider, model)
        self._needed[kind] = max(worst_case, self._needed.get(kind, worst_case) * _FADING)

    def _standing_of(self, kind: _Kind) -> list[Reservation]:
        if self._pid != os.getpid():  # after a fork they are the parent's: two calls must not lean on one
            self._pid, self._standing = os.getpid(), {}
        return self._standing.setdefault(kind, [])

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
        """Record how calls ended that brought no answer."""
        if settlements:
            self._ended(settlements, self._store.end_calls(settlements))

    def complete_remote(
        self,
        *,
        settlements: Sequence[Settlement],
        example: ExampleRecord | None = None,
        counts: Sequence[Count] = (),
        change: Callable[[TaskState], StateChange] | None = None,
        task: str | None = None,
        hold_next: bool = False,
    ) -> TaskState | None:
        """`Store.complete_remote`, with the warnings that the new totals call for.

        ``hold_next``: reserve for the next call of this kind in the same transaction, which spares it one of its own.
        Whoever asks for this sees to it that `put_back` is called, now and then and in the end.
        """
        next_call = None
        if hold_next and settlements and settlements[-1].state == "settled":
            last = settlements[-1].reservation
            if last.windows == self.windows(last.task):
                next_call = NextCall(self._needed.get(_kind(last), last.worst_case), self._owner, self.day())
        done = self._store.complete_remote(
            settlements=settlements, example=example, counts=counts, change=change, task=task, next_call=next_call
        )
        if done.held is not None:
            self._standing_of(_kind(done.held)).append(done.held)
        self._ended(settlements, done.windows)
        return done.state

    # the caps

    def headroom(self, task: str) -> bool:
        """Whether a call like the task's last one would fit now; at most half a second old, and no promise."""
        now = self._clock()
        seen = self._headroom.get(task)
        if seen is not None and 0 <= now - seen[0] < _HEADROOM_TTL_S:
            return seen[1]
        windows = self.windows(task)
        states = self._store.window_states([w.key for w in windows]) if windows else {}
        need = self._typical.get(task, Decimal(0))
        answer = all(
            (states[w.key].committed if w.key in states else Decimal(0)) + need <= w.cap and w.cap > 0 for w in windows
        )
        self._headroom[task] = (now, answer)
        return answer

    def remaining(self) -> list[CapState]:
        """Every cap as it is now: those of all tasks first, then each task's own."""
        windows = {w.key: w for task in ("", *self._task_caps) for w in self.windows(task)}
        states = self._store.window_states(list(windows))
        caps = []
        for key, w in windows.items():
            state = states.get(key, WindowState(key, 0, 0))
            held = state.committed - state.spent
            caps.append(CapState(w.scope, w.period, w.cap, state.spent, held, resets_at(w, self._zone)))
        return caps

    # warnings

    def _ended(self, settlements: Sequence[Settlement], windows: Sequence[Sequence[WindowState]]) -> None:
        for settlement, states in zip(settlements, windows, strict=True):
            caps = {w.key: w for w in settlement.reservation.windows}
            cost = settlement.reservation.worst_case if settlement.state == "lost" else settlement.cost
            for state in states:
                self._warn(caps[state.key], state, cost)

    def _warn(self, window: CapWindow, state: WindowState, cost: Decimal) -> None:
        """Warn of the highest mark that this call carried the window's spending over; no other call does so again."""
        if state.spent * 2 < window.cap:  # below the lowest mark, as nearly always
            return
        for mark, level in _WARN_AT:
            if state.spent - cost < mark * window.cap <= state.spent:
                share = f"{mark:.0%}"
                self._tell(f"{window.key}|{share}", window, state, "budget_warning", level, {"share": share})
                return

    def _tell_exhausted(self, window: CapWindow, state: WindowState) -> None:
        self._tell(f"{window.key}|exhausted", window, state, "budget_exhausted", "critical", {})

    def _tell(
        self, event_id: str, window: CapWindow, state: WindowState, kind: str, level: Level, more: dict[str, Any]
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
        event = EventRecord(told, window.scope or None, kind, level, evidence, self._clock())
        if self._store.add_event(event):  # else another process has said so
            self._announce(kind, event.task, evidence, level)


def _kind(reservation: Reservation) -> _Kind:
    return reservation.task, reservation.provider, reservation.model


def _log(kind: str, task: str | None, evidence: dict[str, Any], level: Level) -> None:
    logger.log(logging.INFO if level == "info" else logging.WARNING, "%s %s: %s", task or "all tasks", kind, evidence)
