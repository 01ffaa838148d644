"""A training run from due to promoted, with an engine and a trainer that learn by heart and everything else real."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_HOME,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    temporary_settings,
)

from apprentice.errors import LeaseLost, StoreError, TrainingError
from apprentice.lifecycle.due import due_reason
from apprentice.store import Store
from apprentice.store.records import EventRecord, Lease
from flows.coach import abandon, coach_task, prefect_at
from flows.commands import rollback
from flows.curate import curate_run
from flows.finetune import finetune_run
from flows.lease import Busy, held_lease
from flows.observe import observe_all
from flows.review import choose, follow, previous_champion, version_named
from flows.runs import begin, run_of
from flows.tracking import CANDIDATE, CHAMPION
from flows.trainers import Progress, TrainingNotStarted
from flows.workshop import Workshop
from tests.conftest import Webhook
from tests.flows.conftest import WITH_PREFECT_AND_MLFLOW

pytestmark = WITH_PREFECT_AND_MLFLOW


def _coach(home: Any, **options: Any) -> Any:
    return coach_task(home.settings, "mood", reason="due", engine=home.engine, **options)


def test_a_due_run_ends_with_a_champion(home: Any, trainer: Any) -> None:
    """Store, registry and engine agree on the champion, and everything about it can be read in one file."""
    assert due_reason(home.settings, home.store, "mood", time.time()) == "60 examples, 60 needed for the first run"
    heard: list[str] = []
    result = _coach(home, progress=lambda step, _done: heard.append(step))
    assert result.promoted
    state = home.store.policy_row("mood")
    assert (state.champion, state.phase >= 2) == (result.version, True)
    assert result.trained_on + result.held_out == 60
    assert list(dict.fromkeys(heard)) == ["curate", "finetune", "validate", "promote"]
    assert due_reason(home.settings, home.store, "mood", time.time()) is None
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
    came = [example.id for example in home.store.examples("mood")]
    assert [c.request_id for c in reversed(seeded)] == sorted((c.request_id for c in seeded), key=came.index)
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
    said = "would serve 0 % of the traffic at the promise, the champion 100 % (better in 0 % of resamples)"
    assert f"coverage_odds 0.000 (needs 0.700): {said}" in loser.reason
    record = (home.settings.model_dir / loser.adapter / "promotion.md").read_text()
    assert "The gate refuses it for: odds that it would serve more of the traffic than the champion." in record
    assert f"The version {said}." in record
    assert record.count("**failed**") == 1
    shop = Workshop.open(home.settings)
    tracked = shop.tracking.run("mood", home.store.runs("mood")[-1].id, name="")
    metrics = shop.tracking._client.get_run(tracked.id).data.metrics
    assert (metrics["held_out_coverage"], metrics["held_out_coverage_champion"]) == (0.0, 1.0)
    shop.close()
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


@pytest.mark.parametrize(("kind", "began", "since"), [("shift", 3, 7.0), ("drift", 99, 1.0), ("emergency", None, 9.0)])
def test_after_a_change_only_what_was_bought_since_is_a_seed(
    home: Any, trainer: Any, kind: str, began: int | None, since: float
) -> None:
    """A new version is certified by examples from after the change that the alarm dates, and by no older one."""
    first = _coach(home)
    held_out = home.store.comparisons("mood", version=first.version)
    # Nine spot checks at 1 s to 9 s; the alarm comes with the last of them. All examples so far were bought at 0 s.
    checks = [
        replace(held_out[0], id=f"c{i}", request_id=f"c{i}", seeded=False, served=True, created_at=float(i))
        for i in range(1, 10)
    ]
    evidence = {"version": first.version} | ({} if began is None else {"began_checks_ago": began})
    alarm = EventRecord("alarm", "mood", kind, "warning", evidence, 9.0)
    home.store.update_state("mood", lambda state: state.change(comparisons=checks, events=[alarm]))
    home.teach(200)  # at 0 s, before the change
    taught = home.store.count_examples("mood")
    home.teach(100, at=since - 0.5)
    home.teach(100, at=since)
    trainer.skills = [0.95]
    second = _coach(home)
    assert second.promoted
    seeded = {c.request_id for c in home.store.comparisons("mood", version=second.version) if c.seeded}
    assert 5 < len(seeded) < second.held_out / 2
    assert {int(request[1:]) >= taught + 100 for request in seeded} == {True}


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
    for module, name in (("assemble", "_register"), ("validate", "figures_of"), ("promote", "make_champion")):
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
    assert due_reason(home.settings, home.store, "mood", time.time()) is None


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

    trainer.failures = [httpx.ConnectError("refused")] * 5
    for _ in range(5):
        with pytest.raises(TrainingError, match="the run is kept"):
            _coach(home)
        (run,) = home.store.runs("mood")
        home.store.update_run(run.id, attempts=1)
        assert due_reason(home.settings, home.store, "mood", time.time()).startswith("resumes")
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
    trainer.skills = [0.0]
    result = _coach(home)
    assert not result.promoted
    assert result.version is not None
    assert home.engine.loaded() == []


def test_a_remote_that_changed_is_learnt_from_its_new_answers_alone(home: Any, trainer: Any) -> None:
    """What it said before the change is in the store, and in no dataset: majorities would outvote what it says now."""
    home.teach(80, at=1000.0)
    evidence = {"since": 1000.0}
    home.store.add_event(EventRecord("changed", "mood", "remote_changed", "warning", evidence, 1100.0))
    shop = Workshop.open(home.settings)
    dataset = curate_run(shop, begin(shop, "mood", "due"))
    shop.close()
    rows = [json.loads(line) for file in (dataset.train, dataset.held_out) for line in file.read_text().splitlines()]
    assert len(rows) > 60
    assert {row["id"] for row in rows} <= {f"r{i}" for i in range(60, 140)}
    assert dataset.card.examples == 80


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
    choose(shop, previous_champion(shop, "mood"), how="rollback", by="ann", reason="it is too cheerful")
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
    tracking.set_alias("mood", CHAMPION, tracking.number_of("mood", first.version))
    tracking.agree("mood", first.version)
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
    shop.alerts.flush()
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
    shop.alerts.flush()
    told = [e for e in home.store.events("mood") if e.level == "warning"]
    assert [(e.evidence["alias"], e.evidence["serving"]) for e in told] == [("of-another-store", first.version)]
    assert home.store.policy_row("mood").champion == first.version
    shop.close()


def test_a_version_nobody_has_is_named(home: Any, trainer: Any) -> None:
    """Rolling back to nothing, or to an unknown version, says what there is."""
    _coach(home)
    shop = Workshop.open(home.settings)
    with pytest.raises(TrainingError, match="nothing to go back to"):
        previous_champion(shop, "mood")
    with pytest.raises(TrainingError, match=r"it has v90of\d+ \(champion\)"):
        version_named(shop, "mood", "nonsense")
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


def test_steps_do_not_wait_for_heartbeats_that_nobody_hears(home: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left out on a temporary server; with a server of the user's own, or where they are asked for, they are sent."""
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        with prefect_at(home.settings):
            assert PREFECT_FLOWS_HEARTBEAT_FREQUENCY.value() is None
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: 45}), prefect_at(home.settings):
            assert PREFECT_FLOWS_HEARTBEAT_FREQUENCY.value() == 45
    usual = PREFECT_FLOWS_HEARTBEAT_FREQUENCY.value()
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4200/api"}), prefect_at(home.settings):
        assert usual == PREFECT_FLOWS_HEARTBEAT_FREQUENCY.value() is not None


