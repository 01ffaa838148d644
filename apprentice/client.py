"""Apprentice and AsyncApprentice: one call, `run(task, input) -> Result`.

Both walk the router's one path (apprentice/router.py); they differ in how its effects are carried out.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import httpx

from apprentice.config import Settings, load_settings
from apprentice.effects import run_async, run_sync
from apprentice.result import Result, TaskStatus
from apprentice.transport import async_sender, sender

if TYPE_CHECKING:
    from apprentice.assembly import Assembly
    from apprentice.local.engine import Engine

__all__ = ["Apprentice", "AsyncApprentice"]

# Threads wait here for engines and databases, not for processors.
_THREADS = 64


class _Base:
    """What both clients share: the assembled parts, their life time, and everything that is not I/O."""

    def __init__(self, assembly: Assembly) -> None:
        self.parts = assembly
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="apprentice")

    @property
    def settings(self) -> Settings:
        """The configuration in force."""
        return self.parts.settings

    def status(self) -> dict[str, TaskStatus]:
        """Each task's phase, correlation, coverage, sampling rate, spend and savings, by name."""
        from apprentice.status import task_statuses

        return task_statuses(self.parts.settings, self.parts.store, self.parts.judge)

    def wait_until_serving(self, task: str, timeout_s: float = 60.0) -> bool:
        """Wait until the task's champion (if it has one) is loaded and answers; False where that takes longer."""
        return self.parts.router.wait_until_serving(task, timeout_s)

    def _close(self) -> None:
        self._threads.shutdown(wait=True)
        self.parts.close()


def _assemble(
    config: str | Path | Settings,
    engine: Engine | None,
    environ: Mapping[str, str] | None,
    clock: Callable[[], float],
    draw: random.Random | None,
) -> Assembly:
    # Half of all that Apprentice imports is the database's; who only imports names does not pay for it.
    from apprentice.assembly import assemble

    settings = config if isinstance(config, Settings) else load_settings(config)
    return assemble(
        settings,
        engine=engine,
        environ=os.environ if environ is None else environ,
        clock=clock,
        draw=draw or random.Random(),
    )


class Apprentice(_Base):
    """The synchronous client; safe to share between threads.

    with Apprentice.from_config("apprentice.yaml") as apprentice:
        print(apprentice.run("classify_ticket", {"text": "Where is my parcel?"}).output)
    """

    def __init__(self, assembly: Assembly, http_client: httpx.Client | None = None) -> None:
        super().__init__(assembly)
        self._sender = sender(http_client)

    @classmethod
    def from_config(
        cls,
        config: str | Path | Settings = "apprentice.yaml",
        *,
        http_client: httpx.Client | None = None,
        engine: Engine | None = None,
        environ: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.time,
        draw: random.Random | None = None,
    ) -> Self:
        """Set everything up from a config file or `Settings`.

        ``http_client``, ``engine``, ``environ``, ``clock`` and ``draw`` replace the network, the local model, the
        environment, time (unix seconds) and chance, for tests. Raises `ConfigError`, `StoreError`, `MissingExtra`.
        """
        return cls(_assemble(config, engine, environ, clock, draw), http_client)

    def run(self, task: str, input: Mapping[str, Any]) -> Result:  # noqa: A002  # the user's word for it
        """Answer one input of a task.

        Raises `InputError` (or `UnknownTask`), `BudgetExceeded`, `Unavailable`, `RemoteRefused` or `OutputError`.
        """
        return run_sync(self.parts.router.path(task, input), self._sender, self._threads)

    def close(self) -> None:
        """Write what is still in memory and release everything."""
        self._close()
        self._sender.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncApprentice(_Base):
    """The asynchronous client: the same calls, awaited.

    async with AsyncApprentice.from_config("apprentice.yaml") as apprentice:
        result = await apprentice.run("classify_ticket", {"text": "Where is my parcel?"})
    """

    def __init__(self, assembly: Assembly, http_client: httpx.AsyncClient | None = None) -> None:
        super().__init__(assembly)
        self._sender = async_sender(http_client)

    @classmethod
    def from_config(
        cls,
        config: str | Path | Settings = "apprentice.yaml",
        *,
        http_client: httpx.AsyncClient | None = None,
        engine: Engine | None = None,
        environ: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.time,
        draw: random.Random | None = None,
    ) -> Self:
        """As `Apprentice.from_config`."""
        return cls(_assemble(config, engine, environ, clock, draw), http_client)

    async def run(self, task: str, input: Mapping[str, Any]) -> Result:  # noqa: A002  # the user's word for it
        """As `Apprentice.run`."""
        return await run_async(self.parts.router.path(task, input), self._sender, self._threads)

    async def aclose(self) -> None:
        """Write what is still in memory and release everything."""
        await asyncio.to_thread(self._close)  # it waits for threads and for the disk; the event loop need not
        await self._sender.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()
