"""Tasks that have what their training needs while no coach is there to train them.

The router teaches and the coach trains, in processes of their own. Where only the router was started, every task stays
with the remote for ever, and pays for ever: the store knows, so the router and `apprentice status` say so.
"""

from __future__ import annotations

from collections.abc import Callable

from apprentice.events.emitter import Events
from apprentice.events.kinds import EventKind
from apprentice.lifecycle.due import due_reason
from apprentice.settings.config import Settings
from apprentice.store import Store

__all__ = ["Unattended", "waits_for_coach"]

_LOOK_S = 60.0
_GRACE_S = 600.0  # a coach may be restarted in the meantime


def waits_for_coach(settings: Settings, store: Store, task: str, now: float) -> str | None:
    """Why a task is to be trained at ``now`` (Unix seconds), in words, if no coach watches or trains it; else None.

    A coach that watches holds the lease ``watch:TASK``, one that trains ``coach:TASK``.
    """
    reason = due_reason(settings, store, task, now)
    if reason is None or store.lease(f"watch:{task}") or store.lease(f"coach:{task}"):
        return None
    return reason


class Unattended:
    """Looks now and then, in a router's background thread, and raises an alert for a task that goes on waiting."""

    def __init__(self, settings: Settings, store: Store, alerts: Events, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._store = store
        self._alerts = alerts
        self._clock = clock
        self._looked_at = clock()
        self._since: dict[str, float] = {}

    def look(self) -> None:
        """Cheap; looks at the store once a minute at most."""
        now = self._clock()
        if 0 <= now - self._looked_at < _LOOK_S:
            return
        self._looked_at = now
        for task in self._settings.tasks:
            reason = waits_for_coach(self._settings, self._store, task.name, now)
            if reason is None:
                self._since.pop(task.name, None)
            elif now - self._since.setdefault(task.name, now) >= _GRACE_S:
                self._alerts.emit(EventKind.NO_COACH, task.name, {"due": reason})
