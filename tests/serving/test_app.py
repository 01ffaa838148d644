"""The HTTP router: JSON in, JSON out, and the library's errors as status codes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from apprentice import AsyncApprentice
from apprentice.testing import FakeEngine, FakeVendor, Fault
from serving.app import create_app
from tests.conftest import settings, truth


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., TestClient]]:
    """Serve a small configuration over a vendor with the given faults."""
    running: list[TestClient] = []

    def start(*faults: Fault | None, **more: Any) -> TestClient:
        vendor = FakeVendor("anthropic", truth, faults=faults)

        def open_client() -> AsyncApprentice:
            return AsyncApprentice.from_config(
                settings(tmp_path, vendor, **more),
                http_client=httpx.Client(transport=vendor.transport()),
                engine=FakeEngine(lambda version, value: truth(value)),
                environ=vendor.environ,
            )

        client = TestClient(create_app(open_client))
        client.__enter__()
        running.append(client)
        return client

    yield start
    for client in running:
        client.__exit__(None, None, None)


def test_a_task_is_answered_with_an_id_and_an_output(serve: Callable[..., TestClient]) -> None:
    """The body is the input; the answer has the request's id and the output, and nothing of who gave it."""
    response = serve().post("/v1/tasks/mood", json={"text": "a fear"})
    assert response.status_code == 200
    assert set(response.json()) == {"id", "output"}
    assert response.json()["output"] == {"label": "fear"}


def test_healthz_tells_the_phase_of_every_task(serve: Callable[..., TestClient]) -> None:
    """A load balancer sees that the process is up; a person sees where each task stands."""
    assert serve().get("/healthz").json() == {"ok": True, "tasks": {"mood": 1}}


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/v1/tasks/nothing", b'{"text": "x"}', 404, "UnknownTask"),
        ("/v1/tasks/mood", b'{"text": 3}', 422, "InputError"),
        ("/v1/tasks/mood", b"[1]", 422, "InputError"),
        ("/v1/tasks/mood", b"not json", 400, "InputError"),
    ],
)
def test_bad_requests_say_what_is_wrong(
    serve: Callable[..., TestClient], path: str, body: bytes, status: int, kind: str
) -> None:
    """Each mistake has its status, its kind and words for it."""
    response = serve().post(path, content=body)
    assert response.status_code == status
    assert response.json()["error"]["type"] == kind
    assert response.json()["error"]["message"]


def test_a_spent_budget_says_when_to_come_back(serve: Callable[..., TestClient]) -> None:
    """429 with Retry-After, which HTTP clients understand."""
    response = serve(budget={"daily": "0.000001"}).post("/v1/tasks/mood", json={"text": "x"})
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("faults", "status"),
    [([Fault("server_error")] * 9, 503), ([Fault("unauthorized")], 502), ([Fault("schema_violation")] * 2, 502)],
)
def test_a_failing_remote_is_a_gateway_error(
    serve: Callable[..., TestClient], faults: list[Fault], status: int
) -> None:
    """Down is 503, refused or answering nonsense is 502; the body never holds the key."""
    response = serve(*faults).post("/v1/tasks/mood", json={"text": "x"})
    assert response.status_code == status
    assert "sk-test" not in json.dumps(response.json())
