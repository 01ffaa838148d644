"""What the last checks of the served slice ask for: coaching, a retreat, and how often to check.

``steer`` decides and ``Trust`` carries it out: it changes the phase, tells the event, and moves the rate.

Coaching and the emergency each have a limit, and neither is declared by an estimate: a Shiryaev-Roberts e-detector
(see ``drift``) of its own has to say that the served slice is beyond it. Which limit depends on what is promised.

- Where a disagreement is promised, the limit is a disagreement: the one that stands to what is promised as
  1 - ``coaching_trigger`` (or ``emergency_threshold``) stands to 1 - ``graduate``, and at most halfway from what is
  promised to 1. That less was seen than promised, or than seen before, is the guard's to find.
- Else it is ``coaching_trigger`` or ``emergency_threshold`` itself, as a correlation.

With t the limit, s a score and c its chance score, the detectors bet on

    y = (1 - s) / t' - 1              for a disagreement of at most t'
    y = (1 - s) / (1 - t) - (1 - c)   for a correlation of at least t; see ``certify`` for why its mean tells

which is at least -1, and of a mean of at most 0 on this side of the limit. So the mean number of checks to a false
alarm of either is at least ``arl``. Within the served slice all comparisons are bought with one probability, and count
alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from apprentice.confidence.correlation import Tally
from apprentice.confidence.drift import Bets, expected_delay, name_change
from apprentice.confidence.sampling import next_rate, target_rate
from apprentice.confidence.settings import TrustSettings
from apprentice.confidence.window import Seen, ServedWindow

__all__ = ["Limits", "Steering", "Turn", "least_rate", "steer", "tolerated"]


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


def _promise(settings: TrustSettings, coverage: float) -> float | None:
    """The share of the served answers that may differ; None where only a correlation is promised.

    1 or more where all of a served slice of this ``coverage`` may differ.
    """
    promises = []
    if settings.max_disagreement is not None:
        promises.append(settings.max_disagreement)
    if settings.max_disagreement_overall is not None:
        promises.append(settings.max_disagreement_overall / max(coverage, 1e-9))
    return min(promises, default=None)


def _per_promise(settings: TrustSettings, threshold: float) -> float:
    """How many times what is promised ``threshold`` allows to differ; at least 1."""
    room = max(1.0 - settings.graduate, 0.01)
    return max(1.0, (1.0 - threshold) / room)


def tolerated(settings: TrustSettings, threshold: float, coverage: float = 1.0) -> float | None:
    """The disagreement of the served slice that ``threshold``, a correlation, stands for; None where it is itself.

    ``coverage`` is the share of the traffic that is served. 1 or more where nothing can be too much.
    """
    promise = _promise(settings, coverage)
    if promise is None:
        return None
    return min(promise * _per_promise(settings, threshold), (1.0 + promise) / 2.0)


def _loss(seen: Seen, threshold: float, most: float | None) -> float:
    if most is not None:
        return (1.0 - seen.score) / max(most, 1e-6) - 1.0
    room = max(1.0 - threshold, 1e-6)
    return (1.0 - seen.score) / room - (1.0 - seen.chance)


# The falls of agreement that `max_bad_answers` is spent on.
_FALLS = (0.05, 0.10, 0.20)


def least_rate(settings: TrustSettings, level: float | None) -> float:
    """The smallest sampling rate, for a guard that holds the served slice to ``level``; None where there is none yet.

    A fall by d is noticed after D(d) checks (`expected_delay`), and so after D / r answers at a rate r; the D of them
    that were checked are the remote's. d D (1 / r - 1) = B then gives the rate that costs B bad answers more than
    before, and the largest over falls of .05, .10 and .20 counts. Not below ``min_floor``.
    """
    most = settings.max_bad_answers
    if most is None or level is None:
        return settings.min_floor
    costs = [fall * expected_delay(level, fall, settings.arl) for fall in _FALLS if fall < level]
    return max([settings.min_floor, *(cost / (most + cost) for cost in costs)])


class Limits:
    """A detector for each of the two limits, and how much was seen since coaching was last declared."""

    __slots__ = ("coaching", "emergency", "since")

    def __init__(self, arl: float) -> None:
        self.coaching = Bets(arl)
        self.emergency = Bets(arl)
        self.since = 0

    def add(self, seen: Seen, settings: TrustSettings, coverage: float = 1.0) -> None:
        """Count one comparison of the served slice, which is ``coverage`` of the traffic."""
        for bets, threshold in (
            (self.coaching, settings.coaching_trigger),
            (self.emergency, settings.emergency_threshold),
        ):
            bets.bet(_loss(seen, threshold, tolerated(settings, threshold, coverage)))
        self.since += 1

    def dump(self) -> dict[str, Any]:
        """JSON: the whole state."""
        return {
            "coaching": [float(f"{held:.7g}") for held in self.coaching.sums],
            "emergency": [float(f"{held:.7g}") for held in self.emergency.sums],
            "since": self.since,
        }

    @classmethod
    def load(cls, data: Mapping[str, Any] | None, arl: float) -> Limits:
        """What ``dump`` gave, held to today's ``arl``; fresh ones for None."""
        limits = cls(arl)
        if data is not None:
            limits.coaching = Bets(arl, data["coaching"])
            limits.emergency = Bets(arl, data["emergency"])
            limits.since = data["since"]
        return limits


