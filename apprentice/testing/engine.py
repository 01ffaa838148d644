"""An engine with no model: it answers what a function says, as slowly and as faultily as it is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from apprentice.errors import ApprenticeError, EngineUnavailable, OutputError, VersionError
from apprentice.local.engine import Health, LoadedVersion, LocalAnswer, Version
from apprentice.schemas.schema import SchemaError

__all__ = ["FakeEngine"]

type Answerer = Callable[[Version, Mapping[str, Any]], Mapping[str, Any] | tuple[Mapping[str, Any], float]]
"""Gives a version's output for an input, alone or with its confidence; may raise."""


class FakeEngine:
    """Holds versions and drains them as a real engine does; what it answers is up to ``answerer``.

    Faults can be set at any time: ``down`` makes everything fail with `EngineUnavailable`, ``hanging`` makes every
    answer take its whole deadline, ``refuses`` names versions whose load raises the given error, ``latency_s``
    delays every answer and ``load_s`` every load. ``sleep`` is how it waits.
    """

    def __init__(self, answerer: Answerer, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self.answerer = answerer
        self.down = False
        self.hanging = False
        self.refuses: dict[str, Exception] = {}
        self.latency_s = 0.0
        self.load_s = 0.0
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self._sleep = sleep
        self._versions: dict[str, Version] = {}
        self._in_flight: dict[str, int] = {}
        self._leaving: set[str] = set()
        self._changed = threading.Condition()
        self._closed = False

    def load(self, version: Version) -> None:
        """Hold a version, unless it is down or refuses it."""
        self._check_up()
        if self.load_s:
            self._sleep(self.load_s)
        if version.name in self.refuses:
            raise self.refuses[version.name]
        with self._changed:
            self.loads.append(version.name)
            self._leaving.discard(version.name)
            self._versions[version.name] = version
            self._in_flight.setdefault(version.name, 0)

    def answer(self, version: str, value: Mapping[str, Any], *, deadline_s: float) -> LocalAnswer:
        """What ``answerer`` says, checked against the version's schema."""
        self._check_up()
        with self._changed:
            held = self._versions.get(version)
            if held is None or version in self._leaving:
                raise VersionError(f"version {version} is not loaded; load it first")
            self._in_flight[version] += 1
        try:
            if self.hanging or self.latency_s > deadline_s:
                self._sleep(deadline_s)
                raise EngineUnavailable(f"the fake engine did not answer within {deadline_s:g} s")
            if self.latency_s:
                self._sleep(self.latency_s)
            return self._answer(held, value)
        finally:
            with self._changed:
                self._in_flight[version] -= 1
                self._changed.notify_all()

    def _answer(self, held: Version, value: Mapping[str, Any]) -> LocalAnswer:
        said = self.answerer(held, value)
        output, confidence = said if isinstance(said, tuple) else (said, 1.0)
        try:
            checked = held.output_schema.check(dict(output))
        except SchemaError as error:
            raise OutputError(held.task, "the local model", error.problems) from None
        return LocalAnswer(checked, confidence, dict.fromkeys(checked, confidence), held.name, 0, 0)

    def answer_many(self, version: str, values: Sequence[Mapping[str, Any]]) -> list[LocalAnswer | Exception]:
        """One by one, errors in their places."""
        answers: list[LocalAnswer | Exception] = []
        for value in values:
            try:
                answers.append(self.answer(version, value, deadline_s=float("inf")))
            except ApprenticeError as error:
                answers.append(error)
        return answers

    def unload(self, version: str) -> None:
        """Let go of a version once its answers are out."""
        with self._changed:
            if version not in self._versions:
                return
            self._leaving.add(version)
            self._changed.wait_for(lambda: not self._in_flight[version] or self._closed)
            if version in self._leaving:
                self._leaving.discard(version)
                self._versions.pop(version, None)
                self.unloads.append(version)

    def loaded(self) -> list[LoadedVersion]:
        """What it holds; nothing takes memory."""
        with self._changed:
            return [LoadedVersion(v.name, v.task, 0) for v in self._versions.values()]

    def forget(self) -> None:
        """Lose every version, as a restarted server does."""
        with self._changed:
            self._versions.clear()

    def health(self) -> Health:
        """Down, closed or well."""
        return Health(not (self.down or self._closed), "the fake engine is down" if self.down else "")

    def close(self) -> None:
        """Refuse everything from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _check_up(self) -> None:
        if self.down or self._closed:
            raise EngineUnavailable("the fake engine is down")
