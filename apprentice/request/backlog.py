"""Paid answers whose record the store would not take in time: kept in memory, and tried again until it does."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from apprentice import secrets
from apprentice.events.emitter import Events
from apprentice.events.kinds import EventKind

__all__ = ["Backlog"]

MOST = 1000
"""How many records are kept. One is an input and its answer."""

_log = secrets.logger("apprentice")


@dataclass(frozen=True, slots=True)
class _Late:
    task: str
    record: Callable[[], object] = field(repr=False)
    evidence: dict[str, Any]


class Backlog:
    """Records that wait for the store, the oldest first. Thread-safe.

    The caller has had each of these answers by now, and an alert has told of it. What is still here when the process
    ends is lost: the call stays counted at its worst case, and the answer is no example.
    """

    def __init__(self, alerts: Events) -> None:
        self._alerts = alerts
        self._late: deque[_Late] = deque()
        self._writing = threading.Lock()

    def __len__(self) -> int:
        return len(self._late)

    def add(self, task: str, record: Callable[[], object], evidence: dict[str, Any]) -> None:
        """Keep ``record``, which writes a paid answer down and may be called again after it has failed."""
        self._late.append(_Late(task, record, evidence))
        if len(self._late) > MOST:
            self._tell([self._late.popleft()])

    def write(self) -> bool:
        """Try to write what is here; True where some of it has to wait on."""
        with self._writing:
            while self._late:
                late = self._late[0]
                try:
                    late.record()
                except Exception:  # noqa: BLE001  # it is kept, and tried again
                    _log.info("the store does not take the answer of a request yet", exc_info=True)
                    return True
                if self._late and self._late[0] is late:
                    self._late.popleft()
        return False

    def close(self) -> None:
        """Try a last time, and tell what is lost."""
        self.write()
        lost = list(self._late)
        self._late.clear()
        if lost:
            self._tell(lost)

    def _tell(self, lost: list[_Late]) -> None:
        evidence = {"answers": len(lost), "newest": [late.evidence for late in lost[-20:]]}
        self._alerts.emit(EventKind.RECORD_LOST, lost[-1].task, evidence, about=str(len(lost)))
