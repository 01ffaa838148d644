"""Decoding: tokens to feed, scores to take, and the confidence that comes of them."""

from __future__ import annotations

import math

import pytest

from apprentice.errors import OutputError
from apprentice.local.decoding import Decoding
from apprentice.local.skeleton import Skeleton
from apprentice.schemas.schema import parse_schema


def letters(text: str) -> list[int]:
    """A tokenizer with a token for each character."""
    return [ord(character) for character in text]


def decoding(spec: object, most: int = 50) -> Decoding:
    return Decoding("t", Skeleton.of(parse_schema(spec)), letters, letters("Q"), most)


def test_an_enum_takes_one_look_where_first_tokens_differ() -> None:
    """The prompt and the opening go in at once; the confidence is the share among the enum's own values."""
    d = decoding({"e": "joy | fear"})
    assert d.pending == letters('Q{"e":"')
    assert d.only == (ord("f"), ord("j"))
    d.choose([0.0, math.log(3)])
    assert d.done
    assert d.output == {"e": "joy"}
    assert d.confidence == pytest.approx(0.75)


def test_options_that_begin_alike_are_told_apart_where_they_differ() -> None:
    """What they share is fed unasked; the probabilities of the looks multiply."""
    d = decoding({"e": "sad | shame | shy"})
    assert d.pending == letters('Q{"e":"s')
    assert d.only == (ord("a"), ord("h"))
    d.choose([-1.0, 2.0])
    assert d.pending == letters("h")
    assert d.only == (ord("a"), ord("y"))
    d.choose([5.0, 1.0])
    assert d.output == {"e": "shame"}
    assert d.confidence == pytest.approx(1 / (1 + math.exp(-3)) / (1 + math.exp(-4)))


def test_forced_text_rides_along_with_the_next_decision() -> None:
    """Between two fields no pass is spent on braces, commas or names."""
    d = decoding({"a": "x | y", "b": "bool"})
    d.choose([1.0, 0.0])
    assert d.pending == letters('x","b":')
    assert d.only == (ord("f"), ord("t"))
    d.choose([0.0, 9.0])
    assert d.output == {"a": "x", "b": True}
    assert d.confidence == d.field_confidence["a"] < d.field_confidence["b"]


def test_free_text_goes_token_by_token_until_the_grammar_is_complete() -> None:
    """Each token moves the grammar on; the joint probability is the field's confidence."""
    d = decoding({"s": "str"})
    assert d.only is None
    for character in 'hi"':
        assert d.position is not None
        d.write([ord(character)], character.encode(), 0.5, d.position.advance(character.encode()))
    assert d.done
    assert d.output == {"s": "hi"}
    assert d.confidence == pytest.approx(0.125)
    assert d.answer_tokens == 3


def test_text_that_a_server_wrote_is_checked_against_the_grammar() -> None:
    """A server that stops early or ignores the grammar gives an OutputError, not an answer."""
    d = decoding({"s": "str"})
    with pytest.raises(OutputError, match="not finished or not in the schema"):
        d.write([1], b"hi", 0.5, None)


def test_an_absent_optional_field_has_a_confidence() -> None:
    """Leaving it out was a decision about it."""
    d = decoding({"a": "x | y", "b": "str?"})
    d.choose([1.0, 0.0])
    assert d.only == (ord(","), ord("}"))
    d.choose([0.0, 2.0])
    assert d.output == {"a": "x"}
    assert d.field_confidence["b"] == pytest.approx(1 / (1 + math.exp(-2)))


def test_the_budget_of_tokens_ends_an_endless_answer() -> None:
    """local.max_new_tokens bounds what is decided, in all fields together."""
    d = decoding({"s": "str"}, most=2)
    assert d.position is not None
    inside = d.position.advance(b"a")
    d.write([1, 2], b"aa", 1.0, inside)
    with pytest.raises(OutputError, match=r"local\.max_new_tokens"):
        d.write([1], b"a", 1.0, inside)


def test_every_value_gets_its_probability() -> None:
    """What parts from the answer at one token together shares that token's probability evenly; it sums to one."""
    d = decoding({"e": "sad | shame | shy | joy", "b": "bool"})
    assert d.only == (ord("j"), ord("s"))
    d.choose([math.log(0.1), math.log(0.9)])
    assert d.only == (ord("a"), ord("h"))
    d.choose([math.log(0.7), math.log(0.3)])
    d.choose([0.0, 0.0])
    assert d.output == {"e": "sad", "b": False}
    assert d.distributions["e"] == pytest.approx({'"joy"': 0.1, '"sad"': 0.63, '"shame"': 0.135, '"shy"': 0.135})
    assert d.distributions["b"] == pytest.approx({"true": 0.5, "false": 0.5})
    assert d.distributions["e"]['"sad"'] == pytest.approx(d.field_confidence["e"])


def test_a_number_has_one_probability_whatever_character_may_follow_it() -> None:
    spec = {
        "type": "object",
        "properties": {"n": {"enum": [1, 10, 2]}, "later": {"type": "boolean"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    d = decoding(spec)
    assert d.only == (ord("1"), ord("2"))
    d.choose([math.log(0.75), math.log(0.25)])
    assert sorted(map(chr, d.only)) == [",", "0", "}"]
    d.choose([math.log({",": 0.2, "0": 0.3, "}": 0.5}[chr(token)]) for token in d.only])
    assert d.output == {"n": 1}
    assert d.distributions["n"] == pytest.approx({"1": 0.75 * 0.7, "10": 0.75 * 0.3, "2": 0.25})


def test_free_text_and_fields_within_fields_have_no_distribution() -> None:
    place = {"type": "object", "properties": {"kind": {"enum": ["a", "b"]}}, "required": ["kind"]}
    spec = {
        "type": "object",
        "properties": {"place": place | {"additionalProperties": False}, "n": {"type": "integer"}},
        "required": ["place", "n"],
        "additionalProperties": False,
    }
    d = decoding(spec)
    d.choose([1.0, 0.0])
    assert d.distributions == {}
