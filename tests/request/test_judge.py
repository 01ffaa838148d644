"""Comparisons and the trust that comes of them: evaluators that are slow, hang or break, and figures that add up."""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import Phase as Stage
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from apprentice import Apprentice, Settings
from apprentice.confidence.correlation import wilson
from apprentice.confidence.phases import Phase
from apprentice.confidence.trust_events import EventKind
from apprentice.errors import EvaluatorError, MissingExtra, StoreError
from apprentice.events import kinds
from apprentice.local.engine import LocalAnswer
from apprentice.request.judge import Judge
from apprentice.request.time_limit import TimeLimit, TookTooLong
from apprentice.store import ComparisonRecord, EventRecord, ExampleRecord, Store, VersionRecord
from apprentice.testing import FakeVendor, Fault
from tests.conftest import LABELS, Workbench, settings, truth

Bench = Callable[..., Workbench]

holding = threading.Event()  # while it is clear, the evaluator below does not come back
inside = threading.Semaphore(0)
asked: list[str] = []


def patient(local: Mapping[str, Any], remote: Mapping[str, Any]) -> float:
    inside.release()
    holding.wait(60)
    return float(local == remote)


def moody(local: Mapping[str, Any], remote: Mapping[str, Any]) -> float:
    if holding.is_set():
        return float(local == remote)
    raise MemoryError("nobody foresaw this")


def evaluated_by(function: Callable[..., float]) -> dict[str, Any]:
    return {
        "name": "mood",
        "description": "Name the mood.",
        "input_schema": {"text": "str"},
        "output_schema": {"label": " | ".join(LABELS)},
        "evaluator": "custom",
        "evaluator_function": f"tests.request.test_judge:{function.__name__}",
        "confidence_thresholds": {"phase1_to_phase2": 10},
    }


@pytest.fixture(autouse=True)
def let_go() -> Iterator[None]:
    """Whatever a test held up goes on at its end."""
    holding.set()
    yield
    holding.set()


def answer(label: str, version: str = "mood-v1", confidence: float = 0.9) -> LocalAnswer:
    return LocalAnswer({"label": label}, confidence, {"label": confidence}, version, 0, 0)


def compare(judge: Judge, configured: Settings, n: int = 0, **more: Any) -> None:
    named: dict[str, Any] = {
        "request_id": f"r{n}",
        "local": answer("joy"),
        "remote": {"label": "joy"},
        "probability": 1.0,
        "sampling_rate": 1.0,
        "served": False,
        "at": 1.0,
    }
    judge.compare(configured.task("mood"), **{**named, **more})


def test_a_slow_evaluator_delays_its_own_request_only(bench: Bench) -> None:
    """While it thinks, the same task and process write, watch, read figures and answer other requests."""
    at = bench(tasks=[evaluated_by(patient)])
    at.promote(held_out=60)
    judge = at.client.parts.judge
    holding.clear()
    while inside.acquire(blocking=False):
        pass
    slow = threading.Thread(target=compare, args=(judge, at.client.settings))
    slow.start()
    assert inside.acquire(timeout=30)  # it is being evaluated now
    at.store.add_example(ExampleRecord("x", "mood", {"text": "a"}, {"label": "joy"}, "p", "m", 1.0))
    for _ in range(70):
        judge.watch("mood", "mood-v1", {"text": "a"}, confidence=0.9, served=True)
    judge.flush("mood")
    judge.training_started("mood")
    assert judge.figures("mood").comparisons == 60
    assert at.client.status()["mood"].comparisons == 60
    assert slow.is_alive()
    holding.set()
    slow.join(60)
    assert judge.figures("mood").comparisons == 61


def test_an_evaluator_that_hangs_is_given_up(bench: Bench) -> None:
    """The comparison is kept unscored; while earlier calls hang no more threads are spent on it."""
    at = bench(tasks=[evaluated_by(patient)])
    at.promote()
    judge = Judge(at.client.settings, at.store, time.time, random.Random(1), evaluator_s=0.05)
    holding.clear()
    before = threading.active_count()
    for n in range(10):
        with pytest.raises(EvaluatorError, match="come back"):
            compare(judge, at.client.settings, n)
    assert threading.active_count() <= before + 4
    assert [c.score for c in at.store.comparisons("mood")] == [None] * 10
    assert judge.figures("mood").unscored == 10
    holding.set()
    while threading.active_count() > before:
        time.sleep(0.01)
    compare(judge, at.client.settings, 11)
    assert at.store.comparisons("mood")[0].score == 1.0