def steer(
    settings: TrustSettings,
    window: ServedWindow,
    limits: Limits,
    *,
    rate: float,
    coaching: bool,
    alarmed: bool,
    coverage: float = 1.0,
    level: float | None = None,
) -> Steering:
    """Decide from the served slice's ``window`` and ``limits``, while serving ``coverage`` of the traffic.

    ``rate`` is the sampling rate so far; ``coaching`` and ``alarmed`` say what is under way. Once the guard alarmed
    only a new certificate ends coaching. Where only all answers together have a target, the others, which come from
    the remote and agree, count with those that are served. ``level`` is the guard's, see `least_rate`. A detector that
    speaks for coaching begins anew.
    """
    tally = window.tally
    rho = _correlation(settings, tally, coverage)
    if rho is None:
        return Steering(1.0)
    if limits.emergency.alarms:
        evidence, limit = _because(settings, settings.emergency_threshold, window.rows, coverage)
        return Steering(1.0, Turn.EMERGENCY, evidence, limit)
    trigger = settings.coaching_trigger
    most = tolerated(settings, trigger, coverage)
    # How many points of correlation a point of disagreement is worth, where the limit is a disagreement.
    slope = 0.0 if most is None else (1.0 - trigger) / most
    standing = rho if most is None else 1.0 - slope * tally.d / tally.w
    turn: Turn | None = None
    evidence, limit = {}, {}
    if limits.coaching.alarms:
        limits.coaching, limits.since = Bets(settings.arl), 0
        if not coaching:
            coaching, turn = True, Turn.COACHING
            evidence, limit = _because(settings, trigger, window.rows, coverage)
    elif (
        coaching and not alarmed and limits.since >= settings.min_evidence and standing >= trigger + settings.hysteresis
    ):
        coaching, turn = False, Turn.RECOVERED
        evidence = _evidence(settings, tally, coverage)
    target = 1.0
    if not (alarmed or coaching):
        drop = window.falling(settings.trend_sensitivity)
        target = _rate(settings, rho, drop)
        if most is not None:
            # Answers that hardly vary correlate badly however rarely they differ, and what is promised is the latter.
            target = min(target, _rate(settings, standing, drop * slope * tally.u / tally.w))
        target = max(target, least_rate(settings, level))
    return Steering(next_rate(rate, target, max_fall=settings.max_fall), turn, evidence, limit)


def _rate(settings: TrustSettings, standing: float, drop: float) -> float:
    return target_rate(
        settings.decay_function,
        standing,
        trigger=settings.coaching_trigger,
        floor=settings.min_floor,
        drop=drop,
        options=settings.decay_options,
    )


def _correlation(settings: TrustSettings, tally: Tally, coverage: float) -> float | None:
    rho = tally.correlation
    return None if rho is None else 1.0 - _counting(settings, coverage) * (1.0 - rho)


def _counting(settings: TrustSettings, coverage: float) -> float:
    """The share of the answers with a target that come from the local model."""
    return 1.0 if settings.bounds_served else coverage


def _evidence(settings: TrustSettings, tally: Tally, coverage: float) -> dict[str, Any]:
    rho, agreement = _correlation(settings, tally, coverage), tally.agreement
    return {
        "correlation": None if rho is None else round(rho, 4),
        "agreement": None if agreement is None else round(1.0 - _counting(settings, coverage) * (1.0 - agreement), 4),
        "comparisons": round(tally.n),
    }


def _because(
    settings: TrustSettings, threshold: float, rows: Sequence[Seen], coverage: float
) -> tuple[dict[str, Any], dict[str, float]]:
    """What was seen since it seems to have begun, and the limit that it is beyond.

    The limit, like the agreement in the evidence, is that of all answers where only these have a target.
    """
    most = tolerated(settings, threshold, coverage)
    began = name_change([-_loss(seen, threshold, most) for seen in rows], 0.0).began
    since = Tally()
    for seen in rows[-began:]:
        since.add(seen.score, seen.chance)
    if most is None:
        limit = {"least_correlation": threshold}
    else:
        limit = {"least_agreement": round(1.0 - _counting(settings, coverage) * most, 4)}
    return _evidence(settings, since, coverage), {**limit, "mean_checks_to_false_alarm": settings.arl}
