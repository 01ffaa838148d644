"""The shape of a task's inputs and outputs: ``{text: str, priority: int}`` and its friends.

A schema may be written in four ways, all of which become one `Schema`:

* short form, a mapping of field to type: ``{text: str, metadata: dict, tags: list[str], note: str?}``.
  Types: str, int, float, bool, dict, list, any, ``list[...]``, ``a | b | c`` (an enum of these words), a YAML list
  of values (an enum), a nested mapping (an object). A trailing ``?`` on the type makes the field optional.
* a full JSON Schema (a mapping with ``type: object`` and ``properties``, or with ``$schema``),
* ``module:Model``, a pydantic model to import,
* a pydantic model class, from Python.

Values are checked strictly: ``"3"`` is no int. A value that passes comes back as plain JSON data, its fields in the
order of the schema, so that two equal answers are equal as text.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union, cast

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model
from pydantic import Field as PydanticField

from apprentice.errors import Problem

__all__ = ["Schema", "SchemaError", "compact_json", "parse_schema"]

_SCALARS: dict[str, Any] = {
    "str": str,
    "string": str,
    "int": int,
    "integer": int,
    "float": float,
    "number": float,
    "bool": bool,
    "boolean": bool,
    "dict": dict[str, Any],
    "object": dict[str, Any],
    "list": list[Any],
    "array": list[Any],
    "any": Any,
}
_FIELD_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*\Z")
_SUPPORTED = (
    "str, int, float, bool, dict, list, any, list[TYPE], 'a | b | c', a nested mapping, each with an optional '?'"
)


class SchemaError(ValueError):
    """A schema cannot be understood, or (from `Schema.check`) a value does not fit it; ``problems`` says where."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("; ".join(str(p) for p in problems))


@dataclass(frozen=True)
class Schema:
    """A checked shape of JSON objects.

    ``json_schema`` is closed (``additionalProperties: false``) wherever its author did not say otherwise, which is
    what the vendors' structured outputs ask for.
    """

    json_schema: Mapping[str, Any]
    _adapter: TypeAdapter[Any] = field(repr=False, compare=False)

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the top-level fields, in order."""
        return tuple(self.json_schema.get("properties", {}))

    def check(self, value: object) -> dict[str, Any]:
        """Return ``value`` as plain JSON data in schema order, or raise `SchemaError` naming every field at fault."""
        try:
            checked = self._adapter.validate_python(value, strict=True)
        except ValidationError as error:
            raise SchemaError([_problem(e) for e in error.errors()]) from None
        return cast(dict[str, Any], self._adapter.dump_python(checked, mode="json", exclude_unset=True, by_alias=True))

    def parse(self, text: str) -> dict[str, Any]:
        """Check a model's answer, given as JSON text. Raises `SchemaError`, also where the text is no JSON."""
        try:
            value = json.loads(text)
        except ValueError as error:
            raise SchemaError([Problem("answer", f"is not JSON ({error}).")]) from None
        return self.check(value)

    @staticmethod
    def dumps(value: Mapping[str, Any]) -> str:
        """The one compact text of a value: no spaces, unicode kept. Training, serving and comparing all use it."""
        return compact_json(value)


# json.dumps builds an encoder for every call that is not all defaults
compact_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def parse_schema(source: object, *, name: str = "Schema", path: str = "schema") -> Schema:
    """Make a `Schema` from any of the forms in the module's docstring. Raises `SchemaError` with YAML-like paths."""
    if isinstance(source, str):
        source = _import_model(source, path)
    if isinstance(source, type) and issubclass(source, BaseModel):
        return _of_adapter(TypeAdapter(source))
    if not isinstance(source, Mapping) or not source:
        raise SchemaError(
            [
                Problem(
                    path,
                    f"is {source!r}, not a mapping of field to type.",
                    f"Write {{field: type}}; types: {_SUPPORTED}.",
                )
            ]
        )
    if "$schema" in source or (source.get("type") == "object" and isinstance(source.get("properties"), Mapping)):
        source = cast(Mapping[str, Any], _inline_refs(source, source.get("$defs", {}), path))
        model, problems = _from_json_schema(source, name, path)
    else:
        model, problems = _from_short_form(source, name, path)
    if problems:
        raise SchemaError(problems)
    return _of_adapter(TypeAdapter(model))


