"""Caps: the calendar, reserve and settle, warnings, and a state machine that tries to break them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from apprentice.budget import NEVER, Budget, resets_at, windows_at
from apprentice.config import BudgetSettings, Caps
from apprentice.errors import BudgetExceeded
from apprentice.store import Reservation, Settlement, Store, Usage


def dollars(text: str | int) -> Decimal:
    return Decimal(text)


class Clock:
    """Unix seconds that stand where they are put."""

    def __init__(self, *moment: int, zone: str = "UTC") -> None:
        self.now = datetime(*moment, tzinfo=ZoneInfo(zone)).timestamp()  # type: ignore[arg-type, misc]

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store() -> Iterator[Store]:
    with Store.open("sqlite://") as opened:
        yield opened


def spend(budget: Budget, amount: str, task: str = "a") -> None:
    budget.settle(budget.reserve(task, "p", "m", dollars(amount), "r"), dollars(amount), Usage(1, 1))


def test_the_calendar_of_a_day() -> None:
    """Day, week and month windows begin where the calendar says, the week where the config says."""
    caps = Caps(daily=1, weekly=2, monthly=3, total=4)  # type: ignore[arg-type]
    sunday = date(2026, 3, 1)
    keys = [w.key for w in windows_at(sunday, "a", caps)]
    assert keys == ["a|daily|2026-03-01", "a|weekly|2026-02-23", "a|monthly|2026-03-01", "a|total|"]
    assert windows_at(sunday, "", caps, "sunday")[1].start == "2026-03-01"
    assert windows_at(sunday, "", Caps()) == ()


@given(day=st.dates(date(2020, 1, 1), date(2040, 1, 1)), week_start=st.sampled_from(["monday", "sunday"]))
def test_windows_tile_the_calendar(day: date, week_start: str) -> None:
    """Every day lies in its windows, and the day on which one resets is the first of the next."""
    caps = Caps(daily=1, weekly=1, monthly=1)  # type: ignore[arg-type]
    zone = ZoneInfo("Europe/Berlin")
    for window in windows_at(day, "", caps, week_start):
        after = resets_at(window, zone).date()
        assert date.fromisoformat(window.start) <= day < after
        same = {w.period: w for w in windows_at(after - timedelta(days=1), "", caps, week_start)}
        following = {w.period: w for w in windows_at(after, "", caps, week_start)}
        assert same[window.period] == window
        assert following[window.period].start == after.isoformat()


def test_resets_follow_daylight_saving() -> None:
    """The day on which clocks go forward lasts 23 hours; a total never resets."""
    zone = ZoneInfo("Europe/Berlin")
    caps = Caps(daily=1, total=1)  # type: ignore[arg-type]
    daily, total = windows_at(date(2026, 3, 29), "", caps)
    begins = datetime(2026, 3, 29, tzinfo=zone).astimezone(UTC)
    assert resets_at(daily, zone).astimezone(UTC) - begins == timedelta(hours=23)
    assert resets_at(total, zone) == NEVER


def test_the_day_is_that_of_the_zone(store: Store) -> None:
    """A cap per day in Auckland resets at midnight there."""
    clock = Clock(2026, 3, 1, 23, 59, zone="Pacific/Auckland")
    budget = Budget(store, BudgetSettings(daily=1, timezone="Pacific/Auckland"), clock=clock)  # type: ignore[arg-type]
    spend(budget, "1")
    with pytest.raises(BudgetExceeded) as caught:
        spend(budget, "0.01")
    assert (caught.value.cap, caught.value.limit) == ("daily", dollars(1))
    assert caught.value.resets_at == datetime(2026, 3, 2, tzinfo=ZoneInfo("Pacific/Auckland"))
    clock.now += 60
    assert budget.day() == "2026-03-02"
    spend(budget, "1")


def test_the_tightest_cap_is_named(store: Store) -> None:
    """Where a task's own cap is full the error says so, and other tasks go on until the common one is."""
    caps = {"a": Caps(weekly=1)}  # type: ignore[arg-type]
    budget = Budget(store, BudgetSettings(monthly=2), caps, clock=Clock(2026, 3, 1))  # type: ignore[arg-type]
    spend(budget, "1", "a")
    with pytest.raises(BudgetExceeded, match="task:weekly"):
        spend(budget, "0.5", "a")
    spend(budget, "1", "b")
    with pytest.raises(BudgetExceeded) as caught:
        spend(budget, "0.5", "b")
    assert caught.value.cap == "monthly"


