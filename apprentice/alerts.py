"""Alerts: what an operator should know at once, said once.

Every alert is an event in the store and a line in the log; a webhook gets it as JSON where one is configured. The same
alert about the same task is not repeated within `QUIET_S`, however many requests run into its cause.
"""

from __future__ import annotations

import json
import logging
import threading
import uuid
from collections.abc import Callable
from typing import Any, Literal

import httpx

from apprentice.store import Store
from apprentice.store.records import EventRecord

__all__ = ["QUIET_S", "Alerts"]

QUIET_S = 300.0
_POST_S = 5.0

_log = logging.getLogger("apprentice")
_LOG_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "critical": logging.CRITICAL}

type Level = Literal["info", "warning", "critical"]


class Alerts:
    """Raise alerts. Never raises itself: an alert that cannot be delivered must not fail the request it is about."""

    def __init__(self, store: Store, clock: Callable[[], float], webhook: str | None = None) -> None:
        self._store = store
        self._clock = clock
        self._webhook = webhook
        self._lock = threading.Lock()
        self._raised: dict[tuple[str | None, str], float] = {}
        self._posts: list[threading.Thread] = []

    def __call__(self, kind: str, task: str | None, evidence: dict[str, Any], level: Level = "warning") -> None:
        """Raise the alert ``kind`` about ``task`` (None: all of them), unless it was raised within `QUIET_S`."""
        now = self._clock()
        with self._lock:
            if now - self._raised.get((task, kind), float("-inf")) < QUIET_S:
                return
            self._raised[task, kind] = now
        self.announce(kind, task, evidence, level)
        try:
            self._store.add_event(EventRecord(uuid.uuid4().hex, task, kind, level, evidence, now))
        except Exception:  # noqa: BLE001  # see the class's docstring
            _log.exception("the alert %s could not be recorded", kind)

    def announce(self, kind: str, task: str | None, evidence: dict[str, Any], level: Level) -> None:
        """Log and post something that is in the store already, such as the events of a comparison's transaction."""
        _log.log(_LOG_LEVELS[level], "%s: %s %s", task or "all tasks", kind, json.dumps(evidence, default=str))
        if self._webhook is not None and level != "info":
            body = {"task": task, "kind": kind, "level": level, "evidence": evidence}
            post = threading.Thread(target=self._post, args=(json.dumps(body, default=str),), daemon=True)
            with self._lock:
                post.start()
                self._posts = [*(p for p in self._posts if p.is_alive()), post]

    def close(self) -> None:
        """Wait for what is on its way to the webhook: a process that ends at once would take its last alert along."""
        for post in self._posts:
            post.join(_POST_S)

    def _post(self, body: str) -> None:
        try:
            headers = {"content-type": "application/json"}
            httpx.post(str(self._webhook), content=body, headers=headers, timeout=_POST_S).raise_for_status()
        except httpx.HTTPError as error:
            _log.warning("the alert webhook %s failed: %s", self._webhook, error)
