"""What the path of a request wants done, apart from how it is done.

The path (router, retries, fallbacks) is written once, as generators that yield effects and are sent their results. Two
drivers carry effects out: `run_sync` on httpx.Client and threads, `run_async` on httpx.AsyncClient and the event loop.
So `Apprentice` and `AsyncApprentice` are the same path, and a test can drive it with no network, no clock and no sleep.

    def path() -> Path[int]:
        response = yield Send(request, deadline_s=5.0)
        yield Sleep(0.1)
        row = yield Call(lambda: store.read())          # anything that blocks
        first, second = yield Both(path_a(), path_b())  # two paths at once, each an Outcome
        return response.status_code

An effect that fails raises its exception inside the path, where it was yielded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import httpx

from apprentice.transport import AsyncSender, Sender

__all__ = ["Both", "Call", "Effect", "Outcome", "Path", "Send", "Sleep", "run_async", "run_sync"]

_TIMEOUTS = ("connect", "read", "write", "pool")  # httpx's own, each of one wait


@dataclass(frozen=True, slots=True)
class Send:
    """Send an HTTP request and read its whole body within ``deadline_s``, else `httpx.ReadTimeout`.

    httpx's own time-outs are per read; a server that drips one byte a second would never meet them.
    """

    request: httpx.Request
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Call:
    """Call something that blocks: the store, an engine."""

    function: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Both:
    """Walk two paths at once and get both outcomes, as `Outcome` values: neither's failure stops the other."""

    first: Path[Any]
    second: Path[Any]


type Effect = Send | Sleep | Call | Both
type Path[T] = Generator[Effect, Any, T]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a path ended: its value, or the exception it raised."""

    value: Any = None
    error: Exception | None = None

    def get(self) -> Any:
        """The value; raises the error."""
        if self.error is not None:
            raise self.error
        return self.value


def run_sync[T](path: Path[T], client: Sender, threads: ThreadPoolExecutor) -> T:
    """Walk a path to its end in this thread. ``threads`` carries the second half of each `Both`."""
    try:
        effect = next(path)
        while True:
            try:
                result = _do_sync(effect, client, threads)
            except Exception as error:  # noqa: BLE001  # it is the path's to handle, at its yield
                effect = path.throw(error)
            else:
                effect = path.send(result)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def _do_sync(effect: Effect, client: Sender, threads: ThreadPoolExecutor) -> Any:
    match effect:
        case Call(function):
            return function()
        case Send(request, deadline_s):
            return _send(client, request, deadline_s)
        case Sleep(seconds):
            time.sleep(seconds)
            return None
        case Both(first, second):
            other = threads.submit(_outcome_sync, second, client, threads)
            return _outcome_sync(first, client, threads), other.result()


def _outcome_sync(path: Path[Any], client: Sender, threads: ThreadPoolExecutor) -> Outcome:
    try:
        return Outcome(value=run_sync(path, client, threads))
    except Exception as error:  # noqa: BLE001  # both outcomes are wanted
        return Outcome(error=error)


class _Hurried(httpx.SyncByteStream):
    """A body that must have arrived by ``ends``, a reading of the monotonic clock."""

    def __init__(self, stream: httpx.SyncByteStream, ends: float) -> None:
        self._stream = stream
        self._ends = ends

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            yield chunk
            if time.monotonic() > self._ends:
                raise httpx.ReadTimeout("the answer was still arriving at its deadline")

    def close(self) -> None:
        self._stream.close()


def _send(client: Sender, request: httpx.Request, deadline_s: float) -> httpx.Response:
    ends = time.monotonic() + deadline_s
    request.extensions["timeout"] = dict.fromkeys(_TIMEOUTS, deadline_s)
    response = client.send(request, stream=True)
    response.stream = _Hurried(cast(httpx.SyncByteStream, response.stream), ends)
    try:
        response.read()
    finally:
        response.close()
    return response


async def run_async[T](path: Path[T], client: AsyncSender, threads: ThreadPoolExecutor) -> T:
    """Walk a path to its end on the running event loop; what blocks goes to ``threads``."""
    try:
        effect = next(path)
        while True:
            try:
                result = await _do_async(effect, client, threads)
            except asyncio.CancelledError:
                path.close()
                raise
            except Exception as error:  # noqa: BLE001  # it is the path's to handle, at its yield
                effect = path.throw(error)
            else:
                effect = path.send(result)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


async def _do_async(effect: Effect, client: AsyncSender, threads: ThreadPoolExecutor) -> Any:
    match effect:
        case Call(function):
            return await asyncio.get_running_loop().run_in_executor(threads, function)
        case Send(request, deadline_s):
            return await _send_async(client, request, deadline_s)
        case Sleep(seconds):
            return await asyncio.sleep(seconds)
        case Both(first, second):
            return await asyncio.gather(_outcome_async(first, client, threads), _outcome_async(second, client, threads))


async def _outcome_async(path: Path[Any], client: AsyncSender, threads: ThreadPoolExecutor) -> Outcome:
    try:
        return Outcome(value=await run_async(path, client, threads))
    except Exception as error:  # noqa: BLE001  # both outcomes are wanted
        return Outcome(error=error)


async def _send_async(client: AsyncSender, request: httpx.Request, deadline_s: float) -> httpx.Response:
    request.extensions["timeout"] = dict.fromkeys(_TIMEOUTS, deadline_s)
    try:
        async with asyncio.timeout(deadline_s):
            return await client.send(request)
    except TimeoutError:
        raise httpx.ReadTimeout(f"the answer was still arriving after {deadline_s:g} s", request=request) from None
