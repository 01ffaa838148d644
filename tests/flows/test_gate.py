"""The gate, by simulation and at its edges."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.confidence.settings import TrustSettings
from apprentice.errors import EvaluatorError
from apprentice.evaluators import Evaluation
from apprentice.store.records import VersionRecord
from flows.coverage import Compared, Told, candidate_told, compare, coverage
from flows.gate import ERROR_RATE, FEWEST, Evidence, Pair, Verdict, allowed_error, decide, effective, paired_bound
from flows.promote import attempts_of, evidence
from flows.steps import Answered
from flows.validate import figures_of

HELD_OUT, CANDIDATES = 400, 200
GOOD = Evidence(
    answered=100,
    valid=100,
    correlation=0.9,
    correlation_low=0.8,
    active=True,
    reproduced=1.0,
    pairs=None,
    serving=False,
)


def _pairs(draw: random.Random, champion: float, difference: float, shared: float) -> list[Pair]:
    """One candidate on the held-out examples, agreeing ``difference`` more often than the champion.

    ``shared`` is the share of examples on which both do the same; on the rest they err independently.
    """
    pairs = []
    own = difference / (1.0 - shared)
    for _ in range(HELD_OUT):
        right = draw.random() < champion
        if draw.random() < shared:
            pairs.append(Pair(float(right), float(right)))
        else:
            pairs.append(Pair(float(draw.random() < champion + own), float(right)))
    return pairs


def _promoted(difference: float, *, shared: float, serving: bool, champion: float = 0.85) -> float:
    draw = random.Random(7)
    passed = 0
    for _ in range(CANDIDATES):
        pairs = _pairs(draw, champion, difference, shared)
        evidence = replace(GOOD, answered=HELD_OUT, valid=HELD_OUT, pairs=pairs, serving=serving)
        passed += decide(evidence, coaching_trigger=0.7, margin=0.01).promoted
    return passed / CANDIDATES


@pytest.mark.parametrize("serving", [True, False])
@pytest.mark.parametrize("shared", [0.0, 0.5])
def test_slightly_worse_candidates_stay_out(shared: float, serving: bool) -> None:
    """Of 200 candidates two points worse than the champion at most 5 % are promoted."""
    assert _promoted(-0.02, shared=shared, serving=serving) <= 0.05


@pytest.mark.parametrize("shared", [0.25, 0.5])
def test_better_candidates_get_in(shared: float) -> None:
    """Of 200 candidates three points better than the champion at least 60 % are promoted."""
    assert _promoted(0.03, shared=shared, serving=True) >= 0.60


PROMISE = TrustSettings(max_disagreement=0.05)
# Versions as (ease, spread): what is right with which probability, and is known to the version, is
# 1 / (1 + exp(-(ease + spread * z + e))), z of the request and e of the version, both N(0, 1). In brackets what each
# can serve at 5 % disagreement, and how often it agrees.
CHAMPION_LIKE = (1.20, 1.5)  # .31, .69
WORSE = (0.73, 1.5)  # .21, .62
BETTER = (1.59, 1.5)  # .41, .74
SHARPER = (1.08, 2.5)  # .41, .63
DULLER = (1.33, 0.8)  # .21, .73


@cache
def _against_champion(candidate: tuple[float, float], n: int, count: int) -> Sequence[Evidence]:
    draw = np.random.default_rng(11)
    found = []
    for number in range(count):
        z, luck = draw.normal(size=n), draw.random(n)
        told = []
        for ease, spread in (candidate, CHAMPION_LIKE):
            sure = 1.0 / (1.0 + np.exp(-(ease + spread * z + draw.normal(size=n))))
            # On half of the examples both are right or wrong together, as far as they are as sure.
            right = np.where(draw.random(n) < 0.5, luck, draw.random(n)) < sure
            told.append([Told(float(s), float(g)) for s, g in zip(right, sure, strict=True)])
        covered = compare(told[0], told[1], [1.0] * n, PROMISE, seed=str(number), resamples=200)
        pairs = [Pair(ours.score, theirs.score) for ours, theirs in zip(*told, strict=True)]
        found.append(replace(GOOD, answered=n, valid=n, pairs=pairs, coverage=covered))
    return found


def _passes(
    candidate: tuple[float, float], *, n: int = HELD_OUT, count: int = CANDIDATES, **asked: Any
) -> tuple[float, float]:
    """The share of candidates that pass, and of those that would by the paired test alone."""
    passed = by_mean = 0
    for one in _against_champion(candidate, n, count):
        whole = replace(one, **asked)
        passed += decide(whole, coaching_trigger=0.7, margin=0.01).promoted
        by_mean += decide(replace(whole, coverage=None), coaching_trigger=0.7, margin=0.01).promoted
    return passed / count, by_mean / count


def test_candidates_that_would_serve_no_more_stay_out() -> None:
    """Of those as good as a champion that serves three in ten pass, as odds of .7 say; of clearly worse ones few."""
    assert _passes(CHAMPION_LIKE, serving=True)[0] <= 0.40
    assert _passes(WORSE, serving=True)[0] <= 0.12


def test_candidates_that_would_serve_more_get_in_though_they_agree_less_often() -> None:
    """Ten points more of the traffic: more than half pass, where the test of the mean lets hardly one in."""
    assert _passes(BETTER, serving=True)[0] >= 0.50
    passed, by_mean = _passes(SHARPER, serving=True)
    assert passed >= 0.50
    assert by_mean <= 0.05


def test_candidates_that_would_serve_less_stay_out_though_they_agree_more_often() -> None:
    """Five points more agreement, all of it on requests that are deferred, and ten points less served."""
    passed, by_mean = _passes(DULLER, serving=True)
    assert passed <= 0.20
    assert by_mean >= 0.60


def test_while_nothing_is_served_a_candidate_is_let_in_more_easily() -> None:
    """Few that would serve more are refused then, and most of the equal ones pass."""
    assert _passes(BETTER, serving=False)[0] >= 0.85
    assert _passes(CHAMPION_LIKE, serving=False)[0] >= 0.60
    assert _passes(WORSE, serving=False)[0] <= 0.45


def test_refits_are_refused_only_when_clearly_worse() -> None:
    """Of those as good as the champion nine in ten pass, of those that would serve ten points less a third."""
    assert _passes(CHAMPION_LIKE, serving=True, refit=True)[0] >= 0.85
    assert _passes(BETTER, serving=True, refit=True)[0] >= 0.97
    assert _passes(SHARPER, serving=True, refit=True)[0] >= 0.80
    assert _passes(WORSE, serving=True, refit=True)[0] <= 0.40


def test_equal_versions_pass_as_often_on_few_examples_as_on_many() -> None:
    """From FEWEST on, odds mean the same whatever the number of examples: of equal candidates 30 % reach .7."""
    for n in (FEWEST, 150):
        assert 0.2 <= _passes(CHAMPION_LIKE, n=n, count=300, serving=True)[0] <= 0.4


_LABELS = 7


def _labelled(
    seed: int, candidate: tuple[float, float, float], champion: tuple[float, float, float], n: int = 400
) -> tuple[list[Answered], dict[str, dict[str, int]]]:
    """Answers of versions that are sure of a share of the requests, right on one share of those and on another of the
    rest; and the champion's answers. What is easy is easy for both."""
    draw = random.Random(seed)
    rows, champions = [], {}
    for i in range(n):
        remote, ease, told = draw.randrange(_LABELS), draw.random(), []
        for sure, right_when_sure, right_else in (candidate, champion):
            is_sure = ease < sure
            is_right = draw.random() < (right_when_sure if is_sure else right_else)
            local = remote if is_right else (remote + 1 + draw.randrange(_LABELS - 1)) % _LABELS
            told.append((local, 0.6 + 0.4 * draw.random() if is_sure else 0.5 * draw.random()))
        (ours, g), (theirs, h) = told
        champions[str(i)] = {"l": theirs}
        row = Answered(str(i), {"l": ours}, {"l": remote}, float(ours == remote), {}, g, float(theirs == remote))
        rows.append(replace(row, champion_confidence=h))
    return rows, champions


