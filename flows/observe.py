"""Observe: each task's standing as metrics on its champion's run, the history behind every decision."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.artifacts import create_table_artifact

from apprentice import secrets
from apprentice.confidence.phases import Phase
from apprentice.operate.report import cost_report
from flows.workshop import Workshop, workshop

__all__ = ["observe", "observe_all", "observe_task"]

_log = secrets.logger("apprentice.coach")


@flow(name="observe", log_prints=False, retries=1, retry_delay_seconds=10)
def observe(config: str) -> int:
    """Write every task's standing to MLflow; returns how many tasks have a champion."""
    with workshop(config) as shop:
        rows = observe_all(shop)
    create_table_artifact(rows, key="observed", description="Where every task stands")
    return sum(row.get("champion") is not None for row in rows)


def observe_all(shop: Workshop) -> list[dict[str, Any]]:
    """Every task's figures. One that cannot be observed stops none of the others; its row says why."""
    rows: list[dict[str, Any]] = []
    for task in shop.settings.tasks:
        try:
            rows.append({"task": task.name, **observe_task(shop, task.name)})
        except Exception as error:  # noqa: BLE001  # whatever store or registry raise about this one task
            _log.warning("%s could not be observed: %s", task.name, error, exc_info=True)
            rows.append({"task": task.name, "error": f"{type(error).__name__}: {error}"})
    return rows


def observe_task(shop: Workshop, task: str) -> dict[str, float | str | None]:
    """One task's figures, written against its champion's run where it has one. Money is in USD."""
    state = shop.store.policy_row(task)
    figures = shop.judge.figures(task)
    scope = figures.window_served if figures.phase is Phase.SERVE else figures.window_all
    costs = cost_report(shop.store, shop.settings, clock=shop.clock).tasks
    cost = next((c for c in costs if c.task == task), None)
    avoided = cost.avoided if cost is not None else None
    values: dict[str, float | None] = {
        "correlation": scope.correlation.value if scope.correlation else None,
        "correlation_low": scope.correlation.low if scope.correlation else None,
        "agreement": scope.agreement.value if scope.agreement else None,
        "accepted_agreement": figures.accepted_agreement,
        "unverified": figures.unverified,
        "coverage": figures.coverage,
        "sampling_rate": state.sampling_rate,
        "phase": float(state.phase),
        "comparisons": float(figures.comparisons),
        "spent": float(cost.spent) if cost is not None else 0.0,
        "held": float(cost.held) if cost is not None else 0.0,
        "avoided": float(avoided) if avoided is not None else None,
    }
    version = shop.store.version(task, state.champion) if state.champion else None
    if version is not None:
        # A champion whose own run is gone still has a history to keep.
        run = shop.tracking.run_of_version(task, version.name) or shop.tracking.run(task, "live", name=f"{task}-live")
        at_s = shop.clock()
        run.metrics({f"live.{name}": value for name, value in values.items()}, at_s=at_s, step=int(at_s))
    return {"champion": state.champion, **values}
