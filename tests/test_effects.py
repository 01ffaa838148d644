"""One path, two drivers: what a path sees must not depend on who walks it."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from apprentice.effects import Both, Call, Outcome, Path, Send, Sleep, run_async, run_sync


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


@both_drivers
def test_a_deadline_holds_against_a_body_that_drips(driver: str, dripping_server: str) -> None:
    """The deadline is for the whole answer, not for each read of it."""

    def path() -> Path[None]:
        yield Send(httpx.Request("GET", dripping_server), deadline_s=0.3)

    def walk_it() -> None:
        with ThreadPoolExecutor(1) as threads, httpx.Client() as client:
            run_sync(path(), client, threads)

    async def walk_it_async() -> None:
        with ThreadPoolExecutor(1) as threads:
            async with httpx.AsyncClient() as client:
                await run_async(path(), client, threads)

    with pytest.raises(httpx.ReadTimeout):
        walk_it() if driver == "sync" else asyncio.run(walk_it_async())


@both_drivers
def test_a_compressed_answer_is_decoded_once(driver: str) -> None:
    """The driver reads the body itself; whoever reads the response must not decode it again."""
    import gzip

    def handler(request: httpx.Request) -> httpx.Response:
        body = gzip.compress(b'{"path": "zipped"}')
        return httpx.Response(200, content=body, headers={"content-encoding": "gzip"})

    assert walk(driver, get("/a"), handler) == "zipped"
