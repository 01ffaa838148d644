"""What was spent and what was saved: by task, provider, model and day, and which half of the student did it.

`cost_report` reads the store into plain data; `report_page` writes that as a table, JSON, CSV or one HTML page. The
words:

- spent: what is billed, and the worst case of calls that may have been billed (``uncertain``);
- held: what calls in flight may cost at most. It is not spent, and in no sum of what is;
- price: what a remote answer to the task cost on a day, repairs and failed attempts included, as the ledger has it (see
  `_Prices`): a vendor that is cheaper today does not make what was avoided last year worth less;
- avoided: what the remote would have cost for the answers that the local model gave, at each day's price;
- saved: avoided, less what the local machine costs per hour.

A task without a remote answer has no price: what its local answers avoided is unknown, not zero, and so are the sums.
"""

from __future__ import annotations

import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from zoneinfo import ZoneInfo

import click

from apprentice.confidence.ceiling import sentence
from apprentice.confidence.correlation import wilson
from apprentice.confidence.figures import Promise
from apprentice.money.budget import Budget, CapState
from apprentice.request.judge import Judge, trust_settings
from apprentice.settings.config import Settings
from apprentice.store import Compared, Count, HalfTotals, SpendRow, Store

__all__ = [
    "CostReport",
    "DayCost",
    "HalfShare",
    "Spend",
    "TaskCost",
    "TaskPromise",
    "cost_report",
    "money",
    "run_command",
]

LOCAL_OUTCOMES = frozenset({"local", "degraded", "budget"})
"""Outcomes of requests that the local model alone answered."""
_REMOTE_OUTCOMES = frozenset({"remote", "shadow", "spot_check", "deferred"})
"""Outcomes of requests that the remote answered."""
HALVES = {"head": "head", "lora": "adapter", "both": "both", "": "unknown"}
"""Which half of the student gave an answer, in words, in the order in which they are shown."""

_ANSWERS_OF_A_PRICE = 30
"""A day's price is that of the last so many remote answers, or of all that day's where these are more."""
_RECENT_DAYS = 7
_DAY_S = 86_400.0
_CENT = Decimal("0.01")


@dataclass(frozen=True, slots=True)
class TaskCost:
    """One task. The local machine serves all tasks, and is in no task's line.

    ``price`` is that of a remote answer: the mean over what was avoided, or the last one where nothing was.
    """

    task: str
    requests: int
    local_answers: int
    calls: int
    spent: Decimal
    held: Decimal
    price: Decimal | None
    avoided: Decimal | None


@dataclass(frozen=True, slots=True)
class HalfShare:
    """What one half of a task's student contributed: "head", "lora" (the adapter), "both", "" where nobody said.

    ``answers`` of it were returned to callers. ``checks`` compare answers that it was trusted with, ``compared`` all of
    its answers that the remote answered too, shadowed and deferred ones included. The agreements are weighted as the
    traffic has such answers; ``low`` and ``high`` are the 95 % interval of that of the checks (Wilson's).
    """

    task: str
    half: str
    answers: int
    checks: int
    agreement: float | None
    low: float | None
    high: float | None
    compared: int
    compared_agreement: float | None


@dataclass(frozen=True, slots=True)
class TaskPromise:
    """What a task's configuration promises of the answers, and how it turned out; as of now, since the promotion."""

    task: str
    promise: Promise


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
    often each task's remote agrees with itself, a sentence for each of which that is known. Like ``held``, ``caps`` and
    ``promises`` it is as of now, whatever the report's first day is. ``last_request_day`` looks at earlier days, too.
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
    halves: tuple[HalfShare, ...] = ()
    promises: tuple[TaskPromise, ...] = ()
    last_request_day: str | None = None


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
    every_call, every_count = store.spend(), store.counts()
    calls = [row for row in every_call if row.day >= first_day]
    counts = [c for c in every_count if c.day >= first_day]
    held = {row.task: row.amount for row in store.held()}
    prices = _Prices(every_call, every_count)
    tasks = _by_task(calls, counts, held, prices, today.isoformat())
    halves = store.halves(since_day=first_day, since=_midnight(start, zone) if start else 0.0)
    judge = Judge(settings, store, clock, random.Random(0))
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
        ceilings=tuple(_ceilings(judge, settings)),
        halves=tuple(_by_half(halves, tasks)),
        promises=tuple(_promises(store, judge, settings)),
        last_request_day=max((c.day for c in every_count if _is_request(c)), default=None),
    )


def _promises(store: Store, judge: Judge, settings: Settings) -> Iterable[TaskPromise]:
    """What is promised of the answers of every task that has a champion."""
    policies = store.policies()
    for task in settings.tasks:
        if task.name in policies and policies[task.name].champion is not None:
            yield from (TaskPromise(task.name, promise) for promise in judge.figures(task.name).promises)


