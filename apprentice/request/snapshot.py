"""What the store last said of every task: which version is champion, and the policy under which each one answers."""

from __future__ import annotations

import threading
from collections.abc import Callable

from apprentice.store import Store, TaskPolicy

__all__ = ["SNAPSHOT_S", "Snapshot"]

SNAPSHOT_S = 1.0
"""How old a policy snapshot may be. A promotion by another process is followed within this time."""


class Snapshot:
    """Every task's policy as of at most `SNAPSHOT_S` ago, in one cheap query for all of them.

    While the store cannot be read, ``away`` says why and the last one stays; one thread tries again, once a
    `SNAPSHOT_S`, while the others go on.
    """

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._states: dict[str, TaskPolicy] = {}
        self._read_at = float("-inf")
        self._tried_at = float("-inf")
        self._trying = threading.Lock()
        self._forgotten = False
        self.away: Exception | None = None

    def refresh(self) -> None:
        """Read it where it is not new enough. Raises what the store raises."""
        if not self._is_stale():
            return
        if self.away is None:
            self._try()
        elif not 0 <= self._clock() - self._tried_at < SNAPSHOT_S and self._trying.acquire(blocking=False):
            try:
                self._try()
            finally:
                self._trying.release()

    def _try(self) -> None:
        try:
            self.read()
        except Exception as error:
            self.lost(error)
            raise

    def read(self) -> None:
        """Read it. Concurrent readers do no harm: each brings a snapshot that is new enough."""
        at = self._clock()
        self._states = self._store.policies()
        self._read_at = at
        self._forgotten = False
        self.away = None

    def lost(self, error: Exception) -> None:
        """The store could not be reached just now."""
        self._tried_at = self._clock()
        self.away = error

    def is_there(self) -> bool:
        """Whether it has ever been read."""
        return bool(self._states)

    def age_s(self) -> float:
        """For how long it has not been read, in seconds."""
        return self._clock() - self._read_at

    def _is_stale(self) -> bool:
        """Whether it is old, was forgotten, or the clock went back."""
        return self._forgotten or self.away is not None or not 0 <= self.age_s() < SNAPSHOT_S

    def of(self, task: str) -> TaskPolicy:
        """The task's policy as last read."""
        return self._states[task]

    def forget(self) -> None:
        """Something has just changed in this process: the next request reads again."""
        self._forgotten = True