def test_a_refused_call_holds_nothing(store: Store) -> None:
    """A call that fits in one window and not in another is held in neither."""
    budget = Budget(store, BudgetSettings(daily=1, monthly=10), clock=Clock(2026, 3, 1))  # type: ignore[arg-type]
    with pytest.raises(BudgetExceeded):
        budget.reserve("a", "p", "m", dollars("1.01"), "r")
    assert [(c.period, c.reserved, c.remaining) for c in budget.remaining()] == [("daily", 0, 1), ("monthly", 0, 10)]


def test_without_caps_everything_is_recorded(store: Store) -> None:
    """No cap, no window; the call is in the ledger all the same."""
    budget = Budget(store, BudgetSettings(), clock=Clock(2026, 3, 1))
    spend(budget, "1000000")
    assert budget.headroom("a")
    assert budget.remaining() == []
    assert [row.cost for row in store.spend()] == [dollars(1000000)]


def test_headroom_notices_and_recovers(store: Store) -> None:
    """Headroom is false where a call like the last would not fit, and true again on the next day."""
    clock = Clock(2026, 3, 1)
    budget = Budget(store, BudgetSettings(daily=1), clock=clock)  # type: ignore[arg-type]
    assert budget.headroom("a")
    held = budget.reserve("a", "p", "m", dollars("0.6"), "r")
    clock.now += 1
    assert not budget.headroom("a")
    budget.release(held)
    clock.now += 1
    assert budget.headroom("a")
    budget.lost(budget.reserve("a", "p", "m", dollars("0.6"), "r"))
    clock.now += 1
    assert not budget.headroom("a")
    clock.now += 86400
    assert budget.headroom("a")
    assert not Budget(store, BudgetSettings(daily=0), clock=clock).headroom("a")  # type: ignore[arg-type]


