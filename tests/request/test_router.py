"""The path of a request, phase by phase and failure by failure (docs/architecture.md, "A request")."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apprentice import BudgetExceeded, InputError, OutputError, RemoteRefused, Unavailable, UnknownTask
from apprentice.confidence.phases import Phase
from apprentice.errors import StoreError
from apprentice.remote import Teacher
from apprentice.request import router as router_module
from apprentice.store import Store
from apprentice.testing import FakeVendor, Fault
from tests.conftest import Workbench, truth

Bench = Callable[..., Workbench]


def wrong(value: Any) -> dict[str, Any]:
    return {"label": "anger"}


def test_in_phase_1_the_remote_answers_and_every_answer_is_an_example(bench: Bench) -> None:
    """No local model: the remote's answer is returned, paid for and kept."""
    at = bench()
    assert at.run("a joy") == {"label": "joy"}
    assert at.run("a fear") == {"label": "fear"}
    examples = list(at.store.examples("mood"))
    assert [e.output for e in examples] == [{"label": "joy"}, {"label": "fear"}]
    assert all(row.cost > 0 for row in at.store.spend())
    assert at.counted() == {"remote": 2}


def test_bad_input_costs_nothing_and_names_the_field(bench: Bench) -> None:
    """Nothing is sent, recorded or spent."""
    at = bench()
    with pytest.raises(InputError, match="text"):
        at.client.run("mood", {"text": 3})
    with pytest.raises(UnknownTask, match=r"^there is no task"):
        at.client.run("moood", {"text": "x"})
    assert at.vendor.asked == 0
    assert at.store.count_examples("mood") == 0


def test_in_phase_2_both_answer_and_the_remotes_answer_is_returned(bench: Bench) -> None:
    """A wrong local model costs the caller nothing, and the comparison remembers it."""
    at = bench()
    at.promote()
    at.local = wrong
    assert at.run("a joy") == {"label": "joy"}
    (comparison,) = at.store.comparisons("mood")
    assert (comparison.score, comparison.local, comparison.probability) == (0.0, {"label": "anger"}, 1.0)
    assert at.counted() == {"shadow": 1}


def test_in_phase_3_confident_requests_stay_local(bench: Bench) -> None:
    """Once all is certified everything is answered here, but for spot checks, however unsure the local model is."""
    at = bench()
    at.promote(held_out=400)
    assert at.store.policy_row("mood").phase == Phase.SERVE
    for _ in range(100):
        at.run()  # every one checked at first; the rate glides down
    assert at.vendor.asked < 100
    counts = at.counted()
    assert counts["local"] > 0
    assert counts["local"] + counts["spot_check"] == sum(counts.values()) == 100


def test_what_is_below_the_threshold_is_deferred_to_the_remote(bench: Bench) -> None:
    """Where only confident answers agreed, only those are returned; the rest costs a call, and is never served."""
    at = bench()
    at.promote(held_out=600, unsure=300)
    policy = at.store.policy_row("mood")
    assert policy.phase == Phase.SERVE
    assert 0.3 < policy.threshold <= 0.9
    at.confidence, at.local = 0.3, wrong
    asked = at.vendor.asked
    for _ in range(20):
        assert at.run("a fear") == {"label": "fear"}
    assert at.vendor.asked == asked + 20
    counts = at.counted()
    assert counts.get("deferred", 0) + counts["spot_check"] == 20
    at.confidence, at.local = 0.9, truth
    for _ in range(300):  # until the rate has come down, so that not every request is a spot check
        at.run("a joy")
    at.confidence, at.local = 0.3, wrong
    before = at.counted()
    asked = at.vendor.asked
    for _ in range(40):
        assert at.run("a fear") == {"label": "fear"}
    assert at.vendor.asked == asked + 40
    after = at.counted()
    assert after["deferred"] > before.get("deferred", 0)
    assert after["local"] == before["local"] > 0
    deferred = [c for c in at.store.comparisons("mood", limit=40) if not c.seeded and c.confidence == 0.3]
    assert deferred
    assert all((c.probability, c.served) == (1.0, False) for c in deferred)


