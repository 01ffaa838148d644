"""The lease under which a task is trained: one worker at a time, renewed while it lives, a fence when it is lost."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from apprentice import secrets
from apprentice.errors import LeaseLost, TrainingError
from apprentice.store import Store
from apprentice.store.records import Lease

__all__ = ["LEASE_S", "Busy", "HeldLease", "held_lease", "training_lease", "watch_lease", "worker"]

LEASE_S = 60.0
_log = secrets.logger("apprentice.coach")


class Busy(TrainingError):
    """Another worker holds the task's lease."""


def training_lease(task: str) -> str:
    """The name of the lease whose holder trains a task."""
    return f"coach:{task}"


def watch_lease(task: str) -> str:
    """The name of the lease that is held while some coach watches a task: `Store.lease` tells whether one does."""
    return f"watch:{task}"


def worker() -> str:
    """A name for this process among all that share a store."""
    return f"{socket.gethostname()}/{os.getpid()}/{uuid.uuid4().hex[:8]}"


class HeldLease:
    """A lease that a thread of its own renews.

    A renewal that fails is tried again, about ten times in the lease's time. After that, or as soon as another worker
    has taken the lease, `check` raises.
    """

    def __init__(self, store: Store, lease: Lease, ttl_s: float) -> None:
        self.lease = lease
        self._store = store
        self._ttl_s = ttl_s
        self._lost: str | None = None
        self._over = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name=f"lease-{lease.name}", daemon=True)
        self._keeper.start()

    def check(self) -> None:
        """Raises `LeaseLost` where the lease is no longer one's own."""
        if self._lost is not None:
            raise LeaseLost(f"the lease {self.lease.name!r} is lost: {self._lost}; the run is left to whoever has it")

    def confirm(self) -> None:
        """Ask the store now: before something is written that its fence does not reach. Raises `LeaseLost`."""
        if self._store.renew_lease(self.lease, self._ttl_s) is None:
            self._lost = self._lost or "another worker has it"
        self.check()

    def release(self) -> None:
        """Give it back. A store that is away must not turn a run that is over into one that failed."""
        self._over.set()
        self._keeper.join()
        try:
            self._store.release_lease(self.lease)
        except Exception:  # noqa: BLE001  # it runs out by itself
            _log.warning("the lease %s could not be given back; it runs out by itself", self.lease.name, exc_info=True)

    def _keep(self) -> None:
        renewed_at, pause_s = time.monotonic(), self._ttl_s / 4
        while not self._over.wait(pause_s):
            asked_at = time.monotonic()
            try:
                kept = self._store.renew_lease(self.lease, self._ttl_s)
            except Exception as error:  # noqa: BLE001  # whatever a database that is away raises: try again
                pause_s = self._ttl_s / 12
                if time.monotonic() - renewed_at > self._ttl_s:
                    self._lost = f"it could not be renewed for {self._ttl_s:.0f} s ({error})"
                    _log.error("%s: %s", self.lease.name, self._lost)
                    return
                _log.warning("%s could not be renewed, trying again: %s", self.lease.name, error)
                continue
            if kept is None:
                self._lost = "another worker has it"
                _log.error("%s: %s", self.lease.name, self._lost)
                return
            renewed_at, pause_s = asked_at, self._ttl_s / 4


@contextlib.contextmanager
def held_lease(store: Store, task: str) -> Iterator[HeldLease]:
    """Hold the right to train a task. A worker that dies loses it within `LEASE_S`.

    Raises `Busy` while another has it.
    """
    ttl_s = LEASE_S
    taken = store.acquire_lease(training_lease(task), worker(), ttl_s)
    if taken is None:
        raise Busy(f"another worker is training {task!r}; wait until it is done, or {ttl_s:.0f} s if it has died")
    held = HeldLease(store, taken, ttl_s)
    try:
        yield held
    finally:
        held.release()