def test_going_back_twice_goes_back_two_champions(home: Any, trainer: Any) -> None:
    """Along the order in which they were champions; what was rolled back or refused is not come back to."""
    trainer.skills = [0.5, 0.6, 0.7, 0.95]
    names = []
    for _ in range(4):
        names.append(_coach(home).version)
        home.teach(300)
    champions = [p.version for p in home.store.promotions("mood")]
    assert len(champions) >= 3
    refused = next((n for n in names if n not in champions), None)
    shop = Workshop.open(home.settings)
    if refused is not None:  # a person's own choice of what the gate refused is nothing to go back to either
        choose(shop, home.store.version("mood", refused), how="person", by="ann", reason="I like it")
        champions.append(refused)
    runner, config = CliRunner(), ["--config", str(home.config), "--reason", "it is too cheerful"]
    for expected in reversed(champions[:-1]):
        assert runner.invoke(rollback, ["mood", *config]).exit_code == 0
        assert home.store.policy_row("mood").champion == expected
    assert "nothing to go back to" in str(runner.invoke(rollback, ["mood", *config]).exception)
    last = home.store.promotions("mood")[-1]
    assert (last.how, last.reason) == ("rollback", "it is too cheerful")
    assert "@" in last.by
    told = [e for e in home.store.events("mood") if e.kind == "promoted"]
    assert len(told) == len(home.store.promotions("mood"))
    client = shop.tracking._client
    tags = {v.tags["apprentice.version"]: v.tags for v in client.search_model_versions("name = 'apprentice.mood'")}
    for version in home.store.versions("mood"):
        assert tags[version.name]["apprentice.status"] == version.status
    assert "it is too cheerful" in tags[champions[0]]["apprentice.promoted_by"]
    shop.close()


