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

from apprentice.errors import TrainingError
from apprentice.lifecycle.due import due_reason
from flows.coach import coach_task
from flows.lease import Busy, held_lease
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
    import flows.assemble, flows.coach, flows.curate, flows.finetune, flows.promote, flows.validate
    from apprentice.settings.config import load_settings

    trainer = doubles.RoteTrainer()
    flows.finetune.build_trainer = lambda _backend: trainer
    flows.lease.LEASE_S = 4.0
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
            steps = (flows.curate.curate_run, flows.finetune.finetune_run, flows.assemble.assemble_run)
            for step in (*steps, flows.validate.validate_run):
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
        ("assemble:_register", False),
        ("assemble:_register", True),
        ("validate:figures_of", False),
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
        bereft = _work(home, tmp_path, "validate:figures_of", bereaves=groups, prefect=prefect)
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
        "PYTHONPATH": str(ROOT),
    }

    def prefect(*arguments: str) -> None:
        command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        # Where the checkout lies is known to the worker alone: whoever deploys may be elsewhere.
        place = {"APPRENTICE_CHECKOUT": str(ROOT)} if arguments[0] == "worker" else {}
        done = subprocess.run(command, cwd=ROOT, env=environment | place, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    with _server(tmp_path, f"{api}/health", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)):
        for kind in ("docker", "kubernetes", "process"):
            template = () if kind == "process" else ("--base-job-template", f"deploy/{kind}.json")
            prefect("work-pool", "create", "coach", "--type", kind, *template)
            prefect("deploy", "--all")
            deployed = httpx.post(f"{api}/deployments/filter", json={}).raise_for_status().json()
            assert {d["work_pool_name"] for d in deployed} == {"coach"}
            assert {d["name"] for d in deployed} == {
                "due",
                "coach",
                "observe",
                "curate",
                "finetune",
                "validate",
                "promote",
            }
            assert str(ROOT) not in json.dumps([d["pull_steps"] for d in deployed])
            if kind != "process":
                prefect("work-pool", "delete", "coach")
        prefect("work-queue", "set-concurrency-limit", "gpu", "1", "--pool", "coach")
        deadline = time.monotonic() + 120
        scheduled: set[str] = set()
        while scheduled != {"due", "observe"}:
            assert time.monotonic() < deadline, scheduled
            time.sleep(0.5)
            runs = httpx.post(f"{api}/flow_runs/filter", json={}).raise_for_status().json()
            ids = {run["deployment_id"] for run in runs if run["state_type"] == "SCHEDULED"}
            scheduled = {d["name"] for d in deployed if d["id"] in ids}
        prefect("deployment", "run", "observe/observe", "--param", f"config={home.config}")
        prefect("worker", "start", "--pool", "coach", "--run-once")
        (ran,) = [
            run
            for run in httpx.post(f"{api}/flow_runs/filter", json={}).raise_for_status().json()
            if run["parameters"] == {"config": str(home.config)}
        ]
        assert ran["state_name"] == "Completed", ran["state"]


def _flow_runs(name: str) -> list[Any]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter

    with get_client(sync_client=True) as client:
        return client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate({"name": {"any_": [name]}}))


def _cancel(name: str) -> None:
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelling

    with get_client(sync_client=True) as client:
        for run in _flow_runs(name):
            if run.state.is_running():
                client.set_flow_run_state(run.id, Cancelling(), force=True)


def _tracked(home: Any) -> Any:
    shop = Workshop.open(home.settings)
    experiment = shop.tracking._client.get_experiment_by_name("apprentice.mood").experiment_id
    runs = shop.tracking._client.search_runs([experiment])
    shop.close()
    return runs[0]


