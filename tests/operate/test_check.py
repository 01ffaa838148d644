"""`apprentice check` tries what start-up and the first training need, and says of everything else that it did not."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import apprentice
from apprentice.operate.check import Finding, findings, sqlite_path
from apprentice.settings.config import Settings
from tests.test_cli import ROOT
from tests.test_cli import apprentice as command

KEY = {"ANTHROPIC_API_KEY": "sk-test"}


def settings(tmp_path: Path, *, task: dict[str, Any] | None = None, **more: Any) -> Settings:
    mood = {"name": "mood", "description": "x", "input_schema": {"text": "str"}, "output_schema": {"label": "a | b"}}
    document: dict[str, Any] = {
        "tasks": [{**mood, **(task or {})}],
        "remote": {"provider": "anthropic", "model": "claude-sonnet-4-5", "api_key_env": "ANTHROPIC_API_KEY"},
        "source": tmp_path / "apprentice.yaml",
    }
    return Settings.model_validate({**document, **more})


def found(tmp_path: Path, environ: dict[str, str] | None = None, **more: Any) -> dict[str, Finding]:
    """What was found, by part; a problem hides what else was found of its part."""
    by_part: dict[str, Finding] = {}
    for finding in findings(settings(tmp_path, **more), KEY if environ is None else environ):
        if finding.part not in by_part or finding.state == "problem":
            by_part[finding.part] = finding
    return by_part


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module of the user's own, with functions of many kinds."""
    theirs = types.ModuleType("theirs")

    async def slow(local: Any, remote: Any) -> float:
        return 1.0

    vars(theirs).update(
        score=lambda local, remote: 1.0,
        one=lambda value: value,
        none=lambda: 1.0,
        curve=lambda correlation, trigger, floor: 0.5,
        broken=lambda correlation, trigger, floor: 1 / 0,
        slow=slow,
        number=3,
    )
    monkeypatch.setitem(sys.modules, "theirs", theirs)
    return theirs


@pytest.fixture
def closed_port() -> Iterator[str]:
    """The address of a port on which nobody listens, held so that nobody else gets it."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


def test_a_sound_configuration_has_no_problem_and_names_what_was_not_tried(tmp_path: Path) -> None:
    """Nothing is written, and whether a vendor takes the key is left to the first request."""
    all_found = list(findings(settings(tmp_path), KEY))
    assert [f for f in all_found if f.state == "problem"] == []
    assert [f.part for f in all_found if f.state == "not tried"] == ["remote"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("part", "task", "says"),
    [
        ("mood.evaluator", {"evaluator": "custom", "evaluator_function": "no_such:f"}, "cannot be imported"),
        ("mood.evaluator", {"evaluator": "custom", "evaluator_function": "theirs:f"}, "cannot be imported"),
        ("mood.evaluator", {"evaluator": "custom", "evaluator_function": "theirs:one"}, "cannot be called as"),
        ("mood.evaluator", {"evaluator": "custom", "evaluator_function": "theirs:slow"}, "async"),
        ("mood.redact", {"redact": "no_such:f"}, "cannot be imported"),
        ("mood.redact", {"redact": "theirs:none"}, "cannot be called with one input"),
        ("mood.redact", {"redact": "theirs:number"}, "is a int, not a function"),
    ],
)
@pytest.mark.usefixtures("module")
def test_a_function_of_the_file_that_cannot_be_used_is_a_problem(
    tmp_path: Path, part: str, task: dict[str, str], says: str
) -> None:
    """It is imported, and called in thought with what it will be given."""
    finding = found(tmp_path, task=task)[part]
    assert finding.state == "problem"
    assert says in finding.detail


@pytest.mark.usefixtures("module")
def test_functions_that_can_be_used_are_fine(tmp_path: Path) -> None:
    """Each is named."""
    task = {"evaluator": "custom", "evaluator_function": "theirs:score", "redact": "theirs:one"}
    by_part = found(tmp_path, task=task, sampling={"decay_function": "theirs:curve"})
    parts = ("mood.evaluator", "mood.redact", "sampling.decay_function")
    assert [by_part[part].state for part in parts] == ["ok"] * 3
    assert found(tmp_path, sampling={"decay_function": "theirs:broken"})["sampling.decay_function"].state == "problem"
    assert found(tmp_path, sampling={"decay_function": "theirs:f"})["sampling.decay_function"].state == "problem"


def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluator, engine and trainer, each by the extra that brings it."""
    absent = {"sentence_transformers", "xllamacpp", "axolotl"}
    for name in absent:
        monkeypatch.delitem(sys.modules, name, raising=False)  # another test may have loaded it
    real = apprentice.operate.check.importlib.util.find_spec  # type: ignore[attr-defined]
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name in absent else real(name, *rest))
    by_part = found(
        tmp_path,
        task={"evaluator": "semantic_similarity"},
        local={"backend": "llama_cpp", "fine_tune_backend": "axolotl"},
    )
    for part, extra in (
        ("mood.evaluator", "semantic"),
        ("local.backend", "llama_cpp"),
        ("local.fine_tune_backend", "axolotl"),
    ):
        assert by_part[part].state == "problem", part
        assert f"[{extra}]" in by_part[part].detail


