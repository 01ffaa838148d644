"""To whom events go, besides the store and the log."""

from __future__ import annotations

import math
import socket
from abc import ABC, abstractmethod
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

import httpx
from pydantic import BaseModel, ConfigDict

from apprentice import registry
from apprentice.events.kinds import EventKind
from apprentice.registry import Plugin
from apprentice.secrets import register_url, scrub_error, scrub_values
from apprentice.settings.config import AlertSettings, Url
from apprentice.store.records import EventRecord

__all__ = ["SINKS", "Sink", "SinkPlugin", "Undelivered", "Webhook", "message", "sinks_of"]

_LONGEST_PAUSE_S = 600.0
# As for a vendor: the server was busy, slow or restarting.
_AGAIN = frozenset({408, 409, 425, 429})


class Undelivered(Exception):
    """A sink did not take an event. ``again``: whether another try may help, in ``after_s`` seconds if it says so."""

    def __init__(self, message: str, *, again: bool = True, after_s: float | None = None) -> None:
        self.again = again
        self.after_s = after_s
        super().__init__(message)


class Sink(Protocol):
    """Takes events to somebody. Called from one background thread."""

    name: str

    def send(self, event: EventRecord, timeout_s: float) -> None:
        """Deliver one event. Raises `Undelivered`; what else it raises counts as that, to be tried again."""


class SinkPlugin(Plugin, ABC):
    """The base class of what `alerts.sinks` names: a `Sink` that says how it is made."""

    @classmethod
    @abstractmethod
    def configured(cls, options: Any) -> Sink:
        """Made from an instance of ``Options``, None without one."""


class Webhook(SinkPlugin):
    """POSTs `message` as JSON. The URL is a secret: at Slack and Teams whoever has it can write to the channel."""

    name = "webhook"

    class Options(BaseModel):
        """What `alerts.sinks` may say of it; `alerts.webhook` is short for that."""

        model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

        url: Url

    @classmethod
    def configured(cls, options: Any) -> Webhook:
        return cls(options.url)

    def __init__(self, url: str) -> None:
        register_url(url, whole=True)
        self._url = url

    def send(self, event: EventRecord, timeout_s: float) -> None:
        try:
            response = httpx.post(self._url, json=message(event), timeout=timeout_s)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            again = not isinstance(error, httpx.UnsupportedProtocol | httpx.InvalidURL)
            raise Undelivered(f"{type(error).__name__}: {error}", again=again) from scrub_error(error)
        if not response.is_success:
            status = response.status_code
            after_s = _seconds(response.headers.get("retry-after", ""))
            raise Undelivered(f"it answered {status}", again=status in _AGAIN or status >= 500, after_s=after_s)


SINKS: Mapping[str, type[SinkPlugin]] = {"webhook": Webhook}
"""Those that `alerts.sinks` names."""


def sinks_of(settings: AlertSettings) -> list[Sink]:
    """The sinks that a configuration names. Raises `RegistryError`."""
    sinks: list[Sink] = [Webhook(settings.webhook)] if settings.webhook else []
    for name, given in settings.sinks.items():
        kind = registry.SINKS.find(name)
        sinks.append(kind.made.configured(registry.SINKS.options(kind, given, f"sinks.{name}")))
    return sinks


def message(event: EventRecord) -> dict[str, Any]:
    """An event as sinks tell it: all JSON, no secret in it. ``text`` is what chat services show."""
    kind = EventKind.named(event.kind)
    meaning = kind.meaning if kind else event.kind
    body = {
        "id": event.id,
        "at": datetime.fromtimestamp(event.at, UTC).isoformat(timespec="milliseconds"),
        "host": socket.gethostname(),
        "task": event.task,
        "kind": event.kind,
        "level": event.level,
        "text": f"{event.level}: {event.task or 'all tasks'}: {event.kind}. {meaning}",
        "remedy": kind.remedy if kind else "",
        "evidence": event.evidence,
    }
    cleaned: dict[str, Any] = scrub_values(body)
    return cleaned


def _seconds(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:  # a date: then our own pauses do
        return None
    return min(value, _LONGEST_PAUSE_S) if math.isfinite(value) and value >= 0 else None
