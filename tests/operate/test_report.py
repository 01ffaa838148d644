"""The cost report: sums, savings, projection, and each of its shapes."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import random
import sqlite3
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from apprentice.money.budget import Budget, windows_at
from apprentice.operate.report import cost_report, parse_since, run_command
from apprentice.operate.report_page import as_csv_text, as_html, as_json_text
from apprentice.settings.config import BudgetSettings, Settings
from apprentice.store import Count, ExampleRecord, Settlement, Store, Usage


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


def spend(store: Store, clock: Clock, task: str, price: str | None, *, model: str = "claude-sonnet-4-5") -> None:
    """One call of 100 and 10 tokens: answered at ``price``, or (None) ended nobody knows how, at 5 cents at worst."""
    today = datetime.fromtimestamp(clock(), UTC).date()
    windows = windows_at(today, "", settings(Path()).budget)
    store.open_windows(windows)
    held = store.reserve(
        task=task,
        provider="anthropic",
        model=model,
        request_id="r",
        owner="me",
        day=today.isoformat(),
        worst_case=Decimal("0.05"),
        windows=windows,
    )
    assert held is not None
    if price is None:
        store.end_calls([Settlement(held, "lost", Decimal(0))])
        return
    settled = Settlement(held, "settled", Decimal(price), Usage(100, 10, cached=50))
    example = ExampleRecord(f"{held.id}", task, {"text": "t"}, {"label": "l"}, "anthropic", model, clock())
    store.complete_remote(settlements=[settled], example=example)
    store.add_counts([Count(task, today.isoformat(), "", "remote")])


def answer_locally(store: Store, clock: Clock, task: str, n: int, outcome: str = "local") -> None:
    store.add_counts([Count(task, datetime.fromtimestamp(clock(), UTC).date().isoformat(), "v", outcome, n)])


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    """Three days: the remote alone, then half local, then nearly all local, and one call whose end is unknown."""
    with Store.open(settings(tmp_path).store_url, clock=clock) as opened:
        for _ in range(10):
            spend(opened, clock, "tickets", "0.01")
        for _ in range(4):
            spend(opened, clock, "homes", "0.02", model="claude-haiku-4-5")
        clock.at(2)
        for _ in range(5):
            spend(opened, clock, "tickets", "0.01")
        answer_locally(opened, clock, "tickets", 5)
        clock.at(3)
        spend(opened, clock, "tickets", "0.01")
        answer_locally(opened, clock, "tickets", 8)
        answer_locally(opened, clock, "tickets", 1, "degraded")
        spend(opened, clock, "tickets", None)
        yield opened


def test_sums(store: Store, tmp_path: Path, clock: Clock) -> None:
    """Spending by task, model and day adds up to the whole, and what is uncertain is said."""
    report = cost_report(store, settings(tmp_path), clock=clock)
    assert report.spent == Decimal("0.29") == sum(m.spent for m in report.models) == sum(d.spent for d in report.days)
    assert (report.uncertain, report.held) == (Decimal("0.05"), 0)
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


def test_what_is_held_is_not_spent(store: Store, tmp_path: Path, clock: Clock) -> None:
    """A call in flight is in its own figure, in the cap's and in the sentence, and in no sum of what was spent."""
    before = cost_report(store, settings(tmp_path), clock=clock)
    windows = windows_at(date(2026, 3, 3), "", settings(tmp_path).budget)
    called = {"provider": "anthropic", "model": "m", "request_id": "r", "owner": "me", "day": "2026-03-03"}
    store.reserve(task="homes", worst_case=Decimal("0.70"), windows=windows, **called)
    after = cost_report(store, settings(tmp_path), clock=clock)
    assert (after.held, {t.task: t.held for t in after.tasks}) == (
        Decimal("0.70"),
        {"homes": Decimal("0.70"), "tickets": 0},
    )
    assert [(c.spent, c.reserved) for c in after.caps] == [(Decimal("0.29"), Decimal("0.70"))]
    same = ("spent", "uncertain", "avoided", "saved", "month_projection", "days", "models", "calls")
    assert all(getattr(after, name) == getattr(before, name) for name in same)
    assert "Calls in flight hold $0.70 more at most." in as_html(after)