def test_warnings_come_once_among_processes(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """50, 80 and 95 % and the end are told once, whoever of two processes crosses them, with the right level."""
    told: list[tuple[str, str]] = []

    def announce(kind: str, task: str | None, evidence: dict[str, Any], level: str) -> None:
        told.append((level, evidence.get("share", kind)))

    clock = Clock(2026, 3, 1)
    pair = [Budget(store, BudgetSettings(daily=1), clock=clock, announce=announce) for _ in range(2)]  # type: ignore[arg-type]
    for n in range(20):
        spend(pair[n % 2], "0.05")
    for budget in pair:
        with pytest.raises(BudgetExceeded):
            spend(budget, "0.05")
    assert told == [("info", "50%"), ("warning", "80%"), ("critical", "95%"), ("critical", "budget_exhausted")]
    assert [e.kind for e in store.events()] == ["budget_warning"] * 3 + ["budget_exhausted"]
    with caplog.at_level(logging.INFO, "apprentice.budget"):
        spend(Budget(store, BudgetSettings(weekly=1), clock=Clock(2026, 5, 1)), "0.9")  # type: ignore[arg-type]
    assert "budget_warning" in caplog.text


def call(budget: Budget, worst: str, cost: str) -> Reservation:
    """One answered call, which holds for the next; returns its reservation."""
    amount = dollars(worst)
    held = budget.standing("a", "p", "m", amount, "r") or budget.reserve("a", "p", "m", amount, "r")
    budget.complete_remote(settlements=[Settlement(held, "settled", dollars(cost), Usage(1, 1))], hold_next=True)
    return held


def test_a_call_holds_for_the_next() -> None:
    """The second call needs no transaction of its own before it is sent, and its id is in the ledger afterwards."""
    clock = Clock(2026, 3, 1)
    store = Store.open("sqlite://", clock=clock)
    budget = Budget(store, BudgetSettings(daily=10), clock=clock)  # type: ignore[arg-type]
    first = call(budget, "0.50", "0.10")
    (ahead,) = budget.held_ahead()
    (cap,) = budget.remaining()
    assert (ahead.request_id, cap.spent, cap.reserved) == ("", dollars("0.10"), dollars("0.50"))
    assert budget.standing("a", "p", "m", dollars("0.51"), "r") is None  # too large for it
    assert budget.standing("a", "p", "another", dollars("0.50"), "r") is None
    second = call(budget, "0.40", "0.10")
    assert (second.id, second.request_id) == (ahead.id, "r") != (first.id, "r")
    (third,) = budget.held_ahead()
    assert third.worst_case > dollars("0.40")  # the 0.51 asked for before is remembered
    assert budget.put_back(idle_s=1.0) is True
    clock.now += 1
    assert (budget.put_back(idle_s=1.0), budget.held_ahead()) == (False, [])
    assert [(row.state, row.calls) for row in store.spend()] == [("settled", 2)]  # what never was leaves no row
    (cap,) = budget.remaining()
    assert (cap.spent, cap.reserved) == (dollars("0.20"), Decimal(0))
    # Ending it again changes nothing, also where the row's number has another call by now.
    clock.now += 1
    other = budget.reserve("a", "p", "m", dollars("0.50"), "r")
    budget.release(third)
    assert budget.remaining()[0].reserved == dollars("0.50")
    budget.release(other)
    assert budget.remaining()[0].reserved == Decimal(0)


def test_nothing_is_held_ahead_of_a_cap_that_is_nearly_full(store: Store) -> None:
    """The last tenth of a cap is for calls that somebody has to make."""
    budget = Budget(store, BudgetSettings(daily=1), clock=Clock(2026, 3, 1))  # type: ignore[arg-type]
    call(budget, "0.30", "0.30")
    assert [held.worst_case for held in budget.held_ahead()] == [dollars("0.30")]
    call(budget, "0.30", "0.30")
    call(budget, "0.30", "0.25")  # what is held for it was taken at 60 %; beyond 85 % nothing more
    assert budget.held_ahead() == []
    call(budget, "0.15", "0.15")
    assert budget.remaining()[0].remaining == Decimal(0)


def test_what_is_held_does_not_outlive_its_day(store: Store) -> None:
    """A call after midnight must fit in the new day's windows: yesterday's reservation does not cover it."""
    clock = Clock(2026, 3, 1, 23)
    budget = Budget(store, BudgetSettings(daily=1), clock=clock)  # type: ignore[arg-type]
    call(budget, "0.30", "0.30")
    clock.now += 7200
    assert budget.standing("a", "p", "m", dollars("0.30"), "r") is None
    call(budget, "0.30", "0.30")
    assert budget.remaining()[0].spent == dollars("0.30")
    assert budget.put_back() is False


def test_a_forked_child_does_not_take_what_its_parent_holds(tmp_path: Path) -> None:
    """One reservation must not guard two calls."""
    with Store.open(f"sqlite:///{tmp_path / 'store.db'}") as store:
        budget = Budget(store, BudgetSettings(daily=1))  # type: ignore[arg-type]
        call(budget, "0.30", "0.30")
        child = os.fork()
        if child == 0:
            os._exit(0 if budget.standing("a", "p", "m", dollars("0.30"), "r") is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert budget.standing("a", "p", "m", dollars("0.30"), "r") is not None


def test_a_lost_window_is_made_again(store: Store) -> None:
    """Windows that vanish with a power failure are created anew instead of refusing every call."""
    budget = Budget(store, BudgetSettings(daily=1), clock=Clock(2026, 3, 1))  # type: ignore[arg-type]
    spend(budget, "0.5")
    with store._database.write() as tx:
        tx.run_text("DELETE FROM cap_windows")
    spend(budget, "0.5")
    assert budget.remaining()[0].spent == dollars("0.5")


ZONE = "America/New_York"  # clocks change on 8 March and 1 November 2026
CAPS = {"daily": dollars("1.00"), "weekly": dollars("2.50"), "monthly": dollars("4.00"), "total": dollars("9.00")}
TASK_CAPS = {"a": Caps(daily=dollars("0.60"), monthly=dollars("2.00"))}


class Ledger(RuleBasedStateMachine):
    """Processes reserve, settle, lose and die while the clock does what clocks do; no cap is ever broken.

    The model keeps, for each window it has seen, what may have been spent in it.
    """

    held = Bundle("held")

    @initialize()
    def open(self) -> None:
        self.store = Store.open("sqlite://")
        self.clock = Clock(2026, 3, 7, 12, zone=ZONE)
        self.budgets = [self.process() for _ in range(2)]
        self.expected: dict[str, Decimal] = {}
        self.caps: dict[str, Decimal] = {}
        self.ended: set[int] = set()
        self.standing: set[int] = set()

    def process(self) -> Budget:
        caps = BudgetSettings(**CAPS, timezone=ZONE, week_start="sunday")
        return Budget(self.store, caps, TASK_CAPS, clock=self.clock, announce=lambda *_: None)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()

    def add(self, reservation: Reservation, amount: Decimal) -> None:
        for window in reservation.windows:
            self.expected[window.key] = self.expected.get(window.key, Decimal(0)) + amount
            self.caps[window.key] = window.cap

    @rule(target=held, who=st.integers(0, 1), task=st.sampled_from("ab"), cents=st.integers(1, 70))
    def reserve(self, who: int, task: str, cents: int) -> Any:
        amount = Decimal(cents) / 100
        budget = self.budgets[who]
        fits = all(self.expected.get(w.key, Decimal(0)) + amount <= w.cap for w in budget.windows(task))
        if not fits:
            with pytest.raises(BudgetExceeded) as caught:
                budget.reserve(task, "p", "m", amount, "r")
            assert caught.value.resets_at.timestamp() > self.clock.now
            return None
        reservation = budget.reserve(task, "p", "m", amount, "r")
        self.add(reservation, amount)
        return reservation

    def ends(self, reservation: Reservation) -> bool:
        """Whether this is the call's first end, the only one that counts."""
        first = reservation.id not in self.ended
        self.ended.add(reservation.id)
        return first

    @rule(reservation=consumes(held), who=st.integers(0, 1), share=st.integers(0, 100))
    def settle(self, reservation: Reservation | None, who: int, share: int) -> None:
        if reservation is not None:
            actual = reservation.worst_case * share / 100
            self.budgets[who].settle(reservation, actual, Usage(1, 1))
            if self.ends(reservation):
                self.add(reservation, actual - reservation.worst_case)

    @rule(reservation=held, who=st.integers(0, 1))
    def settle_what_another_settles_too(self, reservation: Reservation | None, who: int) -> None:
        """The reservation stays in the bundle: it may be ended again, by either process and in any way."""
        if reservation is not None:
            self.budgets[who].settle(reservation, Decimal(0), Usage())
            if self.ends(reservation):
                self.add(reservation, -reservation.worst_case)

    @rule(target=held, reservation=consumes(held), who=st.integers(0, 1), share=st.integers(0, 100))
    def settle_and_call_again(self, reservation: Reservation | None, who: int, share: int) -> Any:
        """The next call of the kind takes what the last one's record held for it, or gets nothing without asking."""
        if reservation is None:
            return None
        actual = reservation.worst_case * share / 100
        budget = self.budgets[who]
        before = self.store.window_states([w.key for w in reservation.windows])
        budget.complete_remote(settlements=[Settlement(reservation, "settled", actual)], hold_next=True)
        if self.ends(reservation):
            self.add(reservation, actual - reservation.worst_case)
        taken = budget.standing(reservation.task, "p", "m", reservation.worst_case, "next")
        for one in budget.held_ahead():
            if one.id not in self.standing:
                self.standing.add(one.id)
                self.add(one, one.worst_case)
        if taken is not None and taken.id not in self.standing:
            self.add(taken, taken.worst_case)
            for window in taken.windows:
                assert before[window.key].committed <= window.cap
                assert self.expected[window.key] <= Decimal("0.9") * window.cap
        self.standing.discard(taken.id if taken else -1)
        return taken

    @rule(who=st.integers(0, 1))
    def put_back(self, who: int) -> None:
        """A process has had nothing to do for a while."""
        for one in self.budgets[who].held_ahead():
            self.standing.discard(one.id)
            self.add(one, -one.worst_case)
        assert self.budgets[who].put_back() is False

    @rule(reservation=consumes(held), who=st.integers(0, 1))
    def release(self, reservation: Reservation | None, who: int) -> None:
        if reservation is not None:
            self.budgets[who].release(reservation)
            if self.ends(reservation):
                self.add(reservation, -reservation.worst_case)

    @rule(reservation=consumes(held), who=st.integers(0, 1))
    def lose(self, reservation: Reservation | None, who: int) -> None:
        if reservation is not None:
            self.budgets[who].lost(reservation)
            self.ends(reservation)

    @rule(reservation=consumes(held), who=st.integers(0, 1))
    def crash(self, reservation: Reservation | None, who: int) -> None:
        """A process dies with a call in flight; another takes its place, knowing nothing."""
        self.budgets[who] = self.process()

    @rule(hours=st.integers(-72, 72))
    def drift(self, hours: int) -> None:
        """Hours pass; or the clock is set back."""
        self.clock.now += hours * 3600

    @rule(
        moment=st.sampled_from(
            [(2026, 3, 8, 1, 59), (2026, 3, 8, 3, 0), (2026, 11, 1, 1, 30), (2026, 2, 28, 23, 59), (2026, 4, 1, 0, 0)]
        )
    )
    def leap(self, moment: tuple[int, ...]) -> None:
        """Land where calendars are awkward: clocks going forward and back, the ends of months."""
        self.clock.now = Clock(*moment, zone=ZONE).now

    @invariant()
    def caps_hold(self) -> None:
        if not hasattr(self, "store"):
            return
        for key, state in self.store.window_states(list(self.expected)).items():
            assert state.committed == self.expected[key], key
            assert Decimal(0) <= state.spent <= state.committed <= self.caps[key]


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
