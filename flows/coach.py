"""Coaching a task: curate, finetune, validate, promote, as one Prefect flow that resumes where it was killed."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from prefect import flow
from prefect.logging.handlers import PrefectConsoleHandler
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    temporary_settings,
)

from apprentice import secrets
from apprentice.config import Settings
from apprentice.errors import ApprenticeError, BudgetExceeded, ConfigError, MissingExtra, TrainingError
from apprentice.local.engine import Engine
from apprentice.store import Store
from apprentice.store.records import EventRecord, Lease, RunRecord
from flows.bill import close_training
from flows.curate import curate
from flows.due import training_due
from flows.finetune import finetune
from flows.promote import promote
from flows.runs import begin, last_run, run_of
from flows.validate import validate
from flows.workshop import Workshop, at_hand

__all__ = ["Busy", "CoachResult", "coach", "coach_task", "due_reason", "held_lease", "prefect_at"]

LEASE_S = 60.0
MOST_ATTEMPTS = 3
_log = secrets.logger("apprentice.coach")
# What trying again cannot help.
_FINAL = (TrainingError, ConfigError, MissingExtra, BudgetExceeded)


class Busy(TrainingError):
    """Another worker holds the task's lease."""


@dataclass(frozen=True, slots=True)
class CoachResult:
    """How a training run ended. ``version`` is None where it did not get as far as having one."""

    version: str | None
    promoted: bool
    reason: str
    trained_on: int
    held_out: int
    wall_s: float


@flow(name="coach", flow_run_name="coach-{task}", log_prints=False)
def coach(config: str, task: str, run: str) -> bool:
    """The whole of one training run; True where its version became champion."""
    curate(config, task, run)
    finetune(config, task, run)
    validate(config, task, run)
    return promote(config, task, run)


def due_reason(settings: Settings, store: Store, task: str) -> str | None:
    """Why a task is to be trained now, or None."""
    unfinished = store.open_run(task)
    if unfinished is not None:
        return f"resumes: {unfinished.reason}"
    state = store.policy_row(task)
    last = last_run(store.runs(task))
    local = settings.local
    return training_due(
        store.count_examples(task),
        last,
        first_at=settings.task(task).confidence_thresholds.phase1_to_phase2,
        batch=local.fine_tune_batch_size,
        growth=local.fine_tune_growth,
        escalated=state.training_due,
        has_champion=state.champion is not None,
    )


def coach_task(
    settings: Settings,
    task: str,
    *,
    reason: str,
    engine: Engine | None = None,
    progress: Callable[[str, float], None] = lambda _step, _done: None,
    clock: Callable[[], float] = time.time,
) -> CoachResult:
    """Train a task now, in this process, or resume its unfinished run.

    ``engine`` is the one that serves, where it lives in this process too. ``progress`` hears each step's name and the
    share of it done. A run that fails is tried three times, an error that trying again cannot help once; then it is
    closed, alerted, and told in the result. Raises `TrainingError` while another worker trains the task.
    """
    started = time.monotonic()
    shop = Workshop.open(settings, engine_in_use=engine, clock=clock, progress=progress)
    try:
        with held_lease(shop.store, task):
            run = begin(shop, task, reason)
            if run.attempts > MOST_ATTEMPTS:
                again = f"the worker was killed {MOST_ATTEMPTS} times in the step {run.step!r}; see its memory and disk"
                return _result(shop, _fail(shop, run, again), time.monotonic() - started)
            shop.judge.training_started(task)
            with prefect_at(settings), at_hand(shop):
                run = _carry_out(shop, run)
            return _result(shop, run, time.monotonic() - started)
    finally:
        shop.close()


def _carry_out(shop: Workshop, run: RunRecord) -> RunRecord:
    while True:
        try:
            promoted = coach(str(shop.settings.source), run.task, run.id)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            run = run_of(shop, run.task, run.id)
            if is_outage(error):
                raise TrainingError(
                    f"a server of the training flows cannot be reached ({message}); the run is kept"
                ) from error
            if not isinstance(error, _FINAL) and run.attempts < MOST_ATTEMPTS:
                _log.warning("%s: %s, trying again: %s", run.task, _where(run), message)
                run = shop.store.update_run(run.id, error=message, attempts=run.attempts + 1)
                continue
            run = _fail(shop, run, message)
            if not isinstance(error, ApprenticeError):
                raise
            return run
        run = shop.store.update_run(run.id, state="completed" if promoted else "rejected", error="")
        _end_tracked(shop, run, failed=False)
        return run