def test_savings_come_from_the_tasks_own_prices(store: Store, tmp_path: Path, clock: Clock) -> None:
    """Until the second day a ticket cost a cent; until the third 21 cents over 16 answers, the lost call included."""
    free = cost_report(store, settings(tmp_path), clock=clock)
    avoided = 5 * Decimal("0.01") + 9 * Decimal("0.21") / 16
    assert (free.avoided, free.saved, free.local_cost) == (avoided, avoided, 0)
    assert {t.task: t.price for t in free.tasks} == {"homes": Decimal("0.02"), "tickets": avoided / 14}
    assert sum(d.avoided or 0 for d in free.days) == free.avoided
    paid = cost_report(store, settings(tmp_path, cost_per_hour="0.001"), clock=clock)
    assert paid.local_cost == Decimal("0.036")  # all of the second day, half of the third
    assert paid.saved == avoided - Decimal("0.036") == sum(d.saved or 0 for d in paid.days)


def recomputed_avoided(root: Path, task: str) -> Fraction:
    """What local answers would have cost, from the raw calls, comparisons of days by hand: at each day's own mean."""
    with contextlib.closing(sqlite3.connect(root / "apprentice.db")) as db:
        cost = dict(
            db.execute(
                "SELECT day, sum(cost) FROM calls WHERE task = ? AND state <> 'reserved' GROUP BY day", (task,)
            ).fetchall()
        )
        of = "SELECT day, sum(n) FROM counts WHERE task = ? AND outcome {} ('local', 'degraded', 'budget') GROUP BY day"
        answers = dict(db.execute(of.format("NOT IN"), (task,)).fetchall())
        local = dict(db.execute(of.format("IN"), (task,)).fetchall())
    return sum((Fraction(cost[day], answers[day]) * n for day, n in local.items()), Fraction(0)) / 10**9


def test_what_was_avoided_keeps_the_price_of_its_day(tmp_path: Path, clock: Clock) -> None:
    """The vendor halves its price: what was avoided before is worth what it was, to the nano-dollar."""
    config = settings(tmp_path)
    with Store.open(config.store_url, clock=clock) as store:
        for day, price in ((1, "0.010"), (2, "0.005"), (3, "0.020")):
            clock.at(day)
            for _ in range(40):
                spend(store, clock, "tickets", price)
            answer_locally(store, clock, "tickets", 10 * day)
            report = cost_report(store, config, clock=clock)
            assert report.avoided == Decimal({1: "0.100", 2: "0.200", 3: "0.800"}[day]), (
                "days that are over do not change"
            )
        assert [d.avoided for d in report.days] == [Decimal("0.1"), Decimal("0.1"), Decimal("0.6")]
        assert Fraction(report.avoided) == recomputed_avoided(tmp_path, "tickets")
        (task,) = report.tasks
        assert task.price == Decimal("0.8") / 60, "times the local answers it is what was avoided"
        assert cost_report(store, config, since="1d", clock=clock).tasks[0].price == Decimal("0.02")


def test_a_day_of_few_remote_answers_borrows_from_those_before_it(tmp_path: Path, clock: Clock) -> None:
    """One dear answer does not price a day of thousands; another model's answers are not borrowed."""
    config = settings(tmp_path)
    with Store.open(config.store_url, clock=clock) as store:
        for _ in range(40):
            spend(store, clock, "tickets", "0.01")
        clock.at(2)
        spend(store, clock, "tickets", "0.42")
        answer_locally(store, clock, "tickets", 1000)
        clock.at(3)
        answer_locally(store, clock, "tickets", 1000)
        clock.at(4)
        spend(store, clock, "tickets", "0.002", model="claude-haiku-4-5")
        answer_locally(store, clock, "tickets", 1000)
        report = cost_report(store, config, clock=clock)
        mixed = (40 * Decimal("0.01") + Decimal("0.42")) / 41
        assert [d.avoided for d in report.days[1:]] == [1000 * mixed, 1000 * mixed, Decimal(2)]


