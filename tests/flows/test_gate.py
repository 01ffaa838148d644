"""The gate, by simulation and at its edges."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.errors import EvaluatorError
from apprentice.evaluators import Evaluation
from apprentice.store.records import VersionRecord
from flows.gate import ERROR_RATE, Evidence, Pair, allowed_error, decide, effective, paired_bound
from flows.promote import attempts_of
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
            held.append(Answered(str(i), {"l": local}, {"l": remote}, float(right), {}, 0.5, None, weight))
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
