"""Vendors' wire formats, against bodies written after their public API references."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from apprentice.config import ProviderSettings
from apprentice.remote.failures import of_exception, of_response
from apprentice.remote.provider import Prompt, Turn
from apprentice.remote.teacher import make_provider
from apprentice.schema import parse_schema
from apprentice.store import Usage
from apprentice.transport import Request, Response

KEY = "sk-ant-REDACTED"
SCHEMA = parse_schema({"label": ["a", "b"], "note": "str?"}).json_schema
PROMPT = Prompt("t", "Classify.", SCHEMA, 256)
FREE = Prompt("t", "Extract.", parse_schema({"data": "dict"}).json_schema, 256)


def provider(vendor: str, model: str = "m", **more: Any) -> Any:
    settings = ProviderSettings.model_validate({"provider": vendor, "model": model, "api_key_env": "K", **more})
    return make_provider(settings, KEY)


def sent(request: Request) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(request.content)
    return body


def headers(request: Request) -> httpx.Headers:
    return httpx.Headers(request.endpoint.headers)


def received(response: httpx.Response) -> Response:
    return Response(response.status_code, response.content, response.headers.raw)


def test_anthropic_asks_for_structured_output() -> None:
    """Endpoint, headers, cached system prompt, and the closed schema under output_config.format."""
    request = provider("anthropic", "claude-sonnet-4-5").build(PROMPT, "hello")
    assert str(request.endpoint.url) == "https://api.anthropic.com/v1/messages"
    assert (headers(request)["x-api-key"], headers(request)["anthropic-version"]) == (KEY, "2023-06-01")
    body = sent(request)
    assert body["system"] == [{"type": "text", "text": "Classify.", "cache_control": {"type": "ephemeral"}}]
    assert body["messages"] == [{"role": "user", "content": "hello"}]
    assert body["max_tokens"] == 256
    schema = body["output_config"]["format"]["schema"]
    assert (schema["additionalProperties"], schema["required"]) == (False, ["label"])


@pytest.mark.parametrize(
    ("model", "choice"),
    [
        ("claude-3-5-sonnet-20241022", {"type": "tool", "name": "answer"}),
        ("claude-sonnet-4-20250514", {"type": "tool", "name": "answer"}),
        ("claude-opus-4-0", {"type": "tool", "name": "answer"}),
    ],
)
def test_anthropics_older_models_get_a_forced_tool(model: str, choice: dict[str, str]) -> None:
    """Models without output_config hand the answer in by a forced tool call."""
    body = sent(provider("anthropic", model).build(PROMPT, "hello"))
    assert body["tool_choice"] == choice
    assert body["tools"][0]["input_schema"] == SCHEMA
    assert "output_config" not in body


@pytest.mark.parametrize("model", ["claude-opus-4-1", "claude-haiku-4-5", "claude-opus-5"])
def test_anthropic_offers_a_tool_for_free_form_schemas(model: str) -> None:
    """What output_config cannot express is an offered tool: models that think refuse a forced one."""
    body = sent(provider("anthropic", model).build(FREE, "hello"))
    assert body["tool_choice"] == {"type": "auto"}
    assert "output_config" not in body


def test_anthropic_reads_messages() -> None:
    """Text blocks, a tool's input, usage with caching and thinking, and the stop reasons."""
    anthropic = provider("anthropic", "claude-sonnet-4-5")
    body = {
        "id": "msg_013Zva2CMHLNnXjNJJKqJ2EF",
        "type": "message",
        "role": "assistant",
        "model": "claude-sonnet-4-5",
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": "x"},
            {"type": "text", "text": '{"label":"a"}'},
        ],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 21,
            "cache_creation_input_tokens": 188,
            "cache_read_input_tokens": 1111,
            "output_tokens": 50,
            "output_tokens_details": {"thinking_tokens": 30},
            "service_tier": "standard",
        },
    }
    completion = anthropic.parse(body)
    assert (completion.text, completion.stop) == ('{"label":"a"}', "end")
    assert completion.usage == Usage(input=1320, output=50, cached=1111, cache_write=188, reasoning=30)
    tool = {"type": "tool_use", "id": "toolu_1", "name": "answer", "input": {"data": {"x": 1}}}
    assert anthropic.parse({**body, "content": [tool], "stop_reason": "tool_use"}).text == '{"data":{"x":1}}'
    assert anthropic.parse({**body, "stop_reason": "max_tokens"}).stop == "length"
    assert anthropic.parse({**body, "stop_reason": "refusal", "content": []}).stop == "refusal"
    assert anthropic.parse({**body, "usage": None}).usage is None


