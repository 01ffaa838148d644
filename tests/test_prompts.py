"""How a request is written: the local model's prompt tells any two inputs apart."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from apprentice.prompts import compact_prompt
from apprentice.schemas.schema import Schema, parse_schema

TEXT = parse_schema({"text": "str"})
TWO = parse_schema({"question": "str?", "statement": "str?"})
MANY = parse_schema({"title": "str", "body": "str", "meta": "dict", "note": "str?", "tags": "list", "any": "any?"})


def test_a_task_of_one_text_is_asked_that_text() -> None:
    """What versions were trained on, to the letter, so that they stay valid."""
    for text in ("late parcel", "", "null", '"quoted"', "two\nlines", "text: x"):
        assert compact_prompt({"text": text}, TEXT) == text


def test_which_of_two_optional_fields_it_is_can_be_seen() -> None:
    """The short form is for schemas of one field, not for inputs that happen to have one."""
    assert compact_prompt({"question": "it is late"}, TWO) == "question: it is late"
    assert compact_prompt({"statement": "it is late"}, TWO) == "statement: it is late"
    assert compact_prompt({}, TWO) == ""


def test_several_fields_are_a_line_each_and_no_text_can_imitate_a_field() -> None:
    """Lines of a text are indented; what is empty, null or absent looks so."""
    schema = parse_schema({"a": "str", "b": "str?", "c": "dict?"})
    assert compact_prompt({"a": "x", "b": "y"}, schema) == "a: x\nb: y"
    assert compact_prompt({"a": "x\nb: y"}, schema) == "a: x\n  b: y"
    assert compact_prompt({"a": "x", "b": None, "c": {}}, schema) == "a: x\nb: null\nc: {}"
    assert compact_prompt({"a": "null", "b": "null"}, schema) == 'a: null\nb: "null"'


def read_back(prompt: str, schema: Schema) -> dict[str, Any]:
    """The input that a prompt of several fields was written for."""
    value: dict[str, Any] = {}
    for line in prompt.replace("\n  ", "\0").split("\n") if prompt else []:
        if line.startswith('"'):
            name, end = json.JSONDecoder().raw_decode(line)
            rest = line[end + 2 :]
        else:
            name, _, rest = line.partition(": ")
        if name in schema.text_fields:
            value[name] = rest.replace("\0", "\n")
            continue
        try:
            value[name] = json.loads(rest)
        except ValueError:
            value[name] = rest.replace("\0", "\n")
    return value


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8) | st.sampled_from(
    ["a\nbody: b", "\n", "1", "null", '"', '"a"', "[]", "NaN", " 1 ", "{", "\r\n", "x\n  y"]
)
data = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
inputs = st.fixed_dictionaries(
    {
        "title": texts,
        "body": texts,
        "meta": st.dictionaries(texts, data, max_size=2),
        "tags": st.lists(data, max_size=2),
    },
    optional={"note": st.none() | texts, "any": data},
)


@given(inputs)
def test_an_input_can_be_read_back_from_its_prompt(value: dict[str, Any]) -> None:
    """So no two inputs have one prompt."""
    value = MANY.check(value)
    assert read_back(compact_prompt(value, MANY), MANY) == value


OPEN = parse_schema(
    {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"], "additionalProperties": True}
)


@given(st.dictionaries(texts.filter(bool), data, max_size=3), texts)
def test_names_of_open_objects_are_read_back_too(more: dict[str, Any], text: str) -> None:
    """A name may be any text in a JSON Schema; an open object is never written as a lone text."""
    value = OPEN.check({**more, "text": text})
    assert read_back(compact_prompt(value, OPEN), OPEN) == value
