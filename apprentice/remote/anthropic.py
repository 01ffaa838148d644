"""Anthropic's Messages API.

Structured output comes in two ways. Models since Claude 4.1 take ``output_config.format`` and decode under the schema.
Older ones, and schemas that it cannot express, get the schema as a tool's ``input_schema``: forced where the model is
old, offered where it is not, because models that think by default refuse a forced tool. The system prompt is marked for
caching; below the vendor's minimum length the mark does nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from apprentice.remote.dialects import closed
from apprentice.remote.provider import (
    Body,
    Completion,
    MalformedAnswer,
    Prompt,
    Turn,
)
from apprentice.schema import compact_json
from apprentice.store import Usage
from apprentice.transport import Endpoint, Request

__all__ = ["Anthropic"]

_WITHOUT_OUTPUT_FORMAT = re.compile(r"claude-(instant|2|3|(opus|sonnet)-4(-0|-2025\d{4}|@2025\d{4})?$)", re.IGNORECASE)
_TOOL = "answer"
_STOPS: dict[str, Literal["end", "length", "refusal"]] = {
    "refusal": "refusal",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
}


class Anthropic:
    """Asks one Claude model."""

    name = "anthropic"

    def __init__(self, model: str, key: str, base_url: str | None = None) -> None:
        self.model = model
        url = (base_url or "https://api.anthropic.com").rstrip("/") + "/v1/messages"
        self._endpoint = Endpoint(url, ("x-api-key", key), ("anthropic-version", "2023-06-01"))
        self._old = bool(_WITHOUT_OUTPUT_FORMAT.match(model))
        self._body = Body("messages")

    def __repr__(self) -> str:
        return f"Anthropic({self.model!r})"

    def build(self, prompt: Prompt, user: str, turns: Sequence[Turn] = ()) -> Request:
        messages = [{"role": "user", "content": user}]
        for turn in turns:
            messages.append({"role": "assistant", "content": turn.answer or "(no answer)"})
            messages.append({"role": "user", "content": turn.complaint})
        body = self._body.write(prompt, self._fixed, messages)
        return Request(self._endpoint, body)

    def _fixed(self, prompt: Prompt) -> dict[str, Any]:
        schema = None if self._old else closed(prompt.schema)
        system = prompt.system
        body: dict[str, Any] = {"model": self.model, "max_tokens": prompt.max_output_tokens}
        if schema is not None:
            body["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
        else:
            system += f"\n\nGive the answer by calling the tool {_TOOL}."
            tool = {"name": _TOOL, "description": "Hand in the answer.", "input_schema": prompt.schema}
            body["tools"] = [tool]
            body["tool_choice"] = {"type": "tool", "name": _TOOL} if self._old else {"type": "auto"}
        body["system"] = [{"type": "text", "text": system, "cache_control": {"type": "ephemeral"}}]
        return body

    def parse(self, body: dict[str, Any]) -> Completion:
        if body.get("type") != "message":
            raise MalformedAnswer("the answer is no Messages API message")
        content = body["content"]
        called = [b for b in content if b.get("type") == "tool_use" and b.get("name") == _TOOL]
        if called:
            text = compact_json(called[0].get("input"))
        else:
            text = "".join(b.get("text", "") for b in content if b.get("type") == "text")
        stop = _STOPS.get(body.get("stop_reason", ""), "end")
        return Completion(text, _usage(body.get("usage")), stop)


def _usage(reported: Any) -> Usage | None:
    if not isinstance(reported, dict) or not isinstance(reported.get("output_tokens"), int):
        return None
    cached = reported.get("cache_read_input_tokens") or 0
    written = reported.get("cache_creation_input_tokens") or 0
    details = reported.get("output_tokens_details") or {}
    return Usage(
        input=(reported.get("input_tokens") or 0) + cached + written,
        output=reported["output_tokens"],
        cached=cached,
        cache_write=written,
        reasoning=details.get("thinking_tokens") or 0,
    )