def _verdicts(
    rows: list[Answered], champions: dict[str, dict[str, int]], promise: TrustSettings
) -> tuple[Verdict, Verdict, Evidence]:
    """By coverage, and as it was judged before: by its correlation overall and the mean difference."""
    found = figures_of(rows, _same, "new", "old", True, 1.0, 1.0, [], champions=champions)
    told = evidence(found, serving=True, promise=promise)
    return (
        decide(told, coaching_trigger=0.6, margin=0.01),
        decide(replace(told, coverage=None), coaching_trigger=0.6, margin=0.01),
        told,
    )


@pytest.mark.parametrize("promise", [PROMISE, TrustSettings(graduate=0.94)], ids=["disagreement", "correlation"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_candidate_that_would_serve_more_is_not_refused_for_what_is_deferred(
    seed: int, promise: TrustSettings
) -> None:
    """It is sure of 45 % and nearly always right there, and guesses on the rest: it was refused for its correlation."""
    now, before, told = _verdicts(*_labelled(seed, (0.45, 0.99, 0.30), (0.20, 0.99, 0.62)), promise)
    assert 0.45 < told.correlation < 0.6
    assert not before.promoted
    assert {"correlation", "not_worse_than_champion"} == {c.name for c in before.checks if not c.passed}
    assert now.promoted, now.reason
    assert "would serve" in now.reason
    assert told.coverage is not None
    assert told.coverage.candidate > told.coverage.champion + 0.1


@pytest.mark.parametrize("promise", [PROMISE, TrustSettings(graduate=0.94)], ids=["disagreement", "correlation"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_candidate_that_agrees_more_often_and_would_serve_less_is_refused(seed: int, promise: TrustSettings) -> None:
    """Ten points better overall, and sure of less: it was promoted, and would have served half of what is served."""
    now, before, told = _verdicts(*_labelled(seed, (0.20, 0.99, 0.72), (0.45, 0.99, 0.30)), promise)
    assert told.correlation > 0.6
    assert before.promoted, before.reason
    assert [c.name for c in now.checks if not c.passed] == ["coverage_odds"]


def test_where_both_would_serve_everything_the_mean_score_decides() -> None:
    """Coverage cannot tell them apart; the better of the two is."""
    pairs = [Pair(1.0, 1.0)] * 360 + [Pair(1.0, 0.0)] * 20 + [Pair(0.0, 1.0)] * 2
    alike = replace(GOOD, correlation=0.1, serving=True, pairs=pairs, coverage=Compared(1.0, 1.0, 0.5, 1.0, 382.0))
    passed = decide(alike, coaching_trigger=0.7, margin=0.01)
    assert passed.promoted
    assert "not_worse_than_champion" in passed.reason
    assert "the same in 100 %" in passed.reason
    worse = replace(alike, pairs=[Pair(p.champion, p.candidate) for p in pairs])
    assert not decide(worse, coaching_trigger=0.7, margin=0.01).promoted


def test_too_few_confidences_leave_the_decision_to_the_mean_score() -> None:
    """And to the correlation, as where none is known."""
    known = Compared(0.9, 0.1, 1.0, 0.0, FEWEST - 1.0)
    few = replace(GOOD, correlation=0.1, serving=True, pairs=[Pair(1.0, 0.0)] * 400, coverage=known)
    verdict = decide(few, coaching_trigger=0.7, margin=0.01)
    assert [c.name for c in verdict.checks if not c.passed] == ["correlation"]
    assert decide(replace(few, coverage=replace(known, n=FEWEST)), coaching_trigger=0.7, margin=0.01).promoted


def test_a_refit_is_held_to_its_coverage_and_to_its_mean_if_it_would_not_rather_serve_more() -> None:
    """Clearly worse in coverage is refused, and in its mean unless what is worse would be deferred anyway."""
    pairs = [Pair(1.0, 1.0)] * 300
    known = Compared(0.3, 0.35, 0.06, 0.0, 300.0)
    fine = replace(GOOD, refit=True, serving=True, pairs=pairs, coverage=known)
    assert decide(fine, coaching_trigger=0.7, margin=0.01).promoted
    for change, failed in (
        ({"coverage": replace(known, odds=0.05)}, "coverage_odds"),
        ({"pairs": [Pair(0.0, 1.0)] * 60 + pairs}, "not_clearly_worse"),
    ):
        verdict = decide(replace(fine, **change), coaching_trigger=0.7, margin=0.01)
        assert [c.name for c in verdict.checks if not c.passed] == [failed]
    deferred = replace(fine, pairs=[Pair(0.0, 1.0)] * 60 + pairs, coverage=replace(known, odds=0.6))
    assert decide(deferred, coaching_trigger=0.7, margin=0.01).promoted
    alike = replace(deferred, coverage=Compared(1.0, 1.0, 0.5, 1.0, 300.0))
    assert not decide(alike, coaching_trigger=0.7, margin=0.01).promoted


def test_a_larger_margin_lets_more_in() -> None:
    """The margin is what it says: the bound is compared with -margin."""
    pairs = [Pair(1.0, 1.0)] * 380 + [Pair(0.0, 1.0)] * 12 + [Pair(1.0, 0.0)] * 8
    serving = replace(GOOD, pairs=pairs, serving=True)
    assert not decide(serving, coaching_trigger=0.7, margin=0.01).promoted
    assert decide(serving, coaching_trigger=0.7, margin=0.05).promoted


def test_a_handful_of_equal_answers_proves_nothing() -> None:
    """Ten examples on which both do the same do not make a serving champion's successor."""
    bound = paired_bound([Pair(1.0, 1.0)] * 10, margin=0.01)
    assert bound < -0.01


def test_error_is_small_where_it_costs() -> None:
    """More error is allowed only while nothing is served and little is held out."""
    assert allowed_error(50, serving=True) == ERROR_RATE
    assert allowed_error(400, serving=False) == ERROR_RATE
    assert allowed_error(50, serving=False) == 0.30


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({"valid": 97}, "schema_validity"),
        ({"active": False}, "probe_active"),
        ({"reproduced": 0.95}, "probe_reproduced"),
        ({"correlation_low": 0.0}, "correlation_low"),
        ({"correlation": 0.69, "serving": True}, "correlation"),
    ],
)
def test_each_condition_can_refuse(change: dict[str, float], failed: str) -> None:
    """Every condition of the gate refuses alone, and the reason names it with its figure."""
    verdict = decide(replace(GOOD, **change), coaching_trigger=0.7, margin=0.01)
    assert not verdict.promoted
    assert [check.name for check in verdict.checks if not check.passed] == [failed]
    assert verdict.reason.startswith(failed)


def test_nothing_held_out_promotes_nobody() -> None:
    """Without a held-out example there is no evidence, and no promotion."""
    assert not decide(replace(GOOD, answered=0, valid=0), coaching_trigger=0.7, margin=0.01).promoted


def _figures(values: Sequence[float]) -> list[Pair]:
    return [Pair(value, 0.5) for value in values]


def test_scores_between_0_and_1_count_by_their_size() -> None:
    """Partial scores are paired as they are: a steady small gain is seen sooner than a rare large one."""
    steady = paired_bound(_figures([0.6] * 100), margin=0.0)
    rare = paired_bound(_figures([1.0] * 20 + [0.5] * 80), margin=0.0)
    assert steady > rare


def test_the_gate_is_given_the_lower_end_of_a_two_sided_interval() -> None:
    """A candidate that only guesses reaches a lower end above 0 in about one case of forty, not in one of twenty."""
    passed = 0
    for n in range(400):
        draw = random.Random(n)
        judged = [
            Answered(str(i), {"l": draw.randrange(4)}, {"l": draw.randrange(4)}, None, {}, 0.5, None)
            for i in range(150)
        ]
        judged = [replace(a, score=float(a.local == a.remote)) for a in judged]
        found = figures_of(judged, _same, str(n), None, True, 1.0, 1.0, [])
        passed += found.correlation_low > 0.0
    assert passed / 400 <= 0.045


def _same(local: object, remote: object) -> Evaluation:
    return Evaluation(float(local == remote), {})


def test_an_example_is_no_chance_match_for_itself() -> None:
    """Where no two examples have the same answer chance explains nothing, whatever their number."""
    for count in (1, 2, 5, 20):
        judged = [Answered(str(i), {"l": i}, {"l": i}, 1.0, {}, 0.5, None) for i in range(count)]
        half = [replace(a, local={"l": -1}, score=0.0) if i % 2 else a for i, a in enumerate(judged)]
        for answers in (judged, half):
            found = figures_of(answers, _same, "v", None, True, 1.0, 1.0, [])
            assert found.agreement == pytest.approx(sum(a.score or 0.0 for a in answers) / count)
            # The wrong ones of `half` all say -1, which is nobody's answer: chance is 0 there too.
            assert found.correlation == pytest.approx(found.agreement)


def test_an_evaluator_that_fails_on_chance_costs_one_comparison() -> None:
    """What it cannot compare says nothing about the candidate."""

    calls = itertools.count()

    def evaluate(local: object, remote: object) -> Evaluation:
        if next(calls) == 3:
            raise EvaluatorError("not this time")
        return _same(local, remote)

    judged = [Answered(str(i), {"l": i}, {"l": i if i else 9}, float(i > 0), {}, 0.5, None) for i in range(5)]
    # The first one, which disagreed, is the one that is lost.
    assert figures_of(judged, evaluate, "v", None, True, 1.0, 1.0, []).agreement == 1.0


def _held_out(draw: random.Random, requests: int, *, rate: float) -> list[Answered]:
    """What is held out of 500 requests that all were bought, and of later ones when deferred or spot-checked.

    Local answers agree on .97 of the four fifths that are served, on .45 of what is deferred. There are two labels.
    """
    held = []
    for i in range(500 + requests):
        deferred, checked = draw.random() < 0.2, draw.random() < rate
        if i >= 500 and not (deferred or checked):
            continue
        remote = draw.randrange(2)
        right = draw.random() < (0.45 if deferred else 0.97)
        local = remote if right else 1 - remote
        weight = rate if i >= 500 and deferred else 1.0
        if draw.random() < 0.2:
            sure = 0.2 if deferred else 0.9
            held.append(Answered(str(i), {"l": local}, {"l": remote}, float(right), {}, sure, None, weight))
    return held


@pytest.mark.parametrize("requests", [1_000, 10_000, 30_000])
def test_a_version_is_judged_by_the_traffic_and_not_by_what_was_deferred(requests: int) -> None:
    """Its correlation over the traffic is 2 * .866 - 1; the plain mean falls to .17 as deferred requests pile up."""
    draws = random.Random(requests)
    found = [
        figures_of(_held_out(draws, requests, rate=0.04), _same, str(n), None, True, 1.0, 1.0, []) for n in range(20)
    ]
    assert sum(one.correlation for one in found) / len(found) == pytest.approx(0.732, abs=0.03)
    assert sum(one.correlation_low < 0.732 < one.correlation_high for one in found) >= 16


@pytest.mark.parametrize("requests", [1_000, 10_000])
def test_coverage_is_that_of_the_traffic_however_many_deferred_requests_are_held_out(requests: int) -> None:
    """Four fifths may be served; of those held out, fewer and fewer are such requests: .59, then .26."""
    draws = random.Random(requests)
    held = [_held_out(draws, requests, rate=0.04) for _ in range(20)]
    found = [coverage(*candidate_told(rows, PROMISE), PROMISE) for rows in held]
    assert statistics.median(found) == pytest.approx(0.8, abs=0.06)
    plain = [sum(a.confidence == 0.9 for a in rows) / len(rows) for rows in held]
    assert sum(plain) / len(plain) < 0.65


def test_the_paired_bound_is_that_of_as_many_pairs_as_the_weights_are_worth() -> None:
    """Pairs of one weight, whatever it is, are pairs; those of no weight to speak of are none."""
    pairs = _pairs(random.Random(1), 0.85, 0.0, 0.5)
    plain = paired_bound(pairs, margin=0.01)
    assert paired_bound([replace(p, weight=0.04) for p in pairs], margin=0.01) == pytest.approx(plain)
    hard = [Pair(1.0, 0.0, 1e-6)] * 5_000  # a candidate that is better on what was deferred alone
    assert paired_bound([*pairs, *hard], margin=0.01) == pytest.approx(plain, abs=0.03)
    assert allowed_error(effective([*pairs, *hard]), serving=False) == pytest.approx(
        allowed_error(len(pairs), serving=False), rel=0.05
    )


def test_chance_is_drawn_from_the_traffic() -> None:
    """Label 1 is rare but always deferred: saying 0 agrees by chance alone, however often a 1 was bought."""
    judged = [Answered(str(i), {"l": 0}, {"l": 0}, 1.0, {}, 0.5, None) for i in range(190)]
    judged += [Answered(f"d{i}", {"l": 0}, {"l": 1}, 0.0, {}, 0.5, None, 0.05) for i in range(200)]
    found = figures_of(judged, _same, "v", None, True, 1.0, 1.0, [])
    assert found.agreement == pytest.approx(0.95)
    assert found.correlation == pytest.approx(0.0, abs=0.25)


_STATUSES = st.lists(st.sampled_from(["candidate", "rejected", "champion", "retired", "rolled_back"]), max_size=12)


@given(before=_STATUSES, after=_STATUSES, waiting=st.integers(0, 5), refused=st.integers(0, 5))
def test_whoever_chooses_every_version_tried_beside_it_counts(
    before: list[Any], after: list[Any], waiting: int, refused: int
) -> None:
    """What waits and what was refused count on both sides, up to what was champion once, and nothing beyond."""
    statuses: list[Any] = [*before, "retired", *["candidate"] * waiting, "candidate", *["rejected"] * refused]
    if after:
        statuses += ["champion", *after]
    versions = [
        VersionRecord(f"v{i}", "mood", status, "", "", 1, 1, "", None, "", created_at=float(i))
        for i, status in enumerate(statuses)
    ]
    group = versions[len(before) + 1 : len(before) + 2 + waiting + refused]
    assert {attempts_of(versions, version) for version in group} == {waiting + 1 + refused}
