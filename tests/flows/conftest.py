"""Doubles for the flows' tests: an engine and a trainer that learn by heart, and one Prefect server for all."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

from apprentice.errors import OutputError, Problem
from apprentice.local.engine import Health, LoadedVersion, LocalAnswer, Version
from apprentice.settings.config import Settings, load_settings
from apprentice.store import Store
from apprentice.store.records import ExampleRecord
from flows.assemble import assemble_run
from flows.curate import curate_run
from flows.finetune import finetune_run
from flows.promote import promote_run
from flows.runs import run_of
from flows.trainers import Progress, TrainedAdapter, TrainingJob, read_rows
from flows.validate import validate_run
from flows.workshop import workshop

WITH_PREFECT_AND_MLFLOW = [
    pytest.mark.usefixtures("plainly"),
    # Prefect and MLflow keep connections and event loops beyond a test; their clean-up is theirs.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(mlflow|prefect|websockets|pydantic|starlette).*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:mlflow.*"),
]
"""For tests of whole training runs, with Prefect's steps called as plain functions."""

MOODS = ("glad", "sad", "angry")


class RoteEngine:
    """Answers as its adapters say: each holds a table of inputs, and knows the truth of a share of all others."""

    def __init__(self, truth: Mapping[str, str]) -> None:
        self.truth = truth
        self.versions: dict[str, Version] = {}
        self.invalid = False

    def load(self, version: Version) -> None:
        assert version.input_schema is not None, "prompts are written by the task's input schema"
        self.versions[version.name] = version

    def answer(self, version: str, value: Mapping[str, Any], *, deadline_s: float) -> LocalAnswer:
        known = self.versions[version]
        if self.invalid:
            raise OutputError(known.task, "local", [Problem("mood", "is missing")])
        mood = "glad"
        if known.adapter is not None:
            skill = json.loads((known.adapter / "adapter_model.safetensors").read_text())["skill"]
            truth = self.truth[value["text"]]
            at = int(value["text"].split()[-1]) % 100
            mood = truth if at < 100 * skill else MOODS[(MOODS.index(truth) + 1) % 3]
        return LocalAnswer({"mood": mood}, 0.9, {"mood": 0.9}, version, 3, 1)

    def answer_many(self, version: str, values: Sequence[Mapping[str, Any]]) -> list[LocalAnswer | Exception]:
        answers: list[LocalAnswer | Exception] = []
        for value in values:
            try:
                answers.append(self.answer(version, value, deadline_s=1.0))
            except OutputError as error:
                answers.append(error)
        return answers

    def unload(self, version: str) -> None:
        self.versions.pop(version, None)

    def loaded(self) -> list[LoadedVersion]:
        return [LoadedVersion(v.name, v.task, None) for v in self.versions.values()]

    def health(self) -> Health:
        return Health(True)

    def close(self) -> None:
        pass


class RoteTrainer:
    """Writes an adapter that is as good as it was told to be; fails as often as it was told to."""

    def __init__(self) -> None:
        self.skills = [0.9]
        self.failures: list[Exception] = []
        self.trained: list[TrainingJob] = []
        self.bill = Decimal(0)

    def preflight(self, job: TrainingJob) -> None:
        job.adapters.mkdir(parents=True, exist_ok=True)

    def worst_case(self, job: TrainingJob) -> Decimal:
        return self.bill * 2

    def train(self, job: TrainingJob, progress: Callable[[Progress], None]) -> TrainedAdapter:
        assert job.input_schema is not None, "prompts are written by the task's input schema"
        if self.failures:
            raise self.failures.pop(0)
        rows = list(read_rows(job.dataset))
        self.trained.append(job)
        skill = self.skills.pop(0) if len(self.skills) > 1 else self.skills[0]
        name = f"v{int(skill * 100)}of{len(rows)}"
        folder = job.adapters / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_model.safetensors").write_text(json.dumps({"skill": skill}))
        progress(Progress(1, 2, 0.7, 10, 0.5))
        progress(Progress(2, 2, 0.5, 20, 1.0))
        recipe, toolchain = {"lora_rank": 4}, {"rote": "1"}
        return TrainedAdapter(name, folder, "rote", len(rows), 0, 2, 20, 1.0, 0.5, recipe, toolchain, cost=self.bill)


