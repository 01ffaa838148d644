"""Which version of a task answers, and moving from one to the next without a lost request.

A switch loads the new version beside the old one, proves it (`probe`), lets new requests go to it, waits until the
old one's are out, and unloads that. Whatever fails on the way leaves the old version serving and raises an alert. No
version yet is a state, not an error.

Each task has a circuit breaker and a bound. After a few failures in a row, or when the engine turns out to have lost
the version, requests are refused at once while a thread loads it again and has it answer: a server that died is
replaced, one that was restarted gets its adapter back. And only so many answers of a task are in flight at once: an
engine that hangs holds up these, and no thread more.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from apprentice import secrets
from apprentice.errors import EngineUnavailable, OutputError, VersionError
from apprentice.events.kinds import EventKind
from apprentice.local.engine import Engine, LocalAnswer, Version
from apprentice.local.probe import check_parity, read_probes

__all__ = ["Alert", "Switch"]

_log = secrets.logger(__name__)
_FAILURES_TO_OPEN = 4
_MOST_IN_FLIGHT = 64
_PARTING_S = 10.0
_FIRST_RETRY_S = 2.0
_LAST_RETRY_S = 60.0


class Alert(Protocol):
    """How an operator hears of something."""

    def __call__(self, kind: EventKind, task: str | None, evidence: dict[str, Any], /) -> None:
        """Raise the alert."""


@dataclass(eq=False)
class _Line:
    """One task's versions: the one wanted, the one serving, how bringing it in goes, and how it answers.

    ``failures`` and ``retry_at`` are of loading what is wanted; ``failed_in_a_row`` and ``recovering`` of what serves;
    ``answered`` is an input that was answered well.
    """

    wanted: str | None = None
    serving: str | None = None
    moving: threading.Thread | None = None
    failures: int = 0
    retry_at: float = 0.0
    in_flight: int = 0
    failed_in_a_row: int = 0
    answered: Mapping[str, Any] | None = None
    recovering: threading.Thread | None = None


class Switch:
    """Moves tasks between versions of one engine.

    ``clock`` is in seconds and only compared with itself. ``recheck_s`` is the first wait of a recovery, which doubles;
    ``most_in_flight`` bounds the answers of one task that are under way at once.
    """

    def __init__(
        self,
        engine: Engine,
        lookup: Callable[[str, str], Version],
        *,
        clock: Callable[[], float] = time.monotonic,
        alert: Alert,
        recheck_s: float = 1.0,
        most_in_flight: int = _MOST_IN_FLIGHT,
    ) -> None:
        self._engine = engine
        self._lookup = lookup
        self._clock = clock
        self._alert = alert
        self._recheck_s = recheck_s
        self._most_in_flight = most_in_flight
        self._lines: dict[str, _Line] = {}
        self._changed = threading.Condition()
        self._closed = threading.Event()

    def follow(self, task: str, champion: str | None) -> None:
        """Make ``champion`` the version that serves. Returns at once; a version that failed is tried again later."""
        line = self._lines.get(task)
        if line is not None and line.wanted == champion and (line.serving == champion or line.retry_at > self._clock()):
            return
        with self._changed:
            line = self._lines.setdefault(task, _Line())
            if line.wanted != champion:
                line.wanted, line.failures, line.retry_at = champion, 0, 0.0
            if self._closed.is_set() or line.moving is not None or line.serving == champion:
                return
            if line.retry_at > self._clock():
                return
            line.moving = threading.Thread(target=self._move, args=(task, line), name=f"apprentice-switch-{task}")
            line.moving.daemon = True
            line.moving.start()

    def answer(self, task: str, value: Mapping[str, Any], deadline_s: float) -> LocalAnswer:
        """Answer with the version that serves. Raises `LocalError`, `OutputError`.

        `EngineUnavailable` at once, without asking the engine, if no version is ready, the breaker is open, or too many
        answers are in flight.
        """
        line = self._lines.get(task)
        version = line.serving if line is not None else None
        if line is None or version is None:
            raise EngineUnavailable(f"no version of task {task!r} is ready")
        with self._changed:
            if line.recovering is not None:
                raise EngineUnavailable(f"version {version} is unavailable until it has been loaded again and answers")
            if line.in_flight >= self._most_in_flight:
                raise EngineUnavailable(f"the local model is busy: {line.in_flight} answers of {task!r} are in flight")
            line.in_flight += 1
        try:
            answer = self._ask(task, version, value, deadline_s)
        except EngineUnavailable as error:
            self._failed(task, line, error, deadline_s, lost=False)
            raise
        except VersionError as error:
            self._failed(task, line, error, deadline_s, lost=True)
            raise
        finally:
            with self._changed:
                line.in_flight -= 1
        line.failed_in_a_row, line.answered = 0, value
        return answer

    def _ask(self, task: str, version: str, value: Mapping[str, Any], deadline_s: float) -> LocalAnswer:
        ends = time.monotonic() + deadline_s
        while True:
            try:
                return self._engine.answer(version, value, deadline_s=max(0.0, ends - time.monotonic()))
            except VersionError:
                # The version that was read a moment ago may be gone because another serves by now.
                serving = self.serving(task)
                if serving is None or serving == version:
                    raise
                version = serving

    def serving(self, task: str) -> str | None:
        """The version that answers, None where there is none yet."""
        line = self._lines.get(task)
        return line.serving if line is not None else None

    def healthy(self, task: str) -> bool:
        """Whether a version is ready and the breaker is closed."""
        line = self._lines.get(task)
        return line is not None and line.serving is not None and line.recovering is None

    def wait_until_serving(self, task: str, name: str, timeout_s: float) -> bool:
        """Wait for a version that `follow` was told of. False when it failed, was replaced, or took longer."""
        with self._changed:
            line = self._lines.get(task)
            if line is None:
                return False
            self._changed.wait_for(lambda: line.serving == name or line.moving is None, timeout=timeout_s)
            return line.serving == name

    def close(self) -> None:
        """Stop moving and recovering. The engine stays as it is: whoever opened it closes it.

        A load that takes longer than a few seconds is not waited for: it ends when the engine is closed.
        """
        self._closed.set()
        with self._changed:
            threads = [thread for line in self._lines.values() for thread in (line.moving, line.recovering)]
        ends = time.monotonic() + _PARTING_S
        for thread in threads:
            if thread is not None:
                thread.join(max(0.0, ends - time.monotonic()))

    # --- moving ---------------------------------------------------------------------------------------------------

    def _move(self, task: str, line: _Line) -> None:
        """Work until what serves is what is wanted, or that failed. One thread a task."""
        while True:
            with self._changed:
                wanted, before = line.wanted, line.serving
                if wanted == before or self._closed.is_set() or line.retry_at > self._clock():
                    line.moving = None
                    self._changed.notify_all()
                    return
            error = self._prove(task, wanted) if wanted is not None else None
            with self._changed:
                overtaken = line.wanted != wanted
                if error is None and not overtaken:
                    line.serving, line.failures = wanted, 0
                    self._changed.notify_all()
            leaving = wanted if error is not None or overtaken else before
            if leaving is not None and leaving != line.serving:
                self._let_go(leaving)
            if error is not None and not overtaken:
                self._put_off(task, line, wanted, error)

    def _prove(self, task: str, name: str | None) -> Exception | None:
        """Load a version beside the one that serves, and have it answer the probes."""
        assert name is not None
        try:
            version = self._lookup(task, name)
            self._engine.load(version)
            if version.adapter is not None:
                check_parity(self._engine, name, read_probes(version.adapter))
        except Exception as error:  # noqa: BLE001  # whatever it is, the old version goes on and somebody hears of it
            return error
        return None

    def _put_off(self, task: str, line: _Line, wanted: str | None, error: Exception) -> None:
        with self._changed:
            if line.wanted == wanted:
                delay_s = min(_LAST_RETRY_S, _FIRST_RETRY_S * 2**line.failures)
                line.failures += 1
                line.retry_at = self._clock() + delay_s
        kind = EventKind.VERSION_REFUSED if isinstance(error, VersionError) else EventKind.VERSION_NOT_LOADED
        self._alert(kind, task, {"version": wanted, "still_serving": line.serving, "error": str(error)})

    def _let_go(self, name: str) -> None:
        try:
            self._engine.unload(name)
        except Exception:  # noqa: BLE001  # it no longer serves; at worst it takes memory
            _log.warning("version %s could not be unloaded", name, exc_info=True)

    # --- the breaker ----------------------------------------------------------------------------------------------

    def _failed(self, task: str, line: _Line, error: Exception, deadline_s: float, *, lost: bool) -> None:
        """Count a failure; open the breaker after a few in a row, or at once if the engine has ``lost`` the version."""
        with self._changed:
            line.failed_in_a_row += 1
            failed = line.failed_in_a_row
            if line.recovering is not None or line.serving is None or self._closed.is_set():
                return
            if failed < _FAILURES_TO_OPEN and not lost:
                return
            evidence = {"version": line.serving, "error": str(error), "failures_in_a_row": failed}
            line.recovering = threading.Thread(
                target=self._recover, args=(task, line, deadline_s, evidence), name=f"apprentice-recover-{task}"
            )
            line.recovering.daemon = True
            line.recovering.start()

    def _recover(self, task: str, line: _Line, deadline_s: float, evidence: dict[str, Any]) -> None:
        """Load what serves again, until it answers; then close the breaker."""
        self._alert(EventKind.ENGINE_UNAVAILABLE, task, evidence)
        delay_s = self._recheck_s
        while not self._closed.wait(delay_s):
            try:
                self._try_again(task, line, deadline_s)
                break
            except Exception:  # noqa: BLE001  # whatever it is, it is not well yet
                _log.info("the local model of task %s has not recovered yet", task, exc_info=True)
            delay_s = min(_LAST_RETRY_S, delay_s * 2)
        with self._changed:
            line.failed_in_a_row = 0
            line.recovering = None
        if not self._closed.is_set():
            self._alert(EventKind.ENGINE_RECOVERED, task, {"version": line.serving})

    def _try_again(self, task: str, line: _Line, deadline_s: float) -> None:
        name = line.serving
        if name is None:  # it was withdrawn meanwhile: there is nothing to recover
            return
        version = self._lookup(task, name)
        self._engine.load(version)
        if line.serving != name:  # another took over and had this one unloaded meanwhile
            self._let_go(name)
            return
        # The engine may say that it is well and hang all the same. It is asked what it has answered before: the
        # request that failed may be what brings it down. A vendor's answer would cost money.
        if line.answered is not None and version.remote_model is None:
            with contextlib.suppress(OutputError):
                self._engine.answer(name, line.answered, deadline_s=deadline_s)
