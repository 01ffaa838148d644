"""`apprentice simulate SCENARIO.yaml`: the decision loop against a simulated remote and a simulated local model.

No model is loaded. What decides is the real thing: ``decision.decide``, ``Trust.observe``, the real evaluator
interface. What is simulated is the world: how often a local model trained on n answers agrees with the remote, how
well its confidence tells when, and what happens to either over time. So a user can try thresholds on a world like
theirs before going live, and the tests can count how often a promise is broken over many worlds.
"""

from __future__ import annotations

import json
import math
import random
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, get_type_hints

from apprentice.confidence.decision import Headroom, Plan, Policy, decide
from apprentice.confidence.drift import change_time
from apprentice.confidence.phases import Phase
from apprentice.confidence.settings import TrustSettings
from apprentice.confidence.steering import tolerated
from apprentice.confidence.trust import Trust
from apprentice.confidence.trust_events import Event, EventKind
from apprentice.confidence.watch import LocalObservation
from apprentice.confidence.weighing import Comparison
from apprentice.errors import ConfigError, MissingExtra, Problem
from apprentice.evaluators import Evaluation, evaluator

__all__ = [
    "Happening",
    "LocalModel",
    "Point",
    "Result",
    "Scenario",
    "Training",
    "load_scenario",
    "picture",
    "report",
    "run_command",
    "simulate",
]

_STEPS = 400


@dataclass(frozen=True, slots=True)
class LocalModel:
    """How good the local model is.

    ``curve`` maps the number of training answers to the agreement with the remote on the most confident 25, 50, 75
    and 100 % of requests; between two sizes the log-odds go with the logarithm of the size. ``always`` makes it answer
    that class whatever it is asked. ``certainty`` blurs its confidence: 1 ranks requests exactly as the curve says,
    0 not at all.
    """

    curve: Mapping[int, Sequence[float]] = field(default_factory=lambda: {50: (0.9, 0.8, 0.7, 0.6)})
    always: int | None = None
    certainty: float = 1.0


@dataclass(frozen=True, slots=True)
class Training:
    """When a new version is trained, and on what.

    The first at ``first`` answers, then whenever ``batch`` new ones came and the corpus grew by ``growth``. One in
    1 / ``held_out`` answers is never trained on; the new version answers these at its promotion. ``delay`` requests
    pass between the start of a run and the promotion. ``enabled: false`` keeps the first version forever.
    """

    first: int = 500
    batch: int = 100
    growth: float = 0.5
    held_out: float = 0.2
    delay: int = 200
    enabled: bool = True


@dataclass(frozen=True, slots=True)
class Happening:
    """Something that happens at request ``at``.

    - ``shift``: the local model's agreement is multiplied by ``factor`` from one request to the next;
    - ``drift``: likewise, little by little over ``over`` requests;
    - ``teacher_change``: the remote answers a ``share`` of requests differently from then on.

    A version trained after it has learnt the new world: retraining undoes it, as far as its training answers are new.
    """

    at: int
    kind: str
    factor: float = 1.0
    over: int = 0
    share: float = 0.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """A world, and the thresholds tried in it."""

    name: str
    description: str = ""
    requests: int = 100_000
    seed: int = 1
    classes: Sequence[float] = (1.0,) * 7
    """Relative frequencies of the remote's answers."""
    teacher_noise: float = 0.0
    """Share of requests on which the remote's answer is a coin toss that nobody can learn."""
    price_remote: float = 0.002
    """What one remote answer costs, in the budget's currency."""
    local: LocalModel = field(default_factory=LocalModel)
    training: Training = field(default_factory=Training)
    happenings: Sequence[Happening] = ()
    trust: TrustSettings = field(default_factory=TrustSettings)


