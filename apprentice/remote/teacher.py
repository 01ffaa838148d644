"""Asking the remote: which provider, how often, at what price, until there is an answer that fits.

`Teacher.ask` blocks. Sending, sleeping, time and chance are arguments, so a test walks it with no network, no clock and
no sleep. One call of it holds at most one reservation at a time and never returns, or raises, with money unaccounted
for: on success the caller gets the settlements, to commit them together with the example; on failure they are in the
ledger already.
"""

from __future__ import annotations

import json
import logging
import os
import random as random_module
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import httpx

from apprentice.budget import Budget
from apprentice.config import ProviderSettings, RemoteSettings, TaskSettings, require_key
from apprentice.errors import (
    ConfigError,
    OutputError,
    Problem,
    RemoteError,
    RemoteRefused,
    RemoteUnavailable,
)
from apprentice.prompts import remote_system, remote_user
from apprentice.remote.answers import read
from apprentice.remote.anthropic import Anthropic
from apprentice.remote.breaker import Breaker
from apprentice.remote.dialects import without_null_options
from apprentice.remote.failures import Failure, of_exception, of_response
from apprentice.remote.google import Google
from apprentice.remote.limits import Limits
from apprentice.remote.openai import OpenAIChat, OpenAIResponses
from apprentice.remote.pricing import PriceList, check_price
from apprentice.remote.provider import Completion, Prompt, Provider, Turn
from apprentice.schema import SchemaError
from apprentice.store import Reservation, Settlement, Usage
from apprentice.transport import Request, Response, Send

__all__ = ["RemoteAnswer", "Teacher", "make_provider"]

logger = logging.getLogger(__name__)

# Added to the bytes of a request to bound its tokens: what vendors put around it (tool and format instructions).
_VENDORS_OWN_TOKENS = 1024
_BYTES_PER_TOKEN = 3.6  # of English and JSON, on average; for expectations, never for reservations
_TYPICAL_OUTPUT = 40.0  # tokens, until a task's first answer
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 8.0
_SHORTEST_ATTEMPT_S = 0.05


@dataclass(frozen=True, slots=True)
class RemoteAnswer:
    """An answer that fits the schema, and what it cost.

    ``usage`` and ``cost`` are of all its calls together, the repaired and the lost ones included. ``settlements`` say
    how those calls ended: the caller commits them with the example (`Budget.complete_remote`).
    """

    output: dict[str, Any]
    provider: str
    model: str
    usage: Usage
    cost: Decimal
    settlements: tuple[Settlement, ...]
    attempts: int
    latency_ms: float


def make_provider(settings: ProviderSettings, key: str) -> Provider:
    """The provider of a vendor's protocol."""
    match settings.provider:
        case "anthropic":
            return Anthropic(settings.model, key, settings.base_url)
        case "google":
            return Google(settings.model, key, settings.base_url)
        case "openai" if settings.api == "responses":
            return OpenAIResponses(settings.model, key, settings.base_url)
        case name:
            return OpenAIChat(settings.model, key, settings.base_url, name=name)


@dataclass(slots=True)
class _Source:
    """A configured provider with what this process knows of it."""

    settings: ProviderSettings
    key: str = field(repr=False)
    provider: Provider
    price: PriceList
    limits: Limits
    breaker: Breaker
    typical_output: dict[str, float]


@dataclass(slots=True)
class _Account:
    """The money of one `ask`: what is held now, and how what was held before has ended."""

    held: Reservation | None = None
    ended: list[Settlement] = field(default_factory=list)

    def end(self, state: Any, cost: Decimal = Decimal(0), usage: Usage | None = None) -> None:
        if self.held is not None:
            worst = self.held.worst_case
            self.ended.append(Settlement(self.held, state, worst if state == "lost" else cost, usage or Usage()))
            self.held = None


