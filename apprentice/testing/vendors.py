"""Vendors' protocols from the vendors' side, as strict as the real ones: what they refuse, this refuses likewise.

Each protocol reads a request (headers and JSON body) into a `Question` or raises `Refused`, and writes an answer or an
error in the shape of the vendor's public API reference. No I/O; `apprentice.testing.remote` serves them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

__all__ = ["PROTOCOLS", "AnthropicProtocol", "Question", "Refused", "Stop", "VendorProtocol"]

type Format = Literal["json_schema", "json_object", "none"]
type Stop = Literal["end", "length", "refusal", "filtered"]

_OPENAIS_MOST_ENUM_VALUES = 1000  # of all enums in a schema together
_GEMINIS_MOST_ENUM_VALUES = 250  # it names no number; some 260 were reported to be too many


@dataclass(frozen=True, slots=True)
class Question:
    """A request that the vendor accepts: what the user sent last, and everything before it."""

    model: str
    system: str
    user: str
    turns: tuple[str, ...]
    max_output_tokens: int
    format: Format = "json_schema"
    by_tool: bool = False

    @property
    def value(self) -> Any:
        """The input, where the user's first turn is the JSON that Apprentice writes."""
        first = self.turns[0] if self.turns else self.user
        return json.loads(first)


class Refused(Exception):
    """The request is wrong; ``status`` and ``kind`` as the vendor names them."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        self.status = status
        self.kind = kind
        super().__init__(message)


class VendorProtocol(Protocol):
    """One vendor's API, seen from the vendor."""

    def read(self, path: str, headers: Mapping[str, str], body: dict[str, Any], key: str) -> Question: ...
    def answer(
        self, question: Question, text: str, stop: Stop, tokens_in: int, *, in_parts: bool = False
    ) -> dict[str, Any]: ...
    def error(self, status: int, kind: str, message: str) -> dict[str, Any]: ...


def tokens(text: str) -> int:
    """A plausible count of tokens."""
    return max(math.ceil(len(text.encode("utf-8", "replace")) / 4), 1)


def _halves(text: str, *, in_parts: bool) -> list[str]:
    middle = len(text) // 2
    return [text[:middle], text[middle:]] if in_parts else [text]


def _enum_values(node: Any) -> int:
    if isinstance(node, list):
        return sum(map(_enum_values, node))
    if not isinstance(node, dict):
        return 0
    own = len(node["enum"]) if isinstance(node.get("enum"), list) else 0
    return own + sum(map(_enum_values, node.values()))


def _known(body: Mapping[str, Any], names: set[str], status: int, kind: str, where: str = "") -> None:
    for name in body:
        if name not in names:
            raise Refused(status, kind, f"{where}{name}: Extra inputs are not permitted")


def _positive(body: Mapping[str, Any], name: str, kind: str) -> int:
    value = body.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Refused(400, kind, f"{name}: Input should be a positive integer")
    return value


def _walk_closed(node: Any, kind: str, *, all_required: bool, root: bool = False) -> None:
    """Structured outputs accept closed objects, and no keyword that they cannot decode under."""
    if not isinstance(node, dict):
        raise Refused(400, kind, "schema: every node must be an object")
    if root and node.get("type") != "object":
        raise Refused(400, kind, f"schema must be a JSON Schema of 'type: \"object\"', got {node.get('type')!r}")
    allowed = {
        "type",
        "properties",
        "required",
        "additionalProperties",
        "items",
        "enum",
        "const",
        "anyOf",
        "description",
    }
    _known(node, allowed, 400, kind, "schema.")
    if not node.keys() & {"type", "enum", "const", "anyOf"}:
        raise Refused(400, kind, "schema: a node without type cannot be enforced")
    if node.get("type") == "object":
        if node.get("additionalProperties") is not False:
            raise Refused(400, kind, "schema: 'additionalProperties' is required to be supplied and to be false")
        properties = node.get("properties", {})
        if all_required and sorted(node.get("required", [])) != sorted(properties):
            raise Refused(400, kind, "schema: 'required' is required to include every key in properties")
        for child in properties.values():
            _walk_closed(child, kind, all_required=all_required)
    if node.get("type") == "array":
        _walk_closed(node.get("items"), kind, all_required=all_required)
    for branch in node.get("anyOf", ()):
        _walk_closed(branch, kind, all_required=all_required)


