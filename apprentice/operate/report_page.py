"""How a cost report looks: words, a table in a terminal, JSON, CSV, and one HTML page with a picture."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date, datetime
from decimal import Decimal
from html import escape
from typing import TYPE_CHECKING, Any

from apprentice.money.budget import NEVER
from apprentice.operate.report import HALVES, CostReport, money
from apprentice.operate.status import promise_words

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["as_csv_text", "as_html", "as_json_text", "as_table"]

_DAYS_SHOWN = 30  # in a terminal


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


def _sentence(report: CostReport) -> str:
    if not report.requests and not report.calls:
        return _what_to_do(report)
    share = report.local_answers / report.requests if report.requests else 0.0
    saved = f"saved {money(report.saved)}"
    if report.local_cost:
        saved += f" after {money(report.local_cost)} for the local machine"
    sentence = (
        f"{_days(report)}: {report.requests:,} requests, {share:.0%} answered locally; "
        f"spent {money(report.spent)}, {saved}. At this pace the month ends at {money(report.month_projection)}."
    )
    if report.uncertain:
        sentence += f" {money(report.uncertain)} of it may not have been billed (calls whose end is unknown)."
    if report.asked_again:
        sentence += f" {money(report.asked_again)} of it asked the remote again, to learn how steady it is."
    if report.held:
        sentence += f" Calls in flight hold {money(report.held)} more at most."
    return sentence


def _days(report: CostReport) -> str:
    return report.since if report.since == report.until else f"{report.since} to {report.until}"


def _what_to_do(report: CostReport) -> str:
    """The sentence of a report on days without a request or a call."""
    last = report.last_request_day
    if last is not None:
        return (
            f"{_days(report)}: 0 requests; the last one was on {last}. To see those days: "
            f"apprentice report --since {last}"
        )
    return (
        "0 requests: this store holds none yet. Ask one, from Python (Apprentice.from_config, then run) or over HTTP "
        "(apprentice serve), or replay recorded traffic (apprentice replay LOGS --task TASK). If there should be some, "
        "see whether `store` in apprentice.yaml names the right database."
    )


@dataclass(frozen=True, slots=True)
class _Section:
    """One table of the report, for a terminal and a page alike; ``text`` says how many columns hold words."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: int = 1
    note: str = ""


def _sections(report: CostReport) -> Iterable[_Section]:
    """Tasks, halves, models and caps, as far as there is anything to show."""
    tasks = [
        [t.task, f"{t.requests:,}", f"{t.local_answers:,}", f"{t.calls:,}", *map(money, (t.spent, t.price, t.avoided))]
        for t in report.tasks
    ]
    columns: Sequence[str]
    if tasks:
        columns = ("task", "requests", "local", "calls", "spent", "per answer", "avoided")
        yield _Section("By task", columns, tasks)
    if report.halves:
        columns = ("task", "by", "answers", "share", "checks", "agreed", "compared", "agreed")
        note = (
            "By the head alone, the adapter alone, or both together. Checks: of answers that it was trusted with, with "
            "a 95 % interval; compared: whatever the remote answered too, deferred requests included."
        )
        yield _Section("Answered locally", columns, list(_half_rows(report)), text=2, note=note)
    models = [
        [f"{m.provider} {m.model}", f"{m.calls:,}", money(m.spent), f"{m.input_tokens:,}", f"{m.output_tokens:,}"]
        for m in report.models
    ]
    if models:
        yield _Section("By model", ("model", "calls", "spent", "tokens in", "tokens out"), models)
    caps = [
        [
            f"{c.scope or 'all tasks'} {c.period}",
            *map(money, (c.cap, c.spent, c.reserved, c.remaining)),
            "never" if c.resets_at == NEVER else f"{c.resets_at:%Y-%m-%d %H:%M %Z}",
        ]
        for c in report.caps
    ]
    if caps:
        yield _Section("Caps", ("cap", "limit", "spent", "held", "left", "resets"), caps)


