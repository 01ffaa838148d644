"""The trust of one task, from its first version to an emergency and back."""

import json
import random
from dataclasses import replace
from typing import Any

import pytest

from apprentice.confidence.phases import Phase
from apprentice.confidence.settings import TrustSettings
from apprentice.confidence.trust import Trust
from apprentice.confidence.trust_events import Event, EventKind
from apprentice.confidence.watch import LocalObservation
from apprentice.confidence.weighing import Comparison, Stale, weigh
from apprentice.errors import EvaluatorError
from apprentice.evaluators import Evaluation, build_evaluator, evaluator
from benchmarks.trust import measure_bias, same

SETTINGS = TrustSettings(max_disagreement=0.1)
LABELS = range(7)


class World:
    """A task, a local model of a given agreement (by confidence where it is a function), and all that was told."""

    def __init__(self, agreement: Any = 0.99, settings: TrustSettings = SETTINGS, seed: int = 1) -> None:
        self.agreement = agreement
        self.draw = random.Random(seed)
        self.trust = Trust.fresh(settings)
        self.told: list[Event] = []

    def answer(self) -> tuple[float, int, int]:
        g = self.draw.random()
        agreement = self.agreement(g) if callable(self.agreement) else self.agreement
        remote = self.draw.choice(LABELS)
        local = remote if self.draw.random() < agreement else (remote + 1 + self.draw.randrange(6)) % 7
        return g, local, remote

    def seeds(self, count: int) -> list[Comparison]:
        """Held-out comparisons."""
        comparisons = []
        for i in range(count):
            g, local, remote = self.answer()
            comparisons.append(Comparison(f"seed {i}", float(local == remote), {}, g, local, remote, seeded=True))
        return comparisons

    def promote(self, seed: int = 0, **options: Any) -> list[Event]:
        events = self.trust.promoted(self.seeds(seed), same, self.draw, **options)
        self.told += events
        return events

    def requests(self, count: int) -> list[Event]:
        """Live requests as the router treats them; what was told."""
        events: list[Event] = []
        for _ in range(count):
            phase, threshold, rate = self.trust.policy_numbers
            g, local, remote = self.answer()
            served = phase is Phase.SERVE and threshold is not None and g >= threshold
            events += self.trust.watch([LocalObservation(g, served=served)])
            if self.draw.random() < rate or not served:
                comparison = Comparison(
                    "live", float(local == remote), {}, g, local, remote, rate if served else 1.0, rate, served
                )
                events += self.trust.observe(comparison, same, self.draw)
        self.told += events
        return events

    def kinds(self) -> list[EventKind]:
        return [event.kind for event in self.told]


def test_without_a_version_nothing_counts():
    """In phase 1 there is nothing to trust: comparisons are ignored."""
    world = World()
    world.requests(50)
    assert world.trust.policy_numbers == (Phase.COLLECT, None, 1.0)
    assert world.trust.comparisons == 0


def test_a_good_version_shadows_then_serves():
    """1 to 2 at the promotion, 2 to 3 at the first certificate, and the rate glides down from 1."""
    world = World()
    world.promote()
    assert world.trust.policy_numbers == (Phase.SHADOW, None, 1.0)
    world.requests(300)
    assert world.trust.phase is Phase.SERVE
    assert world.trust.threshold == 0.0
    moves = [(e.evidence["before"], e.evidence["after"]) for e in world.told if e.kind is EventKind.PHASE]
    assert moves == [(1, 2), (2, 3)]
    certificate = next(e for e in world.told if e.kind is EventKind.CERTIFIED)
    assert certificate.evidence["wealth"] >= 1 / SETTINGS.delta


def test_a_good_seed_serves_at_once():
    """Enough held-out comparisons certify at the promotion: from 1 to 3 without a request in shadow."""
    world = World()
    world.promote(seed=200)
    assert world.trust.policy_numbers == (Phase.SERVE, 0.0, 1.0)


def test_many_attempts_on_the_same_seed_need_more():
    """The same seed that certifies at the first attempt does not at the thousandth."""
    world = World()
    world.promote(seed=150)
    assert world.trust.phase is Phase.SERVE
    world = World()
    world.promote(seed=150, attempts=1000)
    assert world.trust.phase is Phase.SHADOW


def test_a_bad_version_never_serves():
    """Agreement .8 against at most .10 disagreement stays in shadow."""
    world = World(0.8)
    world.promote(seed=100)
    world.requests(1500)
    assert world.trust.phase is Phase.SHADOW


