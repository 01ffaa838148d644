"""A fine-tuned model that its vendor serves: OpenAI's fine-tunes, over Chat Completions.

It is "local" in that it learnt from the frontier model and costs less; the version's ``remote_model`` names it. It
is asked as it was trained: the compact prompt as the user's turn, the answer as JSON. Its calls cost money, which goes
through the same account, under the same caps and at the same prices as the remote's; in the ledger and in reports its
provider is `openai hosted`. A model without a known price is refused at load.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import httpx

from apprentice.errors import BudgetExceeded, ConfigError, EngineUnavailable, OutputError, Problem, VersionError
from apprentice.local.drained import Drained
from apprentice.local.engine import EnginePlugin, EngineSetup, Health, LoadedVersion, LocalAnswer, Version
from apprentice.local.served import ask_all, refusal
from apprentice.local.skeleton import Skeleton
from apprentice.local.whole import field_confidence
from apprentice.money.budget import Budget, PaidCall
from apprentice.remote.answers import fit
from apprentice.remote.dialects import strict
from apprentice.remote.failures import of_exception, of_response
from apprentice.remote.pricing import PriceList, check_price
from apprentice.remote.provider import Completion
from apprentice.remote.providers.openai import read_chat
from apprentice.remote.transport import Response
from apprentice.schemas.schema import SchemaError, compact_json
from apprentice.secrets import register
from apprentice.settings.config import ProviderSettings, read_key
from apprentice.store import Usage

__all__ = ["HostedEngine"]

_PROVIDER = "openai hosted"
_VENDORS_OWN_TOKENS = 1024  # that the vendor adds to a request, at most
_AT_ONCE = 16
_CALM_S = 120.0


@dataclass(frozen=True, slots=True)
class _Loaded:
    version: Version
    skeleton: Skeleton
    prices: PriceList
    body: Mapping[str, Any]


class HostedEngine(EnginePlugin):
    """See the module.

    ``budget`` pays. ``key_env`` names the environment variable of the key; ``transport`` replaces the network.
    """

    keeps_models = True
    is_paid = True

    @classmethod
    def configured(cls, setup: EngineSetup, options: Any) -> HostedEngine:
        assert setup.budget is not None, "build_engine makes sure of it for what is paid"
        settings = setup.settings
        url = settings.url or "https://api.openai.com/v1"
        return cls(setup.budget, url=url, key_env=settings.api_key_env, max_new_tokens=settings.max_new_tokens)

    def __init__(
        self,
        budget: Budget,
        *,
        url: str = "https://api.openai.com/v1",
        key_env: str = "OPENAI_API_KEY",
        max_new_tokens: int = 512,
        environ: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.time,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._budget = budget
        self._url, self._key_env, self._environ = url, key_env, environ
        self._key = environ.get(key_env, "").strip()
        register(self._key)
        self._max_new_tokens = max_new_tokens
        self._clock = clock
        self._client = httpx.Client(
            base_url=url,
            # A key that no header can hold is told at load, by its variable's name.
            headers={"authorization": f"Bearer {self._key}"} if self._key.isascii() else {},
            transport=transport,
            timeout=_CALM_S,
        )
        self._versions: Drained[_Loaded] = Drained("hosted")

    def load(self, version: Version) -> None:
        """Make sure that there is a key and a price. Raises `ConfigError`, `VersionError`."""
        if version.remote_model is None:
            raise VersionError(
                f"version {version.name} lies in {version.adapter} and is not hosted; set local.backend to an engine "
                "that serves adapters, or local.fine_tune_backend to openai"
            )
        read_key(self._key_env, self._environ, "local.api_key_env")
        settings = ProviderSettings(
            provider="openai", model=version.remote_model, api_key_env=self._key_env, base_url=self._url
        )
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
        """Answer one input, for money. Raises `BudgetExceeded` too, where a cap leaves no room for it."""
        ends_at = time.monotonic() + deadline_s
        with self._versions.using(version) as held:
            model = str(held.version.remote_model)
            messages = [{"role": "user", "content": held.version.prompt(value)}]
            content = compact_json({**held.body, "messages": messages}).encode("utf-8", "replace")
            prices = held.prices.now()
            worst = prices.worst(len(content) + _VENDORS_OWN_TOKENS, self._max_new_tokens)
            with self._budget.account(held.version.task, uuid.uuid4().hex) as account:
                with account.call(_PROVIDER, model, worst, wait_s=deadline_s / 2) as call:
                    reply = self._send(call, content, ends_at, held.version.task)
                    completion, tokens = _read(reply)
                    usage = completion.usage
                    if usage is not None and (usage.output or not completion.text):
                        call.settle(prices.cost(usage), usage)
                return self._answer(held, completion, tokens, account.cost)

    def _send(self, call: PaidCall, content: bytes, ends_at: float, task: str) -> Any:
        """The reply's JSON; raises as `served.post` does. ``call`` is told what was sent and what was not billed."""
        left_s = ends_at - time.monotonic()
        if left_s <= 0:
            raise EngineUnavailable("OpenAI was not asked: there was no time left before the deadline")
        call.sent()
        try:
            headers = {"content-type": "application/json"}
            response = self._client.post("chat/completions", content=content, headers=headers, timeout=left_s)
        except httpx.HTTPError as error:
            failure = of_exception(error)
            if not failure.billed:
                call.free()
            raise EngineUnavailable(f"OpenAI does not answer ({failure.message})") from None
        if response.status_code != 200:
            answer = Response(response.status_code, response.content)
            if not of_response(answer, self._clock()).billed:
                call.free()
            raise refusal("OpenAI", response, task)
        try:
            return response.json()
        except (ValueError, RecursionError):
            raise EngineUnavailable("OpenAI answered with something that is not JSON; is local.url right?") from None

    def answer_many(self, version: str, values: Sequence[Mapping[str, Any]]) -> list[LocalAnswer | Exception]:
        """Several at once. Raises `BudgetExceeded` where the caps do not pay for all of them: that is no answer."""
        answers = ask_all(lambda value: self.answer(version, value, deadline_s=_CALM_S), values, _AT_ONCE)
        for answer in answers:
            if isinstance(answer, BudgetExceeded):
                raise answer
        return answers

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

    def _answer(
        self, held: _Loaded, completion: Completion, tokens: list[tuple[str, float]] | None, cost: Decimal
    ) -> LocalAnswer:
        version = held.version
        if completion.stop == "refusal":
            declined = Problem("answer", f"the model declined to give one (it stopped with {completion.reason}).")
            raise OutputError(version.task, "the hosted model", [declined])
        try:
            output = fit(completion, version.output_schema, self._max_new_tokens, version.task)
        except SchemaError as error:
            raise OutputError(version.task, "the hosted model", error.problems) from None
        fields = field_confidence(held.skeleton, output, tokens)
        counted = completion.usage or Usage()
        return LocalAnswer(
            output=output,
            confidence=min(fields.values(), default=1.0),
            field_confidence=fields,
            version=version.name,
            prompt_tokens=counted.input,
            answer_tokens=counted.output,
            cost=cost,
        )


def _read(reply: Any) -> tuple[Completion, list[tuple[str, float]] | None]:
    """What is in a reply, which is foreign: whatever is wrong with it is a failure of the engine."""
    try:
        return read_chat(reply), _probabilities(reply["choices"][0])
    except Exception as error:  # noqa: BLE001  # whatever reading it raises, there is no answer in it
        raise EngineUnavailable(f"OpenAI's reply holds no answer ({type(error).__name__}: {error})") from None


def _probabilities(choice: Mapping[str, Any]) -> list[tuple[str, float]] | None:
    """Each token's text and natural log-probability; None where the vendor gives none that are any."""
    rows = (choice.get("logprobs") or {}).get("content")
    tokens = [(str(row["token"]), float(row["logprob"])) for row in rows or ()]
    return tokens if tokens and all(logprob <= 0.0 for _, logprob in tokens) else None


REGISTERED = HostedEngine
