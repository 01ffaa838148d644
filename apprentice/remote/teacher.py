"""Asking the remote: which provider, how often, at what price, until there is an answer that fits.

`Teacher.ask` blocks. Sending, sleeping, time and chance are arguments, so a test walks it with no network, no clock and
no sleep. What it costs goes through the caller's `Account`: every attempt is reserved before it is sent and ended
after, and the caller commits that with the example.
"""

from __future__ import annotations

import json
import math
import os
import random as random_module
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from apprentice import secrets
from apprentice.errors import (
    ApprenticeError,
    BudgetExceeded,
    ConfigError,
    OutputError,
    Problem,
    RemoteError,
    RemoteRefused,
    RemoteUnavailable,
)
from apprentice.money.budget import Account
from apprentice.prompts import remote_system, remote_user
from apprentice.registry import PROVIDERS
from apprentice.remote.answers import bare_json, fit, read
from apprentice.remote.breaker import Breaker
from apprentice.remote.failures import Failure, of_exception
from apprentice.remote.limits import Limits
from apprentice.remote.pricing import PriceList, check_price
from apprentice.remote.provider import FORMATS, Completion, Format, Prompt, Provider, Turn
from apprentice.remote.transport import Request, Send
from apprentice.schemas.schema import SchemaError
from apprentice.settings.config import ProviderSettings, RemoteSettings, TaskSettings, require_key
from apprentice.store import Usage
from apprentice.store.records import ASKED_AGAIN

__all__ = ["RemoteAnswer", "Teacher", "make_provider"]

logger = secrets.logger(__name__)

# Added to the bytes of a request to bound its tokens: what vendors put around it (tool and format instructions).
_VENDORS_OWN_TOKENS = 1024
_BYTES_PER_TOKEN = 3.6  # of English and JSON, on average; for expectations, never for reservations
_TYPICAL_OUTPUT = 40.0  # tokens, until a task's first answer
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 8.0
_SHORTEST_ATTEMPT_S = 0.05
_SHARE_WAITED = 0.8  # of the time that is left, for a cap to have room again; the rest is for the answer


@dataclass(frozen=True, slots=True)
class RemoteAnswer:
    """An answer that fits the schema, and what it cost.

    ``usage`` and ``cost`` (USD) are of all its calls together, the repaired and the lost ones included.
    """

    output: dict[str, Any]
    provider: str
    model: str
    usage: Usage
    cost: Decimal
    attempts: int
    latency_ms: float


def make_provider(settings: ProviderSettings, key: str) -> Provider:
    """The provider that a section names. Raises `RegistryError`."""
    kind = PROVIDERS.find(settings.provider)
    provider: Provider = kind.made.configured(settings, key, PROVIDERS.options(kind, settings.options, "options"))
    return provider


@dataclass(slots=True)
class _Source:
    """A configured provider with what this process knows of it.

    ``label`` names it in messages; ``formats`` holds, by task, how the answer's format is asked for where the vendor
    does not take it as configured.
    """

    settings: ProviderSettings
    label: str
    provider: Provider
    price: PriceList
    limits: Limits
    breaker: Breaker
    typical_output: dict[str, float]
    formats: dict[str, Format]


@dataclass(slots=True)
class _Asking:
    """One `ask`: what is asked, its money, and how often it was sent so far. ``again``: see `Teacher.ask_again`."""

    task: TaskSettings
    user: str
    account: Account
    waits_for_money: bool = True
    attempts: int = 0
    again: bool = False


