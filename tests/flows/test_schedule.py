"""A real Prefect server fires schedules with the libraries that are locked."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

_PATIENCE_S = 240


def _answer(url: str) -> httpx.Response | None:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=5)
    return None


def _posted(url: str, body: dict[str, Any], deadline: float) -> Any:
    """As Prefect's own client does: 503 is how the server says that its SQLite is locked, and to ask again."""
    while (answer := httpx.post(url, json=body, timeout=30)).status_code == 503 and time.monotonic() < deadline:
        time.sleep(0.5)
    return answer.raise_for_status().json()


def test_a_schedule_fires(tmp_path: Path) -> None:
    """A deployment with an interval gets a scheduled run: a database library too new for Prefect's scheduler shows."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    api, log = f"http://127.0.0.1:{port}/api", tmp_path / "server.log"
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + _PATIENCE_S
        while (health := _answer(f"{api}/health")) is None or health.status_code != 200:
            assert server.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.3)
        flow = _posted(f"{api}/flows/", {"name": "mood"}, deadline)
        schedule = {"schedule": {"interval": 300}, "active": True}
        deployment = {"name": "due", "flow_id": flow["id"], "entrypoint": "mood.py:mood", "schedules": [schedule]}
        _posted(f"{api}/deployments/", deployment, deadline)
        while not (runs := _posted(f"{api}/flow_runs/filter", {}, deadline)):
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.3)
        assert {run["state_type"] for run in runs} == {"SCHEDULED"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
