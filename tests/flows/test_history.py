"""Whatever happens in whatever order: store, registry and history agree, and nothing bad comes back by itself."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
import uuid
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from apprentice.errors import ChosenMeanwhile, LeaseLost, TrainingError
from apprentice.store.records import VersionRecord
from flows.coach import abandon
from flows.gate import Verdict
from flows.lease import held_lease
from flows.promote import promote_run
from flows.review import choose, follow, previous_champion
from flows.runs import begin
from flows.tracking import CHAMPION
from flows.workshop import Workshop
from tests.flows.conftest import Home

pytestmark = [
    # MLflow keeps connections and event loops beyond a test; their clean-up is theirs.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(mlflow|prefect|websockets|pydantic|starlette).*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:mlflow.*"),
]


class Registry:
    """What `flows.tracking.Tracking` does of aliases and tags, in memory: thousands of moves in seconds."""

    def __init__(self) -> None:
        self.numbers: dict[str, str] = {}
        self.alias: str | None = None
        self.candidate: str | None = None
        self.agreed_on: str | None = None
        self.statuses: dict[str, str] = {}
        self.down = False
        self.fails_in: int | None = None

    def _asked(self) -> None:
        if self.fails_in is not None:
            self.fails_in -= 1
            if self.fails_in < 0:
                raise ConnectionError("the worker was killed, or the server is away")

    def aliased(self, _task: str, alias: str) -> str | None:
        self._asked()
        return self.alias if alias == CHAMPION else self.candidate

    def agreed(self, _task: str) -> str | None:
        self._asked()
        return self.agreed_on

    def moved(self, task: str) -> str | None:
        alias = self.aliased(task, CHAMPION)
        return alias if alias is not None and alias != self.agreed(task) else None

    def number_of(self, _task: str, version: str) -> str | None:
        self._asked()
        return self.numbers.get(version)

    def set_alias(self, _task: str, _alias: str, number: str) -> None:
        self._asked()
        self.alias = next(name for name, known in self.numbers.items() if known == number)

    def agree(self, _task: str, version: str) -> None:
        self._asked()
        self.agreed_on = version

    def drop_alias(self, _task: str, _alias: str) -> None:
        self._asked()
        self.candidate = None

    def show_status(self, _task: str, version: str, tags: dict[str, str]) -> None:
        self._asked()
        self.statuses[version] = tags["apprentice.status"]

    def describe(self, *_: Any, **__: Any) -> None:
        self._asked()

    def run(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(tags=lambda _: None, end=lambda _: None, text=lambda *_: None)


class Story(RuleBasedStateMachine):
    """A task in the hands of a coach, a second coach, people in MLflow and on the command line, and bad luck."""

    home: Any
    review = False

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.home = Home(self.folder, {}, task={"promotion": "review"} if self.review else {})
        self.store = self.home.store
        self.registry = Registry()
        self.made = 0
        self.refused: set[str] = set()
        self.left: set[str] = set()  # rolled back, and not chosen again by a person since
        self.passes: dict[str, bool] = {}
        self.shop = self._shop()

    def _shop(self) -> Workshop:
        shop = Workshop(self.home.settings, self.store, engine_in_use=self.home.engine)
        shop.__dict__["tracking"] = self.registry
        return shop

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    @staticmethod
    def _unreachable() -> None:
        raise ConnectionError("the server is away")

    # ------------------------------------------------------------- what the coach does

    def _candidate(self, run: Any, *, passes: bool, again: str | None) -> str:
        if run.version is not None:
            return str(run.version)
        if again is None:
            self.made += 1
        name = again or f"v{self.made}"
        if again is None:
            self.passes[name] = passes
            self.registry.numbers[name] = str(self.made)
            self.store.add_version(
                VersionRecord(name, "mood", "candidate", "", "b", 1, 1, "d", str(self.made), "", {}, float(self.made))
            )
            self.registry.candidate = name
        self.store.update_run(run.id, version=name)
        return name

    def _train(
        self, *, passes: bool = True, again: str | None = None, dies_in: int | None = None, **during: Any
    ) -> None:
        """A run up to the gate, the gate, and what follows; ``during`` it a person may act, or another take it over."""
        with contextlib.suppress(TrainingError, ConnectionError), held_lease(self.store, "mood") as held:
            shop = self.shop.under(held)
            shop.__dict__["tracking"] = self.registry
            run = begin(shop, "mood", "due")
            name = self._candidate(run, passes=passes, again=again)
            if "act" in during:
                during["act"]()
            self.registry.fails_in = dies_in
            try:
                self._promote(shop, replace(run, version=name))
            finally:
                self.registry.fails_in = None
        if self.store.version("mood", f"v{self.made}") and self.store.versions("mood")[-1].status == "rejected":
            self.refused.add(self.store.versions("mood")[-1].name)

    def _promote(self, shop: Workshop, run: Any) -> None:
        verdict = Verdict(self.passes[run.version], "as good as it is", ())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "flows.promote.validate_run",
                lambda *_: SimpleNamespace(version=run.version, champion=None, carries=None),
            )
            patch.setattr("flows.promote.decide", lambda *_, **__: verdict)
            patch.setattr("flows.promote.evidence", lambda *_, **__: None)
            patch.setattr("flows.promote.seeds", lambda *_: [])
            patch.setattr("flows.promote.load_dataset", lambda *_: SimpleNamespace(card=None))
            patch.setattr("flows.promote.promotion_record", lambda *_, **__: "")
            patch.setattr("flows.promote._write_record", lambda *_: None)
            promote_run(shop, run)

    @rule(passes=st.booleans())
    def train(self, passes: bool) -> None:
        self._train(passes=passes)

    @rule(passes=st.booleans(), calls=st.integers(0, 12))
    def train_and_die(self, passes: bool, calls: int) -> None:
        """The worker is killed at one of the registry's calls; the run is resumed by whoever trains next."""
        self._train(passes=passes, dies_in=calls)

    @precondition(lambda self: self.store.versions("mood"))
    @rule(data=st.data())
    def train_the_same_again(self, data: st.DataObject) -> None:
        """The same data and recipe: an adapter of the same name, whatever became of it."""
        if self.store.open_run("mood") is None:
            self._train(again=data.draw(st.sampled_from([v.name for v in self.store.versions("mood")])))

    @precondition(lambda self: self.store.policy_row("mood").champion)
    @rule(passes=st.booleans(), by_alias=st.booleans())
    def train_while_a_person_rolls_back(self, passes: bool, by_alias: bool) -> None:
        def roll_back() -> None:
            try:
                back = previous_champion(self.shop, "mood")
            except TrainingError:
                return
            if by_alias and self.registry.alias == back.name:
                return  # the registry is behind, and nobody can move an alias to where it stands
            self.chosen_in_run = back.name
            if by_alias:
                self.registry.alias = back.name
            else:
                self._choose(back, "rollback")

        self.chosen_in_run: str | None = None
        fresh = self.store.open_run("mood") is None
        self._train(passes=passes, act=roll_back)
        if fresh and self.chosen_in_run is not None:
            follow(self.shop, "mood")
            assert self.store.policy_row("mood").champion == self.chosen_in_run

    @rule(passes=st.booleans())
    def train_and_lose_the_lease(self, passes: bool) -> None:
        before = [(p.version, p.how) for p in self.store.promotions("mood")]
        self._train(passes=passes, act=lambda: self.store.take_lease("coach:mood", "another", 0.0))
        assert [(p.version, p.how) for p in self.store.promotions("mood")] == before

    @rule()
    def abandon(self) -> None:
        open_run = self.store.open_run("mood")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("flows.coach.Workshop.open", lambda _settings: self._shop())
            closed = abandon(self.home.settings, "mood", reason="enough")
        assert (closed is None) is (open_run is None)
        assert self.store.open_run("mood") is None

    # ------------------------------------------------------------- what people do

    def _choose(self, version: VersionRecord, how: Any) -> None:
        before = self.store.policy_row("mood").champion
        if version.name == before:
            return
        with contextlib.suppress(ChosenMeanwhile):
            choose(self.shop, version, how=how, by="ann", reason=uuid.uuid4().hex)
            self._chosen(version.name, before, how)

    def _chosen(self, name: str, before: str | None, how: str) -> None:
        self.left.discard(name)
        if how == "rollback" and before is not None:
            self.left.add(before)

    @precondition(lambda self: self.store.versions("mood"))
    @rule(data=st.data())
    def promote_by_hand(self, data: st.DataObject) -> None:
        self._choose(data.draw(st.sampled_from(self.store.versions("mood"))), "person")

    @rule()
    def roll_back(self) -> None:
        try:
            back = previous_champion(self.shop, "mood")
        except TrainingError:
            return
        assert back.name not in self.left
        assert back.name not in self.refused
        assert back.name != self.store.policy_row("mood").champion
        self._choose(back, "rollback")
        assert self.store.policy_row("mood").champion == back.name

    @precondition(lambda self: self.registry.numbers)
    @rule(data=st.data())
    def move_the_alias(self, data: st.DataObject) -> None:
        self.registry.alias = data.draw(st.sampled_from(list(self.registry.numbers)))

    @rule()
    def look(self) -> None:
        """A coach looks at the registry."""
        before = self.store.policy_row("mood").champion
        chosen = follow(self.shop, "mood")
        if chosen is not None:
            self._chosen(chosen, before, self.store.promotions("mood")[-1].how)

    @rule(calls=st.integers(0, 8))
    def look_while_the_registry_fails(self, calls: int) -> None:
        before = self.store.policy_row("mood").champion
        self.registry.fails_in = calls
        with contextlib.suppress(ConnectionError):
            follow(self.shop, "mood")
        self.registry.fails_in = None
        now = self.store.policy_row("mood").champion
        if now is not None and now != before:
            self._chosen(now, before, self.store.promotions("mood")[-1].how)

    # ------------------------------------------------------------- what must hold

    @invariant()
    def the_store_agrees_with_its_history(self) -> None:
        promotions = self.store.promotions("mood")
        champion = self.store.policy_row("mood").champion
        assert champion == (promotions[-1].version if promotions else None)
        assert [v.name for v in self.store.versions("mood") if v.status == "champion"] == (
            [champion] if champion else []
        )
        told = [e.evidence["version"] for e in self.store.events("mood") if e.kind == "promoted"]
        assert told == [p.version for p in promotions]
        for before, after in itertools.pairwise(promotions):
            assert after.previous == before.version != after.version

    @invariant()
    def nothing_bad_came_back_by_itself(self) -> None:
        for at, promotion in enumerate(promotions := self.store.promotions("mood")):
            if promotion.how == "gate":
                # A person who chooses a version that was rolled back takes that back.
                chosen = [
                    n for n in range(at) if promotions[n].version == promotion.version and promotions[n].how != "gate"
                ]
                earlier = promotions[max(chosen, default=-1) + 1 : at]
                assert promotion.was in ("candidate", "retired")
                assert not any(p.previous == promotion.version and p.how == "rollback" for p in earlier)
                assert self.passes[promotion.version]
                assert not self.review

    @invariant()
    def two_looks_make_store_and_registry_agree(self) -> None:
        """Unless a person has moved the alias meanwhile, whose choice the first look carries out.

        What became of a version is told by the end of its run at the latest: one that died on the way is resumed.
        """
        if self.registry.alias is None and self.store.policy_row("mood").champion is None:
            return
        if self.registry.alias == self.registry.agreed_on and not self._moved_back():
            assert follow(self.shop, "mood") is None
            assert self.registry.alias == self.store.policy_row("mood").champion == self.registry.agreed_on
            for version in self.store.versions("mood") if self.store.open_run("mood") is None else ():
                assert self.registry.statuses.get(version.name, version.status) == version.status

    def _moved_back(self) -> bool:
        """Whether a person moved the alias, a look followed it without telling the registry, and it was moved back."""
        promotions = self.store.promotions("mood")
        return bool(promotions) and self.registry.alias != promotions[-1].version and "alias" in promotions[-1].by


