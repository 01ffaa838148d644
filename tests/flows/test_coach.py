"""A training run from due to promoted, with an engine and a trainer that learn by heart and everything else real."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    temporary_settings,
)

from apprentice.errors import TrainingError
from flows.coach import Busy, coach_task, due_reason, held_lease, prefect_at
from flows.commands import rollback
from flows.curate import curate_run
from flows.finetune import finetune_run
from flows.review import before, crown, follow
from flows.runs import begin, run_of
from flows.tracking import CANDIDATE, CHAMPION
from flows.trainers import TrainingNotStarted
from flows.workshop import Workshop
from tests.conftest import Webhook

pytestmark = [
    pytest.mark.usefixtures("plainly"),
    # Prefect and MLflow keep connections and event loops beyond a test; their clean-up is theirs.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(mlflow|prefect|websockets|pydantic|starlette).*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:mlflow.*"),
]


def _coach(home: Any, **options: Any) -> Any:
    return coach_task(home.settings, "mood", reason="due", engine=home.engine, **options)


def test_a_due_run_ends_with_a_champion(home: Any, trainer: Any) -> None:
    """Store, registry and engine agree on the champion, and everything about it can be read in one file."""
    assert due_reason(home.settings, home.store, "mood") == "60 examples, 60 needed for the first run"
    heard: list[str] = []
    result = _coach(home, progress=lambda step, _done: heard.append(step))
    assert result.promoted
    state = home.store.policy_row("mood")
    assert (state.champion, state.phase >= 2) == (result.version, True)
    assert result.trained_on + result.held_out == 60
    assert list(dict.fromkeys(heard)) == ["curate", "finetune", "validate", "promote"]
    assert due_reason(home.settings, home.store, "mood") is None
    shop = Workshop.open(home.settings)
    assert shop.tracking.aliased("mood", CHAMPION) == result.version
    assert shop.tracking.aliased("mood", CANDIDATE) is None
    folder = home.settings.model_dir / home.store.version("mood", result.version).adapter
    assert "claude-sonnet-4-5 (100%)" in (folder / "promotion.md").read_text()
    probes = json.loads((folder / "probe.json").read_text())
    assert any(probe["output"] != probe["base_output"] for probe in probes)
    seeded = home.store.comparisons("mood", version=result.version)
    assert len(seeded) == result.held_out
    assert all(c.seeded for c in seeded)
    shop.close()


def test_a_better_candidate_takes_over_and_a_worse_one_does_not(home: Any, trainer: Any) -> None:
    """The champion stays until somebody is shown to be no worse; the loser keeps its reason."""
    trainer.skills = [0.6, 0.95, 0.5]
    first = _coach(home)
    home.teach(300)
    second = _coach(home)
    home.teach(300)
    third = _coach(home)
    assert (first.promoted, second.promoted, third.promoted) == (True, True, False)
    assert home.store.policy_row("mood").champion == second.version
    loser = home.store.version("mood", third.version)
    assert loser.status == "rejected"
    assert "not_worse_than_champion" in loser.reason
    record = (home.settings.model_dir / loser.adapter / "promotion.md").read_text()
    assert "The gate refuses it for: correlation; difference from the champion, lower bound." in record
    assert record.count("**failed**") == 2
    assert home.store.version("mood", first.version).status == "retired"
    assert [run.state for run in home.store.runs("mood")] == ["completed", "completed", "rejected"]


def test_deferred_requests_count_for_less_among_the_seeds(home: Any, trainer: Any) -> None:
    """What was bought for being hard is weighted down, so that the held-out comparisons describe the traffic."""
    first = _coach(home)
    held_out = home.store.comparisons("mood", version=first.version)
    hard = replace(held_out[0], id="c", seeded=False, sampling_rate=0.1, probability=1.0)
    home.store.update_state("mood", lambda state: state.change(comparisons=[hard]))
    home.teach(300)
    trainer.skills = [0.95]
    second = _coach(home)
    assert second.promoted
    odds = {
        c.request_id: (c.sampling_rate, c.probability) for c in home.store.comparisons("mood", version=second.version)
    }
    assert odds.pop(hard.request_id) == (0.1, 1.0)
    assert len(odds) >= len(held_out) - 1
    assert set(odds.values()) == {(1.0, 1.0)}


def test_no_held_out_example_is_ever_trained_on(home: Any, trainer: Any) -> None:
    """Across all runs, the rows trained on and the rows held out have nothing in common."""
    for _ in range(3):
        _coach(home)
        home.teach(100)
    ids = {"train": set(), "held_out": set()}
    for path in (home.settings.model_dir / "mood" / "data").glob("*.jsonl"):
        ids[path.name.split(".")[1]] |= {json.loads(line)["id"] for line in path.read_text().splitlines()}
    assert len(ids["train"]) > 150
    assert not ids["train"] & ids["held_out"]


def test_a_run_that_breaks_in_any_step_is_resumed(home: Any, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step, broken once, is done again; what came before it is not, and one version is registered."""
    for module, name in (("finetune", "_register"), ("validate", "figures_of"), ("promote", "make_champion")):
        whole: Callable[..., Any] = __import__(f"flows.{module}", fromlist=[name]).__dict__[name]
        calls = []

        def broken(*args: Any, _whole: Any = whole, _calls: list[int] = calls, **kwargs: Any) -> Any:
            _calls.append(1)
            if len(_calls) == 1:
                raise KeyError("a bug")
            return _whole(*args, **kwargs)

        monkeypatch.setattr(f"flows.{module}.{name}", broken)
    assert _coach(home).promoted
    assert len(home.store.versions("mood")) == 1
    assert len(home.store.runs("mood")) == 1


