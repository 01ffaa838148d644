"""Caps: the calendar, reserve and settle, warnings, and a state machine that tries to break them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import hypothesis.strategies as st
import pytest
from hypothesis import given
from pydantic import ValidationError

from apprentice.errors import BudgetExceeded, StoreError
from apprentice.money.budget import NEVER, Budget, resets_at, windows_at
from apprentice.settings.config import BudgetSettings, Caps
from apprentice.store import ExampleRecord, Store, Usage


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
    """Headroom is false where what is spent leaves no room for a call like the last; held money comes back."""
    clock = Clock(2026, 3, 1)
    budget = Budget(store, BudgetSettings(daily=1), clock=clock)  # type: ignore[arg-type]
    assert budget.headroom("a")
    held = budget.reserve("a", "p", "m", dollars("0.6"), "r")
    clock.now += 1
    assert budget.headroom("a")
    budget.release(held)
    budget.lost(budget.reserve("a", "p", "m", dollars("0.6"), "r"))
    clock.now += 1
    assert not budget.headroom("a")
    clock.now += 86400
    assert budget.headroom("a")
    assert not Budget(store, BudgetSettings(daily=0), clock=clock).headroom("a")  # type: ignore[arg-type]


def test_warnings_come_once_among_processes(store: Store) -> None:
    """50, 80 and 95 % and the end are told once, whoever of two processes crosses them, with the right level."""
    told: list[tuple[str, str]] = []
    store.listen(lambda event: told.append((event.level, event.evidence.get("share", event.kind))))
    clock = Clock(2026, 3, 1)
    pair = [Budget(store, BudgetSettings(daily=1), clock=clock) for _ in range(2)]  # type: ignore[arg-type]
    for n in range(20):
        spend(pair[n % 2], "0.05")
    for budget in pair:
        with pytest.raises(BudgetExceeded):
            spend(budget, "0.05")
    assert told == [("info", "50%"), ("warning", "80%"), ("critical", "95%"), ("critical", "budget_exhausted")]
    assert [e.kind for e in store.events()] == ["budget_warning"] * 3 + ["budget_exhausted"]


def test_an_account_records_what_its_call_cost_with_what_it_brought(store: Store) -> None:
    """Reserved while it is under way; afterwards cost and example stand there together."""
    budget = Budget(store, BudgetSettings(daily=1))  # type: ignore[arg-type]
    with budget.account("a", "r1") as account:
        with account.call("p", "m", dollars("0.5")) as paid:
            assert budget.remaining()[0].reserved == dollars("0.5")
            paid.sent()
            paid.settle(dollars("0.1"), Usage(10, 2))
        assert (account.cost, account.usage) == (dollars("0.1"), Usage(10, 2))
        account.complete(example("r1"))
        assert [e.id for e in store.examples("a")] == ["r1"]
        assert account.cost == dollars("0.1")
    (cap,) = budget.remaining()
    assert (cap.spent, cap.reserved) == (dollars("0.1"), 0)


def example(request_id: str) -> ExampleRecord:
    return ExampleRecord(request_id, "a", {"text": "x"}, {"label": "y"}, "p", "m", 0.0)


class Interrupted(BaseException):
    """As KeyboardInterrupt and a cancellation are."""


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, Interrupted])
@pytest.mark.parametrize(
    ("said", "state"), [((), "released"), (("sent",), "lost"), (("sent", "free"), "released"), (("free",), "released")]
)
def test_an_account_is_closed_on_every_way_out(
    store: Store, error: type[BaseException], said: tuple[str, ...], state: str
) -> None:
    """A call that was never sent is free, one of unknown end costs its worst case, whatever is raised."""
    budget = Budget(store, BudgetSettings(daily=1))  # type: ignore[arg-type]
    with (  # noqa: PT012  # how the block is left is what is tested
        pytest.raises(error),
        budget.account("a", "r") as account,
        account.call("p", "m", dollars("0.5")) as paid,
    ):
        for word in said:
            getattr(paid, word)()
        raise error
    (cap,) = budget.remaining()
    assert (cap.spent, cap.reserved) == (dollars("0.5") if state == "lost" else 0, 0)
    assert [(row.state, row.calls) for row in store.spend()] == [(state, 1)]


def test_an_interruption_while_reserving_holds_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal between the commit and its being heard of: what an earlier call of the request cost stays."""
    budget = Budget(store, BudgetSettings(daily=1))  # type: ignore[arg-type]
    real = store.reserve

    def interrupted(**held: Any) -> Any:
        real(**held)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), budget.account("a", "r") as account:  # noqa: PT012  # as above
        with account.call("p", "m", dollars("0.2")) as paid:
            paid.sent()
        monkeypatch.setattr(store, "reserve", interrupted)
        with account.call("p", "m", dollars("0.3")):
            raise AssertionError("not reached")
    (cap,) = budget.remaining()
    assert (cap.spent, cap.reserved) == (dollars("0.2"), 0)


