"""A running Ollama server, by its API: models merged from base and adapter, answers under a schema.

Ollama takes no LoRA adapters any more (since 0.34.1), and converts nothing: it wants a GGUF. So a version is an Ollama
model ``apprentice-<task>:<name>``, created from a GGUF in which the adapter is merged into the base's weights
(`gguf_file.write_merged`). It is pushed as a blob: the server may be on another machine. The base's GGUF is that of
``local.training_model``; ``local.base_model`` is the tag under which the server has the untrained model.

Requests go out as finished text (``raw``): the frame comes from the adapter, no template is applied. The schema is
Ollama's own ``format``. Where the server gives log-probabilities (0.12.11 and later) they make the confidence; an older
one tells nothing, and all answers get the same (`whole.UNKNOWN`).

An input that does not fit the window is refused here: Ollama would cut it and answer the rest. It is tested against a
double that is as strict as the server's source; the merged GGUF is tested in llama.cpp's real server.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from apprentice.errors import ApprenticeError, ConfigError, EngineUnavailable, OutputError, Problem, VersionError
from apprentice.local.adapter import WEIGHTS, check_adapter, read_adapter
from apprentice.local.base_model import BaseModel, cache_dir, resolve_base_model
from apprentice.local.drained import Drained
from apprentice.local.engine import EnginePlugin, EngineSetup, Health, LoadedVersion, LocalAnswer, Version
from apprentice.local.frame import Frame
from apprentice.local.gguf_file import read_gguf_header, special_tokens, write_merged
from apprentice.local.leases import Alone, Leases
from apprentice.local.served import Courtesy, post
from apprentice.local.skeleton import Skeleton
from apprentice.local.whole import field_confidence
from apprentice.schemas.schema import SchemaError

__all__ = ["OllamaEngine"]

_AT_ONCE = 16
_CALM_S = 1800.0
_KEEP_ALIVE = "30m"
_WINDOW = 8192
"""Tokens of one request, prompt and answer, at most; a model that takes fewer has its own limit."""


@dataclass(frozen=True, slots=True)
class _Base:
    """What is to be known of the base model beside its weights."""

    gguf: Path
    window: int
    special: re.Pattern[str] | None
    count: Callable[[str], int]
    """How many tokens a text has, or a number that is certainly not below that."""
    exact: bool


@dataclass(frozen=True, slots=True)
class _Loaded:
    version: Version
    base: _Base
    skeleton: Skeleton
    frame: Frame
    model: str
    bytes: int | None


class OllamaEngine(EnginePlugin):
    """See the module. ``base_model`` is the server's tag, ``training_model`` the same weights as a GGUF.

    ``leases`` know who else uses the server; ``transport`` replaces the network in tests.
    """

    default_url = "http://127.0.0.1:11434"
    keeps_models = True

    @classmethod
    def configured(cls, setup: EngineSetup, options: Any) -> OllamaEngine:
        settings = setup.settings
        return cls(
            settings.base_model,
            setup.root,
            training_model=settings.training_model,
            url=settings.url or cls.default_url,
            max_new_tokens=settings.max_new_tokens,
            leases=setup.leases,
        )

    def __init__(
        self,
        base_model: str,
        root: Path,
        *,
        training_model: str | None = None,
        url: str = "http://127.0.0.1:11434",
        max_new_tokens: int = 512,
        leases: Leases | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._base_model = base_model
        self._training_model = training_model or base_model
        self._root = root
        self._described: _Base | None = None
        self._url = url.rstrip("/")
        self._max_new_tokens = max_new_tokens
        limits = httpx.Limits(max_connections=64, max_keepalive_connections=64)
        self._client = httpx.Client(base_url=self._url, limits=limits, transport=transport)
        self._versions: Drained[_Loaded] = Drained("ollama")
        self._courtesy = Courtesy(_AT_ONCE)
        self._leases = leases or Alone()
        self._changing = threading.Lock()

    def load(self, version: Version) -> None:
        """Create the version's model, unless the server has it."""
        with self._changing:
            if version.adapter is None:
                if _full(self._base_model) not in self._models():
                    raise VersionError(f"Ollama has no model {self._base_model!r}; run: ollama pull {self._base_model}")
                self._put(version, self._base_model, Frame("", "\n", ""), None)
                return
            resolved = resolve_base_model(self._training_model, self._root, dequantise=False)
            check_adapter(version.adapter, resolved, version.name)
            frame = Frame.load(version.adapter)
            with self._leases.changing(self._url, version.name):
                # First the lease: from here on nobody deletes the model. It bears our name, so it is ours to delete.
                self._leases.hold(self._url, version.name, loaded=True)
                try:
                    model = _model(version)
                    if model not in self._models():
                        self._create(version.adapter, frame, model)
                    if self._versions.get(version.name) is None:
                        self._put(version, model, frame, (version.adapter / WEIGHTS).stat().st_size)
                except BaseException:
                    with contextlib.suppress(ApprenticeError):
                        self._leases.release(self._url, version.name)
                    raise

    def _put(self, version: Version, model: str, frame: Frame, size: int | None) -> None:
        skeleton = Skeleton.of(version.output_schema)
        self._versions.put(version.name, _Loaded(version, self._base(), skeleton, frame, model, size))

    def _base(self) -> _Base:
        if self._described is None:
            self._described = _describe(resolve_base_model(self._training_model, self._root, dequantise=False))
        return self._described

    def answer(self, version: str, value: Mapping[str, Any], *, deadline_s: float) -> LocalAnswer:
        """Answer one input."""
        with self._courtesy.caller():
            return self._answer(version, value, time.monotonic() + deadline_s)

    def _answer(self, version: str, value: Mapping[str, Any], ends_at: float) -> LocalAnswer:
        with self._versions.using(version) as held:
            base, task = held.base, held.version.task
            text = held.version.prompt(value)
            prompt = held.frame.render(text if base.special is None else letters(text, base.special))
            size = base.count(prompt)
            room = base.window - min(self._max_new_tokens, base.window // 2)
            if size > room:
                about = "tokens" if base.exact else "bytes, and a token is a byte at least,"
                raise _too_long(task, f"is {size} {about} and {room} tokens fit into the window")
            body = {
                "model": held.model,
                "prompt": prompt,
                "raw": True,
                "stream": False,
                # Newer servers refuse what does not fit; older ones do not know these two and cut it.
                "truncate": False,
                "shift": False,
                "format": held.version.output_schema.json_schema,
                "keep_alive": _KEEP_ALIVE,
                "logprobs": True,
                "options": {
                    "temperature": 0,
                    "repeat_penalty": 1.0,
                    "num_ctx": base.window,
                    "num_predict": self._max_new_tokens,
                    "stop": [held.frame.stop] if held.frame.stop else [],
                },
            }
            reply = post(self._client, "Ollama", "/api/generate", body, ends_at, task=task)
        read = reply.get("prompt_eval_count") if isinstance(reply, dict) else None
        # Tokenisers may differ by a token or two; a cut takes half of the window away.
        if base.exact and isinstance(read, int) and 0 < read < 0.8 * size:
            raise _too_long(task, f"was cut by the server: it read {read} of {size} tokens")
        return self._read(held, reply)

    def answer_many(self, version: str, values: Sequence[Mapping[str, Any]]) -> list[LocalAnswer | Exception]:
        """Several at once, few while callers wait; how many it runs in parallel is the server's setting."""
        return self._courtesy.ask_all(lambda value: self._answer(version, value, time.monotonic() + _CALM_S), values)

    def unload(self, version: str) -> None:
        """Use the model no longer once its answers are out; the last who used it deletes it."""
        self._versions.drop(version, self._leave)

    def _leave(self, held: _Loaded) -> None:
        name = held.version.name
        if held.version.adapter is None:
            return
        with self._changing:
            if self._versions.get(name) is not None:
                return  # it was loaded again meanwhile
            with self._leases.changing(self._url, name):
                if self._leases.release(self._url, name):
                    self._send("DELETE", "/api/delete", json={"model": held.model})

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
        for held in self._versions.close():
            if held.version.adapter is not None:
                self._leases.release(self._url, held.version.name)
        self._leases.close()
        self._client.close()

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

    def _create(self, adapter: Path, frame: Frame, model: str) -> None:
        base = self._base()
        cache = cache_dir()
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="merged-", dir=cache) as work:  # once pushed, the server has it
            merged = Path(work) / "model.gguf"
            write_merged(read_adapter(adapter), base.gguf, merged, str(adapter))
            files = {merged.name: self._push(merged)}
        body = {
            "model": model,
            "files": files,
            "template": "{{ .Prompt }}",
            "parameters": {"num_ctx": base.window, **({"stop": [frame.stop]} if frame.stop else {})},
            "stream": False,
        }
        response = self._send("POST", "/api/create", json=body)
        if response.status_code != 200 or _field(response, "status") != "success":
            raise VersionError(f"Ollama cannot create {model} from {base.gguf} ({response.text[:300]})")

    def _push(self, path: Path) -> str:
        with path.open("rb") as file:
            digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        if self._send("HEAD", f"/api/blobs/{digest}").status_code != 200:
            with path.open("rb") as file:
                headers = {"content-length": str(path.stat().st_size)}
                pushed = self._send("POST", f"/api/blobs/{digest}", content=file, headers=headers)
            if pushed.status_code not in (200, 201):
                raise VersionError(f"Ollama does not take {path} ({pushed.status_code} {pushed.text[:200]})")
        return digest

    def _send(self, method: str, path: str, **more: Any) -> httpx.Response:
        try:
            return self._client.request(method, path, timeout=_CALM_S, **more)
        except httpx.HTTPError as error:
            raise EngineUnavailable(f"Ollama at {self._url} does not answer ({error})") from None