def test_a_run_that_fails_three_times_stops_and_alerts(home: Any, trainer: Any) -> None:
    """A bug is not tried forever: the run is closed, and a critical event says what happened where."""
    trainer.failures = [RuntimeError(f"no {i}") for i in range(9)]
    with pytest.raises(RuntimeError):
        _coach(home)
    (run,) = home.store.runs("mood")
    assert (run.state, run.step) == ("failed", "finetune")
    (event,) = [e for e in home.store.events("mood") if e.kind == "training_failed"]
    assert event.level == "critical"
    assert due_reason(home.settings, home.store, "mood") is None


def test_an_error_that_cannot_heal_is_tried_once(home: Any, trainer: Any) -> None:
    """A failed preflight ends the run at once, and the result says why."""
    trainer.failures = [TrainingError("the disk is full: make room")]
    result = _coach(home)
    assert (result.version, result.promoted) == (None, False)
    assert "make room" in result.reason
    assert not trainer.trained


def test_a_run_that_fails_is_posted_to_the_webhook(make_home: Any, trainer: Any, webhook: Webhook) -> None:
    """Also by a coach that ends at once: it waits for the post to be out."""
    home = make_home(alerts={"webhook": webhook.url})
    home.teach(60)
    trainer.failures = [TrainingError("the disk is full: make room")]
    _coach(home)
    (post,) = webhook.posts
    assert (post["kind"], post["task"], post["level"]) == ("training_failed", "mood", "critical")
    assert "make room" in post["evidence"]["error"]


def test_a_vendors_training_is_paid_for_once(make_home: Any, trainer: Any) -> None:
    """Reserved before, settled to the bill after, also where the run was resumed; no answer's mean price changes."""
    import httpx

    home = make_home(budget={"daily": 1})
    home.teach(60)
    trainer.bill = Decimal("0.30")
    trainer.failures = [httpx.ConnectError("the vendor is away")]
    with pytest.raises(TrainingError, match="the run is kept"):
        _coach(home)
    (held,) = home.store.held()
    assert (held.task, held.amount, home.store.spend()) == ("mood", Decimal("0.60"), [])
    assert _coach(home).promoted
    (row,) = home.store.spend()
    assert (row.state, row.calls, row.cost, row.is_answering) == ("settled", 1, Decimal("0.30"), False)
    assert row.provider == "huggingface training"


def test_training_that_fails_for_good_counts_at_its_worst_case(make_home: Any, trainer: Any) -> None:
    """Nobody knows what a vendor bills for it; what was refused before it began is free."""
    home = make_home(budget={"daily": 1})
    home.teach(60)
    trainer.bill = Decimal("0.10")
    trainer.failures = [TrainingError("the job failed")]
    assert not _coach(home).promoted
    assert [(row.state, row.cost) for row in home.store.spend()] == [("lost", Decimal("0.20"))]
    trainer.failures = [TrainingNotStarted("no such model")]
    assert not _coach(home).promoted
    assert {row.state: row.cost for row in home.store.spend()} == {"lost": Decimal("0.20"), "released": 0}
    assert home.store.held() == []


