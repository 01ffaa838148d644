"""What vendors say they will bill, read as untrusted input."""

from __future__ import annotations

from typing import Any

import httpx
import hypothesis.strategies as st
import pytest
from hypothesis import given
from hypothesis import settings as limits

from apprentice.remote.provider import Prompt
from apprentice.remote.teacher import make_provider
from apprentice.remote.usage import usage_of
from apprentice.schemas.schema import parse_schema
from apprentice.settings.config import RemoteSettings
from apprentice.store import Usage
from apprentice.testing import FakeVendor

SCHEMA = parse_schema({"category": ["billing", "shipping"]}).json_schema

REPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    # vendor, and the usage of an honest answer: input, output, cached
    "anthropic": (
        "anthropic",
        {"input_tokens": 120, "output_tokens": 9, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 0},
    ),
    "openai": (
        "openai",
        {"prompt_tokens": 120, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 20}},
    ),
    "google": (
        "google",
        {"promptTokenCount": 120, "candidatesTokenCount": 9, "thoughtsTokenCount": 3, "cachedContentTokenCount": 20},
    ),
}
NO_COUNTS = st.one_of(
    st.integers(max_value=-1),
    st.integers(min_value=10**8 + 1),
    st.floats(allow_nan=True, allow_infinity=True).filter(lambda x: not (x == x and x.is_integer() and x >= 0)),
    st.sampled_from(["200", True, [], {}, "", -0.5]),
)


@pytest.mark.parametrize("vendor", REPORTS)
@given(data=st.data())
@limits(max_examples=40, deadline=None)
def test_a_report_that_cannot_be_true_costs_the_worst_case(vendor: str, data: Any) -> None:
    """Negative, absurd, missing, of another type, parts above the whole: the answer is kept and no cap is lifted."""
    name, honest = REPORTS[vendor]
    main = [key for key in honest if key in ("input_tokens", "prompt_tokens", "promptTokenCount")]
    key = data.draw(st.sampled_from([k for k in honest if k != "prompt_tokens_details"]))
    wrong = data.draw(st.sampled_from(["no count", "missing", "null", "zero", "parts"]))
    reported = dict(honest)
    if wrong == "no count":
        reported[key] = data.draw(NO_COUNTS)
    elif wrong == "parts":
        reported[main[0]] = 5
        part = {"anthropic": "output_tokens_details", "openai": "prompt_tokens_details"}.get(vendor)
        if part:
            reported[part] = {"thinking_tokens": 10} if vendor == "anthropic" else {"cached_tokens": 6}
    elif wrong == "zero":
        reported[main[0]] = 0
    elif wrong == "missing":
        del reported[main[0]]
    else:
        reported[main[0]] = None
    fake = FakeVendor(name, lambda value: {"category": "shipping"})  # type: ignore[arg-type]
    provider = make_provider(RemoteSettings.model_validate(fake.settings()), fake.key)
    body = _body_of(fake, provider)
    where = "usageMetadata" if vendor == "google" else "usage"
    assert provider.parse({**body, where: honest}).usage is not None
    completion = provider.parse({**body, where: reported})
    assert completion.usage is None
    assert completion.text == provider.parse(body).text


def _body_of(fake: FakeVendor, provider: Any) -> dict[str, Any]:
    request = provider.build(Prompt("t", "Say where.", SCHEMA, 100), '{"text": "x"}')
    with httpx.Client(transport=fake.transport()) as client:
        endpoint = request.endpoint
        response = client.post(str(endpoint.url), headers=dict(endpoint.headers), content=request.content)
    body: dict[str, Any] = response.json()
    return body


def test_whole_floats_are_counts() -> None:
    """Some gateways write 200.0."""
    assert usage_of(200.0, 3.0) == Usage(200, 3)
    assert usage_of(200.5, 3) is None
