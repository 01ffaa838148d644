"""Which output fields a head can answer: those with a finite set of values. Needs no NumPy, so routers may ask too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apprentice.schemas.schema import Schema, compact_json

__all__ = ["finite_fields"]

_MOST_VALUES = 1000
_MOST_INTEGERS = 21
"""Whole numbers between two bounds that are values of their own: a mark, a number of stars."""


def finite_fields(schema: Schema) -> dict[str, tuple[Any, ...]]:
    """The top-level output fields with a finite set of values, in the schema's order, each with its values.

    Enums, constants, booleans, nulls, whole numbers between two bounds up to 20 apart, and any of these or null. A
    field that may be left out but not be null is none: that it is left out is no value.
    """
    document = schema.json_schema
    required = document.get("required", ())
    found = {}
    for name, node in document.get("properties", {}).items():
        values = _values(node)
        if values is None:
            continue
        unique = {compact_json(value): value for value in values}
        optional = name not in required and "null" not in unique
        if not optional and 0 < len(unique) <= _MOST_VALUES:
            found[name] = tuple(unique.values())
    return found


def _values(node: Any) -> list[Any] | None:
    if not isinstance(node, Mapping):
        return None
    if "enum" in node:
        return list(node["enum"])
    if "const" in node:
        return [node["const"]]
    kind = node.get("type")
    if kind == "boolean":
        return [True, False]
    if kind == "null":
        return [None]
    if kind == "integer":
        return _integers(node)
    branches = node.get("anyOf") or node.get("oneOf")
    if kind is None and branches:
        each = [_values(branch) for branch in branches]
        return None if any(one is None for one in each) else [value for one in each for value in one or ()]
    return None


def _integers(node: Mapping[str, Any]) -> list[int] | None:
    low, high = node.get("minimum"), node.get("maximum")
    if low is None and node.get("exclusiveMinimum") is not None:
        low = int(node["exclusiveMinimum"] // 1) + 1
    if high is None and node.get("exclusiveMaximum") is not None:
        high = int(-(-node["exclusiveMaximum"] // 1)) - 1
    if low is None or high is None or high - low >= _MOST_INTEGERS or node.get("multipleOf") is not None:
        return None
    return list(range(int(-(-low // 1)), int(high // 1) + 1))