def test_a_worker_that_dies_right_after_reserving_pays_once(make_home: Any, trainer: Any) -> None:
    """The ledger itself knows what the run holds: a second worker finds it, however the first one died."""
    home = make_home(budget={"daily": 1})
    home.teach(60)
    trainer.bill = Decimal("0.30")
    trainer.failures = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        _coach(home)
    assert _coach(home).promoted
    assert [(row.state, row.calls, row.cost) for row in home.store.spend()] == [("settled", 1, Decimal("0.30"))]
    assert home.store.held() == []


def test_training_that_no_cap_has_room_for_is_not_begun(make_home: Any, trainer: Any) -> None:
    """The run ends with the cap's name, nothing is sent, and an alert tells."""
    home = make_home(budget={"daily": 1})
    home.teach(60)
    trainer.bill = Decimal("0.51")
    result = _coach(home)
    assert (result.promoted, trainer.trained) == (False, [])
    assert "daily" in result.reason
    assert {e.kind for e in home.store.events()} >= {"budget_exhausted", "training_failed"}
    assert home.store.spend() == []


def test_an_outage_keeps_the_run(home: Any, trainer: Any) -> None:
    """A server that cannot be reached costs no attempt; the run goes on when it is back."""
    import httpx

    trainer.failures = [httpx.ConnectError("refused")] * 5
    for _ in range(5):
        with pytest.raises(TrainingError, match="the run is kept"):
            _coach(home)
        (run,) = home.store.runs("mood")
        home.store.update_run(run.id, attempts=1)
        assert due_reason(home.settings, home.store, "mood").startswith("resumes")
    assert _coach(home).promoted


def test_two_workers_do_not_train_one_task(home: Any, trainer: Any) -> None:
    """While one holds the lease, the other is told so and does nothing."""
    with held_lease(home.store, "mood"), pytest.raises(Busy):
        _coach(home)
    assert home.store.runs("mood") == []


def test_answers_outside_the_schema_are_refused(home: Any, trainer: Any) -> None:
    """A candidate that cannot keep the schema does not pass, whatever else it can."""
    home.engine.invalid = True
    result = _coach(home)
    assert not result.promoted
    assert "schema_validity" in result.reason


def test_review_waits_for_a_person(make_home: Callable[..., Any], trainer: Any) -> None:
    """With promotion: review the version waits until the alias is moved; then routers are told."""
    home = make_home(task={"promotion": "review"})
    home.teach(60)
    result = _coach(home)
    assert not result.promoted
    assert home.store.policy_row("mood").champion is None
    shop = Workshop.open(home.settings)
    assert shop.tracking.aliased("mood", CANDIDATE) == result.version
    number = shop.tracking.number_of("mood", result.version)
    shop.tracking.set_alias("mood", CHAMPION, number)
    assert follow(shop, "mood") == result.version
    assert home.store.policy_row("mood").champion == result.version
    assert len(home.store.comparisons("mood", version=result.version)) == result.held_out
    assert follow(shop, "mood") is None
    shop.close()


def test_a_candidate_that_was_refused_is_let_go(home: Any, trainer: Any) -> None:
    """A server that several processes share keeps nothing that nobody will ask again."""
    trainer.skills = [0.1]
    result = _coach(home)
    assert not result.promoted
    assert result.version is not None
    assert home.engine.loaded() == []


def test_a_run_goes_on_in_a_home_that_was_moved(home: Any, trainer: Any) -> None:
    """Between training and validation; what the first step wrote down names a folder of the old place."""
    shop = Workshop.open(home.settings)
    run = begin(shop, "mood", "due")
    curate_run(shop, run)
    trained = finetune_run(shop, run_of(shop, "mood", run.id))
    path = shop.bench(run) / "trained.json"
    path.write_text(path.read_text().replace(str(home.settings.model_dir), "/another/machine/models"))
    assert "/another/machine/models" in path.read_text()
    shop.close()
    result = _coach(home)
    assert (result.version, result.promoted) == (trained.version, True)


def test_a_version_without_its_folder_is_not_promoted_by_hand(home: Any, trainer: Any) -> None:
    """No router could load it: the message says where the folder should be, and the champion stays."""
    trainer.skills = [0.9, 0.95]
    first = _coach(home)
    home.teach(40)
    second = _coach(home)
    assert (first.promoted, second.promoted) == (True, True)
    shutil.rmtree(home.settings.model_dir / "mood" / first.version)
    told = CliRunner().invoke(rollback, ["mood", "--config", str(home.config)])
    assert isinstance(told.exception, TrainingError)
    assert f"has no folder {home.settings.model_dir / 'mood' / first.version}" in str(told.exception)
    assert home.store.policy_row("mood").champion == second.version


