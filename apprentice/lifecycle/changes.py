"""When a task's traffic or its remote changed, as far as events in the store say so."""

from __future__ import annotations

from dataclasses import dataclass

from apprentice.confidence.drift import change_time
from apprentice.events.kinds import EventKind
from apprentice.store import Store
from apprentice.store.records import EventRecord

__all__ = ["ALARMS", "RemoteChange", "began_at", "changed_at", "remote_change"]

# An emergency is dated by nothing but itself: what was bought until then counts as bought before it.
ALARMS = (EventKind.SHIFT, EventKind.DRIFT, EventKind.EMERGENCY)
_REMEMBERED = 20_000


@dataclass(frozen=True, slots=True)
class RemoteChange:
    """The remote answers differently since ``since``, which was found out at ``at``; both in Unix seconds."""

    since: float
    at: float


def changed_at(store: Store, task: str) -> float | None:
    """When a task's traffic last changed, in seconds since the epoch, as far as an alarm says so; None if none did."""
    alarms = [event for kind in ALARMS if (event := store.latest_event(task, kind)) is not None]
    return max((began_at(store, task, alarm) for alarm in alarms), default=None)


def began_at(store: Store, task: str, alarm: EventRecord) -> float:
    """When the change began that an alarm is about, in Unix seconds."""
    began = alarm.evidence.get("began_checks_ago")
    if began is None:
        return change_time(alarm.at, (), None)
    known = store.comparisons(task, version=alarm.evidence.get("version"), limit=_REMEMBERED)
    checks = [c.created_at for c in reversed(known) if c.served and not c.seeded and c.score is not None]
    return change_time(alarm.at, checks, began)


def remote_change(store: Store, task: str) -> RemoteChange | None:
    """The last change of the remote; None where none was found."""
    event = store.latest_event(task, EventKind.REMOTE_CHANGED)
    return None if event is None else RemoteChange(float(event.evidence["since"]), event.at)
