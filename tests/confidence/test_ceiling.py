"""The teacher's own ceiling: what follows from how often it agrees with itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apprentice.confidence.ceiling import Pair, ceiling_of, sentence
from apprentice.confidence.settings import TrustSettings
from apprentice.evaluators import ExactMatch, StructuredMatch

SEVEN = 6 / 7
"""One minus the chance score of seven labels that come alike often."""


def pairs_of(differs: float, count: int, draw: random.Random, *, weight: float = 1.0) -> list[Pair]:
    """A remote of seven labels that differs from itself on this share of requests."""
    return [Pair(float(draw.random() >= differs), float(draw.random() >= SEVEN), weight) for _ in range(count)]


# --- the bound ---

LEAF = st.sampled_from(["a", "b", "c", 1, 2, None, True])
OBJECT = st.dictionaries(st.sampled_from("xyz"), LEAF, max_size=3)
VALUE = st.one_of(LEAF, st.lists(LEAF, max_size=4), OBJECT, st.lists(OBJECT, max_size=3))
ANSWER = st.fixed_dictionaries({"p": VALUE, "q": VALUE})


@settings(max_examples=300, deadline=None)
@given(
    answers=st.lists(st.tuples(ANSWER, st.integers(1, 9)), min_size=1, max_size=6),
    student=ANSWER,
    ordered=st.booleans(),
    exact=st.booleans(),
)
def test_no_student_differs_half_as_seldom_as_the_remote_from_itself(
    answers: list[tuple[dict[str, Any], int]], student: dict[str, Any], *, ordered: bool, exact: bool
) -> None:
    """Whatever the remote's distribution over answers, and whatever a student says, be it one of them or not."""
    evaluate = ExactMatch() if exact else StructuredMatch(ordered=ordered, field_weights={"p": 3.0})
    total = sum(weight for _, weight in answers)
    itself = sum(v * w * evaluate(a, b).score for a, v in answers for b, w in answers) / total**2
    for said in (student, *(answer for answer, _ in answers)):
        agreement = sum(w * evaluate(said, a).score for a, w in answers) / total
        assert agreement <= (1 + itself) / 2 + 1e-9


def test_a_tolerance_breaks_the_bound() -> None:
    """Which is why nothing is claimed then: 1 lies within a tolerance of 0 and of 2, which differ."""
    evaluate = StructuredMatch(numeric_tolerance=1.0)
    remote: list[dict[str, Any]] = [{"n": 0}, {"n": 2}]
    itself = sum(evaluate(a, b).score for a in remote for b in remote) / 4
    assert itself == 0.5
    assert sum(evaluate({"n": 1}, a).score for a in remote) / 2 == 1.0 > (1 + itself) / 2
    pairs = [Pair(0.0, 0.0)] * 200
    known = ceiling_of(pairs, TrustSettings(max_disagreement=0.05), bounded=False)
    assert known is not None
    assert (known.best, known.best_high, known.unreachable) == (None, None, ())


# --- the claim ---


@pytest.mark.parametrize(
    ("target", "differs"),
    [
        (TrustSettings(max_disagreement=0.05), 0.10),
        (TrustSettings(max_disagreement_overall=0.10), 0.20),
        (TrustSettings(), 2 * 0.15 * SEVEN),
    ],
)
def test_what_can_just_be_reached_is_hardly_ever_called_out_of_reach(target: TrustSettings, differs: float) -> None:
    """Looked at after every pair, at most delta of the worlds at the edge are called wrong (400 worlds, 3 errors)."""
    draw = random.Random(5)
    wrong = 0
    for _ in range(400):
        known = ceiling_of(pairs_of(differs, 300, draw), target, bounded=True)
        assert known is not None
        wrong += bool(known.unreachable)
    assert wrong / 400 <= 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5


@pytest.mark.parametrize(
    ("target", "key"),
    [
        (TrustSettings(max_disagreement=0.05), "max_disagreement"),
        (TrustSettings(max_disagreement_overall=0.05), "max_disagreement_overall"),
        (TrustSettings(graduate=0.95, coaching_trigger=0.7), "phase2_to_phase3"),
    ],
)
def test_what_is_far_out_of_reach_is_said_soon(target: TrustSettings, key: str) -> None:
    """A remote that differs from itself in three of ten requests is known after 100 of them in nine of ten worlds."""
    draw = random.Random(6)
    found = 0
    for _ in range(100):
        known = ceiling_of(pairs_of(0.3, 100, draw), target, bounded=True)
        assert known is not None
        found += [one.key for one in known.unreachable] == [key]
    assert found >= 90


