"""Vendors' wire formats, against bodies written after their public API references."""

from __future__ import annotations

import dataclasses
import json
import traceback
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from apprentice.errors import ConfigError
from apprentice.remote.answers import bare_json, fit, read
from apprentice.remote.failures import LONGEST_PAUSE_S, Failure, of_exception, of_response
from apprentice.remote.provider import Completion, Prompt, Turn, address
from apprentice.remote.teacher import make_provider
from apprentice.remote.transport import Request, Response
from apprentice.schemas.schema import SchemaError, parse_schema
from apprentice.secrets import register
from apprentice.settings.config import ProviderSettings
from apprentice.store import Usage

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
    (403, "<html>no such page", False),
    (429, {"error": {"details": 5, "message": ["x"]}}, True),
    (400, {"error": [1]}, False),
    (422, [], False),
    (301, {}, False),
]


@pytest.mark.parametrize(("status", "body", "again"), ERRORS)
def test_error_bodies(status: int, body: Any, again: bool) -> None:
    """Each vendor's errors are told apart: worth another try or not, and never on the bill."""
    response = httpx.Response(status, json=body) if body is not None else httpx.Response(status, text="<html>oops")
    failure = of_response(received(response), 0.0)
    assert (failure.status, failure.again, failure.billed) == (status, again, False)
    assert failure.message


@pytest.mark.parametrize("status", [408, 502, 504, 520, 524])
def test_a_gateway_that_gave_up_may_have_been_billed(status: int) -> None:
    """It says that the vendor was asked and did not finish in time, as a time-out of our own does."""
    failure = of_response(received(httpx.Response(status, text="<html>Gateway time-out")), 0.0)
    assert (failure.status, failure.again, failure.billed) == (status, True, True)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"error":' * 50_000, b"\xff\xfe", b"", b'"\\ud800"', b"1" * 5_000]
)
@pytest.mark.parametrize("status", [200, 400, 429, 500])
@pytest.mark.parametrize("vendor", ["anthropic", "openai", "google"])
def test_bodies_that_break_parsers(vendor: str, status: int, content: bytes) -> None:
    """Nesting, bytes and numbers that JSON's parser refuses in one way or another are a failure like any other."""
    failure = read(provider(vendor), Response(status, content), 0.0)
    assert isinstance(failure, Failure)
    assert failure.message
    assert failure.billed is (status == 200)


