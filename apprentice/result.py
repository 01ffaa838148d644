"""What callers get back: the answer to a request, and the standing of a task."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from apprentice.confidence.ceiling import Ceiling
from apprentice.confidence.figures import Promise
from apprentice.confidence.forecast import Widening

__all__ = ["Result", "TaskStatus"]


@dataclass(frozen=True, slots=True)
class Result:
    """What the caller gets: the request's id, under which everything about it is recorded, and the answer."""

    id: str
    output: dict[str, Any]


@dataclass(frozen=True, slots=True)
class TaskStatus:
    """One task at one moment. What is not known yet is None.

    ``correlation`` and ``agreement`` are those of the served slice over the window in phase 3, of everything before;
    ``correlation_interval`` is their 95 % interval. ``accepted_agreement`` is that of the answers which the local model
    was trusted with since its promotion, as far as a spot check could meet them, whatever the sampling rate was; the
    ``unverified`` ones (the budget was used up, or the remote away) are in no figure of agreement.

    ``spent`` is all that was ever spent on the task, in USD: what is billed, and what may be because a call's end is
    unknown. ``held`` is what calls in flight may still cost at most.
    ``waits_for_coach`` says why the task is to be trained, if no coach is there to do it.
    """

    task: str
    phase: int
    champion: str | None
    examples: int
    comparisons: int
    correlation: float | None
    correlation_interval: tuple[float, float] | None
    agreement: float | None
    accepted_agreement: float | None
    unverified: float
    coverage: float
    threshold: float | None
    sampling_rate: float
    coaching: bool
    spent: Decimal
    held: Decimal
    training_due: str | None
    waits_for_coach: str | None
    last_alert: str | None
    promises: tuple[Promise, ...] = ()
    """What is promised of the answers, and how it turned out since the promotion."""
    sampling_floor: float = 0.0
    """What the sampling rate does not fall below."""
    ceiling: Ceiling | None = None
    """How often the remote agrees with itself, and what no student can do better than."""
    out_of_reach: str | None = None
    """A sentence that says so, where that is less than a target asks for."""
    max_bad_answers: float | None = None
    """How many bad answers a fall of agreement may cost until it is noticed; the floor follows from it."""
    campaign: float | None = None
    """The share of the served answers that is checked for now, more than agreement asks for, because a wider slice is
    then expected to come sooner by more than that costs; None if no campaign is on."""
    chosen: str | None = None
    """Who made this version the champion, and why, where a person did (`apprentice promote`, `rollback`, MLflow)."""
    why: str | None = None
    """What keeps the task from serving more, beside evidence that is still to come; None where nothing else does."""
    forecast: Widening | None = None
    """What it is expected to take until more is served; None where what was compared supports no forecast."""
    forecast_cost: Decimal | None = None
    """What the comparisons of the forecast cost at the mean price of this week's remote calls; None if unknown."""