def _alternating(messages: Any, kind: str, roles: tuple[str, str]) -> list[str]:
    if not isinstance(messages, list) or not messages:
        raise Refused(400, kind, "messages: at least one message is required")
    texts = []
    for i, message in enumerate(messages):
        if message.get("role") != roles[i % 2]:
            raise Refused(400, kind, f"messages.{i}: roles must alternate, beginning with {roles[0]}")
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            raise Refused(400, kind, f"messages.{i}: text content must be non-empty")
        texts.append(content)
    return texts


class AnthropicProtocol:
    """POST /v1/messages."""

    def read(self, path: str, headers: Mapping[str, str], body: dict[str, Any], key: str) -> Question:
        if path != "/v1/messages":
            raise Refused(404, "not_found_error", "Not found")
        if headers.get("x-api-key") != key:
            raise Refused(401, "authentication_error", "invalid x-api-key")
        if headers.get("anthropic-version") != "2023-06-01":
            raise Refused(400, "invalid_request_error", "anthropic-version: header is required")
        bad = "invalid_request_error"
        known = {"model", "max_tokens", "messages", "system", "output_config", "tools", "tool_choice"}
        _known(body, known, 400, bad)
        texts = _alternating(body.get("messages"), bad, ("user", "assistant"))
        system = "".join(block["text"] for block in body.get("system", ()))
        asked: Format = "json_object" if "tools" in body else "none"
        if "output_config" in body:
            asked = "json_schema"
            form = body["output_config"].get("format", {})
            if form.get("type") != "json_schema":
                raise Refused(400, bad, "output_config.format.type: Input should be 'json_schema'")
            _walk_closed(form.get("schema"), bad, all_required=False, root=True)
        for tool in body.get("tools", ()):
            if tool.get("input_schema", {}).get("type") != "object":
                raise Refused(400, bad, "tools.0.input_schema.type: Input should be 'object'")
        max_tokens = _positive(body, "max_tokens", bad)
        by_tool = "tools" in body
        return Question(body["model"], system, texts[-1], tuple(texts[:-1]), max_tokens, asked, by_tool=by_tool)

    def answer(
        self, question: Question, text: str, stop: Stop, tokens_in: int, *, in_parts: bool = False
    ) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": half} for half in _halves(text, in_parts=in_parts)]
        if in_parts:
            content.insert(0, {"type": "thinking", "thinking": "hm", "signature": "x"})
        reason = {"end": "end_turn", "length": "max_tokens", "refusal": "refusal", "filtered": "refusal"}[stop]
        if question.by_tool and stop == "end":
            try:
                content = [{"type": "tool_use", "id": "toolu_01", "name": "answer", "input": json.loads(text)}]
                reason = "tool_use"
            except ValueError:
                pass  # a model that answers in prose instead of calling the tool
        return {
            "id": "msg_01",
            "type": "message",
            "role": "assistant",
            "model": question.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": None,
            "usage": {
                "input_tokens": tokens_in,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
                "output_tokens": tokens(text),
                "service_tier": "standard",
            },
        }

    def error(self, status: int, kind: str, message: str) -> dict[str, Any]:
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_01"}


