"""Acceptance slices: several thresholds, one error."""

import json
import random

import pytest

from apprentice.confidence.acceptance import ENTRIES, Slices, _part, grid, promising
from benchmarks.trust import DELTA, measure_lineage, measure_overall, measure_slices, tail_bound


def feed(slices: Slices, agreement: float, count: int, draw: random.Random, target: float = 0.1) -> None:
    for _ in range(count):
        s = float(draw.random() < agreement)
        slices.add(draw.random(), s, target - (1.0 - s), 1.0)


def test_the_grid_descends_to_everything():
    """Slices start at the least coverage, grow by a fortieth, end at everything, and never repeat."""
    thresholds = grid([i / 100 for i in range(1, 101)], 0.1)
    assert thresholds[0] == 0.91
    assert thresholds[-1] == 0.0
    assert thresholds == sorted(set(thresholds), reverse=True)
    assert len(thresholds) == 37


@pytest.mark.parametrize("confidences", [[], [0.5] * 40, [0.0] * 40, [1.0, 0.0] * 20])
def test_a_confidence_that_says_nothing(confidences: list[float]):
    """Ties make fewer slices; everything is always one of them."""
    thresholds = grid(confidences, 0.1)
    assert thresholds[-1] == 0.0
    assert len(thresholds) <= 2
    Slices(thresholds, DELTA, confidences)


def test_the_grid_counts_the_traffic_and_not_the_comparisons():
    """One that stands for nine moves the thresholds as nine alike would."""
    some, weights = [i / 20 for i in range(20)], [9.0 if i >= 15 else 1.0 for i in range(20)]
    plainly = [g for g, weight in zip(some, weights, strict=True) for _ in range(int(weight))]
    assert grid(some, 0.1, weights=weights) == grid(plainly, 0.1)
    assert grid(some, 0.1, weights=weights) != grid(some, 0.1)


def test_what_is_promising_is_what_a_calibrated_model_would_be_certified_on():
    """Of confidences from 0 to 1, believed: the largest slice that errs two fifths of what may be; weights count."""
    confidences = [(i + 0.5) / 1000 for i in range(1000)]
    expected = [(g, 0.1 - (1.0 - g), 1.0) for g in confidences]
    assert promising(expected) == pytest.approx(0.08, abs=0.001)  # the mean of 1 - g over [.92, 1] is .04
    heavy = [(g, x, 5.0 if g > 0.92 else 1.0) for g, x, _ in expected]
    assert promising(heavy) == pytest.approx(0.303, abs=0.002)
    assert promising([(g, 0.1 - (1.0 - g), 1.0) for g in confidences if g < 0.9]) is None
    assert promising([]) is None


def test_most_of_delta_enters_at_the_slice_that_promises_most():
    """And some at every slice, because confidences may be wrong."""
    confidences = [i / 100 for i in range(1, 101)]
    slices = Slices(grid(confidences, 0.1), DELTA, confidences, entry=0.6)
    held = slices.entry_shares()
    assert sum(held) == pytest.approx(1.0)
    assert min(held) > 0.0
    assert slices.shares[held.index(max(held))] == pytest.approx(0.6, abs=0.02)
    assert max(held) > 0.5
    again = Slices.load(json.loads(json.dumps(slices.dump())))
    assert again.entry_shares() == pytest.approx(held, abs=1e-6)


def test_the_entries_share_out_delta():
    """The shares of delta sum to one, before and after a slice handed its own on."""
    assert sum(part for _, part in ENTRIES) == pytest.approx(1.0)
    slices = Slices([0.8, 0.5, 0.0], DELTA, [i / 10 for i in range(10)])
    assert sum(slices.entry_shares()) == pytest.approx(1.0)
    first = slices.needed()[0]
    slices.peaks[0] = 1e6
    assert slices.needed()[1] < Slices([0.8, 0.5, 0.0], DELTA, [i / 10 for i in range(10)]).needed()[1]
    assert slices.needed()[0] == first


def test_a_good_model_serves_everything():
    """Agreement .99 against at most .10: everything within 150 comparisons, though the grid has 19 slices."""
    slices = Slices(grid([i / 100 for i in range(1, 101)], 0.1), DELTA, [i / 100 for i in range(1, 101)])
    feed(slices, 0.99, 150, random.Random(1))
    assert slices.threshold == 0.0
    assert slices.curve()[-1].certified


def test_a_restart_forgets_the_evidence_and_keeps_the_grid():
    """After an alarm nothing is certified, and the same thresholds are bet on again."""
    slices = Slices([0.5, 0.0], DELTA)
    feed(slices, 1.0, 200, random.Random(1))
    assert slices.certified == 1
    slices.restart()
    assert slices.certified is None
    assert slices.thresholds == [0.5, 0.0]
    assert slices.agreement(1) is None


def test_a_tenth_attempt_needs_ten_times_the_evidence():
    """Evidence shared with earlier attempts can certify by itself with a share of delta only."""
    slices = Slices([0.0], DELTA)
    feed(slices, 1.0, 60, random.Random(1))
    assert slices.certified == 0
    worth = slices.curve()[0].wealth
    slices.hedge(0.1)
    assert slices.curve()[0].wealth == pytest.approx(0.1 * worth + 0.9 * 0.9, rel=1e-6)
    assert slices.certified is None