def test_a_rollback_does_not_wait_for_a_run_and_is_not_overruled_by_it(home: Any, trainer: Any) -> None:
    """Alias moved while a run holds the lease: followed at once, and the run's better candidate waits for a person."""
    trainer.skills = [0.5, 0.6, 0.95]
    first = _coach(home)
    home.teach(300)
    second = _coach(home)
    home.teach(300)
    shop = Workshop.open(home.settings)

    def roll_back(step: str, done: float) -> None:
        if step == "finetune" and done == 1.0:
            assert shop.store.lease("coach:mood") is not None
            shop.tracking.set_alias("mood", CHAMPION, shop.tracking.number_of("mood", first.version))
            assert follow(shop, "mood") == first.version

    third = _coach(home, progress=roll_back)
    assert (third.promoted, third.state) == (False, "waits_for_review")
    assert "made" in third.reason
    assert home.store.policy_row("mood").champion == first.version
    assert home.store.version("mood", second.version).status == "rolled_back"
    (told,) = [e for e in home.store.events("mood") if e.kind == "waits_for_review"]
    assert (told.level, told.evidence["version"]) == ("warning", third.version)
    choose(shop, home.store.version("mood", third.version), how="person", by="ann", reason="reviewed")
    assert home.store.runs("mood")[-1].state == "completed"
    assert shop.tracking.aliased("mood", CHAMPION) == third.version
    shop.close()


def test_an_alias_moved_at_the_last_moment_is_not_promoted_over(home: Any, trainer: Any) -> None:
    """Not yet followed by anybody: the run sees it, waits, and the next look follows it."""
    trainer.skills = [0.5, 0.6, 0.95]
    first = _coach(home)
    home.teach(300)
    _coach(home)
    home.teach(300)
    shop = Workshop.open(home.settings)

    def move(step: str, done: float) -> None:
        if (step, done) == ("promote", 0.0):
            shop.tracking.set_alias("mood", CHAMPION, shop.tracking.number_of("mood", first.version))

    third = _coach(home, progress=move)
    assert third.state == "waits_for_review"
    assert follow(shop, "mood") == first.version
    shop.close()


def test_a_version_trained_again_after_its_rollback_waits(home: Any, trainer: Any) -> None:
    """The same data and recipe give the same content hash; what a person left for being bad does not come back."""
    trainer.skills = [0.5, 0.9]
    first = _coach(home)
    home.teach(300)
    second = _coach(home)
    shop = Workshop.open(home.settings)
    choose(shop, home.store.version("mood", first.version), how="rollback", by="ann", reason="bad")
    again = _coach(home)  # the same corpus
    assert again.version == second.version
    assert again.state == "waits_for_review"
    assert home.store.policy_row("mood").champion == first.version
    assert home.store.version("mood", second.version).status == "rolled_back"
    shop.close()


def test_a_run_whose_lease_is_lost_stops(home: Any, trainer: Any) -> None:
    """Abandoned by a person while it trains: its worker stops at the next step, and store and MLflow say cancelled."""

    def give_up(step: str, done: float) -> None:
        if (step, done) == ("finetune", 1.0):
            assert abandon(home.settings, "mood", reason="too dear").state == "cancelled"

    with pytest.raises(LeaseLost):
        _coach(home, progress=give_up)
    (run,) = home.store.runs("mood")
    assert (run.state, run.error, home.store.versions("mood")) == ("cancelled", "too dear", [])
    shop = Workshop.open(home.settings)
    experiment = shop.tracking._client.get_experiment_by_name("apprentice.mood").experiment_id
    (tracked,) = shop.tracking._client.search_runs([experiment])
    assert (tracked.info.status, tracked.data.tags["apprentice.state"]) == ("KILLED", "cancelled")
    assert shop.tracking._client.search_model_versions("name = 'apprentice.mood'") == []
    shop.close()
    assert due_reason(home.settings, home.store, "mood", time.time()) is None
    assert _coach(home).promoted


def test_a_run_that_is_interrupted_says_so_and_goes_on(home: Any, trainer: Any) -> None:
    """Ctrl-C: kept in the store, KILLED in MLflow until it is resumed, and one version in the end."""

    def interrupt(step: str, done: float) -> None:
        if step == "validate":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _coach(home, progress=interrupt)
    (run,) = home.store.runs("mood")
    assert (run.state, run.error) == ("running", "interrupted: KeyboardInterrupt")
    shop = Workshop.open(home.settings)
    experiment = shop.tracking._client.get_experiment_by_name("apprentice.mood").experiment_id
    (tracked,) = shop.tracking._client.search_runs([experiment])
    assert (tracked.info.status, tracked.data.tags["apprentice.state"]) == ("KILLED", "interrupted")
    assert _coach(home).promoted
    (tracked,) = shop.tracking._client.search_runs([experiment])
    assert (tracked.info.status, tracked.data.tags["apprentice.state"]) == ("FINISHED", "completed")
    shop.close()


