"""What a replay saw, and what was promised of its answers beside what they turned out to be.

A replay knows every recorded answer, and so the truth about each local one; the system itself sees only what its spot
checks buy.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from apprentice.confidence.correlation import Estimate, Tally, chance
from apprentice.confidence.settings import TrustSettings
from apprentice.evaluators import Evaluator

__all__ = ["Moment", "Target", "chance_of", "course", "targets"]

Figure = Literal["correlation", "local answers that differ", "answers that differ"]


@dataclass(frozen=True, slots=True)
class Moment:
    """The replay after one request, at Unix time ``at``.

    ``score`` compares what was returned with the recording; ``chance`` is its chance score where the local model
    answered, None else.
    """

    i: int
    phase: int
    asked_remote: bool
    score: float
    chance: float | None
    spend: Decimal
    spend_without: Decimal
    sampling_rate: float
    threshold: float | None
    correlation: float | None
    at: float


@dataclass(frozen=True, slots=True)
class Target:
    """What is promised: a correlation that is at least ``limit``, or a disagreement that is at most that."""

    figure: Figure
    limit: float

    @property
    def bound(self) -> str:
        """In which direction."""
        return "at least" if self.figure == "correlation" else "at most"


def targets(promise: TrustSettings) -> list[Target]:
    """What a task's thresholds promise: a disagreement, or two, where there is one; else the correlation."""
    disagreements: list[tuple[Figure, float | None]] = [
        ("local answers that differ", promise.max_disagreement),
        ("answers that differ", promise.max_disagreement_overall),
    ]
    found = [Target(figure, limit) for figure, limit in disagreements if limit is not None]
    return found or [Target("correlation", promise.graduate)]


def course(moments: Sequence[Moment], figure: Figure) -> Iterator[Estimate | None]:
    """After each request, the figure of all answers so far beside the recording; None before the first local one.

    Answers of the remote count among "answers that differ" alone, and there from the first local one on: before that,
    nothing was promised.
    """
    tally, begun = Tally(), False
    for moment in moments:
        begun = begun or moment.chance is not None
        if moment.chance is not None:
            tally.add(moment.score, moment.chance)
        elif begun and figure == "answers that differ":
            tally.add(moment.score, 0.0)
        yield tally.correlation_estimate() if figure == "correlation" else _differ(tally.agreement_estimate())


def _differ(agreement: Estimate | None) -> Estimate | None:
    if agreement is None:
        return None
    return Estimate(1.0 - agreement.value, 1.0 - agreement.high, 1.0 - agreement.low, agreement.n)


def chance_of(local: Mapping[str, Any], recorded: Sequence[Mapping[str, Any]], at: int, evaluate: Evaluator) -> float:
    """The chance score of a local answer to request ``at`` (see `confidence.correlation`).

    The recorded answers to other requests stand for both sides: most of them have no local answer.
    """
    others = [(answer, answer) for answer in [*recorded[at + 1 :], *recorded[:at]]]
    return chance(local, recorded[at], others, evaluate, random.Random(at))[0] if others else 1.0
