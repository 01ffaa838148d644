"""Two renderings of one request.

The remote has never seen the task: it gets the description, the instructions and, by the vendor's own means, the
schema. The local model is trained on the task: it needs the input and nothing else, and every token more would be paid
for in every training step and every answer. The compact rendering is one function, used by trainers and engines alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from apprentice.schemas.json_values import compact_json
from apprentice.schemas.schema import Schema

__all__ = ["compact_prompt", "remote_system", "remote_user"]

_PLAIN_NAME = re.compile(r"[\w-][\w.-]*")

# not by indent=, for which json has no encoder in C
_a_field_a_line = json.JSONEncoder(ensure_ascii=False, separators=(",\n ", ": ")).encode


def remote_system(description: str, instructions: str) -> str:
    """What the remote is told about the task; the same for every request, so that a vendor can cache it."""
    parts = [description.strip(), instructions.strip(), "Answer with one JSON object that fits the given schema."]
    return "\n\n".join(part for part in parts if part)


def remote_user(value: Mapping[str, Any]) -> str:
    """The input as the remote sees it: JSON, a field a line, in schema order."""
    return _a_field_a_line(value)


def compact_prompt(value: Mapping[str, Any], schema: Schema | None = None) -> str:
    """The input as the local model sees it. Two inputs of one schema never look alike.

    If every input of ``schema`` is one text, that text, as it is. Else a field a line, as ``name: value``; a field that
    is not there has no line. Text stands as it is, the lines after its first one indented by two spaces; but where a
    field may hold other things than text, text that would read as one of them stands in quotes.

    Without ``schema`` the input is taken for one of a schema that has the very fields it has.
    """
    if schema.is_one_text if schema else len(value) == 1:
        (text,) = value.values()
        if isinstance(text, str):
            return text
    texts = schema.text_fields if schema else frozenset()
    return "\n".join(f"{_name(name)}: {_shown(inner, is_text=name in texts)}" for name, inner in value.items())


def _name(name: str) -> str:
    return name if _PLAIN_NAME.fullmatch(name) else compact_json(name)


def _shown(value: Any, *, is_text: bool) -> str:
    if not isinstance(value, str) or not (is_text or _is_only_text(value)):
        return compact_json(value)
    return value.replace("\n", "\n  ")


def _is_only_text(text: str) -> bool:
    """Whether a text is not the JSON of anything."""
    try:
        json.loads(text)
    except ValueError:
        return True
    except RecursionError:
        return False
    return False
