"""What the trust mathematics promises, measured by simulation beside its reference.

    python -m benchmarks.trust            minutes: a sample of every claim
    python -m benchmarks.trust --full     the sizes of the claims themselves

Each ``measure_*`` returns plain numbers; the tests assert the statistical ones through the same functions.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, product
from pathlib import Path
from typing import Any

from apprentice.confidence.acceptance import Slices, grid
from apprentice.confidence.certify import excess
from apprentice.confidence.correlation import Tally, chance
from apprentice.confidence.drift import Detector
from apprentice.confidence.forecast import Widening
from apprentice.confidence.phases import Phase
from apprentice.confidence.settings import TrustSettings
from apprentice.confidence.steering import Limits, Turn, steer
from apprentice.confidence.trust import Trust
from apprentice.confidence.trust_events import EventKind
from apprentice.confidence.watch import LocalObservation, Watch
from apprentice.confidence.weighing import Comparison
from apprentice.confidence.window import Seen, ServedWindow
from apprentice.evaluators import Evaluation, evaluator
from apprentice.simulation.simulate import LocalModel, Scenario, Training, load_scenario, simulate

DELTA = 0.05
SCENARIOS = Path(__file__).parent.parent / "examples" / "scenarios"
REACTIONS = {EventKind.SHIFT, EventKind.DRIFT, EventKind.COACHING, EventKind.EMERGENCY}
HIT, MISS = Evaluation(1.0, {}), Evaluation(0.0, {})

# The most confident 25, 50, 75 and 100 % of ISEAR after so many training answers: the row of 500 was measured with
# SmolLM2-135M; the others are guesses around it.
ISEAR_CURVE = {50: (0.80, 0.65, 0.52, 0.45), 500: (0.98, 0.90, 0.79, 0.68), 2000: (0.99, 0.95, 0.86, 0.74)}


@evaluator
def same(local: Any, remote: Any) -> Evaluation:
    """The evaluator of all these worlds: labels are equal or not."""
    return HIT if local == remote else MISS


class Labels:
    """A remote that answers labels of given frequencies, and a local model of a given correlation with it.

    The local answer is the remote's with probability rho, else an independent draw of the same frequencies: its
    correlation is then rho exactly, whatever the frequencies.
    """

    def __init__(self, frequencies: Sequence[float], draw: random.Random) -> None:
        self.labels = range(len(frequencies))
        self.cumulative = list(accumulate(frequencies))
        self.base = sum((f / self.cumulative[-1]) ** 2 for f in frequencies)
        self.draw = draw

    def rho(self, agreement: float) -> float:
        """The correlation of a model of this agreement."""
        return (agreement - self.base) / (1.0 - self.base)

    def one(self) -> int:
        """One label."""
        return self.draw.choices(self.labels, cum_weights=self.cumulative)[0]

    def pair(self, rho: float) -> tuple[int, int]:
        """(local, remote)."""
        remote = self.one()
        return (remote if self.draw.random() < rho else self.one()), remote


def tail_bound(trials: int, probability: float, fails: float = 1e-4) -> int:
    """The most successes that ``trials`` of at most ``probability`` exceed with probability at most ``fails``."""
    held = 0.0
    for count in range(trials + 1):
        log_term = (
            math.lgamma(trials + 1)
            - math.lgamma(count + 1)
            - math.lgamma(trials - count + 1)
            + count * math.log(probability)
            + (trials - count) * math.log1p(-probability)
        )
        held += math.exp(log_term)
        if held >= 1.0 - fails:
            return count
    return trials


# -- 1: certification ------------------------------------------------------------------------------------------------


def comparisons_to_certify(labels: Labels, rho: float, tau: float, horizon: int) -> int | None:
    """Looking after every comparison: how many until ``correlation >= tau`` is certified; None for never."""
    slices = Slices([0.0], DELTA)
    window = [labels.pair(rho) for _ in range(16)]
    for n in range(1, horizon + 1):
        local, remote = labels.pair(rho)
        c, _ = chance(local, remote, window, same, labels.draw)
        s = same(local, remote).score
        if slices.add(1.0, s, excess(s, c, correlation=tau, max_disagreement=None), 1.0):
            return n
        window.append((local, remote))
        if len(window) > 100:
            del window[0]
    return None


def balances() -> dict[str, list[float]]:
    """The label frequencies of the claims: 2, 7 and 77 classes, balanced, and with 95 % for the first."""
    worlds = {}
    for classes in (2, 7, 77):
        worlds[f"{classes} balanced"] = [1.0] * classes
        worlds[f"{classes} at 95/5"] = [0.95, *[0.05 / (classes - 1)] * (classes - 1)]
    return worlds


def measure_false_certification(
    frequencies: Sequence[float], streams: int, horizon: int, tau: float = 0.85, seed: int = 1
) -> int:
    """How many of ``streams`` at exactly rho = tau are ever certified."""
    labels = Labels(frequencies, random.Random(seed))
    return sum(comparisons_to_certify(labels, tau, tau, horizon) is not None for _ in range(streams))


def measure_time_to_certify(classes: int, streams: int, agreement: float = 0.95, tau: float = 0.85) -> float:
    """Median comparisons to certify a model of this agreement."""
    labels = Labels([1.0] * classes, random.Random(2))
    rho = labels.rho(agreement)
    return statistics.median(comparisons_to_certify(labels, rho, tau, 3000) or 3000 for _ in range(streams))


# -- 2: the model that always gives the commonest answer -------------------------------------------------------------


def measure_commonest(windows: int, tasks: int, comparisons: int) -> tuple[float, float, int]:
    """(mean agreement, mean correlation over windows of 100, tasks that leave phase 2) on a 95/5 task."""
    draw = random.Random(3)
    labels = Labels([0.95, 0.05], draw)
    agreements, correlations = [], []
    for _ in range(windows):
        tally = Tally()
        pairs = [(0, labels.one()) for _ in range(100)]
        for i, (local, remote) in enumerate(pairs):
            c, _ = chance(local, remote, pairs[i + 1 :] + pairs[:i], same, draw)
            tally.add(same(local, remote).score, c)
        agreements.append(tally.agreement or 0.0)
        # A window without the rare answer has nothing to correct for; its correlation is its agreement by definition.
        correlations.append(tally.correlation or 0.0)
    left = 0
    for _ in range(tasks):
        trust = Trust.fresh(TrustSettings())
        trust.promoted([], same, draw)
        for i in range(comparisons):
            remote = labels.one()
            trust.observe(Comparison(str(i), float(remote == 0), {}, draw.random(), 0, remote), same, draw)
            if trust.phase is Phase.SERVE:
                left += 1
                break
    return statistics.mean(agreements), statistics.mean(correlations), left


# -- 3: drift --------------------------------------------------------------------------------------------------------


class Cusum:
    """Page's CUSUM for a known change of a Bernoulli mean: the optimum that knows both ends."""

    def __init__(self, before: float, after: float, threshold: float) -> None:
        self.up = math.log((1.0 - after) / (1.0 - before))
        self.down = math.log(after / before)
        self.threshold = threshold
        self.sum = 0.0

    def add(self, score: float) -> bool:
        """Count one score; whether this is an alarm."""
        self.sum = max(0.0, self.sum + (self.down if score else self.up))
        return self.sum >= self.threshold


