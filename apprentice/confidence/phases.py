"""The phases of a task, as a pure state machine.

    COLLECT ──promoted──▶ SHADOW ──certified──▶ SERVE
                            ◀──emergency / refused──┘

The machine knows nothing about evidence; it only refuses moves that are not drawn above and carries the evidence
along, so that every transition can be explained later. Hysteresis needs no margin here: leaving SERVE discards the
certificate, and coming back means earning a new one on fresh comparisons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any

__all__ = ["Phase", "Signal", "Transition", "advance"]


class Phase(IntEnum):
    """Who answers: the remote alone, both with the remote returned, or the local model where it is trusted."""

    COLLECT = 1
    SHADOW = 2
    SERVE = 3


class Signal(StrEnum):
    """What can move a task from one phase to another."""

    PROMOTED = "promoted"
    """A version passed the gate. What the last one had earned does not count for it."""
    CERTIFIED = "certified"
    """A slice of the traffic is certified to reach its target."""
    EMERGENCY = "emergency"
    """The served slice is beyond doubt worse than the emergency threshold allows."""
    REFUSED = "refused"
    """The guard alarmed and the retrained candidate did not pass the gate."""


_MOVES: Mapping[tuple[Phase, Signal], Phase] = {
    (Phase.COLLECT, Signal.PROMOTED): Phase.SHADOW,
    (Phase.SERVE, Signal.PROMOTED): Phase.SHADOW,
    (Phase.SHADOW, Signal.CERTIFIED): Phase.SERVE,
    (Phase.SERVE, Signal.EMERGENCY): Phase.SHADOW,
    (Phase.SERVE, Signal.REFUSED): Phase.SHADOW,
}


@dataclass(frozen=True, slots=True)
class Transition:
    """One move, and why."""

    before: Phase
    after: Phase
    signal: Signal
    evidence: Mapping[str, Any] = field(default_factory=dict)


def advance(phase: Phase, signal: Signal, evidence: Mapping[str, Any] | None = None) -> Transition | None:
    """The transition that ``signal`` causes in ``phase``; None where it changes nothing there."""
    after = _MOVES.get((phase, signal))
    return None if after is None else Transition(phase, after, signal, evidence or {})
