"""The way to `Events` by the names that callers used before there was a room for events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from apprentice.config import AlertSettings
from apprentice.events.emitter import QUIET_S, Events
from apprentice.events.kinds import EventKind, Level
from apprentice.events.sinks import SINKS
from apprentice.store import Store

__all__ = ["QUIET_S", "Alerts"]


class Alerts(Events):
    """`Events`, called with a kind's name."""

    def __init__(self, store: Store, clock: Callable[[], float], settings: AlertSettings) -> None:
        chosen = [(make, getattr(settings, name)) for name, make in SINKS.items()]
        super().__init__(store, [make(value) for make, value in chosen if value], level=settings.level, clock=clock)

    def __call__(self, kind: str, task: str | None, evidence: dict[str, Any], level: Level | None = None) -> None:
        """As `emit`. Raises `ValueError` if there is no such kind."""
        known = EventKind.named(kind)
        if known is None:
            raise ValueError(f"no kind of event is named {kind!r}; apprentice/events/kinds.py lists them")
        self.emit(known, task, evidence, level=level)

    def announce(self, kind: str, task: str | None, evidence: dict[str, Any], level: Level) -> None:
        """Nothing: the store tells what its transactions commit."""
