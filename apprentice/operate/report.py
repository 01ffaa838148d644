"""What was spent and what was saved: by task, provider, model and day, where it is going, and how it looks.

`cost_report` reads the store into plain data; the rest writes that data as a table, JSON, CSV or one HTML page with a
picture. The words:

- spent: what is billed, and the worst case of calls that may have been billed (``uncertain``);
- held: what calls in flight may cost at most. It is not spent, and in no sum of what is;
- price: what the task's remote answers cost on average, repairs and failed attempts included;
- avoided: what the remote would have cost for the answers that the local model gave, at that price;
- saved: avoided, less what the local machine costs per hour.

A task without a remote answer has no price: what its local answers avoided is unknown, not zero, and so are the sums.
"""

from __future__ import annotations

import csv
import io
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import click

from apprentice.confidence.ceiling import sentence
from apprentice.money.budget import NEVER, Budget, CapState
from apprentice.request.judge import Judge, trust_settings
from apprentice.settings.config import Settings
from apprentice.store import Count, SpendRow, Store

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = [
    "CostReport",
    "DayCost",
    "Spend",
    "TaskCost",
    "as_csv_text",
    "as_html",
    "as_json_text",
    "cost_report",
    "run_command",
]

LOCAL_OUTCOMES = frozenset({"local", "degraded", "budget"})
"""Outcomes of requests that the local model alone answered."""

_RECENT_DAYS = 7
_DAY_S = 86_400.0
_CENT = Decimal("0.01")


@dataclass(frozen=True, slots=True)
class TaskCost:
    """One task. ``price`` is that of a remote answer. The local machine serves all tasks, and is in no task's line."""

    task: str
    requests: int
    local_answers: int
    calls: int
    spent: Decimal
    held: Decimal
    price: Decimal | None
    avoided: Decimal | None


@dataclass(frozen=True, slots=True)
class Spend:
    """One model of one provider."""

    provider: str
    model: str
    calls: int
    spent: Decimal
    input_tokens: int
    output_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class DayCost:
    """One day. ``local_cost`` is the local machine's; ``per_thousand`` is what was spent per 1,000 requests."""

    day: str
    requests: int
    local_answers: int
    spent: Decimal
    avoided: Decimal | None
    local_cost: Decimal
    saved: Decimal | None
    per_thousand: Decimal | None


@dataclass(frozen=True, slots=True)
class CostReport:
    """The whole report. Money in USD; ``uncertain`` is the part of ``spent`` that may not have been billed.

    ``asked_again`` is the part of ``spent`` for asking the remote once more what it had answered. ``ceilings`` says how
    often each task's remote agrees with itself, a sentence for each of which that is known. Like ``held`` and ``caps``
    it is as of now, whatever the report's first day is.
    """

    since: str
    until: str
    requests: int
    local_answers: int
    spent: Decimal
    uncertain: Decimal
    asked_again: Decimal
    held: Decimal
    avoided: Decimal | None
    local_cost: Decimal
    saved: Decimal | None
    month_projection: Decimal
    tasks: tuple[TaskCost, ...]
    models: tuple[Spend, ...]
    days: tuple[DayCost, ...]
    caps: tuple[CapState, ...]
    calls: tuple[SpendRow, ...]
    ceilings: tuple[str, ...] = ()


def parse_since(text: str | None, today: date) -> date | None:
    """``2026-03-01``, or ``30d`` for the last thirty days, today included. Raises `click.BadParameter`."""
    if text is None:
        return None
    try:
        start = today - timedelta(days=int(text[:-1]) - 1) if text.endswith("d") else date.fromisoformat(text)
    except (ValueError, OverflowError):
        message = f"{text!r} is neither a date nor a number of days; write 2026-03-01 or 30d"
        raise click.BadParameter(message, param_hint="--since") from None
    if start > today:
        raise click.BadParameter(f"{text!r} is after today, {today}; write an earlier day", param_hint="--since")
    return start


