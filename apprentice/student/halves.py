"""Which halves a task's student is to have, and which a version has."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from apprentice.settings.config import Settings
from apprentice.student.fields import finite_fields

__all__ = ["Wanted", "halves_of", "halves_wanted"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Whether a task's students have a ``head`` and a ``lora``; ``alone``: whether a head can answer by itself."""

    head: bool
    lora: bool
    alone: bool


class _Recorded(Protocol):
    @property
    def record(self) -> Any: ...


def halves_wanted(settings: Settings, task: str) -> Wanted:
    """What configuration, output schema and installed packages make of it.

    A head decides among finitely many values, so a task that has no such field has none, and one that has others beside
    them needs an adapter for those. `apprentice check` says if a head that was asked for cannot be had.
    """
    local, own = settings.local, settings.task(task)
    schema = own.output_schema
    fields = finite_fields(schema)
    asked = local.student.head if own.student.head is None else own.student.head
    lora = local.student.lora if own.student.lora is None else own.student.lora
    head = bool(fields) and (asked is True or (asked is None and is_installed()))
    alone = head and set(fields) == set(schema.fields)
    return Wanted(head and (alone or lora), lora, alone)


def is_installed() -> bool:
    """Whether the extra `head` is there."""
    return importlib.util.find_spec("sentence_transformers") is not None


def halves_of(version: _Recorded) -> Sequence[str]:
    """The halves that a version was assembled of; one from before there were heads is an adapter."""
    halves: Sequence[str] = version.record.get("halves", ("lora",))
    return halves
