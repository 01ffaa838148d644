"""The flow that a Prefect schedule starts: train whatever is due. `apprentice coach` does it without a schedule."""

from __future__ import annotations

from prefect import flow

from apprentice.config import load_settings
from flows.coach import Busy, coach_task
from flows.dispatch import due_tasks
from flows.workshop import Workshop

__all__ = ["coach_due"]


@flow(name="coach-due", log_prints=False)
def coach_due(config: str) -> dict[str, str]:
    """Train every task of a config that is due, escalations first; returns how each run ended."""
    settings = load_settings(config)
    shop = Workshop.open(settings)
    try:
        due = due_tasks(settings, shop)
    finally:
        shop.close()
    ended = {}
    for task, reason in due:
        try:
            ended[task] = coach_task(settings, task, reason=reason).reason
        except Busy as busy:
            ended[task] = str(busy)
    return ended