INSIDE_200 = [
    ("openai", {"error": {"message": "Rate limit exceeded: free-models-per-day", "code": 429}}, 429, True),
    ("openai", {"error": {"message": "Provider returned error", "code": "502"}, "usage": None}, 502, True),
    ("openai", {"error": "model not loaded"}, None, True),
    ("openai", {"error": {"message": "No", "code": "invalid_api_key"}}, 401, False),
    ("openai", {"error": {"message": "No", "type": "insufficient_quota"}}, 429, False),
    ("openai", {"choices": [{"error": {"message": "overloaded", "code": 503}, "finish_reason": "error"}]}, 503, True),
    ("openai", {"choices": [{"message": {"content": "{}"}, "finish_reason": "error"}]}, None, True),
    ("anthropic", {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, 529, True),
    ("anthropic", {"type": "error", "error": {"type": "rate_limit_error", "message": "slow down"}}, 429, True),
    ("google", {"error": {"code": 403, "message": "denied", "status": "PERMISSION_DENIED"}}, 403, False),
    ("google", {"error": {"message": "later", "status": "RESOURCE_EXHAUSTED"}}, 429, True),
    (
        "responses",
        {"status": "failed", "error": {"code": "server_error", "message": "an error"}, "output": []},
        500,
        True,
    ),
    ("responses", {"status": "failed", "error": {"code": "rate_limit_exceeded", "message": "slow"}}, 429, True),
    ("responses", {"status": "cancelled", "error": None, "output": []}, None, True),
]


@pytest.mark.parametrize(("vendor", "body", "status", "again"), INSIDE_200)
def test_errors_inside_a_200(vendor: str, body: dict[str, Any], status: int | None, again: bool) -> None:
    """They are error responses with their own code and the vendor's words, and nothing was billed before a gateway."""
    of = provider("openai", api="responses") if vendor == "responses" else provider(vendor)
    failure = read(of, received(httpx.Response(200, json=body)), 0.0)
    assert isinstance(failure, Failure)
    assert (failure.status, failure.again, failure.billed) == (status, again, status == 502)
    assert failure.throttled is (status in (429, 529) and again)
    said = body.get("error") or body.get("choices", [{}])[0].get("error") or {}
    assert (said if isinstance(said, str) else said.get("message", "")) in failure.message


def test_what_a_gateways_vendor_said_is_told() -> None:
    """OpenRouter's own words say nothing; those of whom it asked stand beside them."""
    error = {"message": "Provider returned error", "code": 400, "metadata": {"raw": "schema: too many enums"}}
    failure = of_response(received(httpx.Response(400, json={"error": error})), 0.0)
    assert failure.message == "Provider returned error: schema: too many enums"
    assert failure.about_format


def test_an_error_with_usage_is_on_the_bill() -> None:
    """A vendor that counts the tokens of an answer that failed bills them."""
    body = {"status": "failed", "error": {"code": "server_error", "message": "x"}, "usage": {"output_tokens": 5}}
    failure = read(provider("openai", api="responses"), received(httpx.Response(200, json=body)), 0.0)
    assert isinstance(failure, Failure)
    assert failure.billed


ABOUT_FORMAT = [
    (
        400,
        {"error": {"message": "This response_format type is unavailable now", "code": "invalid_request_error"}},
        True,
    ),
    (400, {"error": {"message": "Unsupported parameter", "param": "response_format"}}, True),
    (422, {"detail": [{"loc": ["body", "response_format", "type"], "msg": "unexpected value"}]}, True),
    (400, {"error": {"message": "Expected at most 1000 enum values in total within a schema."}}, True),
    (400, {"error": {"message": "Request contains an invalid argument.", "status": "INVALID_ARGUMENT"}}, True),
    (400, {"error": {"message": "The specified schema produces a constraint that has too many states."}}, True),
    (400, {"type": "error", "error": {"message": "output_config: Extra inputs are not permitted"}}, True),
    (400, {"error": {"message": "prompt is too long: 250000 tokens"}}, False),
    (401, {"error": {"message": "no key for response_format"}}, False),
    (429, {"error": {"message": "schema"}}, False),
    (500, {"error": {"message": "schema"}}, False),
]


@pytest.mark.parametrize(("status", "body", "about"), ABOUT_FORMAT)
def test_refusals_of_the_answers_format(status: int, body: Any, about: bool) -> None:
    """What is refused because of how the answer was asked for is told from what is refused for another reason."""
    failure = of_response(received(httpx.Response(status, json=body)), 0.0)
    assert failure.about_format is about


@pytest.mark.parametrize(
    ("headers", "body", "seconds"),
    [
        ({"retry-after": "17"}, {}, 17.0),
        ({"retry-after-ms": "250", "retry-after": "1"}, {}, 0.25),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, {}, 90.0),
        ({"retry-after": "-3"}, {}, 0.0),
        ({"retry-after": "soon"}, {}, None),
        ({"retry-after": "nan"}, {}, None),
        ({"retry-after": "inf"}, {}, LONGEST_PAUSE_S),
        ({"retry-after": "-inf"}, {}, 0.0),
        ({"retry-after": "1e400"}, {}, LONGEST_PAUSE_S),
        ({"retry-after": "86400"}, {}, LONGEST_PAUSE_S),
        ({"retry-after-ms": "1e300"}, {}, LONGEST_PAUSE_S),
        ({"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"}, {}, LONGEST_PAUSE_S),
        ({"retry-after": "Fri, 31 Dec 99999 23:59:59 GMT"}, {}, None),
        ({"retry-after": "Mon, 01 Jan 1900 00:00:00 GMT"}, {}, 0.0),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "9" * 400 + "h"}, {}, LONGEST_PAUSE_S),
        ({"anthropic-ratelimit-tokens-remaining": "0", "anthropic-ratelimit-tokens-reset": "tomorrow"}, {}, None),
        ({}, {"error": {"details": 5}}, None),
        ({}, {"error": {"details": [5, {"retryDelay": 5}, {"retryDelay": "1s"}]}}, 1.0),
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
    assert failure.after_s == (None if seconds is None else pytest.approx(seconds))


