"""The distribution: its name, its version, and what its wheel holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from click.testing import CliRunner

import apprentice
from apprentice.cli import cli
from apprentice.errors import MissingExtra

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_version_is_the_projects() -> None:
    """In Python and on the command line."""
    assert apprentice.__version__ == PROJECT["version"]
    assert CliRunner().invoke(cli, ["--version"]).output == f"apprentice, version {PROJECT['version']}\n"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = apprentice.nothing


def test_a_remedy_names_this_distribution() -> None:
    """`pip install apprentice` would bring a stranger's code."""
    assert f"pip install '{PROJECT['name']}[semantic]'" in str(MissingExtra("x", "semantic"))


def test_the_wheel_holds_the_library_its_licence_and_its_types(tmp_path: Path) -> None:
    """Built as for a release: the one package, `py.typed`, the licence's text, and the extras under their names."""
    uv = os.environ.get("UV") or shutil.which("uv") or str(ROOT / ".uv" / "bin" / "uv")
    built = [uv, "build", "--wheel", "--quiet", "--out-dir", str(tmp_path), str(ROOT)]
    subprocess.run(built, check=True, capture_output=True, timeout=240)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        described = Parser().parsestr(archive.read(metadata).decode())
    assert described["Name"] == "apprentice-llm"
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"apprentice"}
    assert "apprentice/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    extras = {name.replace("_", "-") for name in PROJECT["optional-dependencies"]}
    assert extras == {name.replace("_", "-") for name in described.get_all("Provides-Extra", [])}
