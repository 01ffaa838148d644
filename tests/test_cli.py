"""The command line: clear words and a non-zero exit for every mistake, and never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
from rich.console import Console

from apprentice.confidence.figures import Promise
from apprentice.confidence.forecast import Widening
from apprentice.operate.status import forecast_words, recent_price, status_page
from apprentice.result import TaskStatus
from apprentice.store import SpendRow, Store
from apprentice.store.records import Usage

ROOT = Path(__file__).parents[1]
TICKETS = ROOT / "examples" / "support_tickets" / "tickets.jsonl"


def apprentice(*arguments: str | Path, cwd: Path, key: str | None = "sk-test") -> subprocess.CompletedProcess[str]:
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), **({"ANTHROPIC_API_KEY": key} if key else {})}
    command = [sys.executable, "-c", "from apprentice.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**environ, "PYTHONPATH": str(ROOT)})


def test_check_approves_the_shipped_configuration(tmp_path: Path) -> None:
    """With a key in the environment, the root apprentice.yaml is fine as it is."""
    done = apprentice("check", "--config", ROOT / "apprentice.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "classify_ticket, extract_entities" in done.stdout


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    """The variable, and the command that sets it."""
    done = apprentice("check", "--config", ROOT / "apprentice.yaml", cwd=tmp_path, key=None)
    assert done.returncode == 1
    assert "export ANTHROPIC_API_KEY" in done.stdout
    assert "1 problem, see above" in done.stderr


def test_an_unknown_key_of_the_configuration_is_named_with_its_line(tmp_path: Path) -> None:
    """A typing mistake costs seconds."""
    config = tmp_path / "apprentice.yaml"
    config.write_text((ROOT / "apprentice.yaml").read_text().replace("min_floor:", "min_flor:"))
    done = apprentice("check", cwd=tmp_path)
    assert done.returncode == 1
    assert "sampling.min_flor" in done.stderr
    assert "Did you mean 'min_floor'?" in done.stderr
    assert "(line " in done.stderr


@pytest.mark.parametrize("command", ["check", "status", "serve"])
def test_a_missing_configuration_is_no_traceback(tmp_path: Path, command: str) -> None:
    """Run in the wrong folder, every command says so."""
    done = apprentice(command, cwd=tmp_path)
    assert done.returncode == 1
    assert "apprentice.yaml" in done.stderr
    assert "Traceback" not in done.stderr


def test_status_needs_neither_key_nor_model(tmp_path: Path) -> None:
    """A fresh store: every task in phase 1, nothing spent."""
    (tmp_path / "apprentice.yaml").write_text((ROOT / "apprentice.yaml").read_text())
    done = apprentice("status", "--json", cwd=tmp_path, key=None)
    assert done.returncode == 0, done.stderr
    status = json.loads(done.stdout)
    assert status["classify_ticket"]["phase"] == 1
    assert status["classify_ticket"]["spent"] == "0"


def test_status_is_whole_on_a_narrow_terminal() -> None:
    """80 columns: no figure and no name is cut off, and what asks for attention has a line of its own."""
    status = TaskStatus(
        task="extract_entities",
        phase=3,
        champion="c121c396deddaa8d",
        examples=12_330,
        comparisons=900,
        correlation=0.834,
        correlation_interval=(0.71, 0.91),
        agreement=0.912,
        accepted_agreement=0.93,
        unverified=41.0,
        coverage=0.62,
        threshold=0.9,
        sampling_rate=0.11,
        coaching=True,
        spent=Decimal("123.4567"),
        held=Decimal("1.25"),
        training_due="drift",
        waits_for_coach=None,
        last_alert="drift (2026-11-23 10:00 UTC)",
        promises=(Promise("all answers that differ", 0.05, 0.031), Promise("served answers that differ", 0.1, None)),
        sampling_floor=0.1,
        max_bad_answers=60.0,
    )
    console = Console(width=80, highlight=False)
    with console.capture() as shown:
        console.print(status_page({status.task: status}))
    lines = [line.split() for line in shown.get().splitlines()]
    assert lines[1:3] == [
        ["extract_entities", "3", "serve", "12,330", "0.83", "91.2%", "62%", "11%", "$123.46"],
        ["c121c396deddaa8d", "coaching", "0.71..0.91"],
    ]
    assert "extract_entities: calls in flight hold $1.25 at most, beside what is spent" in shown.get()
    assert "extract_entities: 41 local answers could not be checked; no figure has them" in shown.get()
    assert "extract_entities: training is due (drift)" in shown.get()
    words = " ".join(shown.get().split())
    assert "extract_entities: all answers that differ: at most 5.0% promised, 3.1% so far" in words
    assert "extract_entities: served answers that differ: at most 10.0% promised, none was checked yet" in words
    assert (
        "at least 10.0% of what is served is checked, at 6.2% of all requests, so that a fall costs at most 60" in words
    )
    assert "extract_entities: last alert drift (2026-11-23 10:00 UTC)" in shown.get()


def test_status_says_what_more_would_take() -> None:
    """Two digits of everything; what was compared is told apart from what was checked for it."""
    status = TaskStatus(
        task="t",
        phase=3,
        champion="v1",
        examples=500,
        comparisons=300,
        correlation=None,
        correlation_interval=None,
        agreement=None,
        accepted_agreement=None,
        unverified=0.0,
        coverage=0.42,
        threshold=0.9,
        sampling_rate=0.2,
        coaching=False,
        spent=Decimal(3),
        held=Decimal(0),
        training_due=None,
        waits_for_coach=None,
        last_alert=None,
        forecast=Widening(0.5, 0.6, 217.0, 143.6, 18.2),
        forecast_cost=Decimal("0.83"),
    )
    assert forecast_words(status) == (
        "42% served; about 140 more comparisons ($0.83), 18 of them checks, in 220 requests, for 18 points more"
    )
    assert forecast_words(replace(status, forecast=None, forecast_cost=None)) == (
        "42% served; what was compared so far supports no forecast of more within as many requests again"
    )
    assert forecast_words(replace(status, coverage=1.0)) is None
    assert forecast_words(replace(status, phase=1)) is None
    shadow = replace(status, phase=2, coverage=0.0, forecast=Widening(0.5, 0.6, 60.0, 60.0, 0.0), forecast_cost=None)
    assert forecast_words(shadow) == ("nothing is served yet; about 60 more comparisons until 60% can be trusted")


def test_the_recent_price_is_that_of_remote_calls_on_the_last_days() -> None:
    def row(day: int, calls: int, cost: str, state: str = "settled", provider: str = "vendor") -> SpendRow:
        return SpendRow("t", f"2026-01-{day:02}", provider, "m", state, calls, Decimal(cost), Usage())

    old = [row(day, 10, "5") for day in (1, 2, 3)]
    recent = [row(day, 10, "0.10") for day in range(4, 11)]
    others = [row(10, 1, "9", provider="vendor training"), row(10, 4, "9", state="lost"), row(11, 7, "0", "released")]
    assert recent_price(old + recent + others) == Decimal("0.01")
    assert recent_price(others) is None


def test_replay_names_an_unknown_task(tmp_path: Path) -> None:
    """The tasks that there are, and a non-zero exit."""
    done = apprentice("replay", TICKETS, "--task", "classify", "--config", ROOT / "apprentice.yaml", cwd=tmp_path)
    assert done.returncode == 1
    assert "there is no task 'classify'" in done.stderr


def test_replay_counts_bad_lines_and_goes_on(tmp_path: Path) -> None:
    """Two good lines are replayed, the bad one is named by number and counted, and the exit status tells."""
    lines = TICKETS.read_text(encoding="utf-8").splitlines()[:2]
    traffic = tmp_path / "traffic.jsonl"
    traffic.write_text("\n".join([lines[0], "{broken", lines[1]]) + "\n", encoding="utf-8")
    out = tmp_path / "out.json"
    done = apprentice(
        "replay",
        traffic,
        "--task",
        "classify_ticket",
        "--config",
        ROOT / "apprentice.yaml",
        "--json",
        out,
        "--home",
        tmp_path / "home",
        cwd=tmp_path,
        key=None,
    )
    assert done.returncode == 1
    assert "line 2" in done.stdout
    assert "1 of 3 lines are left out" in done.stdout
    assert "Error" not in done.stderr, done.stderr  # a failure would exit with 1 as well
    summary = json.loads(out.read_text())
    assert (summary["requests"], summary["remote_calls"], summary["skipped_lines"]) == (2, 2, 1)
    assert summary["agreement"] == 1.0
    assert (tmp_path / "home" / "replay.png").stat().st_size > 10_000


def test_what_a_dead_process_holds_is_listed_and_released(tmp_path: Path) -> None:
    """Owner, age, amount and task are shown; a person gives it back with a reason, once, and that is an event."""
    (tmp_path / "apprentice.yaml").write_bytes((ROOT / "apprentice.yaml").read_bytes())
    code = (
        "from decimal import Decimal as D; from apprentice.money.budget import Budget;"
        "from apprentice.settings.config import *;"
        "from apprentice.store import Store; s = load_settings('apprentice.yaml');"
        "b = Budget(Store.open(s.store_url), s.budget);"
        "print(b.reserve('classify_ticket', 'anthropic', 'claude', D('0.25'), 'r').id, b.owner)"
    )
    command = [sys.executable, "-c", code]
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    died = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environ, check=True)
    number, owner = died.stdout.split()
    shown = json.loads(apprentice("budget", "--json", cwd=tmp_path).stdout)
    (call,) = shown["open_calls"]
    assert (call["id"], call["owner"], call["owner_lives"], call["amount"]) == (int(number), owner, False, "0.25")
    assert {cap["reserved"] for cap in shown["caps"]} == {"0.25"}
    page = apprentice("budget", cwd=tmp_path).stdout
    assert "is gone" in page
    assert "classify_ticket" in page
    assert apprentice("release", number, cwd=tmp_path).returncode != 0  # no reason, no release
    released = apprentice("release", number, "--reason", "the machine is gone", cwd=tmp_path)
    assert released.returncode == 0, released.stderr
    assert "0.25" in released.stdout
    assert "is open" in apprentice("release", number, "--reason", "again", cwd=tmp_path).stderr
    assert "No call holds anything" in apprentice("budget", cwd=tmp_path).stdout
    with Store.open(f"sqlite:///{tmp_path / 'apprentice.db'}") as store:
        (event,) = (e for e in store.events() if e.kind == "reservation_released")
        assert event.evidence["reason"] == "the machine is gone"
