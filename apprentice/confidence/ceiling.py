"""How often the remote agrees with itself, and so what no student of it can do better than.

A remote that is asked the same thing twice does not always say the same. Let s be the score of its two answers to one
request, X and X' two independent draws from what it answers there. Whatever a student answers, y,

    1 - E[score(y, X)]  >=  (1 - E[score(X, X')]) / 2

so a perfect student agrees in at most (1 + a) / 2 of the cases where the remote agrees with itself in a. For equality
as in `exact_match` that is the triangle inequality: X and X' cannot differ where both are y. For cosines and for the
weighted fields and sets of `structured_match` the score is an inner product <f(a), f(b)> of unit vectors, so that
E[score(y, X)] <= |E f(X)| = sqrt(E[score(X, X')]), which is below (1 + a) / 2. Numbers with a tolerance and evaluators
of the user's own need not obey it, and nothing is claimed for them.

Whether a target is out of reach is a bet like that on a slice (`certify`), with the sides changed: on "some student of
all requests meets it", whose best score on a request is taken to be (1 + s) / 2. A bet that grew by 1 / delta has
refuted that, however often one looks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from apprentice.confidence.certify import LOG_PRIOR, excess, log_stakes, wealth
from apprentice.confidence.correlation import Estimate, Tally
from apprentice.confidence.settings import TrustSettings

__all__ = ["Ceiling", "Pair", "Unreachable", "ceiling_of", "sentence"]


class Pair(NamedTuple):
    """One request that the remote answered twice.

    ``score`` is that of its two answers, ``chance`` what its second one scores against its answers to other requests,
    ``weight`` in (0, 1] makes up for how readily the first was bought (see `certify`), and ``local`` is the score of
    the local model's answer to the same request against the remote's first; None where it was not asked.
    """

    score: float
    chance: float
    weight: float = 1.0
    local: float | None = None


@dataclass(frozen=True, slots=True)
class Unreachable:
    """A target of apprentice.yaml, by its key, that no student of all requests can meet."""

    key: str
    value: float


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What is known of the remote's agreement with itself. Intervals are of 95 %.

    ``local`` is the local model's agreement with the remote on those of the same requests that it answered. ``best`` is
    what a perfect student would agree in at most, (1 + agreement) / 2, ``best_high`` that at the upper end of the
    interval; both are None under an evaluator for which that need not hold.
    """

    pairs: int
    agreement: Estimate
    correlation: Estimate
    local: Estimate | None
    best: float | None
    best_high: float | None
    unreachable: tuple[Unreachable, ...]


def ceiling_of(pairs: Iterable[Pair], settings: TrustSettings, *, bounded: bool) -> Ceiling | None:
    """The figures of some pairs, in the order in which they were asked; None of none.

    ``bounded``: the evaluator obeys the bound of the module's docstring.
    """
    remote, local, seen = Tally(), Tally(), list(pairs)
    for pair in seen:
        remote.add(pair.score, pair.chance, pair.weight)
        if pair.local is not None:
            local.add(pair.local, 0.0, pair.weight)
    agreement, correlation = remote.agreement_estimate(), remote.correlation_estimate()
    if agreement is None or correlation is None:
        return None
    return Ceiling(
        pairs=len(seen),
        agreement=agreement,
        correlation=correlation,
        local=local.agreement_estimate(),
        best=(1.0 + agreement.value) / 2.0 if bounded else None,
        best_high=(1.0 + agreement.high) / 2.0 if bounded else None,
        unreachable=tuple(_unreachable(seen, settings)) if bounded else (),
    )


def _unreachable(pairs: list[Pair], settings: TrustSettings) -> Iterable[Unreachable]:
    for key, value in _targets(settings):
        capital = list(LOG_PRIOR)
        refuted = False
        for pair in pairs:
            x = -excess(
                (1.0 + pair.score) / 2.0,
                pair.chance,
                correlation=value,
                max_disagreement=None if key == "phase2_to_phase3" else value,
            )
            stakes = log_stakes(round(x, 6), round(pair.weight, 6))
            capital = [held + stake for held, stake in zip(capital, stakes, strict=True)]
            refuted = refuted or wealth(capital) * settings.delta >= 1.0
        if refuted:
            yield Unreachable(key, value)


def _targets(settings: TrustSettings) -> Iterable[tuple[str, float]]:
    if settings.max_disagreement is not None:
        yield "max_disagreement", settings.max_disagreement
    elif settings.bounds_served:
        yield "phase2_to_phase3", settings.graduate
    if settings.max_disagreement_overall is not None:
        yield "max_disagreement_overall", settings.max_disagreement_overall


def sentence(ceiling: Ceiling, settings: TrustSettings) -> str | None:
    """What to tell people where a target is out of reach, in one sentence; None where none is."""
    if not ceiling.unreachable or ceiling.best is None:
        return None
    goals = " and ".join(
        f"a correlation of {one.value:g}" if one.key == "phase2_to_phase3" else f"at most {one.value:.1%} disagreement"
        for one in ceiling.unreachable
    )
    keys = " or ".join(one.key for one in ceiling.unreachable)
    where = "on all requests" if settings.deferral else "at all, as deferral is off"
    rest = "serve the share on which it is steady, " if settings.deferral else "allow deferral, "
    agreement = ceiling.agreement
    return (
        f"the remote agrees with itself in {100 * agreement.value:.0f} of 100 cases "
        f"({agreement.low:.0%} to {agreement.high:.0%}, {ceiling.pairs} asked twice), so {goals} cannot be reached "
        f"{where}, for a perfect student differs in {1.0 - ceiling.best:.1%}: {rest}"
        f"make the task's instructions leave less open, or change {keys}"
    )