def test_keys_do_not_survive_in_messages() -> None:
    """A vendor's error that quotes the key, whole or masked, is cleaned of it."""
    register(KEY)
    for quoted in (KEY, "sk-proj-********************wxyz"):
        body = {"error": {"message": f"Incorrect API key provided: {quoted}.", "type": "invalid_request_error"}}
        failure = of_response(received(httpx.Response(401, json=body)), 0.0)
        assert "sk-" not in failure.message
    assert KEY not in repr(provider("anthropic")) + repr(provider("openai")) + repr(provider("google"))


@pytest.mark.parametrize("vendor", ["anthropic", "openai", "google"])
@pytest.mark.parametrize(
    "odd", ["sk-live-0123456789\n", "\u201csk-live-0123456789\u201d", "sk-live-0123456789\r", "sk\x00live-0123456789"]
)
def test_a_key_that_no_header_can_hold(vendor: str, odd: str) -> None:
    """It is refused when the provider is made, and is not in the error."""
    settings = ProviderSettings.model_validate({"provider": vendor, "model": "m", "api_key_env": "K"})
    with pytest.raises(ConfigError, match=r"the header .* HTTP does not send") as caught:
        make_provider(settings, odd)
    assert "0123456789" not in "".join(traceback.format_exception(caught.value))


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
        (httpx.DecodingError("bomb"), True),
        (httpx.ProxyError("403 Forbidden"), False),
        (httpx.LocalProtocolError("Illegal header value b'x\\n'"), False),
        (httpx.UnsupportedProtocol("ftp"), False),
        (httpx.InvalidURL("port"), False),
    ],
)
def test_what_was_sent_may_be_billed(error: Exception, billed: bool) -> None:
    """A request that never left is free; one whose answer never came may not be."""
    assert of_exception(error).billed is billed


@pytest.mark.parametrize(
    ("response", "says"),
    [
        (
            httpx.Response(200, content=b"<html>Sign in</html>"),
            "answered 200 with what is no JSON: '<html>Sign in</html>'",
        ),
        (httpx.Response(200, content=b""), "answered 200 with nothing; is base_url right?"),
        (httpx.Response(200, content=b"[" * 100_000), "answered 200 with what is no JSON: '[[["),
        (
            httpx.Response(302, headers={"location": "https://login.example/sso?token=t0ken-t0ken"}, content=b"Moved"),
            "it redirects to login.example/sso, which is not followed; correct base_url",
        ),
        (httpx.Response(307, headers={"location": "/v1/x"}), "it redirects to the same host/v1/x"),
        (httpx.Response(302, headers={"location": "http://h:port/"}, content=b"Moved"), "Moved"),
        (httpx.Response(302), "Found"),
        (httpx.Response(404, headers={"location": "/x"}), "Not Found"),
        (httpx.Response(499), "an error without a text"),
    ],
)
def test_a_page_in_the_place_of_an_api_points_to_the_address(response: httpx.Response, says: str) -> None:
    """A proxy's sign-in page, a server's front page: what came is quoted, and where to look is said."""
    failure = read(provider("anthropic"), received(response), 0.0)
    assert isinstance(failure, Failure)
    assert says in failure.message
    assert len(failure.message) < 400
    assert "t0ken" not in failure.message


def test_who_cannot_be_reached_is_named() -> None:
    """There may be several vendors, and a proxy between."""
    error = httpx.ConnectError("refused", request=httpx.Request("POST", "https://me:pass@api.example/v1?key=abc"))
    assert of_exception(error).message == "cannot reach api.example (ConnectError: refused)"


