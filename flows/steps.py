"""What each step of a training run leaves behind for the next, in the run's folder.

A step's result is a JSON file that appears whole when the step is done. A resumed run finds it and goes on with the
next.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flows.dataset import write_whole

__all__ = ["Answered", "Assembled", "Foretold", "Trained", "Validated", "read_result", "write_result"]


@dataclass(frozen=True, slots=True)
class Trained:
    """What finetune leaves: an adapter, and what the registry is to know of it (``record``)."""

    version: str
    folder: str
    trained_on: int
    held_out: int
    base_model: str
    remote_model: str | None = None
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Foretold:
    """What a version would have answered to an example that none of its parts was fitted on.

    ``local`` is None where no answer within the schema came; so is ``champion``, or there is none to compare with.
    """

    id: str
    local: dict[str, Any] | None
    confidence: float
    field_confidence: dict[str, float]
    champion: dict[str, Any] | None = None
    champion_confidence: float | None = None
    champion_field_confidence: dict[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Assembled:
    """What assemble leaves: the version and its MLflow number.

    ``answers`` are what it is judged by; None if the engine is to be asked. ``evidence`` is what its trust is to begin
    with, None if that is the same. ``carries`` is the sampling rate at which it may go on with the champion's evidence
    (`Judge.promote`), None if it begins with its own.
    """

    version: str
    folder: str
    mlflow_version: str
    trained_on: int
    remote_model: str | None = None
    answers: list[Foretold] | None = None
    evidence: list[Foretold] | None = None
    carries: float | None = None

    @classmethod
    def of_json(cls, data: dict[str, Any]) -> Assembled:
        """What `read_result` gave."""
        told = {name: data.get(name) for name in ("answers", "evidence")}
        lists = {name: None if rows is None else [Foretold(**row) for row in rows] for name, rows in told.items()}
        return cls(**{**data, **lists})


@dataclass(frozen=True, slots=True)
class Answered:
    """One held-out example, answered by the candidate in the serving engine.

    ``score`` and ``confidence`` are None where no answer within the schema came; ``champion`` is the champion's score,
    ``champion_confidence`` what it gave for its own answer (None if that is not known, below 0 if its answer was none
    within the schema). ``chance`` and ``champion_chance`` are the chance scores of the two, None where not worked out.
    ``weight`` in (0, 1] is the sampling rate over the probability with which the remote's answer was bought: 1 for what
    was bought whatever the request was like, less for a request that was deferred for being hard.
    """

    id: str
    local: dict[str, Any] | None
    remote: dict[str, Any]
    score: float | None
    parts: dict[str, float]
    confidence: float | None
    champion: float | None = None
    weight: float = 1.0
    champion_confidence: float | None = None
    chance: float | None = None
    champion_chance: float | None = None


@dataclass(frozen=True, slots=True)
class Validated:
    """What validate leaves: every held-out answer, and the figures that the gate looks at."""

    version: str
    champion: str | None
    answers: list[Answered]
    correlation: float
    correlation_low: float
    correlation_high: float
    agreement: float
    agreement_low: float
    agreement_high: float
    fields: dict[str, float]
    active: bool
    reproduced: float
    answers_per_s: float
    notes: list[str] = field(default_factory=list)
    carries: float | None = None
    """See `Assembled`."""
    evidence: list[Answered] | None = None
    """What its trust begins with; None if that is ``answers``."""

    @classmethod
    def of_json(cls, data: dict[str, Any]) -> Validated:
        """What `read_result` gave."""
        told = {name: data.get(name) for name in ("answers", "evidence")}
        lists = {name: None if rows is None else [Answered(**row) for row in rows] for name, rows in told.items()}
        return cls(**{**data, **lists})

    @property
    def answered(self) -> float:
        """The weight of all held-out examples."""
        return sum(a.weight for a in self.answers)

    @property
    def valid(self) -> float:
        """The weight of those that got an answer within the schema."""
        return sum(a.weight for a in self.answers if a.score is not None)


def write_result(bench: Path, name: str, value: Trained | Assembled | Validated) -> None:
    """Leave a step's result."""
    write_whole(bench / f"{name}.json", json.dumps(asdict(value), ensure_ascii=False) + "\n")


def read_result(bench: Path, name: str) -> dict[str, Any] | None:
    """A step's result as plain data, None where the step has not ended yet."""
    path = bench / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
