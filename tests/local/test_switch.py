"""Moving between versions: loaded beside, proven, switched, drained; and an engine that fails is left alone."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from apprentice.errors import EngineUnavailable, VersionError
from apprentice.local.engine import Version
from apprentice.local.switch import Switch
from apprentice.schemas.schema import parse_schema
from apprentice.store import Store
from apprentice.store.records import VersionRecord
from apprentice.testing import FakeVendor
from apprentice.testing.engine import FakeEngine
from tests.conftest import settings, truth

SCHEMA = parse_schema({"by": "str"})
WAIT_S = 10.0


class Operator:
    """Collects alerts."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str | None, dict[str, Any]]] = []

    def __call__(self, kind: str, task: str | None, evidence: dict[str, Any]) -> None:
        self.heard.append((kind, task, evidence))

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _, _ in self.heard]


@pytest.fixture
def engine() -> FakeEngine:
    """An engine whose answers name their version."""
    return FakeEngine(lambda version, value: {"by": version.name})


@pytest.fixture
def operator() -> Operator:
    """Whoever hears the alerts."""
    return Operator()


@pytest.fixture
def now() -> list[float]:
    """A clock that stands still until it is set."""
    return [0.0]


@pytest.fixture
def switch(engine: FakeEngine, operator: Operator, now: list[float]) -> Iterator[Switch]:
    """A switch over that engine; versions exist once they are named."""
    switch = Switch(
        engine,
        lambda task, name: Version(name, task, None, SCHEMA),
        clock=lambda: now[0],
        alert=operator,
        recheck_s=0.01,
    )
    yield switch
    switch.close()


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another thread does."""
    ends = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.001)


def serve(switch: Switch, name: str, task: str = "t") -> None:
    switch.follow(task, name)
    assert switch.wait_until_serving(task, name, WAIT_S)


def test_no_version_yet_is_a_state(switch: Switch) -> None:
    """Before the first promotion nothing serves, nothing is wrong, and asking says what is missing."""
    switch.follow("t", None)
    assert switch.serving("t") is None
    assert not switch.healthy("t")
    with pytest.raises(EngineUnavailable, match="no version of task 't' is ready"):
        switch.answer("t", {}, 1.0)


def test_a_new_champion_takes_over_and_the_old_one_is_unloaded(switch: Switch, engine: FakeEngine) -> None:
    """Following is enough: load, switch, unload; and a rollback is the same again."""
    serve(switch, "v1")
    assert switch.answer("t", {}, 1.0).output == {"by": "v1"}
    serve(switch, "v2")
    assert switch.answer("t", {}, 1.0).output == {"by": "v2"}
    until(lambda: engine.unloads == ["v1"])
    serve(switch, "v1")
    assert switch.answer("t", {}, 1.0).output == {"by": "v1"}
    switch.follow("t", None)
    until(lambda: switch.serving("t") is None and not engine.loaded())


def test_no_request_is_lost_or_mixed_while_versions_change(switch: Switch, engine: FakeEngine) -> None:
    """Sixteen callers through ten swaps: every answer is of one version that served at that time, none fails."""
    engine.latency_s = 0.002
    served = {"v0"}
    serve(switch, "v0")
    stop = threading.Event()

    def call() -> list[tuple[str, str]]:
        seen = []
        while not stop.is_set():
            answer = switch.answer("t", {}, 5.0)
            seen.append((answer.version, answer.output["by"]))
        return seen

    with ThreadPoolExecutor(16) as threads:
        callers = [threads.submit(call) for _ in range(16)]
        for i in range(1, 11):
            serve(switch, f"v{i % 4}")
            served.add(f"v{i % 4}")
        stop.set()
        seen = [pair for caller in callers for pair in caller.result()]
    assert len(seen) > 100
    assert all(version == by for version, by in seen)
    assert {version for version, _ in seen} <= served


def test_a_version_that_does_not_load_leaves_the_old_one_serving(
    switch: Switch, engine: FakeEngine, operator: Operator, now: list[float]
) -> None:
    """The alert names both, and the load is tried again after a while, not at every request."""
    serve(switch, "v1")
    engine.refuses["v2"] = VersionError("v2 is truncated")
    switch.follow("t", "v2")
    assert not switch.wait_until_serving("t", "v2", WAIT_S)
    assert switch.answer("t", {}, 1.0).output == {"by": "v1"}
    until(lambda: operator.heard != [])
    assert operator.heard == [
        ("version_refused", "t", {"version": "v2", "still_serving": "v1", "error": "v2 is truncated"})
    ]
    del engine.refuses["v2"]
    switch.follow("t", "v2")
    assert switch.serving("t") == "v1"
    now[0] += 3600
    serve(switch, "v2")


@pytest.mark.parametrize(
    ("probes", "message"),
    [
        ([{"input": {}, "output": {"by": "other"}, "base_output": None}], "gives 0 of 1 validated answers again"),
        ([{"input": {}, "output": {"by": "v2"}, "base_output": {"by": "v2"}}], "its adapter is not at work"),
        ("no list", "cannot be read"),
    ],
)
def test_a_version_that_fails_its_probe_never_serves(
    engine: FakeEngine, operator: Operator, tmp_path: Path, probes: object, message: str
) -> None:
    """Neither one that answers otherwise than was validated, nor one that answers as the base model does."""
    (tmp_path / "probe.json").write_text(json.dumps(probes))
    folders: Mapping[str, Path | None] = {"v1": None, "v2": tmp_path}
    switch = Switch(engine, lambda task, name: Version(name, task, folders[name], SCHEMA), alert=operator)
    serve(switch, "v1")
    switch.follow("t", "v2")
    assert not switch.wait_until_serving("t", "v2", WAIT_S)
    until(lambda: operator.heard != [])
    switch.close()
    assert message in operator.heard[0][2]["error"]
    assert switch.serving("t") == "v1"
    assert engine.unloads == ["v2"]


def test_an_engine_that_fails_is_not_asked_until_it_is_well(
    switch: Switch, engine: FakeEngine, operator: Operator
) -> None:
    """A few failures open the breaker; when the engine is back, it gets its versions again before requests do."""
    serve(switch, "v1")
    engine.down = True
    for _ in range(4):
        with pytest.raises(EngineUnavailable, match="down"):
            switch.answer("t", {}, 1.0)
    assert not switch.healthy("t")
    with pytest.raises(EngineUnavailable, match="until it has been loaded again"):
        switch.answer("t", {}, 1.0)
    engine.forget()
    engine.down = False
    until(lambda: switch.healthy("t"))
    assert switch.answer("t", {}, 1.0).output == {"by": "v1"}
    assert operator.kinds == ["engine_unavailable", "engine_recovered"]


def test_a_champion_that_changes_while_another_loads_is_what_serves(switch: Switch, engine: FakeEngine) -> None:
    """Only the last word counts."""
    gate = threading.Event()
    engine._sleep = lambda _: gate.wait(WAIT_S) and None  # type: ignore[assignment,func-returns-value]
    engine.load_s = 1.0
    switch.follow("t", "v1")
    switch.follow("t", "v2")
    gate.set()
    assert switch.wait_until_serving("t", "v2", WAIT_S)
    until(lambda: [held.name for held in engine.loaded()] == ["v2"])


def test_a_version_that_the_engine_lost_is_loaded_again_at_the_first_request(
    switch: Switch, engine: FakeEngine, operator: Operator
) -> None:
    """A restarted server forgot it; other tasks' answers must not keep that from being noticed, nor be held up."""
    serve(switch, "v1", "t")
    serve(switch, "w1", "u")
    del engine._versions["v1"]
    with pytest.raises(VersionError, match="not loaded"):
        switch.answer("t", {}, 1.0)
    assert switch.answer("u", {}, 1.0).output == {"by": "w1"}
    until(lambda: switch.healthy("t"))
    assert switch.answer("t", {}, 1.0).output == {"by": "v1"}
    assert [(kind, task) for kind, task, _ in operator.heard] == [
        ("engine_unavailable", "t"),
        ("engine_recovered", "t"),
    ]


