"""Trust belongs to the version that answers: while another cannot be loaded, in a roll-out, after a rollback."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import Phase as Stage
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from apprentice import Apprentice
from apprentice.confidence.decision import Headroom, Plan, Policy, accepts, decide
from apprentice.confidence.phases import Phase
from apprentice.errors import VersionError
from apprentice.local.engine import Version
from apprentice.testing import FakeEngine, FakeVendor
from tests.conftest import LABELS, Workbench, truth
from tests.conftest import settings as configuration

Bench = Callable[..., Workbench]


def wrong(value: Mapping[str, Any]) -> dict[str, Any]:
    return {"label": LABELS[(LABELS.index(truth(value)["label"]) + 1) % 3]}


def requests(at: Workbench, count: int) -> int:
    """So many requests of all kinds; how many were answered wrongly."""
    texts = [f"a {LABELS[i % 3]}, number {i}" for i in range(count)]
    return sum(at.run(text) != truth({"text": text}) for text in texts)


def promote_unloadable(at: Workbench, name: str) -> None:
    at.engine.refuses[name] = VersionError("it gives other answers to its probes")
    with pytest.raises(AssertionError):  # it does not come to serve
        at.promote(name, held_out=400)


def kinds(at: Workbench, version: str) -> set[str]:
    return {e.kind for e in at.store.events("mood", limit=10_000) if e.evidence.get("version") == version}


def test_what_serves_is_guarded_while_the_champion_cannot_be_loaded(bench: Bench) -> None:
    """The old version goes on serving, goes bad, and loses its trust as if it were champion still."""
    at = bench()
    at.promote("v1", held_out=400)
    assert requests(at, 200) == 0
    promote_unloadable(at, "v2")
    assert at.store.policy_row("mood").champion == "v2"
    at.local = wrong
    assert requests(at, 500) < 150
    assert kinds(at, "v1") & {"shift", "drift", "emergency"}
    assert at.store.policy_row("mood", "v1").phase == Phase.SHADOW
    assert at.store.policy_row("mood").training_due == "escalated"
    assert requests(at, 200) == 0
    # The champion's own standing is what its held-out comparisons made it.
    assert at.store.policy_row("mood").phase == Phase.SERVE
    assert {c.version for c in at.store.comparisons("mood", limit=5000) if not c.seeded} == {"v1"}


def test_what_serves_goes_on_earning_while_the_champion_cannot_be_loaded(bench: Bench) -> None:
    """A version in shadow is certified by its own comparisons, champion or not, and then serves."""
    at = bench()
    at.promote("v1")
    promote_unloadable(at, "v2")
    assert requests(at, 250) == 0
    assert at.store.policy_row("mood", "v1").phase == Phase.SERVE
    assert at.counted()["local"] > 0


def test_undoing_a_rollback_goes_on_from_what_the_version_had_earned(bench: Bench) -> None:
    """Each version keeps its own evidence: back and forth, none begins anew, and all are checked from 1 down."""
    at = bench()
    for name in ("v1", "v2"):
        at.promote(name)
        requests(at, 250)
        assert at.store.policy_row("mood").phase == Phase.SERVE
    at.client.parts.judge.flush("mood")
    before = at.store.policy_row("mood", "v2")
    at.promote("v1")
    assert at.client.status()["mood"].comparisons > 50
    asked = at.vendor.asked
    requests(at, 100)
    assert at.vendor.asked - asked < 100
    assert at.store.policy_row("mood", "v2").trust == before.trust
    at.promote("v2")
    state = at.store.policy_row("mood")
    assert (state.phase, state.threshold, state.sampling_rate) == (Phase.SERVE, before.threshold, 1.0)
    (again,) = [e for e in at.store.events("mood", limit=1000) if e.kind == "promoted"][-1:]
    assert again.evidence["resumed"] == json.loads(before.trust)["comparisons"]


def test_a_new_version_begins_at_a_rate_of_1(bench: Bench) -> None:
    """What the last one had earned says nothing about it."""
    at = bench()
    at.promote("v1", held_out=400)
    requests(at, 300)
    assert at.store.policy_row("mood").sampling_rate < 0.3
    at.promote("v2", held_out=400)
    state = at.store.policy_row("mood")
    assert (state.phase, state.sampling_rate) == (Phase.SERVE, 1.0)


class Fleet:
    """Routers over one store, each with an engine of its own. What a version answers says which version it is."""

    def __init__(self, folder: Path, routers: int) -> None:
        self.now = 1_772_366_400.0
        self.bad: set[str] = set()
        self.confidence = 0.9
        self.benches: list[Workbench] = []
        for n in range(routers):
            vendor = FakeVendor("anthropic", lambda value: {**truth(value), "by": "remote"})
            engine = FakeEngine(self._answer)
            task = {
                "name": "mood",
                "description": "Name the mood.",
                "input_schema": {"text": "str"},
                "output_schema": {"label": " | ".join(LABELS), "by": "str"},
                "evaluator": "structured_match",
                "match_fields": ["label"],
                "confidence_thresholds": {"phase1_to_phase2": 10},
            }
            client = Apprentice.from_config(
                configuration(folder, vendor, tasks=[task]),
                http_client=httpx.Client(transport=vendor.transport()),
                engine=engine,
                environ=vendor.environ,
                draw=random.Random(n),
                clock=lambda: self.now,
            )
            self.benches.append(Workbench(client, vendor, engine))

    def _answer(self, version: Version, value: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
        said = wrong(value) if version.name in self.bad else truth(value)
        return {**said, "by": version.name}, self.confidence

    def serving(self, router: int) -> str | None:
        return self.benches[router].client.parts.switch.serving("mood")

    def settle(self, router: int) -> None:
        """Let a router see the store and finish what it is loading."""
        self.now += 120.0  # no snapshot, and no pause between two tries to load, is longer
        self.benches[router].client.wait_until_serving("mood", timeout_s=10)

    def close(self) -> None:
        for bench in self.benches:
            bench.client.close()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path, 2)
    yield made
    made.close()


def test_two_routers_on_two_versions_each_keep_to_their_own(fleet: Fleet) -> None:
    """During a roll-out the old version fails on one router: it is withdrawn there, and the new one serves on."""
    old, new = fleet.benches
    old.promote("v1", held_out=400)
    fleet.settle(1)
    for at in (old, new):
        requests_of(fleet, at, 200)
    old.engine.refuses["v2"] = VersionError("the folder is not there")
    new.promote("v2", held_out=400)
    fleet.settle(0)
    assert [fleet.serving(0), fleet.serving(1)] == ["v1", "v2"]
    requests_of(fleet, new, 200)
    fleet.bad = {"v1"}
    assert requests_of(fleet, old, 500) < 150
    assert old.store.policy_row("mood", "v1").phase == Phase.SHADOW
    assert old.store.policy_row("mood", "v2").phase == Phase.SERVE
    asked = new.vendor.asked
    assert requests_of(fleet, new, 200) == 0
    assert new.vendor.asked - asked < 100
    assert requests_of(fleet, old, 50) == 0


def requests_of(fleet: Fleet, at: Workbench, count: int) -> int:
    bad = 0
    for i in range(count):
        fleet.now += 1.0
        text = "a " + LABELS[i % 3]
        bad += at.run(text)["label"] != truth({"text": text})["label"]
    return bad


class RollOut(RuleBasedStateMachine):
    """Promotions, versions that cannot be loaded, and versions that go bad, in any order on two routers."""

    def __init__(self) -> None:
        super().__init__()
        self.answered: dict[str, str] = {}  # request id -> the version whose answer it was
        self.promoted = 0
        self.policies: list[Policy] = []  # those by which plans were made

    @initialize(folder=st.just(None))
    def begin(self, folder: None) -> None:
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.fleet = Fleet(Path(self.folder.name), 2)
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("apprentice.request.router.decide", self.decide)
        for bench in self.fleet.benches:
            compare = bench.client.parts.judge.compare

            def spied(*args: Any, _compare: Any = compare, **named: Any) -> None:
                self.answered[named["request_id"]] = named["local"].output["by"]
                _compare(*args, **named)

            bench.client.parts.judge.compare = spied  # type: ignore[method-assign]  # to see who answered

    def decide(self, policy: Policy, headroom: Headroom, draw: float) -> Plan:
        self.policies.append(policy)
        return decide(policy, headroom, draw)

    @rule(loadable=st.tuples(st.booleans(), st.booleans()), held_out=st.sampled_from([0, 30, 120]), bad=st.booleans())
    def promote(self, loadable: tuple[bool, bool], held_out: int, bad: bool) -> None:
        self.promoted += 1
        name = f"v{self.promoted}"
        for bench, can in zip(self.fleet.benches, loadable, strict=True):
            if not can:
                bench.engine.refuses[name] = VersionError("no")
        if bad:
            self.fleet.bad.add(name)
        promote_quietly(self.fleet.benches[0], name, held_out)

    @precondition(lambda self: self.promoted > 1)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        name = f"v{data.draw(st.integers(1, self.promoted))}"
        promote_quietly(self.fleet.benches[1], name, 0)

    @rule(router=st.integers(0, 1))
    def load(self, router: int) -> None:
        self.fleet.settle(router)

    @precondition(lambda self: self.promoted)
    @rule(data=st.data(), bad=st.booleans())
    def change(self, data: st.DataObject, bad: bool) -> None:
        name = f"v{data.draw(st.integers(1, self.promoted))}"
        (self.fleet.bad.add if bad else self.fleet.bad.discard)(name)

    @rule(router=st.integers(0, 1), count=st.integers(1, 25), confidence=st.sampled_from([0.9, 0.4]))
    def ask(self, router: int, count: int, confidence: float) -> None:
        self.fleet.confidence = confidence
        at = self.fleet.benches[router]
        for i in range(count):
            self.fleet.now += 1.0  # every request looks at the store: what another router did is known
            at.client.wait_until_serving("mood", timeout_s=10)  # whatever can be loaded is
            serving = self.fleet.serving(router)
            known = at.store.policies()["mood"]
            by = at.run("a " + LABELS[i % 3])["by"]
            assert self.policies[-1] == known.of(serving or known.champion)
            if by != "remote":
                # The version that answered was certified itself, and for an answer as sure as this one.
                assert accepts(known.of(by), confidence)
                assert by == serving

    @invariant()
    def every_comparison_is_the_answerers(self) -> None:
        if not self.promoted:
            return
        store = self.fleet.benches[0].store
        seen: dict[str, int] = {}
        for comparison in store.comparisons("mood", limit=100_000):
            seen[comparison.version] = seen.get(comparison.version, 0) + 1
            if not comparison.seeded:
                assert comparison.version == comparison.local["by"] == self.answered[comparison.request_id]
        for version, policy in store.policies()["mood"].policies.items():
            trust = json.loads(store.policy_row("mood", version).trust)
            assert trust["comparisons"] == seen.get(version, 0)
            assert (policy.threshold is not None) == (policy.phase is Phase.SERVE)

    def teardown(self) -> None:
        self.fleet.close()
        self.patch.undo()
        self.folder.cleanup()


def promote_quietly(at: Workbench, name: str, held_out: int) -> None:
    """Promote without waiting for any router to load it."""
    at.add_version(name, held_out)
    at.client.parts.judge.promote("mood", name, at.seed(name, held_out), reason="test")


RollOut.TestCase.settings = settings(
    max_examples=15,
    stateful_step_count=12,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Stage.generate],  # two clients are opened for each example: shrinking takes minutes
)
TestRollOut = RollOut.TestCase