def _ceilings(judge: Judge, settings: Settings) -> Iterable[str]:
    """What every task's remote makes of a second question, where it was asked one."""
    from apprentice.operate.status import ceiling_line

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


class _Prices:
    """What a remote answer to each task cost on each day, whatever calls it took: read from the ledger.

    Once a task is served, few of a day's requests are answered by the remote, and one that was dear should not price
    thousands. So a day with less than `_ANSWERS_OF_A_PRICE` remote answers borrows from the days before it, as long as
    the same models answered there, and where there is none, from the first that follow.
    """

    def __init__(self, calls: Iterable[SpendRow], counts: Iterable[Count]) -> None:
        self._costs: defaultdict[str, defaultdict[str, Decimal]] = defaultdict(lambda: defaultdict(Decimal))
        self._models: defaultdict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
        self._answers: defaultdict[tuple[str, str], int] = defaultdict(int)
        for row in calls:
            if row.is_answering:
                self._costs[row.task][row.day] += row.cost
                if row.state == "settled":
                    self._models[row.task, row.day].add((row.provider, row.model))
        for c in counts:
            if c.outcome in _REMOTE_OUTCOMES:
                self._answers[c.task, c.day] += c.n
        self._known: dict[tuple[str, str], Decimal | None] = {}

    def on(self, task: str, day: str) -> Decimal | None:
        """The price of an answer to the task on a day; None for a task that the remote never answered."""
        if (task, day) not in self._known:
            days = sorted(self._costs[task])
            price = self._mean(task, [one for one in reversed(days) if one <= day])
            self._known[task, day] = price if price is not None else self._mean(task, [d for d in days if d > day])
        return self._known[task, day]

    def avoided(self, c: Count) -> Decimal | None:
        """What answers that were counted as local would have cost."""
        price = self.on(c.task, c.day)
        return None if price is None else price * c.n

    def _mean(self, task: str, days: Iterable[str]) -> Decimal | None:
        cost, answers = Decimal(0), 0
        models: set[tuple[str, str]] = set()
        for day in days:
            if answers and self._models[task, day] and models.isdisjoint(self._models[task, day]):
                break
            cost += self._costs[task][day]
            answers += self._answers[task, day]
            models = models or self._models[task, day]
            if answers >= _ANSWERS_OF_A_PRICE:
                break
        return cost / answers if answers else None


def _by_half(totals: Sequence[HalfTotals], tasks: Sequence[TaskCost]) -> Iterable[HalfShare]:
    """A line for each half that answered or was compared; answers of which nobody said whose they are, last."""
    for task in tasks:
        mine = {one.answered_by: one for one in totals if one.task == task.task}
        unknown = task.local_answers - sum(one.answers for one in mine.values())
        for half in HALVES:
            one = mine.get(half, HalfTotals(task.task, half, 0, Compared(), Compared()))
            answers = one.answers if half else max(0, unknown)
            if not answers and not one.compared.n:
                continue
            a = one.checks.agreement
            low, high = (None, None) if a is None else wilson(a, one.checks.effective)
            compared = one.compared
            yield HalfShare(task.task, half, answers, one.checks.n, a, low, high, compared.n, compared.agreement)


def _by_task(
    calls: Sequence[SpendRow], counts: Sequence[Count], held: Mapping[str, Decimal], prices: _Prices, today: str
) -> tuple[TaskCost, ...]:
    found = []
    for task in sorted({row.task for row in calls} | {c.task for c in counts} | set(held)):
        mine = [row for row in calls if row.task == task]
        asked = sum(c.n for c in counts if c.task == task and _is_request(c))
        answered = [c for c in counts if c.task == task and c.outcome in LOCAL_OUTCOMES]
        local = sum(c.n for c in answered)
        avoided = _sum_known(map(prices.avoided, answered))
        price = avoided / local if avoided is not None and local else prices.on(task, today)
        found.append(
            TaskCost(
                task,
                asked,
                local,
                sum(row.calls for row in mine if row.state != "released"),
                sum((row.cost for row in mine), Decimal(0)),
                held.get(task, Decimal(0)),
                price,
                avoided,
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
    prices: _Prices,
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
        avoided = _sum_known(map(prices.avoided, local))
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


def money(amount: Decimal | None) -> str:
    """For people: cents, and four digits where there are no cents; "?" where unknown."""
    if amount is None:
        return "?"
    digits = 2 if amount == 0 or abs(amount) >= _CENT else 6
    return f"{'-' if amount < 0 else ''}${abs(amount):,.{digits}f}"


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
    from apprentice.operate.report_page import as_csv_text, as_html, as_json_text, as_table
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
