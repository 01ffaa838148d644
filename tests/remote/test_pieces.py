"""The pure pieces of the remote: schema dialects, token buckets, the circuit breaker and prices."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jsonschema_rs
import pytest
from hypothesis import given
from pydantic import BaseModel

from apprentice.remote.answers import fit
from apprentice.remote.breaker import Breaker
from apprentice.remote.dialects import closed, gemini, strict
from apprentice.remote.limits import Bucket, Limits
from apprentice.remote.pricing import PriceList, check_price
from apprentice.remote.provider import Completion
from apprentice.schemas.json_schema import canonical
from apprentice.schemas.schema import parse_schema
from apprentice.settings.config import ProviderSettings
from apprentice.store import Usage
from apprentice.testing.vendors import GoogleProtocol, _walk_closed

NOW = 1_772_366_400.0


def settings(model: str, vendor: str = "anthropic", **more: Any) -> ProviderSettings:
    return ProviderSettings.model_validate({"provider": vendor, "model": model, "api_key_env": "K", **more})


@pytest.mark.parametrize("spec", ["dict", "list", "any", "list[dict]"])
def test_free_form_fields_cannot_be_enforced(spec: str) -> None:
    """No vendor's structured output can say them; the caller then asks without enforcement."""
    schema = parse_schema({"x": spec}).json_schema
    assert strict(schema) is None
    assert closed(schema) is None
    assert gemini(schema) is None


def test_nested_schemas_are_closed_all_the_way_down() -> None:
    """Objects in lists and in options are converted too, and our own keywords are dropped."""
    schema = parse_schema({"items": "list[str]", "who": {"name": "str", "age": "int?"}, "n": [1, 2]}).json_schema
    converted = strict(schema)
    assert converted is not None
    who = converted["properties"]["who"]
    assert (who["required"], who["additionalProperties"]) == (["name", "age"], False)
    google = gemini(schema)
    assert google is not None
    assert google["properties"]["n"] == {"type": "INTEGER", "description": "one of 1, 2"}


def test_nulls_stay_where_the_author_takes_them() -> None:
    """OpenAI writes null for a field that is left out; it goes where the schema takes no null, and stays elsewhere."""
    text = {"type": "string"}
    schema = {
        "type": "object",
        "properties": {
            "required": {"anyOf": [text, {"type": "null"}]},
            "union": {"anyOf": [text, {"type": "null"}]},
            "listed": {"type": ["string", "null"]},
            "chosen": {"enum": ["a", None]},
            "anything": {},
            "plain": text,
            "choice": {"enum": ["a", "b"]},
            "items": {"type": "array", "items": {"type": "object", "properties": {"d": text}}},
        },
        "required": ["required", "items"],
    }
    value = {**dict.fromkeys(schema["properties"]), "items": [{"d": None}, {"d": "x"}]}  # type: ignore[call-overload]
    kept = dict.fromkeys(["required", "union", "listed", "chosen", "anything"])
    assert canonical(schema)(value) == {**kept, "items": [{}, {"d": "x"}]}


@pytest.mark.parametrize("kinds", [["integer", "null"], ["null", "string"], ["string", "number", "null"]])
def test_lists_of_types_are_unions(kinds: list[str]) -> None:
    """JSON Schema's usual way of saying that a field may be null is said in each vendor's own way."""
    schema = parse_schema(
        {"type": "object", "properties": {"x": {"type": kinds, "minimum": 0}}, "required": ["x"]}
    ).json_schema
    for convert in (strict, closed):
        converted = convert(schema)
        assert converted is not None
        assert converted["properties"]["x"] == {"anyOf": [{"type": kind} for kind in kinds]}
    google = gemini(schema)
    assert google is not None
    assert google["properties"]["x"]["nullable"] is True


def test_an_enum_with_null_is_nullable_for_gemini() -> None:
    """Its enums hold strings alone; null is said beside them."""
    schema = parse_schema({"type": "object", "properties": {"x": {"enum": ["a", "b", None]}}}).json_schema
    google = gemini(schema)
    assert google is not None
    assert google["properties"]["x"] == {"type": "STRING", "enum": ["a", "b"], "nullable": True}


