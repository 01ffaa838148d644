"""Two renderings of one request.

The remote has never seen the task: it gets the description, the instructions and, by the vendor's own means, the
schema. The local model is trained on the task: it needs the input and nothing else, and every token more would be paid
for in every training step and every answer. The compact rendering is one function, used by trainers and engines alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["compact_prompt", "remote_system", "remote_user"]


# not by indent=, for which json has no encoder in C
_a_field_a_line = json.JSONEncoder(ensure_ascii=False, separators=(",\n ", ": ")).encode


def remote_system(description: str, instructions: str) -> str:
    """What the remote is told about the task; the same for every request, so that a vendor can cache it."""
    parts = [description.strip(), instructions.strip(), "Answer with one JSON object that fits the given schema."]
    return "\n\n".join(part for part in parts if part)


def remote_user(value: Mapping[str, Any]) -> str:
    """The input as the remote sees it: JSON, a field a line, in schema order."""
    return _a_field_a_line(value)


def compact_prompt(value: Mapping[str, Any]) -> str:
    """The input as the local model sees it: a lone text as itself, several fields one a line as ``name: value``."""
    fields = [(name, v) for name, v in value.items() if v not in (None, {}, [])]
    if len(fields) == 1 and isinstance(fields[0][1], str):
        return fields[0][1]
    return "\n".join(f"{name}: {v if isinstance(v, str) else _dumps(v)}" for name, v in fields)


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
