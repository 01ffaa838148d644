"""A fine-tuned model that its vendor serves: OpenAI's fine-tunes, over Chat Completions.

It is "local" in that it learnt from the frontier model and costs less; the version's ``remote_model`` names it. It
is asked as it was trained: the compact prompt as the user's turn, the answer as JSON. Its calls cost money; `spent`
adds that up, at the prices that the remote's are priced with, and a model without a known price is refused at load.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import httpx

from apprentice.config import ProviderSettings
from apprentice.errors import ConfigError, EngineUnavailable, OutputError, Problem, VersionError
from apprentice.local.drained import Drained
from apprentice.local.engine import Health, LoadedVersion, LocalAnswer, Version
from apprentice.local.served import ask_all, post
from apprentice.local.skeleton import Skeleton
from apprentice.local.whole import field_confidence
from apprentice.remote.answers import fit
from apprentice.remote.dialects import strict
from apprentice.remote.openai import read_chat
from apprentice.remote.pricing import PriceList, check_price
from apprentice.schema import SchemaError
from apprentice.store import Usage

__all__ = ["HostedEngine"]

_AT_ONCE = 16
_CALM_S = 120.0


@dataclass(frozen=True, slots=True)
class _Loaded:
    version: Version
    skeleton: Skeleton
    prices: PriceList
    body: Mapping[str, Any]


class HostedEngine:
    """See the module. The key is in the environment variable OPENAI_API_KEY; ``transport`` replaces the network."""

    def __init__(
        self,
        *,
        url: str = "https://api.openai.com/v1",
        max_new_tokens: int = 512,
        environ: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.time,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._key = environ.get("OPENAI_API_KEY", "")
        self._max_new_tokens = max_new_tokens
        self._clock = clock
        self._client = httpx.Client(
            base_url=url, headers={"authorization": f"Bearer {self._key}"}, transport=transport, timeout=_CALM_S
        )
        self._versions: Drained[_Loaded] = Drained("hosted")
        self._lock = threading.Lock()
        self._spent = Decimal(0)
        self._refused: str | None = None

    @property
    def spent(self) -> Decimal:
        """USD that this process's answers have cost."""
        return self._spent

    def load(self, version: Version) -> None:
        """Make sure that there is a key and a price. Raises `ConfigError`, `VersionError`."""
        if version.remote_model is None:
            raise VersionError(
                f"version {version.name} lies in {version.adapter} and is not hosted; set local.backend to an engine "
                "that serves adapters, or local.fine_tune_backend to openai"
            )
        if not self._key:
            problem = Problem("local.backend", "hosted needs the key in OPENAI_API_KEY.", "Set it and start again.")
            raise ConfigError("local.backend", [problem])
        settings = ProviderSettings(provider="openai", model=version.remote_model, api_key_env="OPENAI_API_KEY")
        problems = check_price(settings, "local", self._clock())
        if problems:
            raise ConfigError("local", problems)
        skeleton = Skeleton.of(version.output_schema)
        schema = strict(version.output_schema.json_schema)
        form = (
            {"type": "json_object"}
            if schema is None
            else {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
        )
        body = {
            "model": version.remote_model,
            "response_format": form,
            "temperature": 0,
            "max_completion_tokens": self._max_new_tokens,
            "logprobs": True,
        }
        self._versions.put(version.name, _Loaded(version, skeleton, PriceList(settings, self._clock), body))

    def answer(self, version: str, value: Mapping[str, Any], *, deadline_s: float) -> LocalAnswer:
        """Answer one input, for money."""
        ends_at = time.monotonic() + deadline_s
        with self._versions.using(version) as held:
            messages = [{"role": "user", "content": held.version.prompt(value)}]
            reply = post(self._client, "OpenAI", "chat/completions", {**held.body, "messages": messages}, ends_at)
        return self._read(held, reply)

    def answer_many(self, version: str, values: Sequence[Mapping[str, Any]]) -> list[LocalAnswer | Exception]:
        """Several at once."""
        return ask_all(lambda value: self.answer(version, value, deadline_s=_CALM_S), values, _AT_ONCE)

    def unload(self, version: str) -> None:
        """Forget the version once its answers are out; the vendor keeps the model."""
        self._versions.drop(version, lambda _: None)

    def loaded(self) -> list[LoadedVersion]:
        """What may be asked; it takes no memory here."""
        return [LoadedVersion(name, held.version.task, 0) for name, held in self._versions.all().items()]

    def health(self) -> Health:
        """Open or closed: asking the vendor whether it is well would be a request like any other."""
        return Health(not self._versions.closed)

    def close(self) -> None:
        """Close the connections."""
        self._versions.close()
        self._client.close()

    def _read(self, held: _Loaded, reply: Any) -> LocalAnswer:
        """The answer in a reply, which is foreign: whatever is wrong with it is a failure of the engine."""
        try:
            completion = read_chat(reply)
            tokens = _probabilities(reply["choices"][0])
        except Exception as error:  # noqa: BLE001  # whatever reading it raises, there is no answer in it
            raise EngineUnavailable(f"OpenAI's reply holds no answer ({type(error).__name__}: {error})") from None
        counted = completion.usage or Usage()
        with self._lock:
            self._spent += held.prices.now().cost(counted)
        version = held.version
        if completion.stop == "refusal":
            declined = Problem("answer", f"the model declined to give one (it stopped with {completion.reason}).")
            raise OutputError(version.task, "the hosted model", [declined])
        try:
            output = fit(completion, version.output_schema, self._max_new_tokens, version.task)
        except SchemaError as error:
            raise OutputError(version.task, "the hosted model", error.problems) from None
        fields = field_confidence(held.skeleton, output, tokens)
        return LocalAnswer(
            output=output,
            confidence=min(fields.values(), default=1.0),
            field_confidence=fields,
            version=version.name,
            prompt_tokens=counted.input,
            answer_tokens=counted.output,
        )


def _probabilities(choice: Mapping[str, Any]) -> list[tuple[str, float]] | None:
    """Each token's text and natural log-probability; None where the vendor gives none that are any."""
    rows = (choice.get("logprobs") or {}).get("content")
    tokens = [(str(row["token"]), float(row["logprob"])) for row in rows or ()]
    return tokens if tokens and all(logprob <= 0.0 for _, logprob in tokens) else None
