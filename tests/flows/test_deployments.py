"""prefect.yaml and the job templates of deploy/ agree with the code, with each other and with Prefect."""

from __future__ import annotations

import importlib
import importlib.resources
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.utilities.templating import apply_values

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
KINDS = ["docker", "kubernetes"]


def _template(kind: str) -> dict[str, Any]:
    template: dict[str, Any] = json.loads((ROOT / "deploy" / f"{kind}.json").read_text())
    return template


def _prefects_own(kind: str) -> dict[str, Any]:
    """The template that Prefect ships for work pools of this kind."""
    bundled = importlib.resources.files("prefect.server.api") / "collections_data/views/aggregate-worker-metadata.json"
    template: dict[str, Any] = json.loads(bundled.read_text())[f"prefect-{kind}"][kind][
        "default_base_job_configuration"
    ]
    return template


def _rendered(kind: str, deployment: dict[str, Any]) -> dict[str, Any]:
    """What a worker of this kind makes of a deployment."""
    template = _template(kind)
    variables = template["variables"]["properties"]
    values = {name: variable["default"] for name, variable in variables.items() if "default" in variable}
    rendered = apply_values(template["job_configuration"], values | deployment["work_pool"].get("job_variables", {}))
    assert isinstance(rendered, dict)
    return rendered


def _deployment(name: str) -> dict[str, Any]:
    (found,) = [d for d in DEPLOYMENTS if d["name"] == name]
    assert isinstance(found, dict)
    return found


def test_one_environment_holds_the_flows_and_every_trainer_that_runs_inside_them() -> None:
    """Only Axolotl, which is a command of its own, may be declared to conflict with anything."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for conflict in project["tool"]["uv"]["conflicts"]:
        assert "axolotl" in {part.get("extra") for part in conflict}


def test_every_deployment_names_a_flow_that_exists() -> None:
    """Entry points and parameters are those of the code."""
    assert {d["name"] for d in DEPLOYMENTS} >= {"due", "observe", "finetune"}
    for deployment in DEPLOYMENTS:
        path, name = deployment["entrypoint"].split(":")
        flow: Callable[..., Any] = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
        known = set(flow.parameters.properties)  # type: ignore[attr-defined]
        assert set(deployment["parameters"]) <= known


@pytest.mark.parametrize("kind", KINDS)
def test_every_placeholder_of_a_job_template_has_a_variable_and_the_other_way_round(kind: str) -> None:
    template = _template(kind)
    used = set(re.findall(r"{{ (\w+) }}", json.dumps(template["job_configuration"])))
    assert used == set(template["variables"]["properties"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_template_says_nothing_that_prefects_worker_does_not_know(kind: str) -> None:
    # container_create_kwargs is newer than the copy that Prefect bundles (prefect-docker 0.6).
    known = set(_prefects_own(kind)["job_configuration"]) | {"container_create_kwargs"}
    assert set(_template(kind)["job_configuration"]) <= known


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_runs_in_the_image_with_the_configuration_and_the_models_where_the_image_looks(kind: str) -> None:
    image = (ROOT / "deploy" / "Dockerfile").read_text()
    assert "WORKDIR /app\n" in image
    assert "APPRENTICE_CHECKOUT=/app" in image
    job = _rendered(kind, _deployment("curate"))
    assert job["env"]["APPRENTICE_CHECKOUT"] == "/app"
    if kind == "docker":
        places = [volume.split(":")[1] for volume in job["volumes"]]
    else:
        places = [m["mountPath"] for m in _container(job)["volumeMounts"]]
    assert places == ["/app/apprentice.yaml", "/app/models"]


def _container(job: dict[str, Any]) -> dict[str, Any]:
    (container,) = job["job_manifest"]["spec"]["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container


@pytest.mark.parametrize(
    ("name", "gpus"), [("coach", 1), ("due", 0), ("finetune", 1), ("validate", 1), ("curate", 0), ("observe", 0)]
)
def test_the_gpu_queue_asks_for_a_gpu_and_the_other_does_not(name: str, gpus: int) -> None:
    deployment = _deployment(name)
    assert deployment["work_pool"]["work_queue_name"] == ("gpu" if gpus else "cpu")
    assert _container(_rendered("kubernetes", deployment))["resources"]["limits"]["nvidia.com/gpu"] == gpus
    requests = _rendered("docker", deployment).get("container_create_kwargs", {}).get("device_requests", [])
    assert sum(request["Count"] for request in requests) == gpus