class Teacher:
    """The remote side of one configuration.

    ``send`` carries a request out (`transport.Sender.send`), ``environ`` holds the keys; ``clock`` gives Unix seconds,
    ``monotonic`` seconds for deadlines, ``sleep`` waits for seconds, ``random`` draws back-off and shares. Raises
    `ConfigError` where a key is missing. Thread-safe.
    """

    def __init__(
        self,
        settings: RemoteSettings,
        send: Send,
        environ: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.time,
        random: random_module.Random | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._settings = settings
        self._send = send
        self._sleep = sleep
        self._clock = clock
        self._monotonic = monotonic
        self._random = random or random_module.Random()
        self._prompts: dict[tuple[str, Format], tuple[TaskSettings, Prompt]] = {}
        self._sources = []
        for one in settings.providers:
            key = require_key(one, environ)
            limits = Limits(
                requests_per_minute=one.requests_per_minute,
                tokens_per_minute=one.tokens_per_minute,
                max_concurrency=one.max_concurrency,
            )
            provider = make_provider(one, key)
            alike = [other for other in settings.providers if other.provider == one.provider]
            label = provider.name if len(alike) == 1 else f"{provider.name} ({one.model})"
            source = _Source(one, label, provider, PriceList(one, clock), limits, Breaker(), {}, {})
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
        request = source.provider.build(self._prompt(task, source.settings.structured_output), remote_user(value))
        if output is not None:
            written = len(json.dumps(output, ensure_ascii=False).encode("utf-8", "replace")) / _BYTES_PER_TOKEN
        else:
            written = source.typical_output.get(task.name, _TYPICAL_OUTPUT)
        read = len(request.content) / _BYTES_PER_TOKEN
        return source.price.now().cost(Usage(input=round(read), output=max(round(written), 1)))

    def ask(self, task: TaskSettings, value: Mapping[str, Any], account: Account) -> RemoteAnswer:
        """Get an answer that fits the task's output schema, paid for through ``account``.

        One provider after the other, until one brings an answer that fits: why another did not is no question. Raises
        `BudgetExceeded`, `OutputError`, `RemoteRefused`, `RemoteUnavailable`.
        """
        began = self._monotonic()
        ends = began + self._settings.deadline_s
        asking = _Asking(task, remote_user(value), account)
        causes: list[ApprenticeError] = []
        order = self._order()
        for i, source in enumerate(order):
            now = self._monotonic()
            others = len(order) - i - 1
            share_s = (ends - now) / (others + 1)  # leave time for those who come after
            # Where a cap is only held, the next provider may cost less; there is none after the last one, which waits.
            asking.waits_for_money = not others
            try:
                output = self._ask_one(asking, source, now + share_s)
            except (RemoteError, OutputError, BudgetExceeded) as error:
                causes.append(error)
                if len(order) > 1:
                    logger.warning("task %s: %s", task.name, error)
                continue
            return RemoteAnswer(
                output=output,
                provider=source.provider.name,
                model=source.settings.model,
                usage=account.usage,
                cost=account.cost,
                attempts=asking.attempts,
                latency_ms=(self._monotonic() - began) * 1000,
            )
        raise _no_answer(task.name, [source.label for source in order], causes)

    def ask_again(
        self, task: TaskSettings, value: Mapping[str, Any], account: Account, *, provider: str, model: str
    ) -> RemoteAnswer:
        """Ask the provider and model that gave an answer for another one to the same input. Nobody waits for it.

        So it gives way to whatever somebody does wait for: it takes no turn where the vendor's limits are in use, waits
        for no money and tries once, and its calls have a name of their own in the ledger (`ASKED_AGAIN`). It asks
        caches on the way for a new answer. Raises what `ask` does, and `RemoteUnavailable` where now is no time for it
        or that model is asked no longer.
        """
        began = self._monotonic()
        source = next(
            (s for s in self._sources if (s.provider.name, s.settings.model) == (provider, model)),
            None,
        )
        if source is None:
            raise RemoteUnavailable(provider, f"{model} is not in apprentice.yaml any more")
        asking = _Asking(task, remote_user(value), account, waits_for_money=False, again=True)
        output = self._ask_one(asking, source, began + self._settings.deadline_s)
        return RemoteAnswer(
            output=output,
            provider=provider,
            model=model,
            usage=account.usage,
            cost=account.cost,
            attempts=asking.attempts,
            latency_ms=(self._monotonic() - began) * 1000,
        )

    def asks(self, provider: str, model: str) -> bool:
        """Whether this configuration asks that model."""
        return any((s.provider.name, s.settings.model) == (provider, model) for s in self._sources)

    def _ask_one(self, asking: _Asking, source: _Source, ends: float) -> dict[str, Any]:
        """One provider's answer, repaired once where it does not fit."""
        task = asking.task
        turns: list[Turn] = []
        while True:
            completion = self._complete_in_a_format(asking, source, turns, ends)
            if completion.stop == "refusal":
                why = f" (it stopped with {completion.reason})" if completion.reason else ""
                declined = Problem("answer", f"the model declined to give one{why}.")
                raise OutputError(task.name, source.label, [declined])
            try:
                return fit(completion, task.output_schema, task.max_output_tokens, task.name)
            except SchemaError as error:
                problems = error.problems
            if turns or not self._settings.repair:
                raise OutputError(task.name, source.label, problems)
            turns.append(Turn(bare_json(completion.text), _complaint(problems)))

    def _complete_in_a_format(self, asking: _Asking, source: _Source, turns: Sequence[Turn], ends: float) -> Completion:
        """A completion in the strictest format that the vendor takes; what it takes is remembered for the task.

        Servers without `json_schema` refuse every request that asks for it, and vendors refuse schemas that are too
        large for them. Then the format is asked for in a weaker way, and our own check of the answer decides alone.
        """
        task = asking.task.name
        strictest = source.formats.get(task, source.settings.structured_output)
        refused: Failure | None = None
        for form in FORMATS[FORMATS.index(strictest) :]:
            answer = self._complete(asking, source, self._prompt(asking.task, form), turns, ends)
            if isinstance(answer, Completion):
                if form != strictest:
                    source.formats[task] = form
                    what = f"{source.label} refuses structured_output: {strictest} for task {task}"
                    logger.warning("%s (%s); asking with %s from now on", what, refused and refused.message, form)
                return answer
            refused = refused or answer
            if not answer.about_format:
                refused = answer
                break
        assert refused is not None
        if not refused.again:
            raise RemoteRefused(source.label, refused.message, status=refused.status)
        now = self._monotonic()
        asked_s, _ = source.limits.paused(now) or (0.0, "")
        rest_s = max(refused.after_s or 0.0, asked_s, source.breaker.rest_s(now))
        raise RemoteUnavailable(source.label, refused.message, status=refused.status, retry_after_s=rest_s or None)

    def _complete(
        self, asking: _Asking, source: _Source, prompt: Prompt, turns: Sequence[Turn], ends: float
    ) -> Completion | Failure:
        """One completion of one provider, through as many attempts as it takes and the deadline allows."""
        request = source.provider.build(prompt, asking.user, turns)
        if asking.again:
            request = replace(request, endpoint=request.endpoint.past_caches)
        failure = Failure("there was no time for an attempt before the deadline")
        most = 0 if asking.again else self._settings.max_retries
        for attempt in range(most + 1):
            if (rest := source.breaker.wait_s(self._monotonic())) > 0:
                left_alone = f"is left alone for {rest:.1f} s because it kept failing"
                failure = Failure(f"{left_alone}; the last failure: {failure.message}" if attempt else left_alone)
                break
            if (in_vain := self._wait_for_turn(asking, source, request, ends)) is not None:
                failure = failure if attempt else in_vain
                break
            try:
                # Reserved after the wait: a queue of calls that may not be made yet must not hold the budget.
                answer = self._attempt(asking, source, prompt, request, ends)
            finally:
                source.limits.leave()
            now = self._monotonic()
            if isinstance(answer, Completion):
                source.breaker.succeeded()
                return answer
            failure = answer
            if not failure.again:
                if failure.status is not None:
                    source.breaker.succeeded()  # it is there, and says no
                break
            if failure.throttled:
                source.limits.pause(now + (failure.after_s or 0.0), failure.message)
            elif source.breaker.failed(now):
                logger.warning("%s keeps failing (%s); leaving it alone for a while", source.label, failure.message)
            wait_s = max(failure.after_s or 0.0, self._pause_s(attempt))
            if attempt == most or now + wait_s + _SHORTEST_ATTEMPT_S > ends:
                break
            self._sleep(wait_s)
        return failure

    def _attempt(
        self, asking: _Asking, source: _Source, prompt: Prompt, request: Request, ends: float
    ) -> Completion | Failure:
        """Send once, and pay for it. Raises `BudgetExceeded` where a cap leaves no room."""
        price = source.price.now()
        worst = price.worst(len(request.content) + _VENDORS_OWN_TOKENS, prompt.max_output_tokens)
        wait_s = _SHARE_WAITED * (ends - self._monotonic()) if asking.waits_for_money else 0.0
        name = source.provider.name + (ASKED_AGAIN if asking.again else "")
        with asking.account.call(name, source.settings.model, worst, wait_s=wait_s) as call:
            asking.attempts += 1
            call.sent()
            answer = self._send_once(source, request, ends - self._monotonic())
            if isinstance(answer, Failure):
                if not answer.billed:
                    call.free()
            elif answer.usage is not None:  # else the vendor does not say what it bills
                call.settle(price.cost(answer.usage), answer.usage)
                self._remember_output(source, asking.task, answer.usage.output)
        return answer

    def _send_once(self, source: _Source, request: Request, within_s: float) -> Completion | Failure:
        """What came back. The exception is dropped here: it holds the request, and the request holds the key."""
        try:
            response = self._send(request, within_s)
        except Exception as error:  # noqa: BLE001  # whatever sending raises, this provider brought no answer
            return of_exception(error)
        return read(source.provider, response, self._clock())

    def _wait_for_turn(self, asking: _Asking, source: _Source, request: Request, ends: float) -> Failure | None:
        """Wait until the provider's limits allow a call; then `Limits.leave` must follow. Else why they do not."""
        limits, settings = source.limits, source.settings
        if not limits.enter(0.0 if asking.again else ends - self._monotonic()):
            return Failure(
                f"all {settings.max_concurrency} calls at once (max_concurrency) were busy until the deadline"
            )
        tokens = len(request.content) / _BYTES_PER_TOKEN + source.typical_output.get(asking.task.name, _TYPICAL_OUTPUT)
        try:
            if asking.again:
                if limits.take_spare(tokens, self._monotonic()):
                    return None
                limits.leave()
                return Failure("its limits are in use for requests that somebody waits for")
            while (wait_s := limits.take(tokens, now := self._monotonic())) > 0:
                if now + wait_s + _SHORTEST_ATTEMPT_S > ends:
                    failure = self._why_not(limits, now, wait_s)
                    limits.leave()
                    return failure
                self._sleep(wait_s)
        except BaseException:
            limits.leave()
            raise
        return None

    def _why_not(self, limits: Limits, now: float, wait_s: float) -> Failure:
        asked = limits.paused(now)
        if asked is None:
            limits_set = "requests_per_minute and tokens_per_minute in apprentice.yaml"
            return Failure(f"{limits_set} leave no room for this call before its deadline", after_s=wait_s)
        rest_s, why = asked
        until = f"{datetime.fromtimestamp(self._clock() + rest_s, UTC):%Y-%m-%d %H:%M:%S} UTC"
        said = f"an earlier request was told to wait until {until} ({why}), so this one was not sent"
        return Failure(said, 429, throttled=True)

    @staticmethod
    def _remember_output(source: _Source, task: TaskSettings, written: int) -> None:
        typical = source.typical_output
        seen = typical.get(task.name)
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

    def _prompt(self, task: TaskSettings, form: Format) -> Prompt:
        known = self._prompts.get((task.name, form))
        if known is None or known[0] is not task:
            system = remote_system(task.description, task.instructions)
            prompt = Prompt(task.name, system, task.output_schema.json_schema, task.max_output_tokens, form)
            known = self._prompts[task.name, form] = (task, prompt)
        return known[1]


def _no_answer(task: str, providers: Sequence[str], causes: Sequence[ApprenticeError]) -> ApprenticeError:
    """What is raised where none of the providers brought an answer: the one cause, or all of them in one error.

    Where one of them was merely away, or held up by a cap, a later request may succeed, and the error says so.
    """
    too_dear = [cause for cause in causes if isinstance(cause, BudgetExceeded)]
    if len(too_dear) == len(causes):
        return min(too_dear, key=lambda e: math.inf if e.retry_after_s is None else e.retry_after_s)
    if len(causes) == 1:
        return causes[0]
    named = ", ".join(providers)
    said = f"none brought an answer: {'; '.join(str(cause) for cause in causes)}"
    if any(isinstance(cause, RemoteUnavailable | BudgetExceeded) for cause in causes):
        known = [cause.retry_after_s for cause in causes if isinstance(cause, RemoteUnavailable | BudgetExceeded)]
        soonest_s = min((after_s for after_s in known if after_s is not None), default=None)
        return RemoteUnavailable(named, said, retry_after_s=soonest_s)
    if any(isinstance(cause, OutputError) for cause in causes):
        return OutputError(task, named, [Problem(name, str(e)) for name, e in zip(providers, causes, strict=True)])
    return RemoteRefused(named, said)


def _complaint(problems: Sequence[Problem]) -> str:
    found = "\n".join(f"- {problem}" for problem in problems)
    return (
        f"That answer does not fit the schema:\n{found}\nAnswer again with one JSON object that does, and nothing else."
    )
