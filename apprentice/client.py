"""Apprentice and AsyncApprentice: one call, `run(task, input) -> Result`.

Both walk the router's one path (apprentice/request/router.py): the one in the caller's thread, the other in a thread
that the caller's event loop waits for.

Either may be made before a fork (gunicorn --preload): threads, sockets and locks do not survive one, so a child opens
parts of its own at its first call and leaves the parent's alone. Either may be dropped without `close`: what is in
memory is written, and everything released, when it is collected or when the process ends.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from apprentice import secrets
from apprentice.errors import ClientClosed
from apprentice.result import Result, TaskStatus
from apprentice.settings.config import Settings, load_settings

if TYPE_CHECKING:
    import httpx

    from apprentice.assembly import Assembly
    from apprentice.local.engine import Engine
    from apprentice.request.router import Health

__all__ = ["Apprentice", "AsyncApprentice"]

THREADS_PER_TASK = 64
"""How many requests of a task an `AsyncApprentice` has under way at once; further ones wait for these."""

_log = secrets.logger("apprentice")


class _Base:
    """What both clients share: the assembled parts, how they come from a configuration, and how they are let go."""

    def __init__(self, assemble: Callable[[], Assembly]) -> None:
        self._assemble = assemble
        self._reopening = threading.Lock()
        self._closed = False
        self._open()

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
        warm: bool = True,
    ) -> Self:
        """Set everything up from a config file or `Settings`.

        ``http_client``, ``engine``, ``environ``, ``clock`` and ``draw`` replace the network, the local model, the
        environment, time (unix seconds) and chance, for tests. A ``http_client`` (an `httpx.Client` for both clients)
        is used as it is, from several threads at once, and is yours to close; make it in the process that uses it.
        ``warm`` loads the champions in the background at once; without it a task's is loaded at its first request,
        which suits a process that only forks. Raises `ConfigError`, `StoreError`, `MissingExtra`.
        """
        # Half of all that Apprentice imports is the database's; who only imports names does not pay for it.
        from apprentice.assembly import assemble

        settings = config if isinstance(config, Settings) else load_settings(config)

        def assembled() -> Assembly:
            parts = assemble(
                settings,
                http_client=http_client,
                engine=engine,
                environ=os.environ if environ is None else environ,
                clock=clock,
                draw=draw or random.Random(),
            )
            if warm:
                parts.router.warm()
            return parts

        return cls(assembled)

    @property
    def parts(self) -> Assembly:
        """The parts that this process works with."""
        if self._pid != os.getpid() and not self._closed:
            with self._reopening:
                if self._pid != os.getpid():
                    self._inherited = self._parts  # kept: letting go would close what the parent uses
                    self._open()
        return self._parts

    def _open(self) -> None:
        self._parts = self._assemble()
        self._finalizer = weakref.finalize(self, _close_forgotten, self._parts, os.getpid())
        self._pid = os.getpid()

    def _close(self) -> None:
        self._closed = True
        self._finalizer.detach()
        if self._pid == os.getpid():
            self._parts.close()

    @property
    def settings(self) -> Settings:
        """The configuration in force."""
        return self._parts.settings

    def _status(self) -> dict[str, TaskStatus]:
        from apprentice.operate.status import task_statuses

        parts = self.parts
        with parts.router.call():
            return task_statuses(parts.settings, parts.store, parts.judge)


def _close_forgotten(parts: Assembly, pid: int) -> None:
    """Close what nobody closed, in the process that opened it."""
    if pid != os.getpid():
        return

    def close() -> None:
        try:
            parts.close()
        except Exception:  # noqa: BLE001  # nobody is there to be told
            _log.warning("a client that nobody closed could not write everything", exc_info=True)

    try:
        # Garbage is collected in any thread at any moment, also in one of the parts' own that holds a lock.
        threading.Thread(target=close, name="apprentice-close").start()
    except RuntimeError:  # the interpreter is shutting down: there are no new threads, and nothing left to wait for
        close()


class Apprentice(_Base):
    """The synchronous client; safe to share between threads.

    with Apprentice.from_config("apprentice.yaml") as apprentice:
        print(apprentice.run("classify_ticket", {"text": "Where is my parcel?"}).output)
    """

    def run(self, task: str, input: Mapping[str, Any]) -> Result:  # noqa: A002  # the user's word for it
        """Answer one input of a task.

        Raises `InputError` (or `UnknownTask`), `BudgetExceeded`, `Unavailable`, `RemoteRefused`, `OutputError` or
        `ClientClosed`.
        """
        return self.parts.router.run(task, input)

    def status(self) -> dict[str, TaskStatus]:
        """Each task's phase, correlation, coverage, sampling rate, spend and savings, by name."""
        return self._status()

    def health(self) -> Health:
        """What this process knows of itself; cheap, however much has been recorded."""
        return self.parts.router.health()

    def wait_until_serving(self, task: str, timeout_s: float = 60.0) -> bool:
        """Wait until the task's champion (if it has one) is loaded and answers; False where that takes longer."""
        return self.parts.router.wait_until_serving(task, timeout_s)

    def close(self) -> None:
        """See requests under way to their end, write what is still in memory and release everything.

        Everything is released whatever fails on the way; then the failure is raised.
        """
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@dataclass(slots=True)
class _Pools:
    """One process's threads, by task. Those named "" are for what belongs to no task."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    threads: dict[str, ThreadPoolExecutor] = field(default_factory=dict)


class AsyncApprentice(_Base):
    """The asynchronous client: the same calls, awaited. It belongs to no event loop: any may use it, one after another.

        async with AsyncApprentice.from_config("apprentice.yaml") as apprentice:
            result = await apprentice.run("classify_ticket", {"text": "Where is my parcel?"})

    Every task has threads of its own, so that one that waits for a slow model or vendor does not hold up the others. A
    request whose caller is cancelled is seen to its end all the same: it may have been paid for.
    """

    def __init__(self, assemble: Callable[[], Assembly]) -> None:
        self._pools: dict[int, _Pools] = {}
        super().__init__(assemble)

    async def run(self, task: str, input: Mapping[str, Any]) -> Result:  # noqa: A002  # the user's word for it
        """As `Apprentice.run`."""
        return await self._in_thread(task, lambda: self.parts.router.run(task, input))

    async def status(self) -> dict[str, TaskStatus]:
        """As `Apprentice.status`."""
        return await self._in_thread("", self._status)

    async def health(self) -> Health:
        """What this process knows of itself; cheap, however much has been recorded."""
        return await self._in_thread("", lambda: self.parts.router.health())

    async def wait_until_serving(self, task: str, timeout_s: float = 60.0) -> bool:
        """As `Apprentice.wait_until_serving`."""
        return await self._in_thread(task, lambda: self.parts.router.wait_until_serving(task, timeout_s))

    async def _in_thread[T](self, task: str, call: Callable[[], T]) -> T:
        """Call something that blocks, in one of the task's threads."""
        name = task if any(task == one.name for one in self.settings.tasks) else ""  # which will only be an error
        pools = self._pools.setdefault(os.getpid(), _Pools())  # after a fork the parent's threads are not there
        with pools.lock:
            if self._closed:
                raise ClientClosed
            threads = pools.threads.get(name)
            if threads is None:
                prefix = f"apprentice-{name}"
                threads = pools.threads[name] = ThreadPoolExecutor(THREADS_PER_TASK, thread_name_prefix=prefix)
            done = asyncio.get_running_loop().run_in_executor(threads, call)
        return await done

    async def aclose(self) -> None:
        """As `Apprentice.close`."""
        await asyncio.to_thread(self._close)  # it waits for threads and for the disk; the event loop need not

    def _close(self) -> None:
        pools = self._pools.setdefault(os.getpid(), _Pools())
        with pools.lock:
            self._closed = True
        for threads in pools.threads.values():
            threads.shutdown(wait=True)
        super()._close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()