class PageHinkley:
    """river's, told to look for a rise of the disagreement."""

    def __init__(self, threshold: float) -> None:
        from river.drift import PageHinkley as River

        self.detector = River(min_instances=10, delta=0.025, threshold=threshold, alpha=1.0, mode="up")

    def add(self, score: float) -> bool:
        """Count one score; whether this is an alarm."""
        self.detector.update(1.0 - score)  # type: ignore[no-untyped-call]
        return bool(self.detector.drift_detected)


class Adwin:
    """river's ADWIN, counting only changes for the worse."""

    def __init__(self, delta: float) -> None:
        from river.drift import ADWIN

        self.detector = ADWIN(delta=delta, clock=1, grace_period=10)  # type: ignore[no-untyped-call]

    def add(self, score: float) -> bool:
        """Count one score; whether this is an alarm."""
        before = self.detector.estimation
        self.detector.update(1.0 - score)  # type: ignore[no-untyped-call]
        return bool(self.detector.drift_detected) and self.detector.estimation > before


def run_length(detector: Any, agreement: float, draw: random.Random, horizon: int) -> int:
    """Scores until the alarm, or ``horizon``."""
    uniform = draw.random
    for n in range(1, horizon + 1):
        if detector.add(1.0 if uniform() < agreement else 0.0):
            return n
    return horizon


def measure_false_alarms(runs: int, horizon: int = 200_000, make: Callable[[], Any] | None = None) -> float:
    """Mean number of scores at the promised agreement until a false alarm; runs cut at ``horizon`` count as that."""
    draw = random.Random(4)
    make = make or (lambda: Detector(0.95, 10_000))
    return statistics.mean(run_length(make(), 0.95, draw, horizon) for _ in range(runs))


def measure_delay(
    after: float, runs: int, make: Callable[[], Any] | None = None, warm_up: int = 0, seed: int = 5
) -> float:
    """Mean number of scores from the change to the alarm, after ``warm_up`` scores without one."""
    draw = random.Random(seed)
    make = make or (lambda: Detector(0.95, 10_000))
    delays: list[int] = []
    while len(delays) < runs:
        detector = make()
        if warm_up and run_length(detector, 0.95, draw, warm_up) < warm_up:
            continue
        delays.append(run_length(detector, after, draw, 20_000))
    return statistics.mean(delays)


def calibrated(
    make: Callable[[float], Any], low: float, high: float, far: float, runs: int, *, rising: bool
) -> tuple[float, float]:
    """The setting (bisected on a log scale) whose mean time to a false alarm is ``far``, and that mean time."""
    measured = 0.0
    for _ in range(7):
        middle = math.sqrt(low * high)
        measured = measure_false_alarms(runs, int(8 * far), partial(make, middle))
        if (measured < far) == rising:
            low = middle
        else:
            high = middle
    middle = math.sqrt(low * high)
    return middle, measured


# -- 4: acceptance slices --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Confidence:
    """A local model whose agreement at confidence rank u (0 the surest) is a logistic curve."""

    at_surest: float
    slope: float

    def agreement(self, rank: float) -> float:
        """At one rank."""
        return 1.0 / (1.0 + math.exp(-(self.at_surest - self.slope * rank)))

    def up_to(self, share: float, steps: int = 200) -> float:
        """Of the most confident ``share`` together."""
        return statistics.fmean(self.agreement(share * (i + 0.5) / steps) for i in range(steps))

    def largest(self, agreement: float) -> float:
        """The share that an oracle would serve at this agreement."""
        if self.up_to(1.0) >= agreement:
            return 1.0
        low, high = 0.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if self.up_to(middle) >= agreement else (low, middle)
        return low

    def bearable(self, limit: float) -> float:
        """The share that an oracle would serve where at most ``limit`` of all answers may differ."""
        low, high = 0.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if middle * (1.0 - self.up_to(middle)) <= limit else (low, middle)
        return high