@st.composite
def _nodes(draw: st.DrawFn, depth: int = 2) -> dict[str, Any]:
    """A JSON Schema of any of the shapes that authors write, objects open, closed and put together."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "types"]
    kinds += ["object", "open", "pattern", "allOf", "array", "anyOf", "oneOf", "any"] if depth else []
    inner = _nodes(depth=depth - 1) if depth else st.nothing()
    said = {"description": "what it is"} if draw(st.booleans()) else {}
    match draw(st.sampled_from(kinds)):
        case "enum":
            return {"enum": draw(st.lists(_SCALARS, min_size=1, max_size=4, unique_by=repr)), **said}
        case "const":
            return {"const": draw(_SCALARS), **said}
        case "types":
            types = st.lists(st.sampled_from(["string", "integer", "null", "boolean"]), min_size=1, unique=True)
            return {"type": draw(types), "minLength": 1, **said}
        case "any":
            return said
        case "array":
            return {"type": "array", "items": draw(inner), **said}
        case "anyOf" | "oneOf" as union:
            return {union: draw(st.lists(inner, min_size=1, max_size=3)), **said}
        case "object" | "open" | "pattern" | "allOf" as kind:
            properties = draw(st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3))
            required = [name for name in properties if draw(st.booleans())]
            node: dict[str, Any] = {"type": "object", "properties": properties, "required": required, **said}
            more: dict[str, Any] = {
                "open": {"additionalProperties": True},
                "pattern": {"additionalProperties": False, "patternProperties": {"^x": {"type": "integer"}}},
                "allOf": {"allOf": [{"properties": {"x1": {"type": "integer"}}}]},
            }
            return node | more.get(kind, {"additionalProperties": False})
        case scalar:
            return {"type": scalar, **said}


_SCALARS = st.sampled_from(["", "a", "b", 0, 1, -5, 2.5, True, False, None])


@st.composite
def _values(draw: st.DrawFn, node: Mapping[str, Any]) -> Any:
    """A value that is likely to fit."""
    if "enum" in node or "const" in node:
        return draw(st.sampled_from(node.get("enum", [node.get("const")])))
    for union in ("anyOf", "oneOf"):
        if union in node:
            return draw(_values(draw(st.sampled_from(node[union]))))
    kind = node.get("type")
    match draw(st.sampled_from(kind)) if isinstance(kind, list) else kind:
        case "object":
            names = [n for n in node["properties"] if n in node["required"] or draw(st.booleans())]
            value = {name: draw(_values(node["properties"][name])) for name in names}
            return value | ({"x1": 7} if draw(st.booleans()) else {})
        case "array":
            return draw(st.lists(_values(node["items"]), max_size=2))
        case "string":
            return draw(st.sampled_from(["", "a"]))
        case "integer":
            return draw(st.integers(-9, 9))
        case "number":
            return draw(st.sampled_from([0.5, 3]))
        case "boolean":
            return draw(st.booleans())
        case "null":
            return None
        case _:
            return draw(_SCALARS)


def _all_written(node: Mapping[str, Any], value: Any) -> Any:
    """The value as OpenAI has to write it: fields that are left out are null."""
    for branch in node.get("anyOf", ()):
        if jsonschema_rs.is_valid(branch, _all_written(branch, value)):
            return _all_written(branch, value)
    if isinstance(value, dict) and "properties" in node:
        names = [*node["properties"], *value]
        return {name: _all_written(node["properties"].get(name, {}), value.get(name)) for name in names}
    if isinstance(value, list) and "items" in node:
        return [_all_written(node["items"], item) for item in value]
    return value


@hypothesis.settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_dialect_forbids_what_the_author_takes(data: st.DataObject) -> None:
    """A dialect is taken by its vendor as it is, and whatever fits the author's schema fits the dialect too."""
    node = data.draw(_nodes(depth=1).filter(lambda n: n.get("type") == "object"))
    node["properties"]["more"] = data.draw(_nodes())
    value = data.draw(_values(node))
    hypothesis.assume(jsonschema_rs.is_valid(node, value))
    for_anthropic, for_openai, for_google = closed(node), strict(node), gemini(node)
    if for_anthropic is not None:
        _walk_closed(for_anthropic, "bad", all_required=False, root=True)
        assert jsonschema_rs.is_valid(for_anthropic, value)
    if for_openai is not None:
        _walk_closed(for_openai, "bad", all_required=True, root=True)
        assert jsonschema_rs.is_valid(for_openai, _all_written(for_openai, value))
    if for_google is not None:
        GoogleProtocol()._walk(for_google)
        assert jsonschema_rs.is_valid(_of_openapi(for_google), value)


