"""Adapter folders: their names, and the damage that is found before it can serve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apprentice.errors import VersionError
from apprentice.local.adapter import check_adapter, content_name, read_adapter
from apprentice.local.base_model import BaseModel
from apprentice.schema import parse_schema
from tests.local.written import write_adapter, write_base

SCHEMA = parse_schema({"emotion": "joy | fear"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter, to damage."""
    write_adapter(tmp_path / "adapter", "emotion", SCHEMA)
    return tmp_path / "adapter"


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    """The base it was made for."""
    return BaseModel("base", str(write_base(tmp_path / "base")), "folder")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_name_is_the_content(folder: Path, tmp_path: Path) -> None:
    """The same files have the same name wherever they lie; a changed matrix or frame has another."""
    name = content_name(folder)
    assert name == write_adapter(tmp_path / "elsewhere", "other", SCHEMA).name
    (folder / "probe.json").write_text("[]")
    assert content_name(folder) == name
    frame = json.loads((folder / "frame.json").read_text())
    edit(folder / "frame.json", prefix=frame["prefix"] + " ")
    assert content_name(folder) != name


def test_a_good_adapter_passes(folder: Path, base: BaseModel) -> None:
    """Scale and shapes are read as PEFT means them."""
    check_adapter(folder, base)
    layer = read_adapter(folder).layers["model.layers.0.self_attn.q_proj"]
    assert layer.a.shape == (8, 64)
    assert layer.b.shape == (64, 8)
    assert layer.scale == 2.0


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file_is_found(folder: Path, base: BaseModel, keep: int) -> None:
    """Wherever it was cut off, even by one byte."""
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(VersionError, match="train the version again"):
        check_adapter(folder, base)


def test_an_adapter_of_another_base_is_found(folder: Path, tmp_path: Path) -> None:
    """The message names both bases."""
    other = write_base(tmp_path / "other", hidden=32)
    with pytest.raises(VersionError, match="trained on another base"):
        check_adapter(folder, BaseModel("other", str(other), "folder"))


@pytest.mark.parametrize(("key", "value"), [("use_dora", True), ("bias", "all"), ("modules_to_save", ["lm_head"])])
def test_what_the_engines_do_not_serve_is_refused(folder: Path, base: BaseModel, key: str, value: object) -> None:
    """Leaving a part of an adapter out silently would serve other answers than were validated."""
    edit(folder / "adapter_config.json", **{key: value})
    with pytest.raises(VersionError, match="which the engines cannot serve"):
        check_adapter(folder, base)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "frame.json"])
def test_a_missing_file_is_found(folder: Path, base: BaseModel, name: str) -> None:
    """Each of the three is needed."""
    (folder / name).unlink()
    with pytest.raises(VersionError, match=name):
        check_adapter(folder, base)


def test_numbers_that_are_not_finite_are_found(folder: Path) -> None:
    """A diverged training run must not reach an engine."""
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4:] = b"\x00\x00\xc0\x7f"
    path.write_bytes(content)
    with pytest.raises(VersionError, match="not finite"):
        read_adapter(folder)
