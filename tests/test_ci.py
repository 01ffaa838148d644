"""The CI matrix and the hooks before a commit are well-formed and call what is there."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOW: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
JOBS: dict[str, dict[str, Any]] = WORKFLOW["jobs"]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
(REPOSITORY,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
HOOKS: list[dict[str, Any]] = REPOSITORY["hooks"]


def commands(job: str) -> list[str]:
    return [step["run"] for step in JOBS[job]["steps"] if "run" in step]


@pytest.mark.parametrize("job", sorted(JOBS))
def test_every_job_checks_out_the_code_and_runs_targets_that_exist(job: str) -> None:
    """Steps are versioned actions, the checkout first, or `make` with a target of the Makefile."""
    steps = JOBS[job]["steps"]
    assert steps[0]["uses"].startswith("actions/checkout@")
    assert [step for step in steps if ("uses" in step) == ("run" in step)] == []
    assert [step["uses"] for step in steps if "uses" in step and not re.search(r"@v\d+$", step["uses"])] == []
    assert commands(job) != []
    for command in commands(job):
        assert re.fullmatch(r"make [a-z-]+", command), command
        assert command.removeprefix("make ") in TARGETS


def test_the_matrix_covers_what_the_project_promises() -> None:
    """The Pythons from the least that pyproject.toml allows, no extras, oldest dependencies, PostgreSQL, the pages."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for job in ("test", "base"):
        pythons = JOBS[job]["strategy"]["matrix"]["python"]
        assert project["requires-python"] == f">={pythons[0]}"
        assert pythons == ["3.12", "3.13", "3.14"]
        assert JOBS[job]["env"]["UV_PYTHON"] == "${{ matrix.python }}"
    run = {command for job in JOBS for command in commands(job)}
    assert run == {"make test", "make test-base", "make test-oldest", "make test-postgres", "make docs"}


def test_the_server_of_the_postgres_job_is_the_one_that_tests_look_for() -> None:
    """The variable, the port and the password agree."""
    job = JOBS["postgres"]
    service = job["services"]["postgres"]
    ((name, url),) = job["env"].items()
    assert f'"{name}"' in (ROOT / "tests" / "store" / "conftest.py").read_text(encoding="utf-8")
    port, password = service["ports"][0].split(":")[0], service["env"]["POSTGRES_PASSWORD"]
    assert url == f"postgresql://postgres:{password}@127.0.0.1:{port}/postgres"


def test_a_hook_formats_and_mends_what_it_is_given(tmp_path: Path) -> None:
    """The two that are given files, run as pre-commit runs them: from the checkout's root, with the files' names."""
    file = tmp_path / "untidy.py"
    file.write_text("import os\nimport sys\nprint( sys.path )  # noqa: T201\n")
    for hook in HOOKS:
        if hook.get("pass_filenames", True):
            command = [*hook["entry"].split(), str(file)]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    assert file.read_text() == "import sys\n\nprint(sys.path)  # noqa: T201\n"


def test_hooks_run_programs_that_setup_installs() -> None:
    """Nothing is fetched when a commit is made."""
    assert REPOSITORY["repo"] == "local"
    assert {hook["language"] for hook in HOOKS} == {"system"}
    for hook in HOOKS:
        assert (ROOT / hook["entry"].split()[0]).is_file(), hook["entry"]
