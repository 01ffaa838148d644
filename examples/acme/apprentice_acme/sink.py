"""`alerts.sinks.pager`."""

import os
from typing import Any

import httpx
from pydantic import BaseModel

from apprentice.events.sinks import SinkPlugin, Undelivered, message
from apprentice.secrets import register
from apprentice.store.records import EventRecord


class Pager(SinkPlugin):
    """Wakes somebody."""

    name = "pager"

    class Options(BaseModel, extra="forbid"):
        """`alerts.sinks.pager`. The key's variable is named, never the key."""

        url: str = "https://pager.acme.example/incidents"
        key_env: str

    def __init__(self, url: str, key: str) -> None:
        register(key)  # from now on no text shows it
        self._url, self._key = url, key

    @classmethod
    def configured(cls, options: Any) -> "Pager":
        return cls(options.url, os.environ.get(options.key_env, ""))

    def send(self, event: EventRecord, timeout_s: float) -> None:
        headers = {"x-acme-key": self._key}
        response = httpx.post(self._url, json=message(event), headers=headers, timeout=timeout_s)
        if not response.is_success:
            raise Undelivered(f"it answered {response.status_code}", again=response.status_code >= 500)