class ReviewedStory(Story):
    """With ``promotion: review`` nothing is ever promoted but by a person."""

    review = True


def test_an_alias_that_is_moved_back_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where MLflow was away while the first move was followed, and so knows nothing of it."""
    story = ReviewedStory()
    try:
        for passes in (True, True):
            story.train(passes=passes)
        first, second = story.store.versions("mood")
        story._choose(first, "person")
        story.registry.alias = second.name
        monkeypatch.setattr(story.registry, "agree", lambda *_: story._unreachable())
        assert follow(story.shop, "mood") == second.name
        monkeypatch.undo()
        story.registry.alias = first.name  # a person thinks better of it
        assert follow(story.shop, "mood") == first.name == story.store.policy_row("mood").champion
        assert follow(story.shop, "mood") is None
        assert story.registry.agreed_on == first.name
    finally:
        story.teardown()


@pytest.mark.parametrize("story", [Story, ReviewedStory])
def test_histories_stay_true(story: type[Story]) -> None:
    """Random trainings, reviews, rollbacks, alias moves, crashes and lost leases."""
    run_state_machine_as_test(
        story,
        settings=settings(
            max_examples=40,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate],  # to shrink a story takes many minutes; it is short enough to read
        ),
    )


def test_a_lost_lease_is_told_apart() -> None:
    """`suppress(TrainingError)` above covers it: it is one."""
    assert issubclass(LeaseLost, TrainingError)
