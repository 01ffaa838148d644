"""Asking an engine for many answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from apprentice.errors import OutputError
from apprentice.local.engine import Engine, LocalAnswer

__all__ = ["answer_all"]

_CHUNK = 32


def answer_all(
    engine: Engine, version: str, inputs: Sequence[Mapping[str, Any]], progress: Callable[[float], None]
) -> list[LocalAnswer | Exception]:
    """Answer in chunks. An engine that is down is no finding about a candidate: its error is raised."""
    answers: list[LocalAnswer | Exception] = []
    for start in range(0, len(inputs), _CHUNK):
        for answer in engine.answer_many(version, inputs[start : start + _CHUNK]):
            if isinstance(answer, Exception) and not isinstance(answer, OutputError):
                raise answer
            answers.append(answer)
        progress(len(answers) / len(inputs))
    return answers
