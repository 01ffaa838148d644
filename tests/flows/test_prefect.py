"""The coach as Prefect runs it, and as a process that can be killed at any step."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.coach import coach_task
from flows.tracking import CHAMPION
from flows.workshop import Workshop

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,  # a Prefect server takes longer to start than all other tests of this room
    # Prefect and MLflow keep connections and event loops beyond a test; their clean-up is theirs.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

# A worker that trains with the doubles of conftest.py and stops, for good, where it is told to.
_WORKER = """
    import importlib.util, json, os, signal, sys, time
    spec = importlib.util.spec_from_file_location("doubles", {conftest!r})
    doubles = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(doubles)
    import flows.coach, flows.curate, flows.finetune, flows.promote, flows.validate
    from apprentice.config import load_settings

    trainer = doubles.RoteTrainer()
    flows.finetune.build_trainer = lambda _backend: trainer
    flows.coach.LEASE_S = 4.0
    truth = json.loads(open({truth!r}).read())
    module, name = {stop!r}.split(":") if {stop!r} else ("", "")
    if module:
        owner = sys.modules["flows." + module]
        whole = getattr(owner, name)

        def stopped(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGKILL)

        def after(*args, **kwargs):
            whole(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        def bereft(*args, **kwargs):
            for pid in {bereaves!r}:
                os.killpg(pid, signal.SIGKILL)
            return whole(*args, **kwargs)

        setattr(owner, name, bereft if {bereaves!r} else after if {after!r} else stopped)

    def steps(config, task, run):
        with flows.workshop.workshop("") as shop:
            for step in (flows.curate.curate_run, flows.finetune.finetune_run, flows.validate.validate_run):
                step(shop, flows.runs.run_of(shop, task, run))
            return flows.promote.promote_run(shop, flows.runs.run_of(shop, task, run))[0].promoted

    if not {by_prefect!r}:
        flows.coach.coach = steps
    result = flows.coach.coach_task(
        load_settings({config!r}), "mood", reason="due", engine=doubles.RoteEngine(truth)
    )
    print(result.version if result.promoted else result)
"""


def _work(
    home: Any,
    folder: Path,
    stop: str = "",
    *,
    after: bool = False,
    bereaves: Sequence[int] = (),
    prefect: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Let a worker train in a process of its own.

    It is killed at ``stop`` (``after`` it), or goes on there after the process groups ``bereaves`` were killed.
    ``prefect`` is the API that its flows report to; without one the steps run as plain functions.
    """
    truth = folder / "truth.json"
    truth.write_text(json.dumps(home.truth))
    code = textwrap.dedent(_WORKER).format(
        conftest=str(ROOT / "tests/flows/conftest.py"),
        truth=str(truth),
        stop=stop,
        after=after,
        bereaves=list(bereaves),
        by_prefect=prefect is not None,
        config=str(home.config),
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if prefect is not None:
        # By its own settings Prefect's client asks a server that is gone for minutes.
        environment |= {"PREFECT_API_URL": prefect, "PREFECT_CLIENT_MAX_RETRIES": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def _assert_ended_once(home: Any, done: subprocess.CompletedProcess[str]) -> None:
    """One run, one version, seeded once, on whose championship worker, store and registry agree."""
    assert done.returncode == 0, done.stderr
    (version,) = home.store.versions("mood")
    (run,) = home.store.runs("mood")
    assert (run.state, version.status) == ("completed", "champion")
    assert home.store.policy_row("mood").champion == version.name == done.stdout.split()[-1]
    shop = Workshop.open(home.settings)
    assert shop.tracking.aliased("mood", CHAMPION) == version.name
    registered = shop.tracking._client.search_model_versions("name = 'apprentice.mood'")
    assert [int(found.version) for found in registered] == [1]
    assert len(home.store.comparisons("mood", version=version.name)) == version.held_out
    shop.close()


@pytest.mark.parametrize(
    ("stop", "after"),
    [
        ("curate:curate_examples", False),
        ("curate:curate_examples", True),
        ("finetune:_register", False),
        ("finetune:_register", True),
        ("validate:_figures", False),
        ("promote:decide", False),
        ("promote:make_champion", False),
        ("promote:make_champion", True),
    ],
)
def test_a_worker_killed_at_any_step_is_replaced(home: Any, tmp_path: Path, stop: str, after: bool) -> None:
    """kill -9 before or after each step's work: the next worker ends the run with one version, agreed everywhere."""
    killed = _work(home, tmp_path, stop, after=after)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (run,) = home.store.runs("mood")
    assert run.state == "running"
    time.sleep(4.5)  # the dead worker's lease runs out
    _assert_ended_once(home, _work(home, tmp_path))


@contextlib.contextmanager
def _server(folder: Path, health: str, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A real server in a process group of its own, once it answers at ``health``."""
    environment = {**os.environ, "PREFECT_HOME": str(folder / "prefect"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    with (folder / f"{command[0]}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 180
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(health, timeout=5).status_code == 200:
                    break
            assert process.poll() is None, (folder / f"{command[0]}.log").read_text()[-2000:]
            assert time.monotonic() < deadline, f"{command[0]} does not answer"
            time.sleep(0.5)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def _servers(folder: Path, mlflow_port: int, prefect_port: int) -> Iterator[list[int]]:
    """MLflow's and Prefect's servers, as they were left the last time; their process groups."""
    at = ("--host", "127.0.0.1", "--port")
    mlflow = ("mlflow", "server", *at, str(mlflow_port), "--workers", "1")
    files = (
        "--backend-store-uri",
        f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination",
        str(folder / "files"),
    )
    prefect = ("prefect", "server", "start", *at, str(prefect_port))
    with (
        _server(folder, f"http://127.0.0.1:{mlflow_port}/health", *mlflow, *files) as one,
        _server(folder, f"http://127.0.0.1:{prefect_port}/api/health", *prefect) as other,
    ):
        yield [one.pid, other.pid]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_servers_killed_in_between_cost_nothing(make_home: Callable[..., Any], tmp_path: Path) -> None:
    """kill -9 of MLflow and Prefect between training and validation: the run waits for them, and ends once."""
    mlflow_port, prefect_port = _free_port(), _free_port()
    home = make_home(tracking={"uri": f"http://127.0.0.1:{mlflow_port}"})
    home.teach(60)
    prefect = f"http://127.0.0.1:{prefect_port}/api"
    with _servers(tmp_path, mlflow_port, prefect_port) as groups:
        bereft = _work(home, tmp_path, "validate:_figures", bereaves=groups, prefect=prefect)
    assert bereft.returncode == 1
    assert "the run is kept" in bereft.stderr
    (run,) = home.store.runs("mood")
    assert (run.state, run.step) == ("running", "validate")
    with _servers(tmp_path, mlflow_port, prefect_port):
        _assert_ended_once(home, _work(home, tmp_path, prefect=prefect))


def test_prefect_shows_a_run_and_its_steps(home: Any, trainer: Any, prefect: None) -> None:
    """One flow run with four subflows, a dataset card and a promotion record among the artifacts."""
    from prefect.client.orchestration import get_client

    result = coach_task(home.settings, "mood", reason="due", engine=home.engine)
    assert result.promoted
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs()
        names = {run.name for run in runs} | {client.read_flow(run.flow_id).name for run in runs}
        keys = {artifact.key for artifact in client.read_artifacts()}
    assert {"coach-mood", "coach", "curate", "finetune", "validate", "promote"} <= names
    assert {"dataset-mood", "training-mood", "held-out-mood", "promotion-mood"} <= keys


def test_every_kind_of_work_pool_takes_the_deployments(home: Any, tmp_path: Path) -> None:
    """`prefect deploy --all` on a real server, onto a pool of each kind; a process worker then runs one of them."""
    port = _free_port()
    api = f"http://127.0.0.1:{port}/api"
    environment = {
        **os.environ,
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_URL": api,
        "APPRENTICE_CHECKOUT": str(ROOT),
        "PYTHONPATH": str(ROOT),
    }

    def prefect(*arguments: str) -> None:
        command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    with _server(tmp_path, f"{api}/health", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)):
        for kind in ("docker", "kubernetes", "process"):
            template = () if kind == "process" else ("--base-job-template", f"deploy/{kind}.json")
            prefect("work-pool", "create", "coach", "--type", kind, *template)
            prefect("deploy", "--all")
            deployed = httpx.post(f"{api}/deployments/filter", json={}).raise_for_status().json()
            assert {d["work_pool_name"] for d in deployed} == {"coach"}
            assert {d["name"] for d in deployed} == {"due", "observe", "curate", "finetune", "validate", "promote"}
            if kind != "process":
                prefect("work-pool", "delete", "coach")
        prefect("deployment", "run", "observe/observe", "--param", f"config={home.config}")
        prefect("worker", "start", "--pool", "coach", "--run-once")
        (ran,) = [
            run
            for run in httpx.post(f"{api}/flow_runs/filter", json={}).raise_for_status().json()
            if run["parameters"] == {"config": str(home.config)}
        ]
        assert ran["state_name"] == "Completed", ran["state"]
