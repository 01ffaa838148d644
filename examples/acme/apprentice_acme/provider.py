"""`remote.provider: acme`."""

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel

from apprentice.remote.provider import (
    Completion,
    MalformedAnswer,
    Prompt,
    ProviderPlugin,
    Turn,
    address,
    schema_in_words,
)
from apprentice.remote.transport import Endpoint, Request
from apprentice.remote.usage import usage_of
from apprentice.settings.config import ProviderSettings


class Acme(ProviderPlugin):
    """Acme's completion API. It knows no schemas: the prompt shows the schema, and the answer is checked here."""

    name = "acme"

    class Options(BaseModel, extra="forbid"):
        """`remote.options`."""

        region: Literal["eu", "us"] = "eu"

    def __init__(self, model: str, key: str, url: str) -> None:
        self.model = model
        self._endpoint = Endpoint(address(url, "/complete"), ("x-acme-key", key))

    @classmethod
    def configured(cls, settings: ProviderSettings, key: str, options: Any) -> "Acme":
        return cls(settings.model, key, settings.base_url or f"https://{options.region}.acme.example/v2")

    def build(self, prompt: Prompt, user: str, turns: Sequence[Turn] = ()) -> Request:
        said = [user, *(text for turn in turns for text in (turn.shown, turn.complaint))]
        body = {
            "model": self.model,
            "system": schema_in_words(prompt.system, prompt.schema),
            "said": said,
            "most_tokens": prompt.max_output_tokens,
        }
        return Request(self._endpoint, json.dumps(body).encode())

    def parse(self, body: Any) -> Completion:
        if "answer" not in body:
            raise MalformedAnswer("it holds no answer")
        usage = usage_of(body.get("tokens_read"), body.get("tokens_written"))
        return Completion(body["answer"], usage, "length" if body.get("cut_off") else "end")
