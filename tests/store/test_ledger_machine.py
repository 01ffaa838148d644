"""A state machine that tries to break the ledger, on both databases, checked against the raw rows of `calls`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import datetime
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from apprentice.errors import BudgetExceeded, StoreError
from apprentice.money.budget import Account, Budget, PaidCall
from apprentice.settings.config import BudgetSettings, Caps
from apprentice.store import ExampleRecord, Store, Usage

ZONE = "America/New_York"  # clocks change on 8 March and 1 November 2026
CAPS = st.fixed_dictionaries(
    {},
    optional={
        "daily": st.sampled_from(["0.60", "1.00"]),
        "weekly": st.sampled_from(["0.50", "2.50"]),
        "monthly": st.sampled_from(["4.00"]),
        "total": st.sampled_from(["2.00", "9.00"]),
    },
)
WORDS = st.sampled_from(["", "sent", "free", "settle", "absurd"])


class Boom(BaseException):
    """What a cancellation or a signal is to a call."""


class Call:
    """One call in flight: its account, its reservation, and how to leave them."""

    def __init__(self, account: Account, provider: str, amount: Decimal) -> None:
        self.account = account
        self._outer, self._inner = ExitStack(), ExitStack()
        self._outer.enter_context(account)
        self.paid: PaidCall = self._inner.enter_context(account.call(provider, "m", amount))

    def leave(self, error: type[BaseException] | None = None, example: ExampleRecord | None = None) -> None:
        """Leave both blocks, by an exception or with an answer, which is recorded twice: it must count once."""
        try:
            with self._outer:
                with self._inner:
                    if error is not None:
                        raise error
                if example is not None:
                    pending = list(self.account._pending)
                    self.account.complete(example)
                    self.account._pending = pending
                    self.account.complete(example)
        except Boom:
            pass


class Ledger(RuleBasedStateMachine):
    """Two processes call, end in every way, crash and restart under other caps; people release; the store fails.

    Whatever happens: spent is settled plus lost, recomputed from the raw rows; spent never falls; what is committed
    beyond it is what open calls hold; and no reservation is admitted above a cap in force.
    """

    url = ""
    calls = Bundle("calls")
    dead = Bundle("dead")

    @initialize(common=CAPS, own=CAPS)
    def open(self, common: dict[str, str], own: dict[str, str]) -> None:
        self.now = datetime(2026, 3, 7, 12, tzinfo=ZoneInfo(ZONE)).timestamp()
        self.ticks = 0.0
        self.store = Store.open(self.url, clock=lambda: self.now)
        with self.store._database.write() as tx:
            for table in ("calls", "cap_windows", "caps", "events", "examples", "call_totals", "example_totals"):
                tx.run_text(f"DELETE FROM {table}")  # names of ours
        self.number = 0
        self.most_spent: dict[str, int] = {}
        self.running: list[Call] = []
        self.ended: list[Call] = []
        self.answered: list[str] = []
        self.budgets = [self.process(common, own), self.process(common, own)]

    def process(self, common: dict[str, str], own: dict[str, str]) -> Budget:
        self.number += 1
        self.now += 1
        self.ticks += 10
        caps = BudgetSettings(**common, timezone=ZONE, week_start="sunday")  # type: ignore[arg-type]
        return Budget(
            self.store,
            caps,
            {"a": Caps(**own)},  # type: ignore[arg-type]
            clock=lambda: self.now,
            monotonic=lambda: self.ticks,
            owner=f"process {self.number}",
        )

    def teardown(self) -> None:
        if hasattr(self, "store"):
            for call in self.running:
                call.leave()
            self.store.close()

    def caps_in_force(self) -> dict[str, Decimal]:
        return {key: cap for key, cap in self.store.caps().items() if cap is not None}

    # calls

    @rule(
        target=calls,
        who=st.integers(0, 1),
        task=st.sampled_from("ab"),
        provider=st.sampled_from(["tame", "wild"]),
        cents=st.integers(1, 70),
    )
    def call(self, who: int, task: str, provider: str, cents: int) -> Any:
        self.number += 1
        amount = Decimal(cents) / 100
        budget = self.budgets[who]
        budget._write_late()  # as the call itself will: what comes back may make room
        before = {key: Decimal(committed) / 10**9 for key, _, committed in self.windows()}
        caps = self.caps_in_force()
        try:
            call = Call(budget.account(task, f"r{self.number}"), provider, amount)
        except BudgetExceeded as refused:
            needs = refused.needs or Decimal(0)
        else:
            needs = None
        if needs is not None:
            assert needs >= amount
            assert any(before.get(w.key, Decimal(0)) + needs > w.cap for w in budget.windows(task))
            return multiple()
        self.running.append(call)
        held = call.paid.held
        assert {(w.scope, w.period) for w in held.windows} == {
            (scope, period) for scope, period in (key.split("|") for key in caps) if scope in ("", task)
        }
        for w in held.windows:
            assert w.cap == caps[f"{w.scope}|{w.period}"]
            assert before.get(w.key, Decimal(0)) + held.worst_case <= w.cap
        return call

    @rule(call=consumes(calls), words=st.lists(WORDS, max_size=2), share=st.integers(0, 100), boom=st.booleans())
    def end(self, call: Call, words: list[str], share: int, boom: bool) -> None:
        """What was said last counts, whichever way the call is left."""
        self.say(call, words, share)
        call.leave(Boom if boom else None)
        self.ended.append(call)

    @rule(call=consumes(calls), share=st.integers(0, 100))
    def answer(self, call: Call, share: int) -> None:
        """The call brings an answer, which is recorded together with what it cost."""
        self.say(call, ["sent", "settle"], share)
        request_id = call.account.request_id
        call.leave(example=ExampleRecord(request_id, call.account.task, {"text": "x"}, {"l": "y"}, "p", "m", self.now))
        self.ended.append(call)
        self.answered.append(request_id)

    @rule(call=consumes(calls), words=st.lists(WORDS, min_size=1, max_size=1), share=st.integers(0, 100))
    def end_while_the_store_is_away(self, call: Call, words: list[str], share: int) -> None:
        """Nothing is raised, and nothing forgotten: a later call of the process records it."""
        self.say(call, words, share)
        real = self.store.end_calls

        def away(settlements: Any) -> Any:
            raise StoreError("away")

        self.store.end_calls = away  # type: ignore[method-assign]
        try:
            call.leave(None)
        finally:
            self.store.end_calls = real  # type: ignore[method-assign]
        self.ended.append(call)

    def say(self, call: Call, words: list[str], share: int) -> None:
        for word in words:
            if word == "settle" or (word == "absurd" and call.paid.held.provider == "tame"):
                call.paid.settle(call.paid.held.worst_case * share / 100, Usage(1, 1))
            elif word == "absurd":
                call.paid.settle(call.paid.held.worst_case * share, Usage(10**6, 10**6))
            elif word:
                getattr(call.paid, word)()

    # processes and people

    @rule(target=dead, call=consumes(calls), who=st.integers(0, 1), common=CAPS, own=CAPS)
    def crash(self, call: Call, who: int, common: dict[str, str], own: dict[str, str]) -> Call:
        """A process dies with a call in flight; another takes its place, under other caps, knowing nothing."""
        self.budgets[who] = self.process(common, own)
        return call

    @rule(call=calls, reason=st.sampled_from(["it is gone", "a mistake: it lives"]))
    def release_by_hand(self, call: Call, reason: str) -> None:
        """The call stays in the bundle: its owner may live, and end it later."""
        self.released(call, reason)

    @rule(call=consumes(dead))
    def release_what_the_dead_hold(self, call: Call) -> None:
        self.released(call, "its process died")

    def released(self, call: Call, reason: str) -> None:
        number = call.paid.held.id
        if number in [held.id for held in self.budgets[0].open_calls()]:
            self.budgets[0].release_by_hand(number, reason)
        else:
            with pytest.raises(StoreError):
                self.budgets[0].release_by_hand(number, reason)

    @rule(hours=st.integers(-72, 72))
    def drift(self, hours: int) -> None:
        """Hours pass; or the clock is set back."""
        self.now += hours * 3600
        self.ticks += 10

    @rule(
        moment=st.sampled_from(
            [(2026, 3, 8, 1, 59), (2026, 3, 8, 3, 0), (2026, 11, 1, 1, 30), (2026, 2, 28, 23, 59), (2026, 4, 1, 0, 0)]
        )
    )
    def leap(self, moment: tuple[int, int, int, int, int]) -> None:
        """Land where calendars are awkward: clocks going forward and back, the ends of months."""
        self.now = datetime(*moment, tzinfo=ZoneInfo(ZONE)).timestamp()

    # the truth

    def windows(self) -> list[Any]:
        with self.store._database.read() as tx:
            return tx.run_text("SELECT key, spent, committed FROM cap_windows").fetchall()

    @invariant()
    def the_books_balance(self) -> None:
        if not hasattr(self, "store"):
            return
        with self.store._database.read() as tx:
            rows = tx.run_text("SELECT state, worst_case, cost, windows, seq FROM calls").fetchall()
        for key, spent, committed in self.windows():
            inside = [row for row in rows if key in row[3].split("\n")]
            assert spent == sum(cost for state, _, cost, _, _ in inside if state in ("settled", "lost"))
            assert committed - spent == sum(worst for state, worst, _, _, _ in inside if state == "reserved")
            assert spent >= self.most_spent.get(key, 0)
            self.most_spent[key] = spent
        found = {row[4]: row for row in rows}
        for call in self.ended:
            said, row = call.paid.settlement, found[call.paid.held.id]
            late = {s.reservation.id for s in call.account._budget._late}
            if said.state != "released" and said.reservation.id not in late:
                assert (row[0], Decimal(row[2]) / 10**9) == (said.state, round(said.cost, 9))
        for state in ("settled", "lost", "released"):
            ended = [row for row in rows if row[0] == state]
            totals = [row for row in self.store.spend() if row.state == state]
            assert sum(row.calls for row in totals) == len(ended)
            assert sum(row.cost for row in totals) * 10**9 == sum(row[2] for row in ended)
        assert sorted(self.answered) == sorted(e.id for task in "ab" for e in self.store.examples(task))
        assert all(cost == 0 for state, _, cost, _, _ in rows if state in ("released", "reserved"))
        assert all(cost == worst for state, worst, cost, _, _ in rows if state == "lost")


@pytest.fixture(params=["sqlite", "postgresql"])
def machine_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A store that every run of the machine empties."""
    if request.param == "sqlite":
        yield "sqlite://"
        return
    make: Callable[[], str] = request.getfixturevalue("new_postgres")
    yield make()


def test_no_order_of_events_breaks_the_ledger(machine_url: str) -> None:
    """See the machine."""
    machine = type("Machine", (Ledger,), {"url": machine_url})
    examples = 60 if machine_url == "sqlite://" else 15
    limits = settings(
        max_examples=examples, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(machine, settings=limits)
