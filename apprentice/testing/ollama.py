"""An Ollama server that speaks its published API (docs/api.md) and nothing else, for httpx's MockTransport.

It is strict where a lenient double would hide a mistake: unknown fields, missing blobs, wrong digests, models that
were never created, and messages where raw text is meant are all refused as the real server refuses them, or harder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import httpx

__all__ = ["FakeOllama"]

_GENERATE = {"model", "prompt", "raw", "stream", "format", "keep_alive", "logprobs", "top_logprobs", "options"}
_OPTIONS = {"temperature", "num_predict", "stop", "seed", "num_ctx"}
_CREATE = {"model", "from", "adapters", "files", "template", "parameters", "system", "stream"}
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*(/[a-z0-9][a-z0-9_.-]*)?:[A-Za-z0-9_.-]+\Z")

type Writer = Callable[[str, str], list[tuple[str, float]]]
"""Given a model's name and the raw prompt, the answer as tokens with log-probabilities."""


class FakeOllama:
    """``tags``: models it was given with pull; ``writer`` answers; ``with_logprobs=False`` is an older server."""

    def __init__(self, writer: Writer, *, tags: tuple[str, ...] = ("base:latest",), with_logprobs: bool = True) -> None:
        self.writer = writer
        self.with_logprobs = with_logprobs
        self.models: dict[str, dict[str, Any]] = {tag: {} for tag in tags}
        self.blobs: dict[str, bytes] = {}
        self.down = False
        self.refuses_adapters = False

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
        if unknown or not _NAME.match(body.get("model", "")):
            return _refuse(f"invalid request: {sorted(unknown) or body.get('model')}")
        source = body.get("from", "")
        if (source if ":" in source else f"{source}:latest") not in self.models:
            return _refuse(f"model {source!r} not found", 404)
        adapters: Mapping[str, str] = body.get("adapters", {})
        if any(digest not in self.blobs for digest in adapters.values()):
            return _refuse("blob not found")
        if self.refuses_adapters or set(adapters) != {"adapter_config.json", "adapter_model.safetensors"}:
            return _refuse("unsupported architecture")
        self.models[body["model"]] = body
        return httpx.Response(200, json={"status": "success"})

    def _generate(self, body: dict[str, Any]) -> httpx.Response:
        unknown = (set(body) - _GENERATE) | (set(body.get("options", {})) - _OPTIONS)
        if unknown:
            return _refuse(f"unknown fields {sorted(unknown)}")
        if body["model"] not in self.models:
            return _refuse(f"model '{body['model']}' not found", 404)
        if not body.get("raw") or body.get("stream") is not False or not isinstance(body.get("format"), dict):
            return _refuse("this double wants raw text, no stream, and a schema")
        tokens = self.writer(body["model"], body["prompt"])
        reply: dict[str, Any] = {
            "model": body["model"],
            "response": "".join(token for token, _ in tokens),
            "done": True,
            "done_reason": "stop",
            "prompt_eval_count": len(body["prompt"]),
            "eval_count": len(tokens),
        }
        if self.with_logprobs and body.get("logprobs"):
            reply["logprobs"] = [{"token": t, "logprob": p, "bytes": list(t.encode())} for t, p in tokens]
        return httpx.Response(200, json=reply)

    def _delete(self, body: dict[str, Any]) -> httpx.Response:
        if self.models.pop(body["model"], None) is None:
            return _refuse("model not found", 404)
        return httpx.Response(200)


def _refuse(why: str, status: int = 400) -> httpx.Response:
    return httpx.Response(status, json={"error": why})
