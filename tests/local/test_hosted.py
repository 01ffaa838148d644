"""A fine-tuned model served by its vendor."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import httpx
import pytest

from apprentice.errors import ApprenticeError, BudgetExceeded, ConfigError, EngineUnavailable, OutputError, VersionError
from apprentice.local.engine import Version
from apprentice.local.engines.hosted import HostedEngine
from apprentice.money.budget import Budget
from apprentice.schemas.schema import parse_schema
from apprentice.settings.config import BudgetSettings
from apprentice.store import Store

SCHEMA = parse_schema({"label": "a | b", "note": "str?"})
MODEL = "ft:gpt-4o-mini-2024-07-18:team::abc"
VERSION = Version("v1", "t", None, SCHEMA, remote_model=MODEL)


class Vendor:
    """Answers as Chat Completions does."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.status = 200
        self.usage: dict[str, int] | None = {"prompt_tokens": 1000, "completion_tokens": 10}
        self.body: str | None = None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == "Bearer key"
        assert request.url.path == "/v1/chat/completions"
        self.asked.append(json.loads(request.content))
        if self.status != 200:
            return httpx.Response(self.status, json={"error": {"message": "no"}})
        if self.body is not None:
            return httpx.Response(200, content=self.body)
        tokens = [('{"', 0.0), ("label", 0.0), ('":"', 0.0), ("b", math.log(0.8)), ('","', 0.0), ('note":null}', 0.0)]
        return httpx.Response(
            200,
            json={
                "choices": [
                    {
                        "message": {"content": "".join(t for t, _ in tokens)},
                        "logprobs": {"content": [{"token": t, "logprob": p} for t, p in tokens]},
                    }
                ],
                "usage": self.usage,
            },
        )


@pytest.fixture
def vendor() -> Vendor:
    return Vendor()


@pytest.fixture
def budget() -> Iterator[Budget]:
    with Store.open("sqlite://") as store:
        yield Budget(store, BudgetSettings(daily=Decimal("0.05")))


@pytest.fixture
def engine(vendor: Vendor, budget: Budget) -> Iterator[HostedEngine]:
    engine = HostedEngine(budget, environ={"OPENAI_API_KEY": "key"}, transport=httpx.MockTransport(vendor))
    yield engine
    engine.close()


def test_it_is_asked_as_it_was_trained_and_priced(engine: HostedEngine, vendor: Vendor, budget: Budget) -> None:
    """The compact prompt alone, under the vendor's own schema; what it cost is added up."""
    engine.load(VERSION)
    answer = engine.answer("v1", {"text": "hello"}, deadline_s=5)
    assert answer.output == {"label": "b", "note": None}
    assert answer.field_confidence["label"] == pytest.approx(0.8)
    (body,) = vendor.asked
    assert body["model"] == MODEL
    assert body["messages"] == [{"role": "user", "content": "hello"}]
    assert body["response_format"]["json_schema"]["strict"] is True
    assert answer.cost
    (cap,) = budget.remaining()
    assert (cap.spent, cap.reserved) == (answer.cost, 0)


def test_a_version_that_is_not_hosted_is_refused(engine: HostedEngine) -> None:
    """An adapter on disk cannot be sent to a vendor."""
    with pytest.raises(VersionError, match="is not hosted"):
        engine.load(Version("v2", "t", None, SCHEMA))


def test_a_missing_key_or_price_is_found_at_load(vendor: Vendor, budget: Budget) -> None:
    """Neither waits for the first request; an unknown price is never zero."""
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        HostedEngine(budget, environ={}, transport=httpx.MockTransport(vendor)).load(VERSION)
    engine = HostedEngine(budget, environ={"OPENAI_API_KEY": "key"}, transport=httpx.MockTransport(vendor))
    with pytest.raises(ConfigError, match="price"):
        engine.load(Version("v3", "t", None, SCHEMA, remote_model="no-such-model"))


def test_a_vendor_that_fails_is_unavailable_and_its_key_stays_secret(engine: HostedEngine, vendor: Vendor) -> None:
    """The breaker in front counts it; the message does not hold the key."""
    engine.load(VERSION)
    vendor.status = 500
    with pytest.raises(EngineUnavailable) as caught:
        engine.answer("v1", {"text": "hello"}, deadline_s=5)
    assert "Bearer" not in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        "[" * 100_000,
        "null",
        "[]",
        '{"choices": 5}',
        '{"choices": [{"message": {"content": {"label": "a"}}}]}',
        '{"choices": [{"message": {"content": "{}"}, "logprobs": {"content": [5]}}]}',
        '{"error": {"message": "later", "code": 429}}',
        '{"choices": [{"error": {"message": "later"}, "message": {"content": "{}"}}]}',
    ],
)
def test_a_reply_that_its_api_does_not_describe(engine: HostedEngine, vendor: Vendor, body: str) -> None:
    """It is a failure of the engine, so that the remote answers."""
    engine.load(VERSION)
    vendor.body = body
    with pytest.raises(EngineUnavailable):
        engine.answer("v1", {"text": "hello"}, deadline_s=5)


