"""The cost report: sums, savings, projection, and each of its shapes."""

from __future__ import annotations

import csv
import io
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from apprentice.budget import Budget
from apprentice.config import Settings
from apprentice.errors import InputError
from apprentice.report import as_csv_text, as_html, as_json_text, cost_report, parse_since, run_command
from apprentice.store import Count, Settlement, Store, Usage


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.at(1)

    def at(self, day: int, hour: int = 12) -> None:
        self.now = datetime(2026, 3, day, hour, tzinfo=UTC).timestamp()

    def __call__(self) -> float:
        return self.now


def settings(folder: Path, cost_per_hour: str = "0") -> Settings:
    task = {
        "description": "d",
        "input_schema": {"text": "str"},
        "output_schema": {"label": "str"},
    }
    return Settings.model_validate(
        {
            "tasks": [{"name": "tickets", **task}, {"name": "homes", **task}],
            "remote": {"provider": "anthropic", "model": "claude-sonnet-4-5", "api_key_env": "K"},
            "local": {"cost_per_hour": cost_per_hour},
            "budget": {"monthly": 100},
            "source": folder / "apprentice.yaml",
        }
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    """Three days: the remote alone, then half local, then nearly all local; and one call whose end is unknown."""
    config = settings(tmp_path)
    with Store.open(config.store_url, clock=clock) as opened:
        budget = Budget(opened, config.budget, clock=clock, announce=lambda *_: None)

        def remote(task: str, n: int, price: str, model: str = "claude-sonnet-4-5") -> None:
            for _ in range(n):
                held = budget.reserve(task, "anthropic", model, Decimal("0.05"), "r")
                budget.end([Settlement(held, "settled", Decimal(price), Usage(100, 10, cached=50))])
            opened.add_counts([Count(task, budget.day(), "", "remote", n)])

        remote("tickets", 10, "0.01")
        remote("homes", 4, "0.02", "claude-haiku-4-5")
        clock.at(2)
        remote("tickets", 5, "0.01")
        opened.add_counts([Count("tickets", "2026-03-02", "v", "local", 5)])
        clock.at(3)
        remote("tickets", 1, "0.01")
        opened.add_counts(
            [Count("tickets", "2026-03-03", "v", "local", 8), Count("tickets", "2026-03-03", "v", "degraded")]
        )
        budget.lost(budget.reserve("tickets", "anthropic", "claude-sonnet-4-5", Decimal("0.05"), "r"))
        budget.release(budget.reserve("tickets", "anthropic", "claude-sonnet-4-5", Decimal("0.05"), "r"))
        yield opened


def test_sums(store: Store, tmp_path: Path, clock: Clock) -> None:
    """Spending by task, model and day adds up to the whole, and what is uncertain is said."""
    report = cost_report(store, settings(tmp_path), clock=clock)
    assert report.spent == Decimal("0.29") == sum(m.spent for m in report.models) == sum(d.spent for d in report.days)
    assert report.uncertain == Decimal("0.05")
    assert {t.task: (t.requests, t.local_answers, t.calls, t.spent) for t in report.tasks} == {
        "tickets": (30, 14, 17, Decimal("0.21")),
        "homes": (4, 0, 4, Decimal("0.08")),
    }
    assert {m.model: (m.input_tokens, m.cached_tokens) for m in report.models} == {
        "claude-sonnet-4-5": (1600, 800),
        "claude-haiku-4-5": (400, 200),
    }
    assert [d.day for d in report.days] == ["2026-03-01", "2026-03-02", "2026-03-03"]
    assert [c.spent for c in report.caps] == [Decimal("0.29")]


def test_savings_come_from_the_tasks_own_prices(store: Store, tmp_path: Path, clock: Clock) -> None:
    """Fourteen local answers at a cent each, less the hours of the local machine since its first answer."""
    free = cost_report(store, settings(tmp_path), clock=clock)
    assert (free.saved, free.local_cost) == (Decimal("0.14"), 0)
    paid = cost_report(store, settings(tmp_path, cost_per_hour="0.001"), clock=clock)
    assert paid.local_cost == Decimal("0.036")  # all of the second day, half of the third
    assert paid.saved == Decimal("0.14") - Decimal("0.036")
    store.add_counts([Count("new", "2026-03-03", "v", "local", 3)])
    unknown = {t.task: t.saved for t in cost_report(store, settings(tmp_path), clock=clock).tasks}
    assert unknown["new"] is None


def test_the_trajectory_falls(store: Store, tmp_path: Path, clock: Clock) -> None:
    """Cost per 1,000 requests, day by day, and where the month ends at the recent pace."""
    report = cost_report(store, settings(tmp_path), clock=clock)
    first, second, third = (d.per_thousand for d in report.days)
    assert (round(first or 0, 3), second, third) == (Decimal("12.857"), Decimal(5), Decimal(6))
    assert report.month_projection == pytest.approx(Decimal("0.29") + Decimal("0.29") / 3 * 28)


def test_since_cuts_the_days_off(store: Store, tmp_path: Path, clock: Clock) -> None:
    """A date or a number of days; prices still come from all that is recorded."""
    report = cost_report(store, settings(tmp_path), since="1d", clock=clock)
    assert (report.since, report.spent, report.saved) == ("2026-03-03", Decimal("0.06"), Decimal("0.09"))
    assert parse_since("2026-03-02", date(2026, 3, 3)) == date(2026, 3, 2)
    for wrong in ("yesterday", "xd", "2026-13-01"):
        with pytest.raises(InputError, match="--since"):
            parse_since(wrong, date(2026, 3, 3))


def test_every_shape(store: Store, tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON and CSV read back to the same sums; the page is well-formed with two pictures; the table names the parts."""
    config = settings(tmp_path)
    report = cost_report(store, config, clock=clock)
    assert json.loads(as_json_text(report))["spent"] == f"{report.spent:f}"
    rows = list(csv.DictReader(io.StringIO(as_csv_text(report))))
    assert sum(Decimal(row["cost_usd"]) for row in rows) == report.spent
    page = as_html(report)
    assert page.count("<polyline") == 3
    for picture in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + picture.split("</svg>")[0] + "</svg>")  # our own text
    run_command(config, clock=clock)
    assert "tickets" in (shown := capsys.readouterr().out)
    assert "per 1,000" in shown
    run_command(config, as_csv=True, html_path=tmp_path / "r.html", clock=clock)
    assert capsys.readouterr().out.startswith("day,task")
    assert (tmp_path / "r.html").read_text() == page
    run_command(config, as_json=True, since="2d", clock=clock)
    assert json.loads(capsys.readouterr().out)["since"] == "2026-03-02"


def test_nothing_yet(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """A fresh store reports zeros, in every shape."""
    config = settings(tmp_path)
    with Store.open(config.store_url, clock=clock) as empty:
        report = cost_report(empty, config, clock=clock)
    assert (report.requests, report.spent, report.saved, report.month_projection) == (0, 0, 0, 0)
    assert "Nothing recorded yet" in as_html(report)
    run_command(config, clock=clock)
    assert "0 requests" in capsys.readouterr().out