def _half_rows(report: CostReport) -> Iterable[list[str]]:
    answers: defaultdict[str, int] = defaultdict(int)
    for one in report.halves:
        answers[one.task] += one.answers
    for one in report.halves:
        share = one.answers / answers[one.task] if answers[one.task] else 0.0
        checked, compared = "-", "-" if one.compared_agreement is None else f"{one.compared_agreement:.1%}"
        if one.agreement is not None and one.low is not None and one.high is not None:
            checked = f"{one.agreement:.1%} ({100 * one.low:.0f}-{100 * one.high:.0f})"
        figures = f"{one.answers:,}", f"{share:.0%}", f"{one.checks:,}", checked, f"{one.compared:,}", compared
        yield [one.task, HALVES[one.half], *figures]


def _words(report: CostReport) -> list[str]:
    """What stands above the tables, a paragraph each."""
    promised = [f"{one.task}: {promise_words(one.promise)}" for one in report.promises]
    if any(one.promise.checks for one in report.promises):
        promised.append("Each check weighs one over the rate at which it was drawn: it stands for those that were not.")
    return [_sentence(report), *promised, *report.ceilings]


def as_table(report: CostReport) -> RenderableType:
    """For the terminal: the words, the tables, and the cost per 1,000 requests day by day."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def table(section: _Section) -> Table:
        made = Table(title=section.title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
        for n, column in enumerate(section.columns):
            made.add_column(column, justify="left" if n < section.text else "right", overflow="fold")
        for row in section.rows:
            made.add_row(*map(Text, row))  # no markup: names of models are other people's words
        return made

    parts: list[RenderableType] = [*map(Text, _words(report))]
    for section in _sections(report):
        parts += [Text(), table(section), *([Text(section.note, style="dim")] if section.note else [])]
    if report.days:
        most = max((d.per_thousand for d in report.days if d.per_thousand is not None), default=Decimal(0))
        shown = [
            [d.day, f"{d.requests:,}", *map(money, (d.spent, d.saved, d.per_thousand)), _bar(d.per_thousand, most)]
            for d in report.days[-_DAYS_SHOWN:]
        ]
        columns = ("day", "requests", "spent", "saved", "per 1,000", "")
        days = table(_Section("By day", columns, shown))
        days.columns[-1].justify = "left"
        parts += [Text(), days]
    return Group(*parts)


def _bar(value: Decimal | None, most: Decimal) -> str:
    return "█" * round(24 * value / most) if value and most else ""


# ---------------------------------------------------------------- as a page


_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --page: #ffffff; --faint: #6b7280; --rule: #d4d4d4; --line: #2563eb }
@media (prefers-color-scheme: dark) {
:root { --ink: #e5e5e5; --page: #17181a; --faint: #9ca3af; --rule: #404246; --line: #7aa5ff }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem }
body { color: var(--ink); background: var(--page) }
table { border-collapse: collapse; margin: .5rem 0 .5rem }
td, th { padding: .2rem .8rem .2rem 0; text-align: right; font-variant-numeric: tabular-nums }
td.w, th.w { text-align: left }
th { border-bottom: 1px solid var(--faint); font-weight: 600 }
h2 { margin-top: 2rem }
.note { color: var(--faint); font-size: .9em; margin-top: 0 }
svg { width: 100%; height: auto; font-size: 12px }
svg text { fill: var(--ink) }
svg .rule { stroke: var(--rule) }
svg polyline { fill: none; stroke-width: 2 }
.paid { stroke: var(--line); fill: var(--line) }
.would { stroke: var(--faint); fill: var(--faint) }
svg text.paid, svg text.would { stroke: none }
svg text.paid { fill: var(--line) }
svg text.would { fill: var(--faint) }
"""


