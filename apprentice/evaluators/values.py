"""JSON values as evaluators compare and keep them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["LONG", "MISSING", "at", "canonical", "digest", "same", "shorten", "without_nulls"]

LONG = 200
"""Characters of a text that are kept; of a longer one its hash."""
MISSING: Any = object()


def at(answer: Any, path: Sequence[str]) -> Any:
    """What stands at a path of keys and positions; MISSING if nothing does."""
    for key in path:
        if isinstance(answer, Mapping) and key in answer:
            answer = answer[key]
        elif isinstance(answer, list | tuple) and key.isdecimal() and int(key) < len(answer):
            answer = answer[int(key)]
        else:
            return MISSING
    return answer


def same(a: Any, b: Any) -> bool:
    """Equality as JSON values: True is not 1, and a tuple is a list."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def without_nulls(value: Any) -> Any:
    """The value without the fields that are null, at every depth."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(inner) for inner in value]
    return value


def canonical(value: Any) -> str:
    """One text for every value that is the same."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


def digest(text: str) -> str:
    """A hash of 96 bits."""
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def shorten(value: Any) -> Any:
    """The value, every long text in it by its hash."""
    if isinstance(value, str) and len(value) > LONG:
        return "#" + digest(" ".join(value.split()))
    if isinstance(value, Mapping):
        return {key: shorten(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [shorten(inner) for inner in value]
    return value
