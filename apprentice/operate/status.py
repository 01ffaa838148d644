"""Where every task stands: phase, trust, sampling and money on one page."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apprentice.confidence.ceiling import Ceiling, sentence
from apprentice.confidence.figures import Figures, Promise
from apprentice.confidence.phases import Phase, Signal
from apprentice.confidence.settings import TrustSettings
from apprentice.events.kinds import EventKind
from apprentice.lifecycle.unattended import waits_for_coach
from apprentice.operate.check import sqlite_path
from apprentice.request.judge import Judge, trust_settings
from apprentice.result import TaskStatus
from apprentice.settings.config import Settings, load_settings
from apprentice.store import SpendRow, Store
from apprentice.store.records import PromotionRecord
from apprentice.student.halves import halves_wanted

if TYPE_CHECKING:
    from rich.console import Group

__all__ = [
    "ceiling_line",
    "forecast_words",
    "open_existing",
    "promise_words",
    "recent_price",
    "run_command",
    "status_page",
    "task_statuses",
]

_RECENT_DAYS = 7


def task_statuses(settings: Settings, store: Store, judge: Judge) -> dict[str, TaskStatus]:
    """Every configured task's status, by name."""
    calls: dict[str, list[SpendRow]] = {}
    for row in store.spend():
        calls.setdefault(row.task, []).append(row)
    held = {row.task: row.amount for row in store.held()}
    return {
        task.name: _status(settings, task.name, store, judge, calls.get(task.name, []), held.get(task.name, Decimal(0)))
        for task in settings.tasks
    }


def recent_price(calls: Sequence[SpendRow]) -> Decimal | None:
    """Mean price of a remote call on the last `_RECENT_DAYS` days on which there were any; None if there were none."""
    paid = [row for row in calls if row.is_answering and row.state == "settled" and row.calls]
    days = sorted({row.day for row in paid})[-_RECENT_DAYS:]
    recent = [row for row in paid if row.day in days]
    count = sum(row.calls for row in recent)
    return sum((row.cost for row in recent), Decimal(0)) / count if count else None


def _status(
    settings: Settings, task: str, store: Store, judge: Judge, calls: Sequence[SpendRow], held: Decimal
) -> TaskStatus:
    state = store.policy_row(task)
    figures = judge.figures(task)
    scope = figures.window_served if figures.phase is Phase.SERVE else figures.window_all
    alert = store.latest_alert(task)
    correlation, agreement = scope.correlation, scope.agreement
    forecast, price = figures.forecast, recent_price(calls)
    ceiling, examples = judge.ceiling(task), store.example_totals(task).kept
    promotions = store.promotions(task)
    promoted = promotions[-1] if promotions else None
    chosen = None if promoted is None or promoted.how == "gate" else _chosen(promoted)
    promoted_at = 0.0 if promoted is None else promoted.at
    return TaskStatus(
        task=task,
        phase=state.phase,
        champion=state.champion,
        examples=examples,
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
        spent=sum((row.cost for row in calls), Decimal(0)),
        held=held,
        training_due=state.training_due,
        waits_for_coach=waits_for_coach(settings, store, task, time.time()),
        last_alert=_words(alert.kind, alert.at) if alert else None,
        promises=tuple(figures.promises),
        sampling_floor=figures.sampling_floor,
        ceiling=ceiling,
        out_of_reach=None if ceiling is None else sentence(ceiling, trust_settings(settings, settings.task(task))),
        max_bad_answers=settings.sampling.max_bad_answers,
        campaign=figures.campaign,
        chosen=chosen,
        why=_why_not_more(settings, store, task, figures, examples, chosen, promoted_at),
        forecast=forecast,
        forecast_cost=None if forecast is None or price is None else price * Decimal(round(forecast.comparisons)),
    )


def _chosen(last: PromotionRecord) -> str:
    """Who chose the champion, and why."""
    left = f" from {last.previous}" if last.previous else ""
    did = f"went back to {last.version}{left}" if last.how == "rollback" else f"chose {last.version}"
    return f"{last.by or 'a person'} {did} on {_at(last.at)}: {last.reason or 'no reason given'}"