def test_only_what_is_good_is_served():
    """A model that is right when sure: the served slice is truly within the target, and coverage is between."""
    world = World(lambda g: 0.995 if g > 0.6 else 0.5)
    world.promote()
    world.requests(2500)
    assert world.trust.phase is Phase.SERVE
    assert world.trust.threshold is not None
    assert 0.45 < world.trust.threshold < 0.85
    assert world.trust.coverage == pytest.approx(1.0 - world.trust.threshold, abs=0.06)


def test_the_rate_never_falls_faster_than_the_factor():
    """Comparison by comparison, through graduation, a shift and recovery."""
    world = World()
    world.promote()
    last = 1.0
    for part in (0.99, 0.7, 0.99):
        world.agreement = part
        for _ in range(500):
            world.requests(1)
            rate = world.trust.policy_numbers.sampling_rate
            assert rate >= last * (1.0 - SETTINGS.max_fall) - 1e-12
            assert rate >= SETTINGS.min_floor
            last = rate


def test_a_shift_is_noticed_and_recovered_from():
    """Good, then .7: alarm, everything checked, training due. Good again: certified anew, and told so."""
    world = World()
    world.promote()
    world.requests(2000)
    assert not {EventKind.SHIFT, EventKind.DRIFT} & set(world.kinds())
    world.agreement = 0.75
    world.requests(1500)
    assert {EventKind.SHIFT, EventKind.DRIFT} & set(world.kinds())
    assert world.trust.training_due
    assert world.trust.policy_numbers.sampling_rate == 1.0
    world.agreement = 0.99
    world.requests(800)
    assert EventKind.RECOVERED in world.kinds()
    assert not world.trust.alarmed
    assert world.trust.policy_numbers.sampling_rate < 0.5


def test_a_refused_candidate_after_an_alarm_ends_phase_3():
    """The guard alarmed and the retrained candidate did not pass: back to shadow. Without an alarm it stays."""
    world = World()
    world.promote()
    world.requests(500)
    assert world.trust.refused("not better") == []
    world.agreement = 0.8
    world.requests(1500)
    assert world.trust.alarmed
    assert [e.evidence["signal"] for e in world.trust.refused("not better")] == ["refused"]
    assert world.trust.policy_numbers == (Phase.SHADOW, None, 1.0)


def test_an_emergency_hands_everything_back():
    """Below the emergency threshold the remote answers everything; serving again takes a new certificate."""
    world = World()
    world.promote()
    world.requests(500)
    world.agreement = 0.2
    world.requests(800)
    assert EventKind.EMERGENCY in world.kinds()
    assert world.trust.policy_numbers == (Phase.SHADOW, None, 1.0)
    world.requests(500)
    assert world.trust.phase is Phase.SHADOW
    world.agreement = 0.99
    world.requests(1200)
    assert world.trust.phase is Phase.SERVE


def test_a_task_at_its_trigger_does_not_flap():
    """At a correlation right at the coaching trigger, 5,000 requests bring few changes of mind."""
    world = World(0.74, replace(SETTINGS, max_disagreement=0.3, arl=1e9))
    world.promote()
    world.requests(5000)
    assert world.kinds().count(EventKind.PHASE) <= 4
    assert world.kinds().count(EventKind.COACHING) <= 40


def test_forced_checks_run_out():
    """force(N) checks the next N requests, then the rate is what it was."""
    world = World()
    world.promote(seed=200)
    world.requests(600)
    before = world.trust.policy_numbers.sampling_rate
    assert before < 0.2
    world.trust.force(5)
    for _ in range(5):
        assert world.trust.policy_numbers.sampling_rate == 1.0
        world.requests(1)
    assert world.trust.policy_numbers.sampling_rate < 0.3


def test_unusual_traffic_is_checked_more_and_nothing_else():
    """The second watch forces checks; phase and threshold stay."""
    world = World()
    world.promote(seed=200)
    world.requests(600)
    numbers = world.trust.policy_numbers
    events = world.trust.watch([LocalObservation(0.01, valid=False) for _ in range(60)])
    assert [e.kind for e in events] == [EventKind.UNUSUAL]
    assert world.trust.policy_numbers == (numbers.phase, numbers.threshold, 1.0)