@pytest.mark.parametrize(
    "error", [httpx.LocalProtocolError(f"Illegal header value b'Bearer {KEY}\\n'"), httpx.UnsupportedProtocol("ftp")]
)
def test_a_request_that_is_wrong_here_is_not_tried_again(error: Exception) -> None:
    """A header or a URL that cannot be sent would not be sent the next time either; the key in it is not shown."""
    register(KEY)
    failure = of_exception(error)
    assert not failure.again
    assert KEY not in failure.message


OBJECT = '{"label":"a"}'


@pytest.mark.parametrize(
    "text",
    [
        OBJECT,
        f"\n {OBJECT} \n",
        f"<think>\nthe user is happy: {{}}\n</think>\n\n{OBJECT}",
        f"the block was opened by the template\n</think>{OBJECT}",
        f"```json\n{OBJECT}\n```",
        f"```\r\n{OBJECT}```\n",
        f"<think></think>\n```JSON\n{OBJECT}\n```",
    ],
)
def test_thoughts_and_one_fence_are_taken_off(text: str) -> None:
    """Reasoning models think aloud before the answer, and many models fence it."""
    assert bare_json(text) == OBJECT


@pytest.mark.parametrize(
    "text",
    [
        f"Here it is: {OBJECT}",
        f"```json\n{OBJECT}\n```\nHope this helps!",
        f"`{OBJECT}`",
        f"```python\n{OBJECT}\n```",
        "a",
    ],
)
def test_nothing_else_is_guessed(text: str) -> None:
    """Where an answer stands in prose, it is the repair's to get it out."""
    assert bare_json(text) == text


def test_an_answer_keeps_what_looks_like_markup_inside_it() -> None:
    """Tags and fences in a field's text are the field's."""
    text = '{"label":"a","note":"</think> ```json x```"}'
    assert bare_json(text) == text


@pytest.mark.parametrize(
    ("completion", "says"),
    [
        (Completion("", None), "answer: is empty."),
        (Completion(" \n", None, "end", "OTHER"), r"is empty \(it stopped with OTHER\)"),
        (
            Completion('{"lab', None, "length", "MAX_TOKENS"),
            r"cut off at 256 tokens \(it stopped with MAX_TOKENS\).*not JSON",
        ),
        (Completion("no", None), "is not JSON"),
        (Completion("[" * 100_000, None), "answer"),
        (Completion('{"label":' * 2_000 + "1" + "}" * 2_000, None), "."),
        (Completion("NaN", None), "."),
        (Completion("9" * 5_000, None), "."),
        (Completion('{"label":"c"}', None), "label"),
        (Completion('{"label":null}', None), "label"),
    ],
)
def test_what_does_not_fit_is_said(completion: Completion, says: str) -> None:
    """Empty, cut off, too deep, no JSON, no value of the schema: each is a list of problems, no other exception."""
    schema = parse_schema({"label": ["a", "b"], "note": "str?"})
    with pytest.raises(SchemaError, match=says):
        fit(completion, schema, 256, "t")


class Stars(BaseModel):
    count: int = 3


class Review(BaseModel):
    label: str
    note: str = ""
    maybe: str | None = None
    stars: Stars = Stars()


@pytest.mark.parametrize(
    "source",
    [
        Review,
        {
            "type": "object",
            "properties": {
                "label": {"type": "string"},
                "note": {"type": "string"},
                "maybe": {"type": ["string", "null"]},
                "stars": {"type": "object", "properties": {"count": {"type": "integer"}}},
            },
            "required": ["label"],
        },
    ],
)
def test_a_null_that_means_left_out_is_left_out(source: Any) -> None:
    """OpenAI writes null for a field that is left out; where the author's schema takes null it may mean something."""
    text = '{"label":"a","note":null,"maybe":null,"stars":{"count":null}}'
    output = fit(Completion(text, None), parse_schema(source), 256, "t")
    assert output == {"label": "a", "maybe": None, "stars": {}}
    with pytest.raises(SchemaError, match="label"):
        fit(Completion('{"label":null,"note":null}', None), parse_schema(source), 256, "t")


