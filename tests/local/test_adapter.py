"""Adapter folders: their names, and the damage that is found before it can serve."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apprentice.errors import VersionError
from apprentice.local.adapter import adapter_folder, check_adapter, content_name, read_adapter, stored_path
from apprentice.local.base_model import BaseModel
from apprentice.local.gguf_file import read_gguf_header
from apprentice.local.probe import read_probes
from apprentice.schemas.schema import parse_schema
from tests.local.written import write_adapter, write_base, write_gguf_header

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
    check_adapter(folder, base, content_name(folder))
    layer = read_adapter(folder).layers["model.layers.0.self_attn.q_proj"]
    assert layer.a.shape == (8, 64)
    assert layer.b.shape == (64, 8)
    assert layer.scale == 2.0


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file_is_found(folder: Path, base: BaseModel, keep: int) -> None:
    """Wherever it was cut off, even by one byte."""
    path, name = folder / "adapter_model.safetensors", content_name(folder)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(VersionError, match="train the version again"):
        check_adapter(folder, base, name)


def test_an_adapter_of_another_base_is_found(folder: Path, tmp_path: Path) -> None:
    """The message names both bases."""
    other = write_base(tmp_path / "other", hidden=32)
    with pytest.raises(VersionError, match="trained on another base"):
        check_adapter(folder, BaseModel("other", str(other), "folder"), content_name(folder))


@pytest.mark.parametrize(("key", "value"), [("use_dora", True), ("bias", "all"), ("modules_to_save", ["lm_head"])])
def test_what_the_engines_do_not_serve_is_refused(folder: Path, base: BaseModel, key: str, value: object) -> None:
    """Leaving a part of an adapter out silently would serve other answers than were validated."""
    edit(folder / "adapter_config.json", **{key: value})
    with pytest.raises(VersionError, match="which the engines cannot serve"):
        check_adapter(folder, base, content_name(folder))


def test_other_files_under_a_versions_name_are_found(folder: Path, base: BaseModel) -> None:
    """Whole and of the right base, but not what was validated: the message says what the name would be."""
    name = content_name(folder)
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(VersionError, match=f"other files than version {name} .*{content_name(folder)}"):
        check_adapter(folder, base, name)


def pair(**changes: object) -> bytes:
    """A header of one layer, whose first matrix is described otherwise."""
    a = {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}
    b = {"dtype": "F32", "shape": [1, 1], "data_offsets": [4, 8]}
    return json.dumps({"x.lora_A.weight": a | changes, "x.lora_B.weight": b}).encode()


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b"[]",
        b"\xff\xfe",
        b'{"x.lora_A.weight": 1}',
        pair(shape=[True, 1]),
        pair(shape=[1.0, 1]),
        pair(shape=[-1, -1]),
        pair(shape=[2**40, 2**40], data_offsets=[0, 2**82]),
        pair(data_offsets=[-4, 0]),
        pair(data_offsets=["0", "4"]),
        pair(dtype=["F32"]),
    ],
)
def test_a_hostile_header_is_a_version_error(folder: Path, base: BaseModel, header: bytes) -> None:
    """Nested a hundred thousand deep, shapes that are no whole numbers, bytes before the file."""
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(VersionError, match="adapter_model"):
        check_adapter(folder, base, "any")


@pytest.mark.parametrize("name", ["adapter_config.json", "frame.json", "probe.json"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"1", b'{"prefix": 1', b"null"])
def test_a_hostile_json_file_is_a_version_error(folder: Path, base: BaseModel, name: str, content: bytes) -> None:
    """The folder may have come over a network: no reader of it may raise anything else."""
    (folder / name).write_bytes(content)
    with pytest.raises(VersionError, match=name):
        check_adapter(folder, base, "any") if name != "probe.json" else read_probes(folder)


@pytest.mark.parametrize("alpha", ["16", None, [1], float("inf"), {"a": 1}])
def test_a_scale_that_is_no_number_is_a_version_error(folder: Path, alpha: object) -> None:
    """Also an infinite one, which JSON's readers let through; a number in quotes is taken for that number."""
    edit(folder / "adapter_config.json", lora_alpha=alpha)
    if alpha == "16":
        assert read_adapter(folder).layers["model.layers.0.self_attn.q_proj"].scale == 2.0
        return
    with pytest.raises(VersionError, match="not a number"):
        read_adapter(folder)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_whatever_happens_to_a_file_nothing_but_a_version_error_comes_out(data: st.DataObject) -> None:
    """Bytes changed, cut, doubled or written over at random places of any of the files, and of a base's GGUF."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "adapter"
        name = write_adapter(folder, "emotion", SCHEMA).name
        base = BaseModel("base", str(write_base(Path(work) / "base")), "folder")
        write_gguf_header(folder / "base.gguf")
        path = folder / data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
        content = bytearray(path.read_bytes())
        # The ends of these files are plain numbers: most of the damage goes to where the structure is.
        at = data.draw(st.integers(0, min(len(content), 600)))
        size = data.draw(st.integers(0, 40))
        content[at : at + size] = data.draw(st.binary(max_size=40))
        path.write_bytes(content)
        for look in (
            lambda: check_adapter(folder, base, name),
            lambda: read_adapter(folder),
            lambda: read_probes(folder),
            lambda: read_gguf_header(folder / "base.gguf"),
        ):
            with contextlib.suppress(VersionError):
                look()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "frame.json"])
def test_a_missing_file_is_found(folder: Path, base: BaseModel, name: str) -> None:
    """Each of the three is needed."""
    whole = content_name(folder)
    (folder / name).unlink()
    with pytest.raises(VersionError, match=name):
        check_adapter(folder, base, whole)


def test_numbers_that_are_not_finite_are_found(folder: Path) -> None:
    """A diverged training run must not reach an engine."""
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4:] = b"\x00\x00\xc0\x7f"
    path.write_bytes(content)
    with pytest.raises(VersionError, match="not finite"):
        read_adapter(folder)


def test_arrays_nested_without_end_are_a_version_error(tmp_path: Path) -> None:
    """A GGUF of a few hundred kilobytes must not take the process's stack."""
    path = tmp_path / "deep.gguf"
    path.write_bytes(
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
        + struct.pack("<Q", 1)
        + b"k"
        + struct.pack("<I", 9)
        + struct.pack("<IQ", 9, 1) * 50_000
    )
    with pytest.raises(VersionError, match="nested more than"):
        read_gguf_header(path)


def test_a_home_that_moved_finds_its_adapters(tmp_path: Path) -> None:
    """The store remembers no path of one machine; an old row, which does, is read from where the models are now."""
    before, after = tmp_path / "before", tmp_path / "after"
    folder = before / "emotion" / "v1"
    folder.mkdir(parents=True)
    relative = stored_path(before, folder)
    assert relative == "emotion/v1"
    assert adapter_folder(before, "emotion", "v1", relative) == folder
    assert adapter_folder(before, "emotion", "v1", str(folder)) == folder
    shutil.copytree(before, after)
    for stored in (relative, str(folder)):  # a copied home serves from the copy, though the original is still there
        assert adapter_folder(after, "emotion", "v1", stored) == after / "emotion" / "v1"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert stored_path(before, elsewhere) == str(elsewhere)
    assert adapter_folder(before, "emotion", "v2", str(elsewhere)) == elsewhere
    assert adapter_folder(before, "emotion", "v3", "") == before / "emotion" / "v3"
    assert adapter_folder(after, "emotion", "v3", str(before / "emotion" / "v3")) == after / "emotion" / "v3"
