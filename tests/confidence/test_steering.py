"""Coaching and emergency: which limit, how sure, how soon, and when it is over."""

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.confidence.drift import Detector, expected_delay
from apprentice.confidence.settings import TrustSettings
from apprentice.confidence.steering import Limits, Steering, Turn, least_rate, steer, tolerated
from apprentice.confidence.trust import Trust
from apprentice.confidence.window import Seen, ServedWindow
from benchmarks.trust import (
    Checks,
    Labels,
    measure_bad_answers,
    measure_false_turns,
    measure_reaction,
    run_length,
    tail_bound,
)
from tests.confidence.test_trust import World

CORRELATION = TrustSettings()
DISAGREEMENT = TrustSettings(max_disagreement=0.05)
OVERALL = TrustSettings(max_disagreement_overall=0.05)


def seen(score: float, chance: float = 1 / 7) -> Seen:
    return Seen(1.0, score, chance, 1.0, [], [])


class Slice:
    """A served slice without the rest of the trust: its window, its limits, and whether it is in coaching."""

    def __init__(self, settings: TrustSettings, coverage: float = 1.0) -> None:
        self.settings = settings
        self.coverage = coverage
        self.window = ServedWindow(settings.window_size)
        self.limits = Limits(settings.arl)
        self.coaching = False

    def add(self, *checks: Seen) -> list[Steering]:
        """The changes of course that these bring."""
        found = []
        for check in checks:
            self.window.add(check)
            self.limits.add(check, self.settings, self.coverage)
            steering = steer(
                self.settings,
                self.window,
                self.limits,
                rate=1.0,
                coaching=self.coaching,
                alarmed=False,
                coverage=self.coverage,
            )
            if steering.turn is not None:
                found.append(steering)
                self.coaching = steering.turn is Turn.COACHING
        return found


@given(
    promise=st.floats(0.001, 0.999),
    thresholds=st.lists(st.floats(-0.5, 1.0), min_size=3, max_size=3).map(sorted),
    coverage=st.floats(0.01, 1.0),
)
def test_the_limits_lie_between_what_is_promised_and_everything(promise, thresholds, coverage):
    """In the order of their thresholds, whatever these are; for all answers through the share that is served."""
    emergency, trigger, graduate = thresholds
    settings = TrustSettings(graduate, trigger, emergency, max_disagreement=promise)
    at_trigger, at_emergency = tolerated(settings, trigger), tolerated(settings, emergency)
    assert at_trigger is not None
    assert at_emergency is not None
    assert promise * (1 - 1e-12) <= at_trigger <= at_emergency < 1.0
    both = replace(settings, max_disagreement_overall=promise * coverage / 2.0)
    halved = tolerated(both, trigger, coverage)
    assert halved == pytest.approx(tolerated(replace(settings, max_disagreement=promise / 2.0), trigger))


def test_the_limits_by_default():
    """Twice and 3.3 times what is promised; a correlation is its own limit; what cannot be broken has none below 1."""
    assert tolerated(DISAGREEMENT, 0.7) == pytest.approx(0.1)
    assert tolerated(DISAGREEMENT, 0.5) == pytest.approx(1 / 6)
    assert tolerated(OVERALL, 0.7, 0.5) == pytest.approx(0.2)
    assert tolerated(OVERALL, 0.7, 0.04) >= 1.0
    assert tolerated(CORRELATION, 0.7) is None


