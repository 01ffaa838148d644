"""An Ollama server as of 0.34, for httpx's MockTransport: what its source takes and refuses (server/create.go,
server/routes.go, llm/llama_server.go).

It is strict where a lenient double would hide a mistake: adapters, files that are no GGUF, missing blobs, wrong
digests, numbers that Go would not read, models that were never created, unknown fields, and messages where raw text is
meant are all refused as the real server refuses them, or harder. What does not fit the window is cut, silently, unless
the request says ``truncate: false``.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any

import httpx

__all__ = ["FakeOllama"]

_GENERATE = {
    "model",
    "prompt",
    "raw",
    "stream",
    "format",
    "keep_alive",
    "logprobs",
    "top_logprobs",
    "options",
    "truncate",
    "shift",
}
_OPTIONS = {"temperature", "num_predict", "stop", "seed", "num_ctx", "repeat_penalty"}
_CREATE = {"model", "from", "adapters", "files", "template", "parameters", "system", "stream"}
_WHOLE = {"num_ctx", "num_predict", "seed"}
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*(/[a-z0-9][a-z0-9_.-]*)?:[A-Za-z0-9_.-]+\Z")

type Writer = Callable[[str, str], list[tuple[str, float]]]
"""Given a model's name and the raw prompt, the answer as tokens with log-probabilities."""


class FakeOllama:
    """``tags``: models it was given with pull; ``writer`` answers; ``with_logprobs=False`` is an older server.

    ``knows_truncate=False`` is an older server as well, which cuts whatever it is told; ``tokens`` counts a prompt's.
    """

    def __init__(
        self,
        writer: Writer,
        *,
        tags: tuple[str, ...] = ("base:latest",),
        with_logprobs: bool = True,
        knows_truncate: bool = True,
        tokens: Callable[[str], int] = len,
    ) -> None:
        self.writer = writer
        self.with_logprobs = with_logprobs
        self.knows_truncate = knows_truncate
        self.tokens = tokens
        self.window = 4096  # unless a request or a model says otherwise
        self.honours_num_ctx = True
        self.models: dict[str, dict[str, Any]] = {tag: {} for tag in tags}
        self.blobs: dict[str, bytes] = {}
        self.prompts: list[str] = []
        self.created: list[str] = []
        self.down = False

    def transport(self) -> httpx.MockTransport:
        """What to give an httpx client."""
        return httpx.MockTransport(self._serve)

    def _serve(self, request: httpx.Request) -> httpx.Response:
        if self.down:
            raise httpx.ConnectError("connection refused", request=request)
        path, method = request.url.path, request.method
        if path.startswith("/api/blobs/"):
            return self._blob(method, path.removeprefix("/api/blobs/"), request.content)
        routes: dict[tuple[str, str], Callable[[dict[str, Any]], httpx.Response]] = {
            ("GET", "/api/version"): lambda _: httpx.Response(200, json={"version": "0.12.11"}),
            ("GET", "/api/tags"): lambda _: httpx.Response(200, json={"models": [{"name": n} for n in self.models]}),
            ("POST", "/api/create"): self._create,
            ("POST", "/api/generate"): self._generate,
            ("DELETE", "/api/delete"): self._delete,
        }
        route = routes.get((method, path))
        if route is None:
            return httpx.Response(404, text="404 page not found")
        return route(json.loads(request.content) if request.content else {})

    def _blob(self, method: str, digest: str, content: bytes) -> httpx.Response:
        if method == "HEAD":
            return httpx.Response(200 if digest in self.blobs else 404)
        if digest != f"sha256:{hashlib.sha256(content).hexdigest()}":
            return _refuse("digest mismatch")
        self.blobs[digest] = content
        return httpx.Response(201)

    def _create(self, body: dict[str, Any]) -> httpx.Response:
        unknown = set(body) - _CREATE
        if unknown:
            return _refuse(f"invalid request: {sorted(unknown)}")
        if body.get("adapters"):
            return _refuse("LoRA adapters are no longer supported")
        if not _NAME.match(body.get("model", "")) or max(map(len, body["model"].split(":"))) > 80:
            return _refuse("invalid model name")
        for name, value in body.get("parameters", {}).items():
            if name in _WHOLE and type(value) is not int:
                return _refuse(f"option {name!r} must be of type integer")
        files: Mapping[str, str] = body.get("files", {})
        source = body.get("from", "")
        if not source and not files:
            return _refuse("neither 'from' or 'files' was specified")
        if source and (source if ":" in source else f"{source}:latest") not in self.models:
            return _refuse(f"model {source!r} not found", 404)
        for name, digest in files.items():
            if name.startswith("/") or ".." in name:
                return _refuse("file path must be relative")
            if digest not in self.blobs:
                return _refuse(f"blob not found for {name}")
            if not _is_gguf(self.blobs[digest]):
                return _refuse("supplied file was not in GGUF format")
        self.models[body["model"]] = body
        self.created.append(body["model"])
        return httpx.Response(200, json={"status": "success"})

    def _generate(self, body: dict[str, Any]) -> httpx.Response:
        unknown = (set(body) - _GENERATE) | (set(body.get("options", {})) - _OPTIONS)
        if unknown:
            return _refuse(f"unknown fields {sorted(unknown)}")
        if body["model"] not in self.models:
            return _refuse(f"model '{body['model']}' not found", 404)
        if not body.get("raw") or body.get("stream") is not False or not isinstance(body.get("format"), dict):
            return _refuse("this double wants raw text, no stream, and a schema")
        options = body.get("options", {})
        for name in _WHOLE & set(options):
            if type(options[name]) is not int:
                return _refuse(f"option {name!r} must be of type integer")
        own = self.models[body["model"]].get("parameters", {}).get("num_ctx", self.window)
        window = options.get("num_ctx", own) if self.honours_num_ctx else self.window
        size = self.tokens(body["prompt"])
        if size >= window:
            if body.get("truncate") is False and self.knows_truncate:
                return _refuse("the input length exceeds the context length")
            size = window - window // 2
        self.prompts.append(body["prompt"])
        tokens = self.writer(body["model"], body["prompt"])
        reply: dict[str, Any] = {
            "model": body["model"],
            "response": "".join(token for token, _ in tokens),
            "done": True,
            "done_reason": "stop",
            "prompt_eval_count": size,
            "eval_count": len(tokens),
        }
        if self.with_logprobs and body.get("logprobs"):
            reply["logprobs"] = [{"token": t, "logprob": p, "bytes": list(t.encode())} for t, p in tokens]
        return httpx.Response(200, json=reply)

    def _delete(self, body: dict[str, Any]) -> httpx.Response:
        if self.models.pop(body["model"], None) is None:
            return _refuse("model not found", 404)
        return httpx.Response(200)


def _is_gguf(content: bytes) -> bool:
    if len(content) < 24:
        return False
    magic, version, tensors, _ = struct.unpack("<4sIQQ", content[:24])
    return magic == b"GGUF" and version in (2, 3) and tensors > 0


def _refuse(why: str, status: int = 400) -> httpx.Response:
    return httpx.Response(status, json={"error": why})