def measure_slices(
    tasks: int, comparisons: int, *, target: float = 0.85, max_disagreement: float | None = None, seed: int = 6
) -> tuple[int, float, float]:
    """(tasks whose served slice is truly below target, mean coverage, mean coverage of an oracle).

    Every task has another model: its agreement on its surest answers and how fast it falls are drawn at random, from
    models that are good everywhere to models that are good nowhere.
    """
    draw = random.Random(seed)
    needed = 1.0 - (max_disagreement if max_disagreement is not None else (1.0 - target) * 6.0 / 7.0)
    below = 0
    served, oracle = [], []
    for _ in range(tasks):
        model = Confidence(draw.uniform(3.0, 6.0), draw.uniform(0.0, 6.0))
        labels = Labels([1.0] * 7, draw)
        slices: Slices | None = None
        waiting: list[tuple[float, float, float, float, bool]] = []
        window: list[tuple[int, int]] = [labels.pair(0.9) for _ in range(16)]
        for _ in range(comparisons):
            rank = draw.random()
            remote = labels.one()
            local = remote
            if draw.random() >= model.agreement(rank):
                local = (remote + 1 + draw.randrange(6)) % 7
            s = same(local, remote).score
            c, _ = chance(local, remote, window, same, draw)
            x = excess(s, c, correlation=target, max_disagreement=max_disagreement)
            window.append((local, remote))
            if len(window) > 100:
                del window[0]
            if slices is None:
                waiting.append((1.0 - rank, s, x, 1.0, False))
                if len(waiting) == TrustSettings().warm_up:
                    confidences = [g for g, *_ in waiting]
                    slices = Slices(grid(confidences, TrustSettings().min_coverage), DELTA, confidences)
                    slices.replay(waiting)
            else:
                slices.add(1.0 - rank, s, x, 1.0)
        threshold = slices.threshold if slices is not None else None
        share = 0.0 if threshold is None else 1.0 - threshold
        served.append(share)
        oracle.append(model.largest(needed))
        below += share > 0.0 and model.up_to(share) < needed
    return below, statistics.fmean(served), statistics.fmean(oracle)


def measure_overall(
    tasks: int, comparisons: int, limit: float, *, at_limit: bool = False, seed: int = 10
) -> tuple[int, float, float, float]:
    """(tasks that break the promise, mean coverage, that of an oracle, that of the same bets on what is served).

    At most ``limit`` of all answers may differ. Models are drawn as in `measure_slices`; ``at_limit`` draws ones whose
    smallest slice differs in just more than its whole traffic may, so that every certificate is a wrong one.
    """
    draw = random.Random(seed)
    settings = TrustSettings()
    broken = 0
    covered, oracle, before = [], [], []
    for _ in range(tasks):
        model = Confidence(draw.uniform(2.0, 6.0), draw.uniform(0.0, 8.0))
        flat = limit / settings.min_coverage * 1.02  # 2 % above what the first slice could bear
        both: list[Slices] = []
        waiting: list[tuple[float, float, float, float, bool]] = []
        for n in range(comparisons):
            rank = draw.random()
            wrong = (flat if rank < settings.min_coverage else 0.0) if at_limit else 1.0 - model.agreement(rank)
            s = float(draw.random() >= wrong)
            seen = (1.0 - rank, s, limit - (1.0 - s), 1.0)
            if both:
                for slices in both:
                    slices.add(*seen)
                continue
            waiting.append((*seen, False))
            if n + 1 == settings.warm_up:
                confidences = [g for g, *_ in waiting]
                thresholds = grid(confidences, settings.min_coverage)
                if at_limit:
                    thresholds = [1.0 - settings.min_coverage, 0.0]
                both = [
                    Slices(thresholds, DELTA, confidences, max_disagreement_overall=limit, served=False),
                    Slices(thresholds, DELTA, confidences),
                ]
                for slices in both:
                    slices.replay(waiting)
        share, old = (0.0 if slices.threshold is None else 1.0 - slices.threshold for slices in both)
        risk = flat * min(share, settings.min_coverage) if at_limit else share * (1.0 - model.up_to(share))
        broken += share > 0.0 and risk > limit
        covered.append(share)
        before.append(old)
        oracle.append(0.0 if at_limit else model.bearable(limit))
    return broken, statistics.fmean(covered), statistics.fmean(oracle), statistics.fmean(before)


# -- 5: the unbiased estimate ----------------------------------------------------------------------------------------


def measure_bias(runs: int, requests: int, agreement: float = 0.93) -> tuple[float, float, float]:
    """(bias of the estimate, its Monte-Carlo error, bias of the plain mean of the spot checks).

    The rate follows the scores, as in production: it rises after bad ones and falls after good ones.
    """
    draw = random.Random(7)
    labels = Labels([1.0] * 7, draw)
    rho = labels.rho(agreement)
    settings = TrustSettings(deferral=False, max_disagreement=0.2, decay_function="linear", arl=1e12)
    estimates, plain = [], []
    for _ in range(runs):
        trust = Trust.fresh(settings)
        trust.promoted(
            [
                Comparison("seed", same(*p).score, {}, 1.0, *p, seeded=True)
                for p in (labels.pair(rho) for _ in range(200))
            ],
            same,
            draw,
        )
        if trust.phase is not Phase.SERVE:
            continue
        scores = []
        for i in range(requests):
            rate = trust.policy_numbers.sampling_rate
            trust.watch((LocalObservation(1.0),))
            if draw.random() < rate:
                local, remote = labels.pair(rho)
                s = same(local, remote).score
                scores.append(s)
                trust.observe(Comparison(str(i), s, {}, 1.0, local, remote, rate, rate, True), same, draw)
        if trust.accepted_agreement is not None:
            estimates.append(trust.accepted_agreement - agreement)
            plain.append(statistics.fmean(scores) - agreement)
    error = statistics.stdev(estimates) / math.sqrt(len(estimates))
    return statistics.fmean(estimates), error, statistics.fmean(plain)


# -- 3b: coaching and emergency ---------------------------------------------------------------------------------------


class Checks:
    """Spot checks of a served slice of which ``share`` agree beyond chance, as the window keeps them."""

    def __init__(self, frequencies: Sequence[float], draw: random.Random) -> None:
        self.labels = Labels(frequencies, draw)
        self.draw = draw
        self.chances: dict[tuple[int, int], list[float]] = {}

    def one(self, rho: float) -> Seen:
        """One check at this correlation. Its chance score is one of 200 drawn once, as `chance` draws them."""
        local, remote = pair = self.labels.pair(rho)
        chances = self.chances.get(pair)
        if chances is None:
            chances = self.chances[pair] = [
                chance(local, remote, [self.labels.pair(rho) for _ in range(8)], same, self.draw)[0] for _ in range(200)
            ]
        return Seen(1.0, float(local == remote), chances[int(self.draw.random() * 200)], 1.0, [], [])

    def window(self, rho: float) -> ServedWindow:
        """A full one."""
        return ServedWindow(TrustSettings().window_size, (self.one(rho) for _ in range(TrustSettings().window_size)))


