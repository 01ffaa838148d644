"""OpenAI's two APIs, and everything that speaks the older one.

Strict structured output needs every field required and every object closed; a schema that cannot be said that way is
sent with ``strict: false``, as guidance. ``prompt_cache_key`` keeps a task's requests on the machine that has its
instructions cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx

from apprentice.remote.dialects import strict
from apprentice.remote.provider import (
    Body,
    Completion,
    Prompt,
    Turn,
)
from apprentice.store import Usage
from apprentice.transport import Endpoint, Request

__all__ = ["OpenAIChat", "OpenAIResponses"]

_OPENAI = "https://api.openai.com/v1"


def _endpoint(url: str, key: str) -> Endpoint:
    if not key:  # a server of one's own
        return Endpoint(url)
    if _is_azure(url):
        return Endpoint(url, ("api-key", key))
    return Endpoint(url, ("authorization", f"Bearer {key}"))


def _is_azure(url: str) -> bool:
    return httpx.URL(url).host.endswith(".azure.com")


def _json_schema(prompt: Prompt) -> dict[str, Any]:
    schema = strict(prompt.schema)
    return {
        "name": prompt.task,
        "schema": prompt.schema if schema is None else schema,
        "strict": schema is not None,
    }


def _messages(user: str, turns: Sequence[Turn]) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": user}]
    for turn in turns:
        messages.append({"role": "assistant", "content": turn.answer})
        messages.append({"role": "user", "content": turn.complaint})
    return messages


class OpenAIChat:
    """Chat Completions: of OpenAI itself, or of an ``openai_compatible`` server."""

    def __init__(self, model: str, key: str, base_url: str | None = None, *, name: str = "openai") -> None:
        self.name = name
        self.model = model
        url = (base_url or _OPENAI).rstrip("/") + "/chat/completions"
        self._endpoint = _endpoint(url, key)
        self._body = Body("messages")
        # The newer name is OpenAI's own; other servers know the older one.
        self._is_openai = name == "openai" or _is_azure(url)

    def __repr__(self) -> str:
        return f"OpenAIChat({self.model!r}, name={self.name!r})"

    def build(self, prompt: Prompt, user: str, turns: Sequence[Turn] = ()) -> Request:
        messages = [{"role": "system", "content": prompt.system}, *_messages(user, turns)]
        body = self._body.write(prompt, self._fixed, messages)
        return Request(self._endpoint, body)

    def _fixed(self, prompt: Prompt) -> dict[str, Any]:
        fixed: dict[str, Any] = {
            "model": self.model,
            "response_format": {"type": "json_schema", "json_schema": _json_schema(prompt)},
        }
        if self._is_openai:
            fixed["max_completion_tokens"] = prompt.max_output_tokens
            fixed["prompt_cache_key"] = prompt.task
        else:
            fixed["max_tokens"] = prompt.max_output_tokens
        return fixed

    def parse(self, body: dict[str, Any]) -> Completion:
        choice = body["choices"][0]
        message = choice["message"]
        finish = choice.get("finish_reason")
        refused = bool(message.get("refusal")) or finish == "content_filter"
        return Completion(
            message.get("content") or "",
            _chat_usage(body.get("usage")),
            "refusal" if refused else "length" if finish == "length" else "end",
        )


def _chat_usage(reported: Any) -> Usage | None:
    if not isinstance(reported, dict) or not isinstance(reported.get("completion_tokens"), int):
        return None
    prompt = reported.get("prompt_tokens_details") or {}
    completion = reported.get("completion_tokens_details") or {}
    return Usage(
        input=reported.get("prompt_tokens") or 0,
        output=reported["completion_tokens"],
        cached=prompt.get("cached_tokens") or 0,
        cache_write=prompt.get("cache_write_tokens") or 0,
        reasoning=completion.get("reasoning_tokens") or 0,
    )


class OpenAIResponses:
    """The Responses API. Nothing is stored at the vendor's."""

    name = "openai"

    def __init__(self, model: str, key: str, base_url: str | None = None) -> None:
        self.model = model
        self._endpoint = _endpoint((base_url or _OPENAI).rstrip("/") + "/responses", key)
        self._body = Body("input")

    def __repr__(self) -> str:
        return f"OpenAIResponses({self.model!r})"

    def build(self, prompt: Prompt, user: str, turns: Sequence[Turn] = ()) -> Request:
        body = self._body.write(prompt, self._fixed, _messages(user, turns))
        return Request(self._endpoint, body)

    def _fixed(self, prompt: Prompt) -> dict[str, Any]:
        return {
            "model": self.model,
            "instructions": prompt.system,
            "max_output_tokens": prompt.max_output_tokens,
            "text": {"format": {"type": "json_schema", **_json_schema(prompt)}},
            "prompt_cache_key": prompt.task,
            "store": False,
        }

    def parse(self, body: dict[str, Any]) -> Completion:
        parts = [part for item in body["output"] if item.get("type") == "message" for part in item.get("content", ())]
        text = "".join(part.get("text", "") for part in parts if part.get("type") == "output_text")
        reason = (body.get("incomplete_details") or {}).get("reason")
        refused = reason == "content_filter" or any(part.get("type") == "refusal" for part in parts)
        return Completion(
            text,
            _responses_usage(body.get("usage")),
            "refusal" if refused else "length" if body.get("status") == "incomplete" else "end",
        )


def _responses_usage(reported: Any) -> Usage | None:
    if not isinstance(reported, dict) or not isinstance(reported.get("output_tokens"), int):
        return None
    read = reported.get("input_tokens_details") or {}
    written = reported.get("output_tokens_details") or {}
    return Usage(
        input=reported.get("input_tokens") or 0,
        output=reported["output_tokens"],
        cached=read.get("cached_tokens") or 0,
        cache_write=read.get("cache_write_tokens") or 0,
        reasoning=written.get("reasoning_tokens") or 0,
    )
