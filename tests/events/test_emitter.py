"""Events: in the store, in the log and at the sinks, once; and never at the expense of what they are about."""

from __future__ import annotations

import logging
import multiprocessing
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from apprentice.events.emitter import QUIET_S, Events
from apprentice.events.kinds import EventKind
from apprentice.events.sinks import Undelivered, Webhook
from apprentice.store import Store
from apprentice.store.records import EventRecord
from tests.conftest import Webhook as WebhookServer

PAUSES_S = (0.01, 0.02, 0.04)


class Collecting:
    """A sink that keeps what it gets, and fails as often as it is told to before it takes an event."""

    name = "collecting"

    def __init__(self, failures: int = 0, *, again: bool = True) -> None:
        self.taken: list[EventRecord] = []
        self.tries = 0
        self._failures = failures
        self._again = again

    def send(self, event: EventRecord, timeout_s: float) -> None:
        self.tries += 1
        if self.tries <= self._failures:
            raise Undelivered("it answered 500", again=self._again)
        self.taken.append(event)


@pytest.fixture
def store() -> Iterator[Store]:
    with Store.open("sqlite://") as store:
        yield store


def test_an_event_is_told_everywhere_and_once(
    store: Store, webhook: WebhookServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Event, log line and post; the same again only after a while; another task's at once."""
    now = [1000.0]
    events = Events(store, [Webhook(webhook.url)], clock=lambda: now[0])
    for task in ("a", "a", "b"):
        events.emit(EventKind.DRIFT, task, {"correlation": 0.4}, level="critical")
    events.flush()
    now[0] += QUIET_S
    events.emit(EventKind.DRIFT, "a", {"correlation": 0.3}, level="critical")
    events.close()
    told = [("a", 0.4), ("b", 0.4), ("a", 0.3)]
    assert [(p["task"], p["evidence"]["correlation"]) for p in webhook.posts] == told
    assert {(p["kind"], p["level"]) for p in webhook.posts} == {("drift", "critical")}
    assert [(e.task, e.evidence["correlation"]) for e in store.events()] == told
    assert [p["id"] for p in webhook.posts] == [e.id for e in store.events()]
    assert sum("drift" in record.message for record in caplog.records) == 3


def test_a_post_says_what_happened_when_where_and_what_to_do(store: Store, webhook: WebhookServer) -> None:
    """A reader who has only the message knows what to do next."""
    events = Events(store, [Webhook(webhook.url)], clock=lambda: 1000.0)
    events.emit(EventKind.TRAINING_FAILED, "a", {"run": "r1"}, about="r1")
    events.close()
    (post,) = webhook.posts
    assert post["at"] == "1970-01-01T00:16:40.000+00:00"
    assert post["host"]
    assert post["text"] == f"critical: a: training_failed. {EventKind.TRAINING_FAILED.meaning}"
    assert post["remedy"] == EventKind.TRAINING_FAILED.remedy
    assert post["evidence"] == {"run": "r1"}


def test_another_matter_is_told_at_once(store: Store) -> None:
    """Two versions refused within the quiet time are two events."""
    events = Events(store, clock=lambda: 1000.0)
    for version in ("v1", "v2", "v1"):
        events.emit(EventKind.VERSION_REFUSED, "a", {"version": version}, about=version)
    events.close()
    assert [e.evidence["version"] for e in store.events()] == ["v1", "v2"]


@pytest.mark.parametrize(
    ("level", "kinds"), [("info", ["phase", "recovered", "drift"]), ("warning", ["recovered", "drift"])]
)
def test_sinks_get_what_is_grave_enough_and_the_all_clear(store: Store, level: Any, kinds: list[str]) -> None:
    """Nobody is woken for information, but who heard of trouble hears of its end."""
    sink = Collecting()
    events = Events(store, [sink], level=level, clock=lambda: 1000.0)
    for kind in (EventKind.PHASE, EventKind.RECOVERED, EventKind.DRIFT):
        events.emit(kind, "a")
    events.close()
    assert [e.kind for e in sink.taken] == kinds
    assert len(store.events("a")) == 3


def test_what_a_transaction_commits_is_told_and_what_it_rolls_back_is_not(store: Store) -> None:
    """No writer can forget to announce: the store tells its listener."""
    sink = Collecting()
    events = Events(store, [sink])
    store.ensure_tasks(["a"])
    told = EventRecord("1", "a", "drift", "warning", {}, 1.0)
    store.update_state("a", lambda state: state.change(events=[told]))
    store.update_state("a", lambda state: state.change(events=[told]))  # the same fact, from another process
    with pytest.raises(ZeroDivisionError):
        store.update_state("a", lambda state: state.change(events=[told], phase=1 // 0))
    events.close()
    assert [e.id for e in sink.taken] == ["1"]


@pytest.mark.parametrize("failures", [1, 3])
def test_a_sink_that_fails_is_tried_again(store: Store, failures: int, caplog: pytest.LogCaptureFixture) -> None:
    """With growing pauses; the log says so once."""
    sink = Collecting(failures)
    events = Events(store, [sink], pauses_s=PAUSES_S)
    events.emit(EventKind.DRIFT, "a")
    assert events.flush()
    assert (len(sink.taken), sink.tries) == (1, failures + 1)
    assert sum("did not take" in record.message for record in caplog.records) == 1
    events.close()


@pytest.mark.parametrize(("failures", "again", "tries"), [(99, True, 4), (99, False, 1)])
def test_a_sink_that_never_takes_an_event_is_given_up(
    store: Store, failures: int, again: bool, tries: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A refusal at once, everything else after the last pause; the event is in the store."""
    sink = Collecting(failures, again=again)
    events = Events(store, [sink], pauses_s=PAUSES_S)
    events.emit(EventKind.DRIFT, "a")
    assert events.flush()
    events.close()
    assert sink.tries == tries
    assert "did not reach the collecting" in caplog.text
    assert [e.kind for e in store.events("a")] == ["drift"]


@pytest.mark.parametrize("reachable", [True, False])
def test_a_webhook_that_fails_costs_nobody_anything(
    store: Store, webhook: WebhookServer, caplog: pytest.LogCaptureFixture, reachable: bool
) -> None:
    """An error, or no server at all: a warning in the log without the URL, and the event is there."""
    webhook.status = 500
    url = webhook.url if reachable else "http://127.0.0.1:9/services/T0123/B0123/abcdefghijklmnop"
    events = Events(store, [Webhook(url)], clock=lambda: 1000.0, pauses_s=PAUSES_S)
    with caplog.at_level(logging.DEBUG):
        events.emit(EventKind.DRIFT, "a")
        events.close()
    assert "webhook" in caplog.text
    assert url not in caplog.text
    assert [e.kind for e in store.events("a")] == ["drift"]


def test_emitting_waits_neither_for_the_store_nor_for_a_sink(store: Store) -> None:
    """A request that raises an alert goes on while both hang."""
    go_on = threading.Event()

    class Hanging:
        name = "hanging"

        def send(self, event: EventRecord, timeout_s: float) -> None:
            go_on.wait(10)

    real = store.add_event_unless_recent

    def slow(event: EventRecord, quiet_s: float) -> float | None:
        go_on.wait(10)
        return real(event, quiet_s)

    store.add_event_unless_recent = slow  # type: ignore[method-assign]
    events = Events(store, [Hanging()])
    for task in ("a", "b", "c"):
        events.emit(EventKind.DRIFT, task)
    assert not events.flush(0.05)
    go_on.set()
    events.close()
    assert [e.task for e in store.events()] == ["a", "b", "c"]


def test_a_store_that_is_away_delays_the_record_and_not_the_message(store: Store) -> None:
    """The webhook hears at once that the store is away, and once; the store gets the event when it is back."""
    sink, real, failures = Collecting(), store.add_event_unless_recent, [2]

    def away(event: EventRecord, quiet_s: float) -> float | None:
        if failures[0] > 0:
            failures[0] -= 1
            raise OSError("away")
        return real(event, quiet_s)

    store.add_event_unless_recent = away  # type: ignore[method-assign]
    events = Events(store, [sink], pauses_s=PAUSES_S)
    events.emit(EventKind.STORE_UNAVAILABLE, None)
    assert events.flush()
    assert [e.kind for e in sink.taken] == [e.kind for e in store.events()] == ["store_unavailable"]
    events.close()


_AT_EXIT = """
    import sys
    from apprentice.events.emitter import Events
    from apprentice.events.kinds import EventKind
    from apprentice.events.sinks import Webhook
    from apprentice.store import Store

    events = Events(Store.open(sys.argv[1]), [Webhook(sys.argv[2])])
    for task in ("a", "b", "c"):
        events.emit(EventKind.TRAINING_FAILED, task)
    if sys.argv[3] == "raising":
        raise SystemExit(1)
"""


@pytest.mark.parametrize("ending", ["returning", "raising"])
def test_the_last_alerts_of_a_process_arrive(webhook: WebhookServer, tmp_path: Path, ending: str) -> None:
    """It ends right after them, without closing anything."""
    url = f"sqlite:///{tmp_path / 'store.db'}"
    command = [sys.executable, "-c", textwrap.dedent(_AT_EXIT), url, webhook.url, ending]
    subprocess.run(command, check=ending == "returning", timeout=60, capture_output=True)
    assert sorted(p["task"] for p in webhook.posts) == ["a", "b", "c"]
    with Store.open(url) as store:
        assert [e.task for e in store.events()] == ["a", "b", "c"]


def _emit_as_one_of_many(url: str, hook: str, start: Any) -> None:
    with Store.open(url) as store:
        events = Events(store, [Webhook(hook)])
        start.wait(30)
        for n in range(20):
            events.emit(EventKind.DRIFT, f"task{n % 4}")
            events.emit(EventKind.VERSION_REFUSED, "task0", about=f"v{n % 3}")
        events.close(30)


def test_many_processes_tell_once(webhook: WebhookServer, url: str) -> None:
    """Four routers on one store meet the same seven troubles: seven events, seven posts."""
    Store.open(url).close()
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(4)
    routers = [context.Process(target=_emit_as_one_of_many, args=(url, webhook.url, start)) for _ in range(4)]
    for router in routers:
        router.start()
    for router in routers:
        router.join(60)
        assert router.exitcode == 0
    with Store.open(url) as store:
        stored = [e.id for e in store.events()]
    assert len(stored) == len(set(stored)) == 7
    assert sorted(p["id"] for p in webhook.posts) == sorted(stored)


def test_a_child_process_tells_its_own_events_and_not_its_parents(tmp_path: Path) -> None:
    """After a fork the thread is gone and what waited is the parent's."""
    with Store.open(f"sqlite:///{tmp_path / 'store.db'}") as store:
        sink = Collecting(99)
        events = Events(store, [sink], pauses_s=(0.05,) * 50)
        events.emit(EventKind.DRIFT, "parent")
        while not sink.tries:
            time.sleep(0.01)

        def in_child() -> None:
            events.emit(EventKind.DRIFT, "child")
            events.close()

        child = multiprocessing.get_context("fork").Process(target=in_child)
        child.start()
        child.join(30)
        assert child.exitcode == 0
        events.close()
        assert sorted(e.task or "" for e in store.events()) == ["child", "parent"]
