"""One path, two drivers: what a path sees must not depend on who walks it."""

import asyncio
import gzip
import http.server
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from apprentice.effects import Both, Call, Outcome, Path, Send, Sleep, run_async, run_sync
from apprentice.transport import AsyncSender, Sender, async_sender, sender


def answer(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json={"path": request.url.path})


def walk(driver: str, path: Path[Any], handler: Any = answer) -> Any:
    with ThreadPoolExecutor(4) as threads:
        if driver == "sync":
            with httpx.Client(transport=httpx.MockTransport(handler)) as client:
                return run_sync(path, client, threads)

        async def main() -> Any:
            async with httpx.AsyncClient(transport=httpx.MockTransport(handler)) as client:
                return await run_async(path, client, threads)

        return asyncio.run(main())


both_drivers = pytest.mark.parametrize("driver", ["sync", "async"])


def get(path: str) -> Path[str]:
    response = yield Send(httpx.Request("GET", f"http://remote{path}"), deadline_s=5)
    return str(response.json()["path"])


@both_drivers
def test_a_path_is_sent_the_results_of_its_effects(driver: str) -> None:
    """Requests, calls and sleeps give their values where they were yielded."""

    def path() -> Path[tuple[str, int]]:
        first = yield from get("/a")
        yield Sleep(0)
        number = yield Call(lambda: 7)
        return first, number

    assert walk(driver, path()) == ("/a", 7)


@both_drivers
def test_an_effect_that_fails_raises_inside_the_path(driver: str) -> None:
    """So that retrying is an ordinary try statement."""

    def path() -> Path[str]:
        try:
            yield Call(lambda: 1 // 0)
        except ZeroDivisionError as error:
            return str(error)
        return "unreachable"

    assert "zero" in walk(driver, path())


@both_drivers
def test_both_paths_run_at_once_and_neither_failure_stops_the_other(driver: str) -> None:
    """Two paths that wait for each other can only end if they run together."""
    met = threading.Barrier(2, timeout=5)

    def meet(then: Exception | None) -> Path[str]:
        yield Call(met.wait)
        if then:
            raise then
        return "fine"

    def path() -> Path[tuple[Outcome, Outcome]]:
        outcomes = yield Both(meet(None), meet(KeyError("lost")))
        return outcomes  # type: ignore[no-any-return]

    first, second = walk(driver, path())
    assert first.get() == "fine"
    assert isinstance(second.error, KeyError)


@pytest.fixture
def dripping_server() -> Iterator[str]:
    """A server whose answer never ends: one byte every 20 ms, so that no single read ever times out."""
    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
            while not stop.wait(0.02):
                try:
                    connection.sendall(b"x")
                except OSError:
                    return

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    stop.set()
    thread.join()
    listener.close()


def walk_by(driver: str, path: Path[Any], *, own: bool) -> Any:
    """Walk a path over real connections: those of a client that the application brought, or Apprentice's own."""
    with ThreadPoolExecutor(1) as threads:
        if driver == "sync":
            client: Sender = httpx.Client() if own else sender()
            try:
                return run_sync(path, client, threads)
            finally:
                client.close()

        async def main() -> Any:
            client: AsyncSender = httpx.AsyncClient() if own else async_sender()
            try:
                return await run_async(path, client, threads)
            finally:
                await client.aclose()

        return asyncio.run(main())


@both_drivers
def test_without_a_client_of_ones_own_answers_are_the_same(driver: str) -> None:
    """Over the bare transport: the answer of a real server, decoded, and an error that says what failed."""

    def path(url: str) -> Path[httpx.Response]:
        return (yield Send(httpx.Request("POST", url, content=b"{}"), deadline_s=5))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # the name that the library looks for
            body = gzip.compress(b'{"path": "zipped"}')
            self.send_response(200)
            self.send_header("content-encoding", "gzip")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        answers = walk_by(driver, path(url), own=False)
    assert (answers.status_code, answers.json(), answers.request.url) == (200, {"path": "zipped"}, url)
    with pytest.raises(httpx.ConnectError):
        walk_by(driver, path(url), own=False)


def test_proxies_that_the_environment_names_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a whole httpx client knows them."""
    monkeypatch.delenv("http_proxy", raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    with sender() as client:  # type: ignore[attr-defined]  # it must be httpx's own
        assert isinstance(client, httpx.Client)
    monkeypatch.delenv("HTTP_PROXY")
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert not isinstance(sender(), httpx.Client)


@pytest.mark.parametrize("own", [True, False])
@both_drivers
def test_a_deadline_holds_against_a_body_that_drips(driver: str, own: bool, dripping_server: str) -> None:
    """The deadline is for the whole answer, not for each read of it."""

    def path() -> Path[None]:
        yield Send(httpx.Request("GET", dripping_server), deadline_s=0.3)

    with pytest.raises(httpx.ReadTimeout):
        walk_by(driver, path(), own=own)


@both_drivers
def test_a_compressed_answer_is_decoded_once(driver: str) -> None:
    """The driver reads the body itself; whoever reads the response must not decode it again."""

    def handler(request: httpx.Request) -> httpx.Response:
        body = gzip.compress(b'{"path": "zipped"}')
        return httpx.Response(200, content=body, headers={"content-encoding": "gzip"})

    assert walk(driver, get("/a"), handler) == "zipped"
