"""A campaign pays for itself: it is begun where a wider slice comes sooner by more than it costs, and not else."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from apprentice.confidence.campaign import LEAST, RATES, campaign_rate
from apprentice.confidence.forecast import Widening
from apprentice.confidence.phases import Phase, Signal
from apprentice.confidence.settings import TrustSettings
from apprentice.confidence.trust import Trust
from apprentice.confidence.watch import LocalObservation
from apprentice.confidence.weighing import Comparison
from benchmarks.trust import same

SETTINGS = TrustSettings(max_disagreement=0.1)


def takes(comparisons: float, coverage: float, *, served: float = 0.2) -> Callable[[float], Sequence[Widening]]:
    """A wider slice after so many comparisons: those that are served and checked count in full, deferred ones by the
    rate, as they bet."""

    def expected(rate: float) -> list[Widening]:
        requests = comparisons / rate
        return [Widening(0.0, coverage, requests, requests * (1.0 - served + rate * served), requests * rate * served)]

    return expected


def test_the_rate_is_raised_where_that_saves_more_than_it_costs() -> None:
    """300 comparisons for 60 points more: at a rate of .02 they take 15,000 requests, at 1 they cost 60 checks."""
    assert campaign_rate(takes(300, 0.8), coverage=0.2, horizon=2000, rate=0.02) == 1.0


def test_what_lies_beyond_the_horizon_is_not_believed() -> None:
    """As many comparisons as there were requests, and more: whatever the rate, it comes too late."""
    assert campaign_rate(takes(3000, 0.8), coverage=0.2, horizon=2000, rate=0.02) == 0.0


def test_a_gain_that_is_not_worth_its_checks_is_left() -> None:
    """A hundredth of the traffic more, for checks of nearly all of it."""
    assert campaign_rate(takes(300, 0.91, served=0.9), coverage=0.9, horizon=1000, rate=0.2) == 0.0


def test_nothing_is_raised_where_everything_is_checked_or_nothing_expected() -> None:
    """No rate is above 1, and no forecast supports no campaign."""
    assert campaign_rate(takes(300, 0.8), coverage=0.2, horizon=2000, rate=1.0) == 0.0
    assert campaign_rate(lambda _: [], coverage=0.2, horizon=2000, rate=0.02) == 0.0


def test_it_is_the_best_of_the_rates_recomputed() -> None:
    """By the definition: what is saved within the horizon, less the checks."""
    expected, horizon, coverage = takes(400, 0.5, served=0.4), 3000.0, 0.4

    def worth(rate: float) -> float:
        (one,) = expected(rate)
        return (horizon - one.requests) * (one.coverage - coverage) - one.checks

    best = max((rate for rate in RATES if rate > 0.05), key=worth)
    assert worth(best) > worth(0.05) + LEAST
    assert campaign_rate(expected, coverage=coverage, horizon=horizon, rate=0.05) == best


class Task:
    """A task whose confidences are honest: an answer of confidence g agrees with probability g."""

    def __init__(self, settings: TrustSettings, seed: int, skill: float = 12.0) -> None:
        self.draw = random.Random(seed)
        self.skill = skill
        self.trust = Trust.fresh(settings)
        self.asked = self.requests = 0
        held_out = [self.compared(self.draw.betavariate(skill, 1), 1.0, 1.0, served=False) for _ in range(150)]
        self.trust.promoted(held_out, same, self.draw)

    def compared(self, g: float, probability: float, rate: float, *, served: bool) -> Comparison:
        remote = self.draw.randrange(7)
        local = remote if self.draw.random() < g else (remote + 1) % 7
        return Comparison("", float(local == remote), {}, g, local, remote, probability, rate, served)

    def run(self, requests: int) -> None:
        for _ in range(requests):
            g = self.draw.betavariate(self.skill, 1)
            phase, threshold, rate = self.trust.policy_numbers
            served = phase is Phase.SERVE and threshold is not None and g >= threshold
            self.requests += 1
            self.trust.watch([LocalObservation(g, served=served)])
            if served and self.draw.random() >= rate:
                continue
            self.asked += 1
            self.trust.observe(self.compared(g, rate if served else 1.0, rate, served=served), same, self.draw)


def test_campaigns_spare_remote_answers() -> None:
    """Over 4,000 requests the remote answers fewer with them than without, on the mean of several tasks."""

    def asked(*, campaigns: bool) -> float:
        settings = TrustSettings(max_disagreement_overall=0.05, campaigns=campaigns)
        tasks = [Task(settings, seed, skill=30.0) for seed in range(4)]
        for task in tasks:
            task.run(4000)
        return statistics.fmean(task.asked / task.requests for task in tasks)

    assert asked(campaigns=True) < 0.92 * asked(campaigns=False)


def test_a_campaign_is_told_kept_and_ends() -> None:
    """It shows in the rate and the figures, survives JSON, and is over when an alarm or a demotion takes its place."""
    task = Task(SETTINGS, 1)
    while task.trust.figures().campaign is None and task.requests < 3000:
        task.run(50)
    figures = task.trust.figures()
    assert figures.campaign in RATES
    assert figures.sampling_rate == figures.campaign == task.trust.policy_numbers.sampling_rate > task.trust.rate
    kept = Trust.loads(json.dumps(json.loads(task.trust.dumps())), SETTINGS)
    assert kept.policy_numbers == task.trust.policy_numbers
    older = json.loads(task.trust.dumps())
    del older["campaign"]
    assert Trust.loads(json.dumps(older), SETTINGS).policy_numbers.sampling_rate == task.trust.rate
    kept._to_shadow(Signal.EMERGENCY, {})
    assert kept.figures().campaign is None
    assert kept.policy_numbers.sampling_rate == 1.0
    assert Trust.loads(task.trust.dumps(), replace(SETTINGS, max_disagreement=0.05)).campaign == 0.0


@pytest.mark.parametrize("trouble", ["alarmed", "coaching"])
def test_in_trouble_there_is_no_campaign(trouble: str) -> None:
    """Everything is checked then, for another reason."""
    task = Task(SETTINGS, 1)
    while not task.trust.campaign and task.requests < 3000:
        task.run(50)
    assert task.trust.campaign
    setattr(task.trust, trouble, True)
    task.trust._campaign()
    assert task.trust.campaign == 0.0
