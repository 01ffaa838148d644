"""To whom events go, besides the store and the log."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

import httpx

from apprentice.events.kinds import EventKind
from apprentice.secrets import register_url, scrub_error, scrub_values
from apprentice.settings.config import AlertSettings
from apprentice.store.records import EventRecord

__all__ = ["SINKS", "Sink", "Undelivered", "Webhook", "message", "sinks_of"]

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


class Webhook:
    """POSTs `message` as JSON. The URL is a secret: at Slack and Teams whoever has it can write to the channel."""

    name = "webhook"

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


SINKS: Mapping[str, Callable[[str], Sink]] = {"webhook": Webhook}
"""Key of the section `alerts` -> the sink that its value makes."""


def sinks_of(settings: AlertSettings) -> list[Sink]:
    """The sinks that a configuration names."""
    chosen = [(make, getattr(settings, name)) for name, make in SINKS.items()]
    return [make(value) for make, value in chosen if value]


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
