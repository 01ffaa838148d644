"""What is forecast comes true, on the median; what the evidence does not support is not forecast."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.confidence.acceptance import Slices
from apprentice.confidence.certify import LAMBDAS
from apprentice.confidence.forecast import Pace, Widening, _until, widenings, worthwhile
from apprentice.confidence.phases import Phase
from apprentice.confidence.settings import TrustSettings
from apprentice.confidence.trust import Trust
from apprentice.confidence.weighing import Comparison
from benchmarks.trust import measure_forecast, same


@pytest.mark.parametrize("target", [{"max_disagreement": 0.1}, {"max_disagreement_overall": 0.05}, {}])
def test_the_median_of_what_it_took_is_near_the_forecast(target: dict[str, float]) -> None:
    ratios = [ratio for _, ratio in measure_forecast(8, TrustSettings(**target))]
    assert len(ratios) > 40
    assert 1 / 1.5 < statistics.median(ratios) < 1.5
    assert sum(ratio == math.inf for ratio in ratios) < len(ratios) / 3


def slices_of(inside: int, outside: int, *, overall: float | None = None) -> Slices:
    """Half of the traffic and all of it, after 50 comparisons in and outside the first; so many of them differ."""
    rows = [(0.5 + i / 100, i * inside % 50 >= inside) for i in range(50)]
    rows += [(i / 100, i * outside % 50 >= outside) for i in range(50)]
    slices = Slices([0.5, 0.0], 0.05, [g for g, _ in rows], max_disagreement_overall=overall, served=overall is None)
    for g, agrees in random.Random(3).sample(rows, len(rows)):
        slices.add(g, float(agrees), 0.1 - (not agrees), 1.0)
    return slices


def test_a_slice_that_misses_its_target_gets_none() -> None:
    found = widenings(slices_of(2, 15), rate=1.0, served=None, room=0.1)
    assert [one.threshold for one in found] == [0.5]
    assert widenings(slices_of(5, 15), rate=1.0, served=None, room=0.1) == []
    assert widenings(slices_of(15, 15, overall=0.1), rate=1.0, served=None, room=0.1) == []


def test_few_comparisons_support_nothing() -> None:
    slices = Slices([0.0], 0.05)
    for _ in range(19):
        slices.add(1.0, 1.0, 0.1, 1.0)
    assert widenings(slices, rate=1.0, served=None, room=0.1) == []
    slices.add(1.0, 1.0, 0.1, 1.0)
    assert len(widenings(slices, rate=1.0, served=None, room=0.1)) == 1


@pytest.mark.parametrize("overall", [None, 0.08])
@pytest.mark.parametrize("rate", [0.5, 0.1, 0.02])
def test_a_lower_rate_takes_longer_and_no_more_checks(rate: float, overall: float | None) -> None:
    """log(1 + lambda r X) is at least r log(1 + lambda X), so 1 / r times the requests are enough."""
    slices = slices_of(1, 2, overall=overall)
    (often,) = widenings(slices, rate=1.0, served=0, room=0.1)
    (seldom,) = widenings(slices, rate=rate, served=0, room=0.1)
    assert often.requests < seldom.requests < 1.2 * often.requests / rate
    assert seldom.checks < 1.2 * often.checks
    assert often.comparisons == often.requests


def test_scores_that_vary_less_are_known_sooner() -> None:
    slices = slices_of(2, 3)
    (labels,) = widenings(slices, rate=1.0, served=0, room=0.1)
    (graded,) = widenings(slices, rate=1.0, served=0, room=0.1, spread=0.2)
    assert graded.requests < labels.requests


@given(
    st.lists(st.tuples(st.floats(-6, 0.5), st.floats(-0.01, 0.01)), min_size=len(LAMBDAS), max_size=len(LAMBDAS)),
    st.floats(3, 8),
)
def test_it_solves_for_the_time(sizes: list[tuple[float, float]], needed: float) -> None:
    """Growth without variance reaches what is needed exactly then, and never where nothing grows."""
    t = _until([held for held, _ in sizes], [Pace(grows, 0.0) for _, grows in sizes], needed)
    if max(grows for _, grows in sizes) <= 0.0:
        assert t == math.inf
    elif t < math.inf:
        worth = math.log(sum(math.exp(held + t * grows) for held, grows in sizes))
        assert worth == pytest.approx(needed, abs=0.05)


def test_the_slice_that_saves_most_is_worth_most() -> None:
    near, far = Widening(0.6, 0.5, 100, 80, 10), Widening(0.3, 0.9, 1000, 700, 100)
    assert worthwhile([near, far], coverage=0.3, horizon=300) == near
    assert worthwhile([near, far], coverage=0.3, horizon=5000) == far
    assert worthwhile([near, far], coverage=0.3, horizon=100) is None
    assert worthwhile([], coverage=0.3, horizon=5000) is None


def test_trust_forecasts_from_what_it_has_seen_and_remembers_how_much_that_was() -> None:
    draw = random.Random(0)
    settings = TrustSettings(max_disagreement=0.1)
    trust = Trust.fresh(settings)
    assert trust.figures().forecast is None
    seed = []
    for i in range(150):
        agrees = i % 25 > 0
        seed.append(Comparison("s", float(agrees), {}, draw.random(), i % 7 if agrees else 8, i % 7, seeded=True))
    trust.promoted(seed, same, draw)
    assert trust.requests == 150
    assert trust.phase is Phase.SHADOW
    forecast = trust.figures().forecast
    assert forecast is not None
    assert forecast.checks == 0.0
    again = Trust.loads(trust.dumps(), settings).figures().forecast
    assert again is not None
    assert again.threshold == forecast.threshold
    assert again.requests == pytest.approx(forecast.requests, rel=1e-4)
    assert Trust.loads(trust.dumps(), settings).requests == 150