class Teacher:
    """The remote side of one configuration.

    ``send`` carries a request out (`transport.Sender.send`), ``environ`` holds the keys; ``clock`` gives Unix seconds,
    ``monotonic`` seconds for deadlines, ``sleep`` waits for seconds, ``random`` draws back-off and shares. Raises
    `ConfigError` where a key is missing. Thread-safe.
    """

    def __init__(
        self,
        settings: RemoteSettings,
        budget: Budget,
        send: Send,
        environ: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.time,
        random: random_module.Random | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._settings = settings
        self._budget = budget
        self._send = send
        self._sleep = sleep
        self._clock = clock
        self._monotonic = monotonic
        self._random = random or random_module.Random()
        self._prompts: dict[str, tuple[TaskSettings, Prompt]] = {}
        self._sources = []
        for one in settings.providers:
            key = require_key(one, environ)
            limits = Limits(
                requests_per_minute=one.requests_per_minute,
                tokens_per_minute=one.tokens_per_minute,
                max_concurrency=one.max_concurrency,
            )
            source = _Source(one, key, make_provider(one, key), PriceList(one, clock), limits, Breaker(), {})
            self._sources.append(source)

    def __repr__(self) -> str:
        return f"Teacher({', '.join(repr(s.provider) for s in self._sources)})"

    def price_check(self) -> None:
        """Make sure that every model's price is known and plausible. Raises `ConfigError` with all that are not."""
        problems: list[Problem] = []
        for i, one in enumerate(self._settings.providers):
            path = "remote" if i == 0 else f"remote.additional_providers[{i - 1}]"
            problems += check_price(one, path, self._clock())
        if problems:
            raise ConfigError("prices", problems)

    def healthy(self) -> bool:
        """Whether any provider is worth asking: not all of them are being left alone by their circuit breakers."""
        now = self._monotonic()
        return any(source.breaker.allows(now) for source in self._sources)

    def estimate(
        self, task: TaskSettings, value: Mapping[str, Any], output: Mapping[str, Any] | None = None
    ) -> Decimal:
        """What one answer of the first provider may be expected to cost, in USD; no call is made.

        Tokens are estimated from bytes; the answer's from ``output`` where it is known, else from past answers.
        """
        source = self._sources[0]
        request = source.provider.build(self._prompt(task), remote_user(value))
        if output is not None:
            written = len(json.dumps(output, ensure_ascii=False).encode("utf-8", "replace")) / _BYTES_PER_TOKEN
        else:
            written = source.typical_output.get(task.name, _TYPICAL_OUTPUT)
        read = len(request.content) / _BYTES_PER_TOKEN
        return source.price.now().cost(Usage(input=round(read), output=max(round(written), 1)))

    def ask(self, task: TaskSettings, value: Mapping[str, Any], request_id: str) -> RemoteAnswer:
        """Get an answer that fits the task's output schema.

        Raises `BudgetExceeded`, `OutputError`, `RemoteRefused`, `RemoteUnavailable`; the ledger knows of every call.
        """
        account = _Account()
        try:
            return self._ask(task, value, request_id, account)
        except BaseException:
            account.end("lost")  # what is still held was sent, and may be billed
            self._budget.end(account.ended)
            raise

    def _ask(self, task: TaskSettings, value: Mapping[str, Any], request_id: str, account: _Account) -> RemoteAnswer:
        began = self._monotonic()
        ends = began + self._settings.deadline_s
        prompt = self._prompt(task)
        user = remote_user(value)
        tries = _Tries()
        refused: list[RemoteError] = []
        order = self._order()
        for i, source in enumerate(order):
            share = (ends - self._monotonic()) / (len(order) - i)  # leave time for those who come after
            deadline = self._monotonic() + share
            try:
                answer = self._ask_one(source, task, prompt, user, request_id, deadline, account, tries)
            except (RemoteRefused, RemoteUnavailable) as error:
                refused.append(error)
                if len(order) > 1:
                    logger.warning("task %s: %s", task.name, error)
                continue
            latency_ms = (self._monotonic() - began) * 1000
            usage = sum((s.usage for s in account.ended), Usage())
            cost = sum((s.cost for s in account.ended), Decimal(0))
            return RemoteAnswer(
                answer,
                source.provider.name,
                source.settings.model,
                usage,
                cost,
                tuple(account.ended),
                tries.n,
                latency_ms,
            )
        # Where one provider was merely away, a later request may succeed: say that rather than the refusal.
        away = [e for e in refused if isinstance(e, RemoteUnavailable)]
        raise (away or refused)[-1]

    def _ask_one(
        self,
        source: _Source,
        task: TaskSettings,
        prompt: Prompt,
        user: str,
        request_id: str,
        ends: float,
        account: _Account,
        tries: _Tries,
    ) -> dict[str, Any]:
        """One provider's answer, repaired once where it does not fit."""
        turns: list[Turn] = []
        while True:
            completion = self._complete(source, task, prompt, user, turns, request_id, ends, account, tries)
            if completion.stop == "refusal":
                raise OutputError(
                    task.name, source.provider.name, [Problem("answer", "the model declined to give one.")]
                )
            try:
                output = task.output_schema.parse(completion.text)
            except SchemaError as error:
                problems = error.problems
            else:
                return _canonical(task, output)
            if completion.stop == "length":
                cut = f"was cut off at {prompt.max_output_tokens} tokens."
                problems = [Problem("answer", cut, f"Raise max_output_tokens of task {task.name!r}."), *problems]
            if turns or not self._settings.repair:
                raise OutputError(task.name, source.provider.name, problems)
            turns.append(Turn(completion.text, _complaint(problems)))

    def _complete(
        self,
        source: _Source,
        task: TaskSettings,
        prompt: Prompt,
        user: str,
        turns: Sequence[Turn],
        request_id: str,
        ends: float,
        account: _Account,
        tries: _Tries,
    ) -> Completion:
        """One completion of one provider, through as many attempts as it takes and the deadline allows."""
        name, model = source.provider.name, source.settings.model
        request = source.provider.build(prompt, user, turns)
        most_read = len(request.content) + _VENDORS_OWN_TOKENS
        price = source.price.now()
        worst = price.worst(most_read, prompt.max_output_tokens)
        failure = Failure("there was no time for an attempt before the deadline")
        for attempt in range(self._settings.max_retries + 1):
            if (rest := source.breaker.wait_s(self._monotonic())) > 0:
                left_alone = f"is left alone for {rest:.1f} s because it kept failing"
                failure = Failure(f"{left_alone}; the last failure: {failure.message}" if attempt else left_alone)
                break
            if account.held is None:
                account.held = self._budget.standing(task.name, name, model, worst, request_id)
            if account.held is None:
                account.held = self._budget.reserve(task.name, name, model, worst, request_id)
            if not self._wait_for_turn(source, task, request, ends):
                if not attempt:
                    failure = Failure("the rate limit set in apprentice.yaml allows no call before the deadline")
                break
            tries.n += 1
            response, failed = self._attempt(source, request, ends - self._monotonic())
            completion, failed = self._read(source, response) if response is not None else (None, failed)
            now = self._monotonic()
            if completion is not None:
                source.breaker.succeeded()
                self._settle(source, task, account, completion, price)
                return completion
            assert failed is not None
            failure = failed
            if failure.billed:
                account.end("lost")
            if not failure.again:
                break
            if failure.throttled:
                source.limits.pause(now + (failure.after_s or 0.0))
            elif source.breaker.failed(now):
                logger.warning("%s keeps failing (%s); leaving it alone for a while", name, failure.message)
            wait_s = max(failure.after_s or 0.0, self._pause_s(attempt))
            if attempt == self._settings.max_retries or now + wait_s + _SHORTEST_ATTEMPT_S > ends:
                break
            self._sleep(wait_s)
        if account.held is not None:  # give it back now: the next provider's reservation may need the room
            account.end("released")
            unbilled = account.ended.pop()
            self._budget.end([unbilled])
        if failure.again:
            raise RemoteUnavailable(name, failure.message, status=failure.status)
        raise RemoteRefused(name, failure.message, status=failure.status)

    def _attempt(self, source: _Source, request: Request, within_s: float) -> tuple[Response | None, Failure | None]:
        """Send once. The exception is dropped here: it holds the request, and the request holds the key."""
        try:
            response = self._send(request, within_s)
        except httpx.HTTPError as error:
            failure: Failure | None = of_exception(error)
        else:
            failure = of_response(response, self._clock(), source.key)
            return (response, None) if failure is None else (None, failure)
        finally:
            source.limits.release()
        return None, failure

    def _wait_for_turn(self, source: _Source, task: TaskSettings, request: Request, ends: float) -> bool:
        """Wait until the provider's limits allow a call; False where the deadline comes first."""
        tokens = len(request.content) / _BYTES_PER_TOKEN + source.typical_output.get(task.name, _TYPICAL_OUTPUT)
        while True:
            now = self._monotonic()
            wait = source.limits.acquire(tokens, now)
            if wait <= 0:
                return True
            if now + wait + _SHORTEST_ATTEMPT_S > ends:
                return False
            self._sleep(wait)

    def _read(self, source: _Source, response: Response) -> tuple[Completion | None, Failure | None]:
        answer = read(source.provider, response, self._clock(), source.key)
        return (None, answer) if isinstance(answer, Failure) else (answer, None)

    def _settle(
        self, source: _Source, task: TaskSettings, account: _Account, completion: Completion, price: Any
    ) -> None:
        if completion.usage is None:
            account.end("lost")  # the vendor does not say what it bills
            return
        account.end("settled", price.cost(completion.usage), completion.usage)
        typical = source.typical_output
        seen = typical.get(task.name)
        written = completion.usage.output
        typical[task.name] = written if seen is None else seen + 0.05 * (written - seen)

    def _pause_s(self, attempt: int) -> float:
        """How long to wait after an attempt, counted from 0: exponential, with full jitter."""
        return self._random.random() * min(_FIRST_PAUSE_S * 2.0**attempt, _LONGEST_PAUSE_S)

    def _order(self) -> list[_Source]:
        """Whom to ask: as configured, or led by one drawn by weight; those left alone come last."""
        order = list(self._sources)
        if len(order) == 1:
            return order
        if self._settings.use == "share":
            draw = self._random.random() * sum(s.settings.weight for s in order)
            for i, source in enumerate(order):
                draw -= source.settings.weight
                if draw < 0:
                    order.insert(0, order.pop(i))
                    break
        now = self._monotonic()
        return sorted(order, key=lambda s: not s.breaker.allows(now))

    def _prompt(self, task: TaskSettings) -> Prompt:
        known = self._prompts.get(task.name)
        if known is None or known[0] is not task:
            system = remote_system(task.description, task.instructions)
            prompt = Prompt(task.name, system, task.output_schema.json_schema, task.max_output_tokens)
            known = self._prompts[task.name] = (task, prompt)
        return known[1]


@dataclass(slots=True)
class _Tries:
    n: int = 0


def _canonical(task: TaskSettings, output: dict[str, Any]) -> dict[str, Any]:
    kept = without_null_options(task.output_schema.json_schema, output)
    return kept if isinstance(kept, dict) else output


def _complaint(problems: Sequence[Problem]) -> str:
    found = "\n".join(f"- {problem}" for problem in problems)
    return (
        f"That answer does not fit the schema:\n{found}\nAnswer again with one JSON object that does, and nothing else."
    )
