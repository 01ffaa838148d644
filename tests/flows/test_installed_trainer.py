"""A trainer and an engine of another package go through a whole training run: those of examples/acme."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apprentice.registry import ENGINES, TRAINERS
from flows.coach import coach_task

ACME = Path(__file__).parents[2] / "examples" / "acme"


def test_a_run_trains_and_answers_with_what_a_package_brings(
    make_home: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Curated, trained, answered held-out examples it never saw, and was judged by what it guessed."""
    about = tmp_path / "site" / "apprentice_acme-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: apprentice-acme\nVersion: 1.0\n")
    points = {"engines": "rote = apprentice_acme.engine:Rote", "trainers": "rote = apprentice_acme.trainer:RoteTrainer"}
    (about / "entry_points.txt").write_text("".join(f"[apprentice.{group}]\n{it}\n" for group, it in points.items()))
    monkeypatch.syspath_prepend(str(ACME))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    home = make_home(local={"backend": "rote", "fine_tune_backend": "rote"})
    home.teach(60)
    assert [kind.find("rote").package for kind in (ENGINES, TRAINERS)] == ["apprentice-acme 1.0"] * 2
    result = coach_task(home.settings, "mood", reason="due")
    assert (result.state, result.trained_on, result.held_out) == ("rejected", 45, 15)
    assert result.reason.startswith("correlation_low")  # by heart is no way to know what was not seen
    (version,) = home.store.versions("mood")
    assert len((home.settings.model_dir / version.adapter / "adapter_config.json").read_text().split("letter")) == 46
    for name in [name for name in sys.modules if name.split(".")[0] == "apprentice_acme"]:
        del sys.modules[name]
