"""Where every task stands: phase, trust, sampling and money on one page."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apprentice.config import Settings, load_settings
from apprentice.judge import Judge
from apprentice.phases import Phase
from apprentice.result import TaskStatus
from apprentice.store import Store

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["run_command", "status_table", "task_statuses"]


def task_statuses(settings: Settings, store: Store, judge: Judge) -> dict[str, TaskStatus]:
    """Every configured task's status, by name."""
    spent: dict[str, Decimal] = {}
    for row in store.spend():
        spent[row.task] = spent.get(row.task, Decimal(0)) + row.cost
    return {task.name: _status(task.name, store, judge, spent.get(task.name, Decimal(0))) for task in settings.tasks}


def _status(task: str, store: Store, judge: Judge, spent: Decimal) -> TaskStatus:
    state = store.policy_row(task)
    figures = judge.figures(task)
    scope = figures.window_served if figures.phase is Phase.SERVE else figures.window_all
    alerts = [event for event in store.events(task) if event.level != "info"]
    correlation, agreement = scope.correlation, scope.agreement
    return TaskStatus(
        task=task,
        phase=state.phase,
        champion=state.champion,
        examples=store.count_examples(task),
        comparisons=figures.comparisons,
        correlation=correlation.value if correlation else None,
        correlation_interval=(correlation.low, correlation.high) if correlation else None,
        agreement=agreement.value if agreement else None,
        coverage=figures.coverage,
        threshold=state.threshold,
        sampling_rate=state.sampling_rate,
        coaching=figures.coaching,
        spent=spent,
        training_due=state.training_due,
        last_alert=_words(alerts[-1].kind, alerts[-1].at) if alerts else None,
    )


def _words(kind: str, at: float) -> str:
    return f"{kind.replace('_', ' ')} ({datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC)"


def status_table(statuses: Mapping[str, TaskStatus]) -> Table:
    """The statuses as a table for a terminal."""
    from rich.table import Table

    table = Table(title="Tasks", title_justify="left", title_style="bold")
    for name in ("task", "phase"):
        table.add_column(name)
    for name in ("examples", "correlation", "agreement", "coverage", "spot checks", "spent"):
        table.add_column(name, justify="right")
    table.add_column("last alert", style="yellow")
    for status in statuses.values():
        phase = Phase(status.phase)
        low, high = status.correlation_interval or (None, None)
        correlation = (
            "-" if status.correlation is None else f"{status.correlation:.2f} [dim]{low:.2f}..{high:.2f}[/dim]"
        )
        table.add_row(
            status.task,
            f"{status.phase} {phase.name.lower()}" + (" (coaching)" if status.coaching else ""),
            f"{status.examples:,}",
            correlation,
            "-" if status.agreement is None else f"{status.agreement:.1%}",
            f"{status.coverage:.0%}",
            f"{status.sampling_rate:.0%}" if phase is Phase.SERVE else "-",
            f"${status.spent:.4f}",
            status.last_alert or "",
        )
    return table


def run_command(config: Path, *, as_json: bool) -> None:
    """`apprentice status`: reads the store and nothing else, so it needs no API key and no model."""
    import click
    from rich.console import Console

    from apprentice.assembly import open_judge

    settings = load_settings(config)
    with Store.open(settings.store_url) as store:
        statuses = task_statuses(settings, store, open_judge(settings, store, time.time, random.Random()))
    if as_json:
        click.echo(json.dumps({name: _plain(status) for name, status in statuses.items()}, indent=2))
    else:
        Console().print(status_table(statuses))


def _plain(status: TaskStatus) -> dict[str, Any]:
    return {**asdict(status), "spent": str(status.spent)}
