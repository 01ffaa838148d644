"""Putting the parts together: from settings to a router that works."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apprentice.errors import VersionError
from apprentice.events.emitter import Events
from apprentice.lifecycle.unattended import Unattended
from apprentice.local import build_engine
from apprentice.local.switch import Switch
from apprentice.money.budget import Budget
from apprentice.remote import Teacher
from apprentice.remote.transport import Sender
from apprentice.request.asking_again import AskingAgain
from apprentice.request.backlog import Backlog
from apprentice.request.judge import Judge
from apprentice.request.router import Router
from apprentice.request.tally import Tally
from apprentice.settings.config import Settings
from apprentice.store import Store

if TYPE_CHECKING:
    import httpx

    from apprentice.local.engine import Engine, Version

__all__ = ["Assembly", "assemble", "check_remote"]


@dataclass(frozen=True, slots=True)
class Assembly:
    """Every part of a running Apprentice."""

    settings: Settings
    store: Store
    budget: Budget
    sender: Sender
    teacher: Teacher
    engine: Engine
    switch: Switch
    judge: Judge
    tally: Tally
    backlog: Backlog
    alerts: Events
    asking_again: AskingAgain
    router: Router

    def close(self) -> None:
        """Release everything, in an order in which nothing is lost; a second time does nothing.

        Whatever fails on the way, the rest is released all the same; then the failure is raised.
        """
        if self.router.closed:
            return
        with contextlib.ExitStack() as last:  # the last one first
            last.callback(self.store.close)
            last.callback(self.sender.close)
            last.callback(self.alerts.close)
            last.callback(self.engine.close)
            last.callback(self.budget.close)
            last.callback(self.backlog.close)
            last.callback(self.tally.close)
            last.callback(self.judge.close)
            last.callback(self.switch.close)
            last.callback(self.asking_again.close)
            last.callback(self.router.close)


def assemble(
    settings: Settings,
    *,
    http_client: httpx.Client | None,
    engine: Engine | None,
    environ: Mapping[str, str],
    clock: Callable[[], float],
    draw: random.Random,
) -> Assembly:
    """Build and join every part. Raises `ConfigError` (keys, prices), `StoreError`, `MissingExtra`."""
    with contextlib.ExitStack() as opened:  # what was opened before something failed is closed again
        sender = Sender(http_client)
        opened.callback(sender.close)
        sender.client()
        store = Store.open(settings.store_url, clock=clock)
        opened.callback(store.close)
        store.ensure_tasks(task.name for task in settings.tasks)
        alerts = Events.configured(settings.alerts, store, clock)
        opened.callback(alerts.close)
        caps = {task.name: task.budget for task in settings.tasks}
        budget = Budget(store, settings.budget, caps, clock=clock)
        teacher = Teacher(settings.remote, sender.send, environ=environ, clock=clock, random=draw)
        teacher.price_check()
        judge = Judge(settings, store, clock, draw)
        judge.prepare()
        backlog = Backlog(alerts)
        asking_again = AskingAgain(
            settings,
            store=store,
            budget=budget,
            teacher=teacher,
            judge=judge,
            backlog=backlog,
            alerts=alerts,
            clock=clock,
        )
        unattended = Unattended(settings, store, alerts, clock)

        def chore() -> bool:
            waits = backlog.write()
            unattended.look()
            asking_again.look()
            return waits

        tally = Tally(store, budget.day, chore=chore)
        if engine is None:
            engine = build_engine(settings.local, settings.root, leases=store, budget=budget)
            opened.callback(engine.close)
        switch = Switch(engine, _lookup(settings, store), alert=alerts.emit)
        router = Router(
            settings,
            store=store,
            budget=budget,
            teacher=teacher,
            switch=switch,
            judge=judge,
            tally=tally,
            backlog=backlog,
            alerts=alerts,
            asking_again=asking_again,
            clock=clock,
            draw=draw,
        )
        opened.pop_all()
    return Assembly(
        settings, store, budget, sender, teacher, engine, switch, judge, tally, backlog, alerts, asking_again, router
    )


def check_remote(settings: Settings, environ: Mapping[str, str], clock: Callable[[], float] = time.time) -> None:
    """Make sure that every provider has its key, a known price, and a way to be reached. Raises `ConfigError`."""
    sender = Sender()
    sender.client()
    sender.close()
    Teacher(settings.remote, sender.send, environ=environ, clock=clock).price_check()


def _lookup(settings: Settings, store: Store) -> Callable[[str, str], Version]:
    """How the switch finds a version: its row in the store, as the engine needs it."""
    from apprentice.local.adapter import adapter_folder
    from apprentice.local.engine import Version

    def lookup(task: str, name: str) -> Version:
        record = store.version(task, name)
        if record is None:
            raise VersionError(f"the store holds no version {name!r} of task {task!r}; was it deleted?")
        return Version(
            name=record.name,
            task=task,
            adapter=adapter_folder(settings.model_dir, task, name, record.adapter) if record.adapter else None,
            output_schema=settings.task(task).output_schema,
            remote_model=record.remote_model,
            input_schema=settings.task(task).input_schema,
        )

    return lookup