def _why_not_more(
    settings: Settings,
    store: Store,
    task: str,
    figures: Figures,
    examples: int,
    chosen: str | None,
    promoted_at: float,
) -> str | None:
    """What keeps the task from serving more, in words that follow "since"; None where it is only evidence to come."""
    if figures.phase is Phase.COLLECT:
        return _why_no_version(settings, store, task, examples)
    if figures.phase is Phase.SHADOW:
        moved = store.latest_event(task, EventKind.PHASE)
        if moved is not None and moved.at > promoted_at:
            signal = moved.evidence.get("signal")
            if signal == Signal.EMERGENCY:
                return f"it answered too badly on {_at(moved.at)} (emergency) and has to earn trust anew"
            if signal == Signal.REFUSED:
                return f"it got worse, and on {_at(moved.at)} what was trained instead was refused by the gate"
        return _falls_short(trust_settings(settings, settings.task(task)), figures) or chosen
    if figures.alarmed:
        return "it got worse (see the last alert): everything is checked until it is certified anew or replaced"
    if figures.coaching:
        return "it got worse and is in coaching: everything is checked until it recovers or is replaced"
    return _falls_short(trust_settings(settings, settings.task(task)), figures)


def _falls_short(targets: TrustSettings, figures: Figures) -> str | None:
    """What was seen of all that it answers, of its surest answers while nothing is served, and what may be."""
    serves = figures.phase is Phase.SERVE
    if not figures.slices:
        return None
    part = figures.slices[-1 if serves else 0]
    whose = "of all that it answers" if serves or part.share >= 1.0 else f"even of its surest {part.share:.0%}"
    differs = 0.0 if part.agreement is None else 1.0 - part.agreement
    if targets.max_disagreement is not None and differs > targets.max_disagreement:
        return f"{whose} {differs:.1%} differ, and at most {targets.max_disagreement:.1%} may"
    overall = targets.max_disagreement_overall
    if overall is not None and part.share * differs > overall:
        return f"{whose} {differs:.1%} differ, and at most {overall:.1%} of all answers may"
    correlation = figures.window_all.correlation
    if targets.max_disagreement is not None or overall is not None or correlation is None:
        return None
    if correlation.value >= targets.graduate:
        return None
    return f"of all that it answers the correlation is {correlation.value:.2f}, and {targets.graduate:.2f} is asked for"


def _why_no_version(settings: Settings, store: Store, task: str, examples: int) -> str:
    runs, wanted = store.runs(task), halves_wanted(settings, task)
    last = runs[-1] if runs else None
    if last is not None and last.state == "running":
        return "its first version is being trained"
    if last is not None and last.state == "failed":
        return f"its last training failed ({' '.join(last.error.split())[:200] or 'see its run'})"
    if last is not None and last.state == "waits_for_review":
        return f"version {last.version} waits for a person's review in MLflow"
    if last is not None and last.state == "rejected":
        refused = store.version(task, last.version) if last.version else None
        return f"the gate refused its last candidate{f' ({refused.reason})' if refused and refused.reason else ''}"
    first_at = settings.task(task).confidence_thresholds.phase1_to_phase2
    if wanted.head and wanted.alone:
        first_at = min(first_at, settings.local.student.head_from)
    if examples < first_at:
        return f"its first training needs {first_at:,} examples and there are {examples:,}"
    return f"its first training is due: there are {examples:,} examples"


def forecast_words(status: TaskStatus) -> str | None:
    """Why no more is served, and what it takes, in a sentence; None where there is nothing more to serve."""
    from apprentice.operate.report import money

    phase, one = Phase(status.phase), status.forecast
    if phase is Phase.SERVE and status.coverage >= 1.0:
        return None
    now = f"{status.coverage:.0%} served" if phase is Phase.SERVE else "nothing is served yet"
    if status.why:
        now += f", since {status.why}"
    if phase is Phase.COLLECT:
        return now if status.why else None
    if one is None:
        return f"{now}; what was compared so far supports no forecast of more within as many requests again"
    cost = "" if status.forecast_cost is None else f" ({money(status.forecast_cost)})"
    takes = f"about {_about(one.comparisons)} more comparisons{cost}"
    if one.checks >= 0.5:
        takes += f", {_about(one.checks)} of them checks, in {_about(one.requests)} requests,"
    if phase is Phase.SERVE and one.coverage > status.coverage:
        return f"{now}; {takes} for {100 * (one.coverage - status.coverage):.0f} points more"
    return f"{now}; {takes} until {one.coverage:.0%} can be trusted"