def test_a_second_wind():
    """Bad for 2,000 comparisons, then good: certified within 1,000, when what looks like a wave is forgotten."""
    slices = Slices([0.5, 0.0], DELTA)
    feed(slices, 0.5, 2000, random.Random(1))
    assert min(slices.winds) >= 1
    feed(slices, 0.99, 1000, random.Random(2))
    assert slices.certified == 1


def test_all_starts_together_put_in_one():
    """However often a slice begins again, the capital it ever puts in adds up to at most 1."""
    put_in = sum(_part(winds) for winds in range(5000))
    assert 0.999 < put_in <= 1.0


def test_text_and_back():
    """A state that went through JSON decides like the one that did not."""
    draw = random.Random(3)
    one = Slices(grid([draw.random() for _ in range(60)], 0.1), DELTA, [draw.random() for _ in range(60)])
    feed(one, 0.93, 77, draw)
    two = Slices.load(json.loads(json.dumps(one.dump())))
    for seed in range(5):
        feed(one, 0.97, 60, random.Random(seed))
        feed(two, 0.97, 60, random.Random(seed))
        assert one.certified == two.certified
        assert [s.wealth for s in one.curve()] == pytest.approx([s.wealth for s in two.curve()], rel=1e-3)


def test_few_tasks_serve_a_slice_below_target():
    """Over models of every quality, the served slice is truly below target in at most delta of the tasks."""
    below, covered, oracle = measure_slices(60, 500)
    assert below <= tail_bound(60, DELTA)
    assert covered <= oracle


@pytest.mark.parametrize("at_limit", [False, True])
def test_few_tasks_let_more_of_all_answers_differ_than_promised(at_limit: bool):
    """Over models of every quality, and over ones none of whose slices may be served."""
    broken, covered, oracle, before = measure_overall(60, 400, 0.1, at_limit=at_limit)
    assert broken <= tail_bound(60, DELTA)
    if not at_limit:
        assert before < covered <= oracle + 0.02


@pytest.mark.slow
@pytest.mark.parametrize("at_limit", [False, True])
@pytest.mark.parametrize("limit", [0.1, 0.05])
def test_few_tasks_let_more_of_all_answers_differ_than_promised_in_full(limit: float, at_limit: bool):
    """2,000 tasks of 600 comparisons."""
    broken, covered, oracle, before = measure_overall(2000, 600, limit, at_limit=at_limit)
    assert broken <= tail_bound(2000, DELTA)
    if not at_limit:
        assert before < 0.9 * covered
        assert covered >= 0.75 * oracle  # .80 at .05, .89 at .10


@pytest.mark.slow
@pytest.mark.parametrize("max_disagreement", [None, 0.1, 0.05])
def test_few_tasks_serve_a_slice_below_target_in_full(max_disagreement: float | None):
    """1,000 tasks of 1,000 comparisons; against correlation .85, at least .8 of an oracle's coverage."""
    below, covered, oracle = measure_slices(1000, 1000, max_disagreement=max_disagreement)
    assert below <= tail_bound(1000, DELTA)
    if max_disagreement is None:
        assert covered >= 0.8 * oracle


@pytest.mark.parametrize(("in_shadow", "counted"), [(True, False), (False, True)])
def test_a_lineage_that_never_meets_its_target_is_rarely_served(in_shadow: bool, counted: bool):
    """Twenty refits of a learner just off target, carried at all times, or while serving with the attempts counted."""
    found = measure_lineage(40, [0.102] * 20, 30, 0.25, in_shadow=in_shadow, counted=counted)
    assert found.wrongly * 40 <= tail_bound(40, DELTA)


def test_a_lineage_serves_more_than_versions_that_begin_anew():
    """Ten refits, all of them good: more is answered locally where what was earned is carried."""
    good = [0.04] * 10
    carried = measure_lineage(10, good, 60, 0.25, in_shadow=False, counted=True)
    anew = measure_lineage(10, good, 60, None, counted=True)
    assert carried.local > 1.5 * anew.local


def test_a_worse_refit_costs_less_where_it_is_checked_more():
    """.05 becomes .30: fewer bad answers slip through at a rate of 1 that glides down than at the lineage's own."""
    course = [0.05] * 6 + [0.3]
    unwatched, watched = (measure_lineage(12, course, 250, carries) for carries in (0.0, 1.0))
    assert watched.bad_last < unwatched.bad_last


@pytest.mark.slow
@pytest.mark.parametrize(("in_shadow", "counted"), [(True, False), (False, True)])
def test_a_lineage_that_never_meets_its_target_is_rarely_served_in_full(in_shadow: bool, counted: bool):
    """2,000 lineages of twenty refits."""
    found = measure_lineage(2000, [0.102] * 20, 50, 0.25, in_shadow=in_shadow, counted=counted)
    assert found.wrongly * 2000 <= tail_bound(2000, DELTA)