def cost_report(
    store: Store, settings: Settings, *, since: str | None = None, clock: Callable[[], float] = time.time
) -> CostReport:
    """Sum up the ledger and the counters from a day on (see `parse_since`; None: from the beginning)."""
    zone = ZoneInfo(settings.budget.timezone)
    now = clock()
    today = datetime.fromtimestamp(now, zone).date()
    start = parse_since(since, today)
    first_day = start.isoformat() if start else ""
    calls = store.spend(since=first_day)
    counts = store.counts(since=first_day)
    held = {row.task: row.amount for row in store.held()}
    prices = _prices(store, store.spend() if start else calls)
    tasks = _by_task(calls, counts, held, prices)
    days = _by_day(calls, counts, prices, settings.local.cost_per_hour, now, zone)
    task_caps = {t.name: t.budget for t in settings.tasks}
    caps = Budget(store, settings.budget, task_caps, clock=clock, looks_only=True).remaining()
    avoided = _sum_known(t.avoided for t in tasks)
    local_cost = sum((d.local_cost for d in days), Decimal(0))
    return CostReport(
        since=first_day or (days[0].day if days else today.isoformat()),
        until=today.isoformat(),
        requests=sum(t.requests for t in tasks),
        local_answers=sum(t.local_answers for t in tasks),
        spent=sum((t.spent for t in tasks), Decimal(0)),
        uncertain=sum((row.cost for row in calls if row.state == "lost"), Decimal(0)),
        asked_again=sum((row.cost for row in calls if row.is_asked_again), Decimal(0)),
        held=sum(held.values(), Decimal(0)),
        avoided=avoided,
        local_cost=local_cost,
        saved=None if avoided is None else avoided - local_cost,
        month_projection=_projection(store, now, zone),
        tasks=tasks,
        models=_by_model(calls),
        days=days,
        caps=tuple(caps),
        calls=tuple(calls),
        ceilings=tuple(_ceilings(store, settings, clock)),
    )


def _ceilings(store: Store, settings: Settings, clock: Callable[[], float]) -> Iterable[str]:
    """What every task's remote makes of a second question, where it was asked one."""
    from apprentice.operate.status import ceiling_line

    judge = Judge(settings, store, clock, random.Random(0))
    for task in settings.tasks:
        ceiling = judge.ceiling(task.name)
        if ceiling is not None:
            said = sentence(ceiling, trust_settings(settings, task))
            yield f"{task.name}: {said or ceiling_line(ceiling)}"


def _sum_known(amounts: Iterable[Decimal | None]) -> Decimal | None:
    """The sum; None if any of them is unknown."""
    total = Decimal(0)
    for amount in amounts:
        if amount is None:
            return None
        total += amount
    return total


def _prices(store: Store, calls: Iterable[SpendRow]) -> dict[str, Decimal]:
    """What a remote answer to each task cost on average, whatever calls it took."""
    cost: defaultdict[str, Decimal] = defaultdict(Decimal)
    for row in calls:
        if row.is_answering:
            cost[row.task] += row.cost
    answers = {task: store.example_totals(task).ever for task in cost}
    return {task: cost[task] / answers[task] for task in cost if answers[task]}


def _avoided(price: Decimal | None, local_answers: int) -> Decimal | None:
    return Decimal(0) if not local_answers else None if price is None else price * local_answers


def _by_task(
    calls: Sequence[SpendRow], counts: Sequence[Count], held: Mapping[str, Decimal], prices: Mapping[str, Decimal]
) -> tuple[TaskCost, ...]:
    found = []
    for task in sorted({row.task for row in calls} | {c.task for c in counts} | set(held)):
        mine = [row for row in calls if row.task == task]
        asked = sum(c.n for c in counts if c.task == task and _is_request(c))
        local = sum(c.n for c in counts if c.task == task and c.outcome in LOCAL_OUTCOMES)
        price = prices.get(task)
        found.append(
            TaskCost(
                task,
                asked,
                local,
                sum(row.calls for row in mine if row.state != "released"),
                sum((row.cost for row in mine), Decimal(0)),
                held.get(task, Decimal(0)),
                price,
                _avoided(price, local),
            )
        )
    return tuple(found)


def _is_request(count: Count) -> bool:
    return count.outcome != "local_failed"  # counted beside the outcome of the request itself


def _by_model(calls: Sequence[SpendRow]) -> tuple[Spend, ...]:
    found = []
    for provider, model in sorted({(row.provider, row.model) for row in calls}):
        mine = [row for row in calls if (row.provider, row.model) == (provider, model)]
        found.append(
            Spend(
                provider,
                model,
                sum(row.calls for row in mine if row.state != "released"),
                sum((row.cost for row in mine), Decimal(0)),
                sum(row.usage.input for row in mine),
                sum(row.usage.output for row in mine),
                sum(row.usage.cached for row in mine),
            )
        )
    return tuple(found)