@pytest.mark.parametrize(
    ("frequencies", "rho", "settings"),
    [
        ([95.0, 5.0], 0.93, CORRELATION),
        ([1.0] * 7, 0.71, replace(CORRELATION, graduate=0.72)),
        ([97.0, 3.0], 0.656, DISAGREEMENT),
        ([99.0, 1.0], 0.596, DISAGREEMENT),
    ],
)
def test_no_chance_finding_brings_coaching_or_an_emergency(frequencies, rho, settings):
    """Slices on the right side of both limits: at most .1 in 1,000 checks of each, however much estimates vary."""
    checks = 30_000
    coachings, emergencies = measure_false_turns(frequencies, rho, settings, 30, checks // 30)
    # Each is at most one in 10,000 checks, so at most 3 of these 30 streams have one on average.
    assert coachings * checks / 1000 <= tail_bound(30, 0.1)
    assert emergencies * checks / 1000 <= tail_bound(30, 0.1)


@pytest.mark.parametrize(
    ("frequencies", "settings", "first", "emergency"),
    [([1.0] * 7, CORRELATION, 15, 50), ([1.0] * 2, CORRELATION, 25, 100), ([1.0] * 7, DISAGREEMENT, 12, 25)],
)
def test_a_collapse_is_answered_soon(frequencies, settings, first, emergency):
    """From .97 to no correlation at all: checks to the first reaction, and until the remote has everything again."""
    reacted, handed_over = measure_reaction(frequencies, 0.97, 0.0, settings, 15)
    assert reacted <= first
    assert handed_over <= emergency


def test_what_lies_between_the_promise_and_the_limit_is_the_guards():
    """.09 differ where .05 may: a shift, training due, and neither coaching nor an emergency."""
    world = World(0.99, DISAGREEMENT)
    world.promote(seed=300)
    world.requests(500)
    world.agreement = 0.91
    world.requests(4000)
    kinds = {kind.value for kind in world.kinds()}
    assert kinds & {"shift", "drift"}
    assert not kinds & {"coaching", "emergency"}


def test_answers_that_hardly_vary_are_not_checked_for_it():
    """98 % of the answers are one label and .01 differ, so the correlation is low: the rate falls all the same."""
    check = Checks([98.0, 2.0], random.Random(1))
    rho = Labels([98.0, 2.0], random.Random(0)).rho(0.99)
    rates = {}
    for name, settings in (("promised", DISAGREEMENT), ("correlation", CORRELATION)):
        window = check.window(rho)
        rate = 1.0
        for _ in range(300):
            window.add(check.one(rho))
            rate = steer(
                settings, window, Limits(settings.arl), rate=rate, coaching=False, alarmed=False, coverage=1.0
            ).rate
        rates[name] = rate
    assert rates["promised"] < 0.1
    assert rates["correlation"] > 0.5


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        (CORRELATION, {"least_correlation": 0.7}),
        (DISAGREEMENT, {"least_agreement": 0.9}),
        (OVERALL, {"least_agreement": 0.9}),
    ],
)
def test_what_is_told_is_what_was_seen_since_it_began(settings, limit):
    """100 good checks, then two in five differ: the evidence is that of these, and what it was held against."""
    served = Slice(settings)
    assert served.add(*[seen(1.0)] * 100) == []
    told = served.add(*[seen(float(i % 5 > 1)) for i in range(600)])[0]
    assert told.turn is Turn.COACHING
    assert told.limit == {**limit, "mean_checks_to_false_alarm": 10_000}
    assert told.evidence["agreement"] == pytest.approx(0.6, abs=0.07)
    assert told.evidence["correlation"] == pytest.approx(1 - 0.4 * 7 / 6, abs=0.08)
    assert told.evidence["comparisons"] < 100


@pytest.mark.parametrize("settings", [CORRELATION, DISAGREEMENT])
def test_coaching_ends_when_enough_good_ones_came(settings):
    """Not before `min_evidence` of them, not while the window is barely better than the limit, and then told once."""
    served = Slice(settings)
    bad = [seen(float(i % 5 > 1)) for i in range(600)]
    while not served.coaching:
        (check, *bad) = bad
        served.add(check)
    assert served.limits.since == 0
    least = settings.min_evidence - 1
    assert served.add(*[seen(1.0)] * least) == []
    told = served.add(*[seen(1.0)] * 200)
    assert [one.turn for one in told] == [Turn.RECOVERED]
    assert told[0].evidence["comparisons"] == served.settings.window_size