def measure_false_turns(
    frequencies: Sequence[float], rho: float, settings: TrustSettings, streams: int, checks: int, seed: int = 12
) -> tuple[float, float]:
    """(coachings, emergencies) in 1,000 spot checks of slices that are at this correlation all the time."""
    world = Checks(frequencies, random.Random(seed))
    turns = {Turn.COACHING: 0, Turn.EMERGENCY: 0, Turn.RECOVERED: 0}
    for _ in range(streams):
        window, limits, coaching = world.window(rho), Limits(settings.arl), False
        for _ in range(checks):
            seen = world.one(rho)
            window.add(seen)
            limits.add(seen, settings)
            turn = steer(settings, window, limits, rate=1.0, coaching=coaching, alarmed=False).turn
            if turn is None:
                continue
            turns[turn] += 1
            coaching = turn is Turn.COACHING
            if turn is Turn.EMERGENCY:
                window, limits = world.window(rho), Limits(settings.arl)
    thousands = streams * checks / 1000
    return turns[Turn.COACHING] / thousands, turns[Turn.EMERGENCY] / thousands


def steady_slices() -> list[tuple[str, list[float], float, TrustSettings, str]]:
    """(name, label frequencies, correlation, settings, what comparing estimates with the thresholds did)."""
    correlation, disagreement = TrustSettings(), TrustSettings(max_disagreement=0.05)
    worlds = [
        (f"correlation .85, {name}, at {rho}", frequencies, rho, correlation, reference)
        for name, frequencies, rho, reference in (
            ("2 labels", [1.0, 1.0], 0.93, "0 / 0"),
            ("7 labels", [1.0] * 7, 0.93, "0 / 0"),
            ("95/5", [95.0, 5.0], 0.93, ".78 / .08"),
            ("98/2", [98.0, 2.0], 0.95, "1.3 / .25"),
        )
    ]
    for name, frequencies, agreement, reference in (
        ("7 labels", [1.0] * 7, 0.97, "0 / 0"),
        ("95/5", [95.0, 5.0], 0.97, "11 / 4.9"),
        ("97/3", [97.0, 3.0], 0.98, "12 / 6.2"),
        ("99/1", [99.0, 1.0], 0.992, "5.6 / 13"),
    ):
        rho = Labels(frequencies, random.Random(0)).rho(agreement)
        named = f"at most .05 differ, {name}, {1 - agreement:.3f} do"
        worlds.append((named, frequencies, rho, disagreement, reference))
    return worlds


def falling_slices() -> list[tuple[str, list[float], float, TrustSettings, dict[float, str]]]:
    """(name, label frequencies, correlation before, settings, what comparing estimates did by correlation after)."""
    correlation, disagreement = TrustSettings(), TrustSettings(max_disagreement=0.05)
    return [
        ("correlation .85, 2 labels", [1.0] * 2, 0.95, correlation, {0.2: "17 / 55", 0.0: "12 / 52"}),
        ("correlation .85, 7 labels", [1.0] * 7, 0.95, correlation, {0.2: "8.4 / 51", 0.0: "6.7 / 50"}),
        ("correlation .85, 95/5", [95.0, 5.0], 0.97, correlation, {0.2: "39 / 72", 0.0: "30 / 61"}),
        ("at most .05 differ, 2 labels", [1.0] * 2, 0.95, disagreement, {0.2: "15 / 55", 0.0: "10 / 52"}),
        ("at most .05 differ, 7 labels", [1.0] * 7, 0.975, disagreement, {0.2: "7.3 / 51", 0.0: "5.1 / 50"}),
    ]


def measure_reaction(
    frequencies: Sequence[float], before: float, after: float, settings: TrustSettings, runs: int, most: int = 2000
) -> tuple[float, float]:
    """Mean spot checks from a fall of the correlation to (the first alarm, coaching or emergency, the emergency).

    Everything is served, after 400 held-out examples and 200 spot checks at ``before``; at most ``most`` are counted.
    """
    draw = random.Random(13)
    labels = Labels(frequencies, draw)
    first: list[int] = []
    emergency: list[int] = []
    while len(first) < runs:
        trust = Trust.fresh(replace(settings, deferral=False))
        pairs = [labels.pair(before) for _ in range(400)]
        trust.promoted([Comparison("seed", same(*p).score, {}, 1.0, *p, seeded=True) for p in pairs], same, draw)
        reacted: int | None = None
        for n in range(-200, most + 1):
            if trust.phase is not Phase.SERVE or (n <= 0 and reacted is not None):
                break
            local, remote = labels.pair(before if n < 0 else after)
            rate = trust.rate
            check = Comparison("check", same(local, remote).score, {}, 1.0, local, remote, rate, rate, True)
            kinds = {event.kind for event in trust.observe(check, same, draw)}
            if reacted is None and REACTIONS & kinds:
                reacted = n + 1
        if n > 0:
            first.append(most if reacted is None else reacted)
            emergency.append(n)
    return statistics.fmean(first), statistics.fmean(emergency)


# -- 3d: the second watch --------------------------------------------------------------------------------------------


def local_answer(draw: random.Random, strangers: float = 0.0) -> LocalObservation:
    """A confidence of Beta(12, 1), or of Beta(200, 1) for this share of answers; length and novelty as ever."""
    a = 200.0 if draw.random() < strangers else 12.0
    return LocalObservation(
        draw.random() ** (1.0 / a), input_length=draw.randrange(50, 500), novelty=draw.random() * 0.2
    )


