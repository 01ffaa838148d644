"""What enters, end to end: by Python and HTTP, with every vendor, to the store, to training and back to the caller."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from pydantic import BaseModel

from apprentice import Apprentice, AsyncApprentice, InputError, OutputError
from apprentice.local.engine import Version
from apprentice.testing import FakeEngine, FakeVendor
from apprentice.testing.remote import Vendor
from serving.app import create_app
from tests.conftest import Workbench, settings

VENDORS: list[Vendor] = ["anthropic", "openai", "openai_responses", "google"]


class Category(str, Enum):  # noqa: UP042  # the older spelling is the commoner one
    """What most classifications look like in an application."""

    BILLING = "billing"
    DELIVERY = "delivery"


class Answer(BaseModel):
    """A task's answer, as an application has it already."""

    category: Category
    due: date | None = None


class Question(BaseModel):
    """A task's input, likewise."""

    text: str
    since: date


def open_client(
    tmp_path: Path, answer: Any, *, vendor: Vendor = "anthropic", bodies: list[bytes] | None = None, **task: Any
) -> Apprentice:
    """A client of one task, ``mood``, whose vendor answers ``answer``; ``bodies`` collects what it was sent."""
    fake = FakeVendor(vendor, lambda value: answer)
    mood = {
        "name": "mood",
        "description": "Name the mood.",
        "input_schema": {"text": "str", "more?": "any"},
        "output_schema": {"label": "str"},
        **task,
    }
    client = httpx.Client(transport=fake.transport())
    if bodies is not None:
        client.event_hooks = {"request": [lambda request: bodies.append(request.content)]}
    configured = settings(tmp_path, fake, tasks=[mood])
    return Apprentice.from_config(
        configured, http_client=client, engine=FakeEngine(lambda version, value: answer), environ=fake.environ
    )


def the_example(client: Apprentice) -> tuple[Any, Any]:
    (example,) = client.parts.store.examples("mood")
    return example.input, example.output


@pytest.mark.parametrize("vendor", VENDORS)
def test_an_enum_of_a_pydantic_model_is_answered_once(tmp_path: Path, vendor: Vendor) -> None:
    """The documented way for whoever has models already: accepted at the first try, kept as JSON."""
    bodies: list[bytes] = []
    with open_client(
        tmp_path, {"category": "billing", "due": "2024-05-01"}, vendor=vendor, bodies=bodies,
        output_schema=Answer, input_schema=Question,
    ) as client:  # fmt: skip
        result = client.run("mood", {"text": "a bill", "since": date(2024, 1, 1)})
        assert result.output == {"category": "billing", "due": "2024-05-01"}
        assert the_example(client) == ({"text": "a bill", "since": "2024-01-01"}, result.output)
    assert len(bodies) == 1


@pytest.mark.parametrize("vendor", VENDORS)
def test_what_the_author_says_of_a_field_reaches_the_vendor(tmp_path: Path, vendor: Vendor) -> None:
    """A description is the instruction that a structured output gives for one field."""
    bodies: list[bytes] = []
    says = "ISO 3166 alpha-2 code of the SENDER"
    country = {"type": "string", "description": says, "minLength": 2}
    schema = {"type": "object", "properties": {"country": country}, "required": ["country"]}
    with open_client(tmp_path, {"country": "DE"}, vendor=vendor, bodies=bodies, output_schema=schema) as client:
        client.run("mood", {"text": "x"})
    assert says.encode() in bodies[0]


