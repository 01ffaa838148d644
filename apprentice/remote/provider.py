"""The seam to a vendor's API, without I/O: a provider builds a request and reads a response; the teacher sends it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from apprentice.schema import compact_json
from apprentice.store import Usage
from apprentice.transport import Request

__all__ = ["Body", "Completion", "MalformedAnswer", "Prompt", "Provider", "Turn"]


@dataclass(frozen=True, slots=True)
class Turn:
    """An answer that did not fit, and what was wrong with it: the repair shows both to the model."""

    answer: str
    complaint: str


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What is the same in every request of a task. Made once per task, so providers prepare for it by identity."""

    task: str
    system: str
    schema: Mapping[str, Any]
    max_output_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """A vendor's whole answer. ``usage`` is None where the vendor did not say what it billed.

    ``stop``: "end", "length" (cut off at the limit) or "refusal" (the model or a filter declined).
    """

    text: str
    usage: Usage | None
    stop: Literal["end", "length", "refusal"] = "end"


class MalformedAnswer(Exception):
    """A 2xx response that is not what the vendor's reference promises; whether it was billed is unknown."""


class Provider(Protocol):
    """One vendor's protocol, bound to a model, an endpoint and a key. Stateless but for what it has prepared."""

    name: str
    model: str

    def build(self, prompt: Prompt, user: str, turns: Sequence[Turn] = ()) -> Request:
        """The request for one input; ``turns`` are failed answers to be repaired."""

    def parse(self, body: dict[str, Any]) -> Completion:
        """Read the body of a 2xx response.

        Raises `MalformedAnswer`, or any LookupError, TypeError or AttributeError that a body of another shape causes.
        """


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