def _of_adapter(adapter: TypeAdapter[Any]) -> Schema:
    document = adapter.json_schema()
    inlined = _inline_refs(document, document.get("$defs", {}), "schema")
    return Schema(json_schema=cast(Mapping[str, Any], _tidy(inlined)), _adapter=adapter)


def _import_model(target: str, path: str) -> type[BaseModel]:
    module, _, attribute = target.partition(":")
    remedy = "Write module:Model, with a pydantic model that can be imported from where Apprentice runs."
    if not module or not attribute:
        raise SchemaError([Problem(path, f"is {target!r}, neither a mapping nor module:Model.", remedy)])
    try:
        model = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SchemaError([Problem(path, f"{target!r} cannot be imported ({error}).", remedy)]) from None
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise SchemaError([Problem(path, f"{target!r} is no pydantic model.", remedy)])
    return model


def _model(name: str, fields: dict[str, tuple[Any, Any]], *, closed: bool = True) -> type[BaseModel]:
    # Field names are the user's and may be names pydantic keeps for itself ("schema", "json", "model_x"):
    # every field is stored under a private attribute and speaks under its own name.
    config = ConfigDict(extra="forbid" if closed else "allow", protected_namespaces=(), validate_by_name=False)
    members: dict[str, Any] = {
        f"f{i}_": (kind, PydanticField(default, alias=key)) for i, (key, (kind, default)) in enumerate(fields.items())
    }
    return create_model(name, __config__=config, **members)


def _from_short_form(source: Mapping[Any, Any], name: str, path: str) -> tuple[type[BaseModel], list[Problem]]:
    fields: dict[str, tuple[Any, Any]] = {}
    problems: list[Problem] = []
    for key, spec in source.items():
        here = f"{path}.{key}"
        if not isinstance(key, str) or not _FIELD_NAME.match(key):
            problems.append(Problem(here, f"{key!r} is no field name.", "Use letters, digits and underscores."))
            continue
        try:
            kind, optional = _short_type(spec, f"{name}_{key}", here)
        except SchemaError as error:
            problems.extend(error.problems)
            continue
        fields[key] = (kind | None, None) if optional else (kind, ...)
    return _model(name, fields), problems


def _short_type(spec: object, name: str, path: str) -> tuple[Any, bool]:
    """The Python type of one short-form type, and whether the field is optional."""
    if isinstance(spec, Mapping):
        if "type" in spec and isinstance(spec["type"], str) and spec["type"] in _JSON_TYPES:
            kind, problems = _json_type(spec, name, path)
        else:
            kind, problems = _from_short_form(spec, name, path)
        if problems:
            raise SchemaError(problems)
        return kind, False
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        return _enum(list(spec), path), False
    if not isinstance(spec, str):
        raise SchemaError([Problem(path, f"{spec!r} is no type.", f"Types: {_SUPPORTED}.")])
    text = spec.strip()
    optional = text.endswith("?")
    text = text.removesuffix("?").strip()
    if text in _SCALARS:
        return _SCALARS[text], optional
    if text.startswith("list[") and text.endswith("]"):
        item, _ = _short_type(text[5:-1], f"{name}_item", path)
        return list.__class_getitem__(item), optional
    if "|" in text:
        return _enum([word.strip() for word in text.split("|")], path), optional
    raise SchemaError([Problem(path, f"{spec!r} is no type.", f"Types: {_SUPPORTED}.")])


def _enum(values: list[Any], path: str) -> Any:
    if (
        len(values) < 2
        or any(not isinstance(v, str | int | bool) or v == "" for v in values)
        or len(set(values)) < len(values)
    ):
        raise SchemaError(
            [Problem(path, f"{values!r} is no enum.", "Give at least two different words or whole numbers.")]
        )
    return Literal[tuple(values)]


# The keywords of JSON Schema that bound a value, under pydantic's names for them.
_BOUNDS = {
    "minimum": "ge",
    "maximum": "le",
    "exclusiveMinimum": "gt",
    "exclusiveMaximum": "lt",
    "multipleOf": "multiple_of",
    "minLength": "min_length",
    "maxLength": "max_length",
    "pattern": "pattern",
    "minItems": "min_length",
    "maxItems": "max_length",
}
_JSON_TYPES = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "null": None,
    "object": dict,
    "array": list,
}


