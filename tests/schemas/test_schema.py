"""Schemas: four ways to write one, one way to be checked."""

import contextlib
import json
import string
from collections.abc import Callable
from datetime import date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, RootModel

from apprentice.local.skeleton import Skeleton
from apprentice.remote.dialects import closed, gemini, strict
from apprentice.schemas.json_schema import FORMATS, KEYWORDS
from apprentice.schemas.schema import Schema, SchemaError, parse_schema, schema_of_document


class Colour(str, Enum):  # noqa: UP042  # the older spelling is the commoner one
    """The commonest way to write a classification."""

    RED = "red"
    BLUE = "blue"


class Ticket(BaseModel):
    """A pydantic model that a config can name."""

    category: Literal["billing", "delivery"]
    tags: list[str] = []


class Line(BaseModel):
    """A model within a model."""

    quantity: Decimal
    unit_price: float = Field(alias="unitPrice")


class Everything(BaseModel):
    """Every kind of field that JSON writes as text, number or list."""

    colour: Colour
    due: date
    at: datetime
    takes: timedelta
    amount: Decimal
    key: UUID
    pair: tuple[int, str]
    tags: set[str]
    raw: bytes
    where: Path
    lines: list[Line]
    note: str | None = None


EVERYTHING = {
    "colour": "red",
    "due": "2024-05-01",
    "at": "2024-05-01T12:00:00+00:00",
    "takes": "PT1H30M",
    "amount": 12.5,
    "key": "00000000-0000-0000-0000-000000000001",
    "pair": [1, "x"],
    "tags": ["b", "a", "c", "b"],
    "raw": "abc",
    "where": "/tmp/x",
    "lines": [{"quantity": "0.10", "unitPrice": 3}],
}


def problems_of(source: object) -> str:
    with pytest.raises(SchemaError) as caught:
        parse_schema(source)
    return str(caught.value)


def refused(schema: Schema, value: object) -> str:
    with pytest.raises(SchemaError) as caught:
        schema.check(value)
    return str(caught.value)


def of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


# -- the short form --------------------------------------------------------------------------------------------------


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
            "due": "date",
            "lines": [{"name": "str", "n": "int"}],
            "where?": {"city": "str"},
            "post-code": "str?",
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
        "due": "2024-05-01",
        "lines": [{"n": 1, "name": "x"}],
    }
    checked = schema.check(value)
    assert list(checked) == ["text", "meta", "tags", "kind", "level", "place", "score", "extra", "due", "lines"]
    assert checked == {**value, "score": 1.0}
    assert schema.check({**value, "where": None, "post-code": "a"})["where"] is None
    assert "where.city: is missing" in refused(schema, {**value, "where": {}})
    assert "due" in refused(schema, {**value, "due": "soon"})


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