def test_whatever_an_evaluator_raises_costs_the_caller_nothing(bench: Bench) -> None:
    """Not only errors that were foreseen: the answer is returned, the comparison is kept unscored and alerted."""
    at = bench(tasks=[evaluated_by(moody)])
    at.promote()
    for _ in range(5):
        at.run("a joy")
    holding.clear()
    assert at.run("a joy") == {"label": "joy"}
    assert [c.score for c in at.store.comparisons("mood")] == [None, *[1.0] * 5]
    assert {"unscored", "comparison_failed"} <= at.told()
    (event,) = [e for e in at.store.events("mood") if e.kind == "comparison_failed"]
    assert "MemoryError" in str(event.evidence)


def test_comparisons_of_many_threads_and_processes_are_all_counted_once(bench: Bench) -> None:
    """Also those that complete the warm-up at the same time: they are weighed again, on what is there by then."""
    at = bench(tasks=[evaluated_by(moody)])
    at.promote()
    judges = [Judge(at.client.settings, at.store, time.time, random.Random(n)) for n in range(3)]

    def work(n: int) -> None:
        for i in range(12):
            said = LABELS[i % 3]
            compare(judges[n % 3], at.client.settings, 100 * n + i, local=answer(said), remote={"label": said})

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    figures = judges[0].figures("mood")
    assert len(at.store.comparisons("mood")) == figures.comparisons == 72
    assert figures.unscored == 0
    assert figures.since_all.agreement is not None
    assert figures.since_all.agreement.n == pytest.approx(72)


def test_an_evaluator_that_is_away_is_told_once_in_a_while(bench: Bench) -> None:
    """One event and not one a request, with the count of all; the next when it still fails later."""
    at = bench(tasks=[evaluated_by(moody)])
    at.promote()
    now = [time.time()]
    judge = Judge(at.client.settings, at.store, lambda: now[0], random.Random(1))
    holding.clear()
    for n in range(41):
        if n == 40:
            now[0] += 3600.0
        with pytest.raises(EvaluatorError):
            compare(judge, at.client.settings, n)
    told = [event.evidence["unscored"] for event in at.store.events("mood") if event.kind == "unscored"]
    assert told == [1, 41]


