"""What the last checks of the served slice ask for: coaching, a retreat, and how often to check.

``steer`` decides and ``Trust`` carries it out: it changes the phase, tells the event, and moves the rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from apprentice.confidence.settings import TrustSettings
from apprentice.confidence.window import ServedWindow
from apprentice.sampling import next_rate, target_rate

__all__ = ["Steering", "Turn", "steer"]


class Turn(StrEnum):
    """A change of course."""

    COACHING = "coaching"
    """Check everything and train at once, while it goes on serving."""
    EMERGENCY = "emergency"
    """Serve nothing."""
    RECOVERED = "recovered"
    """Coaching ends."""


@dataclass(frozen=True, slots=True)
class Steering:
    """What to do after a comparison: the sampling ``rate``, and a change of course with the numbers behind it.

    ``evidence`` is what was seen, ``limit`` the setting that it was held against.
    """

    rate: float
    turn: Turn | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    limit: Mapping[str, float] = field(default_factory=dict)


def steer(
    settings: TrustSettings, window: ServedWindow, *, rate: float, coaching: bool, alarmed: bool, share: float = 1.0
) -> Steering:
    """Decide from the served slice's ``window``, while serving.

    ``rate`` is the sampling rate so far; ``coaching`` and ``alarmed`` say what is under way. Once the guard alarmed
    only a new certificate ends coaching. ``share`` below 1 holds all answers to the thresholds instead of the served
    ones: that share of them is served, and the others come from the remote and agree.
    """
    rho, agreement = window.tally.correlation, window.tally.agreement
    if rho is None:
        return Steering(1.0)
    rho = 1.0 - share * (1.0 - rho)
    agreement = None if agreement is None else 1.0 - share * (1.0 - agreement)
    known = len(window.rows) >= settings.min_evidence
    evidence = {
        "correlation": round(rho, 4),
        "agreement": None if agreement is None else round(agreement, 4),
        "comparisons": len(window.rows),
    }
    if known and rho < settings.emergency_threshold:
        return Steering(1.0, Turn.EMERGENCY, evidence, {"threshold": settings.emergency_threshold})
    turn, limit = None, {}
    if known and not coaching and rho < settings.coaching_trigger:
        coaching, turn = True, Turn.COACHING
        limit = {"trigger": settings.coaching_trigger}
    elif coaching and not alarmed and rho >= settings.coaching_trigger + settings.hysteresis:
        coaching, turn = False, Turn.RECOVERED
    if alarmed or coaching:
        target = 1.0
    else:
        target = target_rate(
            settings.decay_function,
            rho,
            trigger=settings.coaching_trigger,
            floor=settings.min_floor,
            drop=window.falling(settings.trend_sensitivity),
        )
    return Steering(next_rate(rate, target, max_fall=settings.max_fall), turn, evidence, limit)
