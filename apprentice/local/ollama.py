"""A running Ollama server, by its published API (docs/api.md): models made of base and adapter, answers under a
schema.

A version is an Ollama model ``apprentice-<task>:<name>``, created from ``local.base_model`` (a tag) and the
adapter's files, which are pushed as blobs: the server may be on another machine. Requests go out as finished text
(``raw``): the frame comes from the adapter, no template is applied. The schema is Ollama's own ``format``. Where the
server gives log-probabilities (0.12.11 and later) they make the confidence; an older one tells nothing, and all
answers get the same (`whole.UNKNOWN`).

No Ollama binary was to be had when this was written: it is tested against a double that is strict about the API.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from apprentice.errors import EngineUnavailable, OutputError, VersionError
from apprentice.local.adapter import CONFIG, WEIGHTS, check_files
from apprentice.local.drained import Drained
from apprentice.local.engine import Health, LoadedVersion, LocalAnswer, Version
from apprentice.local.frame import Frame
from apprentice.local.served import Courtesy, post
from apprentice.local.skeleton import Skeleton
from apprentice.local.whole import field_confidence
from apprentice.schema import SchemaError

__all__ = ["OllamaEngine"]

_AT_ONCE = 16
_CALM_S = 1800.0
_KEEP_ALIVE = "30m"


@dataclass(frozen=True, slots=True)
class _Loaded:
    version: Version
    skeleton: Skeleton
    frame: Frame
    model: str
    bytes: int | None


class OllamaEngine:
    """See the module. ``transport`` replaces the network in tests."""

    def __init__(
        self,
        base_model: str,
        *,
        url: str = "http://127.0.0.1:11434",
        max_new_tokens: int = 512,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._base_model = base_model
        self._url = url.rstrip("/")
        self._max_new_tokens = max_new_tokens
        limits = httpx.Limits(max_connections=64, max_keepalive_connections=64)
        self._client = httpx.Client(base_url=self._url, limits=limits, transport=transport)
        self._versions: Drained[_Loaded] = Drained("ollama")
        self._courtesy = Courtesy(_AT_ONCE)

    def load(self, version: Version) -> None:
        """Create the version's model, unless the server has it."""
        there = self._models()
        held = self._versions.get(version.name)
        if held is not None and held.model in there:
            return
        if version.adapter is None:
            if _full(self._base_model) not in there:
                raise VersionError(f"Ollama has no model {self._base_model!r}; run: ollama pull {self._base_model}")
            self._versions.put(version.name, self._describe(version, self._base_model, Frame("", "\n", ""), None))
            return
        check_files(version.adapter)
        frame = Frame.load(version.adapter)
        model = f"apprentice-{version.task}:{version.name}".lower()
        if model not in there:
            self._create(version, version.adapter, frame, model)
        size = (version.adapter / WEIGHTS).stat().st_size
        self._versions.put(version.name, self._describe(version, model, frame, size))

    def answer(self, version: str, value: Mapping[str, Any], *, deadline_s: float) -> LocalAnswer:
        """Answer one input."""
        with self._courtesy.caller():
            return self._answer(version, value, time.monotonic() + deadline_s)

    def _answer(self, version: str, value: Mapping[str, Any], ends_at: float) -> LocalAnswer:
        with self._versions.using(version) as held:
            body = {
                "model": held.model,
                "prompt": held.frame.render(held.version.prompt(value)),
                "raw": True,
                "stream": False,
                "format": held.version.output_schema.json_schema,
                "keep_alive": _KEEP_ALIVE,
                "logprobs": True,
                "options": {
                    "temperature": 0,
                    "num_predict": self._max_new_tokens,
                    "stop": [held.frame.stop] if held.frame.stop else [],
                },
            }
            reply = post(self._client, "Ollama", "/api/generate", body, ends_at)
        return self._read(held, reply)

    def answer_many(self, version: str, values: Sequence[Mapping[str, Any]]) -> list[LocalAnswer | Exception]:
        """Several at once, few while callers wait; how many it runs in parallel is the server's setting."""
        return self._courtesy.ask_all(lambda value: self._answer(version, value, time.monotonic() + _CALM_S), values)

    def unload(self, version: str) -> None:
        """Delete the version's model once its answers are out."""
        self._versions.drop(version, self._delete)

    def loaded(self) -> list[LoadedVersion]:
        """What was created here."""
        return [LoadedVersion(name, held.version.task, held.bytes) for name, held in self._versions.all().items()]

    def health(self) -> Health:
        """Whether the server answers."""
        try:
            self._client.get("/api/version", timeout=5.0).raise_for_status()
        except httpx.HTTPError as error:
            return Health(False, f"no Ollama server answers at {self._url} ({error})")
        return Health(not self._versions.closed)

    def close(self) -> None:
        """Leave the server as it is: its models are on disk and serve the next process."""
        self._versions.close()
        self._client.close()

    def _describe(self, version: Version, model: str, frame: Frame, size: int | None) -> _Loaded:
        return _Loaded(version, Skeleton.of(version.output_schema), frame, model, size)

    def _read(self, held: _Loaded, reply: Mapping[str, Any]) -> LocalAnswer:
        task = held.version.task
        try:
            output = held.version.output_schema.parse(reply["response"])
        except SchemaError as error:
            raise OutputError(task, "the local model", error.problems) from None
        rows = reply.get("logprobs")
        tokens = [(row["token"], row["logprob"]) for row in rows] if rows else None
        fields = field_confidence(held.skeleton, output, tokens)
        return LocalAnswer(
            output=output,
            confidence=min(fields.values(), default=1.0),
            field_confidence=fields,
            version=held.version.name,
            prompt_tokens=int(reply.get("prompt_eval_count", 0)),
            answer_tokens=int(reply.get("eval_count", 0)),
        )

    def _models(self) -> set[str]:
        try:
            rows = self._client.get("/api/tags", timeout=10.0).raise_for_status().json()["models"]
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise EngineUnavailable(f"no Ollama server answers at {self._url} ({error}); run: ollama serve") from None
        return {row["name"] for row in rows}

    def _create(self, version: Version, adapter: Path, frame: Frame, model: str) -> None:
        files = {name: self._push(adapter / name) for name in (CONFIG, WEIGHTS)}
        body = {
            "model": model,
            "from": self._base_model,
            "adapters": files,
            "template": "{{ .Prompt }}",
            "parameters": {"stop": [frame.stop]} if frame.stop else {},
            "stream": False,
        }
        response = self._send("POST", "/api/create", json=body)
        if response.status_code != 200 or response.json().get("status") != "success":
            raise VersionError(
                f"Ollama cannot create {model} from {self._base_model} ({response.text[:300]}); is the adapter "
                f"{version.adapter} of that very base?"
            )

    def _push(self, path: Path) -> str:
        content = path.read_bytes()
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        if self._send("HEAD", f"/api/blobs/{digest}").status_code != 200:
            pushed = self._send("POST", f"/api/blobs/{digest}", content=content)
            if pushed.status_code not in (200, 201):
                raise VersionError(f"Ollama does not take {path} ({pushed.status_code} {pushed.text[:200]})")
        return digest

    def _delete(self, held: _Loaded) -> None:
        if held.version.adapter is not None:
            self._send("DELETE", "/api/delete", json={"model": held.model})

    def _send(self, method: str, path: str, **more: Any) -> httpx.Response:
        try:
            return self._client.request(method, path, timeout=_CALM_S, **more)
        except httpx.HTTPError as error:
            raise EngineUnavailable(f"Ollama at {self._url} does not answer ({error})") from None


def _full(tag: str) -> str:
    return tag if ":" in tag else f"{tag}:latest"