def _by_day(
    calls: Sequence[SpendRow],
    counts: Sequence[Count],
    prices: Mapping[str, Decimal],
    cost_per_hour: Decimal,
    now: float,
    zone: ZoneInfo,
) -> tuple[DayCost, ...]:
    local_days = set(_local_days(counts))
    found = []
    for day in sorted({row.day for row in calls} | {c.day for c in counts} | local_days):
        spent = sum((row.cost for row in calls if row.day == day), Decimal(0))
        today = [c for c in counts if c.day == day]
        asked = sum(c.n for c in today if _is_request(c))
        local = [c for c in today if c.outcome in LOCAL_OUTCOMES]
        avoided = _sum_known(_avoided(prices.get(c.task), c.n) for c in local)
        machine = _local_cost(day, cost_per_hour, now, zone) if day in local_days else Decimal(0)
        machine += sum((row.cost for row in calls if row.day == day and row.is_hosted), Decimal(0))
        saved = None if avoided is None else avoided - machine
        per_thousand = spent * 1000 / asked if asked else None
        found.append(DayCost(day, asked, sum(c.n for c in local), spent, avoided, machine, saved, per_thousand))
    return tuple(found)


def _local_days(counts: Sequence[Count]) -> list[str]:
    """The days on which the local machine was paid for: every one from the first local answer to the last."""
    days = [c.day for c in counts if c.outcome in LOCAL_OUTCOMES]
    if not days:
        return []
    first, last = date.fromisoformat(min(days)), date.fromisoformat(max(days))
    return [(first + timedelta(days=n)).isoformat() for n in range((last - first).days + 1)]


def _local_cost(day: str, cost_per_hour: Decimal, now: float, zone: ZoneInfo) -> Decimal:
    """What the local machine cost on a day: all the hours of it, or those that have passed."""
    start = date.fromisoformat(day)
    hours = (min(now, _midnight(start + timedelta(days=1), zone)) - _midnight(start, zone)) / 3600
    return cost_per_hour * Decimal(f"{max(hours, 0.0):.4f}")


def _midnight(day: date, zone: ZoneInfo) -> float:
    return datetime(day.year, day.month, day.day, tzinfo=zone).timestamp()


def _projection(store: Store, now: float, zone: ZoneInfo) -> Decimal:
    """This month's spending at its end, if money goes on being spent as it was over the last days.

    The pace is what was spent today and on the six days before, over the time that has passed since the first of these
    days on which anything was, and over at least a day: a system of an hour says little about a month.
    """
    today = datetime.fromtimestamp(now, zone).date()
    first_of_month = today.replace(day=1)
    first_recent = today - timedelta(days=_RECENT_DAYS - 1)
    rows = store.spend(since=min(first_of_month, first_recent).isoformat())
    month = sum((row.cost for row in rows if row.day >= first_of_month.isoformat()), Decimal(0))
    recent = [row for row in rows if row.day >= first_recent.isoformat()]
    if not recent:
        return month
    began = _midnight(date.fromisoformat(min(row.day for row in recent)), zone)
    pace = sum((row.cost for row in recent), Decimal(0)) / Decimal(f"{max(now - began, _DAY_S):.3f}")
    ends = _midnight((first_of_month + timedelta(days=31)).replace(day=1), zone)
    return month + pace * Decimal(f"{ends - now:.3f}")


# ---------------------------------------------------------------- as text


def as_json_text(report: CostReport) -> str:
    """The whole report; amounts are strings, so that no reader rounds them."""

    def plain(value: Any) -> Any:
        if isinstance(value, Decimal):
            return f"{value:f}"
        if isinstance(value, datetime):
            return None if value == NEVER else value.isoformat()
        raise TypeError(type(value))

    return json.dumps(asdict(report), default=plain, indent=2)


