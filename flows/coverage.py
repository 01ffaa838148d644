"""How much of the traffic a version would serve at the promise, in hindsight, and which of two would serve more. Pure.

**Coverage at the promise.** Let s_i be the score of an answer, g_i its confidence, w_i how often the traffic has its
like, and x_i what the promise makes of it (`apprentice.confidence.certify.excess`). Coverage is the largest share

    sum of w_i where g_i >= t / sum of w_i

over all thresholds t at which the promise holds: the sum of w_i * x_i where g_i >= t is at least 0, or the sum of
w_i * (1 - s_i) where g_i >= t is at most max_disagreement_overall of all weight, or both. Answers of one confidence
enter together. No slice below ``min_coverage`` is ever certified, so less than that is 0; without deferral there is
one slice, every answer within the schema. Risk and coverage of a classifier that may abstain: El-Yaniv and Wiener 2010.

**Two versions.** A maximum in hindsight is too high, and it jumps: one disagreement among the most confident answers
may halve it. So the two are compared paired: both are resampled with the same weights, Poisson(1) for each example
(Hanley and MacGibbon 2006), and the *odds* are the share of resamples in which the candidate covers more, ties counting
half. What the maximum adds by luck, it adds to both.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from apprentice.confidence.certify import excess
from apprentice.confidence.settings import TrustSettings
from flows.steps import Answered

__all__ = ["NO_ANSWER", "Compared", "Told", "both_told", "candidate_told", "compare", "coverage", "needs_chance"]

NO_ANSWER = -1.0
"""The confidence that stands for an answer outside the schema, which no threshold lets through."""

RESAMPLES = 1_000
_CELLS = 2_000_000  # resamples times examples held at once: 16 MB an array

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Told:
    """One version's answer to one example: its score and chance score in [0, 1], and its confidence or `NO_ANSWER`.

    ``chance`` is needed where the promise is a correlation.
    """

    score: float
    confidence: float
    chance: float | None = None


@dataclass(frozen=True, slots=True)
class Compared:
    """Two versions on the same examples: what each covers, in [0, 1], and how sure it is which covers more.

    ``odds`` is the share of resamples in which the candidate covers more, ties half; ``tied`` that of ties; ``n`` the
    effective number of examples.
    """

    candidate: float
    champion: float
    odds: float
    tied: float
    n: float

    def __str__(self) -> str:
        same = f", the same in {_percent(self.tied)}" if self.tied >= 0.005 else ""
        return (
            f"would serve {_percent(self.candidate)} of the traffic at the promise, the champion "
            f"{_percent(self.champion)} (better in {_percent(self.odds - self.tied / 2)} of resamples{same})"
        )


class _Ranked:
    """One version's answers in descending order of confidence, ready for any weights."""

    def __init__(self, told: Sequence[Told], settings: TrustSettings) -> None:
        confidence = np.array([one.confidence for one in told], dtype=np.float64)
        self.order = np.argsort(-confidence, kind="stable")
        ranked = confidence[self.order]
        # Where a slice may end: behind the last of those that are equally confident.
        ends = np.flatnonzero(np.append(ranked[:-1] > ranked[1:], True) & (ranked >= 0.0))
        self.ends = ends if settings.deferral else ends[-1:]
        # The slice of all answers may be small if most lie outside the schema; every other one has a least size.
        self.least = np.full(len(self.ends), settings.min_coverage)
        self.least[-1:] = 0.0
        self.overall = settings.max_disagreement_overall
        self.lost = np.array([1.0 - told[i].score for i in self.order], dtype=np.float64)
        self.excess: _Floats | None = None
        if settings.bounds_served:
            self.excess = np.array([_excess(told[i], settings) for i in self.order], dtype=np.float64)

    def coverage(self, weights: _Floats) -> _Floats:
        """What is covered under each row of weights over the examples in their own order; shape (rows,)."""
        drawn = weights[:, self.order]
        total = drawn.sum(axis=1)
        slack = 1e-9 * total[:, None]  # sums of weights are rounded, and a promise kept exactly is kept
        held = np.cumsum(drawn, axis=1)[:, self.ends]
        kept = held >= self.least * total[:, None] - slack
        if self.excess is not None:
            kept &= np.cumsum(drawn * self.excess, axis=1)[:, self.ends] >= -slack
        if self.overall is not None:
            kept &= np.cumsum(drawn * self.lost, axis=1)[:, self.ends] <= self.overall * total[:, None] + slack
        most: _Floats = np.where(kept, held, 0.0).max(axis=1, initial=0.0)
        share: _Floats = np.divide(most, total, out=np.zeros_like(most), where=total > 0.0)
        return share