def test_spot_checks_carry_the_probability_with_which_they_were_bought(bench: Bench) -> None:
    """Estimates can only be unbiased if each comparison knows its own chance."""
    at = bench()
    at.promote(held_out=400)
    for _ in range(60):
        at.run()
    checks = [c for c in at.store.comparisons("mood", limit=100) if not c.seeded]
    assert checks
    assert all(c.probability == pytest.approx(c.sampling_rate) for c in checks if c.served)
    assert any(c.probability < 1.0 for c in checks)


def test_a_remote_that_is_down_is_stood_in_for_by_the_local_model(bench: Bench) -> None:
    """The local answer comes back, marked degraded in the record, and an operator hears of it."""
    at = bench(faults=[Fault("server_error")] * 20)
    at.promote()
    assert at.run("a joy") == {"label": "joy"}
    assert at.counted() == {"degraded": 1}
    assert "remote_unavailable" in at.told()
    assert at.store.count_examples("mood") == 0


def test_a_local_model_that_is_down_is_not_noticed_by_the_caller(bench: Bench) -> None:
    """The remote answers instead."""
    at = bench()
    at.promote(held_out=400)
    at.engine.down = True
    for _ in range(10):
        assert at.run("a joy") == {"label": "joy"}
    assert "local_unavailable" in at.told()


def test_with_neither_the_error_names_both_causes(bench: Bench) -> None:
    """Nobody can answer: the caller learns why, of each."""
    at = bench(faults=[Fault("server_error")] * 20)
    at.promote()
    at.engine.down = True
    with pytest.raises(Unavailable) as caught:
        at.run()
    assert "500" in str(caught.value.remote)
    assert caught.value.local is not None


def test_a_refused_request_is_told_as_it_is_without_the_key(bench: Bench) -> None:
    """A wrong key is the user's to mend: provider, status and message, and never the key."""
    at = bench(faults=[Fault("unauthorized")])
    with pytest.raises(RemoteRefused) as caught:
        at.run()
    assert caught.value.status == 401
    assert at.vendor.key not in str(caught.value)
    assert at.vendor.asked == 1


def test_an_answer_outside_the_schema_is_repaired_once_and_never_kept(bench: Bench) -> None:
    """One repair; a second failure is an error, and no example."""
    at = bench(faults=[Fault("schema_violation"), None, Fault("schema_violation"), Fault("schema_violation")])
    assert at.run("a joy") == {"label": "joy"}
    with pytest.raises(OutputError, match="label"):
        at.run()
    assert at.store.count_examples("mood") == 1


def test_a_client_that_has_nothing_under_way_holds_no_money(bench: Bench) -> None:
    """What is committed is what was spent, after every request; nothing is held for requests that have yet to come."""
    at = bench(budget={"daily": 10})
    for text in ("a joy", "a fear, at greater length"):
        at.run(text)
        (cap,) = at.client.parts.budget.remaining()
        assert cap.reserved == 0
        assert cap.spent == sum(row.cost for row in at.store.spend())


def test_an_exhausted_budget_stops_the_remote_but_not_the_local_model(bench: Bench) -> None:
    """Without a local model the caller learns which cap and until when; with one, it answers alone."""
    at = bench(budget={"daily": "0.000001"})
    with pytest.raises(BudgetExceeded, match="daily") as caught:
        at.run()
    assert caught.value.resets_at.tzinfo is not None
    at.promote()
    assert at.run("a joy") == {"label": "joy"}
    assert at.vendor.asked == 0
    assert at.counted()["budget"] == 1
    assert "budget_exhausted" in {event.kind for event in at.store.events()}


def test_a_promotion_is_followed_without_a_restart(bench: Bench) -> None:
    """The router moves to the new champion, and what it compares afterwards is the new one's."""
    at = bench()
    at.promote("mood-v1")
    at.run()
    at.promote("mood-v2")
    at.run()
    assert [c.version for c in at.store.comparisons("mood")] == ["mood-v2", "mood-v1"]
    assert at.engine.loads == ["mood-v1", "mood-v2"]


def test_an_evaluator_that_fails_costs_the_caller_nothing(bench: Bench) -> None:
    """The answer is returned, the comparison is kept unscored, and the evaluator is named."""
    task = {
        "name": "mood",
        "description": "Name the mood.",
        "input_schema": {"text": "str"},
        "output_schema": {"label": "joy | fear | anger"},
        "evaluator": "custom",
        "evaluator_function": "tests.request.test_router:broken_evaluator",
    }
    at = bench(tasks=[task])
    at.promote()
    assert at.run("a joy") == {"label": "joy"}
    (comparison,) = at.store.comparisons("mood")
    assert comparison.score is None
    (event,) = [e for e in at.store.events("mood") if e.kind == "comparison_failed"]
    assert "broken_evaluator" in str(event.evidence)


