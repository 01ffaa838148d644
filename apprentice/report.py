"""What was spent and what was saved: by task, provider, model and day, where it is going, and how it looks.

`cost_report` reads the store into plain data; the rest writes that data as a table, JSON, CSV or one HTML page with a
picture. Saved is what the remote would have cost for the answers the local model gave: their number times the mean
price of the task's own recorded calls, less what the local machine costs per hour. A task with no recorded call has no
price, and its saving is unknown, not zero.
"""

from __future__ import annotations

import calendar
import csv
import io
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

from apprentice.budget import NEVER, Budget, CapState
from apprentice.config import Settings
from apprentice.errors import InputError, Problem
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
_CENT = Decimal("0.01")


@dataclass(frozen=True, slots=True)
class TaskCost:
    """One task. ``price`` is the mean of its recorded calls, ``saved`` is before the local machine's cost."""

    task: str
    requests: int
    local_answers: int
    calls: int
    spent: Decimal
    price: Decimal | None
    saved: Decimal | None


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
    """One day. ``saved`` is net of ``local_cost``, the local machine's; ``per_thousand`` None without requests."""

    day: str
    requests: int
    local_answers: int
    spent: Decimal
    saved: Decimal
    local_cost: Decimal
    per_thousand: Decimal | None


@dataclass(frozen=True, slots=True)
class CostReport:
    """The whole report. Money in USD; ``uncertain`` is the part of ``spent`` that may not have been billed."""

    since: str
    until: str
    requests: int
    local_answers: int
    spent: Decimal
    uncertain: Decimal
    saved: Decimal
    local_cost: Decimal
    month_projection: Decimal
    tasks: tuple[TaskCost, ...]
    models: tuple[Spend, ...]
    days: tuple[DayCost, ...]
    caps: tuple[CapState, ...]
    calls: tuple[SpendRow, ...]


def parse_since(text: str | None, today: date) -> date | None:
    """``2026-03-01``, or ``30d`` for the last thirty days, today included. Raises `InputError`."""
    if text is None:
        return None
    try:
        if text.endswith("d"):
            return today - timedelta(days=int(text[:-1]) - 1)
        return date.fromisoformat(text)
    except (ValueError, OverflowError):
        problem = Problem("--since", f"is {text!r}, neither a date nor a number of days.", "Write 2026-03-01 or 30d.")
        raise InputError("report", [problem]) from None


def cost_report(
    store: Store, settings: Settings, *, since: str | None = None, clock: Callable[[], float] = time.time
) -> CostReport:
    """Sum up the ledger and the counters from a day on (see `parse_since`; None: from the beginning)."""
    zone = ZoneInfo(settings.budget.timezone)
    now = clock()
    today = datetime.fromtimestamp(now, zone).date()
    start = parse_since(since, today)
    begins = datetime(start.year, start.month, start.day, tzinfo=zone).timestamp() if start else 0.0
    calls = store.spend(since=begins)
    prices = _prices(store.spend() if start else calls)
    counts = store.counts(since=start.isoformat() if start else None)
    tasks = _by_task(calls, counts, prices)
    days = _by_day(calls, counts, prices, settings.local.cost_per_hour, now, zone)
    uncertain = sum((row.cost for row in calls if row.state in ("lost", "reserved")), Decimal(0))
    caps = Budget(store, settings.budget, {t.name: t.budget for t in settings.tasks}, clock=clock).remaining()
    return CostReport(
        since=start.isoformat() if start else (days[0].day if days else today.isoformat()),
        until=today.isoformat(),
        requests=sum(t.requests for t in tasks),
        local_answers=sum(t.local_answers for t in tasks),
        spent=sum((t.spent for t in tasks), Decimal(0)),
        uncertain=uncertain,
        saved=sum((d.saved for d in days), Decimal(0)),
        local_cost=sum((d.local_cost for d in days), Decimal(0)),
        month_projection=_projection(store, today, zone),
        tasks=tasks,
        models=_by_model(calls),
        days=days,
        caps=tuple(caps),
        calls=tuple(calls),
    )