@pytest.mark.parametrize(
    ("message", "finish", "says"),
    [
        ({"content": None, "refusal": "No."}, "stop", "declined"),
        ({"content": ""}, "content_filter", "content_filter"),
        ({"content": ""}, "stop", "is empty"),
        ({"content": '{"lab'}, "length", "cut off"),
        ({"content": '{"label": "c"}'}, "stop", "label"),
        ({"content": '{"label": ' + "[" * 5_000}, "stop", "answer"),
    ],
)
def test_an_answer_that_does_not_fit(
    engine: HostedEngine, vendor: Vendor, message: dict[str, Any], finish: str, says: str
) -> None:
    """It is no answer, and says why, as the remote's are."""
    engine.load(VERSION)
    vendor.body = json.dumps({"choices": [{"message": message, "finish_reason": finish}]})
    with pytest.raises(OutputError, match=says):
        engine.answer("v1", {"text": "hello"}, deadline_s=5)


@pytest.mark.parametrize("logprob", ["NaN", "Infinity", "5", "null", "1e999"])
def test_probabilities_that_are_none(engine: HostedEngine, vendor: Vendor, logprob: str) -> None:
    """They never become a confidence."""
    engine.load(VERSION)
    row = f'{{"token": "x", "logprob": {logprob}}}'
    content = json.dumps('{"label": "a"}')
    vendor.body = f'{{"choices": [{{"message": {{"content": {content}}}, "logprobs": {{"content": [{row}]}}}}]}}'
    try:
        answer = engine.answer("v1", {"text": "hello"}, deadline_s=5)
    except EngineUnavailable:
        return
    assert answer.field_confidence == {"label": 0.5}


def test_a_hosted_model_keeps_the_caps(engine: HostedEngine, vendor: Vendor, budget: Budget) -> None:
    """Its answers are in the ledger under a name of their own; with the cap used up it is not asked any more."""
    engine.load(VERSION)
    vendor.usage = {"prompt_tokens": 1000, "completion_tokens": 500}
    with contextlib.suppress(BudgetExceeded):
        for _ in range(1000):
            engine.answer("v1", {"text": "hello"}, deadline_s=5)
    asked = len(vendor.asked)
    assert 0 < asked < 1000
    (cap,) = budget.remaining()
    (row,) = budget._store.spend()
    assert cap.spent == row.cost <= cap.cap
    assert (row.provider, row.calls, row.is_answering) == ("openai hosted", asked, False)
    with pytest.raises(BudgetExceeded):
        engine.answer_many("v1", [{"text": "hello"}] * 3)


@pytest.mark.parametrize(
    ("usage", "status", "state"),
    [
        ({"prompt_tokens": -5, "completion_tokens": 10}, 200, "lost"),
        ({"prompt_tokens": 5, "completion_tokens": 0}, 200, "lost"),
        (None, 200, "lost"),
        ({}, 504, "lost"),
        ({}, 500, "released"),
        ({}, 429, "released"),
        ({}, 401, "released"),
    ],
)
def test_every_end_of_a_hosted_call_is_accounted_for(
    engine: HostedEngine, vendor: Vendor, budget: Budget, usage: Any, status: int, state: str
) -> None:
    """As for the remote: what the vendor does not say costs the worst case, what it refuses nothing."""
    engine.load(VERSION)
    vendor.usage, vendor.status = usage, status
    with contextlib.suppress(ApprenticeError):
        engine.answer("v1", {"text": "hello"}, deadline_s=5)
    assert [row.state for row in budget._store.spend()] == [state]
    assert budget._store.held() == []


def test_key_and_address_are_configurable(vendor: Vendor, budget: Budget) -> None:
    """Another variable, another address."""

    def elsewhere(request: httpx.Request) -> httpx.Response:
        assert request.url.host == "proxy.invalid"
        return vendor(request)

    environ = {"MY_KEY": "key\n"}
    transport = httpx.MockTransport(elsewhere)
    engine = HostedEngine(budget, url="http://proxy.invalid/v1", key_env="MY_KEY", environ=environ, transport=transport)
    engine.load(VERSION)
    assert engine.answer("v1", {"text": "hello"}, deadline_s=5).output["label"] == "b"
    engine.close()
