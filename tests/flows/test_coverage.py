"""Coverage at the promise, against its definition; and that two versions are compared fairly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apprentice.confidence.settings import TrustSettings
from flows.coverage import NO_ANSWER, Told, both_told, candidate_told, compare, coverage
from flows.steps import Answered

SERVED = TrustSettings(max_disagreement=0.25)
OVERALL = TrustSettings(max_disagreement_overall=0.125)
BOTH = TrustSettings(max_disagreement=0.25, max_disagreement_overall=0.125)
CORRELATION = TrustSettings(graduate=0.5)

# Eighths are exact, so that a promise kept exactly is no matter of rounding; few confidences, so that many are alike.
_TOLD = st.builds(
    Told,
    score=st.sampled_from([0.0, 0.5, 1.0]),
    confidence=st.sampled_from([NO_ANSWER, 0.0, 0.3, 0.6, 0.9, 1.0]),
    chance=st.sampled_from([0.0, 0.125, 0.5]),
)
_ROWS = st.lists(st.tuples(_TOLD, st.sampled_from([0.125, 0.5, 1.0])), min_size=1, max_size=12)


def _by_definition(rows: Sequence[tuple[Told, float]], promise: TrustSettings) -> float:
    """The largest slice that keeps every promise, one threshold after the other."""
    total, best = sum(w for _, w in rows), 0.0
    answered = [one.confidence for one, _ in rows if one.confidence >= 0.0]
    for threshold in set(answered):
        inside = [(one, w) for one, w in rows if one.confidence >= threshold]
        share = sum(w for _, w in inside) / total
        lost = sum(w * (1.0 - one.score) for one, w in inside)
        if promise.max_disagreement is not None:
            kept = lost <= promise.max_disagreement * sum(w for _, w in inside)
        elif promise.bounds_served:
            kept = lost <= (1.0 - promise.graduate) * sum(w * (1.0 - (one.chance or 0.0)) for one, w in inside)
        else:
            kept = True
        if promise.max_disagreement_overall is not None:
            kept = kept and lost <= promise.max_disagreement_overall * total
        everything = threshold == min(answered)
        if kept and (everything or (promise.deferral and share >= promise.min_coverage)):
            best = max(best, share)
    return best


@pytest.mark.parametrize("promise", [SERVED, OVERALL, BOTH, CORRELATION], ids=["served", "overall", "both", "rho"])
@given(rows=_ROWS, deferral=st.booleans())
@settings(max_examples=150)
def test_coverage_is_the_largest_slice_that_keeps_the_promise(
    promise: TrustSettings, rows: list[tuple[Told, float]], deferral: bool
) -> None:
    """As its definition says, whatever the ties, the weights and the answers outside the schema."""
    promise = replace(promise, deferral=deferral)
    found = coverage([one for one, _ in rows], [w for _, w in rows], promise)
    assert found == pytest.approx(_by_definition(rows, promise))


def test_equally_confident_answers_enter_together() -> None:
    """No threshold parts them, so the order in which they stand says nothing."""
    alike = [Told(1.0, 0.9)] * 3 + [Told(0.0, 0.9)] * 2
    assert coverage(alike, [1.0] * 5, SERVED) == 0.0
    assert coverage([*alike[:3], Told(0.0, 0.8), Told(0.0, 0.8)], [1.0] * 5, SERVED) == pytest.approx(0.6)


def test_a_slice_that_is_never_certified_covers_nothing() -> None:
    """Three right answers of a hundred are below min_coverage."""
    few = [Told(1.0, 0.9)] * 3 + [Told(0.0, 0.1)] * 97
    assert coverage(few, [1.0] * 100, SERVED) == 0.0
    assert coverage(few, [1.0] * 100, replace(SERVED, min_coverage=0.03)) == pytest.approx(0.03)


@given(rows=st.lists(st.tuples(_TOLD, _TOLD, st.sampled_from([0.125, 1.0])), min_size=1, max_size=30))
@settings(max_examples=50)
def test_who_is_called_candidate_does_not_matter(rows: list[tuple[Told, Told, float]]) -> None:
    """The same resamples are drawn for both, so their odds add up to one, and nobody is better than itself."""
    ours, theirs, weights = [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]
    one = compare(ours, theirs, weights, SERVED, seed="v", resamples=50)
    other = compare(theirs, ours, weights, SERVED, seed="v", resamples=50)
    assert one.odds + other.odds == pytest.approx(1.0)
    assert one.tied == other.tied
    itself = compare(ours, ours, weights, SERVED, seed="v", resamples=50)
    assert (itself.odds, itself.tied) == (0.5, 1.0)


def test_the_same_seed_draws_the_same_whatever_the_size_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run comes to the same verdict."""
    ours = [Told(float(i % 5 > 0), i / 40) for i in range(40)]
    theirs = [Told(float(i % 3 > 0), (40 - i) / 40) for i in range(40)]
    whole = compare(ours, theirs, [1.0] * 40, SERVED, seed="v1")
    assert 0.0 < whole.odds < 1.0
    assert compare(ours, theirs, [1.0] * 40, SERVED, seed="v1") == whole
    assert compare(ours, theirs, [1.0] * 40, SERVED, seed="v2") != whole
    monkeypatch.setattr("flows.coverage._CELLS", 40 * 7)
    assert compare(ours, theirs, [1.0] * 40, SERVED, seed="v1") == whole


def test_it_says_what_it_found_in_words() -> None:
    """A person reads shares of the traffic, and how sure the comparison is."""
    ours = [Told(1.0, 0.9)] * 60 + [Told(0.0, 0.1)] * 40
    theirs = [Told(1.0, 0.9)] * 30 + [Told(0.0, 0.1)] * 70
    said = str(compare(ours, theirs, [1.0] * 100, TrustSettings(max_disagreement=0.001), seed="v"))
    assert said == ("would serve 60 % of the traffic at the promise, the champion 30 % (better in 100 % of resamples)")
    same = str(compare(ours, ours, [1.0] * 100, SERVED, seed="v"))
    assert same.endswith("(better in 0 % of resamples, the same in 100 %)")


def test_what_the_promise_needs_must_be_known() -> None:
    """A result of an older run has no chance scores: it is judged against a disagreement, and not by a correlation."""
    old = Answered("a", {"l": 1}, {"l": 1}, 1.0, {}, 0.9, 1.0, 0.5, 0.8)
    assert both_told([old], SERVED) == ([Told(1.0, 0.9)], [Told(1.0, 0.8)], [0.5])
    assert both_told([old], CORRELATION) == ([], [], [])
    assert candidate_told([old], CORRELATION) == ([], [])
    assert both_told([replace(old, champion_confidence=None)], SERVED) == ([], [], [])
    known = replace(old, chance=0.2, champion_chance=0.3)
    assert both_told([known], CORRELATION) == ([Told(1.0, 0.9, 0.2)], [Told(1.0, 0.8, 0.3)], [0.5])
    invalid = replace(old, local=None, score=None, confidence=None)
    assert candidate_told([invalid], CORRELATION) == ([Told(0.0, NO_ANSWER)], [0.5])
    with pytest.raises(ValueError, match="chance"):
        coverage([Told(1.0, 0.9)], [1.0], CORRELATION)