@pytest.mark.parametrize(
    ("vendor", "body", "text"),
    [
        (
            "openai",
            {
                "content": [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                    {"type": "text", "text": OBJECT},
                ]
            },
            OBJECT,
        ),
        ("openai", {"content": [{"type": "text", "text": '{"label"'}, {"type": "text", "text": ':"a"}'}]}, OBJECT),
        ("openai", {"content": None}, ""),
        ("openai", {"content": []}, ""),
    ],
)
def test_content_in_parts_is_joined(vendor: str, body: dict[str, Any], text: str) -> None:
    """Some servers answer in a list of parts; what the model thought aloud is no part of the answer."""
    answer = {"choices": [{"index": 0, "message": {"role": "assistant", **body}, "finish_reason": "stop"}]}
    completion = read(provider(vendor), received(httpx.Response(200, json=answer)), 0.0)
    assert isinstance(completion, Completion)
    assert (completion.text, completion.stop, completion.reason) == (text, "end", "")


def test_a_tools_input_may_be_text() -> None:
    """Older models and proxies hand in the JSON's text in the place of the object."""
    tool = {"type": "tool_use", "id": "t", "name": "answer", "input": '{"label": "a"}'}
    body = {"type": "message", "role": "assistant", "content": [tool], "stop_reason": "tool_use", "usage": {}}
    assert provider("anthropic").parse(body).text == '{"label": "a"}'


