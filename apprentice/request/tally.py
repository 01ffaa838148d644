"""Counts of requests, kept in memory and written in batches.

A remote answer has been paid for and is committed on its own. A purely local request costs nothing worth a transaction:
it is counted here, and the counts reach the store at most `FLUSH_S` after the first of them, and on a clean shutdown.
"""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable

from apprentice import secrets
from apprentice.store import Store
from apprentice.store.records import Count

__all__ = ["FLUSH_S", "Tally"]

FLUSH_S = 1.0
_LONGEST_PAUSE_S = 16.0

_log = secrets.logger("apprentice")


class Tally:
    """Counts answers by task, day, version, outcome and half. One thread, started by the first count, writes them.

    ``day`` gives today's date, in the zone in which money is counted too. ``chore`` is done after each writing, by the
    same thread, and again a little later for as long as it returns True.
    """

    def __init__(self, store: Store, day: Callable[[], str], chore: Callable[[], bool] = lambda: False) -> None:
        self._store = store
        self._day = day
        self._chore = chore
        self._lock = threading.Lock()
        self._counts: defaultdict[tuple[str, str, str, str, str], tuple[int, float]] = defaultdict(lambda: (0, 0.0))
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._writer: threading.Thread | None = None

    def add(self, task: str, version: str, outcome: str, latency_s: float, *, answered_by: str = "") -> None:
        """Count one request. Costs a dictionary entry; never touches the disk. For ``answered_by`` see `Count`."""
        key = task, self._day(), version, outcome, answered_by
        with self._lock:
            n, total = self._counts[key]
            self._counts[key] = (n + 1, total + latency_s)
        self.wake()

    def wake(self) -> None:
        """Have the writer look, within `FLUSH_S`, whether there is something to write."""
        self._wake.set()
        if self._writer is None:
            with self._lock:
                if self._writer is None and not self._closed.is_set():
                    writer = threading.Thread(target=self._write, name="apprentice-tally", daemon=True)
                    with contextlib.suppress(RuntimeError):  # the interpreter is shutting down; `close` writes it
                        writer.start()
                        self._writer = writer

    def flush(self) -> None:
        """Write what has been counted. What cannot be written stays counted, for the next try."""
        with self._lock:
            taken, self._counts = dict(self._counts), defaultdict(lambda: (0, 0.0))
        if not taken:
            return
        rows = [
            Count(task=task, day=day, version=version, outcome=outcome, n=n, latency_s=total, answered_by=half)
            for (task, day, version, outcome, half), (n, total) in taken.items()
        ]
        try:
            self._store.add_counts(rows)
        except Exception:
            with self._lock:
                for key, (n, total) in taken.items():
                    old_n, old_total = self._counts[key]
                    self._counts[key] = (old_n + n, old_total + total)
            raise

    def close(self) -> None:
        """Stop the writer and write the rest."""
        self._closed.set()
        self._wake.set()
        if self._writer is not None:
            self._writer.join()
        self.flush()

    def _write(self) -> None:
        pause_s = FLUSH_S
        while not self._closed.is_set():
            self._wake.wait()
            self._closed.wait(pause_s)
            self._wake.clear()
            try:
                self.flush()
                if self._chore():
                    self._wake.set()
                pause_s = FLUSH_S
            except Exception as error:  # noqa: BLE001  # the counts are kept; the next round tries again
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                _log.warning("request counts could not be written (%s); trying again in %g s", error, pause_s)
                self._wake.set()