def test_a_run_that_failed_is_due_again_after_a_while(home: Any, trainer: Any) -> None:
    """A disk that was full does not keep a task from ever being trained: a quarter of an hour, then twice as long."""
    trainer.failures = [TrainingError("the disk is full: make room")]
    _coach(home)
    (run,) = home.store.runs("mood")
    assert due_reason(home.settings, home.store, "mood", run.finished_at + 899) is None
    assert due_reason(home.settings, home.store, "mood", run.finished_at + 900) == "tries again: it failed once"
    assert _coach(home).promoted


def test_an_outage_is_told_once(home: Any, trainer: Any) -> None:
    """A run that waits for a server for hours is one alert."""
    trainer.failures = [httpx.ConnectError("refused")] * 3
    for _ in range(3):
        with pytest.raises(TrainingError, match="the run is kept"):
            _coach(home)
    (told,) = [e for e in home.store.events("mood") if e.kind == "training_waits"]
    assert "refused" in told.evidence["cause"]
    assert home.store.runs("mood")[0].attempts == 1


@pytest.mark.parametrize("deleted", ["experiment", "run", "version", "model"])
def test_what_is_deleted_in_mlflow_stops_nothing(home: Any, trainer: Any, deleted: str) -> None:
    """Training and observing go on, with what was deleted restored or made anew, and it is said once."""
    trainer.skills = [0.6, 0.95]
    _coach(home)
    shop = Workshop.open(home.settings)
    client = shop.tracking._client
    experiment = client.get_experiment_by_name("apprentice.mood").experiment_id
    if deleted == "experiment":
        client.delete_experiment(experiment)
    elif deleted == "run":
        client.delete_run(client.search_runs([experiment])[0].info.run_id)
    elif deleted == "version":
        client.delete_model_version("apprentice.mood", "1")
    else:
        client.delete_registered_model("apprentice.mood")
    for _ in range(2):
        (row,) = observe_all(shop)
        assert "error" not in row, row
        follow(shop, "mood")
    home.teach(300)
    second = _coach(home)
    assert second.promoted
    assert shop.tracking.aliased("mood", CHAMPION) == second.version
    (row,) = observe_all(shop)
    assert row["champion"] == second.version
    shop.alerts.flush()
    restored = [e for e in home.store.events("mood") if e.kind == "registry_restored"]
    assert len(restored) == (1 if deleted in ("experiment", "run") else 0)
    shop.close()


def test_a_task_that_cannot_be_observed_stops_no_other(home: Any, trainer: Any) -> None:
    """Its row says why; the others are written."""
    _coach(home)
    task = home.settings.tasks[0].model_copy(update={"name": "unheard_of"})
    shop = Workshop.open(home.settings)
    shop.settings = home.settings.model_copy(update={"tasks": (task, *home.settings.tasks)})
    lost, found = observe_all(shop)
    assert "unheard_of" in lost["error"]
    assert found["champion"] is not None
    shop.close()


def test_a_worker_whose_renewals_fail_is_replaced_and_writes_nothing_more(
    home: Any, trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both train the same run for a while; the second ends it, and of the first nothing is to be found."""
    monkeypatch.setattr("flows.lease.LEASE_S", 1.0)
    names = iter(["first", "second", *(f"later {n}" for n in range(1000))])
    monkeypatch.setattr("flows.lease.worker", lambda: next(names))
    renew, train, training = Store.renew_lease, trainer.train, threading.Event()

    def failing(store: Store, lease: Lease, ttl_s: float = 60.0) -> Lease | None:
        if lease.owner == "first" and training.is_set():
            raise StoreError("the database is away")
        return renew(store, lease, ttl_s)

    def trained(job: Any, progress: Any) -> Any:
        if not training.is_set():
            training.set()
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:  # until the run is stopped
                progress(Progress(1, 2, 0.7, 10, 0.5))
                time.sleep(0.02)
        return train(job, progress)

    monkeypatch.setattr(Store, "renew_lease", failing)
    monkeypatch.setattr(trainer, "train", trained)
    ended: list[BaseException] = []

    def first() -> None:
        try:
            _coach(home)
        except BaseException as error:  # noqa: BLE001
            ended.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    assert training.wait(60)
    deadline = time.monotonic() + 60
    while True:
        try:
            result = _coach(home)
            break
        except Busy:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    thread.join(60)
    assert [type(error) for error in ended] == [LeaseLost]
    assert result.promoted
    (run,) = home.store.runs("mood")
    (version,) = home.store.versions("mood")
    assert (run.state, run.version, version.status) == ("completed", version.name, "champion")
    assert len(home.store.promotions("mood")) == 1
