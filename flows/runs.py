"""Training runs in the store: found, begun, resumed, closed; and what MLflow says of them."""

from __future__ import annotations

from apprentice import secrets
from apprentice.errors import TrainingError
from apprentice.store.records import RunKind, RunRecord, RunState
from flows.bill import close_training
from flows.workshop import Workshop

__all__ = ["advance", "begin", "close_run", "interrupt", "run_of"]

_log = secrets.logger("apprentice.coach")
# How MLflow calls the end of a run. A refused version is no failure of the run that trained it.
_MLFLOW = {
    "completed": "FINISHED",
    "rejected": "FINISHED",
    "waits_for_review": "FINISHED",
    "failed": "FAILED",
    "cancelled": "KILLED",
    "interrupted": "KILLED",
}


def run_of(shop: Workshop, task: str, run_id: str) -> RunRecord:
    """A run by its id. Raises `TrainingError`."""
    for run in reversed(shop.store.runs(task)):
        if run.id == run_id:
            return run
    raise TrainingError(f"the store holds no training run {run_id!r} of task {task!r}; start one with apprentice coach")


def begin(shop: Workshop, task: str, reason: str, kind: RunKind = "train") -> RunRecord:
    """The task's unfinished run, its attempts counted, else a new one over all examples there are now."""
    unfinished = shop.store.open_run(task)
    if unfinished is not None:
        return shop.store.update_run(unfinished.id, attempts=unfinished.attempts + 1)
    corpus, high_water = shop.store.corpus(task)
    return shop.store.start_run(task, high_water, reason, corpus_size=corpus, kind=kind)


def advance(shop: Workshop, run: RunRecord, step: str) -> None:
    """Note which step a run is at. Attempts are counted by the step: a run that gets further is not stuck.

    Raises `TrainingError` where the run is over.
    """
    shop.confirm()
    now = run_of(shop, run.task, run.id)
    if now.state != "running":
        raise TrainingError(f"the training run {run.id} is over ({now.state}); start another with apprentice coach")
    if now.step != step:
        shop.store.update_run(run.id, step=step, attempts=1)


def close_run(shop: Workshop, run: RunRecord, state: RunState, error: str = "") -> RunRecord:
    """End a run in the store, then in MLflow. A run that is over stays as it ended."""
    known = run_of(shop, run.task, run.id)
    if known.state != "running":
        return known
    if state in ("failed", "cancelled"):
        close_training(shop, run)
    closed = shop.store.update_run(run.id, state=state, error=error)
    _show(shop, closed, state)
    return closed


def interrupt(shop: Workshop, run: RunRecord, why: str) -> None:
    """Say in store and MLflow that a run stands still and will be resumed. Whoever is dying must not fail at it.

    Being stopped in an orderly way is no failed attempt: a worker may be restarted as often as anybody likes.
    """
    try:
        attempts = run_of(shop, run.task, run.id).attempts
        shop.store.update_run(run.id, error=f"interrupted: {why}", attempts=max(1, attempts - 1))
    except Exception:  # noqa: BLE001
        _log.warning("the run %s could not be marked as interrupted", run.id, exc_info=True)
    _show(shop, run, "interrupted")


def _show(shop: Workshop, run: RunRecord, state: str) -> None:
    # The run's fate is in the store already; a registry that is down must not change it.
    try:
        tracked = shop.tracking.run(run.task, run.id, name=f"{run.task}-{run.id[:8]}")
        tracked.tags({"apprentice.state": state})
        tracked.end(_MLFLOW[state])
    except Exception:  # noqa: BLE001
        _log.warning("MLflow could not be told that the run %s is %s", run.id, state, exc_info=True)