def test_a_field_called_type_is_a_field_or_named_as_unclear() -> None:
    """`type: str` is a field; `type: string` beside what is no keyword could be either, and is not guessed at."""
    assert parse_schema({"product": {"type": "str", "price": "float"}}).check({"product": {"type": "x", "price": 1}})
    unclear = problems_of({"product": {"type": "string", "price": "number"}})
    assert "schema.product: has type: 'string' beside price" in unclear
    assert "for a field called type write type: str" in unclear
    assert "beside title" in problems_of({"product": {"type": "string", "title": "string"}})
    assert "JSON Schema, or an object" in problems_of({"type": "object", "price": "number"})
    assert "has 'enum' and no type" in problems_of({"kind": {"enum": ["a", "b"]}})
    assert "has 'properties' and no type" in problems_of({"properties": {"a": {"type": "string"}}})
    nested = parse_schema({"age": {"type": ["integer", "null"], "minimum": 0}})
    assert nested.check({"age": None}) == {"age": None}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"a": "strr"}, "'strr' is no type"),
        ({"a": ["only"]}, "is no enum"),
        ({"a b": "str"}, "is no field name"),
        ({True: "str"}, "has the key True, which is no text"),
        ({}, "not a mapping of field to type"),
        ({"a": "list[str?]"}, "the items of a list cannot be optional. Write list[str]"),
        ({"a": "str??"}, "is no type"),
        ({"a": "str | None"}, "Write str? for a field that is optional"),
        ({"a": "str | int"}, "Write a union of types as JSON Schema"),
        ({"a": [False, "se", "dk"]}, "If False is meant as a word, write it in quotes"),
        ({"a": [8, 9, "089"]}, "If 8 is meant as a word, write it in quotes"),
        ({"a": ["x", "x"]}, "Name each value once"),
        ({"a": "str", "a?": "str"}, "is there twice"),
        ({"a": 3}, "3 is no type"),
        ({"type": "object", "properties": {"a": {"type": "strin"}}}, "Did you mean 'string'?"),
        ({"type": "object", "properties": {}, "required": ["a"]}, "names 'a', which is no property"),
        *(
            ({"type": "object", "properties": {}, "required": names}, "schema.required: is ")
            for names in (5, None, True, "a", {"a": 1}, [5], [["a"]])
        ),
        (of(a={"$ref": "#/$defs/x"}), "points nowhere"),
        (of(a={"$ref": "http://example.com/x"}), "Write '#/$defs/...'"),
        (
            {**of(a={"$ref": "#/$defs/x"}), "$defs": {"x": {"type": "array", "items": {"$ref": "#/$defs/x"}}}},
            "refers to itself",
        ),
        (of(a={"type": "string", "formt": "date"}), "schema.properties.a.formt: is not a keyword of JSON Schema"),
        (of(a={"type": "string", "formt": "date"}), "Did you mean 'format'?"),
        (of(a={"type": "string", "nullable": True}), "Write type: [string, 'null']"),
        (of(a={"type": "string", "format": "phone"}), "schema.properties.a.format: is 'phone', which is not enforced"),
        (of(a={"type": "string", "contentEncoding": "base64"}), "is not a keyword"),
        (of(a={"type": "string", "pattern": "("}), "schema.properties.a.pattern: is not JSON Schema"),
        (of(a={"type": "integer", "minimum": "0"}), "schema.properties.a.minimum: is not JSON Schema"),
        (of(a={"enum": [1, 1.0]}), "Name each value once"),
        (of(a={"enum": [float("nan")]}), "enum[0]: is NaN"),
        (of(a={"type": "array", "items": [{"type": "string"}]}), "items: is [{'type': 'string'}], not a schema"),
        (of(a=3), "schema.properties.a: is 3, not a schema"),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "type": "object"}, "Supported: https://"),
        ({"$schema": "http://json-schema.org/draft-07/schema#", **of(a={"prefixItems": [{}]})}, "is not a keyword"),
        ({"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "array"}, "values are objects"),
    ],
)
def test_a_schema_that_cannot_be_understood_says_why(source: object, message: str) -> None:
    """Each mistake in a schema is named in words."""
    assert message in problems_of(source)


# -- JSON Schema -----------------------------------------------------------------------------------------------------


def test_constraints_of_a_json_schema_are_kept() -> None:
    """A bound, a pattern or a length that the author wrote is checked and stays in the document vendors see."""
    properties = {
        "n": {"type": "integer", "minimum": 1, "maximum": 5, "description": "how many, of the SENDER"},
        "code": {"type": "string", "pattern": "^(?!X)[A-Z]+$", "maxLength": 3},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "uniqueItems": True},
        "map": {"type": "object", "additionalProperties": {"type": "number"}},
        "pair": {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False},
        "free": True,
        "either": {"oneOf": [{"type": "string", "maxLength": 1}, {"type": "integer"}]},
    }
    schema = parse_schema(of(**properties))
    good = {"n": 5, "code": "AB", "tags": ["x"], "map": {"k": 1}, "pair": ["a", 1], "free": [1], "either": "a"}
    assert schema.check(good) == good
    for name, bad in (
        ("n", 6),
        ("code", "ab"),
        ("code", "XA"),
        ("tags", []),
        ("tags", ["x", "x"]),
        ("map", {"k": "not a number"}),
        ("pair", ["a", 1, 2]),
        ("either", "ab"),
    ):
        assert refused(schema, {**good, name: bad}).startswith(name)
    kept = schema.json_schema["properties"]
    assert {name: kept[name] for name in ("n", "code", "tags", "map", "either")} == {
        name: properties[name] for name in ("n", "code", "tags", "map", "either")
    }
    assert "".join(p.text for p in Skeleton.of(schema).pieces(schema.check(good))) == Schema.dumps(schema.check(good))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_that_is_taken_is_enforced(name: str) -> None:
    """A format that nobody checks would be a promise to the author."""
    schema = parse_schema(of(a={"type": "string", "format": name}))
    assert "a: is" in refused(schema, {"a": "\x00 %zz ((~"})


