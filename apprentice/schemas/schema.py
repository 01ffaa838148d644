"""The shape of a task's inputs and outputs: ``{text: str, priority: int}`` and its friends.

A schema may be written in four ways, all of which become one `Schema`:

* short form, a mapping of field to type: ``{text: str, tags: list[str], note: str?}``; see
  `apprentice.schemas.short_form`,
* a full JSON Schema (a mapping with ``type: object`` and JSON Schema's keywords, or with ``$schema``), which is
  validated as it is written; see `apprentice.schemas.json_schema`,
* ``module:Model``, a pydantic model to import,
* a pydantic model class, from Python.

Values are checked as strictly as JSON is: ``"3"`` is no int, and an enum member or a date is its text. A value that
passes comes back as plain JSON data (see `apprentice.schemas.json_values`), its fields in the order of the schema, so
that two equal answers are equal as text; checking it again changes nothing.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

from pydantic import BaseModel, TypeAdapter, ValidationError

from apprentice.errors import Problem
from apprentice.schemas.json_schema import canonical, in_text_order, prepared, validator, written_out
from apprentice.schemas.json_values import InvalidValue, compact_json, in_words, plain, read_json
from apprentice.schemas.short_form import as_json_schema, is_json_schema

__all__ = ["Schema", "SchemaError", "compact_json", "parse_schema", "schema_of_document"]


class SchemaError(InvalidValue):
    """A schema cannot be understood, or (from `Schema.check`) a value does not fit it; ``problems`` says where."""


@dataclass(frozen=True)
class Schema:
    """A checked shape of JSON objects.

    ``json_schema`` is closed (``additionalProperties: false``) wherever its author did not say otherwise, which is
    what the vendors' structured outputs ask for.
    """

    json_schema: Mapping[str, Any]
    _check: Callable[[object], dict[str, Any]] = field(repr=False, compare=False)

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the top-level fields, in order."""
        return tuple(self.json_schema.get("properties", {}))

    @cached_property
    def text_fields(self) -> frozenset[str]:
        """The top-level fields whose value, if there is one, is always text."""
        return frozenset(
            name for name, node in self.json_schema.get("properties", {}).items() if node.get("type") == "string"
        )

    @cached_property
    def is_one_text(self) -> bool:
        """Whether every value is an object with one field, always there, that holds text."""
        document = self.json_schema
        return (
            document.get("additionalProperties") is False
            and not document.get("patternProperties")
            and len(self.fields) == len(self.text_fields) == 1
            and tuple(document.get("required", ())) == self.fields
        )

    def why_no_field(self, path: str) -> tuple[str, str]:
        """Why a dotted path such as ``place.city`` or ``lines.0.name`` leads to no field, and the remedy.

        Both are empty if it may lead to one: what a free-form object holds is not known.
        """
        nodes: list[Mapping[str, Any]] = [self.json_schema]
        at = ""
        for step in path.split("."):
            found, known, is_list = _step(nodes, step)
            if found is None:
                return "", ""
            if not found:
                name = repr(at) if at else "it"
                if is_list and not known:
                    return f"{name} is a list.", f"Compare it whole, or one item of it: {at}.0"
                near = difflib.get_close_matches(step, known, n=1)
                remedy = f"Did you mean {(at + '.' if at else '') + near[0]!r}?" if near else ""
                return f"{name} has {', '.join(known) or 'no fields'}, and no {step!r}.", remedy
            nodes, at = found, f"{at}.{step}".removeprefix(".")
        return "", ""

    def check(self, value: object) -> dict[str, Any]:
        """Return ``value`` as plain JSON data in schema order, or raise `SchemaError` naming every field at fault.

        Python's own values are taken for the JSON they stand for: dates, enum members, tuples, numpy's numbers.
        """
        try:
            return self._check(value)
        except InvalidValue as error:
            raise SchemaError(error.problems) from None

    def parse(self, text: str | bytes) -> dict[str, Any]:
        """Check a model's answer, given as JSON text. Raises `SchemaError`, also where the text is no JSON."""
        try:
            return self._check(read_json(text, name="answer"))
        except InvalidValue as error:
            raise SchemaError(error.problems) from None

    @staticmethod
    def dumps(value: Mapping[str, Any]) -> str:
        """The one compact text of a value: no spaces, unicode kept. Training, serving and comparing all use it."""
        return compact_json(value)


