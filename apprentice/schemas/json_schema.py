"""A JSON Schema as its author wrote it: accepted whole or refused by name, and validated by jsonschema-rs.

Every keyword of `KEYWORDS` is enforced as draft 2020-12 says (they mean the same in draft-07); any other, and a format
that is not in `FORMATS`, is refused at load, with its path. Three things are done to a document before it is used:

* references into the document are written out, since grammars and vendors differ on them (one that refers to itself
  is refused);
* ``true`` and ``false`` in the place of a schema become ``{}`` and ``{"not": {}}``;
* an object that lists its ``properties`` and says nothing of others is closed (``additionalProperties: false``), which
  is what the vendors' structured outputs ask for. Say ``additionalProperties: true`` to keep it open. Objects that
  are put together by allOf, anyOf, if and the like stay as they are.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jsonschema_rs

from apprentice.errors import Problem
from apprentice.schemas.json_values import InvalidValue, compact_json, in_words

__all__ = ["FORMATS", "KEYWORDS", "TYPES", "canonical", "in_text_order", "prepared", "validator", "written_out"]

TYPES = ("string", "integer", "number", "boolean", "null", "object", "array")

FORMATS = (
    "date", "date-time", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6", "uri",
    "uri-reference", "uri-template", "iri", "iri-reference", "uuid", "json-pointer", "relative-json-pointer", "regex",
)  # fmt: skip
"""The formats that are enforced."""

ANNOTATIONS = {
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema",
}  # fmt: skip
"""Keywords that tell a reader something and check nothing. Kept, for the vendors."""

# keyword -> a schema, a list of schemas, a mapping of name to schema
_ONE = {
    "items", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else", "unevaluatedItems",
    "unevaluatedProperties",
}  # fmt: skip
_LIST = {"prefixItems", "anyOf", "oneOf", "allOf"}
_MAP = {"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"}
_PLAIN = {
    "type", "enum", "const", "format", "pattern", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum",
    "exclusiveMaximum", "multipleOf", "required", "dependentRequired", "minProperties", "maxProperties", "minItems",
    "maxItems", "uniqueItems", "minContains", "maxContains", "$ref",
}  # fmt: skip
KEYWORDS = ANNOTATIONS | _ONE | _LIST | _MAP | _PLAIN
"""Every keyword that may stand in a schema."""
_NOT_IN_DRAFT_7 = {
    "prefixItems", "dependentSchemas", "dependentRequired", "unevaluatedItems", "unevaluatedProperties",
    "minContains", "maxContains",
}  # fmt: skip
_HINTS = {
    "nullable": "Write type: [string, 'null'].",
    "example": "Write examples: [...].",
    "additionalItems": "Write prefixItems and items.",
    "dependencies": "Write dependentRequired or dependentSchemas.",
    "$id": "Give the document whole, with $ref: '#/$defs/...'.",
    "$anchor": "Write $ref: '#/$defs/...'.",
}
_DRAFTS = ("https://json-schema.org/draft/2020-12/schema", "http://json-schema.org/draft-07/schema")
_MOST_PARTS = 20_000  # of a document once its references are written out
_COMPOSITION = {"allOf", "anyOf", "oneOf", "if", "then", "else", "dependentSchemas"}
_SAYS_WHAT_ELSE = {"additionalProperties", "patternProperties", "unevaluatedProperties"} | _COMPOSITION
_LARGEST = 2**63 - 1


def prepared(source: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The document that is validated, and that vendors and engines are given. ``source`` is plain JSON.

    Raises `InvalidValue` naming every keyword that cannot be enforced, and whatever else is wrong.
    """
    problems = list(_reviewed(source, path, _draft(source, path)))
    if problems:
        raise InvalidValue(problems)
    node = written_out(source, path)
    if node.get("type") != "object":
        raise InvalidValue(
            [Problem(f"{path}.type", f"is {in_words(node.get('type'))}: a task's values are objects.", "Write object.")]
        )
    document: dict[str, Any] = _closed(node, composed=False)
    problems = list(_unsatisfiable(document, path))
    if problems:
        raise InvalidValue(problems)
    return document