def _of_openapi(node: Mapping[str, Any]) -> dict[str, Any]:
    """Gemini's dialect as the JSON Schema that it means."""
    if "anyOf" in node:
        meant: dict[str, Any] = {"anyOf": [_of_openapi(branch) for branch in node["anyOf"]]}
    else:
        meant = {key: node[key] for key in ("enum", "required") if key in node}
        meant["type"] = node["type"].lower()
        if "properties" in node:
            meant["properties"] = {name: _of_openapi(child) for name, child in node["properties"].items()}
            meant["additionalProperties"] = False
        if "items" in node:
            meant["items"] = _of_openapi(node["items"])
    return {"anyOf": [meant, {"type": "null"}]} if node.get("nullable") else meant


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 40)), max_size=60))
def test_a_bucket_never_lets_more_through(calls: list[tuple[float, int]]) -> None:
    """Whoever waits as told takes at most the burst and the rate's worth in any span since the start."""
    bucket = Bucket(600, burst=50)
    now = taken = 0.0
    for pause, amount in calls:
        now += pause
        now += bucket.wait_s(amount, now)
        bucket.take(amount, now)
        taken += amount
        assert taken <= 50 + 10 * now + 1e-6


def test_a_bucket_serves_what_is_larger_than_it() -> None:
    """A request above the burst waits for a full bucket and goes into debt, instead of waiting forever."""
    bucket = Bucket(60, burst=5)
    assert bucket.wait_s(100, 0.0) == 0.0
    bucket.take(100, 0.0)
    assert bucket.wait_s(1, 0.0) == pytest.approx(96.0)


def test_limits_pause_and_space() -> None:
    """The vendor's pause holds everybody and keeps its reason, a shorter one does not end it, requests are spaced."""
    limits = Limits(requests_per_minute=60, tokens_per_minute=None, max_concurrency=1)
    assert limits.take(1, 0.0) == 0.0
    limits.pause(5.0, "slow down")
    limits.pause(4.0, "never mind")
    assert limits.take(1, 2.0) == pytest.approx(3.0)
    assert limits.paused(2.0) == (pytest.approx(3.0), "slow down")
    assert limits.paused(5.0) is None
    assert limits.take(1, 5.0) == 0.0
    assert limits.take(1, 5.25) == pytest.approx(0.75)


def test_calls_at_once_wait_for_a_place() -> None:
    """Who finds no place gets the next one that is left, or hears in time that there was none."""
    limits = Limits(requests_per_minute=None, tokens_per_minute=None, max_concurrency=1)
    assert limits.enter(0)
    assert not limits.enter(0.01)
    waiting = threading.Thread(target=lambda: limits.enter(60) and limits.leave())
    waiting.start()
    limits.leave()
    waiting.join(60)
    assert limits.enter(60)
    limits.leave()
    with pytest.raises(ValueError, match="released too many"):
        limits.leave()


def test_the_breaker_opens_rests_and_tries_again() -> None:
    """It takes several failures over several seconds; one trial is let through; success closes it."""
    breaker = Breaker()
    assert [breaker.failed(t) for t in (0.0, 0.1, 0.2, 0.3, 0.4)] == [False] * 5  # a bad second is no outage
    assert breaker.failed(6.0)
    assert breaker.wait_s(6.5) == pytest.approx(1.5)
    assert not breaker.allows(6.5)
    assert breaker.wait_s(8.0) == 0.0
    assert breaker.wait_s(8.0) > 0  # the others wait for the trial's outcome
    assert not breaker.failed(8.5)
    assert breaker.wait_s(9.0) == pytest.approx(3.5)
    assert breaker.wait_s(12.5) == 0.0
    breaker.succeeded()
    assert (breaker.wait_s(12.6), breaker.allows(12.6)) == (0.0, True)


