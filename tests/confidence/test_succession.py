"""A lineage: what a refit goes on from, and what it changes by being asked again."""

import json
from dataclasses import replace
from typing import Any

import pytest

from apprentice.confidence.phases import Phase
from apprentice.confidence.settings import TrustSettings
from apprentice.confidence.trust import Trust
from apprentice.confidence.trust_events import Event, EventKind
from apprentice.confidence.weighing import Seed, weigh_seed
from benchmarks.trust import same
from tests.confidence.test_trust import SETTINGS, World

OVERALL = replace(SETTINGS, max_disagreement=None, max_disagreement_overall=0.1)


def asked_again(world: World, agreement: Any, count: int) -> Seed:
    """What a successor with this agreement says of ``count`` earlier comparisons."""
    before, world.agreement = world.agreement, agreement
    comparisons = world.seeds(count)
    world.agreement = before
    return weigh_seed(comparisons, world.trust.settings, same, world.draw)


def serving(agreement: Any, requests: int, settings: TrustSettings = SETTINGS, seed: int = 1) -> World:
    world = World(agreement, settings, seed)
    world.promote(seed=300)
    world.requests(requests)
    assert world.trust.phase is Phase.SERVE
    return world


def _as_much(world: World) -> int:
    """A few more than the comparisons that its certificate was earned with."""
    assert world.trust.slices is not None
    return int(sum(world.trust.slices.weights)) + 200


def kinds(events: list[Event]) -> list[EventKind]:
    return [event.kind for event in events]


def half_good(g: float) -> float:
    """Above .5 it hardly errs, below it is useless."""
    return 0.99 if g > 0.5 else 0.3


@pytest.mark.parametrize(("carries", "at_least"), [(0.0, 0.0), (0.3, 0.3), (7.0, 1.0)])
def test_a_refit_goes_on_from_all_that_its_lineage_has_earned(carries: float, at_least: float):
    """All but the rate is as it was, to the letter; the rate is at least what the caller asks, and at most 1."""
    world = World()
    world.promote(seed=300)
    world.requests(1500)
    before, rate = json.loads(world.trust.dumps()), world.trust.rate
    assert rate < 0.3
    (event,) = world.trust.succeed(carries=carries)
    after = json.loads(world.trust.dumps())
    assert event.kind is EventKind.PROMOTED
    rate_now = round(max(rate, at_least), 4)
    assert event.evidence == {"carried": before["comparisons"], "seed": 0, "sampling_rate": rate_now}
    assert after.pop("rate") == max(rate, at_least) == max(before.pop("rate"), at_least)
    assert after == before


def test_a_worse_refit_is_found_by_its_lineages_guard():
    """Carried trust is guarded trust: .99 becomes .6, and the guard takes the slice back within 60 comparisons."""
    world = World()
    world.promote(seed=300)
    world.requests(1500)
    world.trust.succeed(carries=1.0)
    world.agreement = 0.6
    told = world.requests(60)
    assert EventKind.SHIFT in {event.kind for event in told}
    assert world.trust.rate == 1.0
    assert world.trust.slices is not None
    assert world.trust.slices.certified is None


@pytest.mark.parametrize("trouble", ["alarmed", "coaching", "nothing known"])
def test_trust_in_trouble_is_not_carried(trouble: str):
    """Under alarm, in coaching, or without a comparison a successor begins anew; nothing changes where it is tried."""
    world = World()
    world.promote(seed=0 if trouble == "nothing known" else 300)
    if trouble != "nothing known":
        setattr(world.trust, trouble, True)
    before = world.trust.dumps()
    assert not world.trust.heritable
    with pytest.raises(ValueError, match="begin anew"):
        world.trust.succeed(carries=0.1)
    assert world.trust.dumps() == before


@pytest.mark.parametrize("carries", [-0.1, float("nan")])
def test_a_rate_that_is_none_is_refused(carries: float):
    """It would silently check less than the lineage has earned."""
    world = World()
    world.promote(seed=100)
    with pytest.raises(ValueError, match="at least 0"):
        world.trust.succeed(carries=carries)


@pytest.mark.parametrize("settings", [SETTINGS, OVERALL], ids=["served", "overall"])
def test_a_better_successor_serves_more_at_once(settings: TrustSettings):
    """What it says of earlier comparisons certifies a larger slice: that is served without a single new comparison."""
    world = serving(half_good, 1000, settings)
    threshold, coverage = world.trust.threshold, world.trust.coverage
    assert threshold is not None
    assert coverage < 0.75
    events = world.trust.succeed(asked_again(world, 0.99, 1500), carries=0.2)
    assert kinds(events) == [EventKind.PROMOTED, EventKind.CERTIFIED]
    assert events[0].evidence["seed"] == 1500
    assert world.trust.threshold is not None
    assert world.trust.threshold < threshold
    assert world.trust.coverage > 0.95
    assert world.trust.rate >= 0.2


