"""Whom to ask: a pure function of the task's policy, of what can be asked just now, and of one random number."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from apprentice.confidence.phases import Phase

__all__ = ["Headroom", "Plan", "Policy", "Reason", "accepts", "decide"]


@dataclass(frozen=True, slots=True)
class Policy:
    """How to treat a request that ``version`` of the local model may answer; None while there is no version.

    ``threshold`` is the least local confidence that is trusted: None if nothing is certified, 0.0 if everything is.
    ``sampling_rate`` is the probability in phase 3 that a request is checked against the remote whatever its
    confidence.
    """

    phase: Phase = Phase.COLLECT
    version: str | None = None
    threshold: float | None = None
    sampling_rate: float = 1.0


@dataclass(frozen=True, slots=True)
class Headroom:
    """What can be asked at this moment."""

    remote_affordable: bool = True
    remote_healthy: bool = True
    local_healthy: bool = True
    store_there: bool = True


class Reason(StrEnum):
    """Why a plan is as it is."""

    COLLECTING = "collecting"
    SHADOWING = "shadowing"
    SPOT_CHECK = "spot_check"
    TRUSTED = "trusted"
    NOTHING_CERTIFIED = "nothing_certified"
    BUDGET_EXHAUSTED = "budget_exhausted"
    REMOTE_DOWN = "remote_down"
    STORE_DOWN = "store_down"
    LOCAL_DOWN = "local_down"
    NO_BUDGET_NO_LOCAL = "no_budget_no_local"
    NOBODY = "nobody"


@dataclass(frozen=True, slots=True)
class Plan:
    """Whom to ask at first.

    ``probability`` is that with which this plan asks the remote beside (or instead of) the local model, before the
    local answer is known; ``defer`` says whether a local answer below the threshold may still go to the remote.
    A plan that asks nobody says in ``reason`` what is missing.
    """

    local: bool
    remote: bool
    reason: Reason
    probability: float
    defer: bool = False


def decide(policy: Policy, headroom: Headroom, draw: float) -> Plan:
    """The plan for one request; ``draw`` is uniform in [0, 1) and independent of the request.

    The spot check is drawn before the local model is asked and regardless of what it will answer. That
    independence is what every estimate rests on (docs/trust.md, "How often it is checked").
    """
    local = policy.version is not None and policy.phase is not Phase.COLLECT and headroom.local_healthy
    # Nothing can be paid for without the store, which keeps the caps.
    remote = headroom.remote_affordable and headroom.remote_healthy and headroom.store_there
    if not headroom.store_there:
        return Plan(local, False, Reason.STORE_DOWN, 0.0)
    if not remote:
        down = Reason.REMOTE_DOWN if not headroom.remote_healthy else Reason.BUDGET_EXHAUSTED
        if local:
            return Plan(True, False, down, 0.0)
        lacking = Reason.NOBODY if not headroom.remote_healthy else Reason.NO_BUDGET_NO_LOCAL
        return Plan(False, False, lacking, 0.0)
    if policy.phase is Phase.COLLECT or policy.version is None:
        return Plan(False, True, Reason.COLLECTING, 1.0)
    if not local:
        return Plan(False, True, Reason.LOCAL_DOWN, 1.0)
    if policy.phase is Phase.SHADOW:
        return Plan(True, True, Reason.SHADOWING, 1.0)
    if policy.threshold is None:
        return Plan(True, True, Reason.NOTHING_CERTIFIED, 1.0)
    rate = min(1.0, max(0.0, policy.sampling_rate))
    if draw < rate:
        return Plan(True, True, Reason.SPOT_CHECK, rate)
    return Plan(True, False, Reason.TRUSTED, rate, defer=True)


def accepts(policy: Policy, confidence: float) -> bool:
    """Whether a local answer of this confidence may be returned without asking the remote."""
    return policy.phase is Phase.SERVE and policy.threshold is not None and confidence >= policy.threshold
