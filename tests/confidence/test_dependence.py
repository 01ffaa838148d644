"""The design effect: independent scores count in full, scores that come in waves for less, and all of it is kept."""

from __future__ import annotations

import json
import math
import random
import statistics

import pytest

from apprentice.confidence.acceptance import Slices
from apprentice.confidence.certify import discounted
from apprentice.confidence.dependence import REMEMBERED, SIZE, TOGETHER, Dependence

DELTA = 0.1


def after(scores: list[float]) -> Dependence:
    seen = Dependence()
    for score in scores:
        seen.add(score)
    return seen


def waves(draw: random.Random, count: int, period: int = 1000, swing: float = 0.09) -> list[float]:
    return [float(draw.random() >= 0.1 + swing * math.sin(2 * math.pi * i / period)) for i in range(count)]


def test_of_independent_scores_nearly_all_count_in_full() -> None:
    """At two sizes of one in twenty each, at most about one stream in ten is discounted, and then by little."""
    draw = random.Random(1)
    effects = [after([float(draw.random() >= 0.1) for _ in range(1000)]).design_effect() for _ in range(400)]
    discounted_ = [effect for effect in effects if effect > 1.0]
    assert len(discounted_) / len(effects) < 0.12
    assert statistics.median(discounted_) < 2.2


def test_scores_in_waves_count_for_less() -> None:
    """1 + size * var(p) / p(1 - p) for waves much longer than a batch of that size: 5.5 for the larger one here."""
    draw = random.Random(2)
    found = statistics.median(after(waves(draw, 4000, period=800)).design_effect() for _ in range(50))
    p, variance = 0.1, 0.09**2 / 2
    expected = 1 + TOGETHER * SIZE * variance / (p * (1 - p))
    assert found == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize(
    "scores", [[], [1.0] * 500, [0.0] * 500, [1.0, 0.0] * 40], ids=["none", "ones", "zeros", "few"]
)
def test_where_nothing_can_be_said_nothing_is_taken_off(scores: list[float]) -> None:
    """No scores, scores that are all alike, fewer batches than it takes, scores that alternate."""
    assert after(scores).design_effect() == 1.0


def test_it_is_the_ratio_of_variances_recomputed_from_the_scores() -> None:
    """The running sums say what the remembered scores say."""
    scores = waves(random.Random(3), (REMEMBERED + TOGETHER - 1) * SIZE + 13)
    whole = scores[:-13]
    spread = statistics.pvariance(whole)
    expected = []
    for size in (SIZE, TOGETHER * SIZE):
        sums = [sum(whole[i : i + size]) for i in range(0, len(whole) - size + 1, size)]
        expected.append(statistics.variance(sums) / (size * spread))
    assert after(scores).design_effect() == pytest.approx(max(expected), rel=1e-9)
    assert min(expected) > 1.5  # neither is chance


def test_what_is_kept_goes_on() -> None:
    """A state that went through JSON in the middle of a batch says the same in the end."""
    scores = waves(random.Random(4), 1510)
    kept = Dependence.load(json.loads(json.dumps(after(scores[:733]).dump())))
    for score in scores[733:]:
        kept.add(score)
    assert kept.design_effect() == pytest.approx(after(scores).design_effect(), rel=1e-6)


def test_a_change_for_good_is_forgotten() -> None:
    """After twice what is remembered nothing is left of a time when the model was bad."""
    draw = random.Random(8)
    seen = after([float(draw.random() >= 0.5) for _ in range(1000)])
    for _ in range((REMEMBERED + TOGETHER) * SIZE):
        seen.add(float(draw.random() >= 0.05))
    assert len(seen.batches) < REMEMBERED + TOGETHER
    assert seen.design_effect() < 2.0


def test_wealth_is_worth_its_root() -> None:
    """Four comparisons that say as much as one: the fourth root. What is lost stays lost."""
    assert discounted(10_000.0, 4.0) == pytest.approx(10.0)
    assert discounted(0.5, 4.0) == 0.5
    assert discounted(math.inf, 4.0) == math.inf


@pytest.mark.parametrize("overall", [None, 0.1])
def test_in_waves_it_takes_more_to_be_certified(overall: float | None) -> None:
    """The same scores in another order: shuffled they certify everything, in waves they do not yet."""
    draw = random.Random(5)
    scores = [float(draw.random() >= 0.06 + 0.06 * math.sin(2 * math.pi * i / 400)) for i in range(800)]

    def certified(scores: list[float]) -> bool:
        slices = Slices([0.0], DELTA, max_disagreement_overall=overall, served=overall is None)
        for score in scores:
            slices.add(0.5, score, 0.1 - (1.0 - score), 1.0)
        (kept,), (slice_,) = Slices.load(json.loads(json.dumps(slices.dump()))).curve(), slices.curve()
        assert kept.wealth == pytest.approx(slice_.wealth, rel=1e-4)
        return slices.certified is not None

    shuffled = random.Random(6).sample(scores, len(scores))
    assert certified(shuffled)
    assert not certified(scores)


def test_repeats_say_nothing_of_it() -> None:
    """Requests that are like recent ones agree with each other for that reason."""
    slices, plain = (Slices([0.0], DELTA) for _ in range(2))
    draw = random.Random(7)
    for _ in range(300):
        score = float(draw.random() >= 0.1)
        plain.add(0.5, score, score - 0.9, 1.0)
        for n in range(20):
            slices.add(0.5, score, score - 0.9, 1.0, repeats=n > 0)
    assert slices.dependence.dump() == plain.dependence.dump()