def measure_unusual(streams: int, answers: int, seed: int = 14) -> float:
    """Alarms in 100,000 answers of traffic that stays as it is; each makes the watch learn anew what is usual."""
    alarms = 0
    for stream in range(streams):
        draw = random.Random(1000 * seed + stream)
        watch = Watch(TrustSettings().watch_arl)
        alarms += sum(bool(watch.add(local_answer(draw))) for _ in range(answers))
    return alarms * 100_000 / (streams * answers)


def measure_strangers(share: float, runs: int, usual: int, most: int = 30_000) -> float:
    """Mean answers until confident strangers, a ``share`` of them, raise an alarm, after ``usual`` without one."""
    draw = random.Random(15)
    delays: list[int] = []
    while len(delays) < runs:
        watch = Watch(TrustSettings().watch_arl)
        if any(watch.add(local_answer(draw)) for _ in range(usual)):
            continue
        delays.append(next((n for n in range(1, most) if watch.add(local_answer(draw, share))), most))
    return statistics.fmean(delays)


# -- 3e: what a fall costs until it is noticed ------------------------------------------------------------------------


def measure_bad_answers(most: float | None, fall: float, runs: int, agreement: float = 0.97) -> tuple[float, float]:
    """(answers that differ unchecked, more than before, from a fall to the first reaction; sampling rate before it).

    Everything is served and at most .05 may differ; 400 held-out examples and 600 spot checks come before the fall.
    """
    draw = random.Random(16)
    labels = Labels([1.0] * 7, draw)
    settings = TrustSettings(max_disagreement=0.05, max_bad_answers=most, deferral=False)
    bad: list[float] = []
    rates: list[float] = []
    while len(bad) < runs:
        trust = Trust.fresh(settings)
        pairs = [labels.pair(labels.rho(agreement)) for _ in range(400)]
        trust.promoted([Comparison("seed", same(*p).score, {}, 1.0, *p, seeded=True) for p in pairs], same, draw)
        cost = 0.0
        for n in range(-600, 50_000):
            if trust.phase is not Phase.SERVE:
                break
            rate = trust.rate
            if n == 0:
                rates.append(rate)
            if n >= 0:
                # As many unchecked answers as come before a check on average; the fall is their share of bad ones.
                cost += fall * (1.0 / rate - 1.0)
            local, remote = labels.pair(labels.rho(agreement - (fall if n >= 0 else 0.0)))
            check = Comparison("check", same(local, remote).score, {}, 1.0, local, remote, rate, rate, True)
            if REACTIONS & {event.kind for event in trust.observe(check, same, draw)}:
                break
        if n >= 0:
            bad.append(cost)
    return statistics.fmean(bad), statistics.fmean(rates)


# -- 3f: how good the forecast of a wider slice is ---------------------------------------------------------------------

# What agrees of each quarter of the traffic, the most confident first.
FORECAST_WORLDS = (
    (0.98, 0.82, 0.57, 0.35),
    (0.99, 0.91, 0.68, 0.38),
    (0.97, 0.89, 0.75, 0.59),
    (0.99, 0.97, 0.92, 0.80),
    (0.995, 0.975, 0.94, 0.89),
    (0.95, 0.91, 0.87, 0.79),
)
FORECAST_TARGETS: dict[str, TrustSettings] = {
    "correlation .85": TrustSettings(),
    "at most .05 of the served differ": TrustSettings(max_disagreement=0.05),
    "at most .10 of the served differ": TrustSettings(max_disagreement=0.10),
    "at most .05 of all answers differ": TrustSettings(max_disagreement_overall=0.05),
    "at most .10 of all answers differ": TrustSettings(max_disagreement_overall=0.10),
    "both": TrustSettings(max_disagreement=0.10, max_disagreement_overall=0.05),
}


def measure_forecast(
    runs: int,
    settings: TrustSettings,
    *,
    asked_at: Sequence[int] = (100, 200, 400, 800, 1600, 3200),
    patience: float = 5.0,
) -> list[tuple[Phase, float]]:
    """(phase at that time, actual / forecast comparisons) of every forecast in ``runs`` of each of `FORECAST_WORLDS`.

    100 held-out examples are the first requests. A slice that is not certified after ``patience`` times the requests of
    the forecast, or 50 times that where it is less than 50 requests, counts as infinite. Without campaigns: a forecast
    is made for the rate as it is.
    """
    settings = replace(settings, campaigns=False)
    found: list[tuple[Phase, float]] = []
    for run, world in product(range(runs), FORECAST_WORLDS):
        draw = random.Random(f"{run} {world}")
        labels = Labels([1.0] * 7, draw)

        def ask(labels: Labels = labels, world: Sequence[float] = world) -> tuple[float, tuple[int, int]]:
            rank = labels.draw.random()
            return 1.0 - rank, labels.pair(labels.rho(world[int(4.0 * rank)]))

        trust = Trust.fresh(settings)
        seed = [ask() for _ in range(100)]
        trust.promoted(
            [Comparison("seed", same(*pair).score, {}, g, *pair, seeded=True) for g, pair in seed], same, draw
        )
        moments = list(asked_at)
        open_: list[tuple[Phase, Widening, int, int]] = []
        requests, bought = 100, 100
        while moments or open_:
            if moments and requests >= moments[0]:
                del moments[0]
                forecast = trust.forecast()
                if forecast is not None:
                    open_.append((trust.phase, forecast, requests, bought))
            phase, threshold, rate = trust.policy_numbers
            g, pair = ask()
            served = phase is Phase.SERVE and threshold is not None and g >= threshold
            trust.watch((LocalObservation(g, served=served),))
            requests += 1
            if not served or draw.random() < rate:
                bought += 1
                probability, at = (rate if served else 1.0), (1.0 if threshold is None else rate)
                trust.observe(Comparison("live", same(*pair).score, {}, g, *pair, probability, at, served), same, draw)
            waiting = []
            for then, forecast, since, before in open_:
                if trust.threshold is not None and trust.threshold <= forecast.threshold:
                    found.append((then, (bought - before) / forecast.comparisons))
                elif requests - since > patience * max(forecast.requests, 50.0):
                    found.append((then, math.inf))
                else:
                    waiting.append((then, forecast, since, before))
            open_ = waiting
    return found


