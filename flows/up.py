"""Everything on one machine: Prefect's and MLflow's servers, coach and router, started and stopped together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import click
import httpx

from apprentice import secrets
from apprentice.errors import TrainingError
from apprentice.settings.config import Settings
from flows.process_group import stop_group

__all__ = ["Member", "members", "run_together"]

_READY_S = 180.0


@dataclass(frozen=True, slots=True)
class Member:
    """One process: what it is, how it is started, and the address that answers once it is ready (None: at once)."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str]
    ready: str | None
    page: str | None = None


def members(settings: Settings, config: Path, *, port: int, prefect_port: int, mlflow_port: int) -> list[Member]:
    """The four processes, in the order in which they are started."""
    python, here = sys.executable, "127.0.0.1"
    prefect_url, mlflow_url = f"http://{here}:{prefect_port}", f"http://{here}:{mlflow_port}"
    home = {"PREFECT_HOME": str(settings.root / ".prefect"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    flows = {**home, "PREFECT_API_URL": f"{prefect_url}/api", "PREFECT_LOGGING_EXTRA_LOGGERS": "apprentice"}
    mlflow = ("mlflow", "server", "--host", here, "--port", str(mlflow_port), "--workers", "1")
    # Not on the command line, which every user of the machine can read: the URI may hold a password.
    kept_in = {
        "MLFLOW_BACKEND_STORE_URI": settings.tracking_uri,
        "MLFLOW_ARTIFACTS_DESTINATION": settings.tracking_artifacts,
    }
    apprentice = (python, "-c", "from apprentice.cli import main; main()")
    found = [
        Member(
            "prefect",
            (python, "-m", "prefect", "server", "start", "--host", here, "--port", str(prefect_port)),
            {**home, "PREFECT_API_URL": f"{prefect_url}/api", "PREFECT_UI_URL": prefect_url},
            f"{prefect_url}/api/health",
            prefect_url,
        ),
        Member("coach", (*apprentice, "coach", "--config", str(config)), flows, None),
        Member(
            "router",
            (*apprentice, "serve", "--config", str(config), "--host", here, "--port", str(port)),
            {},
            f"http://{here}:{port}/healthz",
            f"http://{here}:{port}",
        ),
    ]
    if settings.tracking.uri is None or not settings.tracking.uri.startswith("http"):
        found.insert(1, Member("mlflow", (python, "-m", *mlflow), kept_in, f"{mlflow_url}/health", mlflow_url))
    return found


def run_together(settings: Settings, config: Path, *, port: int, prefect_port: int, mlflow_port: int) -> None:
    """Run until Ctrl-C or until one of them ends; then stop them all, the router first. Raises `TrainingError`."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    logs = settings.root / ".logs"
    logs.mkdir(exist_ok=True)
    running: list[tuple[Member, subprocess.Popen[bytes]]] = []
    try:
        for member in members(settings, config, port=port, prefect_port=prefect_port, mlflow_port=mlflow_port):
            log = (logs / f"{member.name}.log").open("ab")
            process = subprocess.Popen(
                member.command,
                env={**_inherited(member), **member.environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=settings.root,
                start_new_session=True,  # Ctrl-C is ours to pass on, in order
            )
            log.close()
            running.append((member, process))
            if member.ready is not None and not _ready(member, process, stop):
                if stop.is_set():
                    return
                raise _failed(member, process, logs)
            click.echo(f"{member.name:<8} {member.page or 'is watching'}")
        while not stop.wait(0.5):
            for member, process in running:
                if process.poll() is not None:
                    raise _failed(member, process, logs)
    finally:
        for member, process in reversed(running):
            stop_group(process)
            click.echo(f"{member.name:<8} stopped")


def _inherited(member: Member) -> dict[str, str]:
    """The environment, without our own keys for the servers of others; what is theirs by name they keep."""
    if member.name not in ("prefect", "mlflow"):
        return dict(os.environ)
    theirs = [name for name in os.environ if name.startswith(("PREFECT_", "MLFLOW_", "AWS_", "AZURE_", "GOOGLE_APP"))]
    return secrets.child_environment(os.environ, keep=theirs)


def _ready(member: Member, process: subprocess.Popen[bytes], stop: threading.Event) -> bool:
    """Wait until a member answers; False where it ended or a person lost patience."""
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline and not stop.wait(0.5):
        if process.poll() is not None:
            return False
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(str(member.ready), timeout=2.0).status_code < 500:
                return True
    return False


def _failed(member: Member, process: subprocess.Popen[bytes], logs: Path) -> TrainingError:
    how = f"did not answer within {_READY_S:.0f} s" if process.poll() is None else "ended by itself"
    return TrainingError(f"{member.name} {how}; read {logs / member.name}.log. Everything was stopped.")