def test_openai_chat_asks_strictly() -> None:
    """Bearer key, strict json_schema with every field required, and a cache key."""
    request = provider("openai", "gpt-4o-mini").build(PROMPT, "hello", [Turn("bad", "wrong")])
    assert str(request.endpoint.url) == "https://api.openai.com/v1/chat/completions"
    assert headers(request)["authorization"] == f"Bearer {KEY}"
    body = sent(request)
    assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant", "user"]
    assert (body["max_completion_tokens"], body["prompt_cache_key"]) == (256, "t")
    form = body["response_format"]["json_schema"]
    assert (form["strict"], form["schema"]["required"]) == (True, ["label", "note"])
    assert {"type": "null"} in form["schema"]["properties"]["note"]["anyOf"]
    free = sent(provider("openai").build(FREE, "hello"))["response_format"]["json_schema"]
    assert (free["strict"], free["schema"]) == (False, FREE.schema)


def test_openai_chat_reads_completions() -> None:
    """Content, refusals, cut-off answers, cached and reasoning tokens."""
    body = {
        "id": "chatcmpl-B9MHDbslfkBeAs8l4bebGdFOJ6PeG",
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": '{"label":"a","note":null}', "refusal": None},
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 1117,
            "completion_tokens": 46,
            "total_tokens": 1163,
            "prompt_tokens_details": {"cached_tokens": 1024, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 20},
        },
    }
    chat = provider("openai")
    completion = chat.parse(body)
    assert completion.text == '{"label":"a","note":null}'
    assert completion.usage == Usage(input=1117, output=46, cached=1024, reasoning=20)
    cut = json.loads(json.dumps(body).replace('"finish_reason": "stop"', '"finish_reason": "length"'))
    assert chat.parse(cut).stop == "length"
    declined = json.loads(json.dumps(body).replace('"refusal": null', '"refusal": "No."'))
    assert chat.parse(declined).stop == "refusal"


def test_openai_responses() -> None:
    """The newer API: instructions, text.format, nothing stored; output items and usage read back."""
    responses = provider("openai", "gpt-5-mini", api="responses")
    request = responses.build(PROMPT, "hello")
    assert str(request.endpoint.url) == "https://api.openai.com/v1/responses"
    body = sent(request)
    assert (body["instructions"], body["store"], body["max_output_tokens"]) == ("Classify.", False, 256)
    assert (body["text"]["format"]["type"], body["text"]["format"]["strict"]) == ("json_schema", True)
    answer = {
        "id": "resp_67ccd2bed1ec8190b14f964abc054267",
        "object": "response",
        "status": "completed",
        "incomplete_details": None,
        "output": [
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "{}", "annotations": []}],
            },
        ],
        "usage": {
            "input_tokens": 36,
            "input_tokens_details": {"cached_tokens": 10},
            "output_tokens": 87,
            "output_tokens_details": {"reasoning_tokens": 64},
            "total_tokens": 123,
        },
    }
    assert responses.parse(answer).usage == Usage(input=36, output=87, cached=10, reasoning=64)
    cut = {**answer, "status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    assert responses.parse(cut).stop == "length"
    refusal = {"type": "message", "content": [{"type": "refusal", "refusal": "No."}]}
    assert responses.parse({**answer, "output": [refusal]}).stop == "refusal"


def test_openai_compatible_servers() -> None:
    """Another base URL, the older name of the limit, no cache key, and no header where there is no key."""
    settings = ProviderSettings(provider="openai_compatible", model="qwen", base_url="http://localhost:8000/v1/")
    request = make_provider(settings, "").build(PROMPT, "hello")
    assert str(request.endpoint.url) == "http://localhost:8000/v1/chat/completions"
    assert "authorization" not in headers(request)
    assert sent(request)["max_tokens"] == 256
    assert "prompt_cache_key" not in sent(request)
    azure = provider("openai_compatible", base_url="https://me.openai.azure.com/openai/v1").build(PROMPT, "x")
    assert (headers(azure)["api-key"], sent(azure)["max_completion_tokens"]) == (KEY, 256)


def test_google() -> None:
    """Key in a header, OpenAPI schema with an order, system instruction; thoughts count as output."""
    gemini = provider("google", "gemini-2.5-flash")
    request = gemini.build(PROMPT, "hello", [Turn("bad", "wrong")])
    assert request.endpoint.url.path == "/v1beta/models/gemini-2.5-flash:generateContent"
    assert request.endpoint.url.query == b""
    assert headers(request)["x-goog-api-key"] == KEY
    body = sent(request)
    assert [c["role"] for c in body["contents"]] == ["user", "model", "user"]
    schema = body["generationConfig"]["responseSchema"]
    assert (schema["type"], schema["propertyOrdering"], schema["required"]) == ("OBJECT", ["label", "note"], ["label"])
    assert schema["properties"]["note"] == {"type": "STRING", "nullable": True}
    free = sent(gemini.build(FREE, "x"))
    assert "responseSchema" not in free["generationConfig"]
    assert '"data"' in free["systemInstruction"]["parts"][0]["text"]
    answer = {
        "candidates": [
            {
                "content": {"role": "model", "parts": [{"text": "hm", "thought": True}, {"text": '{"label":"a"}'}]},
                "finishReason": "STOP",
                "index": 0,
            }
        ],
        "usageMetadata": {
            "promptTokenCount": 300,
            "cachedContentTokenCount": 100,
            "candidatesTokenCount": 8,
            "thoughtsTokenCount": 40,
            "totalTokenCount": 348,
        },
        "modelVersion": "gemini-2.5-flash",
    }
    completion = gemini.parse(answer)
    assert completion.text == '{"label":"a"}'
    assert completion.usage == Usage(input=300, output=48, cached=100, reasoning=40)
    blocked = {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 3}}
    assert gemini.parse(blocked).stop == "refusal"
    assert gemini.parse({"candidates": [{"finishReason": "MAX_TOKENS"}]}).stop == "length"


