"""The one way in which people are told that something happened: the store, the log, and sinks.

What happens in a transaction (a phase, a promotion, a mark of a cap) is an event that this transaction writes; the
store tells it to its listener, which is an `Events`, when it is committed. Whatever else happens is given to `emit`,
which returns at once: a background thread writes it to the store and hands it to the sinks, and so no request and no
event loop waits for a disk or a webhook.

An emitted event about the same matter is told once in `QUIET_S`, among all processes on one store. A sink that fails is
tried again with growing pauses. `close`, which runs at exit too, waits a bounded time for what is still under way.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import heapq
import itertools
import json
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from apprentice.events.kinds import LEVELS, EventKind, Level
from apprentice.events.sinks import Sink, Undelivered, sinks_of
from apprentice.secrets import logger, scrub, scrub_values
from apprentice.settings.config import AlertSettings
from apprentice.store import Store
from apprentice.store.records import EventRecord

__all__ = ["QUIET_S", "Events"]

QUIET_S = 300.0
CLOSE_S = 5.0
"""How long `close` waits for the store and the sinks."""
PAUSES_S = (1.0, 5.0, 30.0, 120.0, 600.0)
"""Before the second try, the third, ...; after the last one an event is given up, with a line in the log."""

_SEND_S = 5.0
_CLOSING_PAUSE_S = 0.25
_LAST_TRIES = 3
_MOST_WAITING = 1000
_MOST_REMEMBERED = 10_000
_LOG_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "critical": logging.CRITICAL}

_log = logger("apprentice")
_open: weakref.WeakSet[Events] = weakref.WeakSet()


@dataclass(slots=True)
class _Writing:
    """An event on its way to the store. ``told``: the sinks have it, because the store failed."""

    event: EventRecord
    tries: int = 0
    told: bool = False


@dataclass(slots=True)
class _Sending:
    """An event on its way to a sink."""

    event: EventRecord
    sink: Sink
    tries: int = 0


@dataclass(order=True, slots=True)
class _Due:
    """A job, in the order in which jobs are done: what is due earlier, the store before sinks, first come."""

    at: float
    last: bool
    number: int
    job: _Writing | _Sending = field(compare=False)


class Events:
    """Tells events. Safe to use from many threads; never raises, for what it tells of matters more than the telling.

    ``sinks`` get what is at least as grave as ``level``, and the all-clear. ``clock`` gives Unix seconds.
    """

    def __init__(
        self,
        store: Store,
        sinks: Sequence[Sink] = (),
        *,
        level: Level = "warning",
        clock: Callable[[], float] = time.time,
        quiet_s: float = QUIET_S,
        pauses_s: Sequence[float] = PAUSES_S,
    ) -> None:
        self._store = store
        self._sinks = tuple(sinks)
        self._level = level
        self._clock = clock
        self._quiet_s = quiet_s
        self._pauses_s = pauses_s
        self._listens = store.listen(self.tell)
        # All that follows is this process's own: see `_begin_anew`.
        self._told_at: dict[str, float]
        self._jobs: list[_Due]
        self._thread: threading.Thread | None
        self._closed: bool
        self._begin_anew()
        _open.add(self)

    @classmethod
    def configured(cls, settings: AlertSettings, store: Store, clock: Callable[[], float] = time.time) -> Events:
        """Those of a configuration's section ``alerts``."""
        return cls(store, sinks_of(settings), level=settings.level, clock=clock)

    def emit(
        self,
        kind: EventKind,
        task: str | None = None,
        evidence: Mapping[str, Any] | None = None,
        *,
        level: Level | None = None,
        about: str = "",
    ) -> None:
        """Tell of something that no transaction records. Returns at once.

        ``task`` is None if it concerns all of them. The same kind, task and ``about`` (a version, a run, a cap: what
        makes it another matter) is told once in `QUIET_S`. ``level`` replaces the kind's own.
        """
        now = self._clock()
        matter = hashlib.sha256(json.dumps([kind.value, task, about]).encode()).hexdigest()[:32]
        self._check_process()
        with self._changed:
            if 0 <= now - self._told_at.get(matter, float("-inf")) < self._quiet_s:
                return
            self._told_at[matter] = now
            if len(self._told_at) > _MOST_REMEMBERED:
                self._told_at = {m: at for m, at in self._told_at.items() if now - at < self._quiet_s}
        record = EventRecord(
            f"{matter}:{math.floor(now / self._quiet_s)}",
            task,
            kind.value,
            level or kind.level,
            scrub_values(evidence or {}),
            now,
        )
        self._to_log(record)
        self._put(_Writing(record))

    def tell(self, event: EventRecord) -> None:
        """Tell of an event that is in the store: to the log at once, to the sinks in the background."""
        self._check_process()
        self._to_log(event)
        self._to_sinks(event)

    def flush(self, timeout_s: float = CLOSE_S) -> bool:
        """Wait until all that was emitted is in the store and with the sinks; False if that takes longer."""
        self._check_process()
        with self._changed:
            return self._changed.wait_for(lambda: not (self._jobs or self._busy), timeout_s)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Write and deliver what is left, waiting at most ``timeout_s``; what cannot be delivered is logged."""
        self._check_process()
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._deadline = time.monotonic() + timeout_s
            for due in self._jobs:  # what is put off has no time left to wait for
                due.at = 0.0
                due.job.tries = max(due.job.tries, len(self._pauses_s) - _LAST_TRIES)
            heapq.heapify(self._jobs)
            self._wake()
            thread = self._thread
        if thread is None:
            self._run()  # at the interpreter's exit no thread can be started any more
        else:
            thread.join(timeout_s + 1.0)  # a sink may be in the middle of its last try
        with self._changed:
            for due in self._jobs:
                self._give_up(due.job, "the process ends")
            self._jobs.clear()
        if self._listens:
            self._store.listen(None)
            self._listens = False
        _open.discard(self)

    # ------------------------------------------------------------- the background

    def _begin_anew(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition(threading.RLock())
        self._told_at = {}
        self._jobs = []
        self._numbers = itertools.count()
        self._thread = None
        self._busy = False
        self._closed = False
        self._deadline = float("inf")

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            self._begin_anew()  # after a fork: what was waiting is the parent's to tell

    def _put(self, job: _Writing | _Sending, pause_s: float = 0.0) -> None:
        at = time.monotonic() + pause_s if pause_s else 0.0
        with self._changed:
            if len(self._jobs) >= _MOST_WAITING:
                self._give_up(job, f"{_MOST_WAITING} events wait already")
                return
            heapq.heappush(self._jobs, _Due(at, isinstance(job, _Sending), next(self._numbers), job))
            self._wake()

    def _wake(self) -> None:
        """Make sure that a thread is at work while there is something to do. Holds the lock."""
        if self._thread is None and self._jobs:
            thread = threading.Thread(target=self._run, name="apprentice-events", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads; the next event, or close, tries again
                return
            self._thread = thread
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                job = self._next()
                if job is None:
                    self._thread = None
                    self._changed.notify_all()
                    return
                self._busy = True
            if isinstance(job, _Writing):
                self._write(job)
            else:
                self._send(job)

    def _next(self) -> _Writing | _Sending | None:
        """The next job, as soon as it is due; None if none is left, or no time. Holds the lock."""
        while self._jobs:
            wait_s = self._jobs[0].at - (now := time.monotonic())
            if now >= self._deadline:
                return None
            if wait_s <= 0:
                return heapq.heappop(self._jobs).job
            self._changed.wait(min(wait_s, self._deadline - now))
        return None

    def _write(self, job: _Writing) -> None:
        try:
            earlier = self._store.add_event_unless_recent(job.event, self._quiet_s)
        except Exception as error:  # noqa: BLE001  # see the class's docstring
            if job.tries == 0:
                _log.warning("the event %s could not be recorded yet: %s", job.event.kind, error)
            if not job.told:
                job.told = True
                self._to_sinks(job.event)  # better told by each process than by none
            self._again(job, str(error))
            return
        if earlier is not None:
            with self._changed:
                self._told_at[job.event.id.rpartition(":")[0]] = earlier
        elif not job.told:
            self._to_sinks(job.event)

    def _to_sinks(self, event: EventRecord) -> None:
        if LEVELS.index(event.level) >= LEVELS.index(self._level) or _ends_trouble(event):
            for sink in self._sinks:
                self._put(_Sending(event, sink))

    def _send(self, job: _Sending) -> None:
        timeout_s = max(0.1, min(_SEND_S, self._deadline - time.monotonic()))
        try:
            job.sink.send(job.event, timeout_s)
        except Undelivered as error:
            failure = error
        except Exception as error:  # noqa: BLE001  # see the class's docstring
            failure = Undelivered(f"{type(error).__name__}: {error}")
        else:
            return
        if not failure.again:
            self._give_up(job, str(failure))
            return
        if job.tries == 0:
            _log.warning("the %s did not take the event %s yet: %s", job.sink.name, job.event.kind, failure)
        self._again(job, str(failure), failure.after_s or 0.0)

    def _again(self, job: _Writing | _Sending, why: str, at_least_s: float = 0.0) -> None:
        if job.tries >= len(self._pauses_s):
            self._give_up(job, why)
            return
        pause_s = max(self._pauses_s[job.tries], at_least_s)
        job.tries += 1
        self._put(job, min(pause_s, _CLOSING_PAUSE_S) if self._closed else pause_s)

    def _give_up(self, job: _Writing | _Sending, why: str) -> None:
        whom = job.sink.name if isinstance(job, _Sending) else "store"
        _log.error("the event %s (%s) did not reach the %s: %s", job.event.kind, job.event.id, whom, why)

    def _to_log(self, event: EventRecord) -> None:
        evidence = json.dumps(event.evidence, default=str)
        _log.log(_LOG_LEVELS[event.level], "%s: %s %s", event.task or "all tasks", event.kind, scrub(evidence))


def _ends_trouble(event: EventRecord) -> bool:
    kind = EventKind.named(event.kind)
    return kind is not None and kind.all_clear


@atexit.register
def _close_all() -> None:
    for events in list(_open):
        with contextlib.suppress(Exception):  # the interpreter's exit must go on
            events.close()
