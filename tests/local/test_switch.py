"""Moving between versions: loaded beside, proven, switched, drained; and an engine that fails is left alone."""

from __future__ import annotations

import json
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
from apprentice.schema import parse_schema
from apprentice.testing.engine import FakeEngine

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


def test_an_engine_that_fails_is_left_alone_until_it_is_well(
    switch: Switch, engine: FakeEngine, operator: Operator
) -> None:
    """A few failures open the breaker; when the engine is back, it gets its versions again before requests do."""
    serve(switch, "v1")
    engine.down = True
    for _ in range(4):
        with pytest.raises(EngineUnavailable, match="down"):
            switch.answer("t", {}, 1.0)
    assert not switch.healthy("t")
    with pytest.raises(EngineUnavailable, match="left alone"):
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