def test_the_local_model_is_asked_by_the_tasks_own_schema(
    tmp_path: Path, bench: Callable[..., Workbench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a version is trained on is what it is asked, and that hangs on the fields that an input may have."""
    loaded: list[Version] = []
    monkeypatch.setattr(FakeEngine, "load", lambda self, version, load=FakeEngine.load: (
        loaded.append(version), load(self, version)
    ))  # fmt: skip
    room = bench()
    room.promote()
    (version,) = loaded
    assert version.input_schema == room.client.parts.settings.task("mood").input_schema
    assert version.prompt({"text": "a fear"}) == "a fear"


def test_half_an_emoji_is_replaced_once_and_the_same_everywhere(tmp_path: Path) -> None:
    """JavaScript cuts strings in the middle of a character; the request is answered, kept and can be trained on."""
    bodies: list[bytes] = []
    with open_client(tmp_path, {"label": "ok \udc00"}, bodies=bodies) as client:
        result = client.run("mood", {"text": "thanks \ud83d", "more": ["\ud83d\ude00"]})
        assert result.output == {"label": "ok \ufffd"}
        assert the_example(client) == ({"text": "thanks \ufffd", "more": ["\U0001f600"]}, {"label": "ok \ufffd"})
    assert "thanks \ufffd" in json.loads(bodies[0])["messages"][0]["content"]


@pytest.mark.parametrize("more", [float("nan"), 2**70, b"\xff", object(), {1: 2}])
def test_an_input_that_json_cannot_hold_is_an_input_error(tmp_path: Path, more: object) -> None:
    """It names the field, and nothing is asked or kept."""
    bodies: list[bytes] = []
    with open_client(tmp_path, {"label": "x"}, bodies=bodies) as client:
        with pytest.raises(InputError, match=r"more\.deep\[0\]"):
            client.run("mood", {"text": "x", "more": {"deep": [more]}})
        assert not list(client.parts.store.examples("mood"))
    assert not bodies


@pytest.mark.parametrize("text", ['{"score": NaN}', '{"score": 1e999}', '{"score": [' + "[" * 5000])
def test_an_answer_that_json_cannot_hold_is_an_output_error(tmp_path: Path, text: str) -> None:
    """It is never kept as an example: one such row would stop a training run."""
    vendor = FakeVendor("openai", lambda value: text)
    task = {"output_schema": {"score": "float"}, "input_schema": {"text": "str"}, "name": "mood", "description": "x"}
    configured = settings(tmp_path, vendor, tasks=[task])
    with Apprentice.from_config(
        configured,
        http_client=httpx.Client(transport=vendor.transport()),
        engine=FakeEngine(lambda version, value: {}),
        environ=vendor.environ,
    ) as client:
        with pytest.raises(OutputError):
            client.run("mood", {"text": "x"})
        assert not list(client.parts.store.examples("mood"))


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"", 400, "is empty"),
        (b'{"text": "caf\xe9"}', 400, "is not UTF-8"),
        (b'{"text": "x", "more": NaN}', 422, "more: is NaN"),
        (b'{"text": "x", "more": 1e999}', 422, "more: is Infinity"),
        (b'{"text": "x", "more": ' + b"[" * 300 + b"]" * 300 + b"}", 422, "nested deeper than 100 levels"),
        (b"[" * 100_000, 422, "nested deeper than 100 levels"),
        (b'{"text": 3}', 422, "text: is 3"),
        (b'\xef\xbb\xbf{"text": "x \\ud83d"}', 200, ""),
    ],
)
def test_http_gives_every_odd_body_its_status_and_its_words(
    tmp_path: Path, body: bytes, status: int, says: str
) -> None:
    """No body is a 500, and none is paid for before it is understood."""
    vendor = FakeVendor("anthropic", lambda value: {"label": "half \ud83d"})
    task = {"output_schema": {"label": "str"}, "input_schema": {"text": "str", "more?": "any"}}
    configured = settings(tmp_path, vendor, tasks=[{**task, "name": "mood", "description": "x"}])

    def open_async() -> AsyncApprentice:
        return AsyncApprentice.from_config(
            configured,
            http_client=httpx.Client(transport=vendor.transport()),
            engine=FakeEngine(lambda version, value: {}),
            environ=vendor.environ,
        )

    with TestClient(create_app(open_async)) as http:
        response = http.post("/v1/tasks/mood", content=body)
    assert response.status_code == status
    answer: Mapping[str, Any] = response.json()
    if status == 200:
        assert answer["output"] == {"label": "half \ufffd"}
    else:
        assert says in answer["error"]["message"]
    assert len(vendor.questions) == (status == 200)