def as_csv_text(report: CostReport) -> str:
    """One line for each task, day, provider, model and state, for a spreadsheet."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    tokens = ("input_tokens", "output_tokens", "cached_tokens", "cache_write_tokens", "reasoning_tokens")
    writer.writerow(["day", "task", "provider", "model", "state", "calls", "cost_usd", *tokens])
    for row in report.calls:
        u = row.usage
        used = (u.input, u.output, u.cached, u.cache_write, u.reasoning)
        writer.writerow([row.day, row.task, row.provider, row.model, row.state, row.calls, f"{row.cost:f}", *used])
    return out.getvalue()


def money(amount: Decimal | None) -> str:
    """For people: cents, and four digits where there are no cents; "?" where unknown."""
    if amount is None:
        return "?"
    digits = 2 if amount == 0 or abs(amount) >= _CENT else 6
    return f"{'-' if amount < 0 else ''}${abs(amount):,.{digits}f}"


def _sentence(report: CostReport) -> str:
    share = report.local_answers / report.requests if report.requests else 0.0
    saved = f"saved {money(report.saved)}"
    if report.local_cost:
        saved += f" after {money(report.local_cost)} for the local machine"
    sentence = (
        f"{report.since} to {report.until}: {report.requests:,} requests, {share:.0%} answered locally; "
        f"spent {money(report.spent)}, {saved}. At this pace the month ends at {money(report.month_projection)}."
    )
    if report.uncertain:
        sentence += f" {money(report.uncertain)} of it may not have been billed (calls whose end is unknown)."
    if report.asked_again:
        sentence += f" {money(report.asked_again)} of it asked the remote again, to learn how steady it is."
    if report.held:
        sentence += f" Calls in flight hold {money(report.held)} more at most."
    return sentence


def as_table(report: CostReport) -> RenderableType:
    """For the terminal: tasks, models, caps, and the cost per 1,000 requests day by day."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
        made = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for n, column in enumerate(columns):
            made.add_column(column, justify="left" if n == 0 else "right")
        for row in rows:
            made.add_row(*row)
        return made

    parts: list[RenderableType] = [Text(_sentence(report)), *map(Text, report.ceilings), Text()]
    columns = ["task", "requests", "local", "calls", "spent", "per answer", "avoided"]
    lines = (
        [
            t.task,
            f"{t.requests:,}",
            f"{t.local_answers:,}",
            f"{t.calls:,}",
            money(t.spent),
            money(t.price),
            money(t.avoided),
        ]
        for t in report.tasks
    )
    parts += [table("By task", columns, lines), Text()]
    models = (
        [f"{m.provider} {m.model}", f"{m.calls:,}", money(m.spent), f"{m.input_tokens:,}", f"{m.output_tokens:,}"]
        for m in report.models
    )
    parts += [table("By model", ["model", "calls", "spent", "tokens in", "tokens out"], models), Text()]
    most = max((d.per_thousand for d in report.days if d.per_thousand is not None), default=Decimal(0))
    shown = [
        [d.day, f"{d.requests:,}", money(d.spent), money(d.saved), money(d.per_thousand), _bar(d.per_thousand, most)]
        for d in report.days[-30:]
    ]
    days = table("By day", ["day", "requests", "spent", "saved", "per 1,000", ""], shown)
    days.columns[-1].justify = "left"
    parts.append(days)
    if report.caps:
        caps = (
            [
                f"{c.scope or 'all tasks'} {c.period}",
                money(c.cap),
                money(c.spent),
                money(c.reserved),
                money(c.remaining),
                "never" if c.resets_at == NEVER else f"{c.resets_at:%Y-%m-%d %H:%M %Z}",
            ]
            for c in report.caps
        )
        parts += [Text(), table("Caps", ["cap", "limit", "spent", "held", "left", "resets"], caps)]
    return Group(*parts)


def _bar(value: Decimal | None, most: Decimal) -> str:
    return "█" * round(24 * value / most) if value and most else ""


# ---------------------------------------------------------------- as a page


