"""The seam between Apprentice and whatever runs the local model.

An engine holds one base model and any number of versions (adapters) of it, and answers for a version by name. A
version's name is the content hash of its adapter folder, so the same name is the same weights everywhere and forever.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from apprentice.prompts import compact_prompt
from apprentice.registry import Plugin
from apprentice.schemas.schema import Schema

if TYPE_CHECKING:
    from apprentice.local.leases import Leases
    from apprentice.money.budget import Budget
    from apprentice.settings.config import LocalSettings

__all__ = ["AnsweredBy", "Engine", "EnginePlugin", "EngineSetup", "Health", "LoadedVersion", "LocalAnswer", "Version"]


type AnsweredBy = Literal["head", "lora", "both"]
"""Which half of a student answered; an engine's own answers are by its adapter."""


@dataclass(frozen=True, slots=True)
class Version:
    """A trained version of a task's local model, as an engine needs to know it.

    ``adapter`` is the folder of a student (student.json) or what the trainer wrote (PEFT files and frame.json), or None
    for the untrained base model; ``remote_model`` is set instead where a vendor serves the fine-tuned model.
    ``input_schema`` is the task's, by which prompts are written; None if every input has the same fields.
    """

    name: str
    task: str
    adapter: Path | None
    output_schema: Schema
    remote_model: str | None = None
    input_schema: Schema | None = None

    def prompt(self, value: Mapping[str, Any]) -> str:
        """What the model is asked for an input: what it was trained on."""
        return compact_prompt(value, self.input_schema)


@dataclass(frozen=True, slots=True)
class LocalAnswer:
    """An answer of the local model. ``output`` fits the schema; else the engine raises `OutputError`.

    ``confidence`` is g, in [0, 1]: the probability of the values' tokens, the weakest field counting
    (docs/engines.md, "Confidence"); ``field_confidence`` has it by field. ``cost`` is what a vendor bills for it, in
    USD and in the ledger already; None where nobody sends a bill.

    ``distributions`` hold, by top-level field of finitely many values, the probability of every allowed value by its
    JSON text, as far as the engine knows them; None if it only knows what it chose.
    """

    output: dict[str, Any]
    confidence: float
    field_confidence: Mapping[str, float]
    version: str
    prompt_tokens: int
    answer_tokens: int
    cost: Decimal | None = None
    distributions: Mapping[str, Mapping[str, float]] | None = None
    answered_by: AnsweredBy = "lora"


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the engine answers, and in words why not."""

    ok: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class LoadedVersion:
    """One version an engine holds, and the memory that it alone takes (None where the engine cannot tell)."""

    name: str
    task: str
    bytes: int | None


@runtime_checkable
class Engine(Protocol):
    """What runs the local model. Safe to call from many threads at once."""

    def load(self, version: Version) -> None:
        """Make a version ready to answer, again if what held it has died. Idempotent.

        Raises `VersionError`, `EngineUnavailable`, `ConfigError`.
        """

    def answer(self, version: str, value: Mapping[str, Any], *, deadline_s: float) -> LocalAnswer:
        """Answer one input.

        Raises `EngineUnavailable` (down, or past the deadline), `VersionError` (it does not hold the version, or no
        longer: `load` it again), `OutputError` (this input is too long, or its answer does not fit), `EngineRefused`.
        """

    def answer_many(self, version: str, values: Sequence[Mapping[str, Any]]) -> list[LocalAnswer | Exception]:
        """Answer many inputs, as fast as the engine can; an input that fails has its exception in its place."""

    def unload(self, version: str) -> None:
        """Let go of a version once its answers in flight are out. Idempotent."""

    def loaded(self) -> list[LoadedVersion]:
        """What the engine holds."""

    def health(self) -> Health:
        """Whether the engine answers; cheap enough to ask every few seconds."""

    def close(self) -> None:
        """Release everything."""


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """What an engine is made with. Relative paths start at ``root``.

    ``leases``: how processes agree on what they use on a server that they share; None: nobody shares it. ``budget``
    pays for an engine whose answers cost money; None: nothing may cost.
    """

    settings: LocalSettings
    root: Path
    leases: Leases | None = None
    budget: Budget | None = None


class EnginePlugin(Plugin, ABC):
    """The base class of what `local.backend` names: an `Engine` that says how it is made from its section."""

    default_url: ClassVar[str | None] = None
    """Where its server is unless `local.url` says otherwise; None if it needs none."""
    keeps_models: ClassVar[bool] = False
    """Whether `local.base_model` is a name at its server, of which nothing lies on this machine."""

    @classmethod
    @abstractmethod
    def configured(cls, setup: EngineSetup, options: Any) -> Engine:
        """Made from its section and an instance of ``Options``, None without one. What is heavy waits for `load`."""
