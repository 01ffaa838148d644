"""The seam to a vendor's API, without I/O: a provider builds a request and reads a response; the teacher sends it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import httpx

from apprentice.registry import Plugin
from apprentice.remote.transport import Request
from apprentice.schemas.schema import compact_json
from apprentice.settings.config import ProviderSettings
from apprentice.store import Usage

__all__ = [
    "FORMATS",
    "Body",
    "Completion",
    "Format",
    "MalformedAnswer",
    "Prompt",
    "Provider",
    "ProviderPlugin",
    "Turn",
    "VendorError",
    "address",
    "schema_in_words",
    "text_of",
]

type Format = Literal["json_schema", "json_object", "none"]
"""How an answer's format is asked for: enforced by the vendor, bound to be JSON, or asked for in words alone."""

FORMATS: tuple[Format, ...] = ("json_schema", "json_object", "none")
"""From the strictest to the one that every server takes."""

_TEXT_PARTS = ("text", "output_text")


@dataclass(frozen=True, slots=True)
class Turn:
    """An answer that did not fit, and what was wrong with it: the repair shows both to the model."""

    answer: str
    complaint: str

    @property
    def shown(self) -> str:
        """The answer as a turn of a conversation; vendors refuse an empty one."""
        return self.answer if self.answer.strip() else "(no answer)"


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What is the same in every request of a task; one for each ``format``. Providers prepare for it by identity."""

    task: str
    system: str
    schema: Mapping[str, Any]
    max_output_tokens: int
    format: Format = "json_schema"


@dataclass(frozen=True, slots=True)
class Completion:
    """A vendor's whole answer. ``usage`` is None where the vendor did not say what it billed.

    ``stop``: "end", "length" (cut off at the limit) or "refusal" (the model or a filter declined). ``reason`` is the
    vendor's own word for any stop but the ordinary one, "" where it gave none.
    """

    text: str
    usage: Usage | None
    stop: Literal["end", "length", "refusal"] = "end"
    reason: str = ""


class MalformedAnswer(Exception):
    """A 2xx response that is not what the vendor's reference promises; whether it was billed is unknown."""


class VendorError(Exception):
    """An error in the place where an answer belongs. ``error`` is the vendor's own object."""

    def __init__(self, error: object) -> None:
        self.error: dict[str, Any] = error if isinstance(error, dict) else {"message": str(error)[:1000]}
        super().__init__("an error in the place of an answer")


class Provider(Protocol):
    """One vendor's protocol, bound to a model, an endpoint and a key. Stateless but for what it has prepared."""

    name: str
    model: str

    def build(self, prompt: Prompt, user: str, turns: Sequence[Turn] = ()) -> Request:
        """The request for one input; ``turns`` are failed answers to be repaired."""

    def parse(self, body: Any) -> Completion:
        """Read the JSON body of a 2xx response, which may be anything.

        Raises `VendorError` where it holds an error, `MalformedAnswer` or whatever else a body of another shape causes.
        """


class ProviderPlugin(Plugin, ABC):
    """The base class of what `remote.provider` names: a `Provider` that says how it is made from its section."""

    needs: ClassVar[tuple[str, ...]] = ("api_key_env",)
    """Keys of its section that must be there."""
    most_enum_values: ClassVar[int | None] = None
    """How many words of enums the vendor enforces in one schema, at most; None if it names no limit."""

    @staticmethod
    def dialect(schema: Mapping[str, Any]) -> dict[str, Any] | None:
        """The schema as the vendor takes it to enforce it; None if it cannot."""
        return None

    @classmethod
    @abstractmethod
    def configured(cls, settings: ProviderSettings, key: str, options: Any) -> Provider:
        """Made from its section, its key ("" if it names none) and an instance of ``Options``, None without one."""


class Body:
    """A request's JSON body. Its last member alone differs between the requests of a task: the rest is written once."""

    def __init__(self, last: str) -> None:
        self._last = last
        self._written: dict[Prompt, str] = {}

    def write(self, prompt: Prompt, fixed: Callable[[Prompt], Mapping[str, Any]], value: Any) -> bytes:
        """``{**fixed(prompt), last: value}`` in UTF-8."""
        start = self._written.get(prompt)
        if start is None:
            start = self._written[prompt] = f'{compact_json(fixed(prompt))[:-1]},"{self._last}":'
        return f"{start}{compact_json(value)}}}".encode("utf-8", "replace")


def address(base_url: str, path: str) -> str:
    """``path`` below a base URL, whose query stays (gateways put versions there)."""
    base = httpx.URL(base_url)
    return str(base.copy_with(path=base.path.rstrip("/") + path))


def schema_in_words(system: str, schema: Mapping[str, Any]) -> str:
    """A system prompt that shows the schema, where the vendor has no other way of being told."""
    return f"{system}\n\nThe JSON Schema of the answer:\n{compact_json(schema)}"


def text_of(content: Any) -> str:
    """The text of a message's content: itself, or its text parts joined; what the model thought aloud is left out.

    Raises `MalformedAnswer`.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise MalformedAnswer(f"its content is a {type(content).__name__}")
    texts = []
    for part in content:
        if not isinstance(part, Mapping):
            raise MalformedAnswer(f"a part of its content is a {type(part).__name__}")
        if part.get("type", "text") in _TEXT_PARTS and not part.get("thought"):
            text = part.get("text") or ""
            if not isinstance(text, str):
                raise MalformedAnswer(f"the text of a part is a {type(text).__name__}")
            texts.append(text)
    return "".join(texts)