def validator(
    document: Mapping[str, Any], path: str = "schema", *, any_format: bool = False
) -> Callable[[Any], list[Problem]]:
    """A function from a plain JSON value to what is wrong with it. Raises `InvalidValue` for a broken document.

    With ``any_format`` a format that is not in `FORMATS` is passed over.
    """
    checks = _compiled(document, path, any_format=any_format)

    def check(value: Any) -> list[Problem]:
        if checks.is_valid(value):
            return []
        return [problem for error in checks.iter_errors(value) for problem in faults_of(error)]

    return check


def _compiled(document: Mapping[str, Any], path: str, *, any_format: bool = True) -> Any:
    try:
        return jsonschema_rs.validator_for(
            dict(document), validate_formats=True, ignore_unknown_formats=any_format, offline=True, mask="it"
        )
    except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError) as error:
        where = "".join(f".{part}" for part in getattr(error, "instance_path", ()))
        message = str(error).partition("\n")[0]
        raise InvalidValue([Problem(path + where, f"is not JSON Schema: {message}.")]) from None


def faults_of(error: Any) -> Iterator[Problem]:
    """A validation error in words, one problem for each field at fault."""
    place = tuple(error.instance_path)
    match error.kind.name:
        case "required":
            yield Problem(_path((*place, error.kind.property)), "is missing.")
        case "additionalProperties" | "unevaluatedProperties":
            for name in error.kind.unexpected:
                yield Problem(_path((*place, name)), "is not in the schema.")
        case "anyOf" | "oneOf" if (meant := _branch_meant(error)) is not None:
            for inner in meant:
                yield from faults_of(inner)
        case _:
            yield Problem(_path(place), f"is {in_words(error.instance)}: {error.message}.")


def _branch_meant(error: Any) -> list[Any] | None:
    """The errors of the one branch that takes values of this type; None unless there is exactly one."""
    fitting = [
        errors
        for errors in error.kind.as_dict()["context"]
        if errors and not any(e.kind.name == "type" and e.instance_path == error.instance_path for e in errors)
    ]
    return fitting[0] if len(fitting) == 1 else None


def _path(parts: tuple[str | int, ...]) -> str:
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in parts).removeprefix(".") or "value"
    return path if len(path) <= 120 else path[:100] + "..."


# -- review ----------------------------------------------------------------------------------------------------------


def _draft(source: Mapping[str, Any], path: str) -> str:
    named = source.get("$schema", _DRAFTS[0])
    draft = str(named).removesuffix("#")
    if draft not in _DRAFTS:
        known = " and ".join(_DRAFTS)
        raise InvalidValue([Problem(f"{path}.$schema", f"is {in_words(named)}.", f"Supported: {known}.")])
    return draft


def _reviewed(node: Any, path: str, draft: str, *, root: bool = True) -> Iterator[Problem]:
    """Every keyword of a document that is unknown or could not be enforced."""
    if isinstance(node, bool):
        return
    if not isinstance(node, Mapping):
        yield Problem(path, f"is {in_words(node)}, not a schema.", "Write a mapping, true or false.")
        return
    for key, value in node.items():
        here = f"{path}.{key}"
        unknown = key not in KEYWORDS or (draft == _DRAFTS[1] and key in _NOT_IN_DRAFT_7)
        if unknown or (key == "$schema" and not root):
            yield Problem(here, "is not a keyword of JSON Schema that can be enforced.", _remedy(key))
        elif key in _ONE:
            yield from _reviewed(value, here, draft, root=False)
        elif key in _LIST or key in _MAP:
            kind = list if key in _LIST else Mapping
            if not isinstance(value, kind) or (key in _LIST and not value):
                words = "a list of schemas" if key in _LIST else "a mapping of name to schema"
                yield Problem(here, f"is {in_words(value)}, not {words}.")
                continue
            inner = value.items() if isinstance(value, Mapping) else enumerate(value)
            for name, child in inner:
                step = f"[{name}]" if isinstance(name, int) else f".{name}"
                yield from _reviewed(child, here + step, draft, root=False)
        elif key == "type":
            yield from _reviewed_type(value, here)
        elif key == "enum":
            yield from _reviewed_enum(value, here)
        elif key == "required" and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            yield Problem(here, f"is {in_words(value)}, not a list of names.", "Write [name, ...].")
        elif key == "format" and value not in FORMATS:
            yield Problem(here, f"is {in_words(value)}, which is not enforced.", f"Formats: {', '.join(FORMATS)}.")