STOPS = [
    (
        "openai",
        {"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]},
        "refusal",
        "content_filter",
    ),
    (
        "openai",
        {"choices": [{"message": {"content": None, "refusal": "No."}, "finish_reason": "stop"}]},
        "refusal",
        "refusal",
    ),
    ("openai", {"choices": [{"message": {"content": "{"}, "finish_reason": "length"}]}, "length", "length"),
    ("google", {"candidates": [{"finishReason": "RECITATION"}]}, "refusal", "RECITATION"),
    ("google", {"candidates": [{"content": {"parts": []}, "finishReason": "SAFETY"}]}, "refusal", "SAFETY"),
    ("google", {"promptFeedback": {"blockReason": "BLOCKLIST"}}, "refusal", "BLOCKLIST"),
    ("google", {"candidates": [{"finishReason": "MAX_TOKENS"}]}, "length", "MAX_TOKENS"),
    ("google", {"candidates": [{"finishReason": "MALFORMED_FUNCTION_CALL"}]}, "end", "MALFORMED_FUNCTION_CALL"),
    ("anthropic", {"type": "message", "content": [], "stop_reason": "refusal"}, "refusal", "refusal"),
    ("anthropic", {"type": "message", "content": [], "stop_reason": "max_tokens"}, "length", "max_tokens"),
    ("anthropic", {"type": "message", "content": [], "stop_reason": "pause_turn"}, "end", "pause_turn"),
    (
        "responses",
        {"status": "incomplete", "output": [], "incomplete_details": {"reason": "content_filter"}},
        "refusal",
        "content_filter",
    ),
    ("responses", {"status": "incomplete", "output": []}, "length", "incomplete"),
]


@pytest.mark.parametrize(("vendor", "body", "stop", "reason"), STOPS)
def test_why_an_answer_ended(vendor: str, body: dict[str, Any], stop: str, reason: str) -> None:
    """The vendor's own word is kept for whoever reads the error."""
    of = provider("openai", api="responses") if vendor == "responses" else provider(vendor)
    completion = of.parse(body)
    assert (completion.stop, completion.reason) == (stop, reason)


ABSURD = [-1, -10_000_000, 10**30, 10**400, 1.5, "50", [50], {"n": 1}, True, float("nan"), float("inf")]


@pytest.mark.parametrize("absurd", [None, *ABSURD])
@pytest.mark.parametrize("name", ["prompt_tokens", "completion_tokens"])
def test_counts_that_nobody_can_count_are_not_said(name: str, absurd: Any) -> None:
    """A vendor's usage is foreign input: what is missing or implausible counts as not said, and the answer is kept."""
    usage = {"prompt_tokens": 50, "completion_tokens": 10, name: absurd}
    answer = {"choices": [{"message": {"content": OBJECT}, "finish_reason": "stop"}], "usage": usage}
    completion = read(provider("openai"), Response(200, json.dumps(answer).encode()), 0.0)
    assert isinstance(completion, Completion)
    assert (completion.text, completion.usage) == (OBJECT, None)


@pytest.mark.parametrize("absurd", ABSURD)
def test_absurd_parts_of_usage(absurd: Any) -> None:
    """Cached and reasoning tokens are parts of the whole, for every vendor."""
    for vendor, body in (
        ("openai", {"choices": [{"message": {"content": OBJECT}}], "usage": {
            "prompt_tokens": 50, "completion_tokens": 10, "prompt_tokens_details": {"cached_tokens": absurd}}}),
        ("anthropic", {"type": "message", "content": [{"type": "text", "text": OBJECT}], "usage": {
            "input_tokens": 50, "output_tokens": 10, "cache_read_input_tokens": absurd}}),
        ("google", {"candidates": [{"content": {"parts": [{"text": OBJECT}]}}], "usageMetadata": {
            "promptTokenCount": 50, "candidatesTokenCount": 10, "thoughtsTokenCount": absurd}}),
    ):  # fmt: skip
        completion = read(provider(vendor), Response(200, json.dumps(body).encode()), 0.0)
        assert isinstance(completion, Completion)
        assert completion.text == OBJECT
        assert completion.usage is None or all(count >= 0 for count in dataclasses.astuple(completion.usage))


def test_whole_floats_are_counts_and_zero_for_an_answer_is_none() -> None:
    """200.0 is 200; an answer of no tokens at all was not counted."""

    def usage(read_tokens: Any, written: Any) -> Any:
        answer = {
            "choices": [{"message": {"content": OBJECT}}],
            "usage": {"prompt_tokens": read_tokens, "completion_tokens": written},
        }
        completion = read(provider("openai"), Response(200, json.dumps(answer).encode()), 0.0)
        assert isinstance(completion, Completion)
        return completion.usage

    assert usage(200.0, 10) == Usage(input=200, output=10)
    assert usage(0, 0) is None
    assert usage(50, 0) is None


def test_a_base_url_may_have_a_query() -> None:
    """The path goes before it."""
    assert address("https://x.example/openai/v1/?api-version=preview", "/chat/completions") == (
        "https://x.example/openai/v1/chat/completions?api-version=preview"
    )
    for vendor in ("anthropic", "openai", "google"):
        request = provider(vendor, base_url="http://gateway.example/v1?team=a%20b").build(PROMPT, "hello")
        assert request.endpoint.url.query == b"team=a%20b"
        assert request.endpoint.url.path.startswith("/v1/")


@pytest.mark.parametrize("vendor", ["anthropic", "openai", "openai_compatible", "responses", "google"])
def test_an_empty_answer_is_shown_as_such(vendor: str) -> None:
    """A turn of the model without a text is refused by strict servers, so its repair says that there was none."""
    more = {"base_url": "http://x/v1"} if vendor == "openai_compatible" else {}
    of = provider("openai", api="responses") if vendor == "responses" else provider(vendor, **more)
    body = of.build(PROMPT, "hello", [Turn(" \n", "is empty")]).content.decode()
    assert "(no answer)" in body


@pytest.mark.parametrize("asked", ["json_object", "none"])
@pytest.mark.parametrize("vendor", ["anthropic", "openai", "openai_compatible", "responses", "google"])
def test_weaker_formats(vendor: str, asked: Any) -> None:
    """Without the vendor's enforcement the request holds no schema of its own, and the model is told it in words."""
    more = {"base_url": "http://x/v1"} if vendor == "openai_compatible" else {}
    of = provider("openai", api="responses") if vendor == "responses" else provider(vendor, **more)
    body = sent(of.build(dataclasses.replace(PROMPT, format=asked), "hello"))
    text = json.dumps(body)
    assert "json_schema" not in text
    assert "responseSchema" not in text
    assert "output_config" not in text
    assert ("json_object" in text or "application/json" in text or "tool" in text) is (asked == "json_object")
    assert body.get("tools") or "The JSON Schema of the answer" in text