def test_an_end_that_the_store_cannot_take_is_recorded_later(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is away when a call ends: nothing is raised over the answer; the next call, or `close`, records it."""
    budget = Budget(store, BudgetSettings(daily=1))  # type: ignore[arg-type]

    def away(*_: Any) -> Any:
        raise StoreError("away")

    for again in (lambda: spend(budget, "0"), budget.close):
        before = budget.remaining()[0].spent
        with monkeypatch.context() as patched:
            patched.setattr(store, "end_calls", away)
            with budget.account("a", "r") as account, account.call("p", "m", dollars("0.2")) as paid:
                paid.sent()
                paid.settle(dollars("0.1"), Usage(1, 1))
            budget.close()  # it says what it could not record, and keeps it
        assert budget.remaining()[0].reserved == dollars("0.2")
        again()
        (cap,) = budget.remaining()
        assert (cap.spent, cap.reserved) == (before + dollars("0.1"), 0)


def test_completing_twice_records_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that breaks right after the commit: doing it again adds no second example and no second cent."""
    budget = Budget(store, BudgetSettings(daily=1))  # type: ignore[arg-type]
    real = store.complete_remote

    def breaks(**everything: Any) -> Any:
        monkeypatch.setattr(store, "complete_remote", real)
        real(**everything)
        raise StoreError("the connection broke")

    with budget.account("a", "r1") as account:
        with account.call("p", "m", dollars("0.5")) as paid:
            paid.settle(dollars("0.1"), Usage(10, 2))
        monkeypatch.setattr(store, "complete_remote", breaks)
        with pytest.raises(StoreError):
            account.complete(example("r1"))
        account.complete(example("r1"))
    assert [e.id for e in store.examples("a")] == ["r1"]
    assert budget.remaining()[0].spent == dollars("0.1")


def test_a_forked_child_ends_no_call_of_its_parent(tmp_path: Path) -> None:
    """The child leaves the with-block by an exception; the parent's call goes on and is settled."""
    with Store.open(f"sqlite:///{tmp_path / 'store.db'}") as store:
        budget = Budget(store, BudgetSettings(daily=1))  # type: ignore[arg-type]
        child = -1
        try:
            with budget.account("a", "r") as account, account.call("p", "m", dollars("0.3")) as paid:
                paid.sent()
                child = os.fork()
                if child == 0:
                    raise Interrupted
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
                assert [call.owner for call in store.open_calls()] == [budget.owner]
                paid.settle(dollars("0.1"), Usage(1, 1))
        except Interrupted:
            os._exit(0)
        assert [(row.state, row.cost) for row in store.spend()] == [("settled", dollars("0.1"))]


def test_a_process_that_ends_without_closing_holds_nothing(tmp_path: Path) -> None:
    """Five processes make a call each and just end: what they cost is what is committed."""
    url = f"sqlite:///{tmp_path / 'store.db'}"
    code = (
        "import sys; from decimal import Decimal as D; from apprentice.money.budget import Budget;"
        "from apprentice.settings.config import BudgetSettings; from apprentice.store import Store, Usage\n"
        "budget = Budget(Store.open(sys.argv[1]), BudgetSettings(total=D(1)))\n"
        "with budget.account('a', 'r') as account, account.call('p', 'm', D('0.1')) as call:\n"
        "    call.settle(D('0.01'), Usage(1, 1))\n"
    )
    for _ in range(5):
        subprocess.run([sys.executable, "-c", code, url], check=True)
    with Store.open(url) as store:
        (cap,) = Budget(store, BudgetSettings(total=1)).remaining()  # type: ignore[arg-type]
        assert (cap.spent, cap.reserved) == (dollars("0.05"), 0)


# ---------------------------------------------------------------- a cap that is only held


def test_a_burst_waits_while_a_cap_is_only_held(tmp_path: Path) -> None:
    """60 calls at once, of which three fit at their worst case, all get their turn: they truly cost a hundredth."""
    with Store.open(f"sqlite:///{tmp_path / 'store.db'}") as store:
        pair = [Budget(store, BudgetSettings(daily=dollars("0.3"))) for _ in range(2)]
        at_once: list[int] = []

        def one(n: int) -> None:
            with (
                pair[n % 2].account("a", f"r{n}") as account,
                account.call("p", "m", dollars("0.1"), wait_s=60) as paid,
            ):
                paid.sent()
                at_once.append(len(store.open_calls()))
                paid.settle(dollars("0.001"), Usage(1, 1))

        with ThreadPoolExecutor(20) as pool:
            list(pool.map(one, range(60)))
        assert max(at_once) <= 3
        assert pair[0].remaining()[0].spent == dollars("0.06")
        assert store.events() == []  # nobody was told that anything is exhausted


def test_a_call_that_does_not_get_its_turn_says_so(store: Store) -> None:
    """Held is not used up: the error counts the calls in flight and asks to come back in seconds; no alert."""
    budget = Budget(store, BudgetSettings(daily=1))  # type: ignore[arg-type]
    spend(budget, "0.1")
    with budget.account("a", "r1") as first, first.call("p", "m", dollars("0.8")):
        for wait_s in (0.0, 0.05):
            with pytest.raises(BudgetExceeded, match="held by 1 call in flight") as caught:
                budget.reserve("a", "p", "m", dollars("0.2"), "r2", wait_s=wait_s)
            assert (caught.value.in_flight, caught.value.spent, caught.value.held) == (
                1,
                dollars("0.1"),
                dollars("0.8"),
            )
            assert caught.value.retry_after_s is not None
            assert caught.value.retry_after_s <= 10
        assert budget.headroom("a")
    assert [e.kind for e in store.events()] == []
    budget.release(budget.reserve("a", "p", "m", dollars("0.2"), "r2"))


def test_a_request_does_not_wait_for_itself(store: Store) -> None:
    """What its own first attempt may have cost is recorded before the second one looks for room."""
    budget = Budget(store, BudgetSettings(daily=1))  # type: ignore[arg-type]
    with pytest.raises(BudgetExceeded) as caught, budget.account("a", "r") as account:  # noqa: PT012  # as above
        with account.call("p", "m", dollars("0.6")) as paid:
            paid.sent()
        with account.call("p", "m", dollars("0.6"), wait_s=3600):
            raise AssertionError("not reached")
    assert caught.value.in_flight == 0


def test_used_up_says_what_is_left_and_what_a_call_needs() -> None:
    """A cap below one call's worst case, one that is spent, and one that nearly is: three different sentences."""
    clock = Clock(2026, 3, 1)
    with Store.open("sqlite://", clock=clock) as store:
        budget = Budget(store, BudgetSettings(daily=dollars("0.01")), clock=clock)
        with pytest.raises(BudgetExceeded, match=r"less than one call may cost \(0 spent; .* up to 0.0198\)") as caught:
            spend(budget, "0.0198")
        assert caught.value.retry_after_s is None
        spend(budget, "0.009")
        with pytest.raises(
            BudgetExceeded, match=r"leaves no room for this call until 2026-03-02.*0.009 spent"
        ) as caught:
            spend(budget, "0.002")
        assert caught.value.retry_after_s == 86400
        spend(budget, "0.001")
        with pytest.raises(BudgetExceeded, match="is used up until 2026-03-02"):
            spend(budget, "0.001")


def test_what_the_dead_hold_is_not_waited_for(store: Store) -> None:
    """It does not come back by itself: a call that needs it is refused at once, and the error names the command."""
    dead = subprocess.run(
        [sys.executable, "-c", "from apprentice.money.owner import this_process; print(this_process())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    Budget(store, BudgetSettings(daily=1), owner=dead).reserve("a", "p", "m", dollars("0.9"), "r")  # type: ignore[arg-type]
    budget = Budget(store, BudgetSettings(daily=1))  # type: ignore[arg-type]
    with pytest.raises(BudgetExceeded, match="apprentice budget"):
        budget.reserve("a", "p", "m", dollars("0.2"), "r", wait_s=3600)
    budget.release(budget.reserve("a", "p", "m", dollars("0.1"), "r", wait_s=3600))


def test_a_person_releases_what_the_dead_hold(store: Store) -> None:
    """With a reason on record; and should the dead turn out to live, what its call cost counts all the same."""
    budget = Budget(store, BudgetSettings(daily=1), owner="gone")  # type: ignore[arg-type]
    held = budget.reserve("a", "p", "m", dollars("0.9"), "r")
    (listed,) = budget.open_calls()
    assert (listed.id, listed.owner, listed.worst_case, listed.task) == (held.id, "gone", dollars("0.9"), "a")
    event = budget.release_by_hand(held.id, "the machine burnt down")
    assert (event.kind, event.evidence["reason"]) == ("reservation_released", "the machine burnt down")
    assert [e.kind for e in store.events()] == ["reservation_released"]
    assert (budget.remaining()[0].spent, budget.remaining()[0].reserved) == (0, 0)
    with pytest.raises(StoreError, match=f"no reservation {held.id} is open"):
        budget.release_by_hand(held.id, "again")
    budget.settle(held, dollars("0.2"), Usage(5, 5))
    budget.settle(held, dollars("0.2"), Usage(5, 5))
    assert (budget.remaining()[0].spent, budget.remaining()[0].reserved) == (dollars("0.2"), 0)


def test_what_was_held_ahead_by_an_older_apprentice_comes_back() -> None:
    """Reservations without a request's id were never sent: they end with their owner, or when they are old."""
    clock = Clock(2026, 3, 1)
    caps = BudgetSettings(daily=1, weekly=5)  # type: ignore[arg-type]
    with Store.open("sqlite://", clock=clock) as store:
        old = Budget(store, caps, clock=clock, owner=f"{socket.gethostname()}/{os.getpid()}")
        ahead = [old.reserve("a", "p", "m", dollars("0.1"), "") for _ in range(2)]
        sent = old.reserve("a", "p", "m", dollars("0.2"), "r")
        with store._database.write() as tx:
            tx.run_text("UPDATE calls SET windows = ''")  # as an older Apprentice writes them
        Budget(store, caps, clock=clock)
        assert len(store.open_calls()) == 3  # their owner lives, and may be about to use them
        clock.now += 4000
        budget = Budget(store, caps, clock=clock)
        assert [call.id for call in store.open_calls()] == [sent.id]
        old.release(ahead[0])  # it had been asleep
        assert {cap.reserved for cap in budget.remaining()} == {dollars("0.2")}


# ---------------------------------------------------------------- caps and bills


def test_a_lower_cap_binds_processes_that_started_earlier(store: Store) -> None:
    """And a cap that is new, and one that is taken away; the configuration that started last is in force."""
    clock = Clock(2026, 3, 1)
    monotonic = [0.0]
    old = Budget(store, BudgetSettings(daily=100), clock=clock, monotonic=lambda: monotonic[0])  # type: ignore[arg-type]
    spend(old, "0.02")
    clock.now += 1
    Budget(store, BudgetSettings(daily=dollars("0.03")), clock=clock)
    with pytest.raises(BudgetExceeded, match=r"daily budget of 0\.03"):
        spend(old, "0.02")
    spend(old, "0.01")
    clock.now += 1
    Budget(store, BudgetSettings(weekly=dollars("0.02")), {"a": Caps(total=dollars("0.01"))}, clock=clock)
    monotonic[0] += 1
    assert [(w.scope, w.period, w.cap) for w in old.windows("a")] == [
        ("", "weekly", dollars("0.02")),
        ("a", "total", dollars("0.01")),
    ]
    with pytest.raises(BudgetExceeded, match="task:total"):
        spend(old, "0.02")
    clock.now -= 2  # a configuration that started before the others
    Budget(store, BudgetSettings(daily=100), clock=clock)  # type: ignore[arg-type]
    monotonic[0] += 1
    assert {w.period for w in old.windows("a")} == {"weekly", "total"}


@given(
    st.lists(
        st.tuples(st.sampled_from([None, "1", "2.50"]), st.sampled_from([None, "7"]), st.integers(-5, 60)), max_size=6
    )
)
def test_a_change_of_the_caps_in_force_is_told(starts: list[tuple[str | None, str | None, int]]) -> None:
    """Who started with which caps; nothing is told of a start that changes none, nor of one whose clock is behind."""
    clock = Clock(2026, 3, 1)
    with Store.open("sqlite://") as store:
        for daily, weekly, later_s in starts:
            clock.now += later_s
            before, told = store.caps(), len(store.events())
            own = {"a": Caps(weekly=weekly and dollars(weekly))}
            Budget(store, BudgetSettings(daily=daily and dollars(daily)), own, clock=clock, owner="host/1")
            after = store.caps()
            changed = {
                key.replace("|", ".").lstrip("."): (was, after[key]) for key, was in before.items() if after[key] != was
            }
            new = store.events()[told:]
            assert [(event.kind, event.task) for event in new] == [("caps_changed", None)] * bool(changed)
            for event in new:
                evidence = dict(event.evidence)
                assert evidence.pop("started") == "host/1"
                amounts = {
                    name: tuple(cap and dollars(cap) for cap in (one["before"], one["now"]))
                    for name, one in evidence.items()
                }
                assert amounts == changed


def test_a_bill_above_its_reservation_is_counted_told_and_learnt(store: Store) -> None:
    """1,000 times what was held: all of it is spent, a critical event says so, and nothing more is asked."""
    told: list[tuple[str, str]] = []
    store.listen(lambda event: told.append((event.kind, event.level)))
    budget = Budget(store, BudgetSettings(daily=1), clock=Clock(2026, 3, 1))  # type: ignore[arg-type]
    budget.settle(budget.reserve("a", "p", "m", dollars("0.02"), "r"), dollars("15"), Usage(100, 1_000_000))
    (cap,) = budget.remaining()
    assert (cap.spent, cap.reserved, cap.remaining) == (15, 0, 0)
    assert ("billed_above_reservation", "critical") in told
    assert store.events()[-1].evidence["billed"] == "15"
    with pytest.raises(BudgetExceeded):
        budget.reserve("a", "p", "m", dollars("0.02"), "r")


def test_the_next_worst_case_learns_from_a_bill_above_it(store: Store) -> None:
    """Three times as much is held for the model's next call; bills that fit let it fall again; others are untouched."""
    budget = Budget(store, BudgetSettings(daily=100), clock=Clock(2026, 3, 1))  # type: ignore[arg-type]
    budget.settle(budget.reserve("a", "p", "m", dollars("0.02"), "r"), dollars("0.06"), Usage(1, 1))
    held = budget.reserve("a", "p", "m", dollars("0.02"), "r")
    assert held.worst_case == dollars("0.06")
    assert budget.reserve("a", "p", "another", dollars("0.02"), "r").worst_case == dollars("0.02")
    for _ in range(12):
        budget.settle(held, dollars("0.01"), Usage(1, 1))
        held = budget.reserve("a", "p", "m", dollars("0.02"), "r")
    assert held.worst_case == dollars("0.02")


def test_one_bill_beyond_all_measure_stops_nothing_for_good(store: Store) -> None:
    """A bill of 750 times what was held leaves no room under the cap of another day, and is forgotten by the hour."""
    clock, monotonic = Clock(2026, 3, 1), [0.0]
    budget = Budget(store, BudgetSettings(daily=1), clock=clock, monotonic=lambda: monotonic[0])  # type: ignore[arg-type]
    budget.settle(budget.reserve("a", "p", "m", dollars("0.02"), "r"), dollars("15"), Usage(100, 1_000_000))
    clock.now += 86_400
    with pytest.raises(BudgetExceeded):
        budget.reserve("a", "p", "m", dollars("0.02"), "r")
    monotonic[0] += 4 * 3600
    assert budget.reserve("a", "p", "m", dollars("0.02"), "r").worst_case == dollars("0.9375")
    monotonic[0] += 86_400
    assert budget.reserve("a", "p", "m", dollars("0.02"), "r2").worst_case == dollars("0.02")


@pytest.mark.parametrize("cost", ["-0.01", "NaN", "Infinity"])
def test_no_settlement_lifts_a_cap(store: Store, cost: str) -> None:
    """A price that is negative or no number is a mistake of ours, and is not written down."""
    budget = Budget(store, BudgetSettings(daily=1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot cost"):
        budget.settle(budget.reserve("a", "p", "m", dollars("0.02"), "r"), dollars(cost), Usage(1, 1))


def test_a_cap_that_the_ledger_cannot_count_is_refused() -> None:
    """Nano-dollars in 64 bits end at nine billion dollars."""
    with pytest.raises(ValidationError, match="less than or equal to 1000000000"):
        BudgetSettings(daily=dollars("1e10"))
    with Store.open("sqlite://") as store:
        budget = Budget(store, BudgetSettings(daily=dollars("1e9")))
        with pytest.raises(BudgetExceeded):
            budget.reserve("a", "p", "m", dollars("1e12"), "r")
        Budget(store, BudgetSettings()).lost(
            Budget(store, BudgetSettings()).reserve("a", "p", "m", dollars("1e30"), "r")
        )


def test_a_lost_window_is_made_again(store: Store) -> None:
    """Windows that vanish with a power failure are created anew instead of refusing every call."""
    budget = Budget(store, BudgetSettings(daily=1), clock=Clock(2026, 3, 1))  # type: ignore[arg-type]
    spend(budget, "0.5")
    with store._database.write() as tx:
        tx.run_text("DELETE FROM cap_windows")
    spend(budget, "0.5")
    assert budget.remaining()[0].spent == dollars("0.5")


def test_spare_room_ends_before_anybody_has_to_wait(store: Store) -> None:
    """From 80 % of a cap on, or where four more calls would not fit, there is none; what is held counts."""
    clock = Clock(2026, 3, 1)
    budget = Budget(store, BudgetSettings(daily=1), clock=clock)  # type: ignore[arg-type]
    assert not budget.has_spare("a")  # what a call holds is not known yet
    budget.lost(budget.reserve("a", "p", "m", dollars("0.10"), "r"))
    assert budget.has_spare("a")  # .10 + 5 * .10
    others = [budget.reserve("a", "p", "m", dollars("0.10"), "r") for _ in range(4)]
    assert budget.has_spare("a")
    others.append(budget.reserve("a", "p", "m", dollars("0.10"), "r"))
    assert not budget.has_spare("a")
    for held in others:
        budget.release(held)
    assert budget.has_spare("a")
    budget.lost(budget.reserve("a", "p", "m", dollars("0.68"), "r"))
    budget.lost(budget.reserve("a", "p", "m", dollars("0.01"), "r"))
    assert budget.has_spare("a")  # .79 + .01
    budget.lost(budget.reserve("a", "p", "m", dollars("0.01"), "r"))
    assert not budget.has_spare("a")
    free = Budget(store, BudgetSettings(), {"b": Caps()}, clock=clock)
    free.lost(free.reserve("b", "p", "m", dollars("5"), "r"))
    assert free.has_spare("b")
