"""Coaching a task: curate, finetune, assemble, validate, promote, as one Prefect flow that resumes where it was killed.

A refit of the head leaves finetune out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from prefect import State, flow, tags
from prefect.exceptions import CancelledRun
from prefect.logging.handlers import PrefectConsoleHandler
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_HOME,
    PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    temporary_settings,
)
from prefect.states import Cancelled

from apprentice import secrets
from apprentice.errors import ApprenticeError, BudgetExceeded, ConfigError, LeaseLost, MissingExtra, TrainingError
from apprentice.events.kinds import EventKind
from apprentice.local.engine import Engine
from apprentice.settings.config import Settings
from apprentice.store.records import RunKind, RunRecord, RunState
from flows.assemble import assemble
from flows.cancellation import Cancellation, RunCancelled
from flows.curate import curate
from flows.finetune import finetune
from flows.lease import held_lease, training_lease, worker
from flows.promote import promote, show_statuses
from flows.runs import begin, close_run, interrupt, run_of
from flows.validate import validate
from flows.workshop import Workshop, at_hand, workshop

__all__ = ["CoachResult", "abandon", "coach", "coach_task", "prefect_at"]

MOST_ATTEMPTS = 3
_log = secrets.logger("apprentice.coach")
# What trying again cannot help.
_FINAL = (TrainingError, ConfigError, MissingExtra, BudgetExceeded)


@dataclass(frozen=True, slots=True)
class CoachResult:
    """How a training run ended. ``version`` is None where it did not get as far as having one."""

    version: str | None
    promoted: bool
    reason: str
    trained_on: int
    held_out: int
    wall_s: float
    state: RunState = "completed"

    @property
    def in_words(self) -> str:
        """What became of it, in one line."""
        ended = {
            "completed": "promoted",
            "rejected": "not promoted",
            "waits_for_review": "waits for review",
            "failed": "failed",
            "cancelled": "cancelled",
        }
        return f"{self.version or 'no version'} {ended.get(self.state, self.state)}: {self.reason}"


@flow(name="coach", flow_run_name="coach-{task}", log_prints=False)
def coach(config: str, task: str, run: str) -> bool | State[Any]:
    """The whole of one training run; True where its version became champion."""
    try:
        with workshop(config, task) as shop:
            for check in shop.checks:
                check()
            curate(config, task, run)
            if run_of(shop, task, run).kind == "train":
                finetune(config, task, run)
            assemble(config, task, run)
            validate(config, task, run)
            return promote(config, task, run)
    except RunCancelled as cancelled:
        return Cancelled(message=str(cancelled))


def coach_task(
    settings: Settings,
    task: str,
    *,
    reason: str,
    kind: RunKind = "train",
    engine: Engine | None = None,
    progress: Callable[[str, float], None] = lambda _step, _done: None,
    clock: Callable[[], float] = time.time,
) -> CoachResult:
    """Train a task now, or refit its head, in this process, or resume its unfinished run.

    ``engine`` is the one that serves, where it lives in this process too. ``progress`` hears each step's name and the
    share of it done. A run that fails is tried three times, an error that trying again cannot help once; then it is
    closed, alerted, and told in the result. Raises `flows.lease.Busy` while another worker trains the task, and
    `LeaseLost` where another has taken the task over.
    """
    started = time.monotonic()
    opened = Workshop.open(settings, engine_in_use=engine, clock=clock, progress=progress)
    try:
        with held_lease(opened.store, task) as held:
            cancellation = Cancellation()
            shop = opened.under(held, cancellation.check)
            run = begin(shop, task, reason, kind)
            if run.attempts > MOST_ATTEMPTS:
                again = f"the worker was killed {MOST_ATTEMPTS} times in the step {run.step!r}; see its memory and disk"
                return _result(shop, _fail(shop, run, again), time.monotonic() - started)
            if run.kind == "train":
                shop.judge.training_started(task)
            with prefect_at(settings), at_hand(shop), tags(f"task:{task}"):
                try:
                    run = _carry_out(shop, run)
                except Exception:
                    raise
                except BaseException as stop:  # a signal: a person's cancellation, or a machine that goes away
                    if cancellation.is_asked_for():
                        close_run(shop, run, "cancelled", "cancelled in Prefect")
                    else:
                        interrupt(shop, run, type(stop).__name__)
                    raise
            return _result(shop, run, time.monotonic() - started)
    finally:
        opened.close()


def abandon(settings: Settings, task: str, *, reason: str) -> RunRecord | None:
    """Close a task's unfinished run for good, also one that is being worked on: its worker stops at its next step.

    None where there is no unfinished run.
    """
    opened = Workshop.open(settings)
    try:
        lease = opened.store.take_lease(training_lease(task), worker(), 60.0)
        try:
            run = opened.store.open_run(task)
            if run is None:
                return None
            closed = close_run(opened, run, "cancelled", reason)
            evidence = {"run": run.id, "step": run.step, "reason": reason}
            opened.alerts.emit(EventKind.TRAINING_CANCELLED, task, evidence, about=run.id)
            try:
                show_statuses(
                    opened, task
                )  # the run may have died before it had told MLflow what became of its version
            except Exception:  # noqa: BLE001  # whatever keeps MLflow away must not keep the run open
                _log.warning("%s: MLflow could not be told where its versions stand", task, exc_info=True)
            return closed
        finally:
            opened.store.release_lease(lease)
    finally:
        opened.close()


def _carry_out(shop: Workshop, run: RunRecord) -> RunRecord:
    while True:
        try:
            coach(str(shop.settings.source), run.task, run.id)
        except LeaseLost:
            raise
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            run = run_of(shop, run.task, run.id)
            if run.state != "running":  # its version is judged, and only the record of it in Prefect failed
                _log.warning("%s: the run %s is over, but: %s", run.task, run.id, message)
                return run
            if isinstance(error, CancelledRun | RunCancelled):
                return close_run(shop, run, "cancelled", "cancelled in Prefect")
            if is_outage(error):
                _tell_outage(shop, run, message)
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
        return run_of(shop, run.task, run.id)


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


def _tell_outage(shop: Workshop, run: RunRecord, message: str) -> None:
    """Say once that a run waits for a server: it is tried for ever, and somebody should know what it waits for."""
    if not run.error.startswith("waits: "):
        evidence = {"run": run.id, "step": run.step, "cause": message}
        shop.alerts.emit(EventKind.TRAINING_WAITS, run.task, evidence, about=run.id)
    shop.store.update_run(run.id, error=f"waits: {message}", attempts=max(1, run.attempts - 1))


def _fail(shop: Workshop, run: RunRecord, message: str) -> RunRecord:
    """Close a run for good, and alert."""
    run = close_run(shop, run, "failed", message)
    evidence = {"run": run.id, "step": run.step, "attempts": run.attempts, "error": run.error}
    shop.alerts.emit(EventKind.TRAINING_FAILED, run.task, evidence, about=run.id)
    return run


def _result(shop: Workshop, run: RunRecord, wall_s: float) -> CoachResult:
    version = shop.store.version(run.task, run.version) if run.version else None
    return CoachResult(
        version=run.version,
        promoted=run.state == "completed" and version is not None and version.status == "champion",
        reason=run.error or (version.reason if version else ""),
        trained_on=version.trained_on if version else 0,
        held_out=version.held_out if version else 0,
        wall_s=wall_s,
        state=run.state,
    )


@contextlib.contextmanager
def prefect_at(settings: Settings) -> Iterator[None]:
    """Let Prefect keep its records beside the configuration, where no Prefect server is configured.

    Without PREFECT_API_URL the first flow of a process starts a temporary server, which takes Prefect about 20 s on
    an idle machine, its own limit, and is given three minutes here. A PREFECT_HOME of the user's own is kept. The
    heartbeats of such runs are left out unless they are asked for (PREFECT_FLOWS_HEARTBEAT_FREQUENCY).
    """
    if PREFECT_API_URL.value():
        yield
        return
    patience: dict[Any, Any] = {}
    if "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS" not in os.environ:
        patience[PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS] = 180
    # Nobody listens to them on a server that ends with this process, and their thread sleeps by whole seconds: each of
    # a run's flows would wait for it, half a second in the mean.
    quiet: dict[Any, Any] = {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
    if "PREFECT_HOME" in os.environ:
        with temporary_settings(updates=patience, set_defaults=quiet):
            yield
        return
    beside: dict[Any, Any] = {
        PREFECT_HOME: settings.root / ".prefect",
        PREFECT_SERVER_ANALYTICS_ENABLED: False,
        PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW: "ignore",
    }
    with temporary_settings(updates=beside | patience, set_defaults=quiet), _quiet_console():
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