def test_servers_that_do_not_answer_are_problems(tmp_path: Path, closed_port: str) -> None:
    """An engine's, MLflow's and PostgreSQL's; no password is shown."""
    address = closed_port.removeprefix("http://")
    by_part = found(
        tmp_path,
        local={"backend": "vllm", "url": closed_port},
        tracking={"uri": closed_port},
        store=f"postgresql://me:s3cret-word@{address}/apprentice",
    )
    for part in ("local.backend", "tracking.uri", "store"):
        assert by_part[part].state == "problem", part
        assert "s3cret-word" not in by_part[part].detail
    assert "vllm at http://127.0.0.1" in by_part["local.backend"].detail


@pytest.mark.parametrize(
    ("store", "says"),
    [
        ("mysql://host/db", "'mysql' is not supported"),
        ("./x.db", "is not supported"),
        ("sqlite:///no/such/folder/x.db", "does not exist"),
    ],
)
def test_a_store_that_cannot_be_is_a_problem(tmp_path: Path, store: str, says: str) -> None:
    """Before the first paid answer has nowhere to go; and no folder is made by looking."""
    finding = found(tmp_path, store=store)["store"]
    assert (finding.state, says in finding.detail) == ("problem", True)
    assert list(tmp_path.iterdir()) == []


def test_keys_prices_base_models_and_webhooks_are_looked_at(tmp_path: Path) -> None:
    """Each in its own words."""
    assert "export ANTHROPIC_API_KEY" in found(tmp_path, environ={})["remote.api_key_env"].detail
    assert found(tmp_path, local={"base_model": "./nowhere"})["local.base_model"].state == "problem"
    assert found(tmp_path, local={"base_model": "owner/unseen"})["local.base_model"].state == "not tried"
    assert found(tmp_path, alerts={"webhook": "https://hooks.example/x"})["alerts.webhook"].state == "not tried"
    by_part = found(tmp_path, local={"fine_tune_backend": "openai"})
    assert "OPENAI_API_KEY" in by_part["local.fine_tune_backend"].detail


def test_what_a_vendor_cannot_enforce_is_said(tmp_path: Path) -> None:
    """Free-form fields anywhere, and enums longer than OpenAI takes: our own check decides then."""
    remote = {"provider": "openai", "model": "gpt-4o-mini", "api_key_env": "ANTHROPIC_API_KEY"}
    free = found(tmp_path, task={"output_schema": {"data": "dict"}})["mood.output_schema"]
    assert "cannot enforce it" in free.detail
    many = {"label": [f"label {i}" for i in range(1200)]}
    long = found(tmp_path, task={"output_schema": many}, remote=remote)["mood.output_schema"]
    assert "may refuse to enforce 1200 enum values" in long.detail


def test_modules_beside_the_configuration_are_found_and_exit_statuses_tell(tmp_path: Path) -> None:
    """The command run where the files lie needs no PYTHONPATH."""
    (tmp_path / "mymodels.py").write_text(
        "from pydantic import BaseModel\n\nclass Answer(BaseModel):\n    label: str\n\n"
        "def score(local, remote):\n    return 1\n"
    )
    text = (
        "tasks:\n  - name: mood\n    description: x\n    input_schema: {text: str}\n"
        "    output_schema: mymodels:Answer\n    evaluator: custom\n    evaluator_function: mymodels:score\n"
        "remote: {provider: anthropic, model: claude-sonnet-4-5, api_key_env: ANTHROPIC_API_KEY}\n"
    )
    (tmp_path / "apprentice.yaml").write_text(text)
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **KEY}
    # as the console script does: its own folder is first on sys.path, and the working directory is not there
    program = (
        f"import sys; sys.path = [{str(ROOT)!r}] + [p for p in sys.path if p]; from apprentice.cli import main; main()"
    )
    run = [sys.executable, "-c", program, "check"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is fine: 1 task (mood)" in done.stdout
    (tmp_path / "apprentice.yaml").write_text(text.replace("mymodels:score", "mymodels:scoer"))
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, env=environ)
    assert done.returncode == 1
    assert "problem    mood.evaluator: " in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["status", "report"])
def test_looking_makes_no_store(tmp_path: Path, name: str) -> None:
    """A mistyped path is named, and becomes neither folders nor an empty database."""
    text = (ROOT / "apprentice.yaml").read_text().replace("sqlite:///apprentice.db", "sqlite:///dtaa/apprentice.db")
    (tmp_path / "apprentice.yaml").write_text(text)
    done = command(name, "--json", cwd=tmp_path, key=None)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert f"There is no store at {tmp_path / 'dtaa' / 'apprentice.db'}" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["apprentice.yaml"]


def test_the_file_behind_a_url_is_known() -> None:
    """As the store itself reads it; memory and servers have none."""
    assert sqlite_path("sqlite:////tmp/a b/x.db") == Path("/tmp/a b/x.db")
    assert sqlite_path("sqlite://") is None
    assert sqlite_path("sqlite:///:memory:") is None
    assert sqlite_path("postgresql://h/d") is None
    assert sqlite_path("nonsense") is None


def test_the_library_says_that_it_is_typed() -> None:
    """Type checkers look into a package only if this file is in it; the wheel takes the whole folder."""
    assert (Path(apprentice.__file__).parent / "py.typed").is_file()