def _where(run: RunRecord) -> str:
    return f"the step {run.step} failed" if run.step else "the run could not begin"


def is_outage(error: BaseException) -> bool:
    """Whether a Prefect or MLflow server could not be reached: waiting helps, and no attempt is counted."""
    seen: BaseException | None = error
    while seen is not None:
        names = {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(seen).__mro__}
        if names & {"httpx.TransportError", "requests.ConnectionError", "urllib3.HTTPError"}:
            return True
        if "mlflow.MlflowException" in names and "API request to" in str(seen):
            return True
        if "Failed to reach API" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _fail(shop: Workshop, run: RunRecord, message: str) -> RunRecord:
    """Close a run for good, and alert."""
    close_training(shop, run)
    run = shop.store.update_run(run.id, state="failed", error=message)
    evidence = {"run": run.id, "step": run.step, "attempts": run.attempts, "error": run.error}
    shop.store.add_event(EventRecord(uuid.uuid4().hex, run.task, "training_failed", "critical", evidence, shop.clock()))
    shop.alerts.announce("training_failed", run.task, evidence, "critical")
    _end_tracked(shop, run, failed=True)
    return run


def _end_tracked(shop: Workshop, run: RunRecord, *, failed: bool) -> None:
    # The run's fate is in the store already; a registry that is down must not change it.
    with contextlib.suppress(Exception):
        shop.tracking.run(run.task, run.id, name=f"{run.task}-{run.id[:8]}").end(failed=failed)


def _result(shop: Workshop, run: RunRecord, wall_s: float) -> CoachResult:
    version = shop.store.version(run.task, run.version) if run.version else None
    return CoachResult(
        version=run.version,
        promoted=run.state == "completed" and version is not None and version.status == "champion",
        reason=run.error or (version.reason if version else ""),
        trained_on=version.trained_on if version else 0,
        held_out=version.held_out if version else 0,
        wall_s=wall_s,
    )


@contextlib.contextmanager
def held_lease(store: Store, task: str) -> Iterator[None]:
    """Hold the right to train a task, renewed by a thread of its own. A worker that dies loses it within `LEASE_S`.

    Raises `Busy` while another has it.
    """
    owner = f"{os.getpid()}/{uuid.uuid4().hex[:8]}"
    taken = store.acquire_lease(f"coach:{task}", owner, LEASE_S)
    if taken is None:
        raise Busy(f"another worker is training {task!r}; wait until it is done, or {LEASE_S:.0f} s if it has died")
    lease: Lease = taken
    over = threading.Event()

    def renew() -> None:
        while not over.wait(LEASE_S / 4):
            store.renew_lease(lease, LEASE_S)

    keeper = threading.Thread(target=renew, name=f"lease-{task}", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        over.set()
        keeper.join()
        store.release_lease(lease)


@contextlib.contextmanager
def prefect_at(settings: Settings) -> Iterator[None]:
    """Let Prefect keep its records beside the configuration, where no Prefect server is configured.

    Without PREFECT_API_URL the first flow of a process starts a temporary server, which takes Prefect about 20 s on
    an idle machine, its own limit, and is given three minutes here. A PREFECT_HOME of the user's own is kept.
    """
    if PREFECT_API_URL.value():
        yield
        return
    patience: dict[Any, Any] = {}
    if "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS" not in os.environ:
        patience[PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS] = 180
    if "PREFECT_HOME" in os.environ:
        with temporary_settings(updates=patience):
            yield
        return
    beside: dict[Any, Any] = {
        PREFECT_HOME: settings.root / ".prefect",
        PREFECT_SERVER_ANALYTICS_ENABLED: False,
        PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW: "ignore",
    }
    with temporary_settings(updates=beside | patience), _quiet_console():
        yield


@contextlib.contextmanager
def _quiet_console() -> Iterator[None]:
    """Keep Prefect's account of every flow off the terminal of whoever called; the Prefect UI has it."""
    # Prefect reads the variable when it sets logging up, which it does once, at its own time.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "WARNING")
    handlers = [
        handler
        for name in ("prefect", "prefect.flow_runs", "prefect.task_runs")
        for handler in logging.getLogger(name).handlers
        if isinstance(handler, PrefectConsoleHandler)
    ]
    levels = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)