def as_html(report: CostReport) -> str:
    """One self-contained page, light or dark as the reader's system is: the words, two pictures, the tables."""
    per_thousand = [(d.day, d.per_thousand) for d in report.days if d.per_thousand is not None]
    spent, without = Decimal(0), Decimal(0)
    paid: list[tuple[str, Decimal]] = []
    would: list[tuple[str, Decimal]] = []
    for d in report.days:
        spent += d.spent
        without += d.spent + (d.avoided or Decimal(0))
        paid.append((d.day, spent))
        would.append((d.day, without))
    pictures = ""
    if report.days:
        pictures = f"""<h2>Cost per 1,000 requests</h2>
{_picture([("cost per 1,000 requests", "paid", per_thousand)])}
<h2>Spent, and what it would have been without Apprentice</h2>
{_picture([("spent", "paid", paid), ("without Apprentice", "would", would)])}"""
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Apprentice: cost report</title>
<meta name="viewport" content="width=device-width">
<style>{_STYLE}</style>
<h1>Cost report</h1>
{"".join(f"<p>{escape(words)}</p>" for words in _words(report))}
{pictures}
{"".join(map(_html_table, _sections(report)))}
</html>
"""


def _html_table(section: _Section) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        marks = (" class=w" if n < section.text else "" for n in range(len(cells)))
        return "".join(f"<{tag}{mark}>{escape(cell)}</{tag}>" for mark, cell in zip(marks, cells, strict=True))

    head = f"<tr>{row(section.columns, 'th')}</tr>"
    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in section.rows)
    note = f'<p class="note">{escape(section.note)}</p>' if section.note else ""
    return f"<h2>{escape(section.title)}</h2>\n<table>{head}{body}</table>{note}\n"


_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 800, 240, 70, 30, 30
_BAR_HEIGHT, _BAR_LEFT, _BAR_RIGHT = 26, 170, 120

type _Line = tuple[str, str, Sequence[tuple[str, Decimal]]]
"""Its name, its class in `_STYLE`, its amounts by day."""


def _picture(lines: Sequence[_Line]) -> str:
    """Lines over days, as SVG. Days are spaced by the calendar, amounts from zero. One day alone is drawn as bars."""
    days = sorted({day for _, _, points in lines for day, _ in points})
    most = max((amount for _, _, points in lines for _, amount in points), default=Decimal(0)) or Decimal(1)
    if not days:
        return "<p>No request in these days.</p>"
    if len(days) == 1:
        return _bars(days[0], lines, most)
    first = date.fromisoformat(days[0])
    span = (date.fromisoformat(days[-1]) - first).days

    def x(day: str) -> float:
        return _LEFT + (_WIDTH - _LEFT - 20) * (date.fromisoformat(day) - first).days / span

    def y(amount: Decimal) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * float(max(amount, Decimal(0)) / most)

    drawn = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">']
    for mark in (Decimal(0), most / 2, most):
        level = f"{y(mark):.1f}"
        drawn.append(f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - 20}" y1="{level}" y2="{level}"/>')
        drawn.append(f'<text x="{_LEFT - 8}" y="{level}" dy="4" text-anchor="end">{money(mark)}</text>')
    for n, (name, kind, points) in enumerate(lines):
        path = " ".join(f"{x(day):.1f},{y(amount):.1f}" for day, amount in points)
        drawn.append(f'<polyline class="{kind}" style="fill:none" points="{path}"/>')
        drawn += [f'<circle class="{kind}" cx="{x(day):.1f}" cy="{y(a):.1f}" r="2.5"/>' for day, a in points]
        drawn.append(f'<text class="{kind}" x="{_LEFT + n * 180}" y="16">{escape(name)}</text>')
    drawn.append(f'<text x="{_LEFT}" y="{_HEIGHT - 8}">{days[0]}</text>')
    drawn.append(f'<text x="{_WIDTH - 20}" y="{_HEIGHT - 8}" text-anchor="end">{days[-1]}</text></svg>')
    return "".join(drawn)


def _bars(day: str, lines: Sequence[_Line], most: Decimal) -> str:
    """A line through one point shows nothing: each amount as a bar, with its name before it and its size behind it."""
    height = _TOP + _BAR_HEIGHT * len(lines)
    drawn = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img"><text x="0" y="16">on {day}</text>']
    for n, (name, kind, ((_, amount),)) in enumerate(lines):
        top, width = _TOP + n * _BAR_HEIGHT, float(max(amount, Decimal(0)) / most) * (_WIDTH - _BAR_LEFT - _BAR_RIGHT)
        drawn.append(f'<text x="{_BAR_LEFT - 10}" y="{top + 14}" text-anchor="end">{escape(name)}</text>')
        drawn.append(f'<rect class="{kind}" x="{_BAR_LEFT}" y="{top}" width="{width:.1f}" height="{_BAR_HEIGHT - 8}"/>')
        drawn.append(f'<text x="{_BAR_LEFT + width + 8:.1f}" y="{top + 14}">{money(amount)}</text>')
    return "".join(drawn) + "</svg>"