class _OpenAI:
    def _authorized(self, headers: Mapping[str, str], key: str) -> None:
        if key and headers.get("authorization") != f"Bearer {key}":
            given = headers.get("authorization", "").removeprefix("Bearer ")
            shown = f"{given[:8]}****{given[-4:]}"
            raise Refused(401, "invalid_request_error", f"Incorrect API key provided: {shown}.")

    def _format(self, form: Mapping[str, Any], messages: str) -> Format:
        bad = "invalid_request_error"
        if form.get("type") == "json_object":
            if "json" not in messages.lower():
                raise Refused(400, bad, "messages must contain the word 'json' in some form, to use 'json_object'.")
            return "json_object"
        if form.get("type") != "json_schema":
            raise Refused(400, bad, "Invalid value: 'response_format.type'")
        form = form.get("json_schema", form)
        if not isinstance(form.get("name"), str) or not 0 < len(form["name"]) <= 64:
            raise Refused(400, bad, "Missing required parameter: 'response_format.json_schema.name'")
        if form.get("strict"):
            _walk_closed(form.get("schema"), bad, all_required=True, root=True)
            if _enum_values(form.get("schema")) > _OPENAIS_MOST_ENUM_VALUES:
                most = f"Expected at most {_OPENAIS_MOST_ENUM_VALUES} enum values in total within a schema."
                raise Refused(400, bad, f"Invalid schema for response_format '{form['name']}': {most}")
        return "json_schema"

    def error(self, status: int, kind: str, message: str) -> dict[str, Any]:
        return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class OpenAIChatProtocol(_OpenAI):
    """POST /v1/chat/completions. ``compatible``: as the many servers that follow it do, with ``max_tokens``."""

    def __init__(self, *, compatible: bool = False) -> None:
        self._limit = "max_tokens" if compatible else "max_completion_tokens"

    def read(self, path: str, headers: Mapping[str, str], body: dict[str, Any], key: str) -> Question:
        bad = "invalid_request_error"
        if path != "/v1/chat/completions":
            raise Refused(404, bad, f"Unknown request URL: POST {path}.")
        self._authorized(headers, key)
        _known(body, {"model", "messages", "response_format", self._limit, "prompt_cache_key"}, 400, bad)
        messages = body.get("messages") or [{}]
        form = body.get("response_format")
        asked = "none" if form is None else self._format(form, json.dumps(messages))
        if messages[0].get("role") != "system":
            raise Refused(400, bad, "messages: the first has no role 'system'")
        texts = _alternating(messages[1:], bad, ("user", "assistant"))
        limit = _positive(body, self._limit, bad)
        return Question(body["model"], messages[0]["content"], texts[-1], tuple(texts[:-1]), limit, asked)

    def answer(
        self, question: Question, text: str, stop: Stop, tokens_in: int, *, in_parts: bool = False
    ) -> dict[str, Any]:
        out = tokens(text)
        refused = stop == "refusal"
        content: Any = text
        if in_parts:  # as Mistral's reasoning models do
            thought: dict[str, Any] = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
            content = [thought, *({"type": "text", "text": half} for half in _halves(text, in_parts=True))]
        return {
            "id": "chatcmpl-01",
            "object": "chat.completion",
            "created": 1_700_000_000,
            "model": question.model,
            "choices": [
                {
                    "index": 0,
                    "message": {
                        "role": "assistant",
                        "content": None if refused else content,
                        "refusal": "I cannot help with that." if refused else None,
                    },
                    "finish_reason": {"length": "length", "filtered": "content_filter"}.get(stop, "stop"),
                }
            ],
            "usage": {
                "prompt_tokens": tokens_in,
                "completion_tokens": out,
                "total_tokens": tokens_in + out,
                "prompt_tokens_details": {"cached_tokens": 0},
                "completion_tokens_details": {"reasoning_tokens": 0},
            },
        }


class OpenAIResponsesProtocol(_OpenAI):
    """POST /v1/responses."""

    def read(self, path: str, headers: Mapping[str, str], body: dict[str, Any], key: str) -> Question:
        bad = "invalid_request_error"
        if path != "/v1/responses":
            raise Refused(404, bad, f"Unknown request URL: POST {path}.")
        self._authorized(headers, key)
        known = {"model", "instructions", "input", "max_output_tokens", "text", "prompt_cache_key", "store"}
        _known(body, known, 400, bad)
        form = body.get("text", {}).get("format")
        messages = body.get("input") or [{}]
        asked = "none" if form is None else self._format(form, json.dumps(messages))  # the instructions do not count
        system = body.get("instructions", "")
        if messages[0].get("role") == "developer":
            system, messages = messages[0]["content"], messages[1:]
        texts = _alternating(messages, bad, ("user", "assistant"))
        limit = _positive(body, "max_output_tokens", bad)
        return Question(body["model"], system, texts[-1], tuple(texts[:-1]), limit, asked)

    def answer(
        self, question: Question, text: str, stop: Stop, tokens_in: int, *, in_parts: bool = False
    ) -> dict[str, Any]:
        out = tokens(text)
        halves = _halves(text, in_parts=in_parts)
        parts: list[dict[str, Any]] = [{"type": "output_text", "text": half, "annotations": []} for half in halves]
        if stop == "refusal":
            parts = [{"type": "refusal", "refusal": "I cannot help with that."}]
        cut = {"length": "max_output_tokens", "filtered": "content_filter"}.get(stop)
        return {
            "id": "resp_01",
            "object": "response",
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": cut} if cut else None,
            "error": None,
            "model": question.model,
            "output": [
                {"type": "reasoning", "id": "rs_01", "summary": []},
                {"type": "message", "id": "msg_01", "role": "assistant", "status": "completed", "content": parts},
            ],
            "usage": {
                "input_tokens": tokens_in,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": out,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": tokens_in + out,
            },
        }


