"""Confidence from the tokens of an answer that was written as a whole."""

from __future__ import annotations

import math

import pytest

from apprentice.local.skeleton import Skeleton
from apprentice.local.whole import UNKNOWN, field_confidence
from apprentice.schemas.schema import parse_schema

SKELETON = Skeleton.of(parse_schema({"label": "a | b", "tags": "list[str]", "n": "int"}))
OUTPUT = {"label": "b", "tags": ["x", "y"], "n": 7}


def test_each_field_has_the_tokens_that_touch_its_value() -> None:
    """Names and spaces count for nothing, whatever the server's tokens are."""
    tokens = [
        ('{"label": "', -3.0),
        ('b"', math.log(0.5)),
        (', "tags":', -3.0),
        (' ["x"', math.log(0.9)),
        (', "y"]', math.log(0.8)),
        (',"n":', -3.0),
        ("7", math.log(0.7)),
        ("}", 0.0),
    ]
    assert field_confidence(SKELETON, OUTPUT, tokens) == pytest.approx({"label": 0.5, "tags": 0.72, "n": 0.7})


def test_text_written_otherwise_counts_whole() -> None:
    """Where the places cannot be told (escapes), every token counts for every field: too low rather than too high."""
    tokens = [('{"label":"\\u0062"', math.log(0.5)), (',"tags":["x","y"],"n":7}', math.log(0.5))]
    assert field_confidence(SKELETON, OUTPUT, tokens) == pytest.approx(dict.fromkeys(OUTPUT, 0.25))


def test_no_probabilities_say_nothing() -> None:
    """The same for all."""
    assert field_confidence(SKELETON, OUTPUT, None) == dict.fromkeys(OUTPUT, UNKNOWN)