def _about(count: float) -> str:
    """Two digits: a forecast knows no more."""
    return f"{float(f'{max(count, 1.0):.2g}'):,.0f}"


def _words(kind: str, at: float) -> str:
    return f"{kind.replace('_', ' ')} ({_at(at)})"


def _at(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC"


def status_page(statuses: Mapping[str, TaskStatus]) -> Group:
    """The statuses for a terminal of 80 columns: a table, and a line for whatever asks for attention."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from apprentice.operate.report import money

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task", overflow="fold")
    table.add_column("phase", no_wrap=True)
    for name in ("examples", "correlation", "agreement", "local", "checks", "spent"):
        table.add_column(name, justify="right", no_wrap=True)
    lines: list[Text] = []

    def say(text: str, *, asks: bool = False) -> None:
        # No markup: reasons and errors are other people's words, and may hold brackets.
        lines.append(Text(f"{status.task}: {text}", style="yellow" if asks else ""))

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
        forecast = forecast_words(status)
        if forecast is not None:
            say(forecast)
        if status.chosen and status.chosen != status.why:
            say(status.chosen)
        if phase is not Phase.COLLECT:
            for promise in status.promises:
                say(promise_words(promise))
        if status.campaign is not None:
            say(f"a campaign checks {status.campaign:.0%} of what is served, so that more of it can be served sooner")
        if status.max_bad_answers is not None and phase is Phase.SERVE:
            say(
                f"at least {status.sampling_floor:.1%} of what is served is checked, at "
                f"{status.sampling_floor * status.coverage:.1%} of all requests, so that a fall costs at most "
                f"{status.max_bad_answers:g} bad answers on average"
            )
        if status.out_of_reach:
            say(status.out_of_reach, asks=True)
        elif status.ceiling is not None:
            say(ceiling_line(status.ceiling))
        if status.held:
            say(f"calls in flight hold {money(status.held)} at most, beside what is spent")
        if status.unverified >= 1:
            say(f"{status.unverified:,.0f} local answers could not be checked; no figure has them")
        if status.waits_for_coach:
            due = status.waits_for_coach
            say(f"no coach is watching, and training is due ({due}); run: apprentice coach", asks=True)
        elif status.training_due:
            say(f"training is due ({status.training_due})")
        if status.last_alert:
            say(f"last alert {status.last_alert}", asks=True)
    return Group(table, *lines)


def promise_words(promise: Promise) -> str:
    """What is promised, what came of it, and how that is known."""
    promised = f"{promise.what}: at most {promise.at_most:.1%} promised"
    if promise.realised is None:
        return f"{promised}, none was checked yet"
    so_far = f"{promised}, {max(0.0, promise.realised):.1%} so far"
    if promise.low is None or promise.high is None:
        return so_far
    checks = f"{promise.checks:,} weighted spot check{'s' if promise.checks != 1 else ''}"
    return f"{so_far} ({promise.low:.1%} to {promise.high:.1%}, from {checks})"


def ceiling_line(ceiling: Ceiling) -> str:
    """How often the remote agrees with itself, and the local model with it."""
    remote, local = ceiling.agreement, ceiling.local
    line = f"asked twice, the remote agrees with itself in {remote.value:.1%} ({remote.low:.0%} to {remote.high:.0%}"
    line += f", {ceiling.pairs} requests)"
    if local is not None:
        line += f", the local model with it in {local.value:.1%} ({local.low:.0%} to {local.high:.0%})"
    return line if ceiling.best is None else f"{line}; no student can in more than {ceiling.best:.1%}"


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
    cost = None if status.forecast_cost is None else str(status.forecast_cost)
    return {
        **asdict(status),
        "spent": str(status.spent),
        "held": str(status.held),
        "forecast_cost": cost,
        "forecast_words": forecast_words(status),
    }
