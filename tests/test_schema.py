"""Schemas: four ways to write one, one way to be checked."""

import string
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from apprentice.schema import Schema, SchemaError, parse_schema


class Ticket(BaseModel):
    """A pydantic model that a config can name."""

    category: Literal["billing", "delivery"]
    tags: list[str] = []


def problems_of(source: object) -> str:
    with pytest.raises(SchemaError) as caught:
        parse_schema(source)
    return str(caught.value)


def test_short_form_covers_scalars_lists_enums_nesting_and_optionals() -> None:
    """Every type of the short form accepts its own kind of value and gives it back in schema order."""
    schema = parse_schema(
        {
            "text": "str",
            "meta": "dict",
            "tags": "list[str]",
            "kind": "a | b",
            "level": [1, 2, 3],
            "place": {"city": "str", "zip": "int?"},
            "score": "float",
            "extra": "any",
        }
    )
    value = {
        "score": 1,
        "extra": [None],
        "text": "x",
        "meta": {"k": 1},
        "tags": ["t"],
        "kind": "a",
        "level": 2,
        "place": {"city": "Ulm"},
    }
    checked = schema.check(value)
    assert list(checked) == ["text", "meta", "tags", "kind", "level", "place", "score", "extra"]
    assert checked == {**value, "score": 1.0}


def test_two_ways_to_say_the_same_check_the_same() -> None:
    """Short form, JSON Schema and a pydantic model with the same meaning agree on good and bad values."""
    short = parse_schema({"category": "billing | delivery", "n": "int"})
    full = parse_schema(
        {
            "type": "object",
            "properties": {"category": {"$ref": "#/$defs/cat"}, "n": {"type": "integer"}},
            "required": ["category", "n"],
            "$defs": {"cat": {"enum": ["billing", "delivery"]}},
        }
    )
    for schema in (short, full):
        assert schema.check({"n": 1, "category": "billing"}) == {"category": "billing", "n": 1}
        with pytest.raises(SchemaError, match="category"):
            schema.check({"category": "other", "n": 1})


def test_a_pydantic_model_can_be_named_or_given() -> None:
    """`module:Model` is imported; the class itself is taken as it is."""
    for source in (Ticket, "decimal:Decimal"):
        if source is Ticket:
            assert parse_schema(Ticket).fields == ("category", "tags")
        else:
            assert "is no pydantic model" in problems_of(source)
    assert "cannot be imported" in problems_of("no_such_module:Model")


def test_values_are_checked_strictly_and_every_fault_is_named() -> None:
    """A number in quotes is no number; all the faults of a value come in one error, each with its path."""
    schema = parse_schema({"text": "str", "n": "int", "place": {"zip": "int"}, "tags": "list[str]"})
    with pytest.raises(SchemaError) as caught:
        schema.check({"text": 3, "n": "3", "place": {"zip": True}, "tags": ["a", 1], "more": 0})
    assert [p.path for p in caught.value.problems] == ["text", "n", "place.zip", "tags[1]", "more"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"a": "strr"}, "'strr' is no type"),
        ({"a": ["only"]}, "is no enum"),
        ({"a b": "str"}, "is no field name"),
        ({}, "not a mapping of field to type"),
        ({"type": "object", "properties": {"a": {"type": "strin"}}}, "type 'strin', which is not supported"),
        ({"type": "object", "properties": {}, "required": ["a"]}, "names 'a', which is no property"),
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}}, "points nowhere"),
        (
            {
                "type": "object",
                "properties": {"a": {"$ref": "#/$defs/x"}},
                "$defs": {"x": {"type": "array", "items": {"$ref": "#/$defs/x"}}},
            },
            "refers to itself",
        ),
    ],
)
def test_a_schema_that_cannot_be_understood_says_why(source: object, message: str) -> None:
    """Each mistake in a schema is named in words."""
    assert message in problems_of(source)


def test_constraints_of_a_json_schema_are_kept() -> None:
    """A bound, a pattern or a length that the author wrote is checked and stays in the document vendors see."""
    source = {
        "type": "object",
        "properties": {
            "n": {"type": "integer", "minimum": 1, "maximum": 5},
            "code": {"type": "string", "pattern": "^[A-Z]+$", "maxLength": 3},
            "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        },
        "required": ["n", "code", "tags"],
    }
    schema = parse_schema(source)
    assert schema.check({"n": 5, "code": "AB", "tags": ["x"]})
    for bad in (
        {"n": 6, "code": "AB", "tags": ["x"]},
        {"n": 1, "code": "ab", "tags": ["x"]},
        {"n": 1, "code": "A", "tags": []},
    ):
        with pytest.raises(SchemaError):
            schema.check(bad)
    assert schema.json_schema["properties"]["n"]["maximum"] == 5


def test_an_answer_that_is_no_json_is_a_schema_error() -> None:
    """Text from a model goes through the same door as any value."""
    schema = parse_schema({"a": "int"})
    assert schema.parse('{"a": 1}') == {"a": 1}
    with pytest.raises(SchemaError, match="not JSON"):
        schema.parse("Sure! Here is")


names = st.text(string.ascii_lowercase + "_", min_size=1, max_size=8).filter(lambda s: s[0] != "_")


@given(st.dictionaries(names, st.sampled_from(["str", "int", "float", "bool", "dict", "list", "any"]), min_size=1))
def test_any_field_name_works(fields: dict[str, str]) -> None:
    """No field name is reserved: not `schema`, not `json`, not `copy`, not a keyword."""
    samples = {"str": "x", "int": 1, "float": 0.5, "bool": True, "dict": {"a": 1}, "list": [1], "any": None}
    value = {name: samples[kind] for name, kind in fields.items()}
    schema = parse_schema(fields)
    assert schema.check(value) == value
    assert schema.parse(Schema.dumps(value)) == value