def needs_chance(settings: TrustSettings) -> bool:
    """Whether the promise is a correlation, of which nobody can judge without chance scores."""
    return settings.bounds_served and settings.max_disagreement is None


def candidate_told(answers: Sequence[Answered], settings: TrustSettings) -> tuple[list[Told], list[float]]:
    """What the candidate answered, and the weights; without what lacks a chance score that the promise needs."""
    known = [(_candidates(a), a.weight) for a in answers]
    known = [(one, weight) for one, weight in known if _usable(one, settings)]
    return [one for one, _ in known], [weight for _, weight in known]


def both_told(answers: Sequence[Answered], settings: TrustSettings) -> tuple[list[Told], list[Told], list[float]]:
    """What candidate and champion answered, and the weights, where both are known with their confidences."""
    known = [
        (ours, Told(a.champion, a.champion_confidence, a.champion_chance), a.weight)
        for a in answers
        if a.champion is not None and a.champion_confidence is not None
        for ours in [_candidates(a)]
    ]
    known = [row for row in known if _usable(row[0], settings) and _usable(row[1], settings)]
    return [ours for ours, _, _ in known], [theirs for _, theirs, _ in known], [weight for _, _, weight in known]


def _candidates(answer: Answered) -> Told:
    if answer.score is None or answer.confidence is None:
        return Told(0.0, NO_ANSWER)
    return Told(answer.score, answer.confidence, answer.chance)


def _usable(one: Told, settings: TrustSettings) -> bool:
    return one.chance is not None or one.confidence < 0.0 or not needs_chance(settings)


def coverage(told: Sequence[Told], weights: Sequence[float], settings: TrustSettings) -> float:
    """The share of the traffic that a version would serve at the promise, in hindsight; 0.0 of no examples."""
    if not told:
        return 0.0
    return float(_Ranked(told, settings).coverage(np.array([weights], dtype=np.float64))[0])


def compare(
    candidate: Sequence[Told],
    champion: Sequence[Told],
    weights: Sequence[float],
    settings: TrustSettings,
    *,
    seed: str,
    resamples: int = RESAMPLES,
) -> Compared:
    """Compare two versions on the same examples, in the same order; the same ``seed`` draws the same resamples."""
    known = np.array(weights, dtype=np.float64)
    if known.size == 0:
        return Compared(0.0, 0.0, 0.5, 1.0, 0.0)
    both = _Ranked(candidate, settings), _Ranked(champion, settings)
    draw = np.random.default_rng(zlib.crc32(seed.encode()))
    better = tied = done = 0
    while done < resamples:
        rows = min(resamples - done, max(1, _CELLS // known.size))
        drawn = draw.poisson(1.0, (rows, known.size)) * known
        ours, theirs = (one.coverage(drawn) for one in both)
        same = np.isclose(ours, theirs, rtol=0.0, atol=1e-9)
        better += int(np.sum((ours > theirs) & ~same))
        tied += int(np.sum(same))
        done += rows
    seen = [float(one.coverage(known[None, :])[0]) for one in both]
    effective = float(known.sum() ** 2 / np.sum(known * known))
    return Compared(seen[0], seen[1], (better + tied / 2) / resamples, tied / resamples, effective)


def _excess(one: Told, settings: TrustSettings) -> float:
    if not _usable(one, settings):
        raise ValueError("a promise of correlation cannot be judged without chance scores; give Told.chance")
    return excess(
        one.score,
        one.chance or 0.0,
        correlation=settings.graduate,
        max_disagreement=settings.max_disagreement,
    )


def _percent(share: float) -> str:
    return f"{100 * max(0.0, share):.0f} %"