def test_who_only_reads_needs_no_evaluator(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Status works without an evaluator's library; a client that would lose every comparison does not start."""
    at = bench()
    at.promote(held_out=60)
    configured = at.client.settings
    (task,) = configured.tasks
    tasks = [task.model_copy(update={"evaluator": "semantic_similarity"})]
    elsewhere = configured.model_copy(update={"tasks": tasks})
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    judge = Judge(elsewhere, at.store, time.time, random.Random(1))
    assert judge.figures("mood").comparisons == 60
    with pytest.raises(MissingExtra, match="semantic"):
        judge.prepare()
    with pytest.raises(MissingExtra, match="semantic"):
        Apprentice.from_config(elsewhere, environ=at.vendor.environ)


def test_the_store_has_its_time_when_the_evaluator_has_had_its_own(bench: Bench) -> None:
    """A request whose deadline went by while its evaluator was thinking is recorded all the same."""
    at = bench(tasks=[evaluated_by(patient)])
    at.promote()
    left = iter([30.0, 20.0])
    holding.clear()
    asked_for: list[float] = []

    def store_s() -> float:
        assert holding.is_set()  # the evaluator has come back
        asked_for.append(next(left))
        return asked_for[-1]

    threading.Timer(0.2, holding.set).start()
    compare(at.client.parts.judge, at.client.settings, store_s=store_s)
    assert asked_for
    assert len(at.store.comparisons("mood")) == 1


def test_watching_waits_for_no_transaction(bench: Bench) -> None:
    """However long the task's lock is held, noting an answer does not wait for it."""
    at = bench()
    at.promote()
    judge = at.client.parts.judge
    with judge._locks["mood"]:
        assert not judge.watch("mood", "mood-v1", {"text": "a"}, confidence=0.9, served=True)


def test_observations_outlive_a_store_that_cannot_be_written(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are handed over the next time, in their order, each once."""
    at = bench()
    at.promote(held_out=400)
    judge = at.client.parts.judge
    for confidence in (0.1, 0.2):
        judge.watch("mood", "mood-v1", {"text": "a"}, confidence=confidence, served=True)
    with monkeypatch.context() as patch:

        def away(*_: Any, **__: Any) -> None:
            raise StoreError("away")

        patch.setattr(at.client.parts.store, "update_state", away)
        with pytest.raises(StoreError):
            judge.flush("mood")
    judge.watch("mood", "mood-v1", {"text": "a"}, confidence=0.3, served=True)
    judge.flush("mood")
    judge.flush("mood")
    trust = json.loads(at.store.policy_row("mood").trust)
    assert [row[1] for row in trust["watch"]["first"]] == [0.1, 0.2, 0.3]
    assert trust["served_count"] == 3


def test_a_time_limit_tells_its_own_lateness_from_the_calls() -> None:
    """What the call raises is raised, a TimeoutError too; what it returns is returned."""
    limit = TimeLimit("it", 30.0)
    assert limit.run(lambda: 3) == 3

    def late() -> None:
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        limit.run(late)
    with pytest.raises(TookTooLong, match="within 0 s"):
        TimeLimit("it", 0.0).run(lambda: time.sleep(0.2))


def test_every_kind_of_trusts_events_is_in_the_list() -> None:
    """Trust names its events itself, being pure; what they mean and how grave they are stands in one list."""
    assert {kind.value for kind in EventKind} <= {kind.value for kind in kinds.EventKind}


def curve_that_counts(correlation: float, trigger: float, floor: float) -> float:
    asked.append(threading.current_thread().name)
    return 1.0 - correlation + floor


def test_a_decay_function_of_the_users_own_is_asked_before_anything_is_answered(bench: Bench) -> None:
    """It never runs in a transaction: it is tabulated when the client starts, and not called again."""
    at = bench(sampling={"decay_function": "tests.request.test_judge:curve_that_counts"})
    calls = len(asked)
    assert calls > 100
    at.promote(held_out=200)
    for _ in range(60):
        at.run()
    assert at.store.policy_row("mood").sampling_rate < 0.9
    assert len(asked) == calls


# --- figures, worked out a second time from the raw table ---


def recomputed(rows: list[ComparisonRecord], threshold: float | None, window: int) -> dict[str, Any]:
    """What status says, from the comparisons alone: without `Trust`, its tallies or its window."""
    scored = [c for c in rows if c.score is not None]
    weights = [1.0 if c.probability == 0.0 else min(1.0, c.sampling_rate / c.probability) for c in scored]
    recent = list(zip(scored, weights, strict=True))[-window:]
    above = [c for c in scored if threshold is not None and c.confidence >= threshold][-window:]

    def mean(pairs: list[tuple[ComparisonRecord, float]]) -> float | None:
        total = sum(weight for _, weight in pairs)
        return sum(weight * (c.score or 0.0) for c, weight in pairs) / total if total else None

    return {
        "comparisons": len(rows),
        "unscored": len(rows) - len(scored),
        "all": mean(recent),
        "since": mean(list(zip(scored, weights, strict=True))),
        "above": [c.score or 0.0 for c in above],
    }


STREAM = st.lists(
    st.tuples(st.sampled_from(LABELS), st.booleans(), st.floats(0.0, 1.0), st.sampled_from([None, 0.1, 0.5, 1.0])),
    min_size=1,
    max_size=150,
)


@hypothesis_settings(max_examples=25, deadline=None, phases=[Stage.generate], suppress_health_check=list(HealthCheck))
@given(stream=STREAM, held_out=st.sampled_from([0, 60, 120]))
def test_figures_are_those_of_the_comparisons_table(
    tmp_path_factory: pytest.TempPathFactory, stream: list[Any], held_out: int
) -> None:
    """Counts, agreement of everything and of the served slice, for any comparisons, unscored ones among them."""
    folder: Path = tmp_path_factory.mktemp("figures")
    configured = settings(folder, FakeVendor("anthropic", truth), tasks=[evaluated_by(moody)])
    with Store.open(configured.store_url) as store:
        store.ensure_tasks(["mood"])
        judge = Judge(configured, store, time.time, random.Random(1))
        store.add_version(VersionRecord("mood-v1", "mood", "candidate", "", "fake", 1, held_out, "d", None, ""))
        judge.promote("mood", "mood-v1", Workbench.seed("mood-v1", held_out, 0.97), reason="test")
        for n, (label, right, confidence, probability) in enumerate(stream):
            if probability is None:
                holding.clear()
            state = store.policy_row("mood")
            served = state.phase == Phase.SERVE and state.threshold is not None and confidence >= state.threshold
            said = label if right else LABELS[(LABELS.index(label) + 1) % 3]
            try:
                compare(
                    judge,
                    configured,
                    n,
                    local=answer(said, confidence=confidence),
                    remote={"label": label},
                    probability=(probability or 1.0) if served else 1.0,
                    sampling_rate=probability or 1.0,
                    served=served,
                )
            except EvaluatorError:
                assert probability is None
            holding.set()
        rows = store.comparisons("mood", limit=10_000)[::-1]
        state, figures = store.policy_row("mood"), judge.figures("mood")
        expected = recomputed(rows, state.threshold, configured.sampling.window_size)
        events = store.events("mood")
    assert (figures.comparisons, figures.unscored) == (expected["comparisons"], expected["unscored"])
    if len(rows) - expected["unscored"] < 40:  # it is being warmed up: nothing is said yet
        assert figures.window_all.agreement is None
        return
    window = figures.window_all.agreement
    assert window is not None
    assert window.value == pytest.approx(expected["all"], abs=1e-5)
    assert (window.low, window.high) == pytest.approx(wilson(window.value, window.n), abs=1e-9)
    assert figures.since_all.agreement is not None
    assert figures.since_all.agreement.value == pytest.approx(expected["since"], abs=1e-5)
    served = figures.window_served.agreement
    if served is None:
        assert expected["above"] == []
        return
    # After an alarm the window begins anew where the change began; it always ends with the newest comparison.
    count = round(served.n)
    alarms = {event.kind for event in events} & {"shift", "drift"}
    assert count == len(expected["above"]) or (alarms and 0 < count < len(expected["above"]))
    assert served.value == pytest.approx(sum(expected["above"][-count:]) / count, abs=1e-5)


def test_answers_that_nobody_could_have_checked_are_counted_apart(bench: Bench) -> None:
    """While the budget is used up a local model that went bad is not reported as if it were what was certified."""
    at = bench(budget={"daily": "1.00"})
    at.promote(held_out=400)
    for i in range(150):
        at.run("a " + LABELS[i % 3])
    at.client.parts.judge.flush("mood")
    before = at.client.parts.judge.figures("mood")
    assert (before.unverified, before.accepted_agreement) == (0.0, pytest.approx(1.0, abs=0.05))
    at.client.parts.budget.headroom = lambda task: False  # type: ignore[method-assign]  # as if the cap were used up
    for i in range(200):
        at.run("a " + LABELS[i % 3])
    at.client.parts.judge.flush("mood")
    after = at.client.parts.judge.figures("mood")
    assert after.unverified == 200
    assert after.accepted_agreement == before.accepted_agreement


def test_a_spot_check_that_brings_no_answer_speaks_for_nobody(bench: Bench) -> None:
    """The remote fails on drawn checks: the answers that each stood for are left out of the figure and counted."""
    at = bench(faults=[Fault("server_error")] * 40)
    at.promote(held_out=400)
    for _ in range(3):
        at.run("a joy")  # checked for sure, in vain
    at.client.parts.judge.flush("mood")
    figures = at.client.parts.judge.figures("mood")
    assert figures.unverified == 3
    assert figures.accepted_agreement is None


def _lineage(folder: Path, **task: Any) -> tuple[Settings, Store, Judge]:
    """A store with a serving mood-v1, rate well below 1, and mood-v2 waiting."""
    configured = settings(folder, FakeVendor("anthropic", truth), tasks=[{**evaluated_by(moody), **task}])
    store = Store.open(configured.store_url)
    store.ensure_tasks(["mood"])
    judge = Judge(configured, store, time.time, random.Random(1))
    for name in ("mood-v1", "mood-v2"):
        store.add_version(VersionRecord(name, "mood", "candidate", "", "fake", 1, 120, "d", None, ""))
    judge.promote("mood", "mood-v1", Workbench.seed("mood-v1", 120), reason="test")
    for n in range(60):
        state = store.policy_row("mood")
        assert state.phase == Phase.SERVE
        compare(
            judge, configured, n, served=True, probability=state.sampling_rate, sampling_rate=state.sampling_rate,
            local=answer(LABELS[n % 3]), remote={"label": LABELS[n % 3]},
        )  # fmt: skip
    return configured, store, judge


def test_a_refit_serves_on_and_asks_no_evaluator(tmp_path: Path) -> None:
    """Policy row, trust and event are there in one step; each version keeps its own, and a rollback finds its own."""
    _, store, judge = _lineage(tmp_path)
    with store:
        before = store.policy_row("mood")
        assert before.sampling_rate < 0.2
        recorded = len(store.comparisons("mood"))
        holding.clear()  # the evaluator would raise
        seed = Workbench.seed("mood-v2", 120, 0.5)
        after = judge.promote("mood", "mood-v2", seed, carries=0.2, reason="refit")
        assert (after.champion, after.phase, after.threshold) == ("mood-v2", before.phase, before.threshold)
        assert after.sampling_rate == 0.2
        assert judge.figures("mood").since_served == judge.figures("mood", "mood-v1").since_served
        assert store.policy_row("mood", "mood-v1").sampling_rate == before.sampling_rate
        assert len(store.comparisons("mood")) == recorded
        newest = next(event for event in reversed(store.events()) if event.kind == "promoted")
        assert newest.evidence["carried"] == judge.figures("mood").comparisons
        assert newest.evidence["reason"] == "refit"
        back = judge.promote("mood", "mood-v1", [], carries=0.0, reason="rolled back", how="rollback", by="ann")
        assert (back.champion, back.sampling_rate) == ("mood-v1", 1.0)


def test_a_refit_of_a_version_in_trouble_begins_with_its_own_evidence(tmp_path: Path) -> None:
    """Under alarm nothing is carried: what the lineage had earned is what is in doubt."""
    configured, store, judge = _lineage(tmp_path)
    with store:
        for n in range(10):
            rate = store.policy_row("mood").sampling_rate
            compare(judge, configured, 100 + n, served=True, probability=rate, sampling_rate=rate,
                    local=answer("joy"), remote={"label": "fear"})  # fmt: skip
        assert judge.figures("mood").comparisons == 190
        assert judge.figures("mood").alarmed
        after = judge.promote("mood", "mood-v2", Workbench.seed("mood-v2", 120), carries=0.1, reason="refit")
        assert after.sampling_rate == 1.0
        assert judge.figures("mood").comparisons == 120


def test_an_alarm_while_a_refit_is_promoted_stops_the_carrying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was seen before the transaction is looked at again in it."""
    configured, store, judge = _lineage(tmp_path)
    with store:
        promote = store.promote

        def after_an_alarm(*args: Any, **options: Any) -> Any:
            monkeypatch.setattr(store, "promote", promote)
            other = Judge(configured, store, time.time, random.Random(2))
            for n in range(10):
                compare(other, configured, 200 + n, served=True, probability=1.0, sampling_rate=1.0,
                        local=answer("joy"), remote={"label": "fear"})  # fmt: skip
            return promote(*args, **options)

        monkeypatch.setattr(store, "promote", after_an_alarm)
        judge.promote("mood", "mood-v2", Workbench.seed("mood-v2", 120), carries=0.1, reason="refit")
        assert judge.figures("mood").comparisons == 120
        assert store.policy_row("mood").champion == "mood-v2"


@pytest.mark.parametrize("carries", [-1.0, float("nan")])
def test_a_refit_cannot_ask_for_less_than_nothing(tmp_path: Path, carries: float) -> None:
    """And then nothing is promoted."""
    _, store, judge = _lineage(tmp_path)
    with store:
        with pytest.raises(ValueError, match="at least 0"):
            judge.promote("mood", "mood-v2", [], carries=carries, reason="refit")
        assert store.policy_row("mood").champion == "mood-v1"


def test_an_input_that_comes_again_bets_no_second_time(bench: Bench) -> None:
    """White space and case aside; one whose input is not told bets."""
    at = bench(tasks=[evaluated_by(moody)])
    at.promote(held_out=60)
    judge = at.client.parts.judge
    for n, text in enumerate([*(f"text {n}" for n in range(20)), "Text  3"]):
        compare(judge, at.client.settings, n, value={"text": text})
    compare(judge, at.client.settings, 21)
    state = json.loads(at.store.policy_row("mood").trust)
    bets, first_bets = (sum(state[name]["weights"]) for name in ("slices", "firsts"))
    assert (bets, first_bets) == (82.0, 81.0)


def test_what_was_earned_before_a_change_brings_nobody_back(tmp_path: Path) -> None:
    """After an alarm about its successor a version begins with the held-out comparisons, and goes on from these."""
    configured, store, judge = _lineage(tmp_path)
    with store:
        earned = judge.figures("mood", "mood-v1").comparisons
        judge.promote("mood", "mood-v2", Workbench.seed("mood-v2", 120), reason="test")
        alarm = EventRecord("alarm", "mood", "emergency", "warning", {"version": "mood-v2"}, time.time())
        store.update_state("mood", lambda state: state.change(events=[alarm]), version="mood-v2")
        back = judge.promote("mood", "mood-v1", Workbench.seed("mood-v1", 30), reason="rolled back", how="rollback")
        assert back.sampling_rate == 1.0
        assert judge.figures("mood", "mood-v1").comparisons == 30 < earned
        compare(judge, configured, 300, at=time.time())
        judge.promote("mood", "mood-v2", [], reason="forth", how="rollback")
        judge.promote("mood", "mood-v1", Workbench.seed("mood-v1", 30), reason="and back", how="rollback")
        assert judge.figures("mood", "mood-v1").comparisons == 31
