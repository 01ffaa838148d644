"""The folder of a student: student.json, which says what its halves are, and the name that its content gives it.

    student.json     the format's number, the head's encoder, where the adapter lies, from where on the head is sure,
                     the combiner's numbers
    head.*           the head, if it has one (`Head`)
    adapter files    the adapter's own, if it lies here and not in another version's folder (see `local.adapter`)
    probe.json       answers that prove a loaded copy is this one (`Probe`); decides no answer, is not in the name

A folder without student.json is a plain adapter version. Whatever does not fit is a `VersionError` before an engine
sees it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apprentice.errors import VersionError
from apprentice.local import adapter

__all__ = [
    "OWN",
    "Student",
    "adapter_of",
    "check_student",
    "head_files",
    "holder_of",
    "read_student",
    "student_name",
    "write_student",
]

FILE = "student.json"
FORMAT = 1
OWN = "own"
"""As ``adapter``: its files lie in the student's own folder."""

_ADAPTER_FILES = (adapter.CONFIG, adapter.WEIGHTS, adapter.FRAME)
# A version's name and no path: it is joined to the folder that holds the task's versions.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_AGAIN = "assemble the version again, or restore the file"


@dataclass(frozen=True, slots=True)
class Student:
    """What student.json says.

    ``encoder`` is the name of the head's sentence encoder, None if there is no head. ``adapter`` is None (there is
    none), `OWN`, or the name of the version whose folder, beside this one, holds it. ``sure`` is the confidence from
    which on the head answers without the adapter, None if the adapter is always asked. ``combiner`` are the numbers of
    a `Combiner`, None if nothing was learnt of how to combine the halves.
    """

    encoder: str | None
    adapter: str | None
    sure: float | None = None
    combiner: Mapping[str, Any] | None = None


def write_student(folder: Path, student: Student) -> None:
    """Write student.json; the head's and an own adapter's files are to be there already. Raises `VersionError`."""
    head = None if student.encoder is None else {"encoder": student.encoder}
    document = {
        "format": FORMAT,
        "head": head,
        "adapter": student.adapter,
        "sure": student.sure,
        "combiner": student.combiner,
    }
    _student(document, folder)
    text = json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def read_student(folder: Path) -> Student | None:
    """What student.json says, None where there is none: a plain adapter. Raises `VersionError`."""
    path = folder / FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise VersionError(f"{path} cannot be read ({error}); {_AGAIN}") from None
    return _student(document, folder)


def _student(document: Any, folder: Path) -> Student:
    """Check a document, and that what it names is in the folder."""
    path = folder / FILE
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else document
        raise VersionError(
            f"{path} has format {found!r}, and this Apprentice reads {FORMAT}; upgrade it or assemble the version again"
        )
    head, named = document.get("head"), document.get("adapter")
    sure, combiner = document.get("sure"), document.get("combiner")
    encoder = head.get("encoder") if isinstance(head, dict) else None
    if head is not None and (not isinstance(encoder, str) or not encoder):
        raise VersionError(f"{path} gives the head {head!r}, which names no encoder; {_AGAIN}")
    if named is not None and (not isinstance(named, str) or not _NAME.fullmatch(named)):
        raise VersionError(f"{path} names the adapter {named!r}, which is no version's name; {_AGAIN}")
    if head is None and named is None:
        raise VersionError(f"{path} has neither a head nor an adapter, so nothing would answer; {_AGAIN}")
    if sure is not None and (type(sure) not in (int, float) or not 0.0 <= sure <= 1.0):
        raise VersionError(f"{path} has the head be sure from {sure!r} on, which is no number in [0, 1]; {_AGAIN}")
    if combiner is not None and not (isinstance(combiner, dict) and _is_finite(combiner)):
        raise VersionError(f"{path} has a combiner that is not made of finite numbers; {_AGAIN}")
    if head is not None and not head_files(folder):
        raise VersionError(f"{folder} has no file of the head that {FILE} tells of; {_AGAIN}")
    return Student(encoder, named, None if sure is None else float(sure), combiner)


def _is_finite(value: Any) -> bool:
    """Whether every number within is finite: Python reads NaN and Infinity as JSON."""
    todo = [value]
    while todo:
        value = todo.pop()
        if isinstance(value, float) and not math.isfinite(value):
            return False
        todo += value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return True


def head_files(folder: Path) -> list[Path]:
    """The head's files, in the order of their names."""
    return sorted(path for path in folder.glob("head.*") if path.is_file())


def student_name(folder: Path) -> str:
    """The version's name: the first 16 hex digits of the SHA-256 over all files that decide its answers.

    Of a plain adapter folder it is the adapter's (`content_name`). Raises `VersionError`.
    """
    student = read_student(folder)
    if student is None:
        return adapter.content_name(folder)
    own = [folder / name for name in _ADAPTER_FILES] if student.adapter == OWN else []
    digest = hashlib.sha256()
    for path in [folder / FILE, *head_files(folder), *own]:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise VersionError(f"{path} cannot be read ({error.strerror}); {_AGAIN}") from None
        digest.update(f"{path.name}:{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def check_student(folder: Path, name: str) -> Student | None:
    """Read a folder that must hold the version ``name``; None for a plain adapter, which its engine checks.

    Raises `VersionError`.
    """
    student = read_student(folder)
    if student is None:
        return None
    found = student_name(folder)
    if found != name:
        raise VersionError(
            f"{folder} holds other files than version {name} was made of (their name would be {found}); "
            "restore the folder, or assemble the version again"
        )
    return student


def holder_of(name: str, student: Student) -> str | None:
    """The version whose folder holds the adapter of version ``name``, which may be itself; None if it has none."""
    return name if student.adapter == OWN else student.adapter


def adapter_of(folder: Path, student: Student) -> tuple[str, Path] | None:
    """The adapter's name and the folder that holds it, None if the student has none. Raises `VersionError`.

    The name is that of the adapter's own content, whichever student's folder it lies in: students that share an
    adapter share it in the engine too.
    """
    if student.adapter is None:
        return None
    if student.adapter == OWN:
        return adapter.content_name(folder), folder
    there = folder.parent / student.adapter
    if not there.is_dir():
        raise VersionError(
            f"{folder} uses the adapter of version {student.adapter}, and {there} does not exist: restore that folder"
        )
    found = student_name(there)
    if found != student.adapter:
        raise VersionError(
            f"{there} holds other files than version {student.adapter} was made of (their name would be {found}); "
            "restore the folder, or train again"
        )
    holder = read_student(there)
    if holder is not None and holder.adapter != OWN:
        raise VersionError(f"{folder} uses the adapter of version {student.adapter}, whose folder holds none; {_AGAIN}")
    return adapter.content_name(there), there
