"""The coach at work: watches the store, trains what is due, and follows what people decide in the registry.

Any number of these may run. A task is trained by one of them, who holds its lease; one that dies loses it within a
minute, and the next to look resumes the run. Escalations go first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from apprentice import secrets
from apprentice.config import Settings
from apprentice.errors import ApprenticeError
from apprentice.local.engine import Engine
from flows.coach import Busy, CoachResult, coach_task, due_reason, held_lease
from flows.review import follow
from flows.workshop import Workshop

__all__ = ["POLL_S", "due_tasks", "follow_registry", "watch"]

POLL_S = 2.0
_log = secrets.logger("apprentice.coach")


def watch(
    settings: Settings,
    *,
    stop: threading.Event,
    engine: Engine | None = None,
    told: Callable[[str, CoachResult], None] = lambda _task, _result: None,
    poll_s: float = POLL_S,
) -> None:
    """Train what is due until ``stop`` is set. ``told`` hears how every run ended.

    A run that breaks down is left to the next look; the run itself counts how often it was tried.
    """
    follower = threading.Thread(target=follow_registry, args=(settings, stop, poll_s), name="registry", daemon=True)
    follower.start()
    shop = Workshop.open(settings)
    pause_s = poll_s
    try:
        while not stop.wait(pause_s):
            pause_s = poll_s
            for task, reason in due_tasks(settings, shop):
                if stop.is_set():
                    break
                try:
                    told(task, coach_task(settings, task, reason=reason, engine=engine))
                except Busy:
                    continue  # another worker is at it
                except Exception:  # noqa: BLE001  # a watch that dies trains nothing any more; the run is kept and taken up again
                    _log.exception("training %s broke down; the run is resumed at the next look", task)
                    pause_s = max(poll_s, 30.0)
    finally:
        stop.set()
        follower.join()
        shop.close()


def due_tasks(settings: Settings, shop: Workshop) -> list[tuple[str, str]]:
    """The tasks to train now and why, escalations first."""
    due = [
        (task.name, reason)
        for task in settings.tasks
        if (reason := due_reason(settings, shop.store, task.name)) is not None
    ]
    return sorted(due, key=lambda pair: "escalated" not in pair[1])


def follow_registry(settings: Settings, stop: threading.Event, poll_s: float = POLL_S) -> None:
    """Carry aliases that people move into the store, until ``stop`` is set."""
    shop = Workshop.open(settings)
    try:
        while not stop.wait(poll_s):
            for task in settings.tasks:
                if not shop.store.versions(task.name):
                    continue  # nothing is registered, and there is nothing to choose
                try:
                    with held_lease(shop.store, task.name):
                        chosen = follow(shop, task.name)
                except Busy:
                    continue
                except ApprenticeError:
                    _log.exception("the registry's choice for %s could not be carried out", task.name)
                except Exception:  # noqa: BLE001  # a registry that is down is asked again at the next look
                    _log.warning("the registry of %s could not be read; asking again", task.name, exc_info=True)
                else:
                    if chosen is not None:
                        _log.warning("%s: a person made %s champion", task.name, chosen)
    finally:
        shop.close()
