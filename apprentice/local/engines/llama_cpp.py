"""llama.cpp's server: one that runs already (``local.url``), or started here from the wheel ``xllamacpp``.

Versions are GGUF LoRAs over the very GGUF that training dequantised. llama.cpp reads adapters when it starts, so a new
version is a new server beside the old one (the base is mapped into memory once), and the old one goes when its answers
are out. A server by URL cannot be given adapters: start it with ``--lora FILE`` for each version it is to serve; the
files are written when a version is loaded, and the error says where.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from apprentice.errors import ConfigError, EngineUnavailable, MissingExtra, Problem, VersionError
from apprentice.local import llama_server
from apprentice.local.adapter import check_adapter, read_adapter
from apprentice.local.base_model import BaseModel, resolve_base_model
from apprentice.local.drained import Drained
from apprentice.local.engine import EnginePlugin, EngineSetup, Health, LoadedVersion, LocalAnswer, Version
from apprentice.local.frame import Frame
from apprentice.local.gguf_file import GgufHeader, read_gguf_header, write_lora
from apprentice.local.grammar import gbnf
from apprentice.local.served import Framed, Pieces, Written, answer_by, ask_all, post
from apprentice.local.skeleton import Free
from apprentice.secrets import child_environment, logger

__all__ = ["LlamaCppEngine"]

_log = logger(__name__)

_SLOTS = 16
_CONTEXT = 8192
"""Tokens of all requests under way together."""
_OUT_OF_REACH = 1000.0
_CALM_S = 600.0
"""For work that nobody waits for: loading, validation."""
_PARTING_S = 5.0


class _Completer:
    """One llama.cpp server with one set of adapters, as following the skeleton needs it."""

    def __init__(self, client: httpx.Client, loras: Sequence[Mapping[str, Any]], task: str) -> None:
        self._client = client
        self._loras = list(loras)
        self._task = task
        self.pieces = Pieces(self.encode)

    def encode(self, text: str, ends_at: float) -> tuple[int, ...]:
        """Tokenise; the text of a special token means its letters."""
        return self._tokens(text, ends_at, special=False)

    def frame(self, text: str) -> tuple[int, ...]:
        """Tokenise; the text of a special token means the token."""
        return self._tokens(text, time.monotonic() + _CALM_S, special=True)

    def _tokens(self, text: str, ends_at: float, *, special: bool) -> tuple[int, ...]:
        body = {"content": text, "add_special": False, "parse_special": special}
        return tuple(self._post("/tokenize", body, ends_at)["tokens"]) if text else ()

    def scores(self, tokens: Sequence[int], only: Sequence[int], ends_at: float) -> list[float]:
        """Every other token is pushed out of reach; what is left is normalised over the ones that are asked for."""
        reply = self._complete(
            tokens,
            ends_at,
            n_predict=1,
            n_probs=len(only),
            post_sampling_probs=True,
            temperature=1.0,
            samplers=["temperature"],
            logit_bias=[[token, _OUT_OF_REACH] for token in only],
        )
        found = {p["id"]: p["prob"] for p in reply["completion_probabilities"][0]["top_probs"]}
        return [math.log(max(found.get(token, 0.0), 1e-30)) for token in only]

    def write(self, tokens: Sequence[int], free: Free, most: int, ends_at: float) -> Written:
        """Greedy, under the grammar in GBNF."""
        reply = self._complete(
            tokens, ends_at, n_predict=most + 1, n_probs=1, temperature=0.0, grammar=gbnf(free.grammar)
        )
        # Tokens that are parts of one character share a row of probabilities; only ``tokens`` has them all. The last
        # is the end of the turn, which the grammar allows when it is complete.
        ids, rows = reply["tokens"], reply.get("completion_probabilities", [])
        if reply["stop_type"] == "eos":
            ids, rows = ids[:-1], rows[:-1]
        return Written(
            tokens=ids,
            content=bytes(byte for row in rows for byte in row["bytes"]),
            probability=math.exp(sum(row["logprob"] for row in rows)),
        )

    def _complete(self, tokens: Sequence[int], ends_at: float, **wanted: Any) -> Any:
        body = {"prompt": list(tokens), "cache_prompt": True, "return_tokens": True, "lora": self._loras, **wanted}
        return self._post("/completion", body, ends_at)

    def _post(self, path: str, body: Mapping[str, Any], ends_at: float) -> Any:
        return post(self._client, "llama.cpp", path, body, ends_at, task=self._task)


@dataclass(frozen=True, slots=True, eq=False)
class _Served:
    """A version and the server that answers for it, with its process where it was started here."""

    framed: Framed
    completer: _Completer
    client: httpx.Client
    bytes: int | None
    process: subprocess.Popen[str] | None = None


class LlamaCppEngine(EnginePlugin):
    """See the module. ``threads``: for one server's computations; None leaves it to llama.cpp."""

    packages = ("gguf", "xllamacpp")
    extra = "llama_cpp"

    @classmethod
    def configured(cls, setup: EngineSetup, options: Any) -> LlamaCppEngine:
        settings = setup.settings
        return cls(settings.base_model, setup.root, url=settings.url, max_new_tokens=settings.max_new_tokens)

    def __init__(
        self,
        base_model: str,
        root: Path,
        *,
        url: str | None = None,
        max_new_tokens: int = 512,
        threads: int | None = None,
    ) -> None:
        self._base_model = base_model
        self._root = root
        self._url = url.rstrip("/") if url else None
        self._max_new_tokens = max_new_tokens
        self._threads = threads
        self._versions: Drained[_Served] = Drained("llama.cpp")
        self._loading = threading.Lock()

    def load(self, version: Version) -> None:
        """Bring up a server for the version, or find it in the one that runs. One that died or hangs is replaced."""
        with self._loading:
            served = self._versions.get(version.name)
            if served is not None and _is_well(served):
                return
            base = self._base()
            header = read_gguf_header(_gguf(base))
            lora = self._lora(version, base, header)
            frame = Frame.load(version.adapter) if version.adapter is not None else self._own_frame(base)
            served = self._find(version, frame, lora) if self._url else self._bring_up(version, frame, base, lora)
            try:
                before = self._versions.put(version.name, served)
            except EngineUnavailable:
                _stop(served)
                raise
            if before is not None:
                _stop(before)

    def answer(self, version: str, value: Mapping[str, Any], *, deadline_s: float) -> LocalAnswer:
        """Answer one input."""
        ends_at = time.monotonic() + deadline_s
        with self._versions.using(version) as served:
            try:
                return answer_by(served.completer, served.framed, value, self._max_new_tokens, ends_at)
            except EngineUnavailable as error:
                if _has_ended(served):
                    raise VersionError(f"the llama.cpp server of version {version} has ended: load it again") from error
                raise

    def answer_many(self, version: str, values: Sequence[Mapping[str, Any]]) -> list[LocalAnswer | Exception]:
        """As many at once as the server has slots."""
        return ask_all(lambda value: self.answer(version, value, deadline_s=_CALM_S), values, _SLOTS)

    def unload(self, version: str) -> None:
        """Stop the version's server once its answers are out."""
        self._versions.drop(version, _stop)

    def loaded(self) -> list[LoadedVersion]:
        """What it serves; the size is that of the adapter, since servers share the base's memory map."""
        return [LoadedVersion(name, s.framed.version.task, s.bytes) for name, s in self._versions.all().items()]

    def health(self) -> Health:
        """Whether every server answers."""
        if self._versions.closed:
            return Health(False, "closed")
        if self._url:
            well = _answers(self._url, own=False)
            return Health(well, "" if well else f"no llama.cpp server answers at {self._url}")
        ill = [name for name, served in self._versions.all().items() if not _is_well(served)]
        return Health(not ill, f"the server of version {ill[0]} does not answer; loading it again" if ill else "")

    def close(self) -> None:
        """Stop every server that was started here."""
        for served in self._versions.close():
            _stop(served)

    def _base(self) -> BaseModel:
        return resolve_base_model(self._base_model, self._root, dequantise=False)

    def _lora(self, version: Version, base: BaseModel, header: GgufHeader) -> Path | None:
        """The version's adapter as GGUF, in its folder. Always converted anew: a damaged one may load and answer."""
        if version.adapter is None:
            return None
        check_adapter(version.adapter, base, version.name)
        target = version.adapter / f"{version.name}.gguf"
        try:
            write_lora(read_adapter(version.adapter), header, target, str(version.adapter))
        except OSError as error:
            if not target.is_file():
                raise VersionError(f"{target} cannot be written ({error.strerror}); make the folder writable") from None
            _log.warning("using %s as it is: it cannot be written again (%s)", target, error.strerror)
            read_gguf_header(target)
        return target

    def _own_frame(self, base: BaseModel) -> Frame:
        """The base model's own frame, which only the untrained model needs."""
        from apprentice.local.base_model import load_tokenizer

        return Frame.of_tokenizer(load_tokenizer(resolve_base_model(base.name, self._root)))

    def _bring_up(self, version: Version, frame: Frame, base: BaseModel, lora: Path | None) -> _Served:
        if importlib.util.find_spec("xllamacpp") is None:
            raise MissingExtra("llama.cpp on this machine", "llama_cpp")
        # It listens on this machine's loopback, where web pages can reach it too: only this process knows the key.
        key = secrets.token_urlsafe(24)
        process, address = _start(
            {
                "model": str(_gguf(base)),
                "lora": str(lora) if lora is not None else None,
                "slots": _SLOTS,
                "context": _CONTEXT,
                "threads": self._threads,
                "key": key,
            },
            version.name,
        )
        client = _client(address, key)
        loras = [{"id": 0, "scale": 1.0}] if lora is not None else []
        completer = _Completer(client, loras, version.task)
        framed = Framed.of(version, frame, completer.frame)
        return _Served(framed, completer, client, lora.stat().st_size if lora else 0, process)

    def _find(self, version: Version, frame: Frame, lora: Path | None) -> _Served:
        """The version among the adapters that a running server was started with."""
        assert self._url is not None
        client = _client(self._url)
        try:
            there = client.get("/lora-adapters").raise_for_status().json()
        except (httpx.HTTPError, ValueError) as error:
            raise EngineUnavailable(f"no llama.cpp server answers at {self._url} ({error})") from None
        mine = [row["id"] for row in there if lora is not None and Path(row["path"]).name == lora.name]
        if lora is not None and not mine:
            raise VersionError(
                f"the llama.cpp server at {self._url} was not started with version {version.name}; "
                f"restart it with --lora {lora}, or leave local.url out to have one started for each version"
            )
        # Every other adapter is switched off in each request.
        loras = [{"id": row["id"], "scale": 1.0 if row["id"] in mine[:1] else 0.0} for row in there]
        completer = _Completer(client, loras, version.task)
        framed = Framed.of(version, frame, completer.frame)
        return _Served(framed, completer, client, lora.stat().st_size if lora else 0)


