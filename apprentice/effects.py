"""What the path of a request wants done, apart from how it is done.

The path (router, retries, fallbacks) is written once, as generators that yield effects and are sent their results. Two
drivers carry effects out: `run_sync` by a `Sender` and threads, `run_async` by an `AsyncSender` and the event loop.
So `Apprentice` and `AsyncApprentice` are the same path, and a test can drive it with no network, no clock and no sleep.

    def path() -> Path[int]:
        response = yield Send(request, deadline_s=5.0)
        yield Sleep(0.1)
        row = yield Call(lambda: store.read())          # anything that blocks
        first, second = yield Both(path_a(), path_b())  # two paths at once, each an Outcome
        return response.status

An effect that fails raises its exception inside the path, where it was yielded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from apprentice.transport import AsyncSender, Request, Sender

__all__ = ["Both", "Call", "Effect", "Outcome", "Path", "Send", "Sleep", "run_async", "run_sync"]


@dataclass(frozen=True, slots=True)
class Send:
    """Send an HTTP request and read its whole body within ``deadline_s``, else `httpx.ReadTimeout`."""

    request: Request
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


def run_sync[T](path: Path[T], sender: Sender, threads: ThreadPoolExecutor) -> T:
    """Walk a path to its end in this thread. ``threads`` carries the second half of each `Both`."""
    try:
        effect = next(path)
        while True:
            try:
                result = _do_sync(effect, sender, threads)
            except Exception as error:  # noqa: BLE001  # it is the path's to handle, at its yield
                effect = path.throw(error)
            else:
                effect = path.send(result)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def _do_sync(effect: Effect, sender: Sender, threads: ThreadPoolExecutor) -> Any:
    match effect:
        case Call(function):
            return function()
        case Send(request, deadline_s):
            return sender.send(request, deadline_s)
        case Sleep(seconds):
            time.sleep(seconds)
            return None
        case Both(first, second):
            other = threads.submit(_outcome_sync, second, sender, threads)
            return _outcome_sync(first, sender, threads), other.result()


def _outcome_sync(path: Path[Any], sender: Sender, threads: ThreadPoolExecutor) -> Outcome:
    try:
        return Outcome(value=run_sync(path, sender, threads))
    except Exception as error:  # noqa: BLE001  # both outcomes are wanted
        return Outcome(error=error)


async def run_async[T](path: Path[T], sender: AsyncSender, threads: ThreadPoolExecutor) -> T:
    """Walk a path to its end on the running event loop; what blocks goes to ``threads``."""
    try:
        effect = next(path)
        while True:
            try:
                result = await _do_async(effect, sender, threads)
            except asyncio.CancelledError:
                path.close()
                raise
            except Exception as error:  # noqa: BLE001  # it is the path's to handle, at its yield
                effect = path.throw(error)
            else:
                effect = path.send(result)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


async def _do_async(effect: Effect, sender: AsyncSender, threads: ThreadPoolExecutor) -> Any:
    match effect:
        case Call(function):
            return await asyncio.get_running_loop().run_in_executor(threads, function)
        case Send(request, deadline_s):
            return await sender.send(request, deadline_s)
        case Sleep(seconds):
            return await asyncio.sleep(seconds)
        case Both(first, second):
            return await asyncio.gather(_outcome_async(first, sender, threads), _outcome_async(second, sender, threads))


async def _outcome_async(path: Path[Any], sender: AsyncSender, threads: ThreadPoolExecutor) -> Outcome:
    try:
        return Outcome(value=await run_async(path, sender, threads))
    except Exception as error:  # noqa: BLE001  # both outcomes are wanted
        return Outcome(error=error)
