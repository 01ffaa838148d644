"""What can be read of the trust in a version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from apprentice.confidence.acceptance import Slice
from apprentice.confidence.correlation import Estimate, Tally
from apprentice.confidence.forecast import Widening
from apprentice.confidence.phases import Phase

__all__ = ["Figures", "PolicyNumbers", "Promise", "Scope", "scope"]


class PolicyNumbers(NamedTuple):
    """What the router needs of the trust state."""

    phase: Phase
    threshold: float | None
    sampling_rate: float


@dataclass(frozen=True, slots=True)
class Scope:
    """Agreement and correlation over one set of comparisons, of the whole answer and of each field."""

    agreement: Estimate | None
    correlation: Estimate | None
    fields: Mapping[str, tuple[Estimate | None, Estimate | None]] = field(default_factory=dict)
    """field -> (agreement, correlation)."""


@dataclass(frozen=True, slots=True)
class Promise:
    """A share of answers that may differ from the remote's, and the share that does, as far as checks could tell.

    ``realised`` is unbiased for served answers (see `Figures.accepted_agreement`). Of all answers it is that times the
    share of the served ones among those since the version began to serve: the remote's own cannot differ. None before
    any check. ``low`` and ``high`` are its 95 % interval, Wilson's (1927) on the effective number (Kish 1965) of
    ``checks`` that weigh 1 / p each; None in states of which an older Apprentice kept too little.
    """

    what: str
    at_most: float
    realised: float | None
    low: float | None = None
    high: float | None = None
    checks: int = 0


@dataclass(frozen=True, slots=True)
class Figures:
    """Everything readable, at one moment."""

    phase: Phase
    threshold: float | None
    sampling_rate: float
    sampling_floor: float
    """What the sampling rate does not fall below."""
    coverage: float
    """Share of the traffic in the served slice, as measured; 0 where nothing is certified."""
    comparisons: int
    """Since the promotion, the gate's own included."""
    unscored: int
    accepted_agreement: float | None
    """Agreement of the answers above the threshold since the promotion that a spot check could have met, those that one
    did meet included; unbiased under a varying rate, None before any check. It says nothing of the ``unverified``."""
    unverified: float
    """Answers since the promotion that nobody could have checked, or for which a check that brought no score stands."""
    window_all: Scope
    window_served: Scope
    since_all: Scope
    since_served: Scope
    slices: Sequence[Slice]
    coaching: bool
    alarmed: bool
    training_due: bool
    promises: Sequence[Promise] = ()
    """Those about disagreement; a correlation target has none."""
    campaign: float | None = None
    """The rate of a campaign that raises the sampling rate now; see `campaign`."""
    forecast: Widening | None = None
    """The wider slice that is worth most within as many requests as were answered so far; None where what was compared
    supports no forecast."""


def scope(tallies: Mapping[str, Tally]) -> Scope:
    """The estimates of ``tallies``: of the whole answer under "", of its fields under their names."""
    whole = tallies[""]
    return Scope(
        whole.agreement_estimate(),
        whole.correlation_estimate(),
        {name: (tally.agreement_estimate(), tally.correlation_estimate()) for name, tally in tallies.items() if name},
    )
