"""One JSON Schema in the dialects of the vendors' structured outputs.

No vendor takes all of JSON Schema. Each function keeps what its vendor can enforce, drops what we check ourselves
anyway (lengths, ranges, patterns), and returns None where the vendor has no way of saying it: free-form objects and
lists, and fields of any type. Then the caller asks without enforcement, and our own check decides alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

__all__ = ["closed", "gemini", "strict", "without_null_options"]

_SCALARS = ("string", "integer", "number", "boolean", "null")


def strict(schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """For OpenAI: objects closed, every property required, an optional one nullable instead."""
    return _convert(schema, all_required=True)


def closed(schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """For Anthropic: objects closed, optional properties left out of ``required``."""
    return _convert(schema, all_required=False)


def _convert(node: Mapping[str, Any], *, all_required: bool) -> dict[str, Any] | None:
    described = {"description": node["description"]} if "description" in node else {}
    if "const" in node:
        return {**_typed(node), "const": node["const"], **described}
    if "enum" in node:
        return {**_typed(node), "enum": list(node["enum"]), **described}
    if "anyOf" in node:
        branches = [_convert(branch, all_required=all_required) for branch in node["anyOf"]]
        return None if None in branches else {"anyOf": branches, **described}
    match node.get("type"):
        case "object":
            properties = node.get("properties")
            if not properties or node.get("additionalProperties", False) is not False:
                return None
            required = set(node.get("required", ()))
            converted = {}
            for name, child in properties.items():
                inner = _convert(child, all_required=all_required)
                if inner is None:
                    return None
                converted[name] = inner if name in required or not all_required else _nullable(inner)
            names = [name for name in properties if all_required or name in required]
            return {
                "type": "object",
                "properties": converted,
                "required": names,
                "additionalProperties": False,
                **described,
            }
        case "array":
            items = _convert(node["items"], all_required=all_required) if node.get("items") else None
            return None if items is None else {"type": "array", "items": items, **described}
        case kind if kind in _SCALARS:
            return {"type": kind, **described}
    return None


def _typed(node: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": node["type"]} if isinstance(node.get("type"), str) else {}


def _nullable(node: dict[str, Any]) -> dict[str, Any]:
    if "anyOf" in node:
        if {"type": "null"} in node["anyOf"]:
            return node
        return {**node, "anyOf": [*node["anyOf"], {"type": "null"}]}
    return {"anyOf": [node, {"type": "null"}]}


def gemini(schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """For Gemini's responseSchema: a subset of OpenAPI 3.0, with upper-case types, ``nullable`` and an order."""
    if "const" in schema:
        schema = {**{k: v for k, v in schema.items() if k != "const"}, "enum": [schema["const"]]}
    described = {"description": schema["description"]} if "description" in schema else {}
    if "enum" in schema:
        values = schema["enum"]
        if all(isinstance(v, str) for v in values):
            return {"type": "STRING", "enum": list(values), **described}
        if all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            # enums hold strings there; the description asks, and our own check enforces
            return {"type": "INTEGER", "description": "one of " + ", ".join(map(str, values))}
        return None
    if "anyOf" in schema:
        branches = [branch for branch in schema["anyOf"] if branch != {"type": "null"}]
        converted = [gemini(branch) for branch in branches]
        if None in converted:
            return None
        kept = cast(list[dict[str, Any]], converted)
        nullable = {"nullable": True} if len(branches) < len(schema["anyOf"]) else {}
        return {**(kept[0] if len(kept) == 1 else {"anyOf": kept}), **nullable, **described}
    match schema.get("type"):
        case "object":
            properties = schema.get("properties")
            if not properties or schema.get("additionalProperties", False) is not False:
                return None
            inner = {name: gemini(child) for name, child in properties.items()}
            if None in inner.values():
                return None
            return {
                "type": "OBJECT",
                "properties": inner,
                "required": list(schema.get("required", ())),
                "propertyOrdering": list(properties),
                **described,
            }
        case "array":
            items = gemini(schema["items"]) if schema.get("items") else None
            return None if items is None else {"type": "ARRAY", "items": items, **described}
        case "string" | "integer" | "number" | "boolean" as kind:
            return {"type": kind.upper(), **described}
    return None


def without_null_options(schema: Mapping[str, Any], value: Any) -> Any:
    """Leave out optional fields that are null: OpenAI must write them, others omit them, and examples should agree."""
    if isinstance(value, dict) and "properties" in schema:
        required = schema.get("required", ())
        return {
            name: without_null_options(schema["properties"].get(name, {}), inner)
            for name, inner in value.items()
            if inner is not None or name in required or name not in schema["properties"]
        }
    if isinstance(value, list) and "items" in schema:
        return [without_null_options(schema["items"], item) for item in value]
    if "anyOf" in schema and isinstance(value, dict | list):
        kind = "object" if isinstance(value, dict) else "array"
        branches = [branch for branch in schema["anyOf"] if branch.get("type") == kind]
        return without_null_options(branches[0], value) if len(branches) == 1 else value
    return value
