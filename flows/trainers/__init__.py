"""One protocol for all trainers: what turns a curated dataset into an adapter that an engine can serve.

A trainer knows nothing of the store, MLflow or Prefect. It gets a `TrainingJob`, tells its progress to whoever asks,
and leaves behind a folder named by its content. It may be killed at any moment: called again with the same job it
resumes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol

from apprentice.errors import TrainingError
from apprentice.registry import TRAINERS, Plugin
from apprentice.schemas.schema import Schema
from apprentice.settings.config import LocalSettings, TrainingSettings

__all__ = [
    "Progress",
    "TrainedAdapter",
    "Trainer",
    "TrainerPlugin",
    "TrainingJob",
    "TrainingNotStarted",
    "TrainingRow",
    "build_trainer",
    "read_rows",
]


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One example to train on. ``repeat`` is how often an epoch shows it (recent disagreements: more than once)."""

    id: str
    input: Mapping[str, Any]
    output: Mapping[str, Any]
    repeat: int = 1


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """Everything a trainer may know.

    ``dataset`` is a JSON Lines file of rows; ``work`` keeps checkpoints between restarts; the finished adapter becomes
    ``adapters/<content name>``. ``base_model`` is a name as in ``local.base_model``, relative paths starting at
    ``root``.
    """

    task: str
    dataset: Path
    output_schema: Schema
    base_model: str
    root: Path
    work: Path
    adapters: Path
    settings: TrainingSettings
    instructions: str = ""
    input_schema: Schema | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training run is. ``loss`` is the mean over decided tokens of the last steps; None before the first."""

    step: int
    steps: int
    loss: float | None
    tokens: int
    elapsed_s: float
    validation_loss: float | None = None

    @property
    def fraction(self) -> float:
        """The share done, in [0, 1]."""
        return self.step / self.steps if self.steps else 1.0


@dataclass(frozen=True, slots=True)
class TrainedAdapter:
    """What came out. ``name`` is the content hash of ``folder``; ``remote_model`` is set where a vendor keeps the
    weights.

    ``cost`` is what a vendor bills for the training, in USD; None where it does not say.

    ``recipe`` holds every choice that was made, ``toolchain`` the versions of what made them, ``left_out`` how many
    rows were longer than ``max_length``.
    """

    name: str
    folder: Path
    base_model: str
    trained_on: int
    left_out: int
    steps: int
    tokens: int
    wall_s: float
    loss: float | None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    toolchain: Mapping[str, str] = field(default_factory=dict)
    remote_model: str | None = None
    cost: Decimal | None = Decimal(0)


class TrainingNotStarted(TrainingError):
    """A vendor refused before anything was trained: nothing is billed."""


class Trainer(Protocol):
    """Trains an adapter."""

    def preflight(self, job: TrainingJob) -> None:
        """Fail within seconds, before anything is spent. Raises `TrainingError`, `MissingExtra`, `ConfigError`."""

    def worst_case(self, job: TrainingJob) -> Decimal:
        """What training may cost at most, in USD: 0 where nobody sends a bill. Raises `ConfigError`."""

    def train(self, job: TrainingJob, progress: Callable[[Progress], None]) -> TrainedAdapter:
        """Train, or go on where a killed run stopped. Raises `TrainingError`; idempotent once it has returned."""


class TrainerPlugin(Plugin):
    """The base class of what `local.fine_tune_backend` names: a `Trainer` that says how it is made."""

    @classmethod
    def configured(cls, settings: LocalSettings, options: Any) -> Trainer:
        """Made from the section `local` and an instance of ``Options``, None without one. Imports nothing heavy."""
        made: Any = cls()
        trainer: Trainer = made
        return trainer


def build_trainer(settings: LocalSettings) -> Trainer:
    """The trainer that ``local.fine_tune_backend`` names. What it needs is imported when it trains.

    Raises `RegistryError`.
    """
    kind = TRAINERS.find(settings.fine_tune_backend)
    options = TRAINERS.options(kind, settings.fine_tune_options, "fine_tune_options")
    trainer: Trainer = kind.made.configured(settings, options)
    return trainer


def read_rows(path: Path) -> Iterator[TrainingRow]:
    """The rows of a curated dataset, one at a time. Raises `TrainingError` where a line is damaged."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                yield TrainingRow(row["id"], row["input"], row["output"], row.get("repeat", 1))
            except (ValueError, KeyError, TypeError) as error:
                raise TrainingError(
                    f"{path}:{number} is no training row ({error}); delete the file and run curate again"
                ) from None
