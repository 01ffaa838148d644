"""A student's folder: what is written is read again, and whatever else lies there is refused with a reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from apprentice.errors import VersionError
from apprentice.local.adapter import content_name
from apprentice.student.files import OWN, Student, adapter_of, check_student, read_student, student_name, write_student


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a version with a head."""
    path = tmp_path / "models" / "mood" / "new"
    path.mkdir(parents=True)
    (path / "head.npz").write_bytes(b"numbers")
    return path


def adapter_files(folder: Path) -> str:
    """Files as an adapter has them, of which only the names and bytes matter here."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "frame.json"):
        (folder / name).write_bytes(name.encode())
    return content_name(folder)


@pytest.mark.parametrize(
    "student",
    [
        Student("some/encoder", None),
        Student("some/encoder", OWN, 0.97, {"both": {"weights": {"label": [0.5, 0.5]}}}),
        Student("some/encoder", "0123456789abcdef", 1.0),
    ],
)
def test_what_is_written_is_read_again(folder: Path, student: Student) -> None:
    write_student(folder, student)
    assert read_student(folder) == student


def test_a_folder_without_student_json_is_a_plain_adapter(folder: Path) -> None:
    name = adapter_files(folder)
    assert read_student(folder) is None
    assert check_student(folder, name) is None
    assert student_name(folder) == name


def test_the_name_is_of_every_file_that_decides_an_answer_and_of_no_other(folder: Path) -> None:
    adapter_files(folder)
    write_student(folder, Student("some/encoder", OWN))
    name = student_name(folder)
    (folder / "probe.json").write_text("[]")
    (folder / "0123456789abcdef.gguf").write_bytes(b"converted")
    assert student_name(folder) == name
    assert check_student(folder, name) == Student("some/encoder", OWN)
    for file in ("student.json", "head.npz", "adapter_model.safetensors", "frame.json"):
        before = (folder / file).read_bytes()
        (folder / file).write_bytes(before + b" ")
        with pytest.raises(VersionError, match=f"other files than version {name} was made of"):
            check_student(folder, name)
        (folder / file).write_bytes(before)


def test_an_adapter_is_found_beside_the_student_under_the_name_of_its_own_content(folder: Path) -> None:
    plain = adapter_files(folder.parent / "plain")
    (folder.parent / "plain").rename(folder.parent / plain)
    whole = folder.parent / "whole"
    shutil.copytree(folder.parent / plain, whole)
    (whole / "head.npz").write_bytes(b"numbers")
    write_student(whole, Student("some/encoder", OWN))
    held = student_name(whole)
    whole.rename(folder.parent / held)
    for named in (plain, held):
        assert adapter_of(folder, Student("some/encoder", named)) == (plain, folder.parent / named)
    assert adapter_of(folder, Student("some/encoder", None)) is None
    assert adapter_of(folder.parent / held, Student("some/encoder", OWN)) == (plain, folder.parent / held)


def test_an_adapter_that_is_gone_changed_or_none_is_refused(folder: Path) -> None:
    with pytest.raises(VersionError, match="does not exist: restore that folder"):
        adapter_of(folder, Student("some/encoder", "0123456789abcdef"))
    name = adapter_files(folder.parent / "plain")
    (folder.parent / "plain").rename(folder.parent / name)
    (folder.parent / name / "frame.json").write_bytes(b"changed")
    with pytest.raises(VersionError, match=f"other files than version {name}"):
        adapter_of(folder, Student("some/encoder", name))
    write_student(folder, Student("some/encoder", None))
    headed = student_name(folder)
    folder.rename(folder.parent / headed)
    with pytest.raises(VersionError, match="whose folder holds none"):
        adapter_of(folder, Student("some/encoder", headed))


GOOD: dict[str, Any] = {"format": 1, "head": {"encoder": "e"}, "adapter": None, "sure": None, "combiner": None}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format": 2}, "has format 2, and this Apprentice reads 1; upgrade"),
        ({"format": None}, "has format None"),
        ({"head": {}}, "names no encoder"),
        ({"head": "e"}, "names no encoder"),
        ({"head": None}, "neither a head nor an adapter"),
        ({"adapter": "../other"}, "'../other', which is no version's name"),
        ({"adapter": "/etc"}, "no version's name"),
        ({"adapter": ".."}, "no version's name"),
        ({"adapter": "a/b"}, "no version's name"),
        ({"adapter": "name\n"}, "no version's name"),
        ({"adapter": 3}, "no version's name"),
        ({"sure": 1.5}, "sure from 1.5 on"),
        ({"sure": True}, "sure from True on"),
        ({"sure": float("nan")}, "sure from nan on"),
        ({"combiner": [1]}, "not made of finite numbers"),
        ({"combiner": {"both": [0.1, float("inf")]}}, "not made of finite numbers"),
    ],
)
def test_a_student_that_cannot_be_is_refused(folder: Path, change: dict[str, Any], why: str) -> None:
    (folder / "student.json").write_text(json.dumps(GOOD | change))
    with pytest.raises(VersionError, match=why):
        read_student(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_file_that_is_no_student_is_refused(folder: Path, content: bytes) -> None:
    (folder / "student.json").write_bytes(content)
    with pytest.raises(VersionError, match=r"student\.json"):
        read_student(folder)


def test_a_head_without_its_file_is_refused(folder: Path) -> None:
    (folder / "head.npz").unlink()
    with pytest.raises(VersionError, match="no file of the head"):
        write_student(folder, Student("e", None))