def broken_evaluator(local: dict[str, Any], remote: dict[str, Any]) -> float:
    raise ValueError("never works")


@pytest.mark.parametrize("name", [["mood"], {}, None, 3, "", "mood\ud800", "m" * 100_000])
def test_what_is_no_tasks_name_is_an_unknown_task(bench: Bench, name: Any) -> None:
    """Of whatever type and length; the error quotes no more than it takes to recognise it."""
    with pytest.raises(UnknownTask) as caught:
        bench().client.run(name, {"text": "a fear"})
    assert len(str(caught.value)) < 400


def test_an_engine_that_exits_beside_the_remote_counts_as_failed(bench: Bench) -> None:
    """In a thread of its own, SystemExit and the like end nothing but that thread."""

    def leaving(value: object) -> dict[str, Any]:
        raise SystemExit(1)

    at = bench()
    at.promote()
    at.local = leaving
    assert at.run("a fear") == {"label": "fear"}
    assert at.counted()["local_failed"] == 1


def test_status_shows_where_a_task_stands(bench: Bench) -> None:
    """Phase, examples, comparisons and money in one place."""
    at = bench()
    at.run()
    at.promote(held_out=400)
    at.run()
    status = at.client.status()["mood"]
    assert (status.phase, status.champion, status.examples) == (3, "mood-v1", 2)
    assert status.comparisons == 401
    assert status.correlation == pytest.approx(1.0)
    assert status.spent > 0


def test_the_second_watch_sees_unknown_words_and_answers_outside_the_schema(bench: Bench) -> None:
    """Traffic of another kind, or a local model that breaks, forces spot checks without any remote answer to tell."""
    at = bench()
    for i in range(120):
        at.run(f"a joy of kind {i}")
    at.promote(held_out=400)
    for i in range(300):
        at.run(f"a joy of kind {i}")
    before = at.vendor.asked
    for _ in range(200):
        at.run("ein Kummer ohne Namen")
    at.client.parts.judge.flush("mood")
    signs = [event.evidence["signs"] for event in at.store.events("mood") if event.kind == "unusual"]
    assert any("novelty" in found for found in signs)
    assert at.vendor.asked - before >= 50


def test_answers_outside_the_schema_are_watched(bench: Bench) -> None:
    """A local model whose answers begin to break the schema is unusual, also where nobody compares."""
    at = bench()
    at.promote(held_out=400)
    for _ in range(300):
        at.run("a joy")
    at.local = lambda value: {"label": 3}
    for _ in range(120):
        at.run("a joy")
    at.client.parts.judge.flush("mood")
    signs = [event.evidence["signs"] for event in at.store.events("mood") if event.kind == "unusual"]
    assert any("invalid" in found for found in signs)


# ---------------------------------------------------------------- whatever goes wrong on either side


