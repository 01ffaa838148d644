"""Any server that speaks OpenAI's Chat Completions: a gateway, another vendor's, one of your own."""

from __future__ import annotations

from typing import Any

from apprentice.remote.providers.openai import OpenAIChat
from apprentice.settings.config import ProviderSettings

__all__ = ["OpenAICompatible"]


class OpenAICompatible(OpenAIChat):
    """Chat Completions elsewhere. The key may be left out, the address may not."""

    needs = ("base_url",)

    @classmethod
    def configured(cls, settings: ProviderSettings, key: str, options: Any) -> OpenAICompatible:
        return cls(settings.model, key, settings.base_url, name="openai_compatible")


REGISTERED = OpenAICompatible
