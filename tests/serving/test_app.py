"""The HTTP router: JSON in, JSON out, and the library's errors as status codes."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from apprentice import AsyncApprentice, StoreError
from apprentice.money.budget import Budget
from apprentice.request.snapshot import SNAPSHOT_S
from apprentice.store import Store
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


def test_healthz_tells_where_every_task_stands(serve: Callable[..., TestClient]) -> None:
    """A load balancer sees that the process is up; a person sees what serves, and what should."""
    client = serve()
    mood = {"phase": 1, "champion": None, "serving": None}
    assert client.get("/healthz").json() == {"ok": True, "tasks": {"mood": mood}, "store_away_s": None}
    head = client.head("/healthz")
    assert (head.status_code, head.content) == (200, b"")


def test_healthz_costs_the_same_however_much_is_recorded(
    serve: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads one row a task: no ledger, no examples, no comparisons, no events."""
    client = serve()
    client.post("/v1/tasks/mood", json={"text": "a fear"})
    allowed, used = {"policies"}, []
    for name in [n for n in dir(Store) if not n.startswith("_") and n not in allowed]:
        monkeypatch.setattr(Store, name, lambda *_, name=name, **__: used.append(name))
    assert client.get("/healthz").json()["tasks"]["mood"]["phase"] == 1
    assert used == []
    monkeypatch.undo()


def test_healthz_answers_while_the_store_is_away(
    serve: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is up, and says for how long it has not reached its store."""
    client = serve()

    def away(self: Store) -> Any:
        raise StoreError("the server is gone")

    monkeypatch.setattr(Store, "policies", away)
    time.sleep(SNAPSHOT_S)
    answer = client.get("/healthz")
    assert (answer.status_code, answer.json()["ok"]) == (200, True)
    assert answer.json()["store_away_s"] >= SNAPSHOT_S
    assert answer.json()["tasks"]["mood"]["phase"] == 1
    monkeypatch.undo()
    time.sleep(SNAPSHOT_S)
    assert client.get("/healthz").json()["store_away_s"] is None


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/v1/tasks/nothing", b'{"text": "x"}', 404, "UnknownTask"),
        ("/v1/tasks/mood", b'{"text": 3}', 422, "InputError"),
        ("/v1/tasks/mood", b"[1]", 422, "InputError"),
        ("/v1/tasks/mood", b"not json", 400, "InputError"),
        ("/v1/tasks/mood", b"\xff\xfe\xfd", 400, "InputError"),
        ("/v1/tasks/mood", b'{"text": ' + b"[" * 300 + b"]" * 300 + b"}", 422, "InputError"),
        ("/v1/tasks/mood", b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 422, "InputError"),
        ("/v1/nothing", b"{}", 404, "HTTPError"),
        ("/healthz", b"{}", 405, "HTTPError"),
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


def test_who_gets_a_task_is_shown_the_post_to_make(serve: Callable[..., TestClient]) -> None:
    """A browser's GET is the first thing that people try: the answer's curl command, run as it stands, is answered."""
    client = serve()
    for method in ("GET", "PUT", "DELETE"):
        refused = client.request(method, "/v1/tasks/mood")
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
        message = refused.json()["error"]["message"]
        assert message.startswith(
            f"{method} /v1/tasks/mood: Method Not Allowed. Send the input as a JSON object: curl "
        )
    curl, post, verb, url, flag, body = shlex.split(message[message.index("curl") :])
    assert (curl, post, verb, flag) == ("curl", "-X", "POST", "-d")
    assert client.post(url, content=body).json()["output"] == {"label": "joy"}
    other = client.get("/v1/tasks/it's").json()["error"]["message"]
    assert shlex.split(other[other.index("curl") :])[3:] == [
        "http://testserver/v1/tasks/it's",
        "-d",
        '{"FIELD": "VALUE"}',
    ]
    assert "curl" not in client.post("/healthz").json()["error"]["message"]


def test_a_spent_budget_says_when_to_come_back(serve: Callable[..., TestClient]) -> None:
    """429 with Retry-After, which HTTP clients understand: at midnight, or in seconds where the cap is only held."""
    client = serve(budget={"daily": "0.05"})
    budget: Budget = client.app.state.apprentice.parts.budget  # type: ignore[attr-defined]
    held = budget.reserve("mood", "p", "m", Decimal("0.0499"), "r")
    response = client.post("/v1/tasks/mood", json={"text": "x"})
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) <= 10
    assert "in flight" in response.json()["error"]["message"]
    budget.lost(held)
    response = client.post("/v1/tasks/mood", json={"text": "x"})
    assert response.status_code == 429
    ends = budget.remaining()[0].resets_at
    assert int(response.headers["retry-after"]) == pytest.approx((ends - datetime.now(UTC)).total_seconds(), abs=60)


def test_a_cap_below_one_call_promises_no_time(serve: Callable[..., TestClient]) -> None:
    """No waiting helps there."""
    response = serve(budget={"daily": "0.000001"}).post("/v1/tasks/mood", json={"text": "x"})
    assert response.status_code == 429
    assert "retry-after" not in response.headers


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


@pytest.mark.parametrize(("headers", "said"), [((("retry-after", "90"),), "90"), ((), None)])
def test_a_vendors_pause_is_passed_on(
    serve: Callable[..., TestClient], headers: tuple[tuple[str, str], ...], said: str | None
) -> None:
    """503 tells how long the vendor wants to be left alone, and promises nothing if it did not say."""
    throttled = Fault("verbatim", status=429, content='{"error": {"message": "slow down"}}', headers=headers)
    response = serve(*[throttled] * 9).post("/v1/tasks/mood", json={"text": "x"})
    assert (response.status_code, response.headers.get("retry-after")) == (503, said)


def test_an_unforeseen_failure_has_the_same_shape(
    serve: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its words, which may hold anything, stay in the log."""
    client = serve()
    monkeypatch.setattr(client, "_transport", _quiet(client))

    async def broken(*_: Any) -> None:
        raise ZeroDivisionError("secret words")

    monkeypatch.setattr(AsyncApprentice, "run", broken)
    response = client.post("/v1/tasks/mood", json={"text": "x"})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "ZeroDivisionError"
    assert "secret" not in response.text


def _quiet(client: TestClient) -> Any:
    """The client's transport, which returns a server's failure instead of raising it."""
    transport = client._transport
    transport.raise_server_exceptions = False
    return transport


def test_where_the_store_lies_is_not_for_callers(
    serve: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They learn that it is away; host, path and database stand in the server's log."""
    client = serve()

    def away(*_: Any, **__: Any) -> Any:
        raise StoreError("store postgresql://ada@db.internal/prod: the server is gone")

    monkeypatch.setattr(Store, "reserve", away)
    response = client.post("/v1/tasks/mood", json={"text": "x"})
    assert (response.status_code, response.json()["error"]["type"]) == (503, "Unavailable")
    assert "internal" not in response.text
    assert "store" in response.json()["error"]["message"]
