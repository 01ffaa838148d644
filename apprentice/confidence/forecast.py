"""How much more it takes until a wider slice is certified, and what to check at most for it.

A certificate is a matter of wealth (see ``certify``): each comparison multiplies it, and by how much on average
follows from the agreement seen so far. With L the log capital behind a size of bet lambda, and

    G = r C E[log(1 + lambda X) | served] + (S - C) E[log(1 + lambda r X) | not served yet]

its expected growth per request, where C is the share that is served, S that of the wider slice and r the sampling
rate, the slice is on average certified after about the t requests that solve

    sum over lambda of exp(L + t G) = what certifies it.

A served request is compared with probability r and counts in full, a deferred one is compared always and counts r. A
low rate makes both grow slowly, though small bets lose less to their variance: a deferred request brings about as much
at a rate of .2 as at 1. For ``Overall``, whose bets go on outside the slice, (1 - S) log(1 + lambda r epsilon) is added
to G.

Two corrections make the result a median (`measure_forecast` in benchmarks/trust.py counts how good it is). The time in
which a random walk first climbs by b is skewed (inverse Gaussian): with a drift of mu and a variance of sigma^2 its
mean t is b / mu, its squared coefficient of variation t sigma^2 / b^2, and its median about t / sqrt(1 + t sigma^2 /
b^2). And what is to be added to is also what the pace is read from, of several slices that of the most promising one,
so agreement is taken to be one standard error lower than it was seen to be. A slice that would then miss its target
gets no forecast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from apprentice.confidence.acceptance import Slices
from apprentice.confidence.certify import LAMBDAS

__all__ = ["Widening", "widenings", "worthwhile"]

LEAST_WEIGHT = 20.0


class Pace(NamedTuple):
    """Growth of a log capital per request: its mean, and its mean square, which is its variance per request."""

    mean: float
    square: float


@dataclass(frozen=True, slots=True)
class Widening:
    """A slice that is not certified yet, and what is expected to pass until it is."""

    threshold: float
    coverage: float
    """Share of the traffic in it."""
    requests: float
    comparisons: float
    """Of these, the requests that both answer: the deferred ones, and the checks."""
    checks: float
    """Of these, those that are compared by a spot check alone, and would have been served else."""


def widenings(slices: Slices, *, rate: float, served: int | None, room: float, spread: float = 1.0) -> list[Widening]:
    """What is expected of every slice larger than ``served`` (None: nothing is) at a sampling ``rate`` in (0, 1].

    Those are left out that the evidence does not support. ``room`` is the most that X can be in `certify`, the mean of
    it where it varies; ``spread`` the variance of scores in units of that of labels with the same mean, in (0, 1].
    """
    first = 0 if served is None else served + 1
    count = len(slices.thresholds)
    seen = sum(slices.weights)
    if first >= count or seen < LEAST_WEIGHT:
        return []
    weights = list(accumulate(slices.weights))
    agreed = list(accumulate(slices.agreed))
    inner, inner_agreed = (weights[first - 1], agreed[first - 1]) if first else (0.0, 0.0)
    coverage = inner / seen
    paces: list[list[Pace] | None] = []
    whole_paces: list[list[Pace] | None] = []
    limit = 0.0 if slices.overall is None else slices.overall.limit
    for k in range(first, count):
        share = weights[k] / seen
        a = _agreement(agreed[k], weights[k])
        doubt = math.sqrt(spread * a * (1.0 - a) / max(weights[k], 1.0))
        parts = (
            (rate * coverage, max(0.0, _agreement(inner_agreed, inner) - doubt), 1.0),
            (share - coverage, max(0.0, _agreement(agreed[k] - inner_agreed, weights[k] - inner) - doubt), rate),
        )
        differs = 1.0 - a + doubt
        if slices.served:
            supported = weights[k] >= LEAST_WEIGHT and differs < room
            paces.append(_pace(parts, room, spread) if supported else None)
        if slices.overall is not None:
            if share * differs < limit:
                whole_paces.append(_pace((*parts, (1.0 - share, 1.0, rate)), limit, spread))
            else:
                whole_paces.append(None)
    times = [0.0] * (count - first)
    if slices.served:
        times = _handed_on(slices, first, paces)
    if slices.overall is not None:
        needed = math.log(1.0 / slices.delta) * slices.dependence.design_effect()
        capital = slices.overall.log_capital()
        peaks = slices.overall.peaks
        latest = 0.0
        for at, pace in enumerate(whole_paces):
            if peaks[first + at] * slices.delta < 1.0:
                latest = max(latest, _until(capital[first + at], pace, needed))
            times[at] = max(times[at], latest)
    per_request = 1.0 - coverage + rate * coverage
    late = slices.look / 2.0 / per_request
    return [
        Widening(slices.thresholds[k], weights[k] / seen, t, t * per_request, t * rate * coverage)
        for k, t in enumerate((t + late for t in times), start=first)
        if t < math.inf
    ]


def worthwhile(found: Sequence[Widening], *, coverage: float, horizon: float) -> Widening | None:
    """The one of ``found`` that saves most remote answers within the next ``horizon`` requests, its checks paid for.

    ``coverage`` is what is served now. None where none saves any.
    """
    best = max(found, key=lambda one: saved(one, coverage, horizon), default=None)
    return best if best is not None and saved(best, coverage, horizon) > 0.0 else None


def saved(one: Widening, coverage: float, horizon: float) -> float:
    """Remote answers that a widening saves within ``horizon`` requests, less the checks that it costs."""
    return (horizon - one.requests) * (one.coverage - coverage) - one.checks


def _agreement(agreed: float, weight: float) -> float:
    """About the median of what it may be (Jeffreys' prior), which errs to either side alike; 1 of nothing."""
    return (agreed + 1.0 / 6.0) / (weight + 1.0 / 3.0) if weight > 0.0 else 1.0


def _pace(parts: Sequence[tuple[float, float, float]], room: float, spread: float) -> list[Pace]:
    """Growth of the log capital behind each size of bet, per request, of parts (how often, agreement, weight)."""
    pace = [Pace(0.0, 0.0)] * len(LAMBDAS)
    for often, agreement, weight in parts:
        if often <= 0.0:
            continue
        # Scores of 1 and of 1 - gap have this mean and variance.
        ones = spread * agreement / (spread * agreement + 1.0 - agreement)
        gap = (1.0 - agreement) / (1.0 - ones) if ones < 1.0 else 0.0
        up, down = weight * room, weight * (room - gap)
        for at, size in enumerate(LAMBDAS):
            win, loss = math.log1p(size * up), math.log1p(size * down)
            mean, square = pace[at]
            pace[at] = Pace(
                mean + often * (ones * win + (1.0 - ones) * loss),
                square + often * (ones * win * win + (1.0 - ones) * loss * loss),
            )
    return pace


def _until(capital: Sequence[float], pace: Sequence[Pace] | None, needed: float) -> float:
    """The median of the t at which log sum exp(capital + t pace) reaches ``needed``; infinite where it does not."""
    if pace is None or needed == math.inf:
        return math.inf
    t = min(
        ((needed - held) / one.mean for held, one in zip(capital, pace, strict=True) if one.mean > 0.0),
        default=math.inf,
    )
    if t <= 0.0 or t == math.inf:
        return max(t, 0.0)
    # The function is convex, so from the right Newton's method stays there. Four steps are exact to a hundredth.
    to_go = needed - _worth(capital, pace)[0]
    if to_go <= 0.0:
        return 0.0
    variance = 0.0
    for _ in range(4):
        worth, slope, variance = _worth([held + t * one.mean for held, one in zip(capital, pace, strict=True)], pace)
        if slope <= 0.0:
            break
        t -= (worth - needed) / slope
    return t / math.sqrt(1.0 + t * variance / (to_go * to_go)) if t > 0.0 else 0.0


def _worth(logs: Sequence[float], pace: Sequence[Pace]) -> tuple[float, float, float]:
    """(log of the capital behind all sizes of bet, its growth per request, the variance of that)."""
    most = max(logs)
    parts = [math.exp(one - most) for one in logs]
    total = sum(parts)
    slope = sum(part * one.mean for part, one in zip(parts, pace, strict=True)) / total
    return most + math.log(total), slope, sum(part * one.square for part, one in zip(parts, pace, strict=True)) / total


def _handed_on(slices: Slices, first: int, paces: Sequence[Sequence[Pace] | None]) -> list[float]:
    """When each slice from ``first`` on is certified by the bets on what is served: the share of one goes to the next.

    A slice is certified by its own share of the error, or later with that of those before it.
    """
    needed = slices.needed()
    effect = slices.dependence.design_effect()
    sums = list(accumulate(slices.bands, _plus))
    times: list[float] = []
    passed, since = 0.0, 0.0
    for k, pace in enumerate(paces, start=first):
        if slices.peaks[k] >= needed[k]:
            times.append(0.0)
            continue
        capital = _plus(slices.bases[k], sums[k])
        share = 1.0 / (needed[k] * slices.delta) if needed[k] < math.inf else 0.0
        t = _until(capital, pace, effect * math.log(needed[k]) if share else math.inf)
        if passed and t > since:
            t = min(t, max(since, _until(capital, pace, -effect * math.log((share + passed) * slices.delta))))
        times.append(t)
        # What it holds goes on when it is certified; if it never is, it keeps it.
        if t < math.inf:
            passed, since = share + passed, max(t, since if passed else 0.0)
        else:
            passed = 0.0
    return times


def _plus(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a + b for a, b in zip(one, other, strict=True)]
