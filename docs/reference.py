"""Writes docs/configuration.md from the settings themselves: `python docs/reference.py`. A test holds the two equal."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from apprentice.config import Settings

HEAD = """\
# apprentice.yaml

Every key, its default and its meaning. `apprentice check` reads a file and reports every mistake at once.
This page is written by `docs/reference.py` from `apprentice/config.py`.

A schema is a mapping of field to type (`str`, `int`, `float`, `bool`, `dict`, `list`, `any`, `list[TYPE]`, `a | b | c`,
a list of values, a nested mapping; a trailing `?` makes a field optional), a JSON Schema, or `module:Model`.
"""
REQUIRED = "required"
RULE = "| --- | --- | --- | --- |"


def sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section of the file with its dotted path, outermost first."""
    yield path, model
    for name, field in model.model_fields.items():
        for inner in _models(field.annotation):
            repeated = "[]" if typing.get_origin(field.annotation) is tuple else ""
            yield from sections(inner, f"{path}.{name}{repeated}".lstrip("."))


def _models(annotation: Any) -> list[type[BaseModel]]:
    options = [annotation, *typing.get_args(annotation)]
    return [a for a in options if isinstance(a, type) and issubclass(a, BaseModel)]


def rows(model: type[BaseModel]) -> Iterator[str]:
    """One table row for each key of a section that is no section itself."""
    for name, field in model.model_fields.items():
        if _models(field.annotation) or field.exclude:
            continue
        yield f"| `{name}` | {_type(field)} | {_default(field)} | {field.description or ''} |"


def _type(field: FieldInfo) -> str:
    return _type_name(field.annotation).replace("|", "\\|")


def _type_name(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{a}`" for a in args)
    if origin is typing.Annotated:
        return _type_name(args[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(a) for a in args if a is not type(None))
    if origin is tuple:
        return f"list of {_type_name(args[0])}"
    if origin is not None and len(args) == 2:
        return f"mapping of {_type_name(args[0])} to {_type_name(args[1])}"
    words = {
        "str": "text",
        "int": "whole number",
        "float": "number",
        "Decimal": "USD",
        "bool": "yes or no",
        "Path": "path",
    }
    return words.get(annotation.__name__, annotation.__name__.lower())


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return REQUIRED
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "none"
    if value in ("", (), {}):
        return "empty"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def render() -> str:
    """The whole page."""
    parts = [HEAD]
    for path, model in sections(Settings):
        body = list(rows(model))
        if body:
            summary = (model.__doc__ or "").strip().split("\n")[0].replace("``", "`")
            head = [
                f"## {path or 'the file'}",
                "",
                summary,
                "",
                "| key | type | default | meaning |",
                "| --- | --- | --- | --- |",
            ]
            parts.append("\n".join([*head, *body, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    (Path(__file__).parent / "configuration.md").write_text(render(), encoding="utf-8")
