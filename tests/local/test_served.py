"""What engines behind a server share: bulk work that steps back for callers."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.errors import EngineRefused, EngineUnavailable, LocalError, OutputError, VersionError
from apprentice.local.engine import LocalAnswer
from apprentice.local.engines import llama_cpp, vllm
from apprentice.local.served import Courtesy, post


def test_bulk_work_steps_back_while_somebody_waits() -> None:
    """Alone it sends as many as the server takes; beside callers a sixteenth; and it ends either way."""
    courtesy, counting = Courtesy(32), threading.Lock()
    now, most = 0, 0

    def ask(value: Mapping[str, Any]) -> LocalAnswer:
        nonlocal now, most
        with counting:
            now += 1
            most = max(most, now)
        time.sleep(0.01)
        with counting:
            now -= 1
        if value["n"] == 7:
            raise EngineUnavailable("down")
        return LocalAnswer({"n": value["n"]}, 1.0, {}, "v", 1, 1)

    values = [{"n": n} for n in range(64)]
    answers = courtesy.ask_all(ask, values)
    assert most > 8
    assert [a.output["n"] for a in answers if isinstance(a, LocalAnswer)] == [n for n in range(64) if n != 7]
    assert isinstance(answers[7], EngineUnavailable)
    most = 0
    with courtesy.caller():
        assert len(courtesy.ask_all(ask, values)) == 64
    assert most == 2


def server(status: int, content: str | bytes) -> httpx.Client:
    """A client of a server that always says the same."""
    return httpx.Client(
        base_url="http://gpu:8000", transport=httpx.MockTransport(lambda _: httpx.Response(status, content=content))
    )


@pytest.mark.parametrize(
    ("status", "content", "error", "message"),
    [
        (400, '{"message": "maximum context length is 512 tokens"}', OutputError, "task 'mood'.*too long"),
        (413, "", OutputError, "too long"),
        (400, '{"type": "exceed_context_size_error"}', OutputError, "too long"),
        (400, '{"error": "the input length exceeds the context length"}', OutputError, "too long"),
        (400, '{"message": "grammar is not supported"}', EngineRefused, "400: .*grammar is not supported"),
        (422, '{"detail": "unknown field"}', EngineRefused, "unknown field"),
        (401, '{"error": "Unauthorized"}', EngineRefused, "wants a key"),
        (403, "<html>proxy</html>", EngineRefused, "403"),
        (404, '{"detail": "Not Found"}', EngineRefused, "has no /ask .*is local.url right"),
        (404, '{"message": "The model `v1` does not exist."}', VersionError, "loaded again"),
        (404, """{"error": "model 'v1' not found"}""", VersionError, "loaded again"),
        (429, "", EngineUnavailable, "429"),
        (500, "out of memory", EngineUnavailable, "500: out of memory"),
        (503, "Loading model", EngineUnavailable, "503"),
        (200, "<html>", EngineUnavailable, "is not JSON"),
        (200, "[" * 100_000, EngineUnavailable, "is not JSON"),
        (200, b"\xff\xfe\xff", EngineUnavailable, "is not JSON"),
    ],
)
def test_what_a_server_says_is_told_apart(
    status: int, content: str | bytes, error: type[Exception], message: str
) -> None:
    """Only an input that is too long is about the answer; a wrong key or address is neither that nor an outage."""
    with server(status, content) as client, pytest.raises(error, match=message) as raised:
        post(client, "vLLM", "/ask", {}, time.monotonic() + 5, task="mood")
    assert type(raised.value) is error
    assert "mozilla" not in str(raised.value)


@given(status=st.integers(100, 599), content=st.binary(max_size=200))
def test_no_answer_of_a_server_raises_anything_else(status: int, content: bytes) -> None:
    """Whatever stands at that address."""
    with server(status, content) as client, contextlib.suppress(LocalError, OutputError):
        post(client, "vLLM", "/ask", {}, time.monotonic() + 5)


@pytest.mark.parametrize(
    "text", ["<｜end▁of▁sentence｜>", "<|im_end|>", "</s>", "<EOS_TOKEN>", "[INST]", "[/INST]", "[gMASK]"]
)
def test_no_piece_of_a_request_spells_a_special_token(text: str) -> None:
    """A server that reads special tokens gets them in two, and the text is the same."""
    asked: list[str] = []

    def tokenise(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content)["prompt"])
        return httpx.Response(200, json={"tokens": [1]})

    with httpx.Client(base_url="http://gpu", transport=httpx.MockTransport(tokenise)) as client:
        vllm._Completer(client, "v1", "mood").encode(f"a {text} b", time.monotonic() + 5)
    assert "".join(asked) == f"a {text} b"
    assert not any(text in piece for piece in asked)


@pytest.mark.parametrize("module", [vllm, llama_cpp])
def test_a_requests_text_is_not_kept(module: Any) -> None:
    """The pieces of the skeleton are remembered, the user's words are not."""
    reply = httpx.MockTransport(lambda _: httpx.Response(200, json={"tokens": [1]}))
    with httpx.Client(base_url="http://gpu", transport=reply) as client:
        completer = module._Completer(client, "v1", "mood")
        for n in range(10):
            completer.encode(f"the user's words {n}", time.monotonic() + 5)
            completer.pieces('{"label":"', time.monotonic() + 5)
        assert set(completer.pieces._known) == {'{"label":"'}


@pytest.mark.parametrize("module", [vllm, llama_cpp])
def test_every_question_of_an_answer_ends_with_its_deadline(module: Any) -> None:
    """Also tokenising, which is quick unless the server hangs."""
    allowed: list[float] = []

    def reply(request: httpx.Request) -> httpx.Response:
        allowed.append(request.extensions["timeout"]["read"])
        return httpx.Response(200, json={"tokens": [1]})

    with httpx.Client(base_url="http://gpu", transport=httpx.MockTransport(reply)) as client:
        completer = module._Completer(client, "v1", "mood")
        completer.encode("hello", time.monotonic() + 0.5)
        completer.pieces('{"', time.monotonic() + 0.5)
        with pytest.raises(EngineUnavailable, match="in time"):
            completer.encode("hello", time.monotonic())
    assert len(allowed) == 2
    assert max(allowed) <= 0.5
