"""Writes docs/configuration.md from the settings themselves: `python docs/reference.py`. A test holds the two equal."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from apprentice.settings.config import Named, Settings
from apprentice.settings.settings_schema import summary

HEAD = """\
# apprentice.yaml

Every key, its default and its meaning. `docs/reference.py` writes this page from `apprentice/settings/config.py`.

`apprentice check` reads a file and reports every mistake at once, each with its line. Then it tries what start-up and
the first training need: keys and prices, the functions that the file names, the extras, the base model, and whether the
store, the engine and MLflow answer. Each is `ok`, a `problem`, or `not tried`, with the reason; nothing is written and
no vendor is asked. Exit status 0: no problem; 1: a problem; 2: the command line was wrong.

## in your editor

`apprentice schema > apprentice.schema.json` writes the JSON Schema of this file for the installed version; in this
checkout it is [apprentice.schema.json](apprentice.schema.json). An editor with yaml-language-server (VS Code's YAML
extension, Neovim, Helix) completes keys and values, explains them and marks mistakes once the first line names it:

```yaml
# yaml-language-server: $schema=apprentice.schema.json
```

What hangs on two keys, and whether a function or a variable is there, only `apprentice check` can say.

## the file's text

UTF-8. What you write is what arrives: `no`, `010`, `12:30` and `2024-01-01` are text, a number is a number only if it
reads back as it was written, and only `true` and `false` are yes/no values in a schema. (In a yes-or-no key, `yes`,
`no`, `on` and `off` mean what they say.) A key that stands twice, a control character, an alias that multiplies: each
is a problem with its line. `${NAME}` in `store`, `tracking`, `webhook` and the URLs stands for an environment variable,
which is where a password belongs.

## schemas

A schema is one of

- a mapping of field to type:

  | written | means |
  | --- | --- |
  | `text: str` | `str`, `int`, `float`, `bool`, `date`, `datetime`, `dict`, `list`, `any` |
  | `tags: list[str]` | a list of one type |
  | `kind: a \\| b \\| c`, `level: [1, 2, 3]` | one of these words, or of these whole numbers |
  | `place: {city: str}` | an object |
  | `lines: [{name: str, price: float}]` | a list of objects |
  | `note: str?`, `place?: {city: str}` | optional, and may be null; within `{ }` in quotes: `{note: "str?"}` |
  | `code: {type: string, pattern: "^[A-Z]+$"}` | JSON Schema: a mapping whose `type` names types of JSON Schema |

- a JSON Schema: a mapping with `type: object` and keywords, or with `$schema`. It is validated as it is written, by
  draft 2020-12; a keyword or a `format` that is not enforced is refused with its path. Objects that list `properties`
  are closed unless you say `additionalProperties: true`; references that lead back to themselves are not supported.
- `module:Model`, a pydantic model that can be imported from where Apprentice runs. It is checked in strict JSON mode:
  enums, dates and decimals come and go as their text.

Objects that are put together by `allOf`, `if` or `patternProperties`, lists with `prefixItems`, and the bounds of a
value are not forced upon the local model while it writes; its finished answer is checked, and not served if it breaks
one.

Null for an optional field that takes no null is the same as leaving it out.

## values

What enters, by Python, HTTP, a vendor's answer or recorded traffic, follows one rule, so that it can be stored, trained
on and sent as JSON: half a surrogate pair becomes U+FFFD; NaN, Infinity, integers beyond 64 bits, bytes, keys that are
no text and nesting beyond 100 levels are refused, with the field's name; dates, enum members, UUIDs, decimals, tuples,
sets and numpy's numbers become the JSON they stand for.
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
    for one in field.metadata:
        if isinstance(one, Named):
            others = ", or another package's name" + (", or module:function" if one.or_function else "")
            return ", ".join(f"`{name}`" for name in one.registry.built_in) + others
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
            head = [
                f"## {path or 'the file'}",
                "",
                summary(model),
                "",
                "| key | type | default | meaning |",
                "| --- | --- | --- | --- |",
            ]
            parts.append("\n".join([*head, *body, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    (Path(__file__).parent / "configuration.md").write_text(render(), encoding="utf-8")
