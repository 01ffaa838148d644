"""A running vLLM server: adapters loaded at run time, decisions by allowed tokens and grammars, log-probabilities.

Start it with ``--enable-lora`` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, on a machine that sees ``local.model_dir``
under the same path. A version's name is its content hash, so the server's prefix cache, which goes by name, is never
stale. Several processes may share the server: an adapter is unloaded by the last that used it (`leases`).
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from apprentice.errors import ApprenticeError, ConfigError, EngineUnavailable, Problem, VersionError
from apprentice.local.adapter import check_adapter
from apprentice.local.base_model import resolve_base_model
from apprentice.local.drained import Drained
from apprentice.local.engine import EnginePlugin, EngineSetup, Health, LoadedVersion, LocalAnswer, Version
from apprentice.local.frame import Frame
from apprentice.local.grammar import gbnf
from apprentice.local.leases import Alone, Leases
from apprentice.local.served import Courtesy, Framed, Pieces, Written, answer_by, post, refusal
from apprentice.local.skeleton import Free
from apprentice.secrets import logger

__all__ = ["VllmEngine"]

_log = logger(__name__)

_AT_ONCE = 64
_CALM_S = 600.0
_LOAD_S = 120.0
_MOST_LOGPROBS = 20
"""vLLM's default --max-logprobs."""
_OPENERS = re.compile(r"(?<=<)(?=[|｜/\w])|(?<=\[)(?=/?\w)")
"""Behind the first character of what may be a special token: <|im_end|>, <｜end▁of▁sentence｜>, </s>, [INST]."""


class _Completer:
    """The server with one model name: an adapter's, or the base's."""

    def __init__(self, client: httpx.Client, model: str, task: str) -> None:
        self._client = client
        self._model = model
        self._task = task
        self.pieces = Pieces(self.encode)

    def encode(self, text: str, ends_at: float) -> tuple[int, ...]:
        """Tokenise; the text of a special token means its letters."""
        # The server takes it for the token. Cut in two, it is letters again.
        return tuple(token for part in _OPENERS.split(text) for token in self._tokens(part, ends_at))

    def frame(self, text: str) -> tuple[int, ...]:
        """Tokenise; the text of a special token means the token."""
        return self._tokens(text, time.monotonic() + _CALM_S)

    def _tokens(self, text: str, ends_at: float) -> tuple[int, ...]:
        if not text:
            return ()
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        return tuple(self._post("/tokenize", body, ends_at)["tokens"])

    def scores(self, tokens: Sequence[int], only: Sequence[int], ends_at: float) -> list[float]:
        """The server decides among the allowed tokens and names the likeliest of all.

        An allowed token that is not among those is less likely than the last of them, and counted as likely as that.
        """
        choice = self._complete(
            tokens,
            ends_at,
            max_tokens=1,
            logprobs=_MOST_LOGPROBS,
            allowed_token_ids=list(only),
            return_tokens_as_token_ids=True,
        )
        (top,) = choice["logprobs"]["top_logprobs"]
        known = {int(name.removeprefix("token_id:")): logprob for name, logprob in top.items()}
        decided = int(choice["logprobs"]["tokens"][0].removeprefix("token_id:"))
        least = min(known.values())
        scores = [known.get(token, least) for token in only]
        # What the server decided stands, also where rounding made another as likely.
        scores[list(only).index(decided)] = max(*scores, known.get(decided, least))
        return scores

    def write(self, tokens: Sequence[int], free: Free, most: int, ends_at: float) -> Written:
        """Greedy, under the grammar."""
        choice = self._complete(
            tokens,
            ends_at,
            max_tokens=most,
            logprobs=0,
            structured_outputs={"grammar": gbnf(free.grammar)},
            return_tokens_as_token_ids=True,
        )
        ids = [int(name.removeprefix("token_id:")) for name in choice["logprobs"]["tokens"]]
        logprobs = choice["logprobs"]["token_logprobs"]
        if choice["finish_reason"] == "stop":
            # The last token ended the turn; it has no text.
            ids, logprobs = ids[:-1], logprobs[:-1]
        return Written(ids, choice["text"].encode(), math.exp(sum(logprobs)))

    def _complete(self, tokens: Sequence[int], ends_at: float, **wanted: Any) -> Any:
        body = {"model": self._model, "prompt": list(tokens), "temperature": 0.0, **wanted}
        return self._post("/v1/completions", body, ends_at)["choices"][0]

    def _post(self, path: str, body: Mapping[str, Any], ends_at: float) -> Any:
        return post(self._client, "vLLM", path, body, ends_at, task=self._task)


