"""How much of all answers may differ: a bet on every slice with every comparison."""

import json
import math
import random
from collections.abc import Sequence

import pytest

from apprentice.confidence.acceptance import FIRST_STAKE, Slices
from apprentice.confidence.certify import LAMBDAS, PRIOR
from apprentice.confidence.overall import Overall

THRESHOLDS = [0.8, 0.6, 0.3, 0.0]
LIMIT, DELTA = 0.1, 0.05


def stream(count: int, right: float, seed: int = 1) -> list[tuple[float, float, float]]:
    """(confidence, score, weight), the scores better where the confidence is higher."""
    draw = random.Random(seed)
    drawn = ((draw.random(), draw.random(), draw.choice([1.0, 0.3])) for _ in range(count))
    return [(g, float(u < right + (1.0 - right) * g), weight) for g, u, weight in drawn]


def only_overall(confidences: Sequence[float] = ()) -> Slices:
    return Slices(THRESHOLDS, DELTA, confidences, max_disagreement_overall=LIMIT, served=False)


def feed(slices: Slices, comparisons: Sequence[tuple[float, float, float]]) -> None:
    for g, s, weight in comparisons:
        slices.add(g, s, 0.0, weight)


def test_it_is_the_product_of_every_bet():
    """Bands and sums give what one product per slice and size of bet over all comparisons gives."""
    slices = only_overall()
    comparisons = stream(150, 0.6)
    feed(slices, comparisons)
    for t, kept in zip(THRESHOLDS, slices.curve(), strict=True):
        expected = sum(
            FIRST_STAKE * part * math.prod(1.0 + size * w * (LIMIT - (g >= t) * (1.0 - s)) for g, s, w in comparisons)
            for size, part in zip(LAMBDAS, PRIOR, strict=True)
        )
        assert kept.wealth == pytest.approx(expected, rel=1e-9)
        assert kept.needed == pytest.approx(1.0 / DELTA)


@pytest.mark.parametrize("right", [0.0, 0.5, 0.9])
def test_a_smaller_slice_is_always_worth_as_much(right: float):
    """Which is why no delta is lost to their number: through ruin, a new start and a hedge as well."""
    slices = only_overall()
    for round_, seed in enumerate(range(4)):
        feed(slices, stream(400, right, seed))
        worth = [one.wealth for one in slices.curve()]
        assert worth == sorted(worth, reverse=True)
        if round_ == 2:
            slices.hedge(0.25)


def test_what_is_not_served_costs_nothing():
    """Half of the traffic always differs: the rest is served all the same, and not more than a tenth beyond it."""
    slices = only_overall()
    draw = random.Random(1)
    feed(slices, [(g, float(g >= 0.5), 1.0) for g in (draw.random() for _ in range(600))])
    assert slices.threshold == 0.6


def test_a_smallest_slice_that_differs_too_often_is_never_served():
    """All of a fifth of the traffic differs where a tenth may."""
    slices = only_overall()
    draw = random.Random(1)
    feed(slices, [(g, float(g < 0.8), 1.0) for g in (draw.random() for _ in range(3000))])
    assert slices.threshold is None
    assert slices.overall_winds >= 1


def test_both_targets_must_be_met():
    """One slice meets the served target and the other does not; the overall target alone would serve more."""
    draw = random.Random(2)
    comparisons = [(g, float(g >= 0.6 or draw.random() < 0.85), 1.0) for g in (draw.random() for _ in range(1500))]
    served, both, overall = (
        Slices(THRESHOLDS, DELTA),
        Slices(THRESHOLDS, DELTA, max_disagreement_overall=LIMIT),
        only_overall(),
    )
    for slices in (served, both, overall):
        for g, s, weight in comparisons:
            slices.add(g, s, 0.03 - (1.0 - s), weight)
    assert served.threshold == both.threshold == 0.6
    assert overall.threshold == 0.3
    tight = Slices(THRESHOLDS, DELTA, max_disagreement_overall=0.001)
    for g, s, weight in comparisons:
        tight.add(g, s, 0.03 - (1.0 - s), weight)
    assert tight.threshold is None
    assert not any(one.certified for one in tight.curve())


def test_text_and_back():
    """A state that went through JSON decides like the one that did not, and an older one has a served target alone."""
    one = only_overall()
    feed(one, stream(80, 0.6))
    two = Slices.load(json.loads(json.dumps(one.dump())))
    for seed in range(3):
        for slices in (one, two):
            feed(slices, stream(60, 0.9, seed))
        assert one.certified == two.certified
        assert [s.wealth for s in one.curve()] == pytest.approx([s.wealth for s in two.curve()], rel=1e-3)
    old = Slices(THRESHOLDS, DELTA).dump()
    del old["served"], old["overall"]
    assert Slices.load(old).dump() == Slices(THRESHOLDS, DELTA).dump()


def test_a_restart_forgets():
    """After an alarm nothing is certified, whatever was bet before."""
    slices = only_overall()
    feed(slices, stream(400, 0.99))
    assert slices.certified == 3
    slices.restart()
    assert slices.certified is None
    assert [one.wealth for one in slices.curve()] == pytest.approx([FIRST_STAKE] * 4)


def test_renewal_waits_for_ruin():
    """Capital that is kept back is laid in once the most confident slice has lost nearly all."""
    one = Overall(LIMIT, DELTA, 2, FIRST_STAKE)
    assert not one.renew(0.05, 0.05)
    for _ in range(60):
        one.add(0, 0.0, 1.0)
    assert one.renew(0.05, 0.05)
    assert one.wealths() == pytest.approx([0.05, 0.05])