def test_a_day_before_the_first_remote_answer_has_the_next_price(tmp_path: Path, clock: Clock) -> None:
    """Only there: a version was brought along, and the remote was asked later."""
    config = settings(tmp_path)
    with Store.open(config.store_url, clock=clock) as store:
        answer_locally(store, clock, "tickets", 10)
        clock.at(2)
        spend(store, clock, "tickets", "0.03")
        assert cost_report(store, config, clock=clock).avoided == Decimal("0.3")


def test_without_a_price_nothing_is_made_up(store: Store, tmp_path: Path, clock: Clock) -> None:
    """A task that the remote never answered has an unknown saving, and so has the whole; the others keep theirs."""
    answer_locally(store, clock, "new", 3)
    report = cost_report(store, settings(tmp_path), clock=clock)
    assert {t.task: t.avoided is None for t in report.tasks} == {"homes": False, "new": True, "tickets": False}
    assert (report.avoided, report.saved, report.days[-1].saved) == (None, None, None)
    assert "saved ?" in as_html(report)


def test_the_trajectory_falls(store: Store, tmp_path: Path, clock: Clock) -> None:
    """Cost per 1,000 requests, day by day, and where the month ends at the recent pace: 29 cents in 2.5 days."""
    report = cost_report(store, settings(tmp_path), clock=clock)
    first, second, third = (d.per_thousand for d in report.days)
    assert (round(first or 0, 3), second, third) == (Decimal("12.857"), Decimal(5), Decimal(6))
    spent = Decimal("0.29")
    assert report.month_projection == pytest.approx(spent + spent / Decimal("2.5") * Decimal("28.5"))


def test_the_projection_does_not_jump_at_midnight(tmp_path: Path, clock: Clock) -> None:
    """Ten dollars on the first day: at 23:55, at 0:05 and at noon of the next day the month looks alike."""
    config = settings(tmp_path)
    with Store.open(config.store_url, clock=clock) as store:
        for _ in range(100):
            spend(store, clock, "tickets", "0.10")
        seen = []
        for day, hour, minute in ((1, 12, 0), (1, 23, 55), (2, 0, 5), (2, 1, 0)):
            clock.now = datetime(2026, 3, day, hour, minute, tzinfo=UTC).timestamp()
            seen.append(cost_report(store, config, clock=clock).month_projection)
    assert all(abs(b / a - 1) < Decimal("0.05") for a, b in itertools.pairwise(seen))
    assert Decimal(290) < seen[-1] < Decimal(320)


def test_since_cuts_the_days_off(store: Store, tmp_path: Path, clock: Clock) -> None:
    """A date or a number of days, none of them in the future; prices still come from all that is recorded."""
    report = cost_report(store, settings(tmp_path), since="1d", clock=clock)
    price = Decimal("0.21") / 16
    assert (report.since, report.spent, report.saved) == ("2026-03-03", Decimal("0.06"), 9 * price)
    assert parse_since("2026-03-02", date(2026, 3, 3)) == date(2026, 3, 2)
    for wrong in ("yesterday", "xd", "2026-13-01", "2026-03-04", "-3d"):
        with pytest.raises(click.BadParameter):
            parse_since(wrong, date(2026, 3, 3))


@settings_of_hypothesis(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6))
def test_spent_and_avoided_are_what_everything_would_have_cost(seed: int, tmp_path_factory: Any, clock: Clock) -> None:
    """Random traffic whose prices are known: the sum is right within 1 %, and shares of money are those of answers."""
    draw = random.Random(seed)
    config = settings(tmp_path_factory.mktemp("report"))
    everything, n_remote, n_local = Decimal(0), 0, 0
    with Store.open(config.store_url, clock=clock) as store:
        for _ in range(400):
            price = Decimal(draw.randint(9_900, 10_100)) / 1_000_000
            everything += price
            if draw.random() < 0.6:
                answer_locally(store, clock, "tickets", 1)
                n_local += 1
            else:
                spend(store, clock, "tickets", f"{price}")
                n_remote += 1
        report = cost_report(store, config, clock=clock)
    assert report.avoided is not None
    assert float(report.spent + report.avoided) == pytest.approx(float(everything), rel=0.01)
    assert float(report.avoided / (report.spent + report.avoided)) == pytest.approx(n_local / 400, abs=0.01)
    assert (report.requests, report.local_answers) == (400, n_local)


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
    for wrong in ({"as_json": True, "as_csv": True}, {"html_path": tmp_path / "missing" / "r.html"}):
        with pytest.raises(click.UsageError):
            run_command(config, clock=clock, **wrong)
    run_command(config, as_json=True, since="2d", clock=clock)
    assert json.loads(capsys.readouterr().out)["since"] == "2026-03-02"


