"""The package of examples/acme, installed: docs/extending.md is about it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from apprentice import load_settings
from apprentice.confidence.sampling import as_text, target_rate
from apprentice.events.sinks import Undelivered, sinks_of
from apprentice.local.engine import EngineSetup, Version
from apprentice.registry import ENGINES
from apprentice.schemas.schema import parse_schema
from apprentice.store.records import EventRecord

ROOT = Path(__file__).parents[2]
ACME = ROOT / "examples" / "acme"
PROJECT = tomllib.loads((ACME / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder in which the package is installed as an installer would: its modules, and what its metadata says."""
    site = tmp_path / "site"
    about = site / "apprentice_acme-1.0.dist-info"
    about.mkdir(parents=True)
    (site / "apprentice_acme").symlink_to(ACME / "apprentice_acme")
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PROJECT['name']}\nVersion: {PROJECT['version']}\n")
    lines = []
    for group, points in PROJECT["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return site


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Its configuration, loaded in this process."""
    monkeypatch.syspath_prepend(str(site))
    yield load_settings(ACME / "apprentice.yaml", {})
    for name in [name for name in sys.modules if name.split(".")[0] == "apprentice_acme"]:
        del sys.modules[name]


def test_it_is_asked_and_check_says_whose_each_name_is(site: Path, tmp_path: Path) -> None:
    """The script of the example, run as a person runs it."""
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": f"{ROOT}:{site}"}
    command = [sys.executable, "-W", "error", ACME / "try_it.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "remote: acme acme-large (from apprentice-acme 1.0): its key is set and its price known",
        "due_day.evaluator: near_day (from apprentice-acme 1.0)",
        "sampling.decay_function: power (from apprentice-acme 1.0)",
        "local.backend: rote (from apprentice-acme 1.0): what it needs is installed",
        "local.fine_tune_backend: rote (from apprentice-acme 1.0): what it needs is installed",
        "alerts.sinks.pager: pager (from apprentice-acme 1.0): what it sends would be an alert",
        "{'day': '2026-12-01'}",
    ]


def test_the_evaluator_scores_by_its_options(installed: Any) -> None:
    """Half of 14 days apart is half right; whatever it keeps of an answer is enough to score it."""
    from apprentice.request.judge import evaluator_of

    evaluate = evaluator_of(installed.tasks[0])
    ours, theirs = {"day": "2026-12-08", "note": "x"}, {"day": "2026-12-01"}
    assert evaluate(ours, theirs) == (0.5, {"day": 0.5})
    assert evaluate(evaluate.project(ours), evaluate.project(theirs)) == evaluate(ours, theirs)


def test_what_the_trainer_writes_the_engine_knows_by_heart(installed: Any, tmp_path: Path) -> None:
    """A job, then its adapter, in the engine that the file names with its options."""
    from flows.trainers import Progress, TrainingJob, build_trainer

    rows = [{"id": str(i), "input": {"text": f"invoice {i}"}, "output": {"day": f"2026-12-0{i}"}} for i in (1, 2)]
    dataset = tmp_path / "rows.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    schema = parse_schema({"day": "str"})
    job = TrainingJob(
        task="due_day", dataset=dataset, output_schema=schema, base_model="none", root=tmp_path, work=tmp_path / "work",
        adapters=tmp_path / "adapters", settings=installed.local.training,
    )  # fmt: skip
    trainer, told = build_trainer(installed.local), list[Progress]()
    trainer.preflight(job)
    assert trainer.worst_case(job) == 0
    trained = trainer.train(job, told.append)
    assert trainer.train(job, told.append).name == trained.name
    assert (trained.trained_on, trained.folder.name, told[0].fraction) == (2, trained.name, 1.0)

    kind = ENGINES.find(installed.local.backend)
    options = ENGINES.options(kind, installed.local.backend_options, "backend_options")
    engine = kind.made.configured(EngineSetup(installed.local, tmp_path), options)
    engine.load(Version(trained.name, "due_day", trained.folder, schema))
    known = engine.answer(trained.name, {"text": "invoice 2"}, deadline_s=1.0)
    guessed = engine.answer(trained.name, {"text": "another"}, deadline_s=1.0)
    assert (known.output, known.confidence, guessed.confidence) == ({"day": "2026-12-02"}, 1.0, 0.2)
    assert [held.name for held in engine.loaded()] == [trained.name]
    engine.close()
    assert engine.loaded() == []


def test_the_decay_function_falls_by_its_exponent(installed: Any) -> None:
    """1 - (1 - floor) * way ** 3 half-way between the trigger and 1; held to both ends."""
    sampling = installed.sampling
    options = as_text(sampling.decay_options)
    rates = [
        target_rate(sampling.decay_function, rho, trigger=0.5, floor=0.02, options=options) for rho in (0.5, 0.75, 1.0)
    ]
    assert rates == pytest.approx([1.0, 1 - 0.98 * 0.125, 0.02], abs=1e-9)


def test_the_sink_delivers_and_says_what_may_be_tried_again(installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its key, which no text shows."""
    monkeypatch.setenv("ACME_PAGER_KEY", "pager-0123456789abcdef")
    sent: list[tuple[str, dict[str, Any]]] = []
    statuses = iter((200, 503, 400))

    def post(url: str, **more: Any) -> httpx.Response:
        sent.append((url, more))
        return httpx.Response(next(statuses))

    monkeypatch.setattr(httpx, "post", post)
    (sink,) = sinks_of(installed.alerts)
    event = EventRecord("e", "due_day", "drift", "critical", {}, 0.0)
    sink.send(event, 1.0)
    ((url, more),) = sent
    assert url == "https://pager.acme.example/incidents"
    assert (more["headers"], more["json"]["kind"]) == ({"x-acme-key": "pager-0123456789abcdef"}, "drift")
    for again in (True, False):
        with pytest.raises(Undelivered) as caught:
            sink.send(event, 1.0)
        assert caught.value.again is again


def test_the_page_shows_the_package_as_it_is() -> None:
    """Every module in full, the entry points and the configuration."""
    shown = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    code = dict(text.removeprefix("# ").split("\n", 1) for kind, text in shown if kind == "python")
    files = [path for path in (ACME / "apprentice_acme").glob("*.py") if path.name != "__init__.py"]
    assert code == {str(path.relative_to(ACME)): path.read_text(encoding="utf-8") for path in files}
    (points,) = (text for kind, text in shown if kind == "toml")
    assert tomllib.loads(points)["project"]["entry-points"] == PROJECT["entry-points"]
    (configuration,) = (text for kind, text in shown if kind == "yaml")
    assert configuration == (ACME / "apprentice.yaml").read_text(encoding="utf-8")
