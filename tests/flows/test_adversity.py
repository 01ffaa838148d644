"""Training, promotion and rollback while something else is broken: evaluators, engines, adapters, workers, people."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Mapping
from typing import Any

import pytest

from apprentice.errors import EngineUnavailable, EvaluatorError
from apprentice.request.judge import Judge
from apprentice.request.time_limit import TimeLimit
from flows.coach import coach_task
from flows.dispatch import watch
from flows.review import choose, follow, previous_champion
from flows.tracking import CHAMPION
from flows.workshop import Workshop
from tests.flows.conftest import WITH_PREFECT_AND_MLFLOW

pytestmark = WITH_PREFECT_AND_MLFLOW

hanging = threading.Event()


def hangs(local: Mapping[str, Any], remote: Mapping[str, Any]) -> float:
    hanging.wait(60)
    return float(local == remote)


def fails(*_: Any, **__: Any) -> float:
    raise EvaluatorError("the evaluator's model is away")


def _coach(home: Any, **options: Any) -> Any:
    return coach_task(home.settings, "mood", reason="due", engine=home.engine, **options)


def test_a_rollback_asks_no_evaluator(home: Any, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A person goes back to a version whose trust is known, on the very day on which the evaluator is down."""
    trainer.skills = [0.5, 0.95]
    first = _coach(home)
    home.teach(300)
    second = _coach(home)
    earned = home.store.policy_row("mood", first.version).trust
    monkeypatch.setattr("apprentice.request.judge.made_evaluator", fails)
    shop = Workshop.open(home.settings)
    choose(shop, previous_champion(shop, "mood"), how="rollback", by="ann", reason="bad")
    state = home.store.policy_row("mood")
    assert (state.champion, bool(earned), bool(state.trust)) == (first.version, True, True)
    assert home.store.version("mood", second.version).status == "rolled_back"
    assert shop.judge.figures("mood").comparisons == 15
    shop.close()


@pytest.mark.parametrize("broken", [fails, hangs])
def test_a_persons_promotion_does_not_wait_for_the_evaluator(make_home: Any, trainer: Any, broken: Any) -> None:
    """What was reviewed becomes champion in shadow, with no evidence of its own, where its seed cannot be weighed."""
    home = make_home(task={"promotion": "review"})
    home.teach(600)
    first = _coach(home)
    assert first.state == "waits_for_review"
    custom = {"evaluator": "custom", "evaluator_function": f"tests.flows.test_adversity:{broken.__name__}"}
    task = home.settings.tasks[0].model_copy(update=custom)
    shop = Workshop.open(home.settings.model_copy(update={"tasks": (task,)}))
    shop.__dict__["judge"] = Judge(shop.settings, shop.store, shop.clock, random.Random(1), evaluator_s=0.1)
    hanging.clear()
    try:
        choose(shop, home.store.version("mood", first.version), how="person", by="ann", reason="good")
    finally:
        hanging.set()
    state = home.store.policy_row("mood")
    assert (state.champion, state.phase) == (first.version, 2)
    unscored = [e for e in home.store.events("mood") if e.kind == "unscored"]
    assert len(unscored) == (broken is fails), "one evaluator to mend, one event, and not one for each example"
    assert bool(home.store.comparisons("mood", version=first.version)) == (broken is fails)
    shop.close()


@pytest.mark.parametrize("broken", [fails, hangs])
def test_an_evaluator_that_is_away_refuses_no_candidate(
    home: Any, trainer: Any, monkeypatch: pytest.MonkeyPatch, broken: Any
) -> None:
    """The run fails with the evaluator's name; the candidate is not judged, and not called rejected."""
    custom = {"evaluator": "custom", "evaluator_function": f"tests.flows.test_adversity:{broken.__name__}"}
    task = home.settings.tasks[0].model_copy(update=custom)
    home.settings = home.settings.model_copy(update={"tasks": (task,)})
    monkeypatch.setattr("apprentice.request.judge.TimeLimit", lambda what, _seconds: TimeLimit(what, 0.05))
    hanging.clear()
    try:
        result = _coach(home)
    finally:
        hanging.set()
    assert (result.state, result.promoted) == ("failed", False)
    assert broken.__name__ in result.reason
    assert home.store.version("mood", result.version).status == "candidate"


def test_a_worker_may_be_restarted_as_often_as_anybody_likes(home: Any, trainer: Any) -> None:
    """Ctrl-C or a signal is no failed attempt; only a worker that was killed counts."""

    def interrupt(step: str, done: float) -> None:
        if step == "finetune":
            raise KeyboardInterrupt

    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            _coach(home, progress=interrupt)
    assert home.store.runs("mood")[-1].attempts == 1
    assert _coach(home).promoted


def test_a_watch_that_is_stopped_interrupts_its_run(home: Any, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C does not wait until the training has ended."""
    stop, train = threading.Event(), trainer.train

    def trained(job: Any, progress: Any) -> Any:
        stop.set()
        return train(job, progress)

    monkeypatch.setattr(trainer, "train", trained)
    watch(home.settings, stop=stop, engine=home.engine, poll_s=0.01)
    (run,) = home.store.runs("mood")
    assert (run.state, run.error, run.attempts) == ("running", "interrupted: KeyboardInterrupt", 1)
    assert _coach(home).promoted


def test_a_refusal_stands_where_the_engine_cannot_unload(
    home: Any, trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verdict, and what it means for versions under alarm, does not depend on a server that is away by now."""
    trainer.skills = [0.9, 0.1]
    _coach(home)
    home.teach(300)
    refused: list[str] = []
    refuse = Judge.refuse

    def heard(judge: Judge, task: str, reason: str) -> None:
        refused.append(reason)
        refuse(judge, task, reason)

    def unload(_: str) -> None:
        raise EngineUnavailable("the server is away")

    monkeypatch.setattr(Judge, "refuse", heard)
    monkeypatch.setattr(home.engine, "unload", unload)
    result = _coach(home)
    assert (result.state, len(refused)) == ("rejected", 1)
    assert home.store.version("mood", result.version).status == "rejected"


def test_a_champion_whose_folder_is_gone_can_be_succeeded(home: Any, trainer: Any) -> None:
    """It cannot be loaded, by a router that starts or by the gate: the candidate is held to all other conditions."""
    trainer.skills = [0.6, 0.95]
    first = _coach(home)
    shop = Workshop.open(home.settings)
    shutil.rmtree(shop.version_folder(home.store.version("mood", first.version)))
    home.teach(300)
    second = _coach(home)
    assert (second.state, second.promoted) == ("completed", True), second.reason
    record = (shop.version_folder(home.store.version("mood", second.version)) / "promotion.md").read_text()
    assert "cannot be loaded" in record
    shop.close()


def test_an_alias_on_what_somebody_registered_by_hand_is_left_and_told(home: Any, trainer: Any) -> None:
    """A version without our tags is nothing that could serve; nobody's move of the alias is undone in silence."""
    first = _coach(home)
    shop = Workshop.open(home.settings)
    client = shop.tracking._client
    made = client.create_model_version("apprentice.mood", source="somewhere/else")
    client.set_registered_model_alias("apprentice.mood", CHAMPION, made.version)
    assert follow(shop, "mood") is None
    assert str(client.get_model_version_by_alias("apprentice.mood", CHAMPION).version) == str(made.version)
    assert shop.alerts.flush()
    (told,) = [e for e in home.store.events("mood") if e.kind == "unknown_champion"]
    assert told.evidence == {"alias": f"number {made.version} in MLflow", "serving": first.version}
    assert home.store.policy_row("mood").champion == first.version
    shop.close()