def test_prices_are_the_lists() -> None:
    """Cached, cache-writing and plain tokens each at their own rate, as genai-prices itself computes it."""
    from genai_prices import Usage as ListUsage
    from genai_prices import calc_price

    usage = Usage(input=10_000, output=1_000, cached=2_000, cache_write=1_000)
    for vendor, model in (
        ("anthropic", "claude-sonnet-4-5"),
        ("openai", "gpt-4o-mini"),
        ("google", "gemini-2.5-flash"),
    ):
        price = PriceList(settings(model, vendor), lambda: NOW).now()
        reported = ListUsage(
            input_tokens=10_000, output_tokens=1_000, cache_read_tokens=2_000, cache_write_tokens=1_000
        )
        if vendor != "anthropic":  # these do not bill writing to the cache apart
            reported = ListUsage(input_tokens=10_000, output_tokens=1_000, cache_read_tokens=2_000)
        assert price.cost(usage) == calc_price(reported, model, provider_id=vendor).total_price


def test_long_inputs_are_priced_by_tier() -> None:
    """Above the first tier every token costs the tier's rate, and the worst case knows."""
    price = PriceList(settings("claude-sonnet-4-5"), lambda: NOW).now()
    assert price.cost(Usage(input=250_000, output=1_000)) == Decimal("1.5225")
    assert price.worst(250_000, 1_000) >= Decimal("1.5225")


@given(read=st.integers(0, 400_000), written=st.integers(0, 4_000), cached=st.floats(0, 1), cache_write=st.floats(0, 1))
def test_no_call_costs_more_than_its_worst_case(read: int, written: int, cached: float, cache_write: float) -> None:
    """However the tokens fall on cached and written ones, the reservation covers the price."""
    price = PriceList(settings("claude-sonnet-4-5"), lambda: NOW).now()
    from_cache = int(read * cached)
    usage = Usage(read, written, from_cache, int((read - from_cache) * cache_write))
    assert price.cost(usage) <= price.worst(read, written)


def test_an_override_wins() -> None:
    """The config's price is used, for cached tokens too where it says so."""
    own = settings("claude-sonnet-4-5", price={"input": "2", "output": "8", "cached_input": "0.5"})
    price = PriceList(own, lambda: NOW).now()
    assert price.cost(Usage(input=1_000_000, output=1_000_000, cached=500_000)) == Decimal("9.25")


def test_an_unknown_price_is_an_error() -> None:
    """A model without a price is reported with the remedy, never priced at zero."""
    (problem,) = check_price(settings("claude-sonnet-9000"), "remote", NOW)
    assert problem.path == "remote.model"
    assert "price" in problem.remedy
    own = settings("qwen", "openai_compatible", base_url="http://localhost:8000/v1")
    assert check_price(own, "remote", NOW)
    free = settings("qwen", "openai_compatible", base_url="http://localhost:8000/v1", price={"input": 0, "output": 0})
    assert check_price(free, "remote", NOW) == []


@pytest.mark.parametrize(
    ("model", "price"),
    [
        ("claude-sonnet-4-5", {"input": "0.003", "output": "0.015"}),  # per thousand tokens
        ("claude-sonnet-4-5", {"input": "0.000003", "output": "0.000015"}),  # per token
        ("claude-sonnet-4-5", {"input": "3000", "output": "15000"}),
        ("my-own-model", {"input": "0.000003", "output": "15"}),
        ("my-own-model", {"input": "3", "output": "15000"}),
    ],
)
def test_a_price_a_thousand_times_off_is_caught(model: str, price: dict[str, str]) -> None:
    """Prices in other units than USD per million tokens are errors, for models on the list and off it."""
    problems = check_price(settings(model, price=price), "remote", NOW)
    assert problems
    assert "per million" in str(problems[0])
    assert check_price(settings(model, price={"input": "2.5", "output": "12"}), "remote", NOW) == []


class Inner(BaseModel):
    note: str = "none"
    at: datetime


class Booking(BaseModel):
    """Fields with defaults that take no null, and formats that only pydantic knows."""

    price: Decimal
    inner: Inner
    wait: timedelta = timedelta(0)
    more: list[Inner] = []
    maybe: int | None = None


def test_nulls_for_a_models_defaults_are_left_out() -> None:
    """OpenAI writes them for fields that are left out; the model itself would refuse them."""
    at = "2026-03-01T10:00:00Z"
    inner = {"note": None, "at": at}
    text = json.dumps({"price": "1.50", "inner": inner, "wait": None, "more": [inner], "maybe": None})
    found = fit(Completion(text, None), parse_schema(Booking), 100, "book")
    assert found == {"price": "1.50", "inner": {"at": at}, "more": [{"at": at}], "maybe": None}
