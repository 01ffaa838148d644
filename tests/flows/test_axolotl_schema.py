"""The YAML that we write for Axolotl, held against the schema of the real package.

Axolotl pins what we do not use, so it cannot share our environment: its wheel alone is unpacked beside the tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from apprentice.settings.config import TrainingSettings
from flows.trainers.backends.axolotl import axolotl_config
from flows.trainers.recipe import choose

pytestmark = pytest.mark.slow

# What the schema makes of each document: the keys that it knows, or its complaint.
_CHECK = """
import json, sys
from axolotl.utils.schemas.config import AxolotlInputConfig
for line in sys.stdin:
    document = json.loads(line)
    try:
        checked = AxolotlInputConfig(**document).model_dump(mode="json")
    except ValueError as error:
        print(json.dumps({"refused": str(error)}))
    else:
        print(json.dumps({name: checked[name] for name in document if name in checked}))
"""


@pytest.fixture(scope="module")
def axolotl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the real package and the one dependency that its schema needs and we do not have."""
    root = Path(__file__).parents[2]
    uv = shutil.which("uv") or root / ".uv/bin/uv"
    folder = tmp_path_factory.mktemp("axolotl")
    command = [uv, "pip", "install", "--python", sys.executable, "--target", folder, "--no-deps", "axolotl", "addict"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    except FileNotFoundError:
        pytest.skip("uv is not installed")
    if done.returncode:
        pytest.skip(f"axolotl cannot be had here: {done.stderr[-300:]}")
    return folder


def _checked(axolotl: Path, *documents: dict[str, Any]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", _CHECK],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(axolotl)])},
        input="\n".join(map(json.dumps, documents)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_axolotl_takes_every_key_as_it_is_meant(axolotl: Path, tmp_path: Path) -> None:
    """Nothing is refused, nothing unknown, no value read as another one; and what is wrong would be refused."""
    documents = [
        axolotl_config(
            choose(TrainingSettings(), rows=rows, layers=16, on_gpu=True),
            base="base",
            data=tmp_path / "rows.jsonl",
            output=tmp_path / "out",
            max_length=1024,
        )
        for rows in (60, 3000, 100_000)
    ]
    *taken, wrong = _checked(axolotl, *documents, {**documents[0], "lora_r": "many"})
    assert "lora_r" in wrong["refused"]
    assert len(taken) == len(documents)
    for document, checked in zip(documents, taken, strict=True):
        (wanted,), (dataset,) = document.pop("datasets"), checked.pop("datasets")
        assert {name: dataset.get(name) for name in wanted} == wanted
        assert checked == document
