"""A vLLM server that speaks the part of its API that the engine uses, for httpx's MockTransport.

Strict where a lenient double would hide a mistake: an adapter that is not there cannot be loaded, one that is loaded
cannot be loaded again, one that is not cannot be unloaded or asked, and what is longer than the model's window is
refused, each with the status and the words of the real server (vllm/entrypoints/openai).
"""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import httpx

__all__ = ["FakeVllm"]

_COMPLETION = {
    "model",
    "prompt",
    "temperature",
    "max_tokens",
    "logprobs",
    "allowed_token_ids",
    "return_tokens_as_token_ids",
    "structured_outputs",
}


class FakeVllm:
    """Tokens are characters. It decides for the first of ``preferred`` that is allowed, and writes ``text``.

    ``down`` refuses connections, ``slow`` names the paths whose answers come too late (they are carried out),
    ``runtime_lora=False`` is a server started without run-time adapters, ``key`` one that wants authorization.
    """

    def __init__(self, *, key: str = "", runtime_lora: bool = True, window: int = 100_000) -> None:
        self.key = key
        self.runtime_lora = runtime_lora
        self.window = window
        self.adapters: dict[str, str] = {}
        self.preferred = "jfa"
        self.text = ""
        self.down = False
        self.slow: set[str] = set()
        self.prompts: list[str] = []
        self._lock = threading.Lock()

    def transport(self) -> httpx.MockTransport:
        """What to give an httpx client."""
        return httpx.MockTransport(self._serve)

    def restart(self) -> None:
        """Come up again with nothing loaded."""
        with self._lock:
            self.adapters.clear()

    def _serve(self, request: httpx.Request) -> httpx.Response:
        if self.down:
            raise httpx.ConnectError("connection refused", request=request)
        with self._lock:
            response = self._route(request.url.path, request)
        if request.url.path in self.slow:
            raise httpx.ReadTimeout("timed out", request=request)
        return response

    def _route(self, path: str, request: httpx.Request) -> httpx.Response:
        if path == "/health":
            return httpx.Response(200)
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return httpx.Response(401, json={"error": "Unauthorized"})
        if path == "/v1/models":
            rows = [{"id": "base", "parent": None}] + [{"id": name, "parent": "base"} for name in self.adapters]
            return httpx.Response(200, json={"data": rows})
        body = json.loads(request.content)
        match path:
            case "/tokenize" if body["model"] in {"base", *self.adapters}:
                return httpx.Response(200, json={"tokens": [ord(c) for c in body["prompt"]]})
            case "/v1/load_lora_adapter" if self.runtime_lora:
                return self._load(body)
            case "/v1/unload_lora_adapter" if self.runtime_lora:
                return self._unload(body)
            case "/v1/completions" if body["model"] in {"base", *self.adapters}:
                return self._complete(body)
            case "/tokenize" | "/v1/completions":
                return _refuse(404, "NotFoundError", f"The model `{body['model']}` does not exist.")
        return httpx.Response(404, json={"detail": "Not Found"})

    def _load(self, body: dict[str, Any]) -> httpx.Response:
        name, path = body.get("lora_name"), body.get("lora_path")
        if not name or not path:
            return _refuse(400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided.")
        if name in self.adapters:
            return _refuse(400, "InvalidUserInput", f"The lora adapter '{name}' has already been loaded.")
        if not (Path(path) / "adapter_config.json").is_file():
            return _refuse(404, "NotFoundError", f"No adapter found for {path}")
        self.adapters[name] = path
        return httpx.Response(200, text=f"Success: LoRA adapter '{name}' added successfully.")

    def _unload(self, body: dict[str, Any]) -> httpx.Response:
        if body["lora_name"] not in self.adapters:
            return _refuse(404, "NotFoundError", f"The lora adapter '{body['lora_name']}' cannot be found.")
        del self.adapters[body["lora_name"]]
        return httpx.Response(200, text=f"Success: LoRA adapter '{body['lora_name']}' removed successfully.")

    def _complete(self, body: dict[str, Any]) -> httpx.Response:
        unknown = set(body) - _COMPLETION
        if unknown:
            return _refuse(400, "BadRequestError", f"this double does not know {sorted(unknown)}")
        if len(body["prompt"]) + body["max_tokens"] > self.window:
            return _refuse(
                400, "BadRequestError", f"This model's maximum context length is {self.window} tokens. However, ..."
            )
        self.prompts.append("".join(chr(token) for token in body["prompt"]))
        if "allowed_token_ids" in body:
            token = next(ord(c) for c in self.preferred if ord(c) in body["allowed_token_ids"])
            top = {f"token_id:{ord(c)}": math.log(0.6) - i for i, c in enumerate(self.preferred)}
            logprobs = {"tokens": [f"token_id:{token}"], "token_logprobs": [0.0], "top_logprobs": [top]}
            choice = {"text": chr(token), "finish_reason": "length", "logprobs": logprobs}
        else:
            if "root ::=" not in body["structured_outputs"]["grammar"]:
                return _refuse(400, "BadRequestError", "the grammar has no root")
            names = [f"token_id:{ord(c)}" for c in self.text] + ["token_id:0"]
            logprobs = {"tokens": names, "token_logprobs": [math.log(0.9)] * len(names)}
            choice = {"text": self.text, "finish_reason": "stop", "logprobs": logprobs}
        return httpx.Response(200, json={"choices": [choice]})


def _refuse(status: int, kind: str, message: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message, "type": kind, "param": None, "code": status}})
