"""The coach as Prefect runs it, and as a process that can be killed at any step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

        setattr(owner, name, after if {after!r} else stopped)

    def steps(config, task, run):
        with flows.workshop.workshop("") as shop:
            for step in (flows.curate.curate_run, flows.finetune.finetune_run, flows.validate.validate_run):
                step(shop, flows.runs.run_of(shop, task, run))
            return flows.promote.promote_run(shop, flows.runs.run_of(shop, task, run))[0].promoted

    flows.coach.coach = steps
    result = flows.coach.coach_task(
        load_settings({config!r}), "mood", reason="due", engine=doubles.RoteEngine(truth)
    )
    print(result.version if result.promoted else result)
"""


def _work(home: Any, folder: Path, stop: str = "", *, after: bool = False) -> subprocess.CompletedProcess[str]:
    import json

    truth = folder / "truth.json"
    truth.write_text(json.dumps(home.truth))
    code = textwrap.dedent(_WORKER).format(
        conftest=str(ROOT / "tests/flows/conftest.py"),
        truth=str(truth),
        stop=stop,
        after=after,
        config=str(home.config),
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


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
    done = _work(home, tmp_path)
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


def test_every_deployment_names_a_flow_that_exists() -> None:
    """prefect.yaml and the code agree on entry points and parameters."""
    import importlib

    import yaml

    document = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    assert {d["name"] for d in document["deployments"]} >= {"due", "observe", "finetune"}
    for deployment in document["deployments"]:
        path, name = deployment["entrypoint"].split(":")
        flow: Callable[..., Any] = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
        known = set(flow.parameters.properties)  # type: ignore[attr-defined]
        assert set(deployment["parameters"]) <= known
