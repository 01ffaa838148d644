"""Which local answers may be served: nested slices of the traffic, each certified by a betting process of its own.

A slice is the requests whose local confidence g is at least a threshold; the last one is everything. The served slice
is the largest certified one.

**Several slices, one error.** delta is divided over a few entry slices. When a slice is certified its share goes on
to the next larger one. This is a sequentially rejective graphical procedure (Bretz, Maurer, Brannath and Posch 2009),
which keeps the probability of certifying any slice wrongly at most delta without assuming that confidence means
anything; with one entry it is the fixed sequence from the most confident slice. Most of delta enters where the
confidences, if they are believed, make a certificate likeliest (`promising`): a slice that is much smaller has too few
comparisons, one that is larger misses the target or nearly so. The rest is for models whose confidence says nothing.

**The grid is fixed before it is bet on**, until the next version: thresholds are confidences of the first comparisons
(normally the held-out ones of the gate), chosen without looking at their scores. Given that a threshold is the k-th
largest confidence, the comparisons above it are a plain sample of its slice; the one that set it is not, and does not
bet on it.

**One exact test** joins the bets on a target of what is served, at a part of delta (`exact`), where every comparison
counts alike and its score is 0 or 1.

**Scores that depend on those before them** say less than as many independent ones: what bets and test have found counts
for 1 / D of it, D being the design effect (`dependence`).

**Two targets.** All this is about what is *served*. `Overall` certifies instead how much of all answers differs, or in
addition: a slice is then certified when both say so, and each promise is broken with probability at most delta.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import neg
from typing import Any

from apprentice.confidence import exact
from apprentice.confidence.certify import LOG_PRIOR, PRIOR, discounted, log_stakes, wealth
from apprentice.confidence.dependence import Dependence
from apprentice.confidence.overall import Overall

__all__ = ["Slice", "Slices", "grid", "promising"]

# Where delta enters, as shares of the traffic, and how it is divided. The first fifth is where a middling model with
# an honest confidence gathers evidence fastest; a good one is certified whole.
ENTRIES: tuple[tuple[float, float], ...] = ((0.2, 0.7), (0.5, 0.1), (1.0, 0.2))
# The same where confidences say where to enter. They may be wrong, so a part is for everybody, whatever the slice.
PROMISING, OTHERS, EVERYBODY = 0.6, ((0.2, 0.15), (1.0, 0.1)), 0.15
# A slice whose expected excess is this part of what it would be without an error. Measured on recorded streams with
# 7 and 106 values: .4 to .6 differ little; nearer to 1 entry is early in small slices, nearer to 0 it fails.
HEADROOM = 0.6
STEP = 0.025
# A model that was bad for long and becomes good without a new version (the world came back) must not have to win back
# all it lost: a slice that has lost nearly everything begins again with capital kept back for that.
FIRST_STAKE = 0.9
RUINED = 0.05
PATIENCE = 300


@dataclass(frozen=True, slots=True)
class Slice:
    """What is known of one slice: ``share`` of the traffic, weighted ``agreement``, ``needed`` wealth to certify it.

    ``wealth`` is after what the design effect takes off.
    Where both targets are bet on, ``wealth`` and ``needed`` are those of the one that is farther from its certificate.
    """

    threshold: float
    share: float
    agreement: float | None
    wealth: float
    needed: float
    certified: bool


def grid(
    confidences: Sequence[float], min_coverage: float, step: float = STEP, weights: Sequence[float] | None = None
) -> list[float]:
    """Descending thresholds of slices of ``min_coverage``, then ``step`` more each, of ``confidences``; then 0.0.

    ``weights``: how often the traffic has the like of each; alike where none are given.
    """
    ranked = sorted(zip(confidences, weights or [1.0] * len(confidences), strict=True), key=_confidence, reverse=True)
    total = sum(weight for _, weight in ranked)
    thresholds: list[float] = []
    share, held = min_coverage, 0.0
    for confidence, weight in ranked:
        held += weight
        if share >= 1.0 - step / 2 or held < (share - 1e-9) * total:
            continue
        if confidence > 0.0 and (not thresholds or confidence < thresholds[-1]):
            thresholds.append(confidence)
        while held >= (share - 1e-9) * total:
            share += step
    return [*thresholds, 0.0]


def promising(expected: Sequence[tuple[float, float, float]]) -> float | None:
    """The share of the traffic in the largest slice that, by its own confidences, keeps well within the target.

    ``expected`` are (confidence g, x at a score of g, weight) with x at a score of 1 being x + 1 - g: X of `certify`.
    The slice's mean x is then at least `HEADROOM` of what it would be without an error. None where there is none.
    """
    total, held, mean, best, share = sum(weight for *_, weight in expected), 0.0, 0.0, 0.0, None
    for confidence, x, weight in sorted(expected, reverse=True):
        held += weight
        mean += weight * x
        best += weight * (x + 1.0 - confidence)
        if mean >= HEADROOM * best and held > 0.0:
            share = held / total
    return share


def _confidence(row: tuple[float, float]) -> float:
    return row[0]


class Slices:
    """The betting processes of all slices, from the most confident to everything.

    Slices are nested, so a comparison is booked once, in the band between two thresholds, and the capital of a slice
    is the product over its bands. Wealth is looked at after every ``look`` comparisons: looking less often costs a
    few comparisons of delay and nothing else.
    """

    __slots__ = (
        "agreed",
        "bands",
        "bases",
        "certified",
        "delta",
        "dependence",
        "entry",
        "exact_share",
        "limit",
        "look",
        "overall",
        "overall_winds",
        "peaks",
        "plain",
        "served",
        "shares",
        "test_level",
        "tested",
        "thresholds",
        "unseen",
        "waited",
        "weights",
        "winds",
    )

    def __init__(
        self,
        thresholds: Sequence[float],
        delta: float,
        confidences: Sequence[float] = (),
        *,
        weights: Sequence[float] | None = None,
        entry: float | None = None,
        max_disagreement: float | None = None,
        max_disagreement_overall: float | None = None,
        served: bool = True,
    ) -> None:
        """``thresholds`` descend to 0.0; ``confidences`` are a sample of the traffic's, with ``weights`` as in `grid`.

        ``entry`` is where most of delta enters, as a share of the traffic (`promising`).
        ``served``: what is served has a target of its own. One of both there must be. If it is ``max_disagreement``, an
        exact test has a part of delta; without it, all of delta is bet.
        """
        assert served or max_disagreement_overall is not None
        self.thresholds = list(thresholds)
        self.delta = delta
        self.look = 1 if len(self.thresholds) == 1 else 8
        weighted = list(zip(confidences, weights or [1.0] * len(confidences), strict=True))
        sample = max(1e-9, sum(weight for _, weight in weighted))
        self.shares = [sum(weight for g, weight in weighted if g >= t) / sample for t in self.thresholds]
        self.shares[-1] = 1.0
        self.entry = entry
        self.served = served
        self.limit = max_disagreement
        self.exact_share = 0.0 if max_disagreement is None else exact.SHARE
        self.overall: Overall | None = None
        if max_disagreement_overall is not None:
            self.overall = Overall(max_disagreement_overall, delta, len(self.thresholds), FIRST_STAKE)
        self.restart()

    def restart(self) -> None:
        """Forget all evidence, keep the grid: what held before an alarm says nothing about the time after it."""
        count = len(self.thresholds)
        # Log capital of every slice before any band, and what each band added to it; per size of bet.
        start = math.log(self._stake(0))
        self.bases = [[prior + start for prior in LOG_PRIOR] for _ in range(count)]
        self.bands = [[0.0] * len(LOG_PRIOR) for _ in range(count)]
        self.winds = [0] * count
        self.peaks = [1.0] * count
        self.weights = [0.0] * count
        self.agreed = [0.0] * count
        self.dependence = Dependence()
        self.unseen = self.waited = self.overall_winds = 0
        self.certified: int | None = None
        # Whether every comparison counted in full and scored 0 or 1; the test's error, 0 once it is made; the smallest
        # and the largest slice that it certified.
        self.plain = True
        self.test_level = self.exact_share * self.delta
        self.tested: tuple[int, int] | None = None
        if self.overall is not None:
            self.overall.restart(count, FIRST_STAKE)

    def entry_shares(self) -> list[float]:
        """The share of delta that each slice starts with; they sum to one."""
        count = len(self.thresholds)
        held = [0.0 if self.entry is None else EVERYBODY / count] * count
        for place, part in ENTRIES if self.entry is None else ((self.entry, PROMISING), *OTHERS):
            nearest = min(range(len(held)), key=lambda k: abs(self.shares[k] - place))
            held[nearest] += part
        return held

    def add(
        self, confidence: float, score: float, x: float, weight: float, *, sets: bool = False, repeats: bool = False
    ) -> bool:
        """Let one comparison bet on every slice that holds it; whether a larger slice is certified now.

        ``x`` is what the target of what is served makes of it; it counts for nothing where there is no such target.
        ``sets``: this very comparison set the threshold that it stands on, and does not bet on that slice.
        ``repeats``: its request was like a recent one, and so says nothing of how others depend on each other.
        """
        k = bisect_left(self.thresholds, -confidence, key=neg)
        self.weights[k] += weight
        self.agreed[k] += weight * score
        self.plain = self.plain and weight == 1.0 and score in (0.0, 1.0)
        if not repeats:
            self.dependence.add(score)
        if self.overall is not None:
            self.overall.add(k, score, weight)
        band = k + 1 if sets else k
        if self.served and band < len(self.bands):
            self.bands[band] = [
                held + stake for held, stake in zip(self.bands[band], log_stakes(x, weight), strict=True)
            ]
        self.unseen += 1
        self.waited += 1
        return self.settle() if self.unseen >= self.look else False

    def log_capital(self, k: int) -> list[float]:
        """Log of the capital behind each size of bet on slice ``k``."""
        return [base + sum(added) for base, *added in zip(self.bases[k], *self.bands[: k + 1], strict=True)]

    def needed(self) -> list[float]:
        """The wealth that certifies each slice, given what is certified already; infinite where no share has come."""
        held = self.entry_shares()
        last = len(held) - 1
        done = [self.is_tested(k) for k in range(len(held))]
        for k in range(last):
            if done[k]:  # its share goes to the next one that is not certified
                onward = next((j for j in range(k + 1, last + 1) if not done[j]), None)
                if onward is not None:
                    held[onward] += held[k]
        moved = True
        while moved:
            moved = False
            for k, peak in enumerate(self.peaks):
                if not done[k] and held[k] > 0.0 and peak * held[k] * self.delta >= 1.0:
                    done[k] = moved = True
                    if k < last:
                        onward = next((j for j in range(k + 1, last + 1) if not done[j]), None)
                        if onward is not None:
                            held[onward] += held[k]
        return [1.0 / (share * self.delta) if share > 0.0 else math.inf for share in held]

    def settle(self) -> bool:
        """Look at every slice larger than the certified one and certify what can be; whether it grew."""
        self.unseen = 0
        reached = self._look() if self.served else False
        if self.test_level > 0.0 and self.plain and sum(self.weights) >= exact.FEWEST:
            reached = self._test() or reached
        if self.overall is not None:
            before = self.overall.certified
            self.overall.settle(self.dependence.design_effect())
            reached = reached or self.overall.certified != before
        if not reached:
            self._second_wind()
            return False
        best = self.certified
        for k, certain in enumerate(self._proved()):
            if certain:
                best = k if best is None else max(best, k)
        grew = best != self.certified
        self.certified = best
        return grew

    def _proved(self) -> list[bool]:
        """Of each slice, whether it has met every target, one after the other or at once."""
        proved = [True] * len(self.thresholds)
        if self.served:
            needed = self.needed()
            proved = [peak >= needed[k] or self.is_tested(k) for k, peak in enumerate(self.peaks)]
        if self.overall is not None:
            last = -1 if self.overall.certified is None else self.overall.certified
            proved = [certain and k <= last for k, certain in enumerate(proved)]
        return proved

    def _look(self) -> bool:
        """Look at the bets on what is served; whether any slice may be certified by them for the first time."""
        first = 0 if self.certified is None else self.certified + 1
        least = 1.0 / self.delta
        effect: float | None = None  # found out only where it matters
        # Below this not even equal capital behind all sizes would add up to what certifies the easiest slice.
        quiet = math.log(least / len(LOG_PRIOR))
        reached = False
        total = [0.0] * len(LOG_PRIOR)
        for k, band in enumerate(self.bands):
            total = [held + added for held, added in zip(total, band, strict=True)]
            if k < first:
                continue
            base = self.bases[k]
            if max(total) + max(base) < quiet:
                continue
            worth = wealth([start + added for start, added in zip(base, total, strict=True)])
            if worth >= least:
                effect = effect or self.dependence.design_effect()
                worth = discounted(worth, effect)
            if worth > self.peaks[k]:
                self.peaks[k] = worth
                reached = reached or worth >= least
        return reached

    def _test(self) -> bool:
        """Make the exact test, once; whether it certified anything."""
        assert self.limit is not None
        level, self.test_level = self.test_level, 0.0
        effect = self.dependence.design_effect()
        place = exact.ENTRY * (ENTRIES[0][0] if self.entry is None else self.entry)
        first = min(range(len(self.thresholds)), key=lambda k: abs(self.shares[k] - place))
        for k in range(first, len(self.thresholds)):
            n = round(self.weight(k))
            differ = n - round(sum(self.agreed[: k + 1]))
            # A threshold was set by one of those that it lets in, which is no evidence about its slice; that one is
            # taken to have agreed.
            n -= self.thresholds[k] > 0.0
            if exact.p_value(math.ceil(differ / effect), math.floor(n / effect), self.limit) > level:
                break
            self.tested = (first, k)
        return self.tested is not None

    def is_tested(self, k: int) -> bool:
        """Whether the exact test certified slice ``k``."""
        return self.tested is not None and self.tested[0] <= k <= self.tested[1]

    def _stake(self, winds: int) -> float:
        """What a slice puts in at its first start, or at a later one.

        All of them together never put in more than 1, or what the exact test leaves of it, so their sum is one
        supermartingale, whatever made them begin.
        """
        return _part(winds) * (1.0 - self.exact_share)

    def _second_wind(self) -> None:
        """Every so often, where nothing is certified, let ruined slices begin again with what was kept back."""
        if self.certified is not None or self.waited < PATIENCE:
            return
        self.waited = 0
        if self.overall is not None and self.overall.renew(
            RUINED * _part(self.overall_winds), _part(self.overall_winds + 1)
        ):
            self.overall_winds += 1
        for k in range(len(self.bands) if self.served else 0):
            capital = self.log_capital(k)
            if wealth(capital) < RUINED * self._stake(self.winds[k]):
                self.winds[k] += 1
                start = math.log(self._stake(self.winds[k]))
                self.bases[k] = [
                    base - held + prior + start
                    for base, held, prior in zip(self.bases[k], capital, LOG_PRIOR, strict=True)
                ]

    def weight(self, k: int) -> float:
        """Weighted number of comparisons in slice ``k`` since the last restart."""
        return sum(self.weights[: k + 1])

    def agreement(self, k: int) -> float | None:
        """Weighted agreement of slice ``k`` since the last restart; None before its first comparison."""
        weight = self.weight(k)
        return sum(self.agreed[: k + 1]) / weight if weight > 0.0 else None

    def share(self, k: int) -> float:
        """Share of the traffic in slice ``k``: measured, or the grid's own before there is anything to measure."""
        seen = sum(self.weights)
        return self.weight(k) / seen if seen > 0.0 else self.shares[k]

    @property
    def threshold(self) -> float | None:
        """The least confidence that is served; None where nothing is certified."""
        return None if self.certified is None else self.thresholds[self.certified]

    def curve(self) -> list[Slice]:
        """Every slice with its figures, most confident first."""
        stands = self._stands()
        return [
            Slice(
                threshold=t,
                share=self.share(k),
                agreement=self.agreement(k),
                wealth=stands[k][0],
                needed=stands[k][1],
                certified=certain and self.certified is not None and k <= self.certified,
            )
            for (k, t), certain in zip(enumerate(self.thresholds), self._proved(), strict=True)
        ]

    def _stands(self) -> list[tuple[float, float]]:
        """(wealth, needed) of every slice, by the target that is farther from its certificate."""
        tests: list[list[tuple[float, float]]] = []
        effect = self.dependence.design_effect()
        if self.served:
            worth = [discounted(wealth(self.log_capital(k)), effect) for k in range(len(self.bands))]
            tests.append(list(zip(worth, self.needed(), strict=True)))
        if self.overall is not None:
            tests.append([(discounted(worth, effect), 1.0 / self.delta) for worth in self.overall.wealths()])
        return [min(of_slice, key=lambda stand: stand[0] / stand[1]) for of_slice in zip(*tests, strict=True)]

    def peak(self, k: int) -> float:
        """The most that the bets on slice ``k`` were ever worth; the lesser of both targets'."""
        peaks = [self.peaks[k]] if self.served else []
        return min(peaks if self.overall is None else [*peaks, self.overall.peaks[k]])

    def hedge(self, stake: float) -> None:
        """Keep ``stake`` of what the evidence so far is worth, and start the rest afresh at 1.

        A mixture of two supermartingales is one. Used where evidence is shared with earlier attempts (``stake`` =
        1/attempts): it can then certify by itself with probability at most stake * delta. Likewise the exact test.
        """
        count = len(self.thresholds)
        fresh = self._stake(0)
        self.bases = [
            [
                math.log(stake * math.exp(min(held, 60.0)) + (1.0 - stake) * fresh * start)
                for held, start in zip(self.log_capital(k), PRIOR, strict=True)
            ]
            for k in range(count)
        ]
        self.bands = [[0.0] * len(LOG_PRIOR) for _ in range(count)]
        self.peaks = [1.0] * count
        if self.overall is not None:
            self.overall.hedge(stake, FIRST_STAKE)
        self.certified = self.tested = None
        self.test_level = stake * self.exact_share * self.delta
        self.settle()

    def replay(self, comparisons: Iterable[tuple[float, float, float, float, bool]]) -> None:
        """Bet (confidence, score, x, weight, repeats) of the comparisons that set the grid, in the order of requests.

        Of those that share a threshold's confidence exactly one set it, and exactly one does not bet on it.
        """
        setters = set(self.thresholds)
        level, self.test_level = self.test_level, 0.0  # the test is made of all of them
        for confidence, score, x, weight, repeats in comparisons:
            self.add(confidence, score, x, weight, sets=confidence in setters, repeats=repeats)
            setters.discard(confidence)
        self.test_level = level
        self.settle()

    def dump(self) -> dict[str, Any]:
        """JSON: the whole state. Six digits of a logarithm are a millionth of the capital."""
        return {
            "delta": self.delta,
            "thresholds": self.thresholds,
            "shares": [round(share, 4) for share in self.shares],
            "bases": [[round(held, 6) for held in base] for base in self.bases],
            "bands": [[round(held, 6) for held in band] for band in self.bands],
            "peaks": [float(f"{min(peak, 1e300):.7g}") for peak in self.peaks],
            "weights": [round(w, 6) for w in self.weights],
            "agreed": [round(a, 6) for a in self.agreed],
            "unseen": self.unseen,
            "waited": self.waited,
            "winds": self.winds,
            "certified": self.certified,
            "entry": self.entry,
            "served": self.served,
            "limit": self.limit,
            "dependence": self.dependence.dump(),
            "exact": [self.exact_share, self.test_level, self.plain, self.tested],
            "overall": None if self.overall is None else {**self.overall.dump(), "winds": self.overall_winds},
        }

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> Slices:
        """What ``dump`` gave."""
        slices = cls(data["thresholds"], data["delta"])
        for name in ("shares", "bases", "bands", "winds", "peaks", "weights", "agreed"):
            setattr(slices, name, list(data[name]))
        slices.unseen, slices.waited = data["unseen"], data["waited"]
        slices.certified, slices.entry = data["certified"], data.get("entry")
        slices.served = data.get("served", True)
        # States from before there was a test bet all of delta.
        slices.limit = data.get("limit")
        slices.exact_share, slices.test_level, slices.plain, tested = data.get("exact", (0.0, 0.0, False, None))
        slices.tested = None if tested is None else (tested[0], tested[1])
        if "dependence" in data:
            slices.dependence = Dependence.load(data["dependence"])
        overall = data.get("overall")
        if overall is not None:
            slices.overall, slices.overall_winds = Overall.load(overall), overall["winds"]
        return slices


def _part(winds: int) -> float:
    """The part of the capital that goes in at the first start, or at a later one; all of them are no more than 1."""
    return FIRST_STAKE if winds == 0 else (1.0 - FIRST_STAKE) / (winds * (winds + 1))
