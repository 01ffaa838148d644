"""Several processes' emitters on one store, in any order: each matter told once in its quiet time, to every sink."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from apprentice.events.emitter import QUIET_S, Events
from apprentice.events.kinds import EventKind
from apprentice.events.sinks import Undelivered
from apprentice.store import Store
from apprentice.store.records import EventRecord

PAUSES_S = (0.0005, 0.001, 0.002)
KINDS = (EventKind.DRIFT, EventKind.VERSION_REFUSED, EventKind.ENGINE_RECOVERED, EventKind.PHASE)


class Flaky:
    """A sink that fails as often as it is told to, before or after it took the event."""

    name = "flaky"

    def __init__(self) -> None:
        self.taken: list[EventRecord] = []
        self.failures: list[str] = []

    def send(self, event: EventRecord, timeout_s: float) -> None:
        failure = self.failures.pop() if self.failures else ""
        if failure != "before":
            self.taken.append(event)
        if failure:
            raise Undelivered("it answered 500" if failure == "before" else "it timed out")


class Telling(RuleBasedStateMachine):
    """The model: when each matter was last told, by anybody."""

    @initialize()
    def open(self) -> None:
        self.now = 1_000_000.0
        self.stores = [Store.open("sqlite://", clock=lambda: self.now)]
        self.sink = Flaky()
        self.routers = [self.start() for _ in range(3)]
        self.last: dict[tuple[str, str, str], float] = {}
        self.expected: list[tuple[str, str, str, float]] = []
        self.facts: list[str] = []

    def start(self) -> Events:
        return Events(self.stores[0], [self.sink], level="info", clock=lambda: self.now, pauses_s=PAUSES_S)

    @rule(
        router=st.integers(0, 2),
        kind=st.sampled_from(KINDS),
        task=st.sampled_from(["a", "b"]),
        about=st.sampled_from(["", "v1"]),
    )
    def emit(self, router: int, kind: EventKind, task: str, about: str) -> None:
        self.routers[router].emit(kind, task, {"about": about}, about=about)
        matter = (kind.value, task, about)
        if self.now - self.last.get(matter, -math.inf) >= QUIET_S:
            self.last[matter] = self.now
            self.expected.append((*matter, self.now))
        assert all(one.flush(20) for one in self.routers)

    @rule(seconds=st.sampled_from([1.0, 150.0, QUIET_S - 1.0, QUIET_S, 1000.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(failures=st.lists(st.sampled_from(["before", "after"]), max_size=3))
    def fail(self, failures: list[str]) -> None:
        self.sink.failures = failures

    @rule(router=st.integers(0, 2))
    def restart(self, router: int) -> None:
        """A process ends and another takes its place: what it told stays told."""
        self.routers[router].close()
        self.routers[router] = self.start()

    @rule(committed=st.booleans())
    def record(self, committed: bool) -> None:
        """A fact in a transaction, told by the store's listener; a transaction that is rolled back tells nothing."""
        fact = EventRecord(f"fact{len(self.facts)}-{committed}", "a", "phase", "info", {}, self.now)
        self.stores[0].ensure_tasks(["a"])
        change: Any = lambda state: state.change(events=[fact], **({} if committed else {"phase": 1 // 0}))  # noqa: E731
        try:
            self.stores[0].update_state("a", change)
        except ZeroDivisionError:
            return
        self.facts.append(fact.id)

    @invariant()
    def each_is_stored_once_and_sent(self) -> None:
        if not hasattr(self, "routers"):
            return
        assert all(one.flush(20) for one in self.routers)
        stored = self.stores[0].events(limit=10_000)
        emitted = [e for e in stored if e.id not in self.facts]
        assert [(e.kind, e.task, e.evidence["about"], e.at) for e in emitted] == self.expected
        assert [e.id for e in stored if e.id in self.facts] == self.facts
        # A time-out after the sink took it makes it arrive again, under the same id.
        assert {e.id for e in self.sink.taken} == {e.id for e in stored}

    def teardown(self) -> None:
        if hasattr(self, "routers"):
            for router in self.routers:
                router.close()
            self.stores[0].close()


TestTelling = Telling.TestCase
TestTelling.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
