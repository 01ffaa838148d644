"""Apprentice and AsyncApprentice: one call, `run(task, input) -> Result`.

Both walk the router's one path (apprentice/router.py): the one in the caller's thread, the other in a thread that the
caller's event loop waits for.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from apprentice.config import Settings, load_settings
from apprentice.result import Result, TaskStatus

if TYPE_CHECKING:
    import httpx

    from apprentice.assembly import Assembly
    from apprentice.local.engine import Engine

__all__ = ["Apprentice", "AsyncApprentice"]

THREADS_PER_TASK = 64
"""How many requests of a task an `AsyncApprentice` has under way at once; further ones wait for these."""


class _Base:
    """What both clients share: the assembled parts, and how they come from a configuration."""

    def __init__(self, assembly: Assembly) -> None:
        self.parts = assembly

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
        environment, time (unix seconds) and chance, for tests. A ``http_client`` is used as it is, from several threads
        at once, and is yours to close. Raises `ConfigError`, `StoreError`, `MissingExtra`.
        """
        # Half of all that Apprentice imports is the database's; who only imports names does not pay for it.
        from apprentice.assembly import assemble

        assembly = assemble(
            config if isinstance(config, Settings) else load_settings(config),
            http_client=http_client,
            engine=engine,
            environ=os.environ if environ is None else environ,
            clock=clock,
            draw=draw or random.Random(),
        )
        return cls(assembly)

    @property
    def settings(self) -> Settings:
        """The configuration in force."""
        return self.parts.settings

    def _status(self) -> dict[str, TaskStatus]:
        from apprentice.status import task_statuses

        return task_statuses(self.parts.settings, self.parts.store, self.parts.judge)


class Apprentice(_Base):
    """The synchronous client; safe to share between threads.

    with Apprentice.from_config("apprentice.yaml") as apprentice:
        print(apprentice.run("classify_ticket", {"text": "Where is my parcel?"}).output)
    """

    def run(self, task: str, input: Mapping[str, Any]) -> Result:  # noqa: A002  # the user's word for it
        """Answer one input of a task.

        Raises `InputError` (or `UnknownTask`), `BudgetExceeded`, `Unavailable`, `RemoteRefused` or `OutputError`.
        """
        return self.parts.router.run(task, input)

    def status(self) -> dict[str, TaskStatus]:
        """Each task's phase, correlation, coverage, sampling rate, spend and savings, by name."""
        return self._status()

    def wait_until_serving(self, task: str, timeout_s: float = 60.0) -> bool:
        """Wait until the task's champion (if it has one) is loaded and answers; False where that takes longer."""
        return self.parts.router.wait_until_serving(task, timeout_s)

    def close(self) -> None:
        """Write what is still in memory and release everything."""
        self.parts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncApprentice(_Base):
    """The asynchronous client: the same calls, awaited. It belongs to no event loop: any may use it, one after another.

    async with AsyncApprentice.from_config("apprentice.yaml") as apprentice:
        result = await apprentice.run("classify_ticket", {"text": "Where is my parcel?"})

    Every task has threads of its own, so that one that waits for a slow model or vendor does not hold up the others. A
    request whose caller is cancelled is seen to its end all the same: it may have been paid for.
    """

    def __init__(self, assembly: Assembly) -> None:
        super().__init__(assembly)
        self._lock = threading.Lock()
        self._threads: dict[str, ThreadPoolExecutor] = {}

    async def run(self, task: str, input: Mapping[str, Any]) -> Result:  # noqa: A002  # the user's word for it
        """As `Apprentice.run`."""
        return await self._in_thread(task, partial(self.parts.router.run, task, input))

    async def status(self) -> dict[str, TaskStatus]:
        """As `Apprentice.status`."""
        return await self._in_thread("", self._status)

    async def wait_until_serving(self, task: str, timeout_s: float = 60.0) -> bool:
        """As `Apprentice.wait_until_serving`."""
        return await self._in_thread("", partial(self.parts.router.wait_until_serving, task, timeout_s))

    async def _in_thread[T](self, task: str, call: Callable[[], T]) -> T:
        """Call something that blocks, in one of the task's threads."""
        name = (
            task if any(task == one.name for one in self.settings.tasks) else ""
        )  # of an unknown task only an error will come
        with self._lock:
            threads = self._threads.get(name)
            if threads is None:
                prefix = f"apprentice-{name}"
                threads = self._threads[name] = ThreadPoolExecutor(THREADS_PER_TASK, thread_name_prefix=prefix)
        return await asyncio.get_running_loop().run_in_executor(threads, call)

    async def aclose(self) -> None:
        """See what is under way to its end, write what is still in memory, and release everything."""
        await asyncio.to_thread(self._close)  # it waits for threads and for the disk; the event loop need not

    def _close(self) -> None:
        with self._lock:
            threads = list(self._threads.values())
        for one in threads:
            one.shutdown(wait=True)
        self.parts.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()
