"""Where every task stands: phase, trust, sampling and money on one page."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apprentice.check import sqlite_path
from apprentice.config import Settings, load_settings
from apprentice.judge import Judge
from apprentice.phases import Phase
from apprentice.result import TaskStatus
from apprentice.store import Store
from apprentice.unattended import waits_for_coach

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["open_existing", "run_command", "status_page", "task_statuses"]


def task_statuses(settings: Settings, store: Store, judge: Judge) -> dict[str, TaskStatus]:
    """Every configured task's status, by name."""
    spent: dict[str, Decimal] = {}
    for row in store.spend():
        spent[row.task] = spent.get(row.task, Decimal(0)) + row.cost
    held = {row.task: row.amount for row in store.held()}
    none = Decimal(0)
    return {
        task.name: _status(settings, task.name, store, judge, spent.get(task.name, none), held.get(task.name, none))
        for task in settings.tasks
    }


def _status(settings: Settings, task: str, store: Store, judge: Judge, spent: Decimal, held: Decimal) -> TaskStatus:
    state = store.policy_row(task)
    figures = judge.figures(task)
    scope = figures.window_served if figures.phase is Phase.SERVE else figures.window_all
    alert = store.latest_alert(task)
    correlation, agreement = scope.correlation, scope.agreement
    return TaskStatus(
        task=task,
        phase=state.phase,
        champion=state.champion,
        examples=store.example_totals(task).kept,
        comparisons=figures.comparisons,
        correlation=correlation.value if correlation else None,
        correlation_interval=(correlation.low, correlation.high) if correlation else None,
        agreement=agreement.value if agreement else None,
        accepted_agreement=figures.accepted_agreement,
        unverified=figures.unverified,
        coverage=figures.coverage,
        threshold=state.threshold,
        sampling_rate=state.sampling_rate,
        coaching=figures.coaching,
        spent=spent,
        held=held,
        training_due=state.training_due,
        waits_for_coach=waits_for_coach(settings, store, task, time.time()),
        last_alert=_words(alert.kind, alert.at) if alert else None,
        promises=tuple(figures.promises),
        sampling_floor=figures.sampling_floor,
        max_bad_answers=settings.sampling.max_bad_answers,
    )


def _words(kind: str, at: float) -> str:
    return f"{kind.replace('_', ' ')} ({datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC)"


def status_page(statuses: Mapping[str, TaskStatus]) -> Group:
    """The statuses for a terminal of 80 columns: a table, and a line for whatever asks for attention."""
    from rich.console import Group
    from rich.table import Table

    from apprentice.report import money

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task", overflow="fold")
    table.add_column("phase", no_wrap=True)
    for name in ("examples", "correlation", "agreement", "local", "checks", "spent"):
        table.add_column(name, justify="right", no_wrap=True)
    lines: list[str] = []
    for status in statuses.values():
        phase = Phase(status.phase)
        low, high = status.correlation_interval or (None, None)
        table.add_row(
            _over(status.task, status.champion or ""),
            _over(f"{status.phase} {phase.name.lower()}", "coaching" if status.coaching else ""),
            f"{status.examples:,}",
            "-" if status.correlation is None else _over(f"{status.correlation:.2f}", f"{low:.2f}..{high:.2f}"),
            "-" if status.agreement is None else f"{status.agreement:.1%}",
            f"{status.coverage:.0%}",
            f"{status.sampling_rate:.0%}" if phase is Phase.SERVE else "-",
            money(status.spent),
        )
        for promise in status.promises:
            so_far = "none was checked yet" if promise.realised is None else f"{max(0.0, promise.realised):.1%} so far"
            lines.append(f"{status.task}: {promise.what}: at most {promise.at_most:.1%} promised, {so_far}")
        if status.max_bad_answers is not None and phase is Phase.SERVE:
            lines.append(
                f"{status.task}: at least {status.sampling_floor:.1%} of what is served is checked, at "
                f"{status.sampling_floor * status.coverage:.1%} of all requests, so that a fall costs at most "
                f"{status.max_bad_answers:g} bad answers on average"
            )
        if status.held:
            lines.append(f"{status.task}: calls in flight hold {money(status.held)} at most, beside what is spent")
        if status.unverified >= 1:
            lines.append(
                f"{status.task}: {status.unverified:,.0f} local answers could not be checked; no figure has them"
            )
        if status.waits_for_coach:
            lines.append(
                f"[yellow]{status.task}: no coach is watching, and training is due ({status.waits_for_coach}); "
                "run: apprentice coach[/yellow]"
            )
        elif status.training_due:
            lines.append(f"{status.task}: training is due ({status.training_due})")
        if status.last_alert:
            lines.append(f"[yellow]{status.task}: last alert {status.last_alert}[/yellow]")
    return Group(table, *lines)


def _over(first: str, second: str) -> str:
    return f"{first}\n[dim]{second}[/dim]" if second else first


def open_existing(settings: Settings, *, clock: Callable[[], float] = time.time) -> Store:
    """The store, for a command that only looks: nothing is made or written, and one that is not there yet is empty.

    A path that was mistyped would else become folders and a database, and the answer would be that nothing happened.
    """
    import click

    path = sqlite_path(settings.store_url)
    if path is not None and not path.exists():
        click.echo(
            f"There is no store at {path}: nothing was asked yet, or `store` in {settings.source} is wrong.", err=True
        )
    return Store.open(settings.store_url, read_only=True, clock=clock)


def run_command(config: Path, *, as_json: bool) -> None:
    """`apprentice status`: reads the store and nothing else, so it needs no API key and no model."""
    import click
    from rich.console import Console

    settings = load_settings(config)
    with open_existing(settings) as store:
        store.ensure_tasks(task.name for task in settings.tasks)
        judge = Judge(settings, store, time.time, random.Random())
        statuses = task_statuses(settings, store, judge)
    if as_json:
        click.echo(json.dumps({name: _plain(status) for name, status in statuses.items()}, indent=2))
    else:
        Console(highlight=False).print(status_page(statuses))


def _plain(status: TaskStatus) -> dict[str, Any]:
    return {**asdict(status), "spent": str(status.spent), "held": str(status.held)}