@dataclass(frozen=True, slots=True)
class _Loaded:
    framed: Framed
    completer: _Completer


class VllmEngine(EnginePlugin):
    """See the module. ``leases`` know who else uses the server; ``transport`` replaces the network in tests."""

    default_url = "http://127.0.0.1:8000"

    @classmethod
    def configured(cls, setup: EngineSetup, options: Any) -> VllmEngine:
        settings = setup.settings
        url = settings.url or cls.default_url
        return cls(
            settings.base_model, setup.root, url=url, max_new_tokens=settings.max_new_tokens, leases=setup.leases
        )

    def __init__(
        self,
        base_model: str,
        root: Path,
        *,
        url: str,
        max_new_tokens: int = 512,
        leases: Leases | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._base_model = base_model
        self._root = root
        self._url = url.rstrip("/").removesuffix("/v1")
        self._max_new_tokens = max_new_tokens
        limits = httpx.Limits(max_connections=2 * _AT_ONCE, max_keepalive_connections=_AT_ONCE)
        self._client = httpx.Client(base_url=self._url, limits=limits, transport=transport)
        self._versions: Drained[_Loaded] = Drained("vllm")
        self._courtesy = Courtesy(_AT_ONCE)
        self._leases = leases or Alone()
        self._changing = threading.Lock()

    def load(self, version: Version) -> None:
        """Load the adapter into the server, unless the server has it."""
        with self._changing:
            if version.adapter is None:
                if self._versions.get(version.name) is None:
                    self._put(version, self._own_frame(), self._models()[0])
                return
            base = resolve_base_model(self._base_model, self._root, dequantise=False)
            check_adapter(version.adapter, base, version.name)
            frame = Frame.load(version.adapter)
            with self._leases.changing(self._url, version.name):
                self._bring_in(version, frame)
            self._tidy()

    def _bring_in(self, version: Version, frame: Frame) -> None:
        # First the lease: from here on nobody else unloads it.
        self._leases.hold(self._url, version.name, loaded=False)
        try:
            there = version.name in self._models()
            if not there and self._load_adapter(version):
                self._leases.hold(self._url, version.name, loaded=True)
            if not there or self._versions.get(version.name) is None:
                self._put(version, frame, version.name)
        except BaseException:
            with contextlib.suppress(ApprenticeError):
                self._end_lease(version.name)
            raise

    def _put(self, version: Version, frame: Frame, model: str) -> None:
        completer = _Completer(self._client, model, version.task)
        self._versions.put(version.name, _Loaded(Framed.of(version, frame, completer.frame), completer))

    def answer(self, version: str, value: Mapping[str, Any], *, deadline_s: float) -> LocalAnswer:
        """Answer one input."""
        with self._courtesy.caller():
            return self._answer(version, value, time.monotonic() + deadline_s)

    def answer_many(self, version: str, values: Sequence[Mapping[str, Any]]) -> list[LocalAnswer | Exception]:
        """Many at once, since the server batches them; few while callers wait."""
        return self._courtesy.ask_all(lambda value: self._answer(version, value, time.monotonic() + _CALM_S), values)

    def _answer(self, version: str, value: Mapping[str, Any], ends_at: float) -> LocalAnswer:
        with self._versions.using(version) as loaded:
            return answer_by(loaded.completer, loaded.framed, value, self._max_new_tokens, ends_at)

    def unload(self, version: str) -> None:
        """Use the adapter no longer once its answers are out; the last who used it takes it out of the server."""
        self._versions.drop(version, self._leave)

    def loaded(self) -> list[LoadedVersion]:
        """What was loaded here; the server does not tell sizes."""
        return [LoadedVersion(name, held.framed.version.task, None) for name, held in self._versions.all().items()]

    def health(self) -> Health:
        """Whether the server answers."""
        try:
            status = self._client.get("/health", timeout=5.0).status_code
        except httpx.HTTPError as error:
            return Health(False, f"no vLLM server answers at {self._url} ({error})")
        return Health(status == 200 and not self._versions.closed, "" if status == 200 else f"vLLM answers {status}")

    def close(self) -> None:
        """Let go of every version; the server goes on running, with what others use."""
        for held in self._versions.close():
            try:
                self._leave(held)
            except ApprenticeError as error:
                _log.warning("closing the vllm engine: %s", error)
        self._leases.close()
        self._client.close()

    def _leave(self, held: _Loaded) -> None:
        version = held.framed.version
        if version.adapter is None:
            return
        with self._changing:
            if self._versions.get(version.name) is None:  # else it was loaded again meanwhile
                self._let_go(version.name)

    def _let_go(self, name: str) -> None:
        with self._leases.changing(self._url, name):
            self._end_lease(name)

    def _end_lease(self, name: str) -> None:
        """Unload the version if that was the last lease on it. Nobody else may be changing it."""
        if self._leases.release(self._url, name):
            try:
                self._unload_adapter(name)
            except EngineUnavailable:
                self._leases.abandon(self._url, name)
                raise

    def _tidy(self) -> None:
        """Unload what processes that died have left in the server."""
        try:
            for name in self._leases.abandoned(self._url):
                _log.info("unloading version %s, whose users have died", name)
                self._let_go(name)
        except ApprenticeError as error:  # the version that was asked for is loaded all the same
            _log.warning("cannot tidy up the vLLM server: %s", error)

    def _models(self) -> list[str]:
        """The names the server answers to, the base model's first."""
        try:
            rows = self._client.get("/v1/models", timeout=10.0).raise_for_status().json()["data"]
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise EngineUnavailable(f"no vLLM server answers at {self._url} ({error}); is it running?") from None
        return sorted(
            (row["id"] for row in rows), key=lambda name: any(r["id"] == name and r.get("parent") for r in rows)
        )

    def _load_adapter(self, version: Version) -> bool:
        """Whether it was this request that loaded it."""
        body = {"lora_name": version.name, "lora_path": str(version.adapter)}
        try:
            response = self._client.post("/v1/load_lora_adapter", json=body, timeout=_LOAD_S)
        except httpx.HTTPError as error:
            raise EngineUnavailable(f"vLLM at {self._url} does not answer ({error})") from None
        if response.status_code == 404 and "Not Found" in response.text:
            problem = Problem(
                "local.url",
                f"the vLLM server at {self._url} loads no adapters at run time.",
                "Start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True.",
            )
            raise ConfigError("local.url", [problem])
        if "already been loaded" in response.text:
            return False
        if response.status_code in (401, 403):
            raise refusal("vLLM", response)
        if response.status_code != 200:
            raise VersionError(
                f"vLLM refuses version {version.name} at {version.adapter} ({response.text[:300]}); "
                "does it see that folder, and is its --max-lora-rank large enough?"
            )
        return True

    def _unload_adapter(self, name: str) -> None:
        """Raises `EngineUnavailable` if it is not known whether the adapter is still there."""
        try:
            response = self._client.post("/v1/unload_lora_adapter", json={"lora_name": name}, timeout=30.0)
        except httpx.ConnectError:
            return  # the server is gone, and with it the adapter
        except httpx.HTTPError as error:
            raise EngineUnavailable(f"vLLM at {self._url} does not say whether it unloaded {name} ({error})") from None
        if response.status_code not in (200, 404):
            raise EngineUnavailable(f"vLLM does not unload {name} ({response.status_code} {response.text[:200]})")

    def _own_frame(self) -> Frame:
        from apprentice.local.base_model import load_tokenizer

        return Frame.of_tokenizer(load_tokenizer(resolve_base_model(self._base_model, self._root)))


REGISTERED = VllmEngine
