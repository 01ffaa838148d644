"""Several engines on one server: nobody takes away what another uses, and the last one tidies up."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from apprentice.errors import EngineUnavailable, StoreError, VersionError
from apprentice.local.engine import Version
from apprentice.local.engines.vllm import VllmEngine
from apprentice.local.leases import SharedLeases
from apprentice.local.switch import Switch
from apprentice.schemas.schema import parse_schema
from apprentice.store import Store
from apprentice.testing.vllm import FakeVllm
from tests.local.test_switch import until
from tests.local.written import write_adapter, write_base

EMOTION = parse_schema({"emotion": "joy | fear | anger"})
TTL_S = 300.0


@dataclass
class Process:
    """One engine, as a router or a coach has it."""

    engine: VllmEngine
    leases: SharedLeases

    def crash(self) -> None:
        """End without a word: nothing is let go, nothing is renewed any more."""
        self.leases.close()


class Machines:
    """One vLLM server, one store, and processes that come and go."""

    def __init__(self, folder: Path) -> None:
        self.now = [1_000_000.0]
        self.server = FakeVllm()
        self.store = Store.open("sqlite://", clock=lambda: self.now[0])
        self.base = write_base(folder / "base")
        self.versions = [write_adapter(folder / f"a{n}", "emotion", EMOTION, alpha=n + 1) for n in range(3)]
        self.alive: dict[int, Process] = {}
        self._started = 0

    def process(self) -> Process:
        self._started += 1
        leases = SharedLeases(self.store, f"process {self._started}", ttl_s=TTL_S)
        engine = VllmEngine(
            str(self.base), Path(), url="http://gpu:8000", leases=leases, transport=self.server.transport()
        )
        self.alive[self._started] = Process(engine, leases)
        return self.alive[self._started]

    def pass_time(self, seconds: float) -> None:
        """Time passes; those who live renew in between."""
        self.now[0] += seconds / 2
        for process in self.alive.values():
            process.leases.renew()
        self.now[0] += seconds / 2

    def end(self) -> None:
        for process in self.alive.values():
            process.engine.close()
        self.alive.clear()
        self.store.close()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    machines = Machines(tmp_path)
    yield machines
    machines.end()


def ask(process: Process, version: Version) -> str:
    return str(process.engine.answer(version.name, {"text": "hello"}, deadline_s=5).output["emotion"])


def test_a_coach_that_ends_leaves_the_champion_to_the_router(machines: Machines) -> None:
    """Both have loaded it; the coach closes, the router goes on; when the router lets go, it is unloaded."""
    champion, candidate, _ = machines.versions
    router, coach = machines.process(), machines.process()
    router.engine.load(champion)
    for version in (champion, candidate):
        coach.engine.load(version)
    coach.engine.close()
    assert set(machines.server.adapters) == {champion.name}
    assert ask(router, champion) == "joy"
    router.engine.unload(champion.name)
    assert machines.server.adapters == {}


def test_who_loaded_it_may_go_first(machines: Machines) -> None:
    """The duty to unload passes on to those who are left."""
    version = machines.versions[0]
    first, second = machines.process(), machines.process()
    first.engine.load(version)
    second.engine.load(version)
    first.engine.unload(version.name)
    assert ask(second, version) == "joy"
    second.engine.close()
    assert machines.server.adapters == {}


def test_what_an_operator_loaded_stays(machines: Machines) -> None:
    """vLLM can be started with adapters; they are not ours to take away."""
    version = machines.versions[0]
    machines.server.adapters[version.name] = str(version.adapter)
    router = machines.process()
    router.engine.load(version)
    router.engine.unload(version.name)
    assert set(machines.server.adapters) == {version.name}


def test_two_routers_swap_one_after_the_other_without_losing_an_answer(machines: Machines) -> None:
    """The first to swap must not take the old version from the second."""
    old, new, _ = machines.versions
    known = {version.name: version for version in machines.versions}
    alerts: list[str] = []
    switches = [
        Switch(machines.process().engine, lambda task, name: known[name], alert=lambda kind, *_: alerts.append(kind))
        for _ in range(2)
    ]
    for switch in switches:
        switch.follow("emotion", old.name)
        assert switch.wait_until_serving("emotion", old.name, 10)
    one, two = switches
    one.follow("emotion", new.name)
    assert one.wait_until_serving("emotion", new.name, 10)
    assert one.answer("emotion", {"text": "x"}, 5).version == new.name
    assert two.answer("emotion", {"text": "x"}, 5).version == old.name
    two.follow("emotion", new.name)
    until(lambda: set(machines.server.adapters) == {new.name})
    assert two.answer("emotion", {"text": "x"}, 5).version == new.name
    for switch in switches:
        switch.close()
    assert alerts == []


def test_what_a_crashed_process_left_is_unloaded_by_the_next(machines: Machines) -> None:
    """Not before its lease has run out: it may only have been slow to renew."""
    left, used, _ = machines.versions
    machines.process().engine.load(left)
    machines.alive.pop(1).crash()
    router = machines.process()
    router.engine.load(used)
    assert set(machines.server.adapters) == {left.name, used.name}
    machines.pass_time(TTL_S + 1)
    router.engine.load(used)
    assert set(machines.server.adapters) == {used.name}


def test_an_unload_that_times_out_is_made_up_for(machines: Machines) -> None:
    """A server that is slow to answer is not gone: whether the adapter is still there has to be found out."""
    old, new, _ = machines.versions
    router = machines.process()
    router.engine.load(old)
    machines.server.slow.add("/v1/unload_lora_adapter")
    with pytest.raises(EngineUnavailable, match="does not say whether"):
        router.engine.unload(old.name)
    machines.server.adapters[old.name] = str(old.adapter)  # the time-out was before it did anything
    machines.server.slow.clear()
    router.engine.load(new)
    assert set(machines.server.adapters) == {new.name}


def test_a_load_that_fails_holds_nothing(machines: Machines, tmp_path: Path) -> None:
    """A lease on a version that never came would keep it for ever once another loads it."""
    version = machines.versions[0]
    broken, well = machines.process(), machines.process()
    machines.server.slow.add("/tokenize")
    with pytest.raises(EngineUnavailable):
        broken.engine.load(version)
    assert machines.server.adapters == {}
    machines.server.slow.clear()
    well.engine.load(version)
    well.engine.unload(version.name)
    assert machines.server.adapters == {}


def test_without_the_store_nothing_is_unloaded(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who else uses a version cannot be known then; its lease runs out and it is tidied up later."""
    version, other, _ = machines.versions
    router = machines.process()
    router.engine.load(version)

    def away(*_: object, **__: object) -> bool:
        raise StoreError("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(machines.store, "release_version", away)
        router.engine.close()
    assert set(machines.server.adapters) == {version.name}
    machines.alive.clear()
    machines.now[0] += TTL_S + 1
    machines.process().engine.load(other)
    assert set(machines.server.adapters) == {other.name}


class Sharing(RuleBasedStateMachine):
    """Random loads, unloads, answers, crashes, restarts and ends of three processes on one server."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.machines = Machines(Path(self.folder.name))
        self.uses: dict[int, set[str]] = {}
        self.start()

    def start(self) -> int:
        self.machines.process()
        self.uses[self.machines._started] = set()
        return self.machines._started

    def one(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.machines.alive)))

    @precondition(lambda self: len(self.machines.alive) < 3)
    @rule()
    def another_process(self) -> None:
        self.start()

    @rule(data=st.data(), n=st.integers(0, 2))
    def load(self, data: st.DataObject, n: int) -> None:
        who, version = self.one(data), self.machines.versions[n]
        self.machines.alive[who].engine.load(version)
        self.uses[who].add(version.name)
        assert ask(self.machines.alive[who], version) == "joy"

    @rule(data=st.data(), n=st.integers(0, 2))
    def unload(self, data: st.DataObject, n: int) -> None:
        who, version = self.one(data), self.machines.versions[n]
        self.machines.alive[who].engine.unload(version.name)
        self.uses[who].discard(version.name)
        with pytest.raises(VersionError):
            ask(self.machines.alive[who], version)

    @rule(data=st.data(), n=st.integers(0, 2))
    def load_fails(self, data: st.DataObject, n: int) -> None:
        who, version = self.one(data), self.machines.versions[n]
        if version.name in self.uses[who]:
            return
        self.machines.server.slow.add("/tokenize")
        with pytest.raises(EngineUnavailable):
            self.machines.alive[who].engine.load(version)
        self.machines.server.slow.clear()

    @rule(data=st.data(), n=st.integers(0, 2))
    def unload_times_out(self, data: st.DataObject, n: int) -> None:
        who, version = self.one(data), self.machines.versions[n]
        self.machines.server.slow.add("/v1/unload_lora_adapter")
        try:
            self.machines.alive[who].engine.unload(version.name)
        except EngineUnavailable:
            self.machines.server.adapters[version.name] = str(version.adapter)
        self.machines.server.slow.clear()
        self.uses[who].discard(version.name)

    @precondition(lambda self: len(self.machines.alive) > 1)
    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        who = self.one(data)
        self.machines.alive.pop(who).crash()
        del self.uses[who]

    @precondition(lambda self: len(self.machines.alive) > 1)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        who = self.one(data)
        self.machines.alive.pop(who).engine.close()
        del self.uses[who]

    @rule()
    def time_passes(self) -> None:
        self.machines.pass_time(TTL_S + 1)

    @rule()
    def the_server_restarts(self) -> None:
        """It forgets everything; a request finds out, and the version is loaded again (what `Switch` does)."""
        self.machines.server.restart()
        for who, names in self.uses.items():
            for version in self.machines.versions:
                if version.name in names:
                    self.machines.alive[who].engine.load(version)

    @invariant()
    def what_somebody_uses_is_there(self) -> None:
        for who, names in self.uses.items():
            for version in self.machines.versions:
                if version.name in names:
                    assert ask(self.machines.alive[who], version) == "joy"

    def teardown(self) -> None:
        """Once everyone has closed and the leases of the dead have run out, one last process leaves nothing behind."""
        self.machines.pass_time(TTL_S + 1)
        last = self.machines.process()
        last.engine.load(self.machines.versions[0])
        server = self.machines.server
        self.machines.end()
        assert server.adapters == {}
        self.folder.cleanup()


TestSharing: Callable[[], None] = Sharing.TestCase
TestSharing.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)  # type: ignore[attr-defined]