def _reviewed_type(value: Any, path: str) -> Iterator[Problem]:
    kinds = value if isinstance(value, list) else [value]
    for kind in kinds:
        if kind not in TYPES:
            near = difflib.get_close_matches(str(kind), TYPES, n=1)
            remedy = f"Did you mean {near[0]!r}?" if near else f"Types: {', '.join(TYPES)}."
            hint = " Write 'null' in quotes." if kind is None else ""
            yield Problem(path, f"is {in_words(kind)}, which is not a type of JSON Schema.", remedy + hint)
    if len({str(kind) for kind in kinds}) != len(kinds) or not kinds:
        yield Problem(path, f"is {in_words(value)}.", "Name each type once.")


def _reviewed_enum(value: Any, path: str) -> Iterator[Problem]:
    if not isinstance(value, list) or not value:
        yield Problem(path, f"is {in_words(value)}.", "Give a list of at least one value.")
    elif len({_hashable(v) for v in value}) < len(value):
        yield Problem(path, "has a value twice.", "Name each value once.")


def _remedy(key: str) -> str:
    if key in _HINTS:
        return _HINTS[key]
    near = difflib.get_close_matches(key, sorted(KEYWORDS), n=1)
    return f"Did you mean {near[0]!r}?" if near else "Remove it, or write what it means in the description."


def _unsatisfiable(node: Any, path: str) -> Iterator[Problem]:
    """Required fields that a closed object does not have: no value could ever fit."""
    if isinstance(node, list):
        for i, item in enumerate(node):
            yield from _unsatisfiable(item, f"{path}[{i}]")
    if not isinstance(node, Mapping):
        return
    if isinstance(node.get("properties"), Mapping) and node.get("additionalProperties") is False:
        for name in node.get("required", ()):
            if name not in node["properties"] and not node.get("patternProperties"):
                yield Problem(f"{path}.required", f"names {name!r}, which is no property.")
    for key, value in node.items():
        if key in _MAP and isinstance(value, Mapping):
            for name, child in value.items():
                yield from _unsatisfiable(child, f"{path}.{key}.{name}")
        elif key in _ONE or key in _LIST:
            yield from _unsatisfiable(value, f"{path}.{key}")


# -- preparation -----------------------------------------------------------------------------------------------------


def written_out(source: Mapping[str, Any], path: str) -> dict[str, Any]:
    """``source`` with every reference replaced by what it points to. Raises `InvalidValue`."""
    node: dict[str, Any] = _References(source, path).written_out(source, path, ())
    return node


