"""The short form of a schema, a mapping of field to type, as JSON Schema.

    text: str                      str, int, float, bool, date, datetime, dict, list, any
    tags: list[str]                a list of one type
    kind: a | b | c                one of these words
    level: [1, 2, 3]               one of these values, all words or all whole numbers
    place: {city: str, zip: int}   an object
    lines: [{name: str, n: int}]   a list of objects
    note: str?                     optional, and may be null; so is ``note?: str``, for types that are no text
    code: {type: string, ...}      JSON Schema: a mapping whose ``type`` names types of JSON Schema

One rule tells an object from JSON Schema: a mapping is JSON Schema if its ``type`` names JSON Schema types (string,
integer, number, boolean, object, array, null). All its other keys then have to be keywords of JSON Schema; if they are
not, it is refused rather than guessed at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from apprentice.errors import Problem
from apprentice.schemas.json_schema import KEYWORDS, TYPES
from apprentice.schemas.json_values import InvalidValue, in_words

__all__ = ["as_json_schema", "is_json_schema"]

_WORDS: Mapping[str, dict[str, Any]] = {
    "str": {"type": "string"},
    "string": {"type": "string"},
    "int": {"type": "integer"},
    "integer": {"type": "integer"},
    "float": {"type": "number"},
    "number": {"type": "number"},
    "bool": {"type": "boolean"},
    "boolean": {"type": "boolean"},
    "date": {"type": "string", "format": "date"},
    "datetime": {"type": "string", "format": "date-time"},
    "dict": {"type": "object", "additionalProperties": True},
    "object": {"type": "object", "additionalProperties": True},
    "list": {"type": "array", "items": {}},
    "array": {"type": "array", "items": {}},
    "any": {},
}
_SUPPORTED = (
    "str, int, float, bool, date, datetime, dict, list, any, list[TYPE], 'a | b | c', a list of values, a nested "
    "mapping, [{...}] for a list of objects; an optional '?' behind the type or the field's name"
)
_FIELD_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*\Z")
_NULL = {"type": "null"}
# keywords by which a mapping without a type shows that it is meant as JSON Schema
_SHAPES = {"enum": list, "anyOf": list, "oneOf": list, "allOf": list, "properties": Mapping}


def is_json_schema(source: Mapping[Any, Any], path: str, *, root: bool = False) -> bool:
    """Whether a mapping is JSON Schema, by the rule above. Raises `InvalidValue` if it could be either."""
    if "$schema" in source:
        return True
    kind = source.get("type")
    names_types = kind in TYPES if isinstance(kind, str) else isinstance(kind, list) and set(map(str, kind)) <= {*TYPES}
    others = [str(key) for key in source if key != "type"]
    if not names_types or (root and kind != "object"):
        looks = [key for key, shape in _SHAPES.items() if isinstance(source.get(key), shape)]
        if looks and {*others, "type"} <= KEYWORDS and (kind is None or root):
            raise _unclear(path, f"has {looks[0]!r} and no type: JSON Schema, or an object with a field called that?")
        return False
    strange = [key for key in others if key not in KEYWORDS]
    a_type = [key for key in others if isinstance(source[key], str) and source[key].strip("? ") in _WORDS]
    if a_type and (strange or kind != "object"):
        raise _unclear(
            path, f"has type: {in_words(kind)} beside {a_type[0]}: JSON Schema, or an object with a field called type?"
        )
    return True


def _unclear(path: str, question: str) -> InvalidValue:
    remedy = (
        "For JSON Schema write type: object (or another) and its keywords; for a field called type write type: str."
    )
    return InvalidValue([Problem(path, question, remedy)])


def as_json_schema(source: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The JSON Schema of a short form. Raises `InvalidValue` naming every field that cannot be understood."""
    properties: dict[str, Any] = {}
    required: list[str] = []
    problems: list[Problem] = []
    for key, spec in source.items():
        here = f"{path}.{key}"
        name = key.removesuffix("?")
        if not _FIELD_NAME.match(name):
            problems.append(Problem(here, f"{key!r} is no field name.", "Use letters, digits, _ and -."))
            continue
        if name in properties:
            problems.append(Problem(here, "is there twice, with ? and without."))
            continue
        try:
            node, optional = _type(spec, here)
        except InvalidValue as error:
            problems.extend(error.problems)
            continue
        if optional or key.endswith("?"):
            properties[name] = {"anyOf": [node, _NULL]}
        else:
            properties[name] = node
            required.append(name)
    if problems:
        raise InvalidValue(problems)
    needed = {"required": required} if required else {}
    return {"additionalProperties": False, "properties": properties, **needed, "type": "object"}


def _type(spec: object, path: str) -> tuple[dict[str, Any], bool]:
    """The JSON Schema of one type, and whether it says that the field is optional."""
    if isinstance(spec, Mapping):
        if not spec:
            raise _no_type(spec, path)
        return (dict(spec) if is_json_schema(spec, path) else as_json_schema(spec, path)), False
    if isinstance(spec, list):
        if len(spec) == 1 and isinstance(spec[0], Mapping):
            return {"items": _type(spec[0], f"{path}[0]")[0], "type": "array"}, False
        return _enum(spec, path), False
    if not isinstance(spec, str):
        raise _no_type(spec, path)
    text = spec.strip()
    optional = text.endswith("?")
    return _of_text(text.removesuffix("?").strip(), spec, path), optional


def _of_text(text: str, spec: str, path: str) -> dict[str, Any]:
    if text in _WORDS:
        return dict(_WORDS[text])
    if text.startswith("list[") and text.endswith("]"):
        item = text[5:-1].strip()
        if item.endswith("?"):
            raise InvalidValue(
                [Problem(path, f"{spec!r}: the items of a list cannot be optional.", f"Write list[{item[:-1]}].")]
            )
        return {"items": _of_text(item, spec, path), "type": "array"}
    words = [word.strip() for word in text.split("|")]
    if len(words) > 1:
        meant = [word for word in words if word not in ("null", "None", "none")]
        if all(word in _WORDS for word in meant):
            remedy = "Write a union of types as JSON Schema: {type: [string, integer]}."
            if len(meant) == 1 < len(words):
                remedy = f"Write {meant[0]}? for a field that is optional and may be null."
            raise InvalidValue([Problem(path, f"{spec!r} is a choice of words, and these are types.", remedy)])
        return _enum(words, path)
    raise _no_type(spec, path)


def _no_type(spec: object, path: str) -> InvalidValue:
    return InvalidValue([Problem(path, f"{in_words(spec)} is no type.", f"Types: {_SUPPORTED}.")])


def _enum(values: list[Any], path: str) -> dict[str, Any]:
    kinds = {type(value) for value in values}
    if len(values) < 2 or not kinds <= {str, int, bool} or "" in values:
        remedy = "Give at least two different words or whole numbers."
        raise InvalidValue([Problem(path, f"{in_words(values)} is no enum.", remedy)])
    if len(kinds) > 1:
        odd = next(value for value in values if not isinstance(value, str)) if str in kinds else values[0]
        raise InvalidValue(
            [
                Problem(
                    path,
                    f"{in_words(values)} mixes words, numbers and yes/no values.",
                    f"If {odd!r} is meant as a word, write it in quotes.",
                )
            ]
        )
    if len(set(values)) < len(values):
        raise InvalidValue([Problem(path, f"{in_words(values)} is no enum.", "Name each value once.")])
    (kind,) = kinds
    return {"enum": list(values), "type": {str: "string", int: "integer", bool: "boolean"}[kind]}
