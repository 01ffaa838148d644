"""What the trust in a version is measured by: plain numbers, so that no config travels into the mathematics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["TrustSettings"]


@dataclass(frozen=True, slots=True)
class TrustSettings:
    """Plain numbers, with the defaults that apprentice.yaml documents."""

    graduate: float = 0.85
    """phase2_to_phase3: the correlation that a slice is certified to reach."""
    coaching_trigger: float = 0.70
    emergency_threshold: float = 0.50
    """Correlations; what they stand for where a disagreement is promised: see `steering`."""
    max_disagreement: float | None = None
    """Where given, slices are certified for at most this disagreement instead of for ``graduate``."""
    max_disagreement_overall: float | None = None
    """Where given, slices are certified for at most this disagreement among *all* answers, those of the remote
    included: instead of for ``graduate``, or beside ``max_disagreement`` where that is given too."""
    delta: float = 0.05
    """Probability that a version ever serves a slice that misses its target."""
    deferral: bool = True
    """False keeps a single slice, everything."""
    min_coverage: float = 0.10
    window_size: int = 100
    min_floor: float = 0.02
    max_bad_answers: float | None = None
    """Where given, how many answers more than before may differ unchecked, in expectation, until a fall is noticed."""
    campaigns: bool = True
    """Check more than agreement asks for, where a wider slice is expected to save more than that costs."""
    decay_function: str = "exponential"
    decay_options: str = ""
    """Its own options as JSON, "" for none; see `sampling.as_text`."""
    trend_sensitivity: float = 0.05
    max_fall: float = 0.05
    """A comparison lowers the sampling rate at most by this share of it."""
    arl: float = 10_000
    """Mean number of spot checks to a false alarm of the guard, at least; to false coaching and emergency likewise."""
    warm_up: int = 40
    """Comparisons whose confidences set the thresholds, where the gate's are fewer."""
    min_evidence: int = 50
    """Comparisons of the served slice that coaching lasts at least."""
    hysteresis: float = 0.03
    """How far above the trigger the correlation, or what stands for it, must be for coaching to end."""
    watch_arl: float = 50_000
    """Mean number of local answers to a false alarm of the second watch, at least."""
    watch_checks: int = 50
    """Spot checks in a row that the second watch asks for."""

    def target(self) -> list[Any]:
        """What evidence was collected against: evidence for another target is worth nothing."""
        known = [self.graduate, self.max_disagreement, self.delta, self.deferral, self.min_coverage]
        return known if self.max_disagreement_overall is None else [*known, self.max_disagreement_overall]

    @property
    def bounds_served(self) -> bool:
        """Whether what is served has a target of its own."""
        return self.max_disagreement is not None or self.max_disagreement_overall is None