@dataclass(frozen=True, slots=True)
class Point:
    """The stream between two moments, and the state at the second."""

    request: int
    phase: int
    coverage: float
    sampling_rate: float
    remote_share: float
    """Of the requests since the last point."""
    correlation: float | None
    """The served slice's, over its window."""
    true_agreement: float | None
    """Of the served slice: what an oracle would measure. None where nothing is served."""
    true_correlation: float | None
    cost: float
    cost_without: float
    sampling_floor: float
    """What the sampling rate does not fall below."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a scenario."""

    scenario: Scenario
    points: Sequence[Point]
    events: Sequence[tuple[int, Event]]
    remote_calls: int
    local_served: int
    local_agreed: int
    versions: Sequence[Mapping[str, Any]]
    phases: Sequence[tuple[int, int]]
    """(first request, phase)."""
    delays: Sequence[Mapping[str, Any]]
    """For each happening, the requests and spot checks until the first alarm, coaching or emergency; None for never."""
    steepest_fall: float
    """The smallest ratio of one sampling rate to the one before it within phase 3, campaigns and forced checks aside;
    never below 1 - ``max_fall``."""
    wall_seconds: float
    cpu_seconds: float

    @property
    def remote_share(self) -> float:
        """Remote calls per request."""
        return self.remote_calls / self.scenario.requests

    @property
    def agreement_local(self) -> float | None:
        """Of the answers that the local model gave to callers, the share that the remote would have given too."""
        return self.local_agreed / self.local_served if self.local_served else None

    def summary(self) -> dict[str, Any]:
        """JSON: the figures without the curves."""
        tail = [p for p in self.points if p.request > self.scenario.requests * 2 / 3]
        last = self.points[-1]
        return {
            "scenario": self.scenario.name,
            "requests": self.scenario.requests,
            "remote_calls": self.remote_calls,
            "remote_share": round(self.remote_share, 4),
            "remote_share_tail": round(sum(p.remote_share for p in tail) / len(tail), 4) if tail else None,
            "agreement_local": None if self.agreement_local is None else round(self.agreement_local, 4),
            "local_served": self.local_served,
            "disagreement_overall": round((self.local_served - self.local_agreed) / self.scenario.requests, 4),
            "coverage": round(last.coverage, 4),
            "spend": round(last.cost, 2),
            "spend_without": round(last.cost_without, 2),
            "phases": [{"phase": phase, "from_request": at} for at, phase in self.phases],
            "versions": list(self.versions),
            "delays": list(self.delays),
            "steepest_fall": round(self.steepest_fall, 4),
            "events": [{"request": at, "kind": e.kind.value, **e.evidence} for at, e in self.events],
            "wall_seconds": round(self.wall_seconds, 2),
            "requests_per_core_second": round(self.scenario.requests / max(self.cpu_seconds, 1e-9)),
        }


# -- the world -----------------------------------------------------------------------------------------------------

_HIT = Evaluation(1.0, {})
_MISS = Evaluation(0.0, {})


@evaluator
def _same(local: Any, remote: Any) -> Evaluation:
    return _HIT if local == remote else _MISS


def _logit(p: float) -> float:
    p = min(1.0 - 1e-6, max(1e-6, p))
    return math.log(p / (1.0 - p))


