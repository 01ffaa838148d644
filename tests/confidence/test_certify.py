"""Certificates: rarely wrong however often one looks, and soon there when deserved."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.confidence.certify import LAMBDAS, LOG_PRIOR, PRIOR, excess, log_stakes, wealth
from benchmarks.trust import DELTA, balances, measure_false_certification, measure_time_to_certify, tail_bound

FRACTION = st.floats(0.0, 1.0)


def test_the_bets_start_with_one():
    """The prior over sizes of bet is a distribution, and the empty product is worth 1."""
    assert sum(PRIOR) == pytest.approx(1.0)
    assert wealth(LOG_PRIOR) == pytest.approx(1.0)


@given(FRACTION, FRACTION, st.floats(0.0, 0.99), FRACTION)
def test_no_comparison_can_ruin_a_bet(score: float, chance: float, tau: float, weight: float):
    """X stays in [-1, 1 - tau], so every factor is positive and at most 1 + lambda (1 - tau)."""
    x = excess(score, chance, correlation=tau, max_disagreement=None)
    assert -1.0 <= x <= 1.0 - tau + 1e-12
    for size, stake in zip(LAMBDAS, log_stakes(x, weight), strict=True):
        assert math.isfinite(stake)
        assert stake <= math.log1p(size * (1.0 - tau)) + 1e-12


@given(st.floats(0.01, 0.5), st.floats(0.0, 1.0))
def test_a_bet_is_fair_at_the_target(target: float, weight: float):
    """Where exactly the tolerated share disagrees, every size of bet has mean 1, whatever the weight."""
    hit = excess(1.0, 0.0, correlation=0.0, max_disagreement=target)
    miss = excess(0.0, 0.0, correlation=0.0, max_disagreement=target)
    for up, down in zip(log_stakes(hit, weight), log_stakes(miss, weight), strict=True):
        assert (1.0 - target) * math.exp(up) + target * math.exp(down) == pytest.approx(1.0)


@given(st.floats(0.02, 1.0), st.floats(0.0, 1.0), st.floats(-1.0, 0.3))
def test_weighting_grows_faster_than_thinning(rate: float, size: float, x: float):
    """log(1 + lambda r X) is at least r log(1 + lambda X): why deferred requests bet with weight r and not rarely."""
    size = min(size, 0.99)
    assert math.log1p(size * rate * x) >= rate * math.log1p(size * x) - 1e-12


@pytest.mark.parametrize("balance", ["2 balanced", "7 balanced", "7 at 95/5"])
def test_wrong_certificates_are_rare(balance: str):
    """At rho = tau at most delta of the streams are ever certified, looking after every comparison."""
    streams = 120
    wrong = measure_false_certification(balances()[balance], streams, 150)
    assert wrong <= tail_bound(streams, DELTA)


@pytest.mark.slow
@pytest.mark.parametrize("balance", list(balances()))
def test_wrong_certificates_are_rare_in_full(balance: str):
    """The claim at its own size: 2,000 streams for 2, 7 and 77 classes, balanced and 95/5."""
    wrong = measure_false_certification(balances()[balance], 2000, 500)
    assert wrong <= tail_bound(2000, DELTA)


@pytest.mark.parametrize(("classes", "limit"), [(7, 110), (77, 80)])
def test_good_models_are_certified_soon(classes: int, limit: int):
    """The median number of comparisons to certify agreement .95 against tau .85 stays within the limit."""
    assert measure_time_to_certify(classes, 101) <= limit


@pytest.mark.parametrize(("trials", "probability", "known"), [(100, 0.05, 15), (10, 0.5, 10)])
def test_the_bounds_of_these_tests(trials: int, probability: float, known: int):
    """tail_bound is the 1 - 1e-4 quantile of the binomial distribution, counted here by drawing."""
    bound = tail_bound(trials, probability)
    assert abs(bound - known) <= 1
    draw = random.Random(1)
    above = sum(sum(draw.random() < probability for _ in range(trials)) > bound for _ in range(2000))
    assert above <= 3