def _full(tag: str) -> str:
    return tag if ":" in tag else f"{tag}:latest"


def _model(version: Version) -> str:
    return f"apprentice-{version.task}:{version.name}".lower()


def letters(text: str, special: re.Pattern[str]) -> str:
    """``text`` with a space in whatever the server would take for a special token: then it is letters."""
    at = 0
    while found := special.search(text, at):
        at = found.start() + 1
        text = f"{text[:at]} {text[at:]}"
    return text


def _pattern(special: Sequence[str]) -> re.Pattern[str]:
    """Of the longer ones first: one may begin with another."""
    return re.compile("|".join(re.escape(text) for text in sorted(special, key=len, reverse=True)))


def _field(response: httpx.Response, name: str) -> Any:
    try:
        return response.json().get(name)
    except (ValueError, RecursionError, AttributeError):
        return None


def _too_long(task: str, why: str) -> OutputError:
    return OutputError(task, "the local model", [Problem("input", f"{why}.", "The remote answers it.")])


def _describe(base: BaseModel) -> _Base:
    if base.gguf is None:
        problem = Problem(
            "local.training_model",
            f"{base.name!r} comes with no GGUF file, and Ollama takes nothing else.",
            "Give the .gguf file itself, or put one into the folder (llama.cpp's convert_hf_to_gguf.py makes it).",
        )
        raise ConfigError("local.training_model", [problem])
    metadata = read_gguf_header(base.gguf).metadata
    limit = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    window = min(_WINDOW, limit) if isinstance(limit, int) and limit > 0 else _WINDOW
    # A single character has nothing to put a space into; of blanks another blank would make others.
    special = [text for text in special_tokens(base.gguf) if len(text) > 1 and not text.isspace()]
    pattern = _pattern(special) if special else None
    tokenizer = _tokenizer(Path(base.path) / "tokenizer.json")
    if tokenizer is None:
        return _Base(base.gguf, window, pattern, lambda text: len(text.encode()), exact=False)
    return _Base(
        base.gguf, window, pattern, lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids), exact=True
    )


def _tokenizer(path: Path) -> Any:
    """The base's tokenizer where training has left it, without loading torch for it; else None."""
    if not path.is_file():
        return None
    try:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(path))
    except Exception:  # noqa: BLE001  # the package's own errors have no common class
        return None


REGISTERED = OllamaEngine