def test_coaching_lasts_while_its_detector_still_speaks():
    """A slice that stays beyond the limit is told of once, however long, and evidence is counted anew each time."""
    served = Slice(replace(DISAGREEMENT, emergency_threshold=-5.0))
    told = served.add(*[seen(float(i % 5 > 0)) for i in range(3000)])
    assert [one.turn for one in told] == [Turn.COACHING]
    assert served.limits.since < 1000


def test_a_state_from_before_there_were_limits():
    """It loads with fresh detectors and is otherwise what it was; one with them comes back whole, at today's ARL."""
    world = World(0.98, DISAGREEMENT)
    world.promote(seed=300)
    world.requests(600)
    assert world.trust.limits.since > 0
    text = world.trust.dumps()
    assert Trust.loads(text, DISAGREEMENT).dumps() == text
    loaded = Trust.loads(text, replace(DISAGREEMENT, arl=500)).limits
    assert loaded.coaching.arl == loaded.emergency.arl == 500
    assert loaded.coaching.sums == pytest.approx(world.trust.limits.coaching.sums, rel=1e-6)
    old = json.loads(text)
    del old["limits"]
    fresh = json.loads(Trust.loads(json.dumps(old), DISAGREEMENT).dumps())
    assert fresh.pop("limits") == Limits(DISAGREEMENT.arl).dump()
    assert fresh == old


def test_a_new_certificate_begins_with_fresh_limits():
    """What was gathered against the slice before an alarm is not held against what is certified after it."""
    world = World(0.99, DISAGREEMENT)
    world.promote(seed=300)
    world.requests(500)
    world.agreement = 0.9
    while not world.trust.alarmed:
        world.requests(1)
    world.agreement = 1.0
    while world.trust.alarmed:
        world.requests(1)
    assert world.trust.limits.since == 0
    assert world.trust.limits.coaching.value == 0.0


@pytest.mark.parametrize(("level", "fall"), [(0.8, 0.1), (0.9, 0.05), (0.95, 0.1), (0.98, 0.2)])
def test_the_expected_delay_is_that_of_the_detector(level: float, fall: float):
    """Not shorter than the simulated mean, and not half as long again."""
    draw = random.Random(21)
    simulated = sum(run_length(Detector(level, 10_000), level - fall, draw, 20_000) for _ in range(150)) / 150
    assert 0.9 <= expected_delay(level, fall, 10_000) / simulated <= 1.5


@given(level=st.floats(0.0, 0.999), most=st.floats(0.1, 1e6), floor=st.floats(0.001, 1.0))
def test_the_floor_of_a_risk_budget(level: float, most: float, floor: float):
    """A rate, not below the configured floor; a larger budget never asks for more, and none asks for nothing."""
    settings = replace(DISAGREEMENT, min_floor=floor)
    spent = least_rate(replace(settings, max_bad_answers=most), level)
    assert floor <= spent <= 1.0
    assert least_rate(replace(settings, max_bad_answers=2.0 * most), level) <= spent
    assert least_rate(settings, level) == floor
    assert least_rate(replace(settings, max_bad_answers=most), None) == floor


def test_a_fall_costs_about_its_budget():
    """.97 falls by .05: 331 bad answers without a budget; with one of 60 no more than a third above it."""
    cost, rate = measure_bad_answers(60.0, 0.05, 25)
    assert 30.0 < cost <= 80.0
    assert 0.15 < rate < 0.3


def test_a_rate_stays_at_its_floor():
    """The rate of a served slice settles where the budget says, and the figures show it."""
    settings = replace(DISAGREEMENT, max_bad_answers=60.0)
    world = World(0.99, settings)
    world.promote(seed=300)
    world.requests(1500)
    floor = world.trust.figures().sampling_floor
    assert floor == least_rate(settings, world.trust.guard.detector.level)
    assert floor > 0.1
    assert world.trust.policy_numbers.sampling_rate >= floor
    assert Trust.loads(world.trust.dumps(), settings).figures().sampling_floor == pytest.approx(floor)