ERRORS = [
    (401, {"type": "error", "error": {"type": "authentication_error", "message": "invalid x-api-key"}}, False),
    (400, {"type": "error", "error": {"type": "invalid_request_error", "message": "max_tokens: required"}}, False),
    (404, {"type": "error", "error": {"type": "not_found_error", "message": "model: claude-9"}}, False),
    (429, {"type": "error", "error": {"type": "rate_limit_error", "message": "slow down"}}, True),
    (529, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, True),
    (429, {"error": {"message": "Rate limit reached", "type": "tokens", "code": "rate_limit_exceeded"}}, True),
    (
        429,
        {"error": {"message": "You exceeded your quota", "type": "insufficient_quota", "code": "insufficient_quota"}},
        False,
    ),
    (503, {"error": {"code": 503, "message": "The model is overloaded.", "status": "UNAVAILABLE"}}, True),
    (403, [{"error": {"code": 403, "message": "denied", "status": "PERMISSION_DENIED"}}], False),
    (500, None, True),
]


@pytest.mark.parametrize(("status", "body", "again"), ERRORS)
def test_error_bodies(status: int, body: Any, again: bool) -> None:
    """Each vendor's errors are told apart: worth another try or not, and never on the bill."""
    response = httpx.Response(status, json=body) if body is not None else httpx.Response(status, text="<html>oops")
    failure = of_response(received(response), 0.0)
    assert failure is not None
    assert (failure.status, failure.again, failure.billed) == (status, again, False)
    assert failure.message


@pytest.mark.parametrize(
    ("headers", "body", "seconds"),
    [
        ({"retry-after": "17"}, {}, 17.0),
        ({"retry-after-ms": "250", "retry-after": "1"}, {}, 0.25),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, {}, 90.0),
        ({"retry-after": "-3"}, {}, 0.0),
        ({"retry-after": "soon"}, {}, None),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6m0s"}, {}, 360.0),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "120ms"}, {}, 0.12),
        ({"x-ratelimit-remaining-requests": "5", "x-ratelimit-reset-requests": "120ms"}, {}, None),
        (
            {"anthropic-ratelimit-tokens-remaining": "0", "anthropic-ratelimit-tokens-reset": "1970-01-01T00:00:30Z"},
            {},
            20.0,
        ),
        (
            {},
            {"error": {"details": [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "39s"}]}},
            39.0,
        ),
        ({}, {}, None),
    ],
)
def test_when_to_come_back(headers: dict[str, str], body: Any, seconds: float | None) -> None:
    """Every vendor's way of saying when to try again is understood; ten seconds into 1970."""
    failure = of_response(received(httpx.Response(429, headers=headers, json=body)), 10.0)
    assert failure is not None
    assert failure.after_s == (None if seconds is None else pytest.approx(seconds))


def test_keys_do_not_survive_in_messages() -> None:
    """A vendor's error that quotes the key, whole or masked, is cleaned of it."""
    for quoted in (KEY, "sk-proj-********************wxyz"):
        body = {"error": {"message": f"Incorrect API key provided: {quoted}.", "type": "invalid_request_error"}}
        failure = of_response(received(httpx.Response(401, json=body)), 0.0, KEY)
        assert failure is not None
        assert "sk-" not in failure.message
    assert KEY not in repr(provider("anthropic")) + repr(provider("openai")) + repr(provider("google"))


@pytest.mark.parametrize(
    ("error", "billed"),
    [
        (httpx.ConnectError("refused"), False),
        (httpx.ConnectTimeout("slow"), False),
        (httpx.PoolTimeout("full"), False),
        (httpx.ReadTimeout("slow"), True),
        (httpx.ReadError("reset"), True),
        (httpx.WriteError("reset"), True),
        (httpx.RemoteProtocolError("half"), True),
    ],
)
def test_what_was_sent_may_be_billed(error: httpx.HTTPError, billed: bool) -> None:
    """A request that never left is free; one whose answer never came may not be."""
    assert of_exception(error).billed is billed
