"""Anthropic's Messages API.

Structured output comes in two ways. Models since Claude 4.1 take ``output_config.format`` and decode under the schema.
Older ones, and schemas that it cannot express, get the schema as a tool's ``input_schema``: forced where the model is
old, offered where it is not, because models that think by default refuse a forced tool. The tool is also what
``structured_output: json_object`` means here. The system prompt is marked for caching; below the vendor's minimum
length the mark does nothing.
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
    ProviderPlugin,
    Turn,
    address,
    schema_in_words,
    text_of,
)
from apprentice.remote.transport import Endpoint, Request
from apprentice.remote.usage import total, usage_of
from apprentice.schemas.schema import compact_json
from apprentice.settings.config import ProviderSettings
from apprentice.store import Usage

__all__ = ["Anthropic"]

_WITHOUT_OUTPUT_FORMAT = re.compile(r"claude-(instant|2|3|(opus|sonnet)-4(-0|-2025\d{4}|@2025\d{4})?$)", re.IGNORECASE)
_TOOL = "answer"
_STOPS: dict[str, Literal["end", "length", "refusal"]] = {
    "refusal": "refusal",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
}
_ORDINARY = ("", "end_turn", "tool_use", "stop_sequence")


class Anthropic(ProviderPlugin):
    """Asks one Claude model."""

    name = "anthropic"
    dialect = staticmethod(closed)

    def __init__(self, model: str, key: str, base_url: str | None = None) -> None:
        self.model = model
        url = address(base_url or "https://api.anthropic.com", "/v1/messages")
        self._endpoint = Endpoint(url, ("x-api-key", key), ("anthropic-version", "2023-06-01"))
        self._old = bool(_WITHOUT_OUTPUT_FORMAT.match(model))
        self._body = Body("messages")

    @classmethod
    def configured(cls, settings: ProviderSettings, key: str, options: Any) -> Anthropic:
        return cls(settings.model, key, settings.base_url)

    def __repr__(self) -> str:
        return f"Anthropic({self.model!r})"

    def build(self, prompt: Prompt, user: str, turns: Sequence[Turn] = ()) -> Request:
        messages = [{"role": "user", "content": user}]
        for turn in turns:
            messages.append({"role": "assistant", "content": turn.shown})
            messages.append({"role": "user", "content": turn.complaint})
        body = self._body.write(prompt, self._fixed, messages)
        return Request(self._endpoint, body)

    def _fixed(self, prompt: Prompt) -> dict[str, Any]:
        schema = closed(prompt.schema) if prompt.format == "json_schema" and not self._old else None
        system = prompt.system
        body: dict[str, Any] = {"model": self.model, "max_tokens": prompt.max_output_tokens}
        if schema is not None:
            body["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
        elif prompt.format == "none":
            system = schema_in_words(system, prompt.schema)
        else:
            system += f"\n\nGive the answer by calling the tool {_TOOL}."
            tool = {"name": _TOOL, "description": "Hand in the answer.", "input_schema": prompt.schema}
            body["tools"] = [tool]
            body["tool_choice"] = {"type": "tool", "name": _TOOL} if self._old else {"type": "auto"}
        body["system"] = [{"type": "text", "text": system, "cache_control": {"type": "ephemeral"}}]
        return body

    def parse(self, body: Any) -> Completion:
        if body.get("type") != "message":
            raise MalformedAnswer("it is no Messages API message")
        content = body["content"]
        called = [b for b in content if isinstance(b, dict) and b.get("type") == "tool_use" and b.get("name") == _TOOL]
        if called:
            handed_in = called[0].get("input")
            # proxies, and older models, give the JSON's text in the place of the object
            text = handed_in if isinstance(handed_in, str) else compact_json(handed_in)
        else:
            text = text_of(content)
        reason = body.get("stop_reason") or ""
        if reason in _ORDINARY:
            return Completion(text, _usage(body.get("usage")))
        return Completion(text, _usage(body.get("usage")), _STOPS.get(reason, "end"), str(reason))


def _usage(reported: Any) -> Usage | None:
    if not isinstance(reported, dict):
        return None
    cached, written = reported.get("cache_read_input_tokens"), reported.get("cache_creation_input_tokens")
    details = reported.get("output_tokens_details")
    return usage_of(
        total(reported.get("input_tokens"), cached, written),  # this vendor counts them apart
        reported.get("output_tokens"),
        cached=cached,
        cache_write=written,
        reasoning=details.get("thinking_tokens") if isinstance(details, dict) else None,
    )


REGISTERED = Anthropic