def test_a_version_that_is_succeeded_while_it_is_loaded_again_does_not_stay(
    switch: Switch, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would ever unload it: recovering and moving are two threads, and the move was done by then."""
    serve(switch, "v1")
    inside, go_on, load = threading.Event(), threading.Event(), engine.load

    def slowly(version: Version) -> None:
        if version.name == "v1":
            inside.set()
            go_on.wait(WAIT_S)
        load(version)

    monkeypatch.setattr(engine, "load", slowly)
    engine.forget()
    with pytest.raises(VersionError):
        switch.answer("t", {}, 1.0)
    assert inside.wait(WAIT_S)
    serve(switch, "v2")
    go_on.set()
    until(lambda: switch.healthy("t"))
    assert [held.name for held in engine.loaded()] == ["v2"]
    assert switch.answer("t", {}, 1.0).output == {"by": "v2"}


def test_failures_of_one_task_count_beside_the_successes_of_another(switch: Switch, engine: FakeEngine) -> None:
    """Servers may be apart: one per version."""
    serve(switch, "v1", "t")
    serve(switch, "w1", "u")

    def answer(version: Version, value: Mapping[str, Any]) -> dict[str, str]:
        if version.task == "t":
            raise EngineUnavailable("its server is down")
        return {"by": version.name}

    engine.answerer = answer
    for _ in range(4):
        with pytest.raises(EngineUnavailable, match="down"):
            switch.answer("t", {}, 1.0)
        assert switch.answer("u", {}, 1.0).output == {"by": "w1"}
    assert not switch.healthy("t")
    assert switch.healthy("u")


def test_an_engine_that_loads_and_hangs_has_not_recovered(switch: Switch, engine: FakeEngine) -> None:
    """Its health and its loading say nothing: it has to answer what it answered before."""
    serve(switch, "v1")
    switch.answer("t", {"good": 1}, 1.0)
    engine.hanging = True
    for _ in range(4):
        with pytest.raises(EngineUnavailable, match="within"):
            switch.answer("t", {"bad": 1}, 0.001)
    until(lambda: len(engine.loads) > 3)
    assert not switch.healthy("t")
    engine.hanging = False
    until(lambda: switch.healthy("t"))


def test_a_request_that_kills_the_engine_is_not_asked_again(switch: Switch, engine: FakeEngine) -> None:
    """Else one such request would keep the local model away for good."""
    serve(switch, "v1")
    asked: list[Mapping[str, Any]] = []

    def answer(version: Version, value: Mapping[str, Any]) -> dict[str, str]:
        asked.append(value)
        if "deadly" in value:
            engine.forget()
            raise VersionError("its server has ended")
        return {"by": version.name}

    engine.answerer = answer
    switch.answer("t", {"good": 1}, 1.0)
    with pytest.raises(VersionError):
        switch.answer("t", {"deadly": 1}, 1.0)
    until(lambda: switch.healthy("t"))
    assert asked == [{"good": 1}, {"deadly": 1}, {"good": 1}]


def test_a_hung_engine_holds_up_so_many_requests_and_no_more(engine: FakeEngine, operator: Operator) -> None:
    """The next one is refused at once, so that the remote answers it; another task has places of its own."""
    switch = Switch(
        engine, lambda task, name: Version(name, task, None, SCHEMA), alert=operator, recheck_s=60, most_in_flight=3
    )
    serve(switch, "v1", "t")
    serve(switch, "w1", "u")
    gate, inside = threading.Event(), threading.Semaphore(0)

    def hang(version: Version, value: Mapping[str, Any]) -> dict[str, str]:
        if version.task == "t":
            inside.release()
            gate.wait(WAIT_S)
        return {"by": version.name}

    engine.answerer = hang
    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(switch.answer, "t", {}, 60.0) for _ in range(3)]
        for _ in range(3):
            inside.acquire()
        with pytest.raises(EngineUnavailable, match="busy: 3 answers of 't'"):
            switch.answer("t", {}, 60.0)
        assert switch.answer("u", {}, 60.0).output == {"by": "w1"}
        assert switch.healthy("t"), "busy is not broken"
        gate.set()
        assert [done.result().output for done in waiting] == [{"by": "v1"}] * 3
    assert switch.answer("t", {}, 60.0).output == {"by": "v1"}
    switch.close()


def test_a_load_that_failed_is_not_put_off_by_the_wall_clock(bench: Callable[..., Any]) -> None:
    """The machine's clock may be set back by a day; the waits between loads run on a clock that only goes on."""
    wall = [2_000_000_000.0]
    workbench = bench(clock=lambda: wall[0])
    assert workbench.client.parts.switch._clock is time.monotonic


def test_callers_beyond_the_bound_get_the_remotes_answer_while_the_engine_hangs(bench: Callable[..., Any]) -> None:
    """Eighty at once: sixty-four wait for the local model, sixteen have their answer before it moves."""
    workbench = bench()
    workbench.promote()
    workbench.run("joy")
    gate = threading.Event()
    inside = threading.Semaphore(0)

    def hang(value: Mapping[str, Any]) -> dict[str, Any]:
        inside.release()
        gate.wait(WAIT_S)
        return {"label": "fear"}

    workbench.local = hang
    with ThreadPoolExecutor(80) as threads:
        calls = [threads.submit(workbench.run, f"a fear {n}") for n in range(80)]
        until(lambda: sum(call.done() for call in calls) == 16)
        gate.set()
        assert [call.result() for call in calls] == [{"label": "fear"}] * 80
    entered = 0
    while inside.acquire(blocking=False):
        entered += 1
    assert entered == 64
    assert workbench.client.parts.switch.healthy("mood")


def test_a_copied_home_serves_from_its_own_copy(tmp_path: Path) -> None:
    """The original is still there, and an old row names its absolute path: the copy is what is read."""
    from apprentice.assembly import _lookup

    original, copy = tmp_path / "original", tmp_path / "copy"
    folder = original / "models" / "mood" / "v1"
    folder.mkdir(parents=True)
    shutil.copytree(original, copy)
    for stored in ("mood/v1", str(folder)):
        for home in (original, copy):
            with Store.open("sqlite://") as store:
                store.ensure_tasks(["mood"])
                store.add_version(version_record("v1", adapter=stored))
                made = settings(home, FakeVendor("anthropic", truth))
                assert _lookup(made, store)("mood", "v1").adapter == home / "models" / "mood" / "v1"


def version_record(name: str, *, adapter: str) -> VersionRecord:
    return VersionRecord(
        name=name,
        task="mood",
        status="candidate",
        adapter=adapter,
        base_model="fake",
        trained_on=1,
        held_out=1,
        data_digest="",
        mlflow_version=None,
        reason="",
    )