def test_a_shadowed_lineage_may_begin_to_serve_when_asked_again():
    """The predecessor was bad; that is not held against one that answers well what it has not learnt from."""
    world = World(0.6)
    world.promote(seed=300)
    world.requests(400)
    assert world.trust.phase is Phase.SHADOW
    events = world.trust.succeed(asked_again(world, 0.99, 700), carries=0.0)
    assert kinds(events) == [EventKind.PROMOTED, EventKind.CERTIFIED, EventKind.PHASE]
    assert (world.trust.phase, world.trust.threshold) == (Phase.SERVE, 0.0)


def test_a_shadowed_lineage_goes_on_from_the_longer_evidence():
    """Asked again about less than it was compared on, it keeps its bets; about as much, it bets anew."""
    world = World(0.6)
    world.promote(seed=300)
    world.requests(400)
    assert world.trust.slices is not None
    bets = world.trust.slices.dump()
    world.trust.succeed(asked_again(world, 0.6, 200), carries=0.0)
    assert world.trust.slices.dump() == bets
    world.trust.succeed(asked_again(world, 0.6, 800), carries=0.0)
    assert sum(world.trust.slices.weights) == 800


def by_itself(seed: Seed, world: World) -> float | None:
    """The threshold that this evidence alone would certify."""
    alone = Trust.fresh(world.trust.settings)
    alone.begin(seed, world.draw, before=Phase.COLLECT)
    return alone.threshold


def test_what_was_proved_is_not_taken_back_for_want_of_evidence():
    """A fifth of the comparisons certifies a smaller slice, and outweighs nothing: all stands, to the letter."""
    world = serving(0.97, 3000)
    before = json.loads(world.trust.dumps())
    assert world.trust.threshold == 0.0
    seed = asked_again(world, half_good, 300)
    assert by_itself(seed, world) == pytest.approx(0.5, abs=0.12)
    assert kinds(world.trust.succeed(seed, carries=0.0)) == [EventKind.PROMOTED]
    assert json.loads(world.trust.dumps()) == before


def test_an_overall_promise_has_room_for_what_is_not_served():
    """What is served errs in one of six, which is less than a tenth of everything: that does not speak against it."""
    world = serving(half_good, 1200, OVERALL)
    threshold = world.trust.threshold
    assert threshold is not None
    assert threshold > 0.3
    seed = asked_again(world, lambda g: 0.99 if g > 0.8 else 0.77 if g > threshold else 0.3, _as_much(world))
    alone = by_itself(seed, world)
    assert alone is not None
    assert alone > threshold
    assert kinds(world.trust.succeed(seed, carries=0.0)) == [EventKind.PROMOTED]
    assert world.trust.threshold == threshold


def test_what_still_keeps_its_promise_is_not_taken_back_for_want_of_luck():
    """At .915 where .90 is promised as many comparisons prove less than at .97, but they do not speak against it."""
    world = serving(0.97, 1200)
    seed = asked_again(world, lambda g: 0.98 if g > 0.5 else 0.85, _as_much(world))
    alone = by_itself(seed, world)
    assert alone is not None
    assert alone > 0.2
    assert kinds(world.trust.succeed(seed, carries=0.0)) == [EventKind.PROMOTED]
    assert world.trust.threshold == 0.0


@pytest.mark.parametrize("settings", [SETTINGS, OVERALL], ids=["served", "overall"])
def test_what_its_own_evidence_speaks_against_is_served_no_longer(settings: TrustSettings):
    """It agrees on the confident half alone, and says so of as much as was known: that half is what it may serve."""
    world = serving(0.97, 1200, settings)
    assert world.trust.threshold == 0.0
    events = world.trust.succeed(asked_again(world, half_good, _as_much(world)), carries=1.0)
    assert kinds(events) == [EventKind.PROMOTED, EventKind.CERTIFIED]
    assert world.trust.threshold == pytest.approx(0.5 if settings is SETTINGS else 0.4, abs=0.12)
    assert world.trust.phase is Phase.SERVE


def test_evidence_that_certifies_nothing_leaves_the_phase_to_the_guard():
    """A successor that proves nothing at all goes on being served, checked at the rate that its change is worth."""
    world = serving(0.97, 1200)
    events = world.trust.succeed(asked_again(world, 0.5, _as_much(world)), carries=1.0)
    assert kinds(events) == [EventKind.PROMOTED]
    assert (world.trust.phase, world.trust.rate) == (Phase.SERVE, 1.0)
    world.agreement = 0.5
    assert EventKind.SHIFT in kinds(world.requests(40))


@pytest.mark.parametrize("carries", [-0.1, float("nan")])
def test_a_seed_changes_nothing_where_the_rate_is_refused(carries: float):
    """The error comes before anything is taken in."""
    world = serving(half_good, 600)
    before = world.trust.dumps()
    with pytest.raises(ValueError, match="at least 0"):
        world.trust.succeed(asked_again(world, 0.99, 900), carries=carries)
    assert world.trust.dumps() == before