def test_a_bound_concerns_the_values_of_its_type_alone() -> None:
    """The usual nullable form: null has no minimum."""
    schema = parse_schema(
        of(age={"type": ["integer", "null"], "minimum": 0}, name={"type": ["string", "null"], "maxLength": 5})
    )
    assert schema.check({"age": None, "name": None}) == {"age": None, "name": None}
    assert schema.parse('{"age": 3, "name": "Ann"}') == {"age": 3, "name": "Ann"}
    assert "age: is -1" in refused(schema, {"age": -1, "name": None})


def test_an_endless_field_name_is_cut_in_what_is_said_of_it() -> None:
    """Errors go into logs, events and HTTP answers."""
    assert len(refused(parse_schema({"a": "int"}), {"a": 1, "b" * 100_000: 2})) < 200


def test_null_for_an_optional_field_that_takes_none_is_its_absence() -> None:
    """OpenAI writes null for what is left out; where the schema takes null, it stays."""
    optional = {"a": {"type": "string"}, "b": {"type": ["string", "null"]}}
    schema = parse_schema({"type": "object", "properties": optional})
    assert schema.check({"a": None, "b": None}) == {"b": None}


def test_objects_are_closed_unless_they_are_put_together_or_say_otherwise() -> None:
    """Closing one half of an allOf would refuse the other half's fields."""
    closed = parse_schema(of(o={"type": "object", "properties": {"a": {"type": "string"}}}))
    assert "o.b: is not in the schema" in refused(closed, {"o": {"b": 1}})
    opened = parse_schema(of(o={"type": "object", "properties": {}, "additionalProperties": True}))
    assert opened.check({"o": {"b": 1}}) == {"o": {"b": 1}}
    halves = [{"properties": {"a": {"type": "string"}}}, {"properties": {"b": {"type": "number"}}, "required": ["b"]}]
    both = parse_schema(of(o={"type": "object", "allOf": halves}))
    assert both.check({"o": {"b": 1, "a": "x"}}) == {"o": {"b": 1.0, "a": "x"}}
    assert "o.b: is missing" in refused(both, {"o": {"a": "x"}})
    patterned = of(o={"type": "object", "properties": {"a": {}}, "patternProperties": {"^x-": {"type": "integer"}}})
    assert parse_schema(patterned).check({"o": {"x-1": 2, "a": 1}}) == {"o": {"a": 1, "x-1": 2}}


def said(**properties: Any) -> dict[str, Any]:
    return of(o={"type": "object", **properties})


TEXT, WHOLE = {"type": "string"}, {"type": "integer"}


@pytest.mark.parametrize(
    ("source", "value", "text"),
    [
        (of(o={"not": TEXT}), {"a": [1, 2.5, None]}, '{"a":[1,2.5,null]}'),
        (of(o={"enum": [{"a": 1}, [1, 2], "x", None]}), {"a": 1.0}, '{"a":1}'),
        (
            of(o={"oneOf": [of(k={"const": "a"}), of(k={"const": "b"}, m={"type": "number"})]}),
            {"m": 3, "k": "b"},
            '{"k":"b","m":3.0}',
        ),
        (
            of(o={"type": ["object", "null"], "properties": {"a": {"type": ["integer", "null"]}}}),
            {"a": None},
            '{"a":null}',
        ),
        (of(o={"properties": {"a": WHOLE}}), {"a": 2.0}, '{"a":2}'),
        (of(o={"type": "array", "contains": WHOLE, "minContains": 1}), ["a", 1], '["a",1]'),
        (
            said(properties={"a": TEXT, "b": TEXT}, dependentRequired={"a": ["b"]}),
            {"b": "1", "a": "2"},
            '{"a":"2","b":"1"}',
        ),
        (
            said(properties={"a": TEXT}, **{"if": {"required": ["a"]}, "then": {"maxProperties": 1}}),
            {"a": "x"},
            '{"a":"x"}',
        ),
        (
            said(properties={"a": TEXT}, additionalProperties={"type": "number"}),
            {"z": 1, "a": "s"},
            '{"a":"s","z":1.0}',
        ),
        (
            said(anyOf=[{"required": ["a"]}, {"required": ["b"]}], properties={"a": TEXT, "b": TEXT}),
            {"b": "x"},
            '{"b":"x"}',
        ),
        (said(propertyNames={"pattern": "^[a-z]+$"}), {"abc": [{}]}, '{"abc":[{}]}'),
    ],
)
def test_what_the_skeleton_cannot_force_is_still_written_whole(
    source: dict[str, Any], value: object, text: str
) -> None:
    """Every keyword has either its own step or a free one: training walks along any answer that fits."""
    schema = parse_schema(source)
    checked = schema.check({"o": value})
    assert Schema.dumps(checked) == f'{{"o":{text}}}'
    assert "".join(piece.text for piece in Skeleton.of(schema).pieces(checked)) == Schema.dumps(checked)


