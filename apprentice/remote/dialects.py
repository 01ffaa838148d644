"""One JSON Schema in the dialects of the vendors' structured outputs.

No vendor takes all of JSON Schema. Each function keeps what its vendor can enforce, drops what we check ourselves
anyway (lengths, ranges, patterns), and returns None where the vendor has no way of saying it: free-form objects and
lists, and fields of any type. Then the caller asks without enforcement, and our own check decides alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

__all__ = ["closed", "gemini", "strict"]

_SCALARS = ("string", "integer", "number", "boolean", "null")


def strict(schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """For OpenAI: objects closed, every property required, an optional one nullable instead."""
    return _an_object(_convert(schema, all_required=True))


def closed(schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """For Anthropic: objects closed, optional properties left out of ``required``."""
    return _an_object(_convert(schema, all_required=False))


def _an_object(root: dict[str, Any] | None) -> dict[str, Any] | None:
    return root if root is not None and root.get("type") == "object" else None


def _convert(node: Any, *, all_required: bool) -> dict[str, Any] | None:
    if not isinstance(node, Mapping):  # JSON Schema's true and false
        return None
    node = _one_type_each(node)
    described = {"description": node["description"]} if "description" in node else {}
    if "const" in node:
        return {**_typed(node), "const": node["const"], **described}
    if "enum" in node:
        return {**_typed(node), "enum": list(node["enum"]), **described}
    if union := _union(node):
        branches = [_convert(branch, all_required=all_required) for branch in union]
        return None if None in branches else {"anyOf": branches, **described}
    match node.get("type"):
        case "object":
            properties = node.get("properties")
            if not properties or _is_open(node):
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


def _one_type_each(node: Mapping[str, Any]) -> Mapping[str, Any]:
    """A node whose ``type`` is a list, as the union that it stands for."""
    kinds = node.get("type")
    if not isinstance(kinds, list):
        return node
    if "enum" in node or "const" in node:  # which say it all
        return {key: value for key, value in node.items() if key != "type"}
    outer = {key: node[key] for key in ("description",) if key in node}
    return {"anyOf": [{**{k: v for k, v in node.items() if k not in outer}, "type": kind} for kind in kinds], **outer}


def _union(node: Mapping[str, Any]) -> list[Any]:
    """The branches of a union. That just one of them may fit is for our own check to see."""
    return list(node.get("anyOf") or node.get("oneOf") or ())


def _is_open(node: Mapping[str, Any]) -> bool:
    """Whether an object may have properties that it does not name; closing it would forbid what its author takes."""
    return node.get("additionalProperties") is not False or bool(node.get("patternProperties"))


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
    root = _gemini(schema)
    return root if root is not None and root.get("type") == "OBJECT" else None


def _gemini(schema: Any) -> dict[str, Any] | None:
    if not isinstance(schema, Mapping):
        return None
    schema = _one_type_each(schema)
    if "const" in schema:
        schema = {**{k: v for k, v in schema.items() if k != "const"}, "enum": [schema["const"]]}
    described = {"description": schema["description"]} if "description" in schema else {}
    if "enum" in schema:
        values = [value for value in schema["enum"] if value is not None]
        nullable = {"nullable": True} if len(values) < len(schema["enum"]) else {}
        if values and all(isinstance(v, str) for v in values):
            return {"type": "STRING", "enum": values, **nullable, **described}
        if values and all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            # enums hold strings there; the description asks, and our own check enforces
            said = f"{schema['description']}; " if "description" in schema else ""
            return {"type": "INTEGER", "description": f"{said}one of {', '.join(map(str, values))}", **nullable}
        return None
    if union := _union(schema):
        branches = [branch for branch in union if not (isinstance(branch, Mapping) and branch.get("type") == "null")]
        converted = [_gemini(branch) for branch in branches]
        if not converted or None in converted:
            return None
        kept = cast(list[dict[str, Any]], converted)
        nullable = {"nullable": True} if len(branches) < len(union) else {}
        return {**(kept[0] if len(kept) == 1 else {"anyOf": kept}), **nullable, **described}
    match schema.get("type"):
        case "object":
            properties = schema.get("properties")
            if not properties or _is_open(schema):
                return None
            inner = {name: _gemini(child) for name, child in properties.items()}
            if None in inner.values():
                return None
            return {
                "type": "OBJECT",
                "properties": inner,
                "required": [name for name in properties if name in schema.get("required", ())],
                "propertyOrdering": list(properties),
                **described,
            }
        case "array":
            items = _gemini(schema["items"]) if schema.get("items") else None
            return None if items is None else {"type": "ARRAY", "items": items, **described}
        case "string" | "integer" | "number" | "boolean" as kind:
            return {"type": kind.upper(), **described}
    return None