def _gguf(base: BaseModel) -> Path:
    if base.gguf is None:
        problem = Problem(
            "local.base_model",
            f"{base.name!r} comes with no GGUF file, and llama.cpp reads nothing else.",
            "Give the .gguf file itself.",
        )
        raise ConfigError("local.base_model", [problem])
    return base.gguf


def _client(url: str, key: str | None = None) -> httpx.Client:
    return httpx.Client(
        base_url=url,
        headers={"authorization": f"Bearer {key}"} if key else {},
        limits=httpx.Limits(max_connections=64, max_keepalive_connections=64),
        trust_env=key is None,  # a proxy from the environment does not reach this machine's loopback
    )


def _answers(url: str, *, own: bool) -> bool:
    """Asked over a connection of its own: the client's may all be waiting for a server that hangs."""
    try:
        return httpx.get(f"{url}/health", timeout=5.0, trust_env=not own).status_code == 200
    except httpx.HTTPError:
        return False


def _has_ended(served: _Served) -> bool:
    return served.process is not None and served.process.poll() is not None


def _is_well(served: _Served) -> bool:
    url = str(served.client.base_url).rstrip("/")
    return not _has_ended(served) and _answers(url, own=served.process is not None)


def _start(wanted: Mapping[str, Any], version: str) -> tuple[subprocess.Popen[str], str]:
    """A server's process and its address. Raises `VersionError`."""
    process = subprocess.Popen(
        [sys.executable, str(Path(llama_server.__file__))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # llama.cpp computes with OpenMP. Two servers whose threads spin while they wait for each other, on the same
        # cores, get a fifth of the work done (measured during swaps).
        env={"OMP_WAIT_POLICY": "PASSIVE", **child_environment(os.environ)},
        start_new_session=True,  # an interrupt at the keyboard is this process's to handle
    )
    assert process.stdin is not None
    assert process.stdout is not None
    too_long = threading.Timer(_CALM_S, process.kill)
    too_long.start()
    try:
        process.stdin.write(json.dumps(wanted) + "\n")
        process.stdin.flush()
        told = json.loads(process.stdout.readline() or "{}")
    except (OSError, ValueError):
        told = {}
    finally:
        too_long.cancel()
    if "address" not in told:
        _end(process)
        why = told.get("error") or f"its process ended with {process.returncode}"
        raise VersionError(
            f"llama.cpp cannot start with version {version} ({why}); check the files and the free memory"
        )
    return process, told["address"]


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(_PARTING_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def _stop(served: _Served) -> None:
    served.client.close()
    if served.process is not None:
        _end(served.process)


REGISTERED = LlamaCppEngine