def test_nothing_yet(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """A fresh store reports zeros, in every shape."""
    config = settings(tmp_path)
    with Store.open(config.store_url, clock=clock) as empty:
        report = cost_report(empty, config, clock=clock)
    assert (report.requests, report.spent, report.saved, report.month_projection) == (0, 0, 0, 0)
    assert "apprentice serve" in as_html(report)
    assert "<svg" not in as_html(report)
    run_command(config, clock=clock)
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("0 requests: this store holds none yet. Ask one, from Python")
    assert "By day" not in shown
    assert "Caps" in shown, "what is allowed is known before anything is spent"


def test_days_without_a_request_say_where_to_look(
    store: Store, tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """A month in which nothing was asked: when it last was, and the command that shows it."""
    clock.at(31)
    config = settings(tmp_path)
    run_command(config, since="2026-03-20", clock=clock)
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith(
        "2026-03-20 to 2026-03-31: 0 requests; the last one was on 2026-03-03. To see those days: apprentice report "
        "--since 2026-03-03 "
    )
    run_command(config, since="2026-03-03", clock=clock)
    assert "10 requests" in capsys.readouterr().out


def test_a_single_day_is_drawn_as_bars(store: Store, tmp_path: Path, clock: Clock) -> None:
    """A line through one point shows nothing: each amount has a bar with its name and its size."""
    report = cost_report(store, settings(tmp_path), since="1d", clock=clock)
    page = as_html(report)
    assert "<polyline" not in page
    first, second = (
        ElementTree.fromstring("<svg" + part.split("</svg>")[0] + "</svg>") for part in page.split("<svg")[1:]
    )
    assert [text.text for text in first.iter("text")] == ["on 2026-03-03", "cost per 1,000 requests", "$6.00"]
    said = [text.text for text in second.iter("text")]
    without = report.spent + (report.avoided or 0)
    assert said == ["on 2026-03-03", "spent", "$0.06", "without Apprentice", f"${without:.2f}"]
    spent_px, without_px = (float(bar.get("width") or 0) for bar in second.iter("rect"))
    assert spent_px / without_px == pytest.approx(float(report.spent / without), abs=0.002)


def test_what_a_hosted_local_model_costs_is_no_saving(tmp_path: Path, clock: Clock) -> None:
    """Its answers save the remote's price less its own; spent and saved together are what everything would cost."""
    with Store.open(settings(tmp_path).store_url, clock=clock) as store:
        for _ in range(10):
            spend(store, clock, "tickets", "0.01")
        answer_locally(store, clock, "tickets", 20)
        budget = Budget(store, settings(tmp_path).budget, clock=clock)
        for n in range(20):
            held = budget.reserve("tickets", "openai hosted", "ft:m", Decimal("0.02"), f"h{n}")
            budget.settle(held, Decimal("0.002"), Usage(50, 5))
        report = cost_report(store, settings(tmp_path), clock=clock)
    assert report.spent == Decimal("0.14")
    assert (report.avoided, report.local_cost, report.saved) == (Decimal("0.20"), Decimal("0.04"), Decimal("0.16"))
    assert report.saved is not None
    assert report.spent + report.saved == 30 * Decimal("0.01")


def test_a_report_puts_no_caps_in_force(store: Store, tmp_path: Path, clock: Clock) -> None:
    """Reading with another configuration at hand must not bind the processes that run."""
    Budget(store, BudgetSettings(daily=Decimal(7)), clock=clock)
    clock.at(4)
    cost_report(store, settings(tmp_path), clock=clock)
    assert store.caps()["|daily"] == 7