def _prices(calls: Iterable[SpendRow]) -> dict[str, Decimal]:
    """Each task's mean price of a settled call."""
    cost: defaultdict[str, Decimal] = defaultdict(Decimal)
    n: defaultdict[str, int] = defaultdict(int)
    for row in calls:
        if row.is_answered:
            cost[row.task] += row.cost
            n[row.task] += row.calls
    return {task: cost[task] / n[task] for task in n}


def _by_task(calls: Sequence[SpendRow], counts: Sequence[Count], prices: dict[str, Decimal]) -> tuple[TaskCost, ...]:
    found = []
    for task in sorted({row.task for row in calls} | {c.task for c in counts}):
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
                price,
                None if price is None and local else local * (price or Decimal(0)),
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
    prices: dict[str, Decimal],
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
        gross = sum((c.n * prices.get(c.task, Decimal(0)) for c in local), Decimal(0))
        machine = _local_cost(day, cost_per_hour, now, zone) if day in local_days else Decimal(0)
        per_thousand = spent * 1000 / asked if asked else None
        found.append(DayCost(day, asked, sum(c.n for c in local), spent, gross - machine, machine, per_thousand))
    return tuple(found)


def _local_days(counts: Sequence[Count]) -> list[str]:
    """The days on which the local machine was paid for: every one from the first local answer to the last."""
    days = [c.day for c in counts if c.outcome in LOCAL_OUTCOMES]
    if not days:
        return []
    first, last = date.fromisoformat(min(days)), date.fromisoformat(max(days))
    return [(first + timedelta(days=n)).isoformat() for n in range((last - first).days + 1)]


def _local_cost(day: str, cost_per_hour: Decimal, now: float, zone: ZoneInfo) -> Decimal:
    """What the local machine cost on a day: 24 hours of it, or those that have passed."""
    start = date.fromisoformat(day)
    begins = datetime(start.year, start.month, start.day, tzinfo=zone).timestamp()
    hours = min(max(now - begins, 0.0) / 3600, 24.0)
    return cost_per_hour * Decimal(f"{hours:.4f}")


def _projection(store: Store, today: date, zone: ZoneInfo) -> Decimal:
    """This month's spending at its end, where every day left costs as much as a day of the last seven did."""
    first = min(today.replace(day=1), today - timedelta(days=_RECENT_DAYS - 1))
    rows = store.spend(since=datetime(first.year, first.month, first.day, tzinfo=zone).timestamp())
    month = sum((row.cost for row in rows if row.day >= today.replace(day=1).isoformat()), Decimal(0))
    since = (today - timedelta(days=_RECENT_DAYS - 1)).isoformat()
    recent = {row.day for row in rows if row.day >= since}
    if not recent:
        return month
    spanned = (today - date.fromisoformat(min(recent))).days + 1  # a system of three days has three days' mean
    daily = sum((row.cost for row in rows if row.day >= since), Decimal(0)) / spanned
    left = calendar.monthrange(today.year, today.month)[1] - today.day
    return month + daily * left


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

    parts: list[RenderableType] = [Text(_sentence(report)), Text()]
    columns = ["task", "requests", "local", "calls", "spent", "per call", "saved"]
    lines = (
        [
            t.task,
            f"{t.requests:,}",
            f"{t.local_answers:,}",
            f"{t.calls:,}",
            money(t.spent),
            money(t.price),
            money(t.saved),
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
        without += d.spent + d.saved + d.local_cost
        paid.append((d.day, spent))
        would.append((d.day, without))
    rows = "".join(
        f"<tr><td>{escape(t.task)}</td><td>{t.requests:,}</td><td>{t.local_answers:,}</td><td>{t.calls:,}</td>"
        f"<td>{money(t.spent)}</td><td>{money(t.price)}</td><td>{money(t.saved)}</td></tr>"
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
<h2>Cost per 1,000 requests</h2>
{_picture([("cost per 1,000 requests", "#2563eb", per_thousand)])}
<h2>Spent, and what it would have been without Apprentice</h2>
{_picture([("spent", "#2563eb", paid), ("without Apprentice", "#9ca3af", would)])}
<h2>By task</h2>
<table><tr><th>task<th>requests<th>local<th>calls<th>spent<th>per call<th>saved</tr>{rows}</table>
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
    """`apprentice report`: to stdout as a table, JSON or CSV; and to a file as a page. Raises `InputError`."""
    with Store.open(settings.store_url, clock=clock) as store:
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
