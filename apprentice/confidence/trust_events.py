"""What can happen to the trust in a version, with the numbers that led to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

__all__ = ["Event", "EventKind"]


class EventKind(StrEnum):
    """What can happen to a task's trust."""

    PROMOTED = "promoted"
    CERTIFIED = "certified"
    """A slice is certified for the first time, or a larger one is; the threshold moved."""
    PHASE = "phase"
    COACHING = "coaching"
    EMERGENCY = "emergency"
    SHIFT = "shift"
    DRIFT = "drift"
    RECOVERED = "recovered"
    UNUSUAL = "unusual"
    """The second watch saw something; spot checks rise."""
    UNSCORED = "unscored"


@dataclass(frozen=True, slots=True)
class Event:
    """Something worth a line in the log, with the numbers that led to it; all JSON."""

    kind: EventKind
    evidence: Mapping[str, Any] = field(default_factory=dict)