def _expit(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def _odds(cumulative: Sequence[float]) -> list[float]:
    """Log-odds of agreement in each quarter, most confident first, from agreement on the quarters together."""
    if len(cumulative) == 1:
        return [_logit(cumulative[0])] * 4
    marginal, before = [], 0.0
    for k, a in enumerate(cumulative, start=1):
        marginal.append(_logit(k * a - before))
        before = k * a
    return marginal


def _curve(odds: Sequence[float]) -> list[float]:
    """Agreement at each of ``_STEPS`` ranks of confidence: log-odds straight between the quarters' middles."""
    table = []
    for i in range(_STEPS):
        place = (i + 0.5) / _STEPS * 4 - 0.5
        k = min(2, max(0, math.floor(place)))
        table.append(_expit(odds[k] + (odds[k + 1] - odds[k]) * (place - k)))
    return table


def _skill(curve: Mapping[int, Sequence[float]], size: int) -> list[float]:
    """The agreement table of a model trained on ``size`` answers."""
    sizes = sorted(curve)
    if size <= sizes[0]:
        return _curve(_odds(curve[sizes[0]]))
    if size >= sizes[-1]:
        return _curve(_odds(curve[sizes[-1]]))
    right = bisect_right(sizes, size)
    low, high = sizes[right - 1], sizes[right]
    part = (math.log(size) - math.log(max(1, low))) / (math.log(high) - math.log(max(1, low)))
    below, above = _odds(curve[low]), _odds(curve[high])
    return _curve([a + (b - a) * part for a, b in zip(below, above, strict=True)])


class _World:
    """The remote, the requests, and what each version of the local model would answer."""

    def __init__(self, scenario: Scenario, draw: random.Random) -> None:
        self.scenario = scenario
        self.random = draw.random
        self.cumulative = list(accumulate(scenario.classes))
        self.total = self.cumulative[-1]
        self.table: list[float] = []
        self.trained_at = 0
        self.factor = 1.0

    def learn(self, size: int, request: int) -> None:
        """A version trained on ``size`` answers takes over; ``request`` is when its training data ended."""
        self.table = _skill(self.scenario.local.curve, size)
        self.trained_at = request

    def label(self) -> int:
        return bisect_right(self.cumulative, self.random() * self.total)

    def other(self, label: int) -> int:
        if len(self.cumulative) < 2:
            return label
        while True:
            found = self.label()
            if found != label:
                return found

    def decay(self, request: int) -> float:
        """By what the agreement of the version in use is multiplied at this moment."""
        factor = 1.0
        for happening in self.scenario.happenings:
            if request < happening.at or self.trained_at >= happening.at + happening.over:
                continue
            loss = happening.share if happening.kind == "teacher_change" else 1.0 - happening.factor
            done = 1.0 if happening.over <= 0 else min(1.0, (request - happening.at) / happening.over)
            learnt = 0.0
            if happening.over > 0 and self.trained_at > happening.at:
                learnt = (self.trained_at - happening.at) / happening.over
            factor *= 1.0 - loss * max(0.0, done - learnt)
        noise = self.scenario.teacher_noise
        return factor * (1.0 - noise)

    def confidence(self, rank: float) -> float:
        certainty = self.scenario.local.certainty
        if certainty < 1.0:
            rank = certainty * rank + (1.0 - certainty) * self.random()
        return 1.0 - rank

    def answers(self, rank: float) -> tuple[int, int]:
        """(local, remote) for a request whose local answer has this rank of confidence."""
        remote = self.label()
        always = self.scenario.local.always
        if always is not None:
            return always, remote
        agrees = self.random() < self.table[int(rank * _STEPS)] * self.factor
        return (remote if agrees else self.other(remote)), remote

    def correlation(self, agreement: float | None) -> float | None:
        """What ``agreement`` is worth once chance is taken out: the exact rho of these frequencies."""
        if agreement is None:
            return None
        shares = [share / self.total for share in self.scenario.classes]
        always = self.scenario.local.always
        by_chance = sum(share * share for share in shares) if always is None else shares[always]
        return 1.0 - (1.0 - agreement) / (1.0 - by_chance) if by_chance < 1.0 else agreement

    def truth(self, threshold: float) -> float | None:
        """Agreement of the slice above ``threshold``, by numerical integration."""
        scenario = self.scenario
        if scenario.local.always is not None:
            return scenario.classes[scenario.local.always] / self.total
        certainty = scenario.local.certainty
        hit = mass = 0.0
        for i, agreement in enumerate(self.table):
            rank = (i + 0.5) / _STEPS
            # P(1 - (certainty * rank + (1 - certainty) * U) >= threshold)
            room = 1.0 - threshold - certainty * rank
            inside = float(room >= 0.0) if certainty >= 1.0 else min(1.0, max(0.0, room / (1.0 - certainty)))
            hit += inside * agreement
            mass += inside
        return hit / mass * self.factor if mass else None


# -- the loop ------------------------------------------------------------------------------------------------------

_CHANGES = {EventKind.SHIFT, EventKind.DRIFT, EventKind.EMERGENCY}
_ALARMS = {EventKind.SHIFT, EventKind.DRIFT, EventKind.COACHING, EventKind.EMERGENCY}


def simulate(scenario: Scenario, *, seed: int | None = None, points: int = 200) -> Result:
    """Run ``scenario`` through the decision loop; ``points`` moments of it are kept for the picture.

    ``seed`` overrides the scenario's own. One core, more than 20,000 requests a second where most are served locally.
    """
    began, began_cpu = time.perf_counter(), time.process_time()
    draw = random.Random(scenario.seed if seed is None else seed)
    world = _World(scenario, draw)
    trust = Trust.fresh(scenario.trust)
    headroom = Headroom()
    uniform = draw.random
    training = scenario.training
    every = max(1, scenario.requests // points)

    champion: str | None = None
    examples = trained_on = seen_at_training = 0
    ready_at: int | None = None
    ready_size = ready_began = attempts = 0
    # Request, rank, probability, rate: the answers themselves are drawn anew.
    held_out: list[tuple[int, float, float, float]] = []
    checked: list[int] = []
    changed = 0.0
    versions: list[Mapping[str, Any]] = []
    events: list[tuple[int, Event]] = []
    kept: list[Point] = []
    phases: list[tuple[int, int]] = [(0, int(Phase.COLLECT))]
    remote_calls = local_served = local_agreed = remote_before = checks = 0
    steepest = 1.0
    alarms: dict[int, tuple[int, int]] = {}
    checks_at: dict[int, int] = {}
    starts = {h.at: i for i, h in enumerate(scenario.happenings)}

    numbers, asked_for = trust.policy_numbers, trust.rate
    policy = Policy()
    world.factor = world.decay(0)
    changing = bool(scenario.happenings)

    def note(request: int, happened: Sequence[Event]) -> None:
        nonlocal changed
        for event in happened:
            events.append((request, event))
            if event.kind in _CHANGES:
                changed = change_time(request, checked, event.evidence.get("began_checks_ago"))
            if event.kind is EventKind.PHASE:
                phases.append((request, int(event.evidence["after"])))
            elif event.kind in _ALARMS:
                for i, happening in enumerate(scenario.happenings):
                    if happening.at <= request and i not in alarms:
                        alarms[i] = (request - happening.at, checks - checks_at.get(i, 0))

    for request in range(scenario.requests):
        if changing and (request % 20 == 0 or request in starts):
            world.factor = world.decay(request)
            if request in starts:
                checks_at[starts[request]] = checks
        plan: Plan = decide(policy, headroom, uniform())
        rank = uniform()
        paid = plan.remote
        if plan.local:
            g = world.confidence(rank)
            serving = policy.threshold is not None and g >= policy.threshold
            happened = trust.watch((LocalObservation(g, served=serving),))
            deferred = plan.defer and not serving
            paid = paid or deferred
            if paid:
                local, remote = world.answers(rank)
                probability = policy.sampling_rate if serving else 1.0
                rate = policy.sampling_rate if policy.threshold is not None else 1.0
                checks += serving
                if serving:
                    checked.append(request)
                happened = happened + trust.observe(
                    Comparison(str(request), float(local == remote), {}, g, local, remote, probability, rate, serving),
                    _same,
                    draw,
                )
                if uniform() < training.held_out:
                    held_out.append((request, rank, probability, rate))
            else:
                local, remote = world.answers(rank)
                local_served += 1
                local_agreed += local == remote
            if happened:
                note(request, happened)
        elif paid and uniform() < training.held_out:
            held_out.append((request, rank, 1.0, 1.0))
        if paid:
            remote_calls += 1
            examples += 1
            # Training: due, then under way, then promoted.
            if ready_at is None and (
                (not versions and examples >= training.first)
                or (
                    training.enabled
                    and versions
                    and examples - seen_at_training >= training.batch
                    and (trust.training_due or examples >= seen_at_training * (1.0 + training.growth))
                )
            ):
                ready_at, ready_began = request + (training.delay if versions else 0), request
                ready_size = examples - len(held_out)
                seen_at_training = examples
                trust.training_started()
        if ready_at is not None and request >= ready_at:
            attempts += 1
            trained_on, ready_at = ready_size, None
            world.learn(trained_on, ready_began)
            world.factor = world.decay(request)
            seed_comparisons = []
            for bought, rank, probability, rate in held_out:
                if bought < changed:
                    continue
                local, remote = world.answers(rank)
                seed_comparisons.append(
                    Comparison(
                        "seed", float(local == remote), {}, world.confidence(rank), local, remote, probability, rate,
                        seeded=True,
                    )
                )  # fmt: skip
            champion = f"v{len(versions) + 1}"
            note(request, trust.promoted(seed_comparisons, _same, draw))
            versions.append({"version": len(versions) + 1, "trained_on": trained_on, "from_request": request})
        now = trust.policy_numbers
        if now is not numbers:
            if now.phase is Phase.SERVE and numbers.phase is Phase.SERVE:
                steepest = min(steepest, trust.rate / asked_for)
            if now != numbers or policy.version != champion:
                policy = Policy(now.phase, champion, now.threshold, now.sampling_rate)
            numbers, asked_for = now, trust.rate
        if (request + 1) % every == 0 or request + 1 == scenario.requests:
            span = request + 1 - (kept[-1].request if kept else 0)
            truth = None if now.threshold is None else world.truth(now.threshold)
            kept.append(
                Point(
                    request=request + 1,
                    phase=int(now.phase),
                    coverage=trust.coverage,
                    sampling_rate=now.sampling_rate,
                    remote_share=(remote_calls - remote_before) / max(1, span),
                    correlation=trust.window.tally.correlation,
                    true_agreement=truth,
                    true_correlation=world.correlation(truth),
                    cost=remote_calls * scenario.price_remote,
                    cost_without=(request + 1) * scenario.price_remote,
                    sampling_floor=trust.sampling_floor,
                )
            )
            remote_before = remote_calls

    return Result(
        scenario=scenario,
        points=kept,
        events=events,
        remote_calls=remote_calls,
        local_served=local_served,
        local_agreed=local_agreed,
        versions=versions,
        phases=phases,
        delays=[
            {
                "kind": happening.kind,
                "at": happening.at,
                "requests": alarms[i][0] if i in alarms else None,
                "spot_checks": alarms[i][1] if i in alarms else None,
            }
            for i, happening in enumerate(scenario.happenings)
        ],
        steepest_fall=steepest,
        wall_seconds=time.perf_counter() - began,
        cpu_seconds=time.process_time() - began_cpu,
    )


# -- scenarios as files --------------------------------------------------------------------------------------------


def load_scenario(path: Path) -> Scenario:
    """The scenario in a YAML file. Raises ConfigError with every problem found, each with its path."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(str(path), [Problem("", f"cannot be read: {error}")]) from error
    problems: list[Problem] = []
    scenario = _build(Scenario, {"name": path.stem, **data} if isinstance(data, dict) else data, "", problems)
    if not problems:
        problems += _sense(scenario)
    if problems:
        raise ConfigError(str(path), problems)
    assert isinstance(scenario, Scenario)
    return scenario


_NESTED: dict[str, type] = {"local": LocalModel, "training": Training, "trust": TrustSettings}
_NUMBERS = {
    int: int,
    float: int | float,
    bool: bool,
    str: str,
    float | None: int | float | None,
    int | None: int | None,
}


def _build(kind: type, data: Any, where: str, problems: list[Problem]) -> Any:
    """``data`` as the frozen dataclass ``kind``; what is wrong goes to ``problems``."""
    if not isinstance(data, dict):
        problems.append(Problem(where or "(file)", f"must be a mapping, not {data!r}"))
        return None
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in data.items():
        at = f"{where}.{key}" if where else str(key)
        if key not in hints:
            problems.append(Problem(at, "is not known here.", f"Known: {', '.join(hints)}."))
        elif key in _NESTED and kind is Scenario:
            values[key] = _build(_NESTED[key], value, at, problems)
        elif key == "happenings":
            listed = value if isinstance(value, list) else []
            values[key] = tuple(_build(Happening, one, f"{at}[{i}]", problems) for i, one in enumerate(listed))
            if not isinstance(value, list):
                problems.append(Problem(at, f"must be a list, not {value!r}"))
        elif key == "curve":
            values[key] = _build_curve(value, at, problems)
        elif key == "classes":
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                values[key] = (1.0,) * value
            elif isinstance(value, list) and value and all(_positive(v) for v in value):
                values[key] = tuple(float(v) for v in value)
            else:
                problems.append(Problem(at, f"must be a number of classes or a list of frequencies, not {value!r}"))
        elif not isinstance(value, _NUMBERS[hints[key]]) or (isinstance(value, bool) and hints[key] is not bool):
            problems.append(Problem(at, f"must be {getattr(hints[key], '__name__', hints[key])}, not {value!r}"))
        else:
            values[key] = value
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    problems += [Problem(where or "(file)", f"lacks {name}.") for name in needed if name not in data]
    return None if any(name not in values for name in needed) else kind(**values)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _build_curve(value: Any, at: str, problems: list[Problem]) -> dict[int, tuple[float, ...]]:
    curve = {}
    for size, agreements in value.items() if isinstance(value, dict) else ():
        listed = agreements if isinstance(agreements, list) else [agreements]
        ok = isinstance(size, int) and size > 0 and len(listed) in (1, 4)
        ok = ok and all(isinstance(a, int | float) and 0.0 <= a <= 1.0 for a in listed)
        if ok:
            before = 0.0
            for k, a in enumerate(listed, start=1):
                ok = ok and 0.0 <= k * a - before <= 1.0
                before = k * a
        if not ok:
            problems.append(
                Problem(f"{at}.{size}", f"must be one agreement or four that can follow each other, not {agreements!r}")
            )
            continue
        curve[size] = tuple(float(a) for a in listed)
    if not curve:
        problems.append(Problem(at, "must map at least one training size to agreements."))
    return curve


def _sense(scenario: Scenario) -> list[Problem]:
    problems = []
    if scenario.requests < 1:
        problems.append(Problem("requests", f"must be at least 1, not {scenario.requests}"))
    if scenario.local.always is not None and not 0 <= scenario.local.always < len(scenario.classes):
        problems.append(Problem("local.always", f"must be one of the {len(scenario.classes)} classes, from 0"))
    for i, happening in enumerate(scenario.happenings):
        if happening.kind not in ("shift", "drift", "teacher_change"):
            problems.append(
                Problem(f"happenings[{i}].kind", f"is {happening.kind!r}; use shift, drift or teacher_change.")
            )
        if not 0 <= happening.at < scenario.requests:
            never = f"is {happening.at:,}, and there are {scenario.requests:,} requests: it would never happen"
            problems.append(Problem(f"happenings[{i}].at", never))
    if not 0.0 <= scenario.teacher_noise <= 1.0:
        problems.append(Problem("teacher_noise", f"must lie in [0, 1], not {scenario.teacher_noise}"))
    return problems


# -- showing it ----------------------------------------------------------------------------------------------------

_INK, _GREY, _FAINT = "#1f2933", "#7b8794", "#d9dee4"
_BLUE, _GREEN, _ORANGE, _RED = "#2f6db5", "#2c8a5b", "#d98324", "#c23b3b"
_SHADES = {1: "#eceff3", 2: "#fdf1dc", 3: "#e4f2ea"}
_NAMES = {1: "collect", 2: "shadow", 3: "serve"}


def picture(result: Result, path: Path) -> None:
    """Write a PNG: who answered, how well and how sure, and what it cost. Needs matplotlib (extra ``flows``)."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
        from matplotlib.ticker import FuncFormatter, PercentFormatter
    except ImportError as error:
        raise MissingExtra("drawing the picture of a simulation", "flows") from error

    scenario, points = result.scenario, result.points
    happenings = [h for h in scenario.happenings if h.at < scenario.requests]
    at = [p.request for p in points]
    figure = Figure(figsize=(11, 8.2), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(h_pad=0.08, hspace=0.04)  # type: ignore[call-arg, union-attr]
    axes = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 2))
    top, middle, bottom = axes
    title = scenario.name.replace("_", " ")
    figure.suptitle(f"{title[0].upper()}{title[1:]}", x=0.01, ha="left", fontsize=17, fontweight="bold", color=_INK)
    top.set_title(_wrapped(scenario.description), loc="left", fontsize=10, color=_GREY, pad=10)

    ends = [start for start, _ in result.phases[1:]] + [scenario.requests]
    for axis in axes:
        axis.set_facecolor("white")
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(_FAINT)
        axis.tick_params(colors=_GREY, labelsize=9, length=0)
        axis.grid(axis="y", color=_FAINT, linewidth=0.7)
        axis.set_axisbelow(True)
        axis.set_xlim(0, scenario.requests)
        for (start, phase), end in zip(result.phases, ends, strict=True):
            axis.axvspan(start, end, color=_SHADES[phase], linewidth=0, zorder=0)
        for happening in happenings:
            axis.axvline(happening.at, color=_RED, linewidth=1.1, linestyle=(0, (4, 3)), zorder=3)
    chips = [
        Patch(facecolor=_SHADES[phase], edgecolor=_FAINT, label=f"phase {phase}: {_NAMES[phase]}")
        for phase in (1, 2, 3)
    ]
    for happening in happenings:
        middle.annotate(
            happening.kind.replace("_", " "), (happening.at, 0.03), xycoords=("data", "axes fraction"),
            xytext=(5, 0), textcoords="offset points", fontsize=9, color=_RED, fontweight="bold",
        )  # fmt: skip

    share = [p.remote_share for p in points]
    top.fill_between(at, share, color=_BLUE, alpha=0.16, linewidth=0, zorder=1)
    top.plot(at, share, color=_BLUE, linewidth=1.8, label="asked the remote", zorder=4)
    top.plot(at, [p.coverage for p in points], color=_GREEN, linewidth=1.8, label="coverage (trusted share)", zorder=4)
    top.plot(at, [p.sampling_rate for p in points], color=_ORANGE, linewidth=1.1, label="sampling rate", zorder=4)
    for version in result.versions:
        top.plot(version["from_request"], -0.035, marker="^", color=_INK, markersize=5, clip_on=False, zorder=5)
    if result.versions:
        top.plot([], [], marker="^", color=_INK, markersize=5, linestyle="none", label="new version")
    top.set_ylim(0, 1.02)
    top.yaxis.set_major_formatter(PercentFormatter(1.0))
    top.set_ylabel("share of requests", color=_GREY, fontsize=9)

    middle.plot(
        at, [math.nan if p.true_correlation is None else p.true_correlation for p in points],
        color=_GREEN, linewidth=1.8, label="true, of the served slice", zorder=4,
    )  # fmt: skip
    middle.plot(
        at, [math.nan if p.correlation is None or p.phase < 3 else p.correlation for p in points],
        color=_BLUE, linewidth=1.2, label="measured by spot checks", zorder=4,
    )  # fmt: skip
    settings = scenario.trust
    lines = [(settings.coaching_trigger, "coaching"), (settings.emergency_threshold, "emergency")]
    lines.append((settings.graduate, "target"))
    if settings.max_disagreement is not None:
        # All three are disagreements then, and this is the correlation that comes with each among these answers.
        world = _World(scenario, random.Random(0))
        lines = [(world.correlation(1.0 - (tolerated(settings, at) or 0.0)) or 0.0, name) for at, name in lines]
    if not settings.bounds_served:
        lines = []  # all three are held against all answers then, and this is a picture of the served ones
    lowest = min((level for level, _ in lines), default=settings.emergency_threshold)
    for level, name in lines:
        middle.axhline(level, color=_GREY, linewidth=0.8, linestyle=(0, (1, 2)), zorder=2)
        middle.annotate(
            name, (1.0, level), xycoords=("axes fraction", "data"), xytext=(-4, 2), textcoords="offset points",
            ha="right", fontsize=8, color=_GREY,
        )  # fmt: skip
    shown = {EventKind.SHIFT: "v", EventKind.DRIFT: "D", EventKind.COACHING: "o", EventKind.EMERGENCY: "X"}
    named: set[EventKind] = set()
    for when, event in result.events:
        if event.kind in shown:
            label = None if event.kind in named else f"alarm: {event.kind.value}"
            named.add(event.kind)
            middle.plot(
                when, 0.985, marker=shown[event.kind], color=_RED, markersize=7, linestyle="none", label=label,
                transform=middle.get_xaxis_transform(), clip_on=False, zorder=6,
            )  # fmt: skip
    known = [r for p in points for r in (p.true_correlation, p.correlation if p.phase == 3 else None) if r is not None]
    middle.set_ylim(max(-1.0, min([lowest, *known]) - 0.05), 1.02)
    if not known:
        middle.text(
            0.5, 0.5, "nothing was served", transform=middle.transAxes, ha="center", fontsize=13, color=_GREY
        )  # fmt: skip
    middle.set_ylabel("correlation", color=_GREY, fontsize=9)

    bottom.plot(at, [p.cost_without for p in points], color=_GREY, linewidth=1.2, linestyle="--", label="remote alone")
    bottom.plot(at, [p.cost for p in points], color=_INK, linewidth=1.8, label="with Apprentice")
    bottom.fill_between(
        at, [p.cost for p in points], [p.cost_without for p in points], color=_GREEN, alpha=0.18, linewidth=0,
        label="saved",
    )  # fmt: skip
    bottom.set_ylim(bottom=0)
    bottom.set_ylabel("cost so far", color=_GREY, fontsize=9)
    bottom.set_xlabel("requests", color=_GREY, fontsize=9)
    bottom.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    bottom.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"${y:,.0f}"))
    for axis in axes:
        handles = axis.get_legend_handles_labels()[0] + (chips if axis is top else [])
        axis.legend(
            handles=handles, loc="center left", bbox_to_anchor=(1.005, 0.5), fontsize=8.5, frameon=False,
            labelcolor=_INK, handlelength=1.6,
        )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _wrapped(text: str, width: int = 118) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(" ".join(text.split()), width))


