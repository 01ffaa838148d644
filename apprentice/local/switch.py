"""Which version of a task answers, and moving from one to the next without a lost request.

A switch loads the new version beside the old one, proves it (`probe`), lets new requests go to it, waits until the
old one's are out, and unloads that. Whatever fails on the way leaves the old version serving and raises an alert. No
version yet is a state, not an error. In front of the engine stands a circuit breaker: after a few failures in a row
it is left alone, looked after in the background, and given its versions again when it is back, since a restarted
server has forgotten them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from apprentice.errors import EngineUnavailable, VersionError
from apprentice.local.engine import Engine, LocalAnswer, Version
from apprentice.local.probe import check_parity, read_probes

__all__ = ["Alert", "Switch"]

_log = logging.getLogger(__name__)
_FAILURES_TO_OPEN = 4
_FIRST_RETRY_S = 2.0
_LAST_RETRY_S = 60.0


class Alert(Protocol):
    """How an operator hears of something."""

    def __call__(self, kind: str, task: str | None, evidence: dict[str, Any], /) -> None:
        """Raise the alert."""


@dataclass(eq=False)
class _Line:
    """One task's versions: the one wanted, the one serving, and how bringing it in goes."""

    wanted: str | None = None
    serving: str | None = None
    moving: threading.Thread | None = None
    failures: int = 0
    retry_at: float = 0.0


class Switch:
    """Moves tasks between versions of one engine. ``clock`` is in seconds and only compared with itself."""

    def __init__(
        self,
        engine: Engine,
        lookup: Callable[[str, str], Version],
        *,
        clock: Callable[[], float] = time.monotonic,
        alert: Alert,
        recheck_s: float = 1.0,
    ) -> None:
        self._engine = engine
        self._lookup = lookup
        self._clock = clock
        self._alert = alert
        self._recheck_s = recheck_s
        self._lines: dict[str, _Line] = {}
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._failures = 0
        self._nurse: threading.Thread | None = None

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
        """Answer with the version that serves. Raises `EngineUnavailable` (none ready, breaker open), `OutputError`."""
        if self._nurse is not None:
            raise EngineUnavailable("the local engine has failed repeatedly and is left alone until it is well again")
        version = self.serving(task)
        if version is None:
            raise EngineUnavailable(f"no version of task {task!r} is ready")
        try:
            answer = self._ask(task, version, value, deadline_s)
        except EngineUnavailable as error:
            self._failed(error)
            raise
        self._failures = 0
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
        return self._nurse is None and self.serving(task) is not None

    def wait_until_serving(self, task: str, name: str, timeout_s: float) -> bool:
        """Wait for a version that `follow` was told of. False when it failed, was replaced, or took longer."""
        with self._changed:
            line = self._lines.get(task)
            if line is None:
                return False
            self._changed.wait_for(lambda: line.serving == name or line.moving is None, timeout=timeout_s)
            return line.serving == name

    def close(self) -> None:
        """Stop moving and nursing. The engine stays as it is: whoever opened it closes it."""
        self._closed.set()
        with self._changed:
            threads = [line.moving for line in self._lines.values()] + [self._nurse]
        for thread in threads:
            if thread is not None:
                thread.join()

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
        kind = "version_refused" if isinstance(error, VersionError) else "version_not_loaded"
        self._alert(kind, task, {"version": wanted, "still_serving": line.serving, "error": str(error)})

    def _let_go(self, name: str) -> None:
        try:
            self._engine.unload(name)
        except Exception:  # noqa: BLE001  # it no longer serves; at worst it takes memory
            _log.warning("version %s could not be unloaded", name, exc_info=True)

    # --- the breaker ----------------------------------------------------------------------------------------------

    def _failed(self, error: EngineUnavailable) -> None:
        with self._changed:
            self._failures += 1
            if self._failures < _FAILURES_TO_OPEN or self._nurse is not None or self._closed.is_set():
                return
            self._nurse = threading.Thread(target=self._look_after, name="apprentice-engine-nurse", daemon=True)
            self._nurse.start()
        self._alert("engine_unavailable", None, {"error": str(error), "failures_in_a_row": self._failures})

    def _look_after(self) -> None:
        """Wait until the engine is well and holds every version that serves; then close the breaker."""
        delay_s = self._recheck_s
        while not self._closed.wait(delay_s):
            try:
                well = self._engine.health().ok
                if well:
                    for task, line in list(self._lines.items()):
                        if line.serving is not None:
                            self._engine.load(self._lookup(task, line.serving))
            except Exception:  # noqa: BLE001  # not well yet
                _log.info("the local engine is not well yet", exc_info=True)
                well = False
            if well:
                break
            delay_s = min(_LAST_RETRY_S, delay_s * 2)
        with self._changed:
            self._failures = 0
            self._nurse = None
        if not self._closed.is_set():
            self._alert("engine_recovered", None, {})
