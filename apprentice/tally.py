"""Counts of requests, kept in memory and written in batches.

A remote answer has been paid for and is committed on its own. A purely local request costs nothing worth a transaction:
it is counted here, and the counts reach the store at most `FLUSH_S` after the first of them, and on a clean shutdown.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable

from apprentice.store import Store
from apprentice.store.records import Count

__all__ = ["FLUSH_S", "Tally"]

FLUSH_S = 1.0

_log = logging.getLogger("apprentice")


class Tally:
    """Counts answers by task, day, version and outcome. One thread, started by the first count, writes them.

    ``day`` gives today's date, in the zone in which money is counted too. ``chore`` is done after each writing, by the
    same thread, and again a little later for as long as it returns True.
    """

    def __init__(self, store: Store, day: Callable[[], str], chore: Callable[[], bool] = lambda: False) -> None:
        self._store = store
        self._day = day
        self._chore = chore
        self._lock = threading.Lock()
        self._counts: defaultdict[tuple[str, str, str, str], tuple[int, float]] = defaultdict(lambda: (0, 0.0))
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._writer: threading.Thread | None = None

    def add(self, task: str, version: str, outcome: str, latency_s: float) -> None:
        """Count one request. Costs a dictionary entry; never touches the disk."""
        day = self._day()
        with self._lock:
            n, total = self._counts[task, day, version, outcome]
            self._counts[task, day, version, outcome] = (n + 1, total + latency_s)
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name="apprentice-tally", daemon=True)
                self._writer.start()
        self._wake.set()

    def flush(self) -> None:
        """Write what has been counted. What cannot be written stays counted, for the next try."""
        with self._lock:
            taken, self._counts = dict(self._counts), defaultdict(lambda: (0, 0.0))
        if not taken:
            return
        rows = [
            Count(task=task, day=day, version=version, outcome=outcome, n=n, latency_s=total)
            for (task, day, version, outcome), (n, total) in taken.items()
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
        while not self._closed.is_set():
            self._wake.wait()
            self._closed.wait(FLUSH_S)
            self._wake.clear()
            try:
                self.flush()
                if self._chore():
                    self._wake.set()
            except Exception:  # noqa: BLE001  # the counts are kept; the next round tries again
                _log.warning("request counts could not be written; trying again", exc_info=True)
                self._wake.set()