def as_html(report: CostReport) -> str:
    """One self-contained page: the sentence, two pictures, the tables."""
    per_thousand = [(d.day, d.per_thousand) for d in report.days if d.per_thousand is not None]
    spent, without = Decimal(0), Decimal(0)
    paid: list[tuple[str, Decimal]] = []
    would: list[tuple[str, Decimal]] = []
    for d in report.days:
        spent += d.spent
        without += d.spent + (d.avoided or Decimal(0))
        paid.append((d.day, spent))
        would.append((d.day, without))
    rows = "".join(
        f"<tr><td>{escape(t.task)}</td><td>{t.requests:,}</td><td>{t.local_answers:,}</td><td>{t.calls:,}</td>"
        f"<td>{money(t.spent)}</td><td>{money(t.price)}</td><td>{money(t.avoided)}</td></tr>"
        for t in report.tasks
    )
    models = "".join(
        f"<tr><td>{escape(m.provider)} {escape(m.model)}</td><td>{m.calls:,}</td><td>{money(m.spent)}</td>"
        f"<td>{m.input_tokens:,}</td><td>{m.output_tokens:,}</td></tr>"
        for m in report.models
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Apprentice: cost report</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }}
table {{ border-collapse: collapse; margin: .5rem 0 2rem }}
td, th {{ padding: .2rem .8rem .2rem 0; text-align: right; font-variant-numeric: tabular-nums }}
td:first-child, th:first-child {{ text-align: left }}
th {{ border-bottom: 1px solid #999; font-weight: 600 }}
svg {{ width: 100%; height: auto }}
</style>
<h1>Cost report</h1>
<p>{escape(_sentence(report))}</p>
{"".join(f"<p>{escape(line)}</p>" for line in report.ceilings)}
<h2>Cost per 1,000 requests</h2>
{_picture([("cost per 1,000 requests", "#2563eb", per_thousand)])}
<h2>Spent, and what it would have been without Apprentice</h2>
{_picture([("spent", "#2563eb", paid), ("without Apprentice", "#9ca3af", would)])}
<h2>By task</h2>
<table><tr><th>task<th>requests<th>local<th>calls<th>spent<th>per answer<th>avoided</tr>{rows}</table>
<h2>By model</h2>
<table><tr><th>model<th>calls<th>spent<th>tokens in<th>tokens out</tr>{models}</table>
</html>
"""


_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 800, 240, 70, 30, 30


def _picture(lines: Sequence[tuple[str, str, Sequence[tuple[str, Decimal]]]]) -> str:
    """Lines over days, as SVG. Days are spaced by the calendar, amounts from zero."""
    days = sorted({day for _, _, points in lines for day, _ in points})
    if not days:
        return "<p>Nothing recorded yet.</p>"
    most = max((amount for _, _, points in lines for _, amount in points), default=Decimal(0)) or Decimal(1)
    first = date.fromisoformat(days[0])
    span = max((date.fromisoformat(days[-1]) - first).days, 1)

    def x(day: str) -> float:
        return _LEFT + (_WIDTH - _LEFT - 20) * (date.fromisoformat(day) - first).days / span

    def y(amount: Decimal) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * float(max(amount, Decimal(0)) / most)

    drawn = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" font-size="12" fill="#444">']
    for mark in (Decimal(0), most / 2, most):
        level = f"{y(mark):.1f}"
        drawn.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 20}" y1="{level}" y2="{level}" stroke="#ddd"/>')
        drawn.append(f'<text x="{_LEFT - 8}" y="{level}" dy="4" text-anchor="end">{money(mark)}</text>')
    for n, (name, colour, points) in enumerate(lines):
        path = " ".join(f"{x(day):.1f},{y(amount):.1f}" for day, amount in points)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        drawn += [f'<circle cx="{x(day):.1f}" cy="{y(a):.1f}" r="2.5" fill="{colour}"/>' for day, a in points]
        drawn.append(f'<text x="{_LEFT + n * 180}" y="16" fill="{colour}">{escape(name)}</text>')
    drawn.append(f'<text x="{_LEFT}" y="{_HEIGHT - 8}">{days[0]}</text>')
    drawn.append(f'<text x="{_WIDTH - 20}" y="{_HEIGHT - 8}" text-anchor="end">{days[-1]}</text></svg>')
    return "".join(drawn)


def run_command(
    settings: Settings,
    *,
    since: str | None = None,
    as_json: bool = False,
    as_csv: bool = False,
    html_path: Path | None = None,
    clock: Callable[[], float] = time.time,
) -> None:
    """`apprentice report`: to stdout as a table, JSON or CSV; and to a file as a page. Raises `click.UsageError`."""
    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other; give one of them")
    if html_path is not None and not html_path.parent.is_dir():
        raise click.BadParameter(f"the folder {html_path.parent} does not exist", param_hint="--html")
    from apprentice.operate.status import open_existing

    with open_existing(settings, clock=clock) as store:
        report = cost_report(store, settings, since=since, clock=clock)
    if html_path is not None:
        html_path.write_text(as_html(report), encoding="utf-8")
    if as_json:
        sys.stdout.write(as_json_text(report) + "\n")
    elif as_csv:
        sys.stdout.write(as_csv_text(report))
    elif html_path is not None:
        sys.stdout.write(f"{html_path}\n")
    else:
        from rich.console import Console

        Console().print(as_table(report))