# -- 9: a version retrained after a change ---------------------------------------------------------------------------


def measure_retrained(
    runs: int, *, older: int, newer: int, share: float = 0.15, max_disagreement: float = 0.05
) -> float:
    """How often a version retrained after a change serves at once, though its served slice misses its target.

    Of ``older`` held-out examples, from before the change, 3 % differ; of ``newer`` ones a ``share`` is of a new kind,
    of which the new version gets 40 % wrong. Confidence says nothing. ``older=0`` is what a promotion does.
    """
    draw = random.Random(9)
    labels = Labels([1.0] * 7, draw)
    settings = TrustSettings(max_disagreement=max_disagreement)
    at_once = 0
    for _ in range(runs):
        wrong = [0.03] * older + [0.4 if draw.random() < share else 0.03 for _ in range(newer)]
        pairs = [labels.pair(labels.rho(1.0 - rate)) for rate in wrong]
        seed = [Comparison("seed", same(*p).score, {}, draw.random(), *p, seeded=True) for p in pairs]
        trust = Trust.fresh(settings)
        trust.promoted(seed, same, draw)
        at_once += trust.phase is Phase.SERVE
    return at_once / runs


# -- 11: a lineage of refits -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lineage:
    """What `measure_lineage` found; means over the runs."""

    wrongly: float
    """Share of the runs that ever served while the refit of that moment differed too often."""
    local: float
    """Share of all requests that the local model answered without a check."""
    bad_last: float
    """Unchecked local answers that differed, after the last refit."""


