"""The distribution: its name, its version, and what its wheel holds."""

from __future__ import annotations

import os
import re
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


def build_wheel(source: Path, into: Path) -> Path:
    uv = os.environ.get("UV") or shutil.which("uv") or str(ROOT / ".uv" / "bin" / "uv")
    built = [uv, "build", "--wheel", "--quiet", "--out-dir", str(into), str(source)]
    subprocess.run(built, check=True, capture_output=True, timeout=240)
    (wheel,) = into.glob("*.whl")
    return wheel


def test_the_wheel_holds_the_library_its_licence_and_its_types(tmp_path: Path) -> None:
    """Built as for a release: the one package, `py.typed`, the licence's text, and the extras under their names."""
    with zipfile.ZipFile(build_wheel(ROOT, tmp_path)) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        described = Parser().parsestr(archive.read(metadata).decode())
    assert described["Name"] == "apprentice-llm"
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"apprentice"}
    assert "apprentice/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    extras = {name.replace("_", "-") for name in PROJECT["optional-dependencies"]}
    assert extras == {name.replace("_", "-") for name in described.get_all("Provides-Extra", [])}


def test_the_image_copies_whatever_the_package_is_built_from(tmp_path: Path) -> None:
    """deploy/Dockerfile installs the project: what its COPY lines bring must build it, the licence's text included."""
    image, source = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8"), tmp_path / "app"
    for line in re.findall(r"^COPY (.+)$", image, flags=re.MULTILINE):
        *names, to = line.split()
        for name in names:
            place = source / to / name if to.endswith("/") else source / to
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, place)
    with zipfile.ZipFile(build_wheel(source, tmp_path)) as archive:
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