@pytest.mark.parametrize("count", [3, 30, 250, 900])
def test_through_text_at_every_moment(count: int):
    """A task whose state is written and read at every comparison ends where the other one does."""
    one, two = World(lambda g: min(1.0, 0.8 + 0.25 * g)), World(lambda g: min(1.0, 0.8 + 0.25 * g))
    one.promote(seed=20)
    two.promote(seed=20)
    for i in range(count):
        one.requests(1)
        two.requests(1)
        if i % 7 == 0:
            two.trust = Trust.loads(two.trust.dumps(), SETTINGS)
    assert two.kinds() == one.kinds()
    assert two.trust.policy_numbers.sampling_rate == pytest.approx(one.trust.policy_numbers.sampling_rate, rel=1e-3)
    assert two.trust.threshold == one.trust.threshold
    assert json.loads(two.trust.dumps())["comparisons"] == json.loads(one.trust.dumps())["comparisons"]


def test_a_new_target_discards_the_evidence():
    """A stricter target in the configuration: serving stops until it is certified."""
    world = World()
    world.promote(seed=200)
    strict = Trust.loads(world.trust.dumps(), replace(SETTINGS, max_disagreement=0.02))
    assert strict.policy_numbers == (Phase.SHADOW, None, 1.0)
    assert Trust.loads(world.trust.dumps(), SETTINGS).phase is Phase.SERVE
    world.trust = strict
    world.agreement = 1.0
    world.requests(400)
    assert world.trust.phase is Phase.SERVE


def test_nothing_yet():
    """None and empty text are a task without a local model."""
    assert Trust.loads(None, SETTINGS).policy_numbers == (Phase.COLLECT, None, 1.0)
    assert Trust.loads("", SETTINGS).figures().window_all.agreement is None


def test_an_unscored_comparison_is_kept_and_bets_on_nothing():
    """An evaluator that failed, on this comparison or on the chance draws, is counted and told."""
    world = World()
    world.promote()
    world.requests(60)
    before = world.trust.slices.dump()
    events = world.trust.observe(Comparison("x", None, {}, 0.5, 1, 2), same, world.draw)
    assert [e.kind for e in events] == [EventKind.UNSCORED]

    @evaluator
    def failing(local: Any, remote: Any) -> Evaluation:
        raise EvaluatorError("evaluator mine raised ValueError")

    assert world.trust.observe(Comparison("y", 1.0, {}, 0.5, 1, 1), failing, world.draw)[0].kind is EventKind.UNSCORED
    assert world.trust.slices.dump() == before
    assert world.trust.figures().unscored == 2


def test_figures_by_field():
    """Per field and scope: agreement and correlation with intervals."""
    draw = random.Random(2)
    evaluate = build_evaluator("structured_match", match_fields=["good", "bad"])
    trust = Trust.fresh(TrustSettings(graduate=0.4, coaching_trigger=0.2, emergency_threshold=0.0))
    trust.promoted([], evaluate, draw)
    for i in range(500):
        remote = {"good": draw.randrange(5), "bad": draw.randrange(5), "ignored": "x" * 500}
        local = {"good": remote["good"], "bad": draw.randrange(5)}
        score, parts = evaluate(local, remote)
        trust.observe(Comparison(str(i), score, parts, draw.random(), local, remote), evaluate, draw)
    figures = trust.figures()
    for scope in (figures.window_all, figures.since_all):
        good, bad = scope.fields["good"][1], scope.fields["bad"][1]
        assert good is not None
        assert bad is not None
        assert good.value == 1.0
        assert bad.low < 0.0 < bad.high
    assert "ignored" not in trust.dumps()


def test_the_state_stays_small():
    """Two fields, answers of 2 kB, a thousand comparisons: tens of kB, whatever happens."""
    draw = random.Random(3)
    for name, most in (("structured_match", 60_000), ("exact_match", 60_000)):
        evaluate = build_evaluator(name)
        trust = Trust.fresh(SETTINGS)
        trust.promoted([], evaluate, draw)
        for i in range(1000):
            remote = {"text": str(draw.random()) * 100, "n": draw.randrange(3)}
            local = dict(remote, n=draw.randrange(3))
            score, parts = evaluate(local, remote)
            trust.observe(Comparison(str(i), score, parts, draw.random(), local, remote), evaluate, draw)
            if i % 100 == 0:
                assert len(trust.dumps()) <= most


@pytest.mark.parametrize("characters", [500, 5_000, 20_000])
def test_long_answers_of_a_custom_evaluator_are_bounded(characters: int):
    """Answers that cannot be shortened leave room for fewer of them."""
    draw = random.Random(4)
    trust = Trust.fresh(SETTINGS)
    trust.promoted([], same, draw)
    for i in range(300):
        answer = {"text": str(i) + "x" * characters}
        trust.observe(Comparison(str(i), 1.0, {}, draw.random(), answer, answer), same, draw)
    assert trust.phase is Phase.SERVE
    reference = sum(len(str(pair)) for pair in trust.reference)
    assert reference <= max(80_000, 40 * 2.2 * characters)


