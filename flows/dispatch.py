"""The coach at work: watches the store, trains what is due, and follows what people decide in the registry.

Any number of these may run. A task is trained by one of them, who holds its lease; one that dies loses it within a
minute, and the next to look resumes the run. Escalations go first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from apprentice import secrets
from apprentice.errors import ApprenticeError
from apprentice.lifecycle.due import Due, due_run
from apprentice.local.engine import Engine
from apprentice.settings.config import Settings
from flows.coach import CoachResult, coach_task
from flows.lease import Busy, watch_lease, worker
from flows.observe import observe_all
from flows.review import follow
from flows.workshop import Workshop

__all__ = ["OBSERVE_S", "POLL_S", "WATCH_S", "due_tasks", "follow_all", "follow_registry", "say_watched", "watch"]

POLL_S = 2.0
OBSERVE_S = 900.0
WATCH_S = 60.0
"""How long a task counts as watched after a coach was last heard of."""
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

    A run that is under way then is interrupted, and goes on when a coach is started again. One that breaks down is left
    to the next look; the run itself counts how often it was tried.
    """

    def go_on(_step: str, _done: float) -> None:
        if stop.is_set():
            raise KeyboardInterrupt

    follower = threading.Thread(target=follow_registry, args=(settings, stop, poll_s), name="registry", daemon=True)
    follower.start()
    shop = Workshop.open(settings)
    pause_s = poll_s
    broke_down = 0
    try:
        while not stop.wait(pause_s):
            pause_s = poll_s
            failed = False
            for task, due in due_tasks(settings, shop):
                if stop.is_set():
                    break
                try:
                    told(
                        task,
                        coach_task(settings, task, reason=due.reason, kind=due.kind, engine=engine, progress=go_on),
                    )
                except Busy:
                    continue  # another worker is at it
                except Exception:  # noqa: BLE001  # a watch that dies trains nothing any more; the run is kept and taken up again
                    _log.exception("training %s broke down; the run is resumed at the next look", task)
                    failed = True
                except BaseException:  # the run is interrupted, by ``go_on`` or by a signal that Prefect caught
                    if not stop.is_set():
                        raise
            broke_down = broke_down + 1 if failed else 0
            if broke_down:
                pause_s = max(poll_s, min(30.0 * 2 ** (broke_down - 1), 600.0))
    finally:
        stop.set()
        follower.join()
        shop.close()


def due_tasks(settings: Settings, shop: Workshop) -> list[tuple[str, Due]]:
    """The tasks to train now and why: refits first, which take seconds, then escalations."""
    due = [
        (task.name, run)
        for task in settings.tasks
        if (run := due_run(settings, shop.store, task.name, shop.clock())) is not None
    ]
    return sorted(due, key=lambda pair: (pair[1].kind != "refit", "escalated" not in pair[1].reason))


def follow_registry(settings: Settings, stop: threading.Event, poll_s: float = POLL_S) -> None:
    """Until ``stop`` is set: say that the tasks are watched, carry aliases that people move into the store, observe.

    In a thread beside the training, which may take hours: a rollback takes seconds all the same.
    """
    shop = Workshop.open(settings)
    name = worker()
    looked_at: dict[str, float] = {"watch": float("-inf"), "observe": float("-inf")}

    def is_time(what: str, every_s: float) -> bool:
        if time.monotonic() - looked_at[what] < every_s:
            return False
        looked_at[what] = time.monotonic()
        return True

    try:
        while not stop.wait(poll_s):
            if is_time("watch", WATCH_S / 4):
                say_watched(shop, name, WATCH_S)
            follow_all(shop)
            if is_time("observe", OBSERVE_S):
                observe_all(shop)
    finally:
        shop.close()


def say_watched(shop: Workshop, name: str, for_s: float) -> None:
    """Let the store say that somebody watches these tasks: without a coach they would never be trained."""
    for task in shop.settings.tasks:
        try:
            shop.store.acquire_lease(watch_lease(task.name), name, for_s)
        except ApprenticeError:
            _log.warning("the store could not be told that %s is watched", task.name, exc_info=True)


def follow_all(shop: Workshop) -> None:
    """Make store and registry agree on every task's champion. One that cannot be followed stops none of the others."""
    for task in shop.settings.tasks:
        try:
            if not shop.store.versions(task.name):
                continue  # nothing is registered, and there is nothing to choose
            chosen = follow(shop, task.name)
        except ApprenticeError:
            _log.exception("the registry's choice for %s could not be carried out", task.name)
        except Exception:  # noqa: BLE001  # a registry that is down is asked again at the next look
            _log.warning("the registry of %s could not be read; asking again", task.name, exc_info=True)
        else:
            if chosen is not None:
                _log.warning("%s: a person made %s champion", task.name, chosen)
