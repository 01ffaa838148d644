"""What a head sees of inputs of every shape."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("numpy")

import numpy as np

from apprentice.student.features import Plan, alike

NAMES = ["jaccard", "by_length", "covered", "codes", "codes_covered", "trigrams", "length", "begins"]
NAMES += ["found", "conflict", "both"]


def encode(texts: Sequence[str]) -> Any:
    """A unit vector for each text, by its hash."""
    rows = [
        np.random.default_rng(int.from_bytes(hashlib.sha256(t.encode()).digest()[:8])).normal(size=8) for t in texts
    ]
    return np.array([row / np.linalg.norm(row) for row in rows], np.float32).reshape(len(texts), 8)


def test_one_text_is_its_embedding() -> None:
    """And nothing else; where it lies is the same."""
    inputs = [{"text": f"sentence number {n}"} for n in range(30)]
    x, place = Plan.of(inputs).vectors(inputs, encode)
    assert x == pytest.approx(encode([one["text"] for one in inputs]).astype(float))
    assert place == pytest.approx(x, abs=1e-6)


def test_two_long_texts_are_read_by_themselves_and_compared_where_they_are_of_one_kind() -> None:
    """Objects count as text. A question and a passage are not compared embedding by embedding."""
    offers = [
        {"left": {"title": f"the camera model {n}"}, "right": {"title": f"a camera, number {n}"}} for n in range(30)
    ]
    plan = Plan.of(offers)
    assert plan.sides == ("left", "right")
    assert plan.compared
    asked = [{"question": f"is it number {n}?", "passage": f"passage {n} " * 40} for n in range(30)]
    plan = Plan.of(asked)
    assert plan.sides == ("question", "passage")
    assert not plan.compared
    x, place = plan.vectors(asked, encode)
    assert place.shape == (30, 16)
    assert x.shape == (30, 16 + len(alike("a", "b")))


def test_numbers_and_few_values_are_features_of_their_own() -> None:
    """Scaled, and one for each value; what is far out is cut, and what is unknown is nothing."""
    inputs = [{"text": f"words and words {n}", "n": n, "kind": "ab"[n % 2], "on": n % 3 == 0} for n in range(60)]
    plan = Plan.of(inputs)
    x, _ = plan.vectors(inputs, encode)
    assert x.shape == (60, 8 + 1 + 2 + 2)
    assert x[:, 8].mean() == pytest.approx(0.0, abs=1e-9)
    assert (x[:, 9] > 0).tolist() == [n % 2 == 0 for n in range(60)]
    odd = [{"text": "words", "n": 1e12, "kind": "never seen", "on": None, "more": [1, 2]}, {"n": "no number"}, {}]
    found, place = plan.vectors(odd, encode)
    assert np.isfinite(found).all()
    assert np.isfinite(place).all()
    assert found[0, 8] == pytest.approx(4.0 * x[:, 8].std())
    assert not found[0, 9:].any()
    assert not found[1, 8:].any()


def test_a_plan_is_read_as_it_was_written() -> None:
    """By way of JSON; and what is no plan is refused."""
    inputs = [
        {"a": f"some text number {n}", "b": f"some other text {n}", "n": n / 7, "k": n % 2 == 0} for n in range(50)
    ]
    plan = Plan.of(inputs)
    assert plan.sides
    assert plan.numbers
    assert plan.kinds
    assert Plan.of_json(json.loads(json.dumps(plan.to_json()))) == plan
    with pytest.raises(ValueError, match="not what a plan has"):
        Plan.of_json(plan.to_json() | {"sides": ["one"]})


def test_how_alike_two_texts_are() -> None:
    """Equal texts are wholly alike, and the same model number counts where the words differ. All lie in [0, 1]."""
    assert alike("Camera X100", "camera x100") == pytest.approx([1.0] * 9 + [0.0, 1.0])
    assert alike("", "x") == [0.0] * 11
    same = dict(zip(NAMES, alike("sony camera dscw120 silver", "cyber-shot 7.2mp DSC-W120"), strict=True))
    assert same["jaccard"] < 0.2
    assert same["found"] == 1.0
    other = dict(zip(NAMES, alike("sony camera dscw120 silver", "sony camera dscw130 silver"), strict=True))
    assert other["jaccard"] > 0.5
    assert other["conflict"] == 1.0
    assert other["begins"] == pytest.approx(5 / 7)
    for pair in (
        ("a b c", "d"),
        ("ünïcödé 中文 12", "中文"),
        ("", ""),
        ("1,000.5", "1,000.5 kg"),
        ("a1b2 " * 999, "a1b2"),
    ):
        assert all(0.0 <= one <= 1.0 + 1e-9 for one in alike(*pair))


def test_two_objects_are_compared_field_by_field() -> None:
    """By those that both have; one that is missing, or an object that is none, compares as nothing."""
    inputs = [
        {"left": {"title": f"camera x{n}00", "price": "5"}, "right": {"title": f"x{n}00 camera", "size": "2"}}
        for n in range(30)
    ]
    plan = Plan.of(inputs)
    assert plan.parts == ("title",)
    x, _ = plan.vectors(inputs, encode)
    odd, _ = plan.vectors([{"left": {"title": "camera"}, "right": "camera"}, {"left": {"title": "camera"}}], encode)
    likenesses = 2 * len(NAMES)
    assert x.shape[1] == odd.shape[1] == 16 + likenesses + likenesses * (likenesses + 1) // 2
    assert (x[:, 16 + len(NAMES)] > 0.2).all()
    assert not odd[:, 16 + len(NAMES) : 16 + likenesses].any()