def test_the_estimate_of_what_was_served_is_unbiased():
    """With a rate that follows the scores the bias stays within five Monte-Carlo errors."""
    bias, error, _ = measure_bias(40, 800)
    assert abs(bias) <= 5 * error


@pytest.mark.slow
def test_the_estimate_of_what_was_served_is_unbiased_in_full():
    """The same, sharp enough to see a bias of a tenth of a per cent."""
    bias, error, _ = measure_bias(1000, 2000)
    assert error < 0.001
    assert abs(bias) <= 4 * error


def test_answers_that_nobody_could_have_checked_are_not_counted_as_certified():
    """6,000 answers at an error of .30 while nothing can be checked: the figure neither sinks nor speaks for them."""
    world = World(0.98)
    world.promote(seed=300)
    world.requests(1500)
    before = world.trust.figures()
    assert before.unverified == 0
    world.trust.watch([LocalObservation(0.5, served=True, unverified=1.0)] * 6000)
    after = world.trust.figures()
    assert (after.unverified, after.accepted_agreement) == (6000, before.accepted_agreement)
    restored = Trust.loads(world.trust.dumps(), SETTINGS).figures()
    assert (restored.unverified, restored.accepted_agreement) == (6000, pytest.approx(before.accepted_agreement))


def test_a_check_without_a_score_stands_for_nobody():
    """The answers that an unscored spot check stood for leave the figure; it stays that of the others."""
    world = World(0.98)
    world.promote(seed=300)
    world.requests(1500)
    before = world.trust.accepted
    lost = Comparison("x", None, {}, 0.9, 1, 2, probability=0.05, sampling_rate=0.05, served=True)
    world.trust.observe(lost, same, world.draw)
    assert world.trust.accepted == pytest.approx(before - 20)
    assert world.trust.figures().unverified == pytest.approx(20)


@pytest.mark.parametrize("shortfall", [4e-10, 1e-12, 2e-16, 0.0])
def test_the_answers_that_set_a_threshold_reach_it(shortfall: float):
    """Confidences a hair below 1 are kept digit for digit: what is certified of them is accepted."""
    trust = Trust.fresh(SETTINGS)
    draw = random.Random(3)
    sure = [1.0 - shortfall * draw.random() for _ in range(600)]
    seed = []
    for i, g in enumerate(sure + [draw.random() * 0.9 for _ in range(400)]):
        right = g > 0.95 and i % 20 > 0  # the others are all wrong, so that no larger slice is certified
        seed.append(Comparison(str(i), float(right), {}, g, i % 7, i % 7 if right else (i + 1) % 7, seeded=True))
    draw.shuffle(seed)
    trust.promoted(seed, same, draw)
    assert trust.phase is Phase.SERVE
    assert trust.threshold is not None
    trust = Trust.loads(trust.dumps(), SETTINGS)
    accepted = sum(one.confidence >= (trust.threshold or 0.0) for one in seed) / len(seed)
    assert accepted == pytest.approx(trust.coverage)
    assert accepted > 0.5


def test_a_changed_mean_time_to_a_false_alarm_reaches_a_live_guard():
    """What the guard has gathered is kept; from the next start it alarms at what is configured then."""
    world = World()
    world.promote(seed=200)
    world.requests(300)
    text = world.trust.dumps()
    changed = Trust.loads(text, replace(SETTINGS, arl=300, watch_arl=70))
    assert changed.guard is not None
    assert world.trust.guard is not None
    assert changed.guard.detector.arl == 300
    assert changed.guard.detector.sums == pytest.approx(world.trust.guard.detector.sums, rel=1e-5)
    detectors = changed.watcher.detectors.values()
    assert detectors
    assert {d.arl for d in detectors} == {70 * len(detectors)}


def test_what_was_weighed_for_another_state_changes_nothing():
    """A comparison weighed before others completed the warm-up, or before it began, is refused whole."""
    world = World()
    world.promote()
    world.requests(38)
    early = [weigh(Comparison(n, 1.0, {}, 0.5, 1, 1), world.trust.basis(), same, world.draw) for n in "ab"]
    assert not early[0].opening
    world.trust.take(early[0], world.draw)
    before = world.trust.dumps()
    with pytest.raises(Stale):  # it would complete the warm-up now, and was not weighed for that
        world.trust.take(early[1], world.draw)
    assert world.trust.dumps() == before
    again = weigh(early[1].comparison, world.trust.basis(), same, world.draw)
    world.trust.take(again, world.draw)
    assert world.trust.comparisons == 40
    with pytest.raises(Stale):  # and now there are thresholds
        world.trust.take(early[1], world.draw)