def test_equal_answers_are_equal_as_text() -> None:
    """3.0 is an integer, and 3 a number; an enum's own spelling wins."""
    schema = parse_schema(of(i={"type": "integer"}, f={"type": "number"}, e={"enum": [1, 2.5]}))
    assert Schema.dumps(schema.check({"f": 3, "e": 1.0, "i": 3.0})) == '{"i":3,"f":3.0,"e":1}'
    assert "64 bits" in refused(schema, {"i": 1e20, "f": 1, "e": 1})


def test_a_value_moves_to_the_earliest_branch_that_it_fits_in_one_step() -> None:
    """Without its null field it fits the first branch, whose number is written with a fraction."""
    branches = [of(a={"type": "number"}), {"type": "object", "properties": {"a": WHOLE, "b": TEXT}, "required": ["a"]}]
    schema = parse_schema(of(o={"anyOf": branches}))
    once = schema.check({"o": {"a": 1, "b": None}})
    assert Schema.dumps(once) == Schema.dumps(schema.check(once)) == '{"o":{"a":1.0}}'


def test_what_is_too_large_for_one_branch_is_tried_in_the_next() -> None:
    """2**63 is a number, and no integer that everybody can read."""
    both = parse_schema(of(b={"anyOf": [{"type": ["integer", "null"]}, {"type": "number"}]}))
    assert both.check({"b": 2.0**63}) == {"b": 2.0**63}
    assert both.check({"b": None}) == {"b": None}
    assert "64 bits" in refused(parse_schema(of(b={"anyOf": [WHOLE, {"type": "null"}]})), {"b": 2.0**63})


def test_unions_within_unions_cost_what_they_are_long() -> None:
    """Thirty within one another: a check that looked twice at each level would take a billion steps."""
    node: dict[str, Any] = {"type": "integer"}
    for _ in range(30):
        node = {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 1}, {"type": "array", "items": node}]}
    value: Any = 3.0
    for _ in range(30):
        value = [value]
    schema = parse_schema(of(o=node))
    assert Schema.dumps(schema.check({"o": value})) == '{"o":' + "[" * 30 + "3" + "]" * 30 + "}"


