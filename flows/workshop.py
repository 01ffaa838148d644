"""What a training run has at hand: settings, store, judge, tracking, engine, and the folder it works in.

Flows take only plain parameters (a config's path, a task, a run), so that each can be started from the Prefect UI. In
process, `at_hand` lends them what the caller has already: the very engine that serves, the settings as they stand.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apprentice import secrets
from apprentice.errors import TrainingError
from apprentice.events.emitter import Events
from apprentice.events.kinds import EventKind
from apprentice.local.adapter import adapter_folder
from apprentice.local.engine import Engine
from apprentice.money.budget import Budget
from apprentice.request.judge import Judge
from apprentice.settings.config import Settings, TaskSettings, load_settings
from apprentice.store import Store
from apprentice.store.records import RunRecord, VersionRecord
from flows.lease import HeldLease, held_lease

if TYPE_CHECKING:
    from flows.tracking import Tracking

__all__ = ["Workshop", "at_hand", "workshop"]

_log = secrets.logger("apprentice.coach")
_lent: ContextVar[Workshop | None] = ContextVar("workshop", default=None)


@dataclass
class Workshop:
    """Everything the steps of a training run share. ``progress`` hears of each step: its name and the share done.

    ``checks`` raise where the run must not go on; `advanced` asks them. ``confirm`` asks the store whether the lease is
    still held: before MLflow is written to, which no fence of the store's protects.
    """

    settings: Settings
    store: Store
    engine_in_use: Engine | None = None
    clock: Callable[[], float] = time.time
    progress: Callable[[str, float], None] = lambda _step, _done: None
    checks: tuple[Callable[[], None], ...] = ()
    confirm: Callable[[], None] = lambda: None
    _ledger: Store | None = None
    _own: list[Callable[[], None]] = field(default_factory=list)

    @classmethod
    def open(cls, settings: Settings, **given: Any) -> Workshop:
        """Open the store; everything else is opened when it is first used."""
        store = Store.open(settings.store_url, clock=given.get("clock", time.time))
        store.ensure_tasks(task.name for task in settings.tasks)
        shop = cls(settings, store, **given)
        shop._own.append(store.close)
        _ = shop.alerts  # from now on it tells whatever the store commits
        return shop

    def under(self, held: HeldLease, *checks: Callable[[], None]) -> Workshop:
        """This workshop for a run under a lease: what it writes is refused, and the run stops, when that is lost.

        Money is written all the same: a bill is a fact, whoever may train.
        """
        alerts = self.alerts  # first, since the fenced store tells whom this one tells
        fenced = self.store.fenced(held.lease)
        checks = (held.check, *checks)
        ledger = self._ledger or self.store
        shop = replace(self, store=fenced, checks=checks, confirm=held.confirm, _ledger=ledger)
        shop.__dict__["alerts"] = alerts
        return shop

    def advanced(self, step: str, done: float) -> None:
        """Tell how far a step is, and stop the run where its lease is lost or a person has cancelled it."""
        for check in self.checks:
            check()
        self.progress(step, done)

    def _tell_deleted(self, task: str, found: dict[str, Any]) -> None:
        self.alerts.emit(EventKind.REGISTRY_RESTORED, task, found, about=str(found["deleted"]))

    def task(self, name: str) -> TaskSettings:
        """A task's settings."""
        return self.settings.task(name)

    @cached_property
    def alerts(self) -> Events:
        """Who tells people."""
        alerts = Events.configured(self.settings.alerts, self.store, self.clock)
        self._own.append(alerts.close)
        return alerts

    @cached_property
    def judge(self) -> Judge:
        """Who carries promotions into the trust state."""
        _ = self.alerts  # which tell what its transactions commit
        return Judge(self.settings, self.store, self.clock, random.Random())

    @cached_property
    def budget(self) -> Budget:
        """The caps, which hold for a vendor's training too."""
        caps = {task.name: task.budget for task in self.settings.tasks}
        _ = self.alerts  # hears of the caps' events from the store
        return Budget(self._ledger or self.store, self.settings.budget, caps, clock=self.clock)

    @cached_property
    def tracking(self) -> Tracking:
        """MLflow."""
        from flows.tracking import Tracking, quiet

        with quiet():
            return Tracking(self.settings, self._tell_deleted)

    @cached_property
    def engine(self) -> Engine:
        """The engine that serves, else one of its kind."""
        if self.engine_in_use is not None:
            return self.engine_in_use
        from apprentice.local import build_engine  # loads what serves, which only a worker of its own needs

        engine = build_engine(self.settings.local, self.settings.root, leases=self.store, budget=self.budget)
        self._own.append(engine.close)
        return engine

    def let_go(self, version: str) -> None:
        """Unload what nobody will ask again. An engine that fails at it must not undo what was found out with it."""
        try:
            self.engine.unload(version)
        except Exception:  # noqa: BLE001  # at worst it takes memory
            _log.warning("version %s could not be unloaded", version, exc_info=True)

    def adapters(self, task: str) -> Path:
        """Where a task's adapters lie, each in a folder named by its content."""
        return self.settings.model_dir / task

    def version_folder(self, version: VersionRecord) -> Path | None:
        """Where a version's files lie on this machine; None if it has none."""
        if not version.adapter:
            return None
        return adapter_folder(self.settings.model_dir, version.task, version.name, version.adapter)

    def adapter(self, version: VersionRecord) -> Path | None:
        """The folder with a version's adapter; None if its vendor serves it."""
        return None if version.remote_model else self.version_folder(version)

    def require_adapter(self, version: VersionRecord) -> None:
        """Refuse what no router could load. Raises `TrainingError`."""
        folder = self.adapter(version)
        if folder is not None and not folder.is_dir():
            raise TrainingError(
                f"version {version.name} of {version.task!r} has no folder {folder}, so nothing could serve it; "
                "restore it there, or choose another version"
            )

    def datasets(self, task: str) -> Path:
        """Where a task's curated datasets lie."""
        return self.settings.model_dir / task / "data"

    def bench(self, run: RunRecord) -> Path:
        """The folder of one training run: checkpoints, and what each step left for the next."""
        folder = self.settings.model_dir / run.task / "runs" / run.id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def close(self) -> None:
        """Release what was opened here, not what was lent; all of it, whatever fails on the way."""
        while self._own:
            try:
                self._own.pop()()
            except Exception:  # noqa: BLE001  # the rest must be released too, and a run that is over stays over
                _log.warning("something could not be closed", exc_info=True)


@contextlib.contextmanager
def at_hand(shop: Workshop) -> Iterator[Workshop]:
    """Lend a workshop to every flow that runs inside."""
    token = _lent.set(shop)
    try:
        yield shop
    finally:
        _lent.reset(token)


@contextlib.contextmanager
def workshop(config: str, task: str | None = None) -> Iterator[Workshop]:
    """The workshop that was lent, else one opened from a config file for as long as it is needed.

    The one that is opened for a ``task`` holds its lease: a step by hand does not run beside a coach. Raises `Busy`.
    """
    lent = _lent.get()
    if lent is not None:
        yield lent
        return
    shop = Workshop.open(load_settings(config))
    try:
        if task is None:
            with at_hand(shop):
                yield shop
        else:
            with held_lease(shop.store, task) as held, at_hand(shop.under(held)) as own:
                yield own
    finally:
        shop.close()