def test_both_targets_are_held_apart() -> None:
    """Where the stricter of two is out of reach, the other is not named."""
    both = TrustSettings(max_disagreement=0.3, max_disagreement_overall=0.05)
    known = ceiling_of(pairs_of(0.3, 400, random.Random(1)), both, bounded=True)
    assert known is not None
    assert [one.key for one in known.unreachable] == ["max_disagreement_overall"]


def test_hard_requests_do_not_drown_the_others() -> None:
    """Bought fifty times as readily, the deferred ones count a fiftieth: the figures are those of the traffic."""
    draw = random.Random(2)
    served = pairs_of(0.05, 1000, draw)
    deferred = pairs_of(0.5, 1000, draw, weight=0.02)
    known = ceiling_of([*served, *deferred], TrustSettings(), bounded=True)
    assert known is not None
    truth = 1 - (0.05 + 0.02 * 0.5) / 1.02
    assert known.agreement.low <= truth <= known.agreement.high
    assert known.agreement.n < 1100


@pytest.mark.parametrize("differs", [0.0, 0.02, 0.2])
def test_the_interval_holds_the_truth(differs: float) -> None:
    """Of 95 %: of agreement and of correlation, over 400 worlds of 60 pairs, 3 errors allowed."""
    draw, inside, correlated = random.Random(3), 0, 0
    for _ in range(400):
        known = ceiling_of(pairs_of(differs, 60, draw), TrustSettings(), bounded=True)
        assert known is not None
        inside += known.agreement.low - 1e-9 <= 1 - differs <= known.agreement.high + 1e-9
        correlated += known.correlation.low - 1e-9 <= 1 - differs / SEVEN <= known.correlation.high + 1e-9
    assert min(inside, correlated) / 400 >= 0.95 - 3 * (0.05 * 0.95 / 400) ** 0.5


# --- the sentence ---


def test_the_sentence_has_the_figures_and_what_to_do() -> None:
    """One sentence: how often, out of how many, what cannot be reached, by how much, and what to change."""
    numbers = TrustSettings(max_disagreement=0.05)
    pairs = [Pair(float(i % 4 > 0), 0.1, local=float(i % 2)) for i in range(200)]
    known = ceiling_of(pairs, numbers, bounded=True)
    assert known is not None
    said = sentence(known, numbers)
    assert said is not None
    for part in ("75 of 100 cases", "69% to 80%", "200 asked twice", "at most 5.0% disagreement", "12.5%"):
        assert part in said
    assert "max_disagreement" in said
    assert "on all requests" in said
    assert "\n" not in said
    assert known.local is not None
    assert known.local.value == 0.5


SAYINGS: list[tuple[Callable[[], TrustSettings], str]] = [
    (lambda: TrustSettings(max_disagreement=0.05, deferral=False), "at all, as deferral is off"),
    (lambda: TrustSettings(graduate=0.95), "a correlation of 0.95"),
]


@pytest.mark.parametrize(("numbers", "part"), SAYINGS)
def test_it_speaks_of_the_tasks_own_target(numbers: Callable[[], TrustSettings], part: str) -> None:
    """Without deferral there is no share that could be served; a correlation is named as one."""
    known = ceiling_of([Pair(float(i % 2), 0.1) for i in range(300)], numbers(), bounded=True)
    assert known is not None
    assert part in (sentence(known, numbers()) or "")


def test_nothing_is_said_where_nothing_is_known_or_wrong() -> None:
    """No pair, no figures; a steady remote, no sentence."""
    assert ceiling_of([], TrustSettings(), bounded=True) is None
    steady = ceiling_of([Pair(1.0, 0.1)] * 100, TrustSettings(max_disagreement=0.01), bounded=True)
    assert steady is not None
    assert sentence(steady, TrustSettings(max_disagreement=0.01)) is None
    assert steady.best == 1.0