class GoogleProtocol:
    """POST /v1beta/models/MODEL:generateContent."""

    def read(self, path: str, headers: Mapping[str, str], body: dict[str, Any], key: str) -> Question:
        bad = "INVALID_ARGUMENT"
        prefix, suffix = "/v1beta/models/", ":generateContent"
        if not (path.startswith(prefix) and path.endswith(suffix)):
            raise Refused(404, "NOT_FOUND", f"{path} is not found for API version v1beta")
        if headers.get("x-goog-api-key") != key:
            raise Refused(400, bad, "API key not valid. Please pass a valid API key.")
        _known(body, {"systemInstruction", "contents", "generationConfig"}, 400, bad)
        generation = body.get("generationConfig", {})
        _known(generation, {"maxOutputTokens", "responseMimeType", "responseSchema"}, 400, bad, "generation_config.")
        asked: Format = "json_object" if generation.get("responseMimeType") == "application/json" else "none"
        if "responseSchema" in generation:
            if asked == "none":
                raise Refused(400, bad, "responseSchema needs responseMimeType: application/json")
            asked = "json_schema"
            self._walk(generation["responseSchema"])
            if _enum_values(generation["responseSchema"]) > _GEMINIS_MOST_ENUM_VALUES:
                message = "The specified schema produces a constraint that has too many states for serving."
                raise Refused(400, bad, message)
        turns = [{"role": c.get("role"), "content": c["parts"][0]["text"]} for c in body.get("contents", ())]
        texts = _alternating(turns, bad, ("user", "model"))
        system = body.get("systemInstruction", {}).get("parts", [{"text": ""}])[0]["text"]
        limit = _positive(generation, "maxOutputTokens", bad)
        model = path.removeprefix(prefix).removesuffix(suffix)
        return Question(model, system, texts[-1], tuple(texts[:-1]), limit, asked)

    def _walk(self, node: Any) -> None:
        bad = "INVALID_ARGUMENT"
        allowed = {
            "type",
            "properties",
            "required",
            "propertyOrdering",
            "items",
            "enum",
            "anyOf",
            "nullable",
            "description",
        }
        _known(node, allowed, 400, bad, "response_schema.")
        if "anyOf" not in node and node.get("type") not in (
            "OBJECT",
            "ARRAY",
            "STRING",
            "INTEGER",
            "NUMBER",
            "BOOLEAN",
        ):
            raise Refused(400, bad, f"response_schema.type: {node.get('type')!r} is not a Type")
        if any(not isinstance(v, str) for v in node.get("enum", ())):
            raise Refused(400, bad, "response_schema.enum: values must be strings")
        if node.get("type") == "OBJECT":
            if not node.get("properties"):
                raise Refused(400, bad, "response_schema.properties: should be non-empty for OBJECT type")
            for child in node["properties"].values():
                self._walk(child)
        if node.get("type") == "ARRAY":
            self._walk(node.get("items", {}))
        for branch in node.get("anyOf", ()):
            self._walk(branch)

    def answer(
        self, question: Question, text: str, stop: Stop, tokens_in: int, *, in_parts: bool = False
    ) -> dict[str, Any]:
        out = tokens(text)
        usage = {"promptTokenCount": tokens_in, "candidatesTokenCount": out, "totalTokenCount": tokens_in + out}
        if stop == "refusal":
            return {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "usageMetadata": usage}
        parts: list[dict[str, Any]] = [{"text": half} for half in _halves(text, in_parts=in_parts)]
        if in_parts:
            parts.insert(0, {"text": "hm", "thought": True})
        reason = {"length": "MAX_TOKENS", "filtered": "RECITATION"}.get(stop, "STOP")
        candidate: dict[str, Any] = {"finishReason": reason, "index": 0}
        if stop != "filtered":  # such a candidate comes without content
            candidate["content"] = {"role": "model", "parts": parts}
        return {
            "candidates": [candidate],
            "usageMetadata": usage,
            "modelVersion": question.model,
            "responseId": "r01",
        }

    def error(self, status: int, kind: str, message: str) -> dict[str, Any]:
        return {"error": {"code": status, "message": message, "status": kind}}


PROTOCOLS: Mapping[str, VendorProtocol] = {
    "anthropic": AnthropicProtocol(),
    "openai": OpenAIChatProtocol(),
    "openai_responses": OpenAIResponsesProtocol(),
    "google": GoogleProtocol(),
    "openai_compatible": OpenAIChatProtocol(compatible=True),
}
