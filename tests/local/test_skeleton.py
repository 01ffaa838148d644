"""The skeleton: what is forced, what is decided, and that nothing is lost between."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.local.skeleton import Choice, Free, Literal, Skeleton
from apprentice.schemas.schema import Schema, parse_schema

EVERYTHING = parse_schema(
    {
        "label": "joy | fear",
        "level": [1, 10, 100],
        "text": "str",
        "count": "int",
        "share": "float?",
        "flag": "bool?",
        "inner": {"a": "int", "b": {"c": "str?"}},
        "items": "list[str]",
        "extra": "dict?",
        "last": "any?",
    }
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
INTEGERS = st.integers(-(2**63), 2**63 - 1)  # others are refused at the door
OUTPUTS = st.fixed_dictionaries(
    {
        "label": st.sampled_from(["joy", "fear"]),
        "level": st.sampled_from([1, 10, 100]),
        "text": TEXT,
        "count": INTEGERS,
        "inner": st.fixed_dictionaries(
            {"a": INTEGERS, "b": st.fixed_dictionaries({}, optional={"c": TEXT | st.none()})}
        ),
        "items": st.lists(TEXT, max_size=3),
    },
    optional={
        "share": FINITE | st.none(),
        "flag": st.booleans() | st.none(),
        "extra": st.dictionaries(TEXT, INTEGERS | TEXT, max_size=2) | st.none(),
        "last": INTEGERS | TEXT | st.lists(st.booleans(), max_size=2) | st.none(),
    },
)


@given(output=OUTPUTS)
def test_pieces_join_to_the_answer(output: dict[str, Any]) -> None:
    """Whatever fits the schema is cut without loss, and every value lies in a decided piece."""
    checked = EVERYTHING.check(output)
    pieces = Skeleton.of(EVERYTHING).pieces(checked)
    assert "".join(piece.text for piece in pieces) == Schema.dumps(checked)
    assert all(piece.decided == bool(piece.path) for piece in pieces)
    assert {"label", "level", "text", "count", "inner.a", "items"} <= {piece.path for piece in pieces}


def test_an_enum_of_words_leaves_one_word_to_decide() -> None:
    """The commonest task costs one decision: the quote before the word is forced, the one behind belongs to it."""
    pieces = Skeleton.of(parse_schema({"emotion": "joy | fear"})).pieces({"emotion": "joy"})
    assert [(p.text, p.decided) for p in pieces] == [('{"emotion":"', False), ('joy"', True), ("}", False)]


def test_a_number_is_decided_with_what_ends_it() -> None:
    """Nothing but the next character says that a number is over, so it belongs to the number's piece."""
    skeleton = Skeleton.of(parse_schema({"a": "int", "b": [1, 10], "c": "int"}))
    pieces = skeleton.pieces({"a": -5, "b": 10, "c": 0})
    assert [(p.text, p.path) for p in pieces] == [
        ('{"a":', ""),
        ("-5,", "a"),
        ('"b":', ""),
        ("10,", "b"),
        ('"c":', ""),
        ("0}", "c"),
    ]


def test_whether_an_optional_field_is_there_is_a_choice_about_the_fields_it_skips() -> None:
    """Going on with c, or ending, decides about a and b as well."""
    walk = Skeleton.of(parse_schema({"a": "str?", "b": "str?", "c": "bool"})).walk()
    assert next(walk) == Literal("{")
    step = walk.send("")
    assert isinstance(step, Choice)
    assert [(o.text, o.paths) for o in step.options] == [
        ('"a":', ("a",)),
        ('"b":', ("a", "b")),
        ('"c":', ("a", "b", "c")),
    ]


def test_the_opening_is_the_same_for_every_answer() -> None:
    """What comes before the first decision can be sent with the prompt."""
    assert Skeleton.of(parse_schema({"o": {"a": "x | y"}})).opening == '{"o":{"a":"'


def test_an_open_object_is_free_text_as_a_whole() -> None:
    """Where unknown fields are allowed nothing can be forced."""
    schema = parse_schema({"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": True})
    step = next(Skeleton.of(schema).walk())
    assert isinstance(step, Free)
    pieces = Skeleton.of(schema).pieces({"a": "x", "b": 1})
    assert [p.text for p in pieces] == ['{"a":"x","b":1}']


def test_an_answer_outside_the_schema_is_refused() -> None:
    """Cutting is no check, but it never cuts wrong."""
    with pytest.raises(ValueError, match="does not follow its schema at 'anger"):
        Skeleton.of(parse_schema({"emotion": "joy | fear"})).pieces({"emotion": "anger"})
