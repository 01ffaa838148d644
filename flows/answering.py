"""Asking an engine for many answers, and not again for those that it gave before."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from apprentice import secrets
from apprentice.errors import OutputError
from apprentice.local.engine import Engine, LocalAnswer
from flows.dataset import write_whole
from flows.trainers import TrainingRow

__all__ = ["RememberedAnswers", "answer_all"]

_log = secrets.logger("apprentice.coach")
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


class RememberedAnswers:
    """What an adapter answered to examples, by their ids, kept beside a task's datasets. ``adapter`` names its content.

    Its answers never change, so each refit beside it asks for new examples only. Bounded by ``most``, the newest asked;
    a damaged file is begun anew.
    """

    def __init__(self, folder: Path, adapter: str, *, most: int = 10_000) -> None:
        self._path = folder / f"answers-{adapter}.json"
        self._most = most
        self._known: dict[str, dict[str, Any] | None] = {}
        try:
            self._known = dict(json.loads(self._path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError) as error:
            _log.warning("%s is begun anew: %s", self._path, error)

    def knows(self, row: TrainingRow) -> bool:
        """Whether this example was answered before."""
        return row.id in self._known

    def answers(
        self,
        rows: Sequence[TrainingRow],
        ask: Callable[[Sequence[Mapping[str, Any]]], Sequence[LocalAnswer | None]],
    ) -> list[LocalAnswer | None]:
        """The answer to every example, ``ask`` being asked for the unknown ones; None if it does not fit the schema."""
        new = [row for row in rows if not self.knows(row)]
        if new:
            for row, answer in zip(new, ask([row.input for row in new]), strict=True):
                self._known[row.id] = None if answer is None else asdict(replace(answer, cost=None))
        found = [self._known[row.id] for row in rows]
        return [None if one is None else LocalAnswer(**one) for one in found]

    def save(self) -> None:
        """Keep what is known, whole or not at all."""
        while len(self._known) > self._most:
            del self._known[next(iter(self._known))]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, json.dumps(self._known, ensure_ascii=False, separators=(",", ":")) + "\n")