class _References:
    """Writes references out: every ``$ref`` becomes what it points to."""

    def __init__(self, document: Mapping[str, Any], path: str) -> None:
        self._document = document
        self._path = path
        self._parts = 0

    def written_out(self, node: Any, path: str, trail: tuple[str, ...]) -> Any:
        if isinstance(node, bool):
            return {} if node else {"not": {}}
        self._parts += 1
        if self._parts > _MOST_PARTS:
            raise InvalidValue(
                [Problem(self._path, f"has more than {_MOST_PARTS:,} parts once its references are written out.")]
            )
        written: dict[str, Any] = {}
        for key, value in node.items():
            here = f"{path}.{key}"
            if key in ("$defs", "definitions", "$ref", "$schema"):
                continue
            if key in _ONE and not (isinstance(value, bool) and key.startswith(("additional", "unevaluated"))):
                written[key] = self.written_out(value, here, trail)
            elif key in _LIST:
                written[key] = [self.written_out(item, f"{here}[{i}]", trail) for i, item in enumerate(value)]
            elif key in _MAP:
                written[key] = {name: self.written_out(item, f"{here}.{name}", trail) for name, item in value.items()}
            else:
                written[key] = value
        if "$ref" in node:
            target = self._target(node["$ref"], f"{path}.$ref", trail)
            written = _both(self.written_out(target, path, (*trail, node["$ref"])), written)
        if len(written.get("allOf", ())) == 1:
            (only,) = written.pop("allOf")
            written = _both(only, written)
        return written

    def _target(self, reference: Any, path: str, trail: tuple[str, ...]) -> Any:
        if reference in trail:
            raise InvalidValue(
                [Problem(path, f"refers to itself through {reference!r}.", "Recursive schemas are not supported.")]
            )
        found: Any = self._document
        if not isinstance(reference, str) or not reference.startswith("#/"):
            raise InvalidValue([Problem(path, f"is {in_words(reference)}.", "Write '#/$defs/...'.")])
        for part in reference[2:].split("/"):
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            elif isinstance(found, Mapping) and name in found:
                found = found[name]
            else:
                raise InvalidValue([Problem(path, f"{reference!r} points nowhere.", "Define it under $defs.")])
        if not isinstance(found, Mapping | bool):
            raise InvalidValue([Problem(path, f"{reference!r} is no schema.", "Point to one under $defs.")])
        return found


