"""The ledger and the store when processes are killed: benchmarks.ledger's storm and durability runs, checked."""

from __future__ import annotations

import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(what: str, url: str, *more: str) -> dict[str, Any]:
    """One run in a process of its own: children are forked there, which no test process full of threads should do."""
    command = [sys.executable, "-m", "benchmarks.ledger", what, "--url", url, "--json", *more]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)
    assert out.returncode == 0, out.stderr
    result: dict[str, Any] = json.loads(out.stdout)
    return result


def check_storm(result: dict[str, Any], threads: int) -> None:
    assert result["killed"] == 3
    assert Decimal(result["peak"]) <= Decimal(result["cap"])
    assert result["looks"] > 10
    assert result["answered"] > 0
    # every answered call is in the ledger and the store, once; a process may die after the commit, before it answers
    assert (result["missing"], result["doubled"]) == (0, 0)
    assert result["settled"] == result["examples"] >= result["answered"]
    # what the dead held stays counted, and all the rest of the cap can still be spent
    assert Decimal(result["held_by_the_dead"]) % Decimal("0.02") == 0
    # and that is at most what was in flight at the kill: one call for each thread
    assert Decimal(result["held_by_the_dead"]) <= Decimal("0.02") * result["killed"] * threads
    assert Decimal(result["spent"]) == Decimal("0.01") * result["settled"]
    assert Decimal(result["used"]) == Decimal(result["usable"])


def test_a_storm_of_processes_keeps_the_cap(url: str) -> None:
    """Eight processes, three of them killed in flight, never commit more than the cap."""
    check_storm(run("storm", url, "--calls", "40", "--threads", "8"), 8)


@pytest.mark.slow
def test_the_full_storm_keeps_the_cap(url: str) -> None:
    """8 x 200 calls of $0.01, 200 at once in each process, against $5.00."""
    check_storm(run("storm", url, "--calls", "200", "--threads", "200"), 200)


def test_an_answer_outlives_its_process(url: str) -> None:
    """Killed the moment a caller had its answer, five times: every answer is in the store."""
    result = run("durability", url, "--kills", "5")
    assert result["answered"] >= result["kills"] == 5
    assert result["missing"] == 0


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_answers_outlive_500_processes(url: str) -> None:
    """The same, 500 times."""
    result = run("durability", url, "--kills", "500")
    assert result["answered"] >= 500
    assert result["missing"] == 0
