"""OpenAI's two APIs, and everything that speaks the older one.

Strict structured output needs every field required and every object closed; a schema that cannot be said that way is
sent with ``strict: false``, as guidance. Servers without ``json_schema`` are asked for JSON, or for nothing, and told
the schema in words. ``prompt_cache_key`` keeps a task's requests on the machine that has its instructions cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import httpx

from apprentice.remote.dialects import strict
from apprentice.remote.provider import (
    Body,
    Completion,
    MalformedAnswer,
    Prompt,
    Provider,
    ProviderPlugin,
    Turn,
    VendorError,
    address,
    schema_in_words,
    text_of,
)
from apprentice.remote.transport import Endpoint, Request
from apprentice.remote.usage import usage_of
from apprentice.settings.config import ProviderSettings
from apprentice.store import Usage

__all__ = ["OpenAIChat", "OpenAIResponses", "read_chat"]

_OPENAI = "https://api.openai.com/v1"
_ORDINARY = ("stop", "tool_calls", "function_call", "", None)
_STOPS: dict[Any, Literal["length", "refusal"]] = {
    "length": "length",
    "max_output_tokens": "length",
    "max_tokens": "length",
    "content_filter": "refusal",
}


def _endpoint(url: str, key: str) -> Endpoint:
    if not key:  # a server of one's own
        return Endpoint(url)
    if _is_azure(url):
        return Endpoint(url, ("api-key", key))
    return Endpoint(url, ("authorization", f"Bearer {key}"))


def _is_azure(url: str) -> bool:
    return httpx.URL(url).host.endswith(".azure.com")


def _system(prompt: Prompt) -> str:
    return prompt.system if prompt.format == "json_schema" else schema_in_words(prompt.system, prompt.schema)


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
        messages.append({"role": "assistant", "content": turn.shown})
        messages.append({"role": "user", "content": turn.complaint})
    return messages


class OpenAIChat(ProviderPlugin):
    """Chat Completions: of OpenAI itself, or of an ``openai_compatible`` server."""

    dialect = staticmethod(strict)
    most_enum_values = 1000

    def __init__(self, model: str, key: str, base_url: str | None = None, *, name: str = "openai") -> None:
        self.name = name
        self.model = model
        url = address(base_url or _OPENAI, "/chat/completions")
        self._endpoint = _endpoint(url, key)
        self._body = Body("messages")
        # The newer name is OpenAI's own; other servers know the older one.
        self._is_openai = name == "openai" or _is_azure(url)

    @classmethod
    def configured(cls, settings: ProviderSettings, key: str, options: Any) -> Provider:
        if settings.api == "responses":
            return OpenAIResponses(settings.model, key, settings.base_url)
        return cls(settings.model, key, settings.base_url)

    def __repr__(self) -> str:
        return f"OpenAIChat({self.model!r}, name={self.name!r})"

    def build(self, prompt: Prompt, user: str, turns: Sequence[Turn] = ()) -> Request:
        messages = [{"role": "system", "content": _system(prompt)}, *_messages(user, turns)]
        body = self._body.write(prompt, self._fixed, messages)
        return Request(self._endpoint, body)

    def _fixed(self, prompt: Prompt) -> dict[str, Any]:
        fixed: dict[str, Any] = {"model": self.model}
        match prompt.format:
            case "json_schema":
                fixed["response_format"] = {"type": "json_schema", "json_schema": _json_schema(prompt)}
            case "json_object":
                fixed["response_format"] = {"type": "json_object"}
        if self._is_openai:
            fixed["max_completion_tokens"] = prompt.max_output_tokens
            fixed["prompt_cache_key"] = prompt.task
        else:
            fixed["max_tokens"] = prompt.max_output_tokens
        return fixed

    def parse(self, body: Any) -> Completion:
        return read_chat(body)


def read_chat(body: Any) -> Completion:
    """Read the JSON body of a 2xx response of Chat Completions; raises as `Provider.parse`."""
    choice = body["choices"][0]
    finish = choice.get("finish_reason")
    if choice.get("error") or finish == "error":  # a gateway, whose vendor failed in the middle
        raise VendorError(choice.get("error") or {"message": "the answer ended with an error"})
    message = choice["message"]
    text, usage = text_of(message.get("content")), _chat_usage(body.get("usage"))
    if message.get("refusal") or _declines(message.get("content")):
        return Completion(text, usage, "refusal", "refusal")
    if finish in _ORDINARY:
        return Completion(text, usage)
    return Completion(text, usage, _STOPS.get(finish, "end"), str(finish))


def _declines(parts: Any) -> bool:
    return isinstance(parts, list) and any(isinstance(part, dict) and part.get("type") == "refusal" for part in parts)


def _chat_usage(reported: Any) -> Usage | None:
    return _usage(reported, "prompt_tokens", "completion_tokens")


def _usage(reported: Any, read: str, written: str) -> Usage | None:
    if not isinstance(reported, dict):
        return None
    of_read, of_written = reported.get(f"{read}_details"), reported.get(f"{written}_details")
    of_read = of_read if isinstance(of_read, dict) else {}
    of_written = of_written if isinstance(of_written, dict) else {}
    return usage_of(
        reported.get(read),
        reported.get(written),
        cached=of_read.get("cached_tokens"),
        cache_write=of_read.get("cache_write_tokens"),
        reasoning=of_written.get("reasoning_tokens"),
    )


class OpenAIResponses:
    """The Responses API. Nothing is stored at the vendor's."""

    name = "openai"

    def __init__(self, model: str, key: str, base_url: str | None = None) -> None:
        self.model = model
        self._endpoint = _endpoint(address(base_url or _OPENAI, "/responses"), key)
        self._body = Body("input")

    def __repr__(self) -> str:
        return f"OpenAIResponses({self.model!r})"

    def build(self, prompt: Prompt, user: str, turns: Sequence[Turn] = ()) -> Request:
        messages = _messages(user, turns)
        if prompt.format != "json_schema":  # its JSON mode wants the word among the messages
            messages.insert(0, {"role": "developer", "content": _system(prompt)})
        return Request(self._endpoint, self._body.write(prompt, self._fixed, messages))

    def _fixed(self, prompt: Prompt) -> dict[str, Any]:
        fixed: dict[str, Any] = {
            "model": self.model,
            "max_output_tokens": prompt.max_output_tokens,
            "prompt_cache_key": prompt.task,
            "store": False,
        }
        match prompt.format:
            case "json_schema":
                fixed["instructions"] = prompt.system
                fixed["text"] = {"format": {"type": "json_schema", **_json_schema(prompt)}}
            case "json_object":
                fixed["text"] = {"format": {"type": "json_object"}}
        return fixed

    def parse(self, body: Any) -> Completion:
        status = body.get("status")
        if status in ("failed", "cancelled"):
            raise VendorError(body.get("error") or {"message": f"the response is {status}"})
        if status not in ("completed", "incomplete", None):
            raise MalformedAnswer(f"its status is {status!r}")
        contents = [item.get("content") for item in body["output"] if item.get("type") == "message"]
        text = "".join(text_of(content) for content in contents)
        usage = _responses_usage(body.get("usage"))
        if any(_declines(content) for content in contents):
            return Completion(text, usage, "refusal", "refusal")
        if status != "incomplete":
            return Completion(text, usage)
        reason = (body.get("incomplete_details") or {}).get("reason")
        return Completion(text, usage, _STOPS.get(reason, "length"), str(reason or status))


def _responses_usage(reported: Any) -> Usage | None:
    return _usage(reported, "input_tokens", "output_tokens")


REGISTERED = OpenAIChat
