"""The exact test: its error, when it is made, and that bets and test together keep one delta."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.confidence import exact
from apprentice.confidence.acceptance import Slices
from apprentice.confidence.phases import Phase
from apprentice.confidence.settings import TrustSettings
from apprentice.confidence.trust import Trust
from apprentice.confidence.weighing import Comparison, weigh_seed
from benchmarks.certificates import HYBRID, WORLDS, coverage, wrongly_certified
from benchmarks.trust import DELTA, same, tail_bound

LIMIT = 0.1


@given(st.integers(0, 60), st.integers(1, 60), st.floats(0.001, 0.999))
def test_the_p_value_is_the_binomial_tail(differ: int, n: int, limit: float) -> None:
    tail = math.fsum(math.comb(n, k) * limit**k * (1.0 - limit) ** (n - k) for k in range(min(differ, n) + 1))
    assert exact.p_value(differ, n, limit) == pytest.approx(tail, rel=1e-9)


def test_the_p_value_of_many() -> None:
    """Of so many that the probability of none underflows; the median of Binomial(100,000, .1) is 10,000."""
    assert exact.p_value(10_000, 100_000, 0.1) == pytest.approx(0.5, abs=0.01)
    assert exact.p_value(9_000, 100_000, 0.1) < 1e-20
    assert exact.p_value(0, 0, 0.1) == 1.0


def everything(differ: int, n: int, *, order: int = 0, tests: bool = True) -> Slices:
    """One slice, everything, after n comparisons of which so many differ."""
    slices = Slices([0.0], DELTA, max_disagreement=LIMIT if tests else None)
    compare(slices, differ, n, order)
    return slices


def compare(slices: Slices, differ: int, n: int, order: int = 0, weight: float = 1.0) -> None:
    scores = [0.0] * differ + [1.0] * (n - differ)
    random.Random(order).shuffle(scores)
    for score in scores:
        slices.add(1.0, score, LIMIT - (1.0 - score), weight)


def test_it_certifies_at_its_own_level_what_bets_do_not() -> None:
    """18 of 300 that differ are below a third of .05; 20 are above it."""
    assert exact.p_value(18, 300, LIMIT) < DELTA * exact.SHARE < exact.p_value(20, 300, LIMIT)
    slices = everything(18, 299)
    assert slices.certified is None
    compare(slices, 0, 1)
    assert slices.tested == (0, 0)
    assert everything(18, 300, tests=False).certified is None
    assert everything(20, 300).certified is None


def test_it_is_made_once() -> None:
    """What is not certified at the look is left to the bets, however good the next comparisons are for a test."""
    slices = everything(30, 300)
    compare(slices, 10, 300)
    assert exact.p_value(40, 600, LIMIT) < DELTA * exact.SHARE
    assert slices.tested is None


@pytest.mark.parametrize(("weight", "score"), [(0.5, 1.0), (1.0, 0.5)])
def test_weights_and_graded_scores_are_for_bets(weight: float, score: float) -> None:
    """A single one that is not a plain label compared in full, and the numbers are not Binomial."""
    slices = Slices([0.0], DELTA, max_disagreement=LIMIT)
    slices.add(1.0, score, LIMIT - (1.0 - score), weight)
    compare(slices, 18, 400)
    assert slices.tested is None


def test_a_tenth_attempt_is_tested_at_a_tenth() -> None:
    seed = everything(18, 300)
    assert seed.tested == (0, 0)
    assert exact.p_value(18, 300, LIMIT) > DELTA * exact.SHARE / 10
    seed.hedge(0.1)
    assert seed.certified is None
    strong = everything(4, 300)
    strong.hedge(0.1)
    assert strong.certified == 0


def test_a_slice_that_was_tested_hands_its_share_on() -> None:
    """What bet on it then bets on the next larger one; the state knows of it after a restart of the process."""
    slices = Slices([0.5, 0.0], DELTA, [0.75, 0.25], max_disagreement=LIMIT)
    for i in range(600):
        score = float(i % 25 > 0 if i % 2 else i % 4 > 0)
        slices.add(0.75 if i % 2 else 0.25, score, LIMIT - (1.0 - score), 1.0)
        if slices.tested:
            break
    assert slices.tested == (0, 0)
    assert slices.needed()[1] == pytest.approx(1.0 / DELTA)
    again = Slices.load(json.loads(json.dumps(slices.dump())))
    assert again.tested == (0, 0)
    assert again.curve()[0].certified
    slices.restart()
    assert slices.certified is None
    compare(slices, 10, 300)
    assert slices.certified == 1


def test_a_state_from_before_bets_all_of_it() -> None:
    data = Slices([0.0], DELTA).dump()
    del data["exact"], data["limit"]
    old = Slices.load(data)
    compare(old, 18, 300)
    assert old.tested is None
    assert old._stake(0) == Slices([0.0], DELTA)._stake(0) > everything(0, 0)._stake(0)


def comparisons(count: int) -> list[Comparison]:
    """The first of 300 comparisons of which 18 differ, and as many again as are asked for that do not."""
    agrees = [False] * 18 + [True] * 282
    random.Random(0).shuffle(agrees)
    agrees += [True] * max(0, count - 300)
    return [
        Comparison(str(i), float(agrees[i]), {}, 0.9, i % 7 if agrees[i] else 8, i % 7, seeded=i < 60)
        for i in range(count)
    ]


def shadowed(count: int, *, max_disagreement: float | None = LIMIT) -> Trust:
    """A trust after so many comparisons in full."""
    draw = random.Random(2)
    trust = Trust.fresh(TrustSettings(max_disagreement=max_disagreement, deferral=False))
    trust.promoted(comparisons(60), same, draw)
    for one in comparisons(count)[60:]:
        trust.observe(one, same, draw)
    return trust


def test_trust_serves_by_it_and_says_so() -> None:
    assert shadowed(299).phase is Phase.SHADOW
    trust = shadowed(299)
    (certified, _) = trust.observe(comparisons(300)[-1], same, random.Random(0))
    assert certified.evidence["by"] == "exact test"
    assert trust.phase is Phase.SERVE
    assert shadowed(400, max_disagreement=None).slices.exact_share == 0.0  # type: ignore[union-attr]


def test_a_lineage_is_tested_once() -> None:
    """A successor that is asked all of it again has no second test, and bets what was left for bets."""
    trust = shadowed(250)
    assert trust.slices is not None
    seed = weigh_seed(comparisons(310), trust.settings, same, random.Random(0))
    trust.succeed(seed, carries=0.0)
    assert trust.slices.exact_share == exact.SHARE
    assert trust.slices.test_level == 0.0
    assert trust.phase is Phase.SERVE
    again = Trust.loads(trust.dumps(), trust.settings)
    again.succeed(seed, carries=0.0)
    assert again.slices is not None
    assert again.slices.test_level == 0.0


def test_certificates_are_wrong_no_more_often() -> None:
    for limit, seed in ((0.05, 60), (0.1, 300)):
        assert wrongly_certified(limit, 60, seed=seed) * 60 <= tail_bound(60, DELTA)


def test_it_certifies_more_after_few_comparisons() -> None:
    """Where the hybrid of a fixed-sample test was far ahead of bets alone."""
    world, limit = "Beta(12,1)", 0.10
    bets = coverage(WORLDS[world], limit, 20, tests=False)[0]
    both = coverage(WORLDS[world], limit, 20, tests=True)[0]
    assert both > bets + 0.1
    assert both > HYBRID[world, limit][0] - 0.15