def _from_json_schema(source: Mapping[str, Any], name: str, path: str) -> tuple[type[BaseModel], list[Problem]]:
    properties = source.get("properties", {})
    required = set(source.get("required", ()))
    fields: dict[str, tuple[Any, Any]] = {}
    problems: list[Problem] = []
    problems += [
        Problem(f"{path}.required", f"names {key!r}, which is no property.")
        for key in sorted(required - set(properties))
    ]
    for key, spec in properties.items():
        kind, found = _json_type(spec, f"{name}_{key}", f"{path}.properties.{key}")
        problems += found
        fields[key] = (kind, ...) if key in required else (kind | None, None)
    return _model(name, fields, closed=source.get("additionalProperties", False) is False), problems


def _json_type(spec: Mapping[str, Any], name: str, path: str) -> tuple[Any, list[Problem]]:
    """The Python type of one JSON Schema node, with the keywords that structured outputs know."""
    kind, problems = _plain_json_type(spec, name, path)
    bounds = {_BOUNDS[key]: value for key, value in spec.items() if key in _BOUNDS}
    return (Annotated.__class_getitem__((kind, PydanticField(**bounds))) if bounds else kind), problems  # type: ignore[attr-defined]


def _plain_json_type(spec: Mapping[str, Any], name: str, path: str) -> tuple[Any, list[Problem]]:
    if "enum" in spec:
        return Literal[tuple(spec["enum"])], []
    if "const" in spec:
        return Literal[spec["const"]], []
    if "anyOf" in spec or isinstance(spec.get("type"), list):
        branches = spec.get("anyOf") or [{**spec, "type": t} for t in spec["type"]]
        found = [_json_type(branch, f"{name}_{i}", f"{path}.anyOf[{i}]") for i, branch in enumerate(branches)]
        return Union[tuple(kind for kind, _ in found)], [p for _, problems in found for p in problems]  # noqa: UP007
    kind = spec.get("type")
    if kind == "object" and "properties" in spec:
        return _from_json_schema(spec, name, path)
    if kind == "array" and "items" in spec:
        item, problems = _json_type(spec["items"], f"{name}_item", f"{path}.items")
        return list.__class_getitem__(item), problems
    if kind is None and not spec.keys() - {"description", "title"}:
        return Any, []
    if kind not in _JSON_TYPES:
        known = ", ".join(_JSON_TYPES)
        problem = Problem(
            path, f"has type {kind!r}, which is not supported.", f"Supported: {known}, enum, const, anyOf."
        )
        return Any, [problem]
    return {"object": dict[str, Any], "array": list[Any]}.get(kind, _JSON_TYPES[kind]), []


def _inline_refs(node: Any, definitions: Mapping[str, Any], path: str, trail: tuple[str, ...] = ()) -> Any:
    """Replace every ``$ref`` into ``$defs`` by what it points to: grammars and vendors differ on references."""
    if isinstance(node, list):
        return [_inline_refs(item, definitions, path, trail) for item in node]
    if not isinstance(node, Mapping):
        return node
    if "$ref" in node:
        target = str(node["$ref"]).removeprefix("#/$defs/")
        if target in trail:
            raise SchemaError(
                [Problem(path, f"refers to itself through {target!r}.", "Recursive schemas are not supported.")]
            )
        if target not in definitions:
            raise SchemaError([Problem(path, f"$ref {node['$ref']!r} points nowhere.", "Define it under $defs.")])
        rest = {k: v for k, v in node.items() if k != "$ref"}
        return {**_inline_refs(definitions[target], definitions, path, (*trail, target)), **rest}
    return {k: _inline_refs(v, definitions, path, trail) for k, v in node.items() if k != "$defs"}


def _tidy(node: Any, *, in_properties: bool = False) -> Any:
    """Drop what pydantic adds for its own readers (titles, null defaults) and close objects."""
    if isinstance(node, list):
        return [_tidy(item) for item in node]
    if not isinstance(node, Mapping):
        return node
    if in_properties:
        return {key: _tidy(value) for key, value in node.items()}
    tidy = {
        key: _tidy(value, in_properties=key == "properties")
        for key, value in node.items()
        if key != "title" and not (key == "default" and value is None)
    }
    if tidy.get("type") == "object" and "properties" in tidy:
        tidy.setdefault("additionalProperties", False)
    return tidy


def _problem(error: Any) -> Problem:
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error["loc"]).lstrip(".") or "value"
    value = error.get("input")
    if error["type"] == "missing":
        return Problem(path, "is missing.")
    if error["type"] == "extra_forbidden":
        return Problem(path, "is not in the schema.")
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return Problem(path, f"is {shown}: {error['msg'][:1].lower()}{error['msg'][1:]}.")