def _both(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """A schema that asks for what both ask for."""
    if second.keys() <= ANNOTATIONS:
        return {**first, **second}
    if first.keys() <= ANNOTATIONS:
        return {**first, **second}
    return {**second, "allOf": [first, *second.get("allOf", ())]}


def _closed(node: Any, *, composed: bool) -> Any:
    """Close every object that lists its properties, but those that are put together of several schemas."""
    closed = dict(node)
    for key, value in node.items():
        if key in ("properties", "patternProperties"):
            closed[key] = {name: _closed(child, composed=False) for name, child in value.items()}
        elif key in ("items", "additionalProperties") and isinstance(value, Mapping):
            closed[key] = _closed(value, composed=False)
        elif key == "prefixItems":
            closed[key] = [_closed(child, composed=False) for child in value]
        elif key in ("anyOf", "oneOf"):
            closed[key] = [_closed(child, composed=composed or "properties" in node) for child in value]
    if "properties" in node and not composed and not node.keys() & _SAYS_WHAT_ELSE:
        closed["additionalProperties"] = False
    return closed


# -- canonical form --------------------------------------------------------------------------------------------------

type _Canon = Callable[[Any], Any] | None
"""Brings a value that fits a schema into its one form; None if it has no other."""


def canonical(document: Mapping[str, Any]) -> Callable[[Any], Any]:
    """A function that writes equal values alike, so that two equal answers are equal as text.

    Fields come in the order of the schema; 3.0 is 3 for an integer and 3 is 3.0 for a number; null for an optional
    field that takes no null is the same as leaving it out. Fits values that do not fit the schema, too.
    """
    return _canon(document) or (lambda value: value)


def _canon(node: Mapping[str, Any]) -> _Canon:
    if "enum" in node or "const" in node:
        return _listed(list(node["enum"]) if "enum" in node else [node["const"]])
    steps = [
        step
        for step in (_number(node), _object(node), _array(node), _branches(node), *map(_canon, node.get("allOf", ())))
        if step is not None
    ]
    if not steps:
        return None
    if len(steps) == 1:
        return steps[0]

    def all_of_them(value: Any) -> Any:
        for step in steps:
            value = step(value)
        return value

    return all_of_them


def _listed(values: list[Any]) -> _Canon:
    if all(isinstance(value, str | bool | None) for value in values):
        return None

    def as_listed(value: Any) -> Any:
        return next((known for known in values if _equal(known, value)), value)

    return as_listed


def _number(node: Mapping[str, Any]) -> _Canon:
    kinds = node.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if "integer" in kinds:
        return _whole
    return _fractional if "number" in kinds else None


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        if abs(value) > _LARGEST:
            raise InvalidValue([Problem("value", f"holds {value!r}, an integer of more than 64 bits.")])
        return int(value)
    return value


def _fractional(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and int(float(value)) == value:
        return float(value)
    return value


def _object(node: Mapping[str, Any]) -> _Canon:
    properties = node.get("properties", {})
    others = node.get("additionalProperties")
    canon_others = _canon(others) if isinstance(others, Mapping) else None
    if not properties:
        if canon_others is None:
            return None
        return lambda value: (
            {name: canon_others(inner) for name, inner in value.items()} if isinstance(value, dict) else value
        )
    required = set(node.get("required", ()))
    fields = [
        (name, _canon(child), name not in required and not _takes_null(child)) for name, child in properties.items()
    ]

    def in_order(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ordered = {}
        for name, canon, null_is_absent in fields:
            if name in value:
                inner = value[name]
                if inner is None and null_is_absent:
                    continue
                ordered[name] = inner if canon is None else canon(inner)
        for name, inner in value.items():
            if name not in properties:
                ordered[name] = inner if canon_others is None else canon_others(inner)
        return ordered

    return in_order


def _takes_null(node: Mapping[str, Any]) -> bool:
    return bool(_compiled(node, "schema").is_valid(None))


def _array(node: Mapping[str, Any]) -> _Canon:
    items = node.get("items")
    canon = _canon(items) if isinstance(items, Mapping) else None
    first = [_canon(child) for child in node.get("prefixItems", ())]
    if canon is None and not any(first):
        return None

    def each(value: Any) -> Any:
        if not isinstance(value, list):
            return value
        canons = [*first, *[canon] * (len(value) - len(first))]
        return [inner if step is None else step(inner) for inner, step in zip(value, canons, strict=False)]

    return each


def _branches(node: Mapping[str, Any]) -> _Canon:
    branches = node.get("anyOf") or node.get("oneOf")
    if not branches:
        return None
    canons = [_canon(branch) for branch in branches]
    if not any(canons):
        return None
    known = [
        (_compiled(branch, "schema"), canon or (lambda value: value))
        for branch, canon in zip(branches, canons, strict=True)
    ]

    def of_the_first_that_fits(value: Any) -> Any:
        refused: InvalidValue | None = None
        for at, (check, canon) in enumerate(known):
            try:
                written = canon(value)
            except InvalidValue as error:  # too large for this branch, perhaps not for the next
                refused = error
                continue
            if check.is_valid(written):
                # A value that was changed may now fit an earlier branch: without its null fields, say.
                changed = at > 0 and compact_json(written) != compact_json(value)
                return of_the_first_that_fits(written) if changed else written
        if refused is not None:
            raise refused
        return value

    return of_the_first_that_fits


def _equal(a: Any, b: Any) -> bool:
    """Equality as JSON values: true is not 1, 1 is 1.0."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _hashable(value: Any) -> tuple[str, str]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return ("number", repr(float(value))) if number else (type(value).__name__, repr(value))


def in_text_order(document: Mapping[str, Any]) -> _Canon:
    """A function that sorts the items of every list whose items must be unique: what a Python set becomes.

    None if the schema has none.
    """
    properties = {name: in_text_order(child) for name, child in document.get("properties", {}).items()}
    items = document.get("items")
    inner = in_text_order(items) if isinstance(items, Mapping) else None
    unique = bool(document.get("uniqueItems"))
    if not (any(properties.values()) or inner or unique):
        return None

    def ordered(value: Any) -> Any:
        if isinstance(value, dict):
            steps = ((name, part, properties.get(name)) for name, part in value.items())
            return {name: part if step is None else step(part) for name, part, step in steps}
        if isinstance(value, list):
            value = value if inner is None else [inner(item) for item in value]
            return sorted(value, key=compact_json) if unique else value
        return value

    return ordered
