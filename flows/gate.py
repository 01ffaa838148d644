"""The gate: whether a candidate becomes champion. Pure.

A candidate must answer within its schema, be better than chance, and compare well with the champion it replaces.

**What is served.** A version answers where it is sure enough for the promise, and the remote answers the rest. So what
a candidate is worth is its coverage at the promise (`flows.coverage`), and not how often it would agree overall: to be
worse on requests that are deferred anyway costs nothing, and to be better on them earns nothing. The odds that it
covers more than the champion must reach ``SERVING_ODDS`` where the champion serves, since a new version begins with a
sampling rate of 1 and with evidence of its own; ``SHADOWING_ODDS`` where nothing is served yet, since a wrong promotion
then costs little, and a candidate has learnt from more than the champion had.

Odds of two versions that are equally good are spread evenly, from 50 examples on. Simulated with a champion that could
serve .31 of the traffic at 5 % disagreement and agrees on .69, half of whose luck the candidate shares; the share of
400 candidates (200 on 1,000 examples) that pass, on 50 / 400 / 1,000 examples:

    candidate                                  champion serves   champion shadows   refit             mean test alone
    as good                                    .28 .29 .34       .71 .75 .77        .93 .93 .97       .09 .18 .21
    serves .10 more, agrees .05 more           .43 .62 .79       .87 .91 .98        .98 .99 1.0       .24 .88 1.0
    serves .10 more, agrees .05 less           .34 .66 .80       .78 .94 .99        .85 .88 .95       .03 .00 .00
    serves .10 less, agrees .07 less           .13 .06 .03       .52 .34 .22        .72 .32 .11       .02 .00 .00
    serves .10 less, agrees .05 more           .24 .09 .08       .68 .47 .34        .94 .91 .81       .22 .81 .99

So the paired test of the mean, which was the rule, is the sharper one where agreement and coverage move together, and
is wrong the more surely the more examples there are where they do not. tests/flows/test_gate.py simulates this. In a
model of fifteen trainings in a row, odds from .6 to .8 led to the same coverage within two points, and so did .2 to .5
in one of five while nothing is served.

Where both would serve the same in most resamples, nothing at all or everything, the paired test of the mean score
decides; so it does where the champion's confidences are not known on ``FEWEST`` examples.

**A refit** of the head goes on where the champion stands: the same method on more answers, which seldom makes it worse,
and which the checks of what it serves judge anyway. It is refused if it is clearly worse: if its odds are at most
``REFIT_ODDS``; or, unless it would rather serve more than less, if the upper bound of the mean difference lies below
-margin. The mean tells sooner that something went wrong; alone, it would refuse .91 of those in the third row on 1,000
examples.

**The paired test.** Let d_i = candidate's score - champion's score on example i. The candidate passes when a one-sided
lower confidence bound of mean(d) lies above -margin: mean(d) - z * se > -margin. Whatever the sample, at most
``ERROR_RATE`` of the candidates that are exactly the margin worse pass, and fewer of those that are worse still. With
the default margin of one point, 8 % is the level at which both demands on the gate are met on 400 examples. Measured
at an agreement of 85 %: of candidates two points worse 3 % are promoted, of those three points better 86 %, where half
of the examples are answered alike by both, as retrained models do. Where both err independently of one another, which
is the least that can be known of them, it is 3.5 % and 60 %. tests/flows/test_gate.py simulates this.

While the champion is only being shadowed and fewer than 400 examples are held out, a wrong promotion costs little and a
right one refused costs a training run: `allowed_error` then lets 8 % grow to 30 %.

**Weights.** Once a task serves, most held-out examples are requests that were deferred for being hard. Every figure
here weighs an example by the sampling rate over the probability with which it was bought, so together they describe
the traffic; sample sizes are then Kish's effective ones, (sum w)^2 / sum w^2.

The variance is taken under the null, mean(d) = -m (a score test), with half an example of each direction added: without
either, ten identical answers would have se = 0 and any candidate would pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

from apprentice.confidence.correlation import effective_size
from flows.coverage import Compared

__all__ = ["Check", "Evidence", "Pair", "Verdict", "allowed_error", "decide", "effective", "paired_bound"]

VALIDITY = 0.98
ERROR_RATE, MOST_ERROR = 0.08, 0.30
ENOUGH = 400  # held-out examples from which a champion that only shadows is protected like one that serves
SERVING_ODDS, SHADOWING_ODDS, REFIT_ODDS = 0.70, 0.30, 0.05
FEWEST = 50  # effective examples from which two versions' coverage is compared


@dataclass(frozen=True, slots=True)
class Pair:
    """What the gate compares on one held-out example: the scores of candidate and champion against the remote.

    ``weight`` says how often the traffic has its like; see `flows.steps.Answered`.
    """

    candidate: float
    champion: float
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that the gate looks at.

    ``valid`` of ``answered`` held-out inputs got an answer within the schema, both weighted. ``correlation`` and the
    lower end of its two-sided 95 % interval, which chance alone exceeds one time in forty, are those of the candidate
    on the held-out examples; ``pairs`` and ``coverage`` are None where there is no champion to compare it with.
    ``active`` is whether the loaded adapter changes the base model's answers, ``reproduced`` the share of probe
    answers given again.
    """

    answered: float
    valid: float
    correlation: float
    correlation_low: float
    active: bool
    reproduced: float
    pairs: Sequence[Pair] | None
    serving: bool
    refit: bool = False
    coverage: Compared | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """One condition: its figure, what it had to reach, whether it did, and what the figure stands for if it tells."""

    name: str
    value: float
    needed: float
    passed: bool
    note: str = ""

    def __str__(self) -> str:
        figure = f"{self.name} {self.value:.3f} ({'at least' if self.passed else 'needs'} {self.needed:.3f})"
        return f"{figure}: {self.note}" if self.note else figure


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the candidate is promoted, and every condition it was held to."""

    promoted: bool
    reason: str
    checks: Sequence[Check] = field(default_factory=tuple)

    def figures(self) -> Mapping[str, float]:
        """The conditions' figures by name."""
        return {check.name: check.value for check in self.checks}