def test_cancelling_in_prefect_closes_the_run(
    home: Any, trainer: Any, prefect: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a worker to send signals: the coach sees it by itself, and all three records say cancelled."""
    monkeypatch.setattr("flows.cancellation._ASK_EVERY_S", 0.0)
    before = {run.id for run in _flow_runs("coach-mood")}

    def cancel(step: str, done: float) -> None:
        if step == "finetune":
            _cancel("coach-mood")

    result = coach_task(home.settings, "mood", reason="due", engine=home.engine, progress=cancel)
    assert result.state == "cancelled"
    (run,) = home.store.runs("mood")
    assert (run.state, run.error) == ("cancelled", "cancelled in Prefect")
    (shown,) = [run for run in _flow_runs("coach-mood") if run.id not in before]
    assert shown.state.is_cancelled()
    assert _tracked(home).info.status == "KILLED"
    assert due_reason(home.settings, home.store, "mood", time.time()) is None


@pytest.mark.parametrize("by_a_person", [True, False])
def test_a_signal_cancels_a_run_only_where_a_person_did(
    home: Any, trainer: Any, prefect: None, by_a_person: bool
) -> None:
    """A worker's SIGTERM: a person's cancellation closes the run, a machine that goes away leaves it to be resumed."""
    from prefect import flow
    from prefect.exceptions import TerminationSignal

    @flow(flow_run_name="trained-by-a-worker")
    def trained() -> None:
        coach_task(home.settings, "mood", reason="due", engine=home.engine, progress=stop)

    def stop(step: str, done: float) -> None:
        if step == "finetune":
            if by_a_person:
                _cancel("trained-by-a-worker")
            raise TerminationSignal(signal=signal.SIGTERM)

    def terminated(_number: int, _frame: Any) -> None:
        raise TerminationSignal(signal=signal.SIGTERM)

    # Prefect hands the signal on to whoever handled it before, which would end this process.
    before = signal.signal(signal.SIGTERM, terminated)
    try:
        with pytest.raises(TerminationSignal):
            trained()
    finally:
        signal.signal(signal.SIGTERM, before)
    (run,) = home.store.runs("mood")
    assert run.state == ("cancelled" if by_a_person else "running")
    assert _tracked(home).info.status == "KILLED"
    assert home.store.lease("coach:mood") is None
    if not by_a_person:
        assert coach_task(home.settings, "mood", reason="due", engine=home.engine).promoted
        assert _tracked(home).info.status == "FINISHED"


def test_a_training_that_fails_is_a_failed_flow(
    home: Any, trainer: Any, prefect: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is given up or waits for a server; the latter goes on with the next run of the deployment."""
    from flows.deployed import train

    monkeypatch.setattr("flows.workshop.Workshop.engine", home.engine)
    trainer.failures = [httpx.ConnectError("refused")]
    waits = train(str(home.config), "mood", return_state=True)
    assert waits.is_failed()
    assert home.store.open_run("mood") is not None
    trainer.failures = [TrainingError("the disk is full: make room")]
    failed = train(str(home.config), "mood", return_state=True)
    assert failed.is_failed()
    assert "make room" in failed.message
    assert home.store.runs("mood")[-1].state == "failed"
    done = train(str(home.config), "mood", return_state=True)
    assert done.is_completed()
    with held_lease(home.store, "mood"):
        assert train(str(home.config), "mood", return_state=True).is_cancelled()


def test_what_is_due_is_started_once(home: Any, trainer: Any, prefect: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run a task: none beside one that waits for a worker or is in training; and somebody is said to watch."""
    from prefect.client.orchestration import get_client

    from flows.deployed import coach_due, train
    from flows.lease import watch_lease

    with pytest.raises(TrainingError, match="prefect deploy --all"):
        coach_due(str(home.config))
    assert home.store.lease(watch_lease("mood")) is not None
    with get_client(sync_client=True) as client:
        flow_id = client.create_flow(train)
        client.create_deployment(flow_id=flow_id, name="coach", entrypoint="flows/deployed.py:train")
    assert coach_due(str(home.config))["mood"].startswith("started, because: 60 examples")
    assert coach_due(str(home.config)) == {"mood": "waits for a worker"}
    (waiting,) = [run for run in _flow_runs("train-mood") + _all_of_task() if run.state.is_scheduled()]
    assert waiting.parameters["task"] == "mood"
    with held_lease(home.store, "mood"):
        assert coach_due(str(home.config)) == {"mood": "is in training"}


def _all_of_task() -> list[Any]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter

    with get_client(sync_client=True) as client:
        return client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate({"tags": {"all_": ["task:mood"]}}))


def test_a_step_by_hand_takes_the_lease(home: Any, trainer: Any, prefect: None) -> None:
    """It does not run beside a coach, and the last one closes the run."""
    from flows.curate import curate
    from flows.promote import promote

    run = home.store.start_run("mood", home.store.corpus("mood")[1], "due", corpus_size=60)
    with held_lease(home.store, "mood"), pytest.raises(Busy):
        curate(str(home.config), "mood", run.id)
    assert coach_task(home.settings, "mood", reason="due", engine=home.engine).promoted
    with pytest.raises(TrainingError, match="is over"):
        promote(str(home.config), "mood", run.id)
