"""What is recorded in MLflow, beyond what the coach's tests read there."""

from __future__ import annotations

import time
from typing import Any

import pytest

from flows.tracking import MlflowClient, Tracking

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # MLflow keeps connections beyond a test
    pytest.mark.filterwarnings("ignore::FutureWarning:mlflow.*"),
]


def test_the_machine_is_watched_while_it_trains(home: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processor and memory are recorded; a resumed run goes on after the last step."""
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    tracking = Tracking(home.settings)
    run = tracking.run("mood", "r1", name="mood-r1")

    def steps() -> int:
        return len(tracking._client.get_metric_history(run.id, "system/system_memory_usage_percentage"))

    for _ in range(2):
        before, deadline = steps(), time.monotonic() + 30
        with run.system_metrics():
            while steps() == before:
                assert time.monotonic() < deadline
                time.sleep(0.1)
    history = tracking._client.get_metric_history(run.id, "system/cpu_utilization_percentage")
    assert len({metric.step for metric in history}) == len(history) >= 2


def test_a_tracking_server_that_is_down_leaves_a_gap(make_home: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Training goes on where its machine's metrics cannot be recorded."""
    tracking = Tracking(make_home().settings)
    run = tracking.run("mood", "r1", name="mood-r1")
    run._client = MlflowClient("http://127.0.0.1:9")
    with run.system_metrics():
        reached = True
    assert reached
    assert "Failed to get mlflow run" in caplog.text