def report(result: Result) -> Any:
    """The figures as a rich table."""
    from rich.table import Table

    s = result.summary()
    table = Table(title=f"{s['scenario']}: {s['requests']:,} requests", title_justify="left", show_header=False)
    table.add_column(style="dim")
    table.add_column()
    last = result.points[-1]
    rows: list[tuple[str, str]] = [
        ("remote share", f"{_percent(s['remote_share'])} (last third {_percent(s['remote_share_tail'])})"),
        ("coverage at the end", _percent(s["coverage"])),
        ("agreement of what the local model answered", f"{_percent(s['agreement_local'])} of {s['local_served']:,}"),
        ("answers of all that differed", _percent(s["disagreement_overall"])),
        ("sampling rate at the end", _percent(last.sampling_rate)),
        ("floor of the sampling rate",
         f"{_percent(last.sampling_floor)}, which costs "
         f"${1000 * last.sampling_floor * last.coverage * result.scenario.price_remote:,.2f} for 1,000 requests"),
        ("steepest fall of the rate", f"x {s['steepest_fall']:.2f} a comparison"),
        ("cost", f"${s['spend']:,.2f} instead of ${s['spend_without']:,.2f}"),
        ("phases", ", ".join(f"{_NAMES[p['phase']]} from {p['from_request']:,}" for p in s["phases"][:6])),
        ("versions", f"{len(s['versions'])}, the last trained on {s['versions'][-1]['trained_on']:,} answers"
         if s["versions"] else "none"),
    ]  # fmt: skip
    for delay in s["delays"]:
        found = "not noticed"
        if delay["requests"] is not None:
            found = f"noticed after {delay['requests']:,} requests, {delay['spot_checks']:,} spot checks"
        rows.append((f"{delay['kind'].replace('_', ' ')} at {delay['at']:,}", found))
    rows.append(("speed", f"{s['requests_per_core_second']:,} requests a second on one core"))
    for name, value in rows:
        table.add_row(name, value)
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def run_command(
    path: Path, out: Path | None, json_out: Path | None, seed: int | None, trust: TrustSettings | None = None
) -> None:
    """Load the scenario at ``path``, run it, print the table; write the picture and the figures if asked.

    ``seed`` and ``trust`` replace the scenario's own.

    Raises ConfigError for a bad scenario, MissingExtra where a picture is asked for without matplotlib.
    """
    from rich.console import Console

    scenario = load_scenario(path)
    if trust is not None:
        scenario = replace(scenario, trust=trust)
    result = simulate(scenario, seed=seed)
    console = Console()
    console.print(report(result))
    if json_out is not None:
        json_out.write_text(
            json.dumps({**result.summary(), "points": [asdict(p) for p in result.points]}, indent=2), encoding="utf-8"
        )
        console.print(f"figures: {json_out}")
    if out is not None:
        picture(result, out)
        console.print(f"picture: {out}")