def _step(nodes: list[Mapping[str, Any]], step: str) -> tuple[list[Mapping[str, Any]] | None, list[str], bool]:
    """One step down from any of ``nodes``: where it leads (None: anywhere), what fields there are, if one is a list."""
    found: list[Mapping[str, Any]] = []
    known: dict[str, None] = {}
    is_list = False
    todo = list(nodes)
    while todo:
        node = todo.pop()
        unions = [branch for key in ("anyOf", "oneOf", "allOf") for branch in node.get(key, ())]
        todo += unions
        kinds = node.get("type", [] if unions or "enum" in node or "const" in node else ["object", "array"])
        kinds = kinds if isinstance(kinds, list) else [kinds]
        if "object" in kinds:
            properties = node.get("properties", {})
            if step in properties:
                found.append(properties[step])
            elif node.get("additionalProperties") is not False and not unions:
                return None, [], False
            known |= dict.fromkeys(properties)
        if "array" in kinds:
            is_list = True
            if step.isdecimal():
                if not isinstance(node.get("items"), Mapping) or "prefixItems" in node:
                    return None, [], False
                found.append(node["items"])
    return found, list(known), is_list


def parse_schema(source: object, *, path: str = "schema") -> Schema:
    """Make a `Schema` from any of the forms in the module's docstring. Raises `SchemaError` with YAML-like paths."""
    try:
        if isinstance(source, str):
            source = _import_model(source, path)
        if isinstance(source, type) and issubclass(source, BaseModel):
            return _of_model(source, path)
        if not isinstance(source, Mapping) or not source:
            raise InvalidValue(
                [
                    Problem(
                        path,
                        f"is {in_words(source)}, not a mapping of field to type.",
                        "Write {field: type}, a JSON Schema, or module:Model.",
                    )
                ]
            )
        author = plain(source, name=path)
        document = author if is_json_schema(author, path, root=True) else as_json_schema(author, path)
        return _of_document(prepared(document, path), path)
    except InvalidValue as error:
        raise SchemaError(error.problems) from None


def schema_of_document(document: Mapping[str, Any]) -> Schema:
    """The schema of another's ``json_schema``, for values that the other one checked.

    A pydantic model's document may name formats of pydantic's own, which nothing but pydantic enforces.
    """
    return _of_document(dict(document), "schema", any_format=True)


def _of_document(document: dict[str, Any], path: str, *, any_format: bool = False) -> Schema:
    faults, in_one_form = validator(document, path, any_format=any_format), canonical(document)

    def check(value: object) -> dict[str, Any]:
        data = in_one_form(plain(value))
        problems = faults(data)
        if problems:
            raise InvalidValue(problems)
        return cast(dict[str, Any], data)

    return Schema(document, check)


def _of_model(model: type[BaseModel], path: str) -> Schema:
    """Of a pydantic model: pydantic validates, in its strict JSON mode, and writes what it validated as JSON."""
    adapter: TypeAdapter[Any] = TypeAdapter(model)
    try:
        document = adapter.json_schema(mode="validation")
        written = adapter.json_schema(mode="serialization")
    except Exception as error:  # noqa: BLE001  # pydantic raises many kinds for fields that JSON Schema cannot say
        raise InvalidValue(
            [Problem(path, f"{model.__qualname__} has no JSON Schema ({error}).", "Use types that JSON can hold.")]
        ) from None
    document = cast(dict[str, Any], _tidy(written_out(document, path)))
    if document.get("type") != "object":
        raise InvalidValue([Problem(path, f"{model.__qualname__} is not a JSON object.", "A task's values are.")])
    missing = document.get("properties", {}).keys() - written_out(written, path).get("properties", {}).keys()
    if missing:
        name = min(missing)
        raise InvalidValue(
            [Problem(f"{path}.{name}", "is read under this name and written under another.", "Give it one alias.")]
        )
    sets_in_order = in_text_order(document)

    def check(value: object) -> dict[str, Any]:
        text = compact_json(plain(value, decimals_as_text=True))
        try:
            checked = adapter.validate_json(text, strict=True)
        except ValidationError as error:
            raise InvalidValue([_problem(e) for e in error.errors(include_url=False)]) from None
        data = plain(
            adapter.dump_python(
                checked, mode="json", exclude_unset=True, by_alias=True, round_trip=True, warnings=False
            )
        )
        return cast(dict[str, Any], data if sets_in_order is None else sets_in_order(data))

    return Schema(document, check)


def _import_model(target: str, path: str) -> type[BaseModel]:
    module, _, attribute = target.partition(":")
    remedy = "Write module:Model, with a pydantic model that can be imported from where Apprentice runs."
    if not module or not attribute:
        raise InvalidValue([Problem(path, f"is {in_words(target)}, neither a mapping nor module:Model.", remedy)])
    try:
        model = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # noqa: BLE001  # whatever the module raises when it is run
        why = f"{type(error).__name__}: {error}"
        raise InvalidValue([Problem(path, f"{target!r} cannot be imported ({why}).", remedy)]) from None
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise InvalidValue([Problem(path, f"{target!r} is no pydantic model.", remedy)])
    return model


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
    if error["type"] == "missing":
        return Problem(path, "is missing.")
    if error["type"] == "extra_forbidden":
        return Problem(path, "is not in the schema.")
    return Problem(path, f"is {in_words(error.get('input'))}: {error['msg'][:1].lower()}{error['msg'][1:]}.")
