"""What is written to MLflow about live traffic, recomputed from the raw tables."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from mlflow import MlflowClient

from apprentice.store import CapWindow, Settlement
from flows.observe import observe_task
from flows.workshop import Workshop
from tests.flows.conftest import WITH_PREFECT_AND_MLFLOW
from tests.flows.test_coach import _coach

pytestmark = WITH_PREFECT_AND_MLFLOW


def test_what_is_observed_is_in_the_tables_and_in_mlflow(make_home: Callable[..., Any], trainer: Any) -> None:
    """Spent, held and avoided against the ledger; coverage, rate and phase against the task's row; all in MLflow."""
    home = make_home()
    home.teach(60)
    version = _coach(home).version
    shop = Workshop.open(home.settings, engine_in_use=home.engine)
    window = CapWindow("|total|", "", "total", "", Decimal(100))
    shop.store.open_windows([window])
    for state, cost in (("settled", "0.010"), ("settled", "0.014"), ("lost", "0"), ("", "")):
        held = shop.store.reserve(
            task="mood",
            provider="anthropic",
            model="m",
            request_id="r",
            owner="me",
            day="2026-03-01",
            worst_case=Decimal("0.05"),
            windows=[window],
        )
        assert held is not None
        if state:
            shop.store.end_calls([Settlement(held, state, Decimal(cost))])  # type: ignore[arg-type]
    with contextlib.closing(sqlite3.connect(home.settings.root / "apprentice.db")) as db:
        db.execute("INSERT INTO counts VALUES ('mood', '2026-03-01', ?, 'local', 30, 0.0)", [version])
        db.execute("INSERT INTO counts VALUES ('mood', '2026-03-01', ?, 'degraded', 6, 0.0)", [version])
        db.execute("INSERT INTO counts VALUES ('mood', '2026-03-01', '', 'remote', 60, 0.0)")
        db.commit()
        (spent,) = db.execute("SELECT sum(cost) FROM calls WHERE state IN ('settled', 'lost')").fetchone()
        (in_flight,) = db.execute("SELECT sum(worst_case) FROM calls WHERE state = 'reserved'").fetchone()
        (answers,) = db.execute("SELECT sum(n) FROM counts WHERE outcome = 'remote'").fetchone()
        (phase, rate) = db.execute("SELECT phase, sampling_rate FROM tasks").fetchone()
        (compared,) = db.execute("SELECT count(*) FROM comparisons WHERE version = ?", [version]).fetchone()
    seen = observe_task(shop, "mood")
    assert seen["spent"] == spent / 10**9 == pytest.approx(0.074)
    assert seen["held"] == in_flight / 10**9 == pytest.approx(0.05)
    assert seen["avoided"] == pytest.approx(36 * spent / 10**9 / answers)
    assert (seen["phase"], seen["sampling_rate"], seen["comparisons"]) == (phase, rate, compared)
    client = MlflowClient(home.settings.tracking_uri)
    (run,) = client.search_runs([client.get_experiment_by_name("apprentice.mood").experiment_id])
    live = {name.removeprefix("live."): value for name, value in run.data.metrics.items() if name.startswith("live.")}
    assert live == {name: value for name, value in seen.items() if name != "champion" and value is not None}
    shop.close()