def measure_lineage(
    runs: int,
    differs: Sequence[float],
    requests: int,
    carries: float | None,
    *,
    in_shadow: bool = True,
    counted: bool = False,
    max_disagreement: float = 0.1,
) -> Lineage:
    """A learner that is refitted before every ``requests`` requests, and then differs from the remote in ``differs``.

    ``carries`` is what each refit asks for; None lets it begin anew with a fifth of all answers bought so far, held out
    from learning, as every version did. Without ``in_shadow`` only trust that serves is carried; ``counted`` counts the
    refits before as attempts on the same held-out answers. Confidence says nothing, and one slice is everything.
    """
    draw = random.Random(11)
    labels = Labels([1.0] * 7, draw)
    settings = TrustSettings(max_disagreement=max_disagreement, deferral=False)
    wrongly = local_answers = bad_last = 0
    for _ in range(runs):
        trust = Trust.fresh(settings)
        bought = 0
        wrong = False
        for i, share in enumerate(differs):
            rho = labels.rho(1.0 - share)
            going_on = trust.heritable and (in_shadow or trust.phase is Phase.SERVE)
            if i > 0 and carries is not None and going_on:
                trust.succeed(carries=carries)
            else:
                pairs = [labels.pair(rho) for _ in range(bought // 5)]
                seed = [Comparison("seed", same(*p).score, {}, 1.0, *p, seeded=True) for p in pairs]
                trust.promoted(seed, same, draw, attempts=i + 1 if counted else 1)
            for _ in range(requests):
                phase, _, rate = trust.policy_numbers
                served = phase is Phase.SERVE
                wrong = wrong or (served and share > max_disagreement)
                trust.watch((LocalObservation(1.0, served=served),))
                local, remote = labels.pair(rho)
                s = same(local, remote).score
                if served and draw.random() >= rate:
                    local_answers += 1
                    bad_last += i + 1 == len(differs) and s < 1.0
                    continue
                bought += 1
                trust.observe(
                    Comparison("live", s, {}, 1.0, local, remote, rate if served else 1.0, rate, served), same, draw
                )
        wrongly += wrong
    return Lineage(wrongly / runs, local_answers / (runs * requests * len(differs)), bad_last / runs)


# -- 8, offline: a stream like ISEAR ---------------------------------------------------------------------------------


def measure_isear(runs: int, max_disagreement: float, held_out: float = 0.2, delta: float = DELTA) -> dict[str, float]:
    """4,000 requests with a local model whose agreement follows ``ISEAR_CURVE``; means over ``runs`` streams."""
    scenario = Scenario(
        "isear",
        requests=4000,
        local=LocalModel(curve=ISEAR_CURVE),
        training=Training(first=500, growth=1.0, held_out=held_out, delay=0),
        trust=TrustSettings(max_disagreement=max_disagreement, delta=delta),
    )
    results = [simulate(replace(scenario, seed=seed), points=60) for seed in range(1, runs + 1)]
    summaries = [result.summary() for result in results]
    served = sum(result.local_served for result in results)
    first = [next((p["from_request"] for p in s["phases"] if p["phase"] == 3), 4000) for s in summaries]
    return {
        "remote_share": statistics.fmean(s["remote_share"] for s in summaries),
        "remote_share_tail": statistics.fmean(s["remote_share_tail"] for s in summaries),
        "coverage": statistics.fmean(s["coverage"] for s in summaries),
        "agreement_local": sum(result.local_agreed for result in results) / max(1, served),
        "first_served": statistics.median(first),
    }


# -- the table -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure everything and print it."""
    from rich.console import Console

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the sizes of the claims themselves")
    full = parser.parse_args().full
    console = Console(width=150, highlight=False)

    def line(what: str, measured: str, reference: str, ok: bool | None = None) -> None:
        mark = {True: "[green]ok[/]", False: "[red]MISSED[/]", None: ""}[ok]
        console.print(f"  {what:<58} {measured:>26}   {reference:<46} {mark}")

    def head(text: str) -> None:
        console.print(f"\n[bold]{text}[/]")

    streams, horizon = (2000, 500) if full else (200, 300)
    head(f"1  False certification at rho = tau = .85, {streams:,} streams of {horizon}, looking after every comparison")
    for name, frequencies in balances().items():
        wrong = measure_false_certification(frequencies, streams, horizon)
        line(
            f"{name} classes",
            f"{wrong / streams:.2%}",
            "at most 5 %; 2.7 % (7 balanced, design)",
            wrong <= DELTA * streams,
        )
    for classes, limit, known in ((7, 110, 96), (77, 80, 71)):
        median = measure_time_to_certify(classes, 1000 if full else 200)
        line(
            f"{classes} classes: median to certify .95",
            f"{median:.0f} comparisons",
            f"at most {limit}; design {known}",
            median <= limit,
        )

    windows, tasks, count = (1000, 1000, 1000) if full else (300, 40, 400)
    head(f"2  Always the commonest class of 95/5: {windows} windows, {tasks} tasks of {count} comparisons")
    agreement, rho, left = measure_commonest(windows, tasks, count)
    line("agreement", f"{agreement:.3f}", ".95")
    line("correlation", f"{rho:.3f}", "at most .05", rho <= 0.05)
    line("tasks that leave phase 2", f"{left / tasks:.1%}", "at most 5 %", left <= DELTA * tasks)

    runs, delays = (200, 2000) if full else (30, 300)
    head(f"3  Drift: mean spot checks to a false alarm ({runs} runs) and to a true one ({delays} runs)")
    far = measure_false_alarms(runs)
    line("Shiryaev-Roberts: to a false alarm", f"{far:,.0f}", "at least 10,000", far >= 10_000)
    ours = {after: measure_delay(after, delays) for after in (0.80, 0.90)}
    line(
        "Shiryaev-Roberts: .95 -> .80 / .95 -> .90",
        f"{ours[0.8]:.0f} / {ours[0.9]:.0f}",
        "at most 58 / 310",
        ours[0.8] <= 58 and ours[0.9] <= 310,
    )
    late = {after: measure_delay(after, delays // 3, warm_up=500) for after in (0.80, 0.90)}
    line("  the same, after 500 good scores", f"{late[0.8]:.0f} / {late[0.9]:.0f}", "")
    rivals: list[tuple[str, Callable[[float, float], Any], float, float, bool]] = [
        ("CUSUM, told both ends", lambda after, h: Cusum(0.95, after, h), 1.0, 12.0, True),
        ("Page-Hinkley (river)", lambda _, h: PageHinkley(h), 1.0, 60.0, True),
        ("ADWIN (river)", lambda _, d: Adwin(d), 1e-9, 0.5, False),
    ]
    for name, make, low, high, rising in rivals:
        measured = []
        alarm = 0.0
        for after in (0.80, 0.90):
            setting, alarm = calibrated(partial(make, after), low, high, far, 40 if full else 12, rising=rising)
            measured.append(measure_delay(after, delays // 3, partial(make, after, setting), warm_up=500))
        line(
            f"{name}, same false alarms ({alarm:,.0f})",
            f"{measured[0]:.0f} / {measured[1]:.0f}",
            "optimum with known parameters 42 / 203 at 10,000",
        )

    many = 300 if full else 20
    head(f"3b Coaching and emergency in 1,000 checks of slices that are equally good all the time, {many} streams")
    for name, frequencies, rho, settings, reference in steady_slices():
        coachings, emergencies = measure_false_turns(frequencies, rho, settings, many, 1000)
        line(name, f"{coachings:.3f} / {emergencies:.3f}", f"by estimates {reference}", coachings + emergencies <= 0.1)
    many = 100 if full else 10
    head(f"3c Checks from a fall of the correlation to the first reaction / to an emergency, {many} runs")
    for name, frequencies, rho, settings, references in falling_slices():
        for after, reference in references.items():
            first, emergency = measure_reaction(frequencies, rho, after, settings, many)
            line(f"{name}, {rho} to {after}", f"{first:.0f} / {emergency:.0f}", f"by estimates {reference}")

    streams, answers = (100, 20_000) if full else (10, 10_000)
    head("3d The second watch: answers until confident strangers, Beta(200,1) among Beta(12,1), are noticed")
    far = TrustSettings().watch_arl
    false = measure_unusual(streams, answers)
    most = tail_bound(streams * answers, 1 / far) * 100_000 / (streams * answers)
    line(
        f"false alarms in 100,000 answers, {streams} streams",
        f"{false:.1f}",
        f"at most {100_000 / far:.0f}",
        false <= most,
    )
    for share, reference in ((0.1, "1,011"), (0.2, "162"), (0.4, "56")):
        after_many, after_few = (measure_strangers(share, 50 if full else 10, usual) for usual in (4000, 400))
        line(
            f"{share:.0%} strangers, after 4,000 / 400 usual answers",
            f"{after_many:,.0f} / {after_few:,.0f}",
            f"never from below; deciles known from 2,000: {reference}",
        )

    many = 100 if full else 10
    head(f"3e Bad answers, more than before, from a fall below .97 until it is noticed; target .05, {many} runs")
    for budget in (None, 100.0, 30.0):
        for fall in (0.05, 0.10, 0.20):
            cost, rate = measure_bad_answers(budget, fall, many)
            line(
                "floor .02" if budget is None else f"max_bad_answers {budget:.0f}",
                f"{cost:.0f} at a rate of {rate:.3f}",
                f"fall by {fall}",
                None if budget is None else cost <= 1.3 * budget,
            )

    many = 40 if full else 5
    head(f"3f Actual comparisons until a wider slice is certified, by the forecast, {6 * many} streams")
    for name, target in FORECAST_TARGETS.items():
        forecasts = measure_forecast(many, target)
        for phase in (Phase.SHADOW, Phase.SERVE):
            ratios = sorted(ratio for then, ratio in forecasts if then is phase)
            if len(ratios) < 10:
                continue
            low, lower, median, upper, high = (ratios[int(q * (len(ratios) - 1))] for q in (0.1, 0.25, 0.5, 0.75, 0.9))
            line(
                f"{name}, {phase.name.lower()}: median ({len(ratios)})",
                f"{median:.2f}",
                f"deciles {low:.2f}, {high:.2f}; quartiles {lower:.2f}, {upper:.2f}",
                2 / 3 <= median <= 1.5,
            )

    tasks = 1000 if full else 100
    head(f"4  Acceptance slices after 1,000 comparisons, {tasks} tasks with models of every quality")
    for name, loss in (
        ("correlation .85", None),
        ("disagreement at most .10", 0.10),
        ("disagreement at most .05", 0.05),
    ):
        below, covered, best = measure_slices(tasks, 1000, max_disagreement=loss)
        line(
            f"{name}: served slice truly below target",
            f"{below / tasks:.1%}",
            "at most 5 %",
            below <= (DELTA * tasks if full else tail_bound(tasks, DELTA)),
        )
        line(
            "  coverage beside an oracle's",
            f"{covered:.3f} of {best:.3f} = {covered / best:.2f}",
            "at least .80, aim .90",
            covered >= 0.8 * best,
        )

    many = 2000 if full else 200
    head(f"4b At most so many of all answers differ, after 600 comparisons, {many} tasks")
    for most in (0.05, 0.10):
        broken = measure_overall(many, 600, most, at_limit=True)[0]
        line(
            f"{most:.2f}: wrong certificates where no slice may be served",
            f"{broken / many:.1%}",
            "at most 5 %",
            broken <= (DELTA * many if full else tail_bound(many, DELTA)),
        )
        broken, covered, best, old = measure_overall(many, 600, most)
        line(
            "  coverage, models of every quality",
            f"{covered:.3f}",
            f"oracle {best:.3f}; {most:.2f} of the served {old:.3f}",
            broken <= tail_bound(many, DELTA),
        )

    many = 2000 if full else 60
    head(f"4c A learner refitted 20 times, 50 requests each; at most .10 of what is served may differ; {many} runs")
    worlds = (
        ("differs in .102 all the time", [0.102] * 20),
        ("falls from .23 to .03", [0.2 * (1.0 - i / 20) ** 2 + 0.03 for i in range(20)]),
    )
    ways = (
        ("each begins anew", None, True, False),
        ("all is carried, in shadow too", 0.25, True, False),
        ("carried while it serves, attempts counted", 0.25, False, True),
    )
    for world, course in worlds:
        for way, carries, in_shadow, counted in ways:
            found = measure_lineage(many, course, 50, carries, in_shadow=in_shadow, counted=counted)
            line(
                f"{world}: {way}",
                f"{found.local:.3f} answered locally",
                f"wrongly {found.wrongly:.1%}, at most 5 %",
                None if carries is None else found.wrongly * many <= tail_bound(many, DELTA),
            )
    many = 200 if full else 20
    head(f"4d The eleventh refit differs in .20 instead of .05; 400 requests each, {many} runs")
    for carries in (None, 0.0, 0.25, 1.0):
        found = measure_lineage(many, [0.05] * 10 + [0.2], 400, carries, in_shadow=False, counted=True)
        line(
            "each begins anew" if carries is None else f"carried with a rate of at least {carries}",
            f"{found.bad_last:.1f} bad answers",
            f"{found.local:.3f} answered locally",
        )

    bias, error, plain = measure_bias(1000 if full else 100, 2000)
    head("5  Agreement of what was served, with a sampling rate that follows the scores")
    line(
        "bias of the estimate",
        f"{bias:+.5f} +- {error:.5f}",
        "within 4 Monte-Carlo errors of 0",
        abs(bias) <= 4 * error,
    )
    line("bias of the plain mean", f"{plain:+.5f}", "")

    runs = 300 if full else 40
    head("9  A version retrained after 15 % of a new kind came, 8.6 % wrong where 5 % is promised: serves at once")
    line("seeds of any age (1,900 older, 100 newer)", f"{measure_retrained(runs, older=1900, newer=100):.2f}", "")
    fresh = measure_retrained(runs, older=0, newer=100)
    line(
        "seeds from after the change only (100)", f"{fresh:.2f}", "at most .05", fresh <= tail_bound(runs, DELTA) / runs
    )

    head("6, 7  Scenarios: steepest fall of the sampling rate a comparison, and speed")
    for path in sorted(SCENARIOS.glob("*.yaml")):
        scenario = load_scenario(path)
        result = simulate(scenario)
        summary = result.summary()
        speed = summary["requests_per_core_second"]
        line(
            f"{scenario.name}: {speed:,} requests/s",
            f"x {result.steepest_fall:.3f}",
            f"at least x {1.0 - scenario.trust.max_fall}; 20,000 requests/s",
            result.steepest_fall >= 1.0 - scenario.trust.max_fall - 1e-9 and speed >= 20_000,
        )

    head("8  A stream like ISEAR (4,000 requests, simulated): remote share / last third, realised agreement")
    aims: tuple[tuple[float, str, tuple[float, float]], ...] = (
        (0.05, "rivals .91-.99 / .85-.98, aim .75 / .60", (0.75, 0.60)),
        (0.10, "rivals .75-.83 / .66-.81", (0.83, 0.81)),
    )
    for loss, reference, (share, tail) in aims:
        for held_out, delta in ((0.2, 0.05), (0.4, 0.05), (0.4, 0.2)):
            s = measure_isear(60 if full else 10, loss, held_out, delta)
            line(
                f"at most {loss:.0%}, held out {held_out:.0%}, delta {delta}: from request {s['first_served']:,.0f}",
                f"{s['remote_share']:.3f} / {s['remote_share_tail']:.3f}, {s['agreement_local']:.3f}",
                reference,
                s["agreement_local"] >= 1.0 - loss and s["remote_share"] <= share and s["remote_share_tail"] <= tail,
            )


if __name__ == "__main__":
    main()
