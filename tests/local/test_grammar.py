"""Grammars: what they take and what they refuse."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.local.grammar import Grammar, gbnf, of_schema
from apprentice.schemas.schema import Schema, parse_schema

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def takes(grammar: Grammar, content: str) -> bool:
    """Whether the grammar takes this text, all of it and no less."""
    position = grammar.start().advance(content.encode("utf-8", "surrogatepass"))
    return position is not None and position.complete


@given(value=st.dictionaries(st.text(), JSON, max_size=4))
def test_any_json_is_taken_as_it_is_dumped(value: dict[str, Any]) -> None:
    """Free JSON is whatever Schema.dumps writes, except lone surrogates, which no tokenizer can say."""
    content = Schema.dumps(value)
    try:
        content.encode()
    except UnicodeEncodeError:
        assert not takes(of_schema({"type": "object"}), content)
    else:
        assert takes(of_schema({"type": "object"}), content)


@given(value=JSON, cut=st.integers(0, 200))
def test_a_beginning_leads_on_and_is_not_the_whole(value: object, cut: int) -> None:
    """Every beginning of a list is a position to go on from, and only the whole is complete."""
    content = json.dumps([value], ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    grammar = of_schema({"type": "array"})
    assert grammar.split(content + b"more") == len(content)
    part = content[: cut % len(content)]
    position = grammar.start().advance(part)
    assert position is not None
    assert not position.complete
    assert content[len(part)] in position.next_bytes()


@pytest.mark.parametrize(
    ("spec", "good", "bad"),
    [
        ("int", ["0", "-7", "1200"], ["01", "-", "+1", "1.0", "1e3"]),
        ("float", ["0.5", "-1e-07", "3", "1e+20"], [".5", "1.", "1e", "NaN"]),
        ("list[str]", ["[]", '["a"]', '["a","b"]'], ["[,]", '["a",]', '["a" ,"b"]', "[1]"]),
        ("a | b", ['"a"', '"b"'], ['"c"', "a"]),
        ("bool", ["true", "false"], ["True", "null"]),
    ],
)
def test_types(spec: str, good: list[str], bad: list[str]) -> None:
    """Each type takes its own values, in their one way of writing."""
    grammar = of_schema(parse_schema({"x": spec}).json_schema["properties"]["x"])
    assert all(takes(grammar, text) for text in good)
    assert not any(takes(grammar, text) for text in bad)


def test_objects_keep_the_order_of_their_fields_and_leave_out_only_optional_ones() -> None:
    """A closed object is its required fields in order, with the optional ones where they belong."""
    grammar = of_schema(parse_schema({"a": "int", "b": "str?", "c": "bool"}).json_schema)
    assert takes(grammar, '{"a":1,"b":"x","c":true}')
    assert takes(grammar, '{"a":1,"b":null,"c":true}')
    assert takes(grammar, '{"a":1,"c":true}')
    assert not takes(grammar, '{"c":true,"a":1}')
    assert not takes(grammar, '{"a":1}')
    assert not takes(grammar, '{"a":1,"c":true,"d":1}')


def test_only_well_formed_utf8_is_taken() -> None:
    """A string of bytes that is no text never gets through, whatever tokens a model has."""
    grammar = of_schema({"type": "string"})
    for content in (b'"\xff"', b'"\xc0\x80"', b'"\xed\xa0\x80"', b'"\xf5\x80\x80\x80"', b'"\xe2\x82"', b'"\n"'):
        assert grammar.start().advance(content) is None


def test_gbnf_names_every_rule_it_uses() -> None:
    """The notation for servers is closed: each name on a right side has its own line."""
    text = gbnf(of_schema(parse_schema({"a": "list[str]", "b": "float?", "c": "dict", "d": "x | y"}).json_schema))
    rules = [line.split(" ::= ")[0] for line in text.splitlines()]
    assert rules[0] == "root"
    for name in ("string-rest", "any", "digits"):
        assert name in rules
