"""Asking the evaluator for all that a comparison needs, before the state is locked.

The evaluator is somebody else's code and may be slow, so it is asked here, on the `Basis` that the state had a moment
ago; ``Trust.take`` only counts what comes out.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from apprentice.confidence.correlation import CHANCE_DRAWS, chance
from apprentice.confidence.settings import TrustSettings
from apprentice.errors import EvaluatorError
from apprentice.evaluators import Evaluator

__all__ = ["Basis", "Chance", "Comparison", "Pending", "Seed", "Stale", "Weighed", "enough", "weigh", "weigh_seed"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One request answered by both.

    ``probability`` is that with which the remote was asked, given everything known then: 1.0 in shadow and for a
    deferred request, the sampling rate for one above the threshold. ``sampling_rate`` is the rate at that moment.
    ``served``: the local answer was above the threshold in phase 3, so without the spot check it would have been
    returned. ``score`` is None where the evaluator failed; the comparison is then counted and bets on nothing.
    ``group`` is that of the input (see ``groups``), "" where it is not known to repeat any.
    """

    id: str
    score: float | None
    parts: Mapping[str, float]
    confidence: float
    local: Any
    remote: Any
    probability: float = 1.0
    sampling_rate: float = 1.0
    served: bool = False
    seeded: bool = False
    group: str = ""


class Pending(NamedTuple):
    """One comparison waiting for the thresholds and for other answers to draw chance scores from."""

    confidence: float
    score: float
    weight: float
    parts: dict[str, float]
    local: Any
    remote: Any
    group: str = ""


class Chance(NamedTuple):
    """The chance score of a comparison, and of each of its parts."""

    score: float
    parts: Mapping[str, float]


class Stale(Exception):
    """The state is no longer the one that a comparison was weighed for: weigh it again on its new `Trust.basis`."""


@dataclass(frozen=True, slots=True)
class Basis:
    """What chance scores are drawn from at one moment. It shares nothing that changes with the state."""

    waiting: Sequence[Pending] | None
    """The comparisons that wait for thresholds; None once there are some."""
    enough: int
    """How many set the thresholds."""
    window: int
    reference: Sequence[tuple[Any, Any]]


@dataclass(frozen=True, slots=True)
class Weighed:
    """A comparison with all that the evaluator had to say for it."""

    comparison: Comparison
    pending: Pending | None
    """None where it has no score."""
    chance: Chance | str | None = None
    """Once there are thresholds; a text is why the evaluator could not tell."""
    opening: Sequence[tuple[Pending, Chance | str]] | None = None
    """While there are none: this comparison and those that waited, where together they are enough; else empty."""


@dataclass(frozen=True, slots=True)
class Seed:
    """Held-out comparisons of a new version, with all that the evaluator had to say for them."""

    count: int
    waiting: Sequence[Pending]
    opening: Sequence[tuple[Pending, Chance | str]]


def weigh(
    comparison: Comparison,
    basis: Basis,
    evaluate: Evaluator,
    draw: random.Random,
    *,
    opening_draws: int = CHANCE_DRAWS,
) -> Weighed:
    """Ask the evaluator for all that ``comparison`` needs: 2 * CHANCE_DRAWS evaluations, and for one that completes the
    warm-up 2 * ``opening_draws`` for each that waited. Fewer draws make a chance score less exact and no more biased.

    Where the evaluator raises EvaluatorError the comparison counts as unscored.
    """
    pending = _admitted(comparison, evaluate)
    if pending is None:
        return Weighed(comparison, None)
    if basis.waiting is not None:
        waiting = [*basis.waiting, pending]
        complete = len(waiting) >= basis.enough
        return Weighed(
            comparison,
            pending,
            opening=_among(waiting, basis.window, evaluate, draw, opening_draws) if complete else (),
        )
    try:
        return Weighed(
            comparison, pending, Chance(*chance(pending.local, pending.remote, basis.reference, evaluate, draw))
        )
    except EvaluatorError as error:
        return Weighed(comparison, pending, str(error))


def weigh_seed(
    comparisons: Sequence[Comparison], settings: TrustSettings, evaluate: Evaluator, draw: random.Random
) -> Seed:
    """Ask the evaluator for all that held-out comparisons need; see `weigh`."""
    waiting = [pending for c in comparisons if (pending := _admitted(c, evaluate)) is not None]
    complete = len(waiting) >= enough(settings)
    return Seed(len(comparisons), waiting, _among(waiting, settings.window_size, evaluate, draw) if complete else ())


def enough(settings: TrustSettings) -> int:
    """How many comparisons set the thresholds."""
    return settings.warm_up if settings.deferral else 10


def _admitted(comparison: Comparison, evaluate: Evaluator) -> Pending | None:
    score = comparison.score
    if score is None or not 0.0 <= score <= 1.0:
        return None
    local, remote = evaluate.project(comparison.local), evaluate.project(comparison.remote)
    weight = 1.0
    if comparison.probability > 0.0:
        weight = min(1.0, max(0.0, comparison.sampling_rate / comparison.probability))
    # Not rounded: a threshold is one of these confidences, and real answers are held against it digit for digit.
    return Pending(comparison.confidence, score, weight, dict(comparison.parts), local, remote, comparison.group)


def _among(
    waiting: Sequence[Pending], window: int, evaluate: Evaluator, draw: random.Random, draws: int = CHANCE_DRAWS
) -> list[tuple[Pending, Chance | str]]:
    """Each with its chance score among the others."""
    answers = [(pending.local, pending.remote) for pending in waiting] * 2
    span = min(len(waiting) - 1, window)
    weighed: list[tuple[Pending, Chance | str]] = []
    for i, pending in enumerate(waiting):
        try:
            others = answers[i + 1 : i + 1 + span]
            weighed.append((pending, Chance(*chance(pending.local, pending.remote, others, evaluate, draw, draws))))
        except EvaluatorError as error:
            weighed.append((pending, str(error)))
    return weighed