@pytest.mark.parametrize("error", [TypeError("a list"), RecursionError("deep"), MemoryError(), StoreError("gone")])
@pytest.mark.parametrize("held_out", [0, 400], ids=["phase 2", "phase 3"])
def test_a_local_answer_at_hand_is_returned_whatever_the_remote_side_raises(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception, held_out: int
) -> None:
    """A harmless spot check must not cost the caller the answer that was already there."""
    at = bench()
    at.promote(held_out=held_out)

    def broken(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(Teacher, "ask", broken)
    for _ in range(10):
        assert at.run("a joy") == {"label": "joy"}
    assert at.counted()["degraded"] > 0
    assert {"remote_failed", "store_unavailable"} & at.told()


def test_an_unforeseen_failure_without_a_local_model_is_told_as_unavailable(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run` raises what it documents, with the cause in it."""
    at = bench()

    def broken(*_: Any) -> Any:
        raise TypeError("a list where a text was expected")

    monkeypatch.setattr(Teacher, "ask", broken)
    with pytest.raises(Unavailable, match="TypeError: a list where") as caught:
        at.run()
    assert isinstance(caught.value.remote, TypeError)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault("unauthorized"), "remote_refused"),
        (Fault("schema_violation"), "remote_answer_unusable"),
        (Fault("server_error"), "remote_unavailable"),
    ],
)
def test_an_alert_says_what_ails_the_remote(bench: Bench, fault: Fault, kind: str) -> None:
    """A vendor that refuses, or answers nonsense, is not down."""
    at = bench(faults=[fault] * 20)
    at.promote()
    at.run()
    assert {k for k in at.told() if k.startswith("remote_")} == {kind}


def test_an_engine_that_ignores_its_deadline_does_not_hold_the_remotes_answer_back(bench: Bench) -> None:
    """The caller gets what is there, and the engine is told of."""
    at = bench(local={"deadline_s": 0.2})
    at.promote()
    release = threading.Event()

    def hang(value: Any) -> dict[str, Any]:
        release.wait(30)
        return truth(value)

    at.local = hang
    began = time.monotonic()
    assert at.run("a fear") == {"label": "fear"}
    assert time.monotonic() - began < 15
    release.set()
    assert "local_unavailable" in at.told()


@pytest.mark.parametrize("part", ["rate", "watch", "flush", "compare"])
def test_judging_that_fails_costs_the_caller_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Evaluators are other people's code, and may raise anything."""
    at = bench()
    at.promote()

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError(part)

    monkeypatch.setattr(at.client.parts.judge, part, broken)
    if part == "flush":
        monkeypatch.setattr(at.client.parts.judge, "watch", lambda *_, **__: True)
    assert at.run("a fear") == {"label": "fear"}
    assert at.store.count_examples("mood") == 1
    told = {"rate": "local_unavailable", "compare": "comparison_failed"}.get(part, "watch_failed")
    assert told in at.told()
    monkeypatch.undo()


# ---------------------------------------------------------------- a store that is away


class Away:
    """A store that every method of fails while ``there`` is False, as when its server is being restarted."""

    METHODS = (
        *("policies", "policy_row", "update_state", "complete_remote", "add_counts", "reserve", "open_windows"),
        *("window_states", "end_calls", "add_event", "add_event_unless_recent", "newest_inputs"),
    )

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.there = True
        self.asked = 0
        for name in self.METHODS:
            monkeypatch.setattr(Store, name, self._guarded(getattr(Store, name)))

    def _guarded(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            if not self.there:
                self.asked += 1
                raise StoreError("the server closed the connection")
            return real(*given, **named)

        return call


class Clock:
    """Unix seconds that stand still until they are moved."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def test_while_the_store_is_away_a_loaded_champion_goes_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under its last policy, for ten minutes; it says so once, the counts are kept, and then all is as before."""
    clock = Clock()
    at = bench(clock=clock)
    at.promote(held_out=400)
    at.run("a joy")
    store, asked = Away(monkeypatch), at.vendor.asked
    store.there = False
    for _ in range(50):
        clock.now += 1
        assert at.run("a joy") == {"label": "joy"}
    assert at.vendor.asked == asked, "nothing can be paid for without the store that keeps the caps"
    health = at.client.health()
    assert health.store_away_s is not None
    assert 45 < health.store_away_s < 60
    assert health.tasks["mood"].serving == "mood-v1"
    store.there = True
    clock.now += 2
    assert at.run("a joy") == {"label": "joy"}
    assert at.client.health().store_away_s is None
    assert at.counted()["degraded"] == 50
    assert at.client.parts.alerts.flush(60)
    kinds = [event.kind for event in at.store.events()]
    assert kinds.count("store_unavailable") == 1
    assert "store_recovered" in kinds


def test_a_store_that_stays_away_ends_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies of yesterday are no policies: after the time of grace callers learn what is the matter."""
    clock = Clock()
    at = bench(clock=clock)
    at.promote(held_out=400)
    at.run("a joy")
    store = Away(monkeypatch)
    store.there = False
    clock.now += router_module.STORE_GRACE_S - 1
    assert at.run("a joy") == {"label": "joy"}
    clock.now += 2
    with pytest.raises(Unavailable, match="server closed the connection") as caught:
        at.run("a joy")
    assert isinstance(caught.value.remote, StoreError)
    store.there = True
    clock.now += 2
    assert at.run("a joy") == {"label": "joy"}


def test_without_a_champion_a_store_that_is_away_is_what_the_caller_hears_of(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In phase 1 nobody can answer; no vendor is blamed."""
    at = bench()
    store = Away(monkeypatch)
    store.there = False
    with pytest.raises(Unavailable, match="the store: the server closed"):
        at.run()
    store.there = True
    assert not any(kind.startswith("remote_") for kind in at.told())


def test_many_requests_at_once_do_not_each_try_a_store_that_is_away(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One a second does."""
    clock = Clock()
    at = bench(clock=clock)
    at.promote(held_out=400)
    at.run()
    store = Away(monkeypatch)
    store.there = False
    clock.now += 2
    at.run()
    tried = store.asked
    policies = []
    real = Store.policies
    monkeypatch.setattr(Store, "policies", lambda self: policies.append(1) or real(self))
    for _ in range(30):
        at.run()
    assert policies == []
    assert tried >= 1
    store.there = True


def test_a_paid_answer_is_returned_though_it_cannot_be_recorded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried for a while, then the caller has it, and it is recorded when the store takes it again."""
    monkeypatch.setattr(router_module, "RECORD_S", 0.3)
    at = bench(budget={"daily": 10})
    real, tries = Store.complete_remote, []

    def broken(self: Store, **given: Any) -> Any:
        tries.append(1)
        raise StoreError("the disk is full")

    monkeypatch.setattr(Store, "complete_remote", broken)
    answer = at.run("a fear")
    assert answer == {"label": "fear"}
    answer["label"] = "changed by its owner"
    assert len(tries) > 1
    assert at.store.count_examples("mood") == 0
    assert "record_delayed" in at.told()
    assert not any(kind.startswith("remote_") for kind in at.told())
    monkeypatch.setattr(Store, "complete_remote", real)
    ends = time.monotonic() + 30
    while len(at.client.parts.backlog) and time.monotonic() < ends:
        time.sleep(0.05)
    (example,) = at.store.examples("mood")
    assert example.output == {"label": "fear"}
    assert at.counted() == {"remote": 1}
    at.client.close()
    with Store.open(at.client.settings.store_url) as store:
        (row,) = store.spend()
        assert (row.state, row.calls) == ("settled", 1)


def test_a_commit_that_fails_is_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment's failure is nothing to tell of: it is one example and one price."""
    at = bench()
    real, tries = Store.complete_remote, []

    def flaky(self: Store, **given: Any) -> Any:
        tries.append(1)
        if len(tries) < 3:
            raise StoreError("the server closed the connection")
        return real(self, **given)

    monkeypatch.setattr(Store, "complete_remote", flaky)
    assert at.run("a fear") == {"label": "fear"}
    assert len(tries) == 3
    assert at.store.count_examples("mood") == 1
    assert [(row.state, row.calls) for row in at.store.spend()] == [("settled", 1)]
    assert at.told() == set()


def test_what_cannot_be_recorded_before_the_end_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the requests and what they cost."""
    monkeypatch.setattr(router_module, "RECORD_S", 0.1)
    at = bench()
    real = Store.complete_remote

    def broken(self: Store, **given: Any) -> Any:
        raise StoreError("the disk is full")

    monkeypatch.setattr(Store, "complete_remote", broken)
    at.run()
    at.run()
    at.client.close()
    monkeypatch.setattr(Store, "complete_remote", real)
    with Store.open(at.client.settings.store_url) as store:
        (event,) = [e for e in store.events() if e.kind == "record_lost"]
    assert event.evidence["answers"] == 2
    assert all(float(one["cost"]) > 0 for one in event.evidence["newest"])


def test_a_requests_deadline_bounds_its_waiting_for_the_store(bench: Bench, tmp_path: Path) -> None:
    """Another process holds the write lock for far longer: the request ends, near its deadline."""
    at = bench(remote=at_deadline(1.0))
    at.run()
    with sqlite3.connect(tmp_path / "apprentice.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        with contextlib.suppress(Unavailable):
            at.run()
        assert time.monotonic() - began < 15  # 60 s is how long SQLite would wait
        other.execute("ROLLBACK")
    other.close()
    assert at.run("a fear") == {"label": "fear"}


def at_deadline(seconds: float) -> dict[str, Any]:
    return {**FakeVendor("anthropic").settings(max_retries=1), "deadline_s": seconds}
