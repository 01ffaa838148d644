"""A lease is a fence: who has lost it writes nothing any more; and who is champion is decided once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from apprentice.errors import ChosenMeanwhile, LeaseLost, StoreError, TrainingError
from apprentice.store import Store
from apprentice.store.records import EventRecord, VersionRecord
from flows.lease import HeldLease
from flows.review import champions_before
from tests.store.conftest import Clock

VERSION = VersionRecord("v1", "mood", "candidate", "", "base", 1, 1, "d", None, "waits")


def _with_versions(store: Store, *names: str) -> None:
    store.ensure_tasks(["mood"])
    for name in names:
        store.add_version(replace(VERSION, name=name))


WRITES: dict[str, Callable[[Store], object]] = {
    "start_run": lambda s: s.start_run("mood", 1, "due"),
    "update_run": lambda s: s.update_run("r1", step="finetune"),
    "add_version": lambda s: s.add_version(replace(VERSION, name="v2")),
    "set_version_status": lambda s: s.set_version_status("mood", "v1", "rejected", "no"),
    "promote": lambda s: s.promote("mood", "v1", lambda _, state: state.change(phase=2), "good"),
    "update_state": lambda s: s.update_state("mood", lambda state: state.change(phase=2)),
    "add_event": lambda s: s.add_event(EventRecord("e", "mood", "training_failed", "critical", {}, 0.0)),
}


@pytest.mark.parametrize("name", WRITES)
def test_who_lost_a_lease_writes_nothing(store: Store, name: str) -> None:
    """Taken over, also within its time: each write of the first is refused whole, and the second's go through."""
    _with_versions(store, "v1")
    if name != "start_run":
        store.start_run("mood", 1, "due", run_id="r1")
    first = store.acquire_lease("coach:mood", "first", 60.0)
    assert first is not None
    fenced = store.fenced(first)
    fenced.ensure_tasks(["other"])  # held, it writes
    second = store.take_lease("coach:mood", "second", 60.0)
    before = (store.runs("mood"), store.versions("mood"), store.policy_row("mood"), store.events("mood"))
    with pytest.raises(LeaseLost, match="another worker"):
        WRITES[name](fenced)
    assert before == (store.runs("mood"), store.versions("mood"), store.policy_row("mood"), store.events("mood"))
    WRITES[name](store.fenced(second))


def test_a_lease_that_ran_out_is_held_until_somebody_takes_it(store: Store, clock: Clock) -> None:
    """A slow worker that nobody has replaced may finish what it does."""
    _with_versions(store, "v1")
    lease = store.acquire_lease("coach:mood", "first", 60.0)
    assert lease is not None
    assert store.lease("coach:mood") == lease
    clock.now += 61
    assert store.lease("coach:mood") is None
    store.fenced(lease).set_version_status("mood", "v1", "rejected", "no")
    assert store.acquire_lease("coach:mood", "second", 60.0) is not None
    with pytest.raises(LeaseLost):
        store.fenced(lease).set_version_status("mood", "v1", "candidate", "yes")


class _Failing(Store):
    """A store whose lease renewals fail ``failures`` times."""

    failures = 0

    def renew_lease(self, lease, ttl_s=60.0):  # type: ignore[no-untyped-def]
        if self.failures > 0:
            type(self).failures -= 1
            raise StoreError("the database is away")
        return super().renew_lease(lease, ttl_s)


@pytest.mark.parametrize(("failures", "kept"), [(3, True), (10**9, False)])
def test_renewals_are_tried_again(url: str, failures: int, kept: bool) -> None:
    """Some failures in a row cost nothing; when none goes through within the lease's time, another takes the task."""
    with _Failing.open(url) as store:
        _with_versions(store, "v1")
        _Failing.failures = failures
        lease = store.acquire_lease("coach:mood", "first", 1.0)
        assert lease is not None
        held = HeldLease(store, lease, 1.0)
        deadline = time.monotonic() + 20
        second = None
        while time.monotonic() < deadline and second is None and not (kept and _Failing.failures <= 0):
            time.sleep(0.05)
            second = store.acquire_lease("coach:mood", "second", 1.0)
        assert (second is None) is kept
        if kept:
            held.check()
        else:
            while held._lost is None and time.monotonic() < deadline:
                time.sleep(0.05)
            with pytest.raises(LeaseLost, match="could not be renewed"):
                held.check()
            with pytest.raises(LeaseLost):
                store.fenced(lease).set_version_status("mood", "v1", "champion", "mine")
        held.release()
        assert (store.lease("coach:mood") is None) is kept  # the second's stays


def test_a_takeover_waits_for_a_write_that_is_under_way(url: str) -> None:
    """The fence is looked at and the write done in one transaction: a takeover comes before it or after it."""
    with Store.open(url) as store:
        _with_versions(store, "v1")
        lease = store.acquire_lease("coach:mood", "first", 60.0)
        assert lease is not None
        order: list[str] = []
        inside = threading.Event()

        def take() -> None:
            inside.wait(10)
            store.take_lease("coach:mood", "second", 60.0)
            order.append("taken")

        def change(state):  # type: ignore[no-untyped-def]
            inside.set()
            time.sleep(0.3)
            order.append("written")
            return state.change(phase=2)

        thread = threading.Thread(target=take)
        thread.start()
        store.fenced(lease).update_state("mood", change)
        thread.join()
        assert order == ["written", "taken"]


def test_a_run_that_is_over_is_not_changed(store: Store) -> None:
    """One that waits for review may still end; the others stay as they ended."""
    _with_versions(store)
    run = store.start_run("mood", 1, "due")
    store.update_run(run.id, state="waits_for_review")
    assert store.update_run(run.id, state="completed").finished_at is not None
    with pytest.raises(TrainingError, match="is over"):
        store.update_run(run.id, step="promote")


def test_a_persons_choice_is_not_overruled(store: Store) -> None:
    """The gate, and a second person, are refused what would undo a choice they have not seen."""
    _with_versions(store, "v1", "v2", "v3")
    store.promote("mood", "v1", lambda _, s: s.change(phase=2), "good")
    store.promote("mood", "v2", lambda _, s: s.change(), "better")
    run = store.start_run("mood", 1, "due")
    store.promote("mood", "v1", lambda _, s: s.change(), "v2 is too cheerful", how="rollback", by="ann", since=2)
    assert {v.name: v.status for v in store.versions("mood")} == {
        "v1": "champion",
        "v2": "rolled_back",
        "v3": "candidate",
    }
    with pytest.raises(ChosenMeanwhile, match="ann has made v1 champion"):
        store.promote("mood", "v3", lambda _, s: s.change(), "best", since=run.promotions_seen)
    with pytest.raises(ChosenMeanwhile):
        store.promote("mood", "v3", lambda _, s: s.change(), "mine", how="person", by="bob", since=2)
    assert store.policy_row("mood").champion == "v1"
    last = store.promotions("mood")[-1]
    assert (last.version, last.previous, last.was, last.by) == ("v1", "v2", "retired", "ann")
    assert [e.evidence["version"] for e in store.events("mood") if e.kind == "promoted"] == ["v1", "v2", "v1"]
    assert champions_before(store.promotions("mood")) == []
