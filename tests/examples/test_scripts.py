"""Every example is run, and does what its text says."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from apprentice import load_settings
from apprentice.operate.check import findings
from apprentice.remote.transport import Sender
from apprentice.testing import FakeVendor
from tests.store.conftest import new_postgres, postgres_server  # noqa: F401  # fixtures

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def printed(name: str, *arguments: str, cwd: Path) -> list[str]:
    """The lines that a script prints, run as a person runs it, with no key in its environment."""
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", EXAMPLES / name, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_first_task_is_answered_kept_and_paid(tmp_path: Path) -> None:
    """Three answers within the schema, three examples, and what they cost."""
    *answers, status = printed("first_task.py", cwd=tmp_path)
    assert answers == [
        "{'team': 'billing', 'urgent': True}",
        "{'team': 'support', 'urgent': False}",
        "{'team': 'billing', 'urgent': False}",
    ]
    assert re.fullmatch(r"phase 1: 3 examples, \$0\.00\d+ spent", status)


def test_a_custom_evaluator_scores_pairs(tmp_path: Path) -> None:
    """The configuration's own way of finding the function, on four pairs."""
    lines = printed("custom_evaluator.py", cwd=tmp_path)
    assert [line.split()[0] for line in lines] == ["1.00", "0.86", "0.50", "0.00"]


def test_a_gateway_is_told_the_team(tmp_path: Path) -> None:
    """The client's own hook sees the request before it leaves."""
    assert printed("behind_a_gateway.py", cwd=tmp_path) == [
        "POST /v1/chat/completions checkout",
        "{'language': 'german'}",
    ]


def test_two_routers_keep_one_cap(tmp_path: Path, new_postgres: Callable[[], str]) -> None:  # noqa: F811
    """On a real PostgreSQL: not a cent above the cap, and both see the same."""
    counts, money = printed("two_routers.py", new_postgres(), cwd=tmp_path)
    answered, asked, first, second = map(int, re.findall(r"\d+", counts))
    assert 0 < answered == first == second <= asked < 500
    assert asked <= 1.01 * answered  # one in a hundred is asked for twice
    spent, cap = map(float, re.findall(r"\$([\d.]+)", money))
    assert 0.8 * cap < spent <= cap
    assert money.endswith("seen by both: True")


def test_an_application_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The FastAPI application answers a ticket, refuses a bad one, and says so when nobody can answer."""
    testclient = pytest.importorskip("fastapi.testclient")
    vendor = FakeVendor("anthropic", lambda value: {"category": "billing", "priority": 2})
    by_vendor = httpx.Client(transport=vendor.transport())
    monkeypatch.setattr(Sender, "client", lambda self: by_vendor)
    monkeypatch.setenv("ANTHROPIC_API_KEY", vendor.key)
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "apprentice.yaml", tmp_path)
    spec = importlib.util.spec_from_file_location("in_fastapi", EXAMPLES / "in_fastapi.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with testclient.TestClient(module.app) as http:
        answered = http.post("/tickets", json={"text": "I was charged twice."})
        assert answered.json() == {"text": "I was charged twice.", "category": "billing", "priority": 2}
        assert http.post("/tickets", json={"body": "I was charged twice."}).status_code == 422
        monkeypatch.setattr("apprentice.remote.teacher.Teacher.ask", _away)
        assert http.post("/tickets", json={"text": "I was charged twice."}).status_code == 503


def _away(*_: object) -> None:
    from apprentice import RemoteUnavailable

    raise RemoteUnavailable("anthropic", "it is away")


def test_the_vllm_configuration_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads, and `apprentice check` looks for the server that it names."""
    monkeypatch.setenv("APPRENTICE_DB_PASSWORD", "secret")
    settings = load_settings(EXAMPLES / "vllm.yaml")
    found = {one.part: one for one in findings(settings, {"ANTHROPIC_API_KEY": "sk-test"})}
    assert found["local.backend"].state == "problem"
    assert "http://127.0.0.1:8001" in found["local.backend"].detail


def test_the_gallery_is_whole() -> None:
    """Each example has its line, each link leads somewhere, and each script is short."""
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)", page)
    assert [link for link in links if not (EXAMPLES / link).exists()] == []
    shown = [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.yaml")]
    assert [path.name for path in shown if path.name not in links] == []
    assert [path.name for path in shown if len(path.read_text().splitlines()) >= 40] == []