class Home:
    """A folder with a configuration and a store, and traffic to fill it with."""

    def __init__(self, folder: Path, truth: dict[str, str], **changes: Any) -> None:
        task = {
            "name": "mood",
            "description": "Say how the writer feels.",
            "input_schema": {"text": "str"},
            "output_schema": {"mood": " | ".join(MOODS)},
            "evaluator": "exact_match",
            "confidence_thresholds": {
                "phase1_to_phase2": 60,
                "phase2_to_phase3": 0.6,
                "coaching_trigger": 0.4,
                "emergency_threshold": 0.2,
            },
            **changes.pop("task", {}),
        }
        document = {
            "tasks": [task],
            "remote": {"provider": "anthropic", "model": "claude-sonnet-4-5", "api_key_env": "A_KEY"},
            "local": {"fine_tune_batch_size": 40, "student": {"head": False}, **changes.pop("local", {})},
            **changes,
        }
        self.config = folder / "apprentice.yaml"
        self.config.write_text(yaml.safe_dump(document))
        self.settings: Settings = load_settings(self.config)
        self.truth = truth
        self.store = Store.open(self.settings.store_url)
        self.store.ensure_tasks(["mood"])
        self.engine = RoteEngine(truth)

    def teach(self, count: int, at: float = 0.0) -> None:
        """Let the remote answer ``count`` more requests, at the time ``at``."""
        start = self.store.count_examples("mood")
        for i in range(start, start + count):
            text = f"what was said in a letter of day {i}"
            self.truth[text] = MOODS[i * 7 % 3]
            output = {"mood": self.truth[text]}
            example = ExampleRecord(f"r{i}", "mood", {"text": text}, output, "anthropic", "claude-sonnet-4-5", at)
            self.store.add_example(example)


@pytest.fixture
def home(tmp_path: Path, empty_registry: Path) -> Iterator[Home]:
    """A fresh home with 60 examples, of which the first training run is due."""
    shutil.copy(empty_registry, tmp_path / "mlflow.db")
    place = Home(tmp_path, {})
    place.teach(60)
    yield place
    place.store.close()


@pytest.fixture
def make_home(tmp_path: Path, empty_registry: Path) -> Iterator[Callable[..., Home]]:
    """Homes with other configurations, in a ``folder`` of their own if they are to be apart."""
    made: list[Home] = []

    def make(folder: str = ".", **changes: Any) -> Home:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        if not (place / "mlflow.db").exists():
            shutil.copy(empty_registry, place / "mlflow.db")
        made.append(Home(place, {}, **changes))
        return made[-1]

    yield make
    for place in made:
        place.store.close()


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> RoteTrainer:
    """The trainer that every backend names during a test."""
    rote = RoteTrainer()
    monkeypatch.setattr("flows.finetune.build_trainer", lambda _backend: rote)
    return rote


@pytest.fixture(scope="session")
def empty_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database as MLflow makes it. Making one takes seconds, copying it none."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("registry") / "mlflow.db"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's migrations are MLflow's
        MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the steps as plain functions: what Prefect adds to them is tested on its own (test_prefect.py)."""

    def steps(_config: str, task: str, run: str) -> bool:
        with workshop("") as shop:
            curate_run(shop, run_of(shop, task, run))
            if run_of(shop, task, run).kind == "train":
                finetune_run(shop, run_of(shop, task, run))
            assemble_run(shop, run_of(shop, task, run))
            validate_run(shop, run_of(shop, task, run))
            return promote_run(shop, run_of(shop, task, run))[0].promoted

    monkeypatch.setattr("flows.coach.coach", steps)


@pytest.fixture(scope="session")
def prefect() -> Iterator[None]:
    """One temporary Prefect server for the whole session: starting one takes longer than most tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Prefect imports while it starts is not ours to judge
        from prefect.testing.utilities import prefect_test_harness

        with prefect_test_harness(server_startup_timeout=240):
            yield
