"""`local.backend: rote`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, Field

from apprentice.errors import OutputError, Problem, VersionError
from apprentice.local.adapter import CONFIG
from apprentice.local.engine import EnginePlugin, EngineSetup, Health, LoadedVersion, LocalAnswer, Version


class Rote(EnginePlugin):
    """Knows the examples of a version by heart, and guesses the first one's answer for any other input."""

    class Options(BaseModel, extra="forbid"):
        """`local.backend_options`."""

        guess: float = Field(0.1, ge=0, le=1)

    def __init__(self, guess: float) -> None:
        self._guess = guess
        self._held: dict[str, tuple[Version, dict[str, Any]]] = {}

    @classmethod
    def configured(cls, setup: EngineSetup, options: Any) -> "Rote":
        return cls(options.guess)

    def load(self, version: Version) -> None:
        answers = {}  # the base model, which knows nothing: a run asks it, to see what its training has changed
        if version.adapter is not None:
            answers = json.loads((version.adapter / CONFIG).read_text(encoding="utf-8"))
        self._held[version.name] = version, answers

    def answer(self, version: str, value: Mapping[str, Any], *, deadline_s: float) -> LocalAnswer:
        if version not in self._held:
            raise VersionError(f"version {version} is not loaded")
        of, answers = self._held[version]
        if not answers:
            raise OutputError(of.task, "local", [Problem("answer", "is missing: nothing was learned by heart.")])
        asked = of.prompt(value)
        output = answers.get(asked) or next(iter(answers.values()))
        sure = 1.0 if asked in answers else self._guess
        return LocalAnswer(output, sure, dict.fromkeys(output, sure), version, len(asked), len(output))

    def answer_many(self, version: str, values: Sequence[Mapping[str, Any]]) -> list[LocalAnswer | Exception]:
        answers: list[LocalAnswer | Exception] = []
        for value in values:
            try:
                answers.append(self.answer(version, value, deadline_s=1.0))
            except OutputError as error:
                answers.append(error)
        return answers

    def unload(self, version: str) -> None:
        self._held.pop(version, None)

    def loaded(self) -> list[LoadedVersion]:
        return [LoadedVersion(name, of.task, None) for name, (of, _) in self._held.items()]

    def health(self) -> Health:
        return Health(True)

    def close(self) -> None:
        self._held.clear()