def test_references_are_written_out_within_a_bound() -> None:
    """A few doubled references would be a million fields; a long list of them is no harm."""
    doubled = {f"d{i}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(25)}
    bomb = {**of(a={"$ref": "#/$defs/d0"}), "$defs": {**doubled, "d25": {"type": "string"}}}
    assert "more than 20,000 parts" in problems_of(bomb)
    shared = {**of(**{f"f{i}": {"$ref": "#/$defs/x"} for i in range(500)}), "$defs": {"x": {"enum": ["a", "b"]}}}
    assert len(parse_schema(shared).fields) == 500
    beside = {**of(a={"$ref": "#/$defs/x", "description": "d", "maxLength": 2}), "$defs": {"x": {"type": "string"}}}
    assert "a: is" in refused(parse_schema(beside), {"a": "abc"})
    assert "a: is" in refused(parse_schema(beside), {"a": 3})


def test_a_union_names_the_fault_of_the_branch_that_was_meant() -> None:
    """`x is not valid under any of the schemas` helps neither a person nor the vendor's second try."""
    schema = parse_schema({"place?": {"city": "str", "zip": "int"}})
    assert refused(schema, {"place": {"city": 1}}) == (
        'place.zip: is missing.; place.city: is 1: it is not of type "string".'
    )


# -- pydantic --------------------------------------------------------------------------------------------------------


def test_a_pydantic_model_can_be_named_or_given() -> None:
    """`module:Model` is imported; the class itself is taken as it is."""
    assert parse_schema(Ticket).fields == ("category", "tags")
    assert "is no pydantic model" in problems_of("decimal:Decimal")
    assert "cannot be imported" in problems_of("no_such_module:Model")
    assert "is not a JSON object" in problems_of(RootModel[list[int]])


def test_a_model_takes_what_json_has_for_its_fields() -> None:
    """Enum, date, time, duration, Decimal, UUID, tuple, set, bytes, path: as a vendor's answer, and again."""
    schema = parse_schema(Everything)
    answer = schema.parse(json.dumps(EVERYTHING))
    assert answer["colour"] == "red"
    assert answer["tags"] == ["a", "b", "c"]
    assert answer["lines"] == [{"quantity": "0.10", "unitPrice": 3.0}]
    assert schema.check(answer) == answer
    assert Schema.dumps(schema.check(answer)) == Schema.dumps(answer)
    assert "".join(piece.text for piece in Skeleton.of(schema).pieces(answer)) == Schema.dumps(answer)


def test_the_document_of_a_model_is_enough_to_train_along() -> None:
    """Training processes are handed the document: they import none of the application's models."""
    model = parse_schema(Everything)
    answer = model.parse(json.dumps(EVERYTHING))
    alone = schema_of_document(json.loads(json.dumps(model.json_schema)))
    assert Skeleton.of(alone).pieces(answer) == Skeleton.of(model).pieces(answer)


def test_a_model_takes_python_values_too_and_stores_json() -> None:
    """An application hands over its own objects: a date, an enum member, a Decimal, or the model itself."""
    schema = parse_schema(Everything)
    spoken = {
        **EVERYTHING,
        "colour": Colour.RED,
        "due": date(2024, 5, 1),
        "amount": Decimal("12.50"),
        "key": UUID(int=1),
        "pair": (1, "x"),
        "tags": {"a", "b", "c"},
        "where": Path("/tmp/x"),
    }
    stored = schema.check(spoken)
    assert stored == schema.check(Everything.model_validate(spoken)) == schema.check(stored)
    assert json.loads(json.dumps(stored)) == stored
    assert stored["amount"] == "12.50"


def test_a_model_is_as_strict_as_json() -> None:
    """A number in quotes is no number; every fault is named with its path."""
    schema = parse_schema(Everything)
    faults = refused(schema, {**EVERYTHING, "pair": ["1", "x"], "colour": "green", "due": "soon"})
    assert {"pair[0]", "colour", "due"} == {part.split(":")[0] for part in faults.split("; ")}


def test_a_model_that_is_read_and_written_under_two_names_is_refused() -> None:
    """What it wrote it could not read again."""

    class Two(BaseModel):
        a: int = Field(validation_alias="in", serialization_alias="out")

    assert "read under this name and written under another" in problems_of(Two)


# -- values ----------------------------------------------------------------------------------------------------------


def test_values_are_checked_strictly_and_every_fault_is_named() -> None:
    """A number in quotes is no number; all the faults of a value come in one error, each with its path."""
    schema = parse_schema({"text": "str", "n": "int", "place": {"zip": "int"}, "tags": "list[str]"})
    with pytest.raises(SchemaError) as caught:
        schema.check({"text": 3, "n": "3", "place": {"zip": True}, "tags": ["a", 1], "more": 0})
    assert [p.path for p in caught.value.problems] == ["text", "n", "place.zip", "tags[1]", "more"]


@pytest.mark.parametrize("value", [[], "x", 3, None, float("nan"), object()])
def test_what_is_no_object_is_refused(value: object) -> None:
    """A task's values are objects, under every schema."""
    for schema in (parse_schema({"a?": "str"}), parse_schema(Ticket)):
        assert refused(schema, value)


def test_an_answer_that_is_no_json_is_a_schema_error() -> None:
    """Text from a model goes through the same door as any value."""
    schema = parse_schema({"a": "int"})
    assert schema.parse('{"a": 1}') == {"a": 1}
    for text, says in (("Sure! Here is", "not JSON"), ("", "is empty"), ('{"a": NaN}', "a: is NaN")):
        with pytest.raises(SchemaError, match=says):
            schema.parse(text)


names = st.text(string.ascii_lowercase + "_", min_size=1, max_size=8).filter(lambda s: s[0] != "_")


@given(st.dictionaries(names, st.sampled_from(["str", "int", "float", "bool", "dict", "list", "any"]), min_size=1))
def test_any_field_name_works(fields: dict[str, str]) -> None:
    """No field name is reserved: not `schema`, not `json`, not `copy`, not a keyword."""
    samples = {"str": "x", "int": 1, "float": 0.5, "bool": True, "dict": {"a": 1}, "list": [1], "any": None}
    value = {name: samples[kind] for name, kind in fields.items()}
    schema = parse_schema(fields)
    assert schema.check(value) == value
    assert schema.parse(Schema.dumps(value)) == value


# -- any schema, any value -------------------------------------------------------------------------------------------

texts = st.text(max_size=6)
numbers = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | texts


def leaf(spec: dict[str, Any], values: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[dict[str, Any], Any]]:
    return st.tuples(st.just(spec), st.just(values))


leaves = st.one_of(
    leaf({"type": "string"}, texts),
    leaf({"type": "string", "minLength": 1, "pattern": "^[a-z]+$"}, st.text(string.ascii_lowercase, min_size=1)),
    leaf({"type": "integer"}, st.integers(-(2**63), 2**63 - 1) | st.integers(-9, 9).map(float)),
    leaf({"type": "number"}, numbers),
    leaf({"type": ["integer", "null"], "minimum": 0}, st.none() | st.integers(0, 9)),
    leaf({"type": ["number", "string"]}, numbers | texts),
    leaf({"type": "boolean", "description": "yes or no"}, st.booleans()),
    leaf({"enum": ["a", "b", None, 1, 2.5]}, st.sampled_from(["a", "b", None, 1.0, 2.5])),
    leaf({"const": 3}, st.just(3.0)),
    leaf({}, scalars | st.lists(scalars, max_size=2)),
    leaf({"type": "object", "additionalProperties": {"type": "number"}}, st.dictionaries(texts, st.integers(0, 9))),
)
type Node = tuple[dict[str, Any], st.SearchStrategy[Any]]


def grown(inner: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    lists = inner.map(lambda n: ({"type": "array", "items": n[0], "maxItems": 3}, st.lists(n[1], max_size=3)))
    unions = st.lists(inner, min_size=2, max_size=3).map(
        lambda nodes: ({"anyOf": [n[0] for n in nodes]}, st.one_of(*[n[1] for n in nodes]))
    )
    return lists | unions | objects(inner)


@st.composite
def objects(draw: Callable[..., Any], inner: st.SearchStrategy[Node]) -> Node:
    fields: dict[str, Node] = draw(st.dictionaries(st.sampled_from("abcdef"), inner, min_size=1, max_size=4))
    required = draw(st.lists(st.sampled_from(sorted(fields)), unique=True))
    spec = {"type": "object", "properties": {name: n[0] for name, n in fields.items()}, "required": required}
    values = st.fixed_dictionaries(
        {name: fields[name][1] for name in required},
        optional={name: n[1] for name, n in fields.items() if name not in required},
    )
    return spec, values


trees = objects(st.recursive(leaves, grown, max_leaves=6))


@given(st.data())
def test_checking_twice_is_checking_once_and_every_answer_has_a_skeleton(data: st.DataObject) -> None:
    """For any schema and any value that fits it: one form, storable, reached in one step, trained on without loss."""
    spec, values = data.draw(trees)
    schema = parse_schema(spec)
    value = data.draw(values)
    checked = schema.check(value)
    text = Schema.dumps(checked)
    assert Schema.dumps(schema.check(checked)) == text
    assert Schema.dumps(schema.parse(text)) == text
    assert Schema.dumps(schema.check(dict(reversed(value.items())))) == text
    assert "".join(piece.text for piece in Skeleton.of(schema).pieces(checked)) == text


@given(trees, st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=8))
def test_any_value_fits_or_is_refused_with_words(node: Node, value: object) -> None:
    """No schema and no value raises anything but a `SchemaError` that names what is at fault."""
    schema = parse_schema(node[0])
    with contextlib.suppress(SchemaError):
        assert schema.check(schema.check(value)) == schema.check(value)


_PARTS: st.SearchStrategy[Any] = st.recursive(
    scalars | st.sampled_from(["string", "integer", "object", "array", "null", "date", "#/$defs/a", "(?!x)"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", *sorted(KEYWORDS)]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(KEYWORDS)), _PARTS, max_size=4))
def test_a_document_of_known_keywords_with_anything_in_them_is_a_schema_or_a_problem(document: dict[str, Any]) -> None:
    """No keyword's value is taken for what it should be; what is accepted checks and can be said to every vendor."""
    for source in (document, {**document, "type": "object"}, {**document, "type": "object", "properties": {"a": {}}}):
        try:
            schema = parse_schema(source)
        except SchemaError:
            continue
        for dialect in (strict, closed, gemini):
            dialect(schema.json_schema)
        with contextlib.suppress(SchemaError):
            schema.check({"a": 1})
