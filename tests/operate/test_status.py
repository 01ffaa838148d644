"""Every figure of the status page, recomputed from the raw tables."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from apprentice.testing import Fault
from tests.conftest import LABELS, Workbench


def rows(at: Workbench, statement: str) -> list[Any]:
    """What the store's file says, read without the store."""
    with contextlib.closing(sqlite3.connect(at.client.settings.root / "apprentice.db")) as db:
        return db.execute(statement).fetchall()


def test_money_and_counts_are_those_of_the_tables(bench: Callable[..., Workbench]) -> None:
    """Collect, shadow, a lost call and a failed one: spent, held, examples and comparisons as the rows have them."""
    at = bench(faults=[None, Fault("reset"), None, *[Fault("server_error")] * 2])
    for i in range(30):
        with contextlib.suppress(Exception):
            at.run(f"{LABELS[i % 3]} {i}")
    at.promote(held_out=40, right=0.5)
    for i in range(30):
        at.run(f"{LABELS[i % 3]} {i}")
    status = at.client.status()["mood"]
    ended = rows(at, "SELECT state, cost FROM calls WHERE task = 'mood' AND state <> 'reserved'")
    assert {state for state, _ in ended} == {"settled", "lost", "released"}
    assert status.spent == sum((Decimal(cost) for _, cost in ended), Decimal(0)) / 10**9
    assert (
        status.held == Decimal(rows(at, "SELECT total(worst_case) FROM calls WHERE state = 'reserved'")[0][0]) / 10**9
    )
    assert [(status.examples,)] == rows(at, "SELECT count(*) FROM examples WHERE task = 'mood'")
    assert [(status.comparisons,)] == rows(at, "SELECT count(*) FROM comparisons WHERE version = 'mood-v1'")
    scores = [score for (score,) in rows(at, "SELECT score FROM comparisons WHERE version = 'mood-v1' ORDER BY seq")]
    assert status.agreement == sum(scores) / len(scores)


def test_status_costs_the_same_at_a_million_calls(bench: Callable[..., Workbench]) -> None:
    """No statement of it reads the calls or the examples: SQLite's plans name the totals alone."""
    at = bench()
    for i in range(5):
        at.run(f"joy {i}")
    seen: list[str] = []
    database = at.store._database
    real = database.read

    @contextlib.contextmanager
    def watched() -> Any:
        with real() as tx:
            tx._connection.set_trace_callback(seen.append)
            try:
                yield tx
            finally:
                tx._connection.set_trace_callback(None)

    database.read = watched
    at.client.status()
    database.read = real
    assert any("call_totals" in statement for statement in seen)
    for statement in seen:
        assert " examples" not in statement, statement
        if "FROM calls" in statement:
            plan = " ".join(row[3] for row in rows(at, f"EXPLAIN QUERY PLAN {statement}"))
            assert "calls_open" in plan, plan
