"""Google's Gemini API, generateContent.

``responseSchema`` is a subset of OpenAPI; where it cannot say the task's schema, the schema goes into the system
instruction and the answer is only bound to be JSON. Gemini caches common prefixes by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from apprentice.remote.dialects import gemini
from apprentice.remote.provider import (
    Body,
    Completion,
    MalformedAnswer,
    Prompt,
    Turn,
)
from apprentice.schema import compact_json
from apprentice.store import Usage
from apprentice.transport import Endpoint, Request

__all__ = ["Google"]

_FINISHED = ("STOP", "FINISH_REASON_UNSPECIFIED", None)


class Google:
    """Asks one Gemini model."""

    name = "google"

    def __init__(self, model: str, key: str, base_url: str | None = None) -> None:
        self.model = model.removeprefix("models/")
        base = (base_url or "https://generativelanguage.googleapis.com/v1beta").rstrip("/")
        # the key in a header and never in the URL, which is logged
        self._endpoint = Endpoint(f"{base}/models/{self.model}:generateContent", ("x-goog-api-key", key))
        self._body = Body("contents")

    def __repr__(self) -> str:
        return f"Google({self.model!r})"

    def build(self, prompt: Prompt, user: str, turns: Sequence[Turn] = ()) -> Request:
        contents: list[dict[str, Any]] = [{"role": "user", "parts": [{"text": user}]}]
        for turn in turns:
            contents.append({"role": "model", "parts": [{"text": turn.answer or "(no answer)"}]})
            contents.append({"role": "user", "parts": [{"text": turn.complaint}]})
        body = self._body.write(prompt, self._fixed, contents)
        return Request(self._endpoint, body)

    def _fixed(self, prompt: Prompt) -> dict[str, Any]:
        schema = gemini(prompt.schema)
        system = prompt.system
        generation: dict[str, Any] = {
            "maxOutputTokens": prompt.max_output_tokens,
            "responseMimeType": "application/json",
        }
        if schema is not None:
            generation["responseSchema"] = schema
        else:
            system += f"\n\nThe schema: {compact_json(prompt.schema)}"
        return {"systemInstruction": {"parts": [{"text": system}]}, "generationConfig": generation}

    def parse(self, body: dict[str, Any]) -> Completion:
        usage = _usage(body.get("usageMetadata"))
        candidates = body.get("candidates")
        if not candidates:
            if (body.get("promptFeedback") or {}).get("blockReason"):
                return Completion("", usage, "refusal")
            raise MalformedAnswer("the answer holds no candidates")
        candidate = candidates[0]
        parts = (candidate.get("content") or {}).get("parts") or ()
        text = "".join(part.get("text", "") for part in parts if not part.get("thought"))
        finish = candidate.get("finishReason")
        if finish in _FINISHED:
            return Completion(text, usage)
        return Completion(text, usage, "length" if finish == "MAX_TOKENS" else "refusal")


def _usage(reported: Any) -> Usage | None:
    if not isinstance(reported, dict) or not isinstance(reported.get("promptTokenCount"), int):
        return None
    thoughts = reported.get("thoughtsTokenCount") or 0
    return Usage(
        input=reported["promptTokenCount"] + (reported.get("toolUsePromptTokenCount") or 0),
        output=(reported.get("candidatesTokenCount") or 0) + thoughts,
        cached=reported.get("cachedContentTokenCount") or 0,
        reasoning=thoughts,
    )
