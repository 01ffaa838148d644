"""The flows that Prefect's deployments start: look for what is due, and train one task.

`apprentice coach` does both without Prefect's schedules.
"""

from __future__ import annotations

from typing import Any

from prefect import State, flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled

from apprentice.errors import TrainingError
from apprentice.lifecycle.due import Due
from apprentice.settings.config import load_settings
from apprentice.store.records import RunKind
from flows.coach import coach_task
from flows.dispatch import due_tasks, follow_all, say_watched
from flows.lease import Busy, training_lease, worker
from flows.workshop import Workshop

__all__ = ["TRAIN", "coach_due", "train"]

TRAIN = "train/coach"
"""The deployment of `train`."""
_WATCHED_S = 900.0  # three times the schedule's interval


@flow(name="coach-due", log_prints=False)
def coach_due(config: str) -> dict[str, str]:
    """Start a run of `train` for every task that is due and not in training yet; returns what was found of each.

    It also carries aliases that people have moved in MLflow into the store.
    """
    settings = load_settings(config)
    shop = Workshop.open(settings)
    found = {}
    try:
        say_watched(shop, worker(), _WATCHED_S)
        follow_all(shop)
        for task, due in due_tasks(settings, shop):
            if shop.store.lease(training_lease(task)) is not None:
                found[task] = "is in training"
            elif _waits(task):
                found[task] = "waits for a worker"
            else:
                found[task] = f"started, because: {due.reason}"
                _start(config, task, due)
    finally:
        shop.close()
    return found


@flow(name="train", flow_run_name="train-{task}", log_prints=False)
def train(config: str, task: str, reason: str = "asked for in Prefect", kind: RunKind = "train") -> str | State[Any]:
    """Train one task now, or refit its head, or resume its unfinished run; returns how that ended.

    If training fails, the flow does.
    """
    try:
        result = coach_task(load_settings(config), task, reason=reason, kind=kind)
    except Busy as busy:
        return Cancelled(message=str(busy))
    if result.state == "cancelled":
        return Cancelled(message=result.in_words)
    if result.state == "failed":
        raise TrainingError(result.in_words)
    return result.in_words


def _waits(task: str) -> bool:
    """Whether a run of this task is on its way to a worker. One that runs holds the task's lease."""
    on_its_way = FlowRunFilter.model_validate(
        {"tags": {"all_": [f"task:{task}"]}, "state": {"type": {"any_": [StateType.SCHEDULED, StateType.PENDING]}}}
    )
    with get_client(sync_client=True) as client:
        return bool(client.read_flow_runs(flow_run_filter=on_its_way, limit=1))


def _start(config: str, task: str, due: Due) -> None:
    parameters = {"config": config, "task": task, "reason": due.reason, "kind": due.kind}
    try:
        run_deployment(TRAIN, parameters=parameters, timeout=0, tags=[f"task:{task}"], as_subflow=False)
    except ObjectNotFound as error:
        raise TrainingError(f"Prefect has no deployment {TRAIN}; run prefect deploy --all") from error