def decide(evidence: Evidence, *, coaching_trigger: float, margin: float) -> Verdict:
    """Hold a candidate to every condition of docs/training.md, "validate and promote"."""
    if evidence.answered == 0:
        return Verdict(False, "there are no held-out examples to judge by")
    validity = evidence.valid / evidence.answered
    checks = [
        Check("schema_validity", validity, VALIDITY, validity >= VALIDITY),
        Check("probe_active", float(evidence.active), 1.0, evidence.active),
        Check("probe_reproduced", evidence.reproduced, 0.99, evidence.reproduced >= 0.99),
        Check("correlation_low", evidence.correlation_low, 0.0, evidence.correlation_low > 0.0),
    ]
    if evidence.refit:
        checks += _not_clearly_worse(evidence, margin)
    else:
        checks += _worth_replacing(evidence, coaching_trigger, margin)
    failed = [check for check in checks if not check.passed]
    if failed:
        return Verdict(False, "; ".join(str(check) for check in failed), tuple(checks))
    return Verdict(True, "passed: " + "; ".join(str(check) for check in checks), tuple(checks))


def _known(evidence: Evidence) -> Compared | None:
    """The comparison of what the two would serve, on enough examples."""
    return evidence.coverage if evidence.coverage is not None and evidence.coverage.n >= FEWEST else None


def _worth_replacing(evidence: Evidence, coaching_trigger: float, margin: float) -> list[Check]:
    known = _known(evidence)
    if known is not None and known.tied < 0.5:
        needed = SERVING_ODDS if evidence.serving else SHADOWING_ODDS
        return [Check("coverage_odds", known.odds, needed, known.odds >= needed, str(known))]
    checks = []
    if evidence.serving and known is None:
        enough = evidence.correlation > coaching_trigger
        checks.append(Check("correlation", evidence.correlation, coaching_trigger, enough))
    if evidence.pairs is not None:
        allowed = allowed_error(effective(evidence.pairs), serving=evidence.serving)
        bound = paired_bound(evidence.pairs, margin=margin, error_rate=allowed)
        note = "" if known is None else str(known)
        checks.append(Check("not_worse_than_champion", bound, -margin, bound > -margin, note))
    return checks


def _not_clearly_worse(evidence: Evidence, margin: float) -> list[Check]:
    checks, serves_more = [], False
    known = _known(evidence)
    if known is not None:
        serves_more = known.odds > 0.5
        checks.append(Check("coverage_odds", known.odds, REFIT_ODDS, known.odds > REFIT_ODDS, str(known)))
    if evidence.pairs and not serves_more:
        bound = -paired_bound([Pair(p.champion, p.candidate, p.weight) for p in evidence.pairs], margin=margin)
        checks.append(Check("not_clearly_worse", bound, -margin, bound >= -margin))
    return checks


def effective(pairs: Sequence[Pair]) -> float:
    """How many pairs of equal weight tell as much."""
    return effective_size(sum(pair.weight for pair in pairs), sum(pair.weight * pair.weight for pair in pairs))


def allowed_error(pairs: float, *, serving: bool) -> float:
    """The share of candidates exactly the margin worse than the champion that may pass, given so many pairs."""
    if serving or pairs == 0:
        return ERROR_RATE
    return min(max(ERROR_RATE, ERROR_RATE * ENOUGH / pairs), MOST_ERROR)


def paired_bound(pairs: Sequence[Pair], *, margin: float, error_rate: float = ERROR_RATE) -> float:
    """One-sided lower confidence bound of mean(candidate - champion), with the variance under mean = -margin.

    For scores of 0 and 1 this is the score test of a paired difference of proportions (Tango 1998), with half a pair
    added in each direction, on the effective number of pairs. -1 where there are no pairs.
    """
    n = effective(pairs)
    if n == 0:
        return -1.0
    weighted = [(pair.weight, pair.candidate - pair.champion) for pair in pairs]
    total = sum(w for w, _ in weighted)
    mean = sum(w * d for w, d in weighted) / total
    spread = (n * sum(w * d * d for w, d in weighted) / total + 1.0) / (n + 1.0)
    se = math.sqrt(max(spread - margin * margin, 0.0) / n)
    return mean - NormalDist().inv_cdf(1.0 - error_rate) * se
