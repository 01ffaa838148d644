"""Agreement and correlation, their windows and intervals."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.confidence.correlation import Tally, chance
from benchmarks.trust import Labels, measure_commonest, same

ROWS = st.lists(st.tuples(*[st.floats(0.0, 1.0)] * 2, st.floats(0.01, 1.0)), min_size=1, max_size=30)


@given(ROWS, ROWS)
def test_leaving_undoes_entering(stay: list[tuple[float, float, float]], leave: list[tuple[float, float, float]]):
    """A comparison that leaves the window leaves no trace in the figures."""
    alone, both = Tally(), Tally()
    for row in stay:
        alone.add(*row)
        both.add(*row)
    for row in leave:
        both.add(*row)
    for row in leave:
        both.remove(*row)
    assert both.agreement == pytest.approx(alone.agreement, abs=1e-6)
    assert both.sums() == pytest.approx(alone.sums(), abs=1e-6)
    assert Tally(alone.sums()).correlation == alone.correlation


def test_it_is_kappa():
    """For labels, rho is Cohen's kappa of the confusion table, up to the draws that estimate chance."""
    draw = random.Random(1)
    pairs = [("a", "a")] * 20 + [("a", "b")] * 5 + [("b", "a")] * 10 + [("b", "b")] * 15
    draw.shuffle(pairs)
    tally = Tally()
    for _ in range(40):
        for i, (local, remote) in enumerate(pairs):
            tally.add(same(local, remote).score, chance(local, remote, pairs[i + 1 :] + pairs[:i], same, draw)[0])
    assert tally.agreement == pytest.approx(0.70)
    assert tally.correlation == pytest.approx(0.40, abs=0.02)


def test_nothing_to_correct_for():
    """Where the answers never vary, chance explains nothing and correlation is agreement."""
    tally = Tally()
    for score in (1.0, 1.0, 0.0, 1.0):
        tally.add(score, 1.0)
    assert tally.correlation == tally.agreement == 0.75


def test_empty_is_unknown():
    """No comparison, no figure: None, not zero."""
    assert Tally().agreement is None
    assert Tally().correlation is None
    assert Tally().agreement_estimate() is None
    assert Tally().correlation_estimate() is None


def test_the_commonest_answer_earns_nothing():
    """Always giving the commonest class of a 95/5 task: agreement .95, correlation 0, and it never serves."""
    agreement, rho, left = measure_commonest(windows=150, tasks=4, comparisons=200)
    assert agreement == pytest.approx(0.95, abs=0.01)
    assert rho <= 0.05
    assert left == 0


@pytest.mark.slow
def test_the_commonest_answer_earns_nothing_in_full():
    """The claim at its own size: 1,000 windows, and at most delta of 1,000 tasks leave phase 2."""
    _, rho, left = measure_commonest(windows=1000, tasks=1000, comparisons=1000)
    assert rho <= 0.05
    assert left <= 50


@pytest.mark.parametrize("rho", [0.3, 0.9])
def test_the_interval_holds_the_truth(rho: float):
    """95 % intervals of rho over windows of 100 hold it in at least 90 % of 200 worlds, and are not absurdly wide."""
    draw = random.Random(2)
    labels = Labels([3.0, 2.0, 1.0, 1.0], draw)
    held, width = 0, 0.0
    for _ in range(200):
        tally = Tally()
        pairs = [labels.pair(rho) for _ in range(100)]
        for i, (local, remote) in enumerate(pairs):
            tally.add(same(local, remote).score, chance(local, remote, pairs[i + 1 :] + pairs[:i], same, draw)[0])
        estimate = tally.correlation_estimate()
        assert estimate is not None
        held += estimate.low <= rho <= estimate.high
        width += estimate.high - estimate.low
    assert held >= 180
    assert width / 200 < 0.32


def test_chance_costs_two_draws_each_and_keeps_fields():
    """2 K evaluations whatever the window, fields averaged with the whole."""
    calls = 0

    def evaluate(local: str, remote: str) -> tuple[float, dict[str, float]]:
        nonlocal calls
        calls += 1
        return float(local == remote), {"field": float(local == remote)}

    for size in (1, 5, 100, 1000):
        calls = 0
        score, parts = chance("a", "a", [("a", "a")] * size, evaluate, random.Random(1))
        assert calls == 2 * min(8, size)
        assert (score, parts) == (1.0, {"field": 1.0})