def test_a_rollback_by_hand_or_by_alias_is_followed(home: Any, trainer: Any) -> None:
    """Moving the alias back, or apprentice rollback, brings the version before; both sides agree afterwards."""
    trainer.skills = [0.6, 0.95]
    first = _coach(home)
    home.teach(300)
    second = _coach(home)
    shop = Workshop.open(home.settings)
    crown(shop, before(shop, "mood", None), reason="by hand")
    assert home.store.policy_row("mood").champion == first.version
    assert shop.tracking.aliased("mood", CHAMPION) == first.version
    shop.tracking.set_alias("mood", CHAMPION, shop.tracking.number_of("mood", second.version))
    assert follow(shop, "mood") == second.version
    assert home.store.version("mood", first.version).status == "retired"
    shop.close()


def test_a_promotion_that_died_before_the_registry_is_finished(home: Any, trainer: Any) -> None:
    """Where only the store was switched, the registry follows the store and not the other way round."""
    trainer.skills = [0.6, 0.95]
    first = _coach(home)
    home.teach(300)
    second = _coach(home)
    shop = Workshop.open(home.settings)
    tracking = shop.tracking
    tracking.crown("mood", first.version, tracking.number_of("mood", first.version))
    assert follow(shop, "mood") is None
    assert home.store.policy_row("mood").champion == second.version
    assert tracking.aliased("mood", CHAMPION) == second.version
    shop.close()


def test_a_champion_that_the_registry_lost_serves_on(home: Any, trainer: Any) -> None:
    """Its MLflow version deleted, then the whole model: said once and not at every look, and the old one serves."""
    first = _coach(home)
    shop = Workshop.open(home.settings)
    client = shop.tracking._client
    client.delete_model_version("apprentice.mood", "1")
    assert [follow(shop, "mood") for _ in range(3)] == [None] * 3
    client.delete_registered_model("apprentice.mood")
    assert [follow(shop, "mood") for _ in range(3)] == [None] * 3
    told = [e for e in home.store.events("mood") if e.level == "warning"]
    assert [(e.kind, e.evidence["serving"]) for e in told] == [("unregistered_champion", first.version)]
    assert home.store.policy_row("mood").champion == first.version
    shop.close()


def test_an_alias_on_a_version_that_the_store_has_not_changes_nothing(home: Any, trainer: Any) -> None:
    """A version of another installation under the same name: said once, and the champion stays."""
    first = _coach(home)
    shop = Workshop.open(home.settings)
    client = shop.tracking._client
    tags = {"apprentice.version": "of-another-store"}
    strange = client.create_model_version("apprentice.mood", source="runs:/0/adapter", tags=tags)
    client.set_registered_model_alias("apprentice.mood", CHAMPION, strange.version)
    assert [follow(shop, "mood") for _ in range(3)] == [None] * 3
    told = [e for e in home.store.events("mood") if e.level == "warning"]
    assert [(e.evidence["alias"], e.evidence["serving"]) for e in told] == [("of-another-store", first.version)]
    assert home.store.policy_row("mood").champion == first.version
    shop.close()


def test_a_version_nobody_has_is_named(home: Any, trainer: Any) -> None:
    """Rolling back to nothing, or to an unknown version, says what there is."""
    _coach(home)
    shop = Workshop.open(home.settings)
    with pytest.raises(TrainingError, match="nothing to go back to"):
        before(shop, "mood", None)
    with pytest.raises(TrainingError, match=r"it has v90of\d+ \(champion\)"):
        before(shop, "mood", "nonsense")
    shop.close()


def test_prefect_is_given_time_to_start(home: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Three minutes for a temporary server, in a Prefect home of the user's own too; what the user says, holds."""
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        with prefect_at(home.settings):
            assert PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value() == 180
            assert home.settings.root / ".prefect" == PREFECT_HOME.value()
        monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
        with prefect_at(home.settings):
            assert PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value() == 180
            assert tmp_path == PREFECT_HOME.value()
        monkeypatch.setenv("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "7")
        with prefect_at(home.settings):
            assert PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value() == 7