def test_what_was_champion_before_goes_on_from_what_it_had_earned():
    """Its certificate holds, its evidence counts on, and it is checked from a rate of 1 down."""
    world = World()
    world.promote(seed=200)
    world.requests(600)
    before = world.trust.figures()
    (again,) = world.trust.resumed(before=Phase.SERVE)
    assert again.evidence == {"resumed": before.comparisons}
    after = world.trust.figures()
    assert (after.phase, after.threshold, after.sampling_rate) == (Phase.SERVE, before.threshold, 1.0)
    assert after.since_served == before.since_served
    (_, moved) = world.trust.resumed(before=Phase.SHADOW)
    assert (moved.evidence["before"], moved.evidence["after"]) == (2, 3)


def test_deferred_requests_do_not_make_it_shy():
    """Once serving, most comparisons are deferred, hard ones: agreement over everything is still the traffic's."""
    world = World(lambda g: 0.99 if g > 0.5 else 0.3, replace(SETTINGS, max_fall=0.2), seed=5)
    world.promote(seed=150)
    world.requests(6000)
    assert world.trust.phase is Phase.SERVE
    estimate = world.trust.figures().since_all.agreement
    assert estimate is not None
    assert estimate.value == pytest.approx(0.645, abs=0.08)


def test_observing_costs_the_same_whatever_the_window():
    """Ten times the window does not cost ten times the work (counted in evaluations, not in seconds)."""
    calls = {}
    for window in (50, 500):
        count = 0

        @evaluator
        def evaluate(local: Any, remote: Any) -> Evaluation:
            nonlocal count
            count += 1
            return same(local, remote)

        draw = random.Random(6)
        trust = Trust.fresh(replace(SETTINGS, window_size=window))
        trust.promoted([], evaluate, draw)
        for i in range(700):
            trust.observe(Comparison(str(i), 0.0, {}, draw.random(), 0, 1), evaluate, draw)
        before = count
        trust.observe(Comparison("x", 1.0, {}, 0.5, 1, 1), evaluate, draw)
        calls[window] = count - before
    assert calls[50] == calls[500] == 16


OVERALL = TrustSettings(max_disagreement_overall=0.1)


def test_all_answers_have_a_target_of_their_own():
    """Half of the traffic is answered well, the rest hardly: more is served than .90 of what is served would allow."""
    world = World(lambda g: 0.97 if g > 0.5 else 0.5, OVERALL)
    world.promote(seed=400)
    world.requests(3000)
    (promise,) = world.trust.figures().promises
    assert promise.at_most == 0.1
    assert promise.realised is not None
    assert 0.0 < promise.realised <= 0.1
    assert 0.5 < world.trust.coverage < 0.75
    assert EventKind.EMERGENCY not in {event.kind for event in world.told}


def test_the_guard_of_all_answers_holds_the_slice_to_what_it_may_spend():
    """At most .10 of all in half of the traffic: a fifth of the slice may differ, unless it was seen to do better."""
    world = World(lambda g: 0.88 if g > 0.5 else 0.1, replace(OVERALL, min_coverage=0.4))
    world.promote(seed=600)
    assert world.trust.guard is not None
    coverage = world.trust.coverage
    assert 0.3 < coverage < 0.6
    level = world.trust.guard.detector.level
    assert 1.0 - 0.1 / (0.8 * coverage) < level < 0.88
    world.requests(200)
    world.agreement = 0.2
    told = world.requests(200)
    assert {EventKind.SHIFT, EventKind.DRIFT, EventKind.EMERGENCY} & {event.kind for event in told}


def test_a_state_of_before_the_second_target_is_loaded_as_it_was():
    """Nothing is dropped where the target is the same; a new overall target discards what was bet against another."""
    world = World()
    world.promote(seed=300)
    old = json.loads(world.trust.dumps())
    del old["slices"]["served"], old["slices"]["overall"]
    assert Trust.loads(json.dumps(old), SETTINGS).dumps() == world.trust.dumps()
    moved = Trust.loads(json.dumps(old), OVERALL)
    assert (moved.phase, moved.threshold) == (Phase.SHADOW, None)
    assert moved.slices is not None
    assert moved.slices.overall is not None
