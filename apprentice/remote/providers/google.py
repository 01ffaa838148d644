"""Google's Gemini API, generateContent.

``responseSchema`` is a subset of OpenAPI; where it cannot say the task's schema, the schema goes into the system
instruction and the answer is only bound to be JSON. Gemini caches common prefixes by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from apprentice.remote.dialects import gemini
from apprentice.remote.provider import (
    Body,
    Completion,
    MalformedAnswer,
    Prompt,
    ProviderPlugin,
    Turn,
    address,
    schema_in_words,
    text_of,
)
from apprentice.remote.transport import Endpoint, Request
from apprentice.remote.usage import total, usage_of
from apprentice.settings.config import ProviderSettings
from apprentice.store import Usage

__all__ = ["Google"]

_ORDINARY = ("STOP", "FINISH_REASON_UNSPECIFIED", None)
# The model stumbled; what text there is may be read, and repaired. All other reasons are a filter's.
_BROKEN = ("OTHER", "MALFORMED_FUNCTION_CALL", "MALFORMED_RESPONSE", "UNEXPECTED_TOOL_CALL", "TOO_MANY_TOOL_CALLS")


class Google(ProviderPlugin):
    """Asks one Gemini model."""

    name = "google"
    dialect = staticmethod(gemini)
    most_enum_values = 200

    def __init__(self, model: str, key: str, base_url: str | None = None) -> None:
        self.model = model.removeprefix("models/")
        base = base_url or "https://generativelanguage.googleapis.com/v1beta"
        # the key in a header and never in the URL, which is logged
        self._endpoint = Endpoint(address(base, f"/models/{self.model}:generateContent"), ("x-goog-api-key", key))
        self._body = Body("contents")

    @classmethod
    def configured(cls, settings: ProviderSettings, key: str, options: Any) -> Google:
        return cls(settings.model, key, settings.base_url)

    def __repr__(self) -> str:
        return f"Google({self.model!r})"

    def build(self, prompt: Prompt, user: str, turns: Sequence[Turn] = ()) -> Request:
        contents: list[dict[str, Any]] = [{"role": "user", "parts": [{"text": user}]}]
        for turn in turns:
            contents.append({"role": "model", "parts": [{"text": turn.shown}]})
            contents.append({"role": "user", "parts": [{"text": turn.complaint}]})
        body = self._body.write(prompt, self._fixed, contents)
        return Request(self._endpoint, body)

    def _fixed(self, prompt: Prompt) -> dict[str, Any]:
        schema = gemini(prompt.schema) if prompt.format == "json_schema" else None
        system = prompt.system
        generation: dict[str, Any] = {"maxOutputTokens": prompt.max_output_tokens}
        if prompt.format != "none":
            generation["responseMimeType"] = "application/json"
        if schema is not None:
            generation["responseSchema"] = schema
        else:
            system = schema_in_words(system, prompt.schema)
        return {"systemInstruction": {"parts": [{"text": system}]}, "generationConfig": generation}

    def parse(self, body: Any) -> Completion:
        usage = _usage(body.get("usageMetadata"))
        candidates = body.get("candidates")
        if not candidates:
            if blocked := (body.get("promptFeedback") or {}).get("blockReason"):
                return Completion("", usage, "refusal", str(blocked))
            raise MalformedAnswer("it holds no candidates")
        candidate = candidates[0]
        text = text_of((candidate.get("content") or {}).get("parts"))
        reason = candidate.get("finishReason")
        if reason in _ORDINARY:
            return Completion(text, usage)
        stop: Literal["length", "refusal", "end"] = "end"
        if reason == "MAX_TOKENS":
            stop = "length"
        elif reason not in _BROKEN:
            stop = "refusal"
        return Completion(text, usage, stop, str(reason))


def _usage(reported: Any) -> Usage | None:
    if not isinstance(reported, dict):
        return None
    thoughts = reported.get("thoughtsTokenCount")
    return usage_of(  # this vendor counts them apart
        total(reported.get("promptTokenCount"), reported.get("toolUsePromptTokenCount")),
        total(0, reported.get("candidatesTokenCount"), thoughts),
        cached=reported.get("cachedContentTokenCount"),
        reasoning=thoughts,
    )


REGISTERED = Google
