"""The trust in one version of a task's local model: one object, one JSON text, one transition per comparison.

``Trust`` is pure. The store keeps ``dumps()`` in a text column and, in one transaction per comparison, loads it, lets
it ``take`` the comparison and writes it back, so two processes never lose one. Everything random comes in as ``draw``.

The evaluator is somebody else's code and may be slow, so it never runs inside that transaction: ``weigh`` asks it for
everything that one comparison needs, given the ``basis`` that the state had a moment ago, and ``take`` only counts.
``observe`` does both at once, for those who hold no lock.

What it knows of the past is bounded: the last comparisons as numbers, the answers of a window as the evaluator
projects them (what the chance scores are drawn from), and sums since the last promotion.

Selection effects, and what is done about them:

- Once serving, the comparisons at hand are mostly deferred requests, which are the hard ones. Every comparison bets
  and counts with weight sampling_rate / probability (see ``certify``), and enters the reference answers with that
  probability, so both describe the traffic.
- The agreement of what was accepted since the promotion is m + sum((s - m) / p) / N over the N accepted requests, with
  m fixed at certification. It is unbiased however the rate p > 0 followed the scores before; the plain mean is not. It
  says nothing of answers that nobody could have checked (p = 0: the budget was used up or the remote was down) nor of
  those for which a check that brought no score would have spoken: they are not among the N but counted apart.
- A version is certified by held-out comparisons that also decided whether it is promoted. delta holds per version:
  P(promoted and wrongly certified) <= P(wrongly certified) <= delta. Where several candidates were tried on the same
  held-out examples before one passed, ``promoted(..., attempts=n)`` lets that evidence certify with delta / n only.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from apprentice.confidence.acceptance import Slice, Slices, grid
from apprentice.confidence.certify import excess
from apprentice.confidence.correlation import CHANCE_DRAWS, Estimate, Tally, chance, wilson
from apprentice.confidence.drift import Guard
from apprentice.confidence.watch import LocalObservation, Watch
from apprentice.errors import EvaluatorError
from apprentice.evaluators import Evaluator
from apprentice.phases import Phase, Signal, advance
from apprentice.sampling import next_rate, target_rate

__all__ = [
    "Basis",
    "Comparison",
    "Event",
    "EventKind",
    "Figures",
    "LocalObservation",
    "PolicyNumbers",
    "Scope",
    "Seed",
    "Stale",
    "Trust",
    "TrustSettings",
    "Weighed",
    "weigh",
    "weigh_seed",
]

FORMAT = 1
# How many windows of plain numbers are remembered, so that a served slice of a third of the traffic fills its window.
_MEMORY = 3
_MOST_FIELDS = 8
# What is kept of answers: this many characters in all, or twice the answers of one draw where these are longer.
_REFERENCE_CHARACTERS = 60_000
_LONGEST_PAIR = 8_000


@dataclass(frozen=True, slots=True)
class TrustSettings:
    """Plain numbers, with the defaults that apprentice.yaml documents."""

    graduate: float = 0.85
    """phase2_to_phase3: the correlation that a slice is certified to reach."""
    coaching_trigger: float = 0.70
    emergency_threshold: float = 0.50
    max_disagreement: float | None = None
    """Where given, slices are certified for at most this disagreement instead of for ``graduate``."""
    delta: float = 0.05
    """Probability that a version ever serves a slice that misses its target."""
    deferral: bool = True
    """False keeps a single slice, everything."""
    min_coverage: float = 0.10
    window_size: int = 100
    min_floor: float = 0.02
    decay_function: str = "exponential"
    trend_sensitivity: float = 0.05
    max_fall: float = 0.05
    """A comparison lowers the sampling rate at most by this share of it."""
    arl: float = 10_000
    """Mean number of spot checks to a false alarm of the guard, at least."""
    warm_up: int = 40
    """Comparisons whose confidences set the thresholds, where the gate's are fewer."""
    min_evidence: int = 50
    """Comparisons of the served slice below which neither coaching nor an emergency is declared."""
    hysteresis: float = 0.03
    """How far above the trigger the correlation must be for coaching to end."""
    watch_arl: float = 50_000
    """Mean number of local answers to a false alarm of the second watch, at least."""
    watch_checks: int = 50
    """Spot checks in a row that the second watch asks for."""

    def target(self) -> list[Any]:
        """What evidence was collected against: evidence for another target is worth nothing."""
        return [self.graduate, self.max_disagreement, self.delta, self.deferral, self.min_coverage]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One request answered by both.

    ``probability`` is that with which the remote was asked, given everything known then: 1.0 in shadow and for a
    deferred request, the sampling rate for one above the threshold. ``sampling_rate`` is the rate at that moment.
    ``served``: the local answer was above the threshold in phase 3, so without the spot check it would have been
    returned. ``score`` is None where the evaluator failed; the comparison is then counted and bets on nothing.
    """

    id: str
    score: float | None
    parts: Mapping[str, float]
    confidence: float
    local: Any
    remote: Any
    probability: float = 1.0
    sampling_rate: float = 1.0
    served: bool = False
    seeded: bool = False


class EventKind(StrEnum):
    """What can happen to a task's trust."""

    PROMOTED = "promoted"
    CERTIFIED = "certified"
    """A slice is certified for the first time, or a larger one is; the threshold moved."""
    PHASE = "phase"
    COACHING = "coaching"
    EMERGENCY = "emergency"
    SHIFT = "shift"
    DRIFT = "drift"
    RECOVERED = "recovered"
    UNUSUAL = "unusual"
    """The second watch saw something; spot checks rise."""
    UNSCORED = "unscored"


@dataclass(frozen=True, slots=True)
class Event:
    """Something worth a line in the log, with the numbers that led to it; all JSON."""

    kind: EventKind
    evidence: Mapping[str, Any] = field(default_factory=dict)


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
class Figures:
    """Everything readable, at one moment."""

    phase: Phase
    threshold: float | None
    sampling_rate: float
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


class _Seen(NamedTuple):
    """One comparison as numbers. ``weight`` is sampling_rate / probability."""

    confidence: float
    score: float
    chance: float
    weight: float
    parts: list[float]
    chances: list[float]


class _Pending(NamedTuple):
    """One comparison waiting for the thresholds and for other answers to draw chance scores from."""

    confidence: float
    score: float
    weight: float
    parts: dict[str, float]
    local: Any
    remote: Any


class _Chance(NamedTuple):
    """The chance score of a comparison, and of each of its parts."""

    score: float
    parts: Mapping[str, float]


class Stale(Exception):
    """The state is no longer the one that a comparison was weighed for: weigh it again on its new `Trust.basis`."""


@dataclass(frozen=True, slots=True)
class Basis:
    """What chance scores are drawn from at one moment. It shares nothing that changes with the state."""

    waiting: Sequence[_Pending] | None
    """The comparisons that wait for thresholds; None once there are some."""
    enough: int
    """How many set the thresholds."""
    window: int
    reference: Sequence[tuple[Any, Any]]


@dataclass(frozen=True, slots=True)
class Weighed:
    """A comparison with all that the evaluator had to say for it."""

    comparison: Comparison
    pending: _Pending | None
    """None where it has no score."""
    chance: _Chance | str | None = None
    """Once there are thresholds; a text is why the evaluator could not tell."""
    opening: Sequence[tuple[_Pending, _Chance | str]] | None = None
    """While there are none: this comparison and those that waited, where together they are enough; else empty."""


@dataclass(frozen=True, slots=True)
class Seed:
    """Held-out comparisons of a new version, with all that the evaluator had to say for them."""

    count: int
    waiting: Sequence[_Pending]
    opening: Sequence[tuple[_Pending, _Chance | str]]


def weigh(
    comparison: Comparison,
    basis: Basis,
    evaluate: Evaluator,
    draw: random.Random,
    *,
    opening_draws: int = CHANCE_DRAWS,
) -> Weighed:
    """Ask the evaluator for all that ``comparison`` needs: 2 * CHANCE_DRAWS evaluations, and for one that completes the
    warm-up 2 * ``opening_draws`` for each that waited. Fewer draws make a chance score less exact and no more biased.

    Where the evaluator raises EvaluatorError the comparison counts as unscored.
    """
    pending = _admitted(comparison, evaluate)
    if pending is None:
        return Weighed(comparison, None)
    if basis.waiting is not None:
        waiting = [*basis.waiting, pending]
        complete = len(waiting) >= basis.enough
        return Weighed(
            comparison,
            pending,
            opening=_among(waiting, basis.window, evaluate, draw, opening_draws) if complete else (),
        )
    try:
        return Weighed(
            comparison, pending, _Chance(*chance(pending.local, pending.remote, basis.reference, evaluate, draw))
        )
    except EvaluatorError as error:
        return Weighed(comparison, pending, str(error))


def weigh_seed(
    comparisons: Sequence[Comparison], settings: TrustSettings, evaluate: Evaluator, draw: random.Random
) -> Seed:
    """Ask the evaluator for all that held-out comparisons need; see `weigh`."""
    waiting = [pending for c in comparisons if (pending := _admitted(c, evaluate)) is not None]
    enough = len(waiting) >= _enough(settings)
    return Seed(len(comparisons), waiting, _among(waiting, settings.window_size, evaluate, draw) if enough else ())


def _enough(settings: TrustSettings) -> int:
    return settings.warm_up if settings.deferral else 10


def _admitted(comparison: Comparison, evaluate: Evaluator) -> _Pending | None:
    score = comparison.score
    if score is None or not 0.0 <= score <= 1.0:
        return None
    project = getattr(evaluate, "project", None)
    local, remote = comparison.local, comparison.remote
    if project is not None:
        local, remote = project(local), project(remote)
    weight = 1.0
    if comparison.probability > 0.0:
        weight = min(1.0, max(0.0, comparison.sampling_rate / comparison.probability))
    # Not rounded: a threshold is one of these confidences, and real answers are held against it digit for digit.
    return _Pending(comparison.confidence, score, weight, dict(comparison.parts), local, remote)


def _among(
    waiting: Sequence[_Pending], window: int, evaluate: Evaluator, draw: random.Random, draws: int = CHANCE_DRAWS
) -> list[tuple[_Pending, _Chance | str]]:
    """Each with its chance score among the others."""
    answers = [(pending.local, pending.remote) for pending in waiting] * 2
    span = min(len(waiting) - 1, window)
    weighed: list[tuple[_Pending, _Chance | str]] = []
    for i, pending in enumerate(waiting):
        try:
            others = answers[i + 1 : i + 1 + span]
            weighed.append((pending, _Chance(*chance(pending.local, pending.remote, others, evaluate, draw, draws))))
        except EvaluatorError as error:
            weighed.append((pending, str(error)))
    return weighed


class Trust:
    """Make one with ``fresh`` or ``loads``."""

    def __init__(self, settings: TrustSettings) -> None:
        self.settings = settings
        self.phase = Phase.COLLECT
        self.threshold: float | None = None
        self.rate = 1.0
        self.forced = 0
        self.coaching = False
        self.alarmed = False
        self.training_due = False
        self._reset()

    def _reset(self) -> None:
        """Forget everything about the champion."""
        self.slices: Slices | None = None
        self.guard: Guard | None = None
        self.guard_weight = 0.0
        self.watcher = Watch(self.settings.watch_arl)
        self.pending: list[_Pending] = []
        self.reference: list[tuple[Any, Any]] = []
        self.place = 0
        self.history: list[_Seen] = []
        self.fields: list[str] = []
        self.since_all: dict[str, Tally] = {"": Tally()}
        self.since_served: dict[str, Tally] = {"": Tally()}
        self.comparisons = 0
        self.unscored = 0
        self.accepted = 0.0
        self.unverified = 0.0
        self.checked_excess = 0.0
        self.checked_level: float | None = None
        self._rebuild_window()

    # -- making one, keeping it ------------------------------------------------------------------------------------

    @classmethod
    def fresh(cls, settings: TrustSettings) -> Trust:
        """A task without a local model."""
        return cls(settings)

    @classmethod
    def unknown(cls, settings: TrustSettings) -> Trust:
        """A version that answers and of which nothing is known: it is shadowed until it has earned more."""
        trust = cls(settings)
        trust.phase = Phase.SHADOW
        return trust

    def dumps(self) -> str:
        """The whole state as JSON text; some tens of kB at most."""
        return json.dumps(
            {
                "format": FORMAT,
                "target": self.settings.target(),
                "phase": int(self.phase),
                "threshold": self.threshold,
                "rate": self.rate,
                "forced": self.forced,
                "coaching": self.coaching,
                "alarmed": self.alarmed,
                "training_due": self.training_due,
                "slices": None if self.slices is None else self.slices.dump(),
                "guard": None if self.guard is None else self.guard.dump(),
                "guard_weight": self.guard_weight,
                "watch": self.watcher.dump(),
                "pending": self.pending,
                "reference": self.reference,
                "place": self.place,
                "history": self.history,
                "served": self.served,
                "fields": self.fields,
                "since_all": {name: tally.sums() for name, tally in self.since_all.items()},
                "since_served": {name: tally.sums() for name, tally in self.since_served.items()},
                "comparisons": self.comparisons,
                "unscored": self.unscored,
                "served_count": self.accepted,
                "unverified": self.unverified,
                "checked_excess": self.checked_excess,
                "checked_level": self.checked_level,
            },
            separators=(",", ":"),
            ensure_ascii=False,
        )

    @classmethod
    def loads(cls, text: str | None, settings: TrustSettings) -> Trust:
        """What ``dumps`` gave; a fresh state for None or "".

        Where the target changed in between, the evidence was collected against another one: it is dropped, and a
        serving task goes back to shadow until the new target is certified.
        """
        if not text:
            return cls(settings)
        data = json.loads(text)
        trust = cls(settings)
        trust.phase = Phase(data["phase"])
        for name in (
            "threshold",
            "rate",
            "forced",
            "coaching",
            "alarmed",
            "training_due",
            "guard_weight",
            "place",
            "fields",
            "comparisons",
            "unscored",
            "checked_excess",
            "checked_level",
        ):
            setattr(trust, name, data[name])
        trust.accepted, trust.unverified = float(data["served_count"]), data.get("unverified", 0.0)
        trust.slices = None if data["slices"] is None else Slices.load(data["slices"])
        trust.guard = None if data["guard"] is None else Guard.load(data["guard"], settings.arl)
        trust.watcher = Watch.load(data["watch"], settings.watch_arl)
        trust.pending = [_Pending(*row) for row in data["pending"]]
        trust.reference = [(local, remote) for local, remote in data["reference"]]
        trust.history = [_Seen(*row) for row in data["history"]]
        trust.since_all = {name: Tally(sums) for name, sums in data["since_all"].items()}
        trust.since_served = {name: Tally(sums) for name, sums in data["since_served"].items()}
        trust._fill_window([_Seen(*row) for row in data["served"]])
        if data["target"] != settings.target():
            trust._retarget()
        return trust

    @staticmethod
    def is_evidence(text: str | None, settings: TrustSettings) -> bool:
        """Whether what ``dumps`` gave holds comparisons that were held against today's target."""
        if not text:
            return False
        data = json.loads(text)
        return bool(data["comparisons"] and data["target"] == settings.target())

    def _retarget(self) -> None:
        if self.phase is Phase.SERVE:
            self.phase = Phase.SHADOW
        self.threshold, self.rate, self.guard = None, 1.0, None
        self.coaching = self.alarmed = False
        if self.slices is not None:
            self._new_slices([seen.confidence for seen in self.history])
        self._rebuild_window()

    # -- what changes it -------------------------------------------------------------------------------------------

    @property
    def policy_numbers(self) -> PolicyNumbers:
        """Phase, threshold and sampling rate to decide the next request by."""
        return PolicyNumbers(self.phase, self.threshold, 1.0 if self.forced > 0 else self.rate)

    def basis(self) -> Basis:
        """What `weigh` needs of the state."""
        waiting = tuple(self.pending) if self.slices is None else None
        return Basis(waiting, _enough(self.settings), self.settings.window_size, tuple(self.reference))

    def observe(self, comparison: Comparison, evaluate: Evaluator, draw: random.Random) -> list[Event]:
        """Weigh one comparison and take it in at once; ignored in phase 1."""
        if self.phase is Phase.COLLECT:
            return []
        return self.take(weigh(comparison, self.basis(), evaluate, draw), draw)

    def take(self, weighed: Weighed, draw: random.Random) -> list[Event]:
        """Take in one comparison; what happened because of it, in order. Ignored in phase 1.

        Costs a bet on each slice, whatever the window, and asks no evaluator. Raises `Stale` before it changes
        anything, where the thresholds were set, or another comparison came to wait for them, since it was weighed.
        """
        if self.phase is Phase.COLLECT:
            return []
        comparison, pending = weighed.comparison, weighed.pending
        if pending is not None:
            self._check_basis(pending, weighed)
        self.comparisons += 1
        if self.forced > 0:
            self.forced -= 1
        if pending is None:
            return self._unscored(comparison, "it has no score")
        if self.slices is None:
            self.pending.append(pending)
            self._remember(pending, draw)
            return self._open(weighed.opening) + self._settle() if weighed.opening else []
        if not isinstance(weighed.chance, _Chance):
            return self._unscored(comparison, str(weighed.chance))
        self._remember(pending, draw)
        seen = self._numbers(pending, weighed.chance)
        events = []
        if comparison.served and self.phase is Phase.SERVE:
            events += self._check(seen, comparison.probability)
        self._count(seen)
        x = self._excess(seen)
        self.slices.add(seen.confidence, seen.score, x, seen.weight)
        return events + self._settle()

    def _check_basis(self, pending: _Pending, weighed: Weighed) -> None:
        if self.slices is not None:
            if weighed.chance is None:
                raise Stale
            return
        if weighed.opening is None:
            raise Stale
        waiting = [*self.pending, pending]
        due = waiting if len(waiting) >= _enough(self.settings) else []
        if [one for one, _ in weighed.opening] != due:
            raise Stale

    def _unscored(self, comparison: Comparison, why: str) -> list[Event]:
        self.unscored += 1
        if comparison.served and self.phase is Phase.SERVE and comparison.probability > 0.0:
            # A spot check that brought no score: nobody speaks for the answers that it stood for.
            self._leave_out(1.0 / comparison.probability, accepted=True)
        return [Event(EventKind.UNSCORED, {"comparison": comparison.id, "unscored": self.unscored, "why": why})]

    def _leave_out(self, answers: float, *, accepted: bool) -> None:
        self.unverified += answers
        if accepted:
            self.accepted -= answers

    def promoted(
        self, seed: Sequence[Comparison], evaluate: Evaluator, draw: random.Random, *, attempts: int = 1
    ) -> list[Event]:
        """Weigh a new champion's held-out comparisons and begin with them at once; see `begin`."""
        return self.begin(weigh_seed(seed, self.settings, evaluate, draw), draw, attempts=attempts, before=self.phase)

    def begin(self, seed: Seed, draw: random.Random, *, attempts: int = 1, before: Phase) -> list[Event]:
        """A new champion, with its comparisons on the held-out examples. ``before`` is the phase of the one before it.

        ``attempts`` counts the candidates tried on these examples since the last promotion, this one included.
        It is shadowed, or serves at once where the seed certifies a slice; its sampling rate begins at 1 either way:
        that the last version had earned a lower one says nothing about this one.
        """
        self._reset()
        self.phase, self.threshold, self.rate, self.forced = Phase.SHADOW, None, 1.0, 0
        self.coaching = self.alarmed = self.training_due = False
        self.comparisons = seed.count
        self.unscored = seed.count - len(seed.waiting)
        self.pending = list(seed.waiting)
        for pending in seed.waiting:
            self._remember(pending, draw)
        events = [Event(EventKind.PROMOTED, {"seed": seed.count, "attempts": attempts})]
        opened = self._open(seed.opening) if seed.opening else []
        if attempts > 1 and self.slices is not None:
            self.slices.hedge(1.0 / attempts)
        certified = self._certify()
        if before is Phase.SERVE and certified:
            # It goes on serving; the two moves that lie between are nobody's news.
            return [*events, *opened, *(event for event in certified if event.kind is not EventKind.PHASE)]
        move = advance(before, Signal.PROMOTED)
        if move is not None:
            opened.append(_phase(move.before, move.after, Signal.PROMOTED, {"seed": seed.count}))
        return [*events, *opened, *certified]

    def resumed(self, *, before: Phase) -> list[Event]:
        """Champion again: it goes on from what it had earned itself, and is checked from a rate of 1 down."""
        self.rate = 1.0
        self.training_due = False
        events = [Event(EventKind.PROMOTED, {"resumed": self.comparisons})]
        if before is not self.phase:
            events.append(_phase(before, self.phase, Signal.PROMOTED, {"resumed": self.comparisons}))
        return events

    def refused(self, reason: str = "") -> list[Event]:
        """A retrained candidate did not pass the gate. After an alarm of the guard this ends phase 3."""
        self.training_due = False
        if not (self.alarmed and self.phase is Phase.SERVE):
            return []
        return self._to_shadow(Signal.REFUSED, {"reason": reason})

    def force(self, requests: int) -> None:
        """Check the next ``requests`` requests whatever the rate says."""
        self.forced = max(self.forced, requests)

    def training_started(self) -> None:
        """The training that was due has begun."""
        self.training_due = False

    def watch(self, observations: Iterable[LocalObservation]) -> list[Event]:
        """Take in local answers, compared or not, in batches of any size; an alarm forces some spot checks."""
        events = []
        for seen in observations:
            accepted = seen.served and self.phase is Phase.SERVE
            self.accepted += accepted
            if seen.unverified > 0.0:
                self._leave_out(seen.unverified, accepted=accepted)
            if self.phase is not Phase.SERVE and self.watcher.detectors:
                continue
            signs = self.watcher.add(seen)
            if signs:
                self.force(self.settings.watch_checks)
                events.append(Event(EventKind.UNUSUAL, {"signs": signs, "forced_checks": self.settings.watch_checks}))
        return events

    # -- inside ----------------------------------------------------------------------------------------------------

    def _remember(self, pending: _Pending, draw: random.Random) -> None:
        """Keep the answers to draw chance scores from, as a fair sample of the traffic."""
        if pending.weight < 1.0 and draw.random() >= pending.weight:
            return
        size = _size(pending.local) + _size(pending.remote)
        if self.slices is not None and size > _LONGEST_PAIR:
            return
        room = self.settings.window_size
        if size * room > _REFERENCE_CHARACTERS:
            room = max(2 * CHANCE_DRAWS, _REFERENCE_CHARACTERS // size)
            del self.reference[room:]
            self.place = min(self.place, len(self.reference) - 1)
        if len(self.reference) < room:
            self.reference.append((pending.local, pending.remote))
        else:
            self.place = (self.place + 1) % len(self.reference)
            self.reference[self.place] = (pending.local, pending.remote)

    def _open(self, opening: Sequence[tuple[_Pending, _Chance | str]]) -> list[Event]:
        """Fix the thresholds and let the comparisons that waited for them bet."""
        self.pending = []
        seen: list[_Seen] = []
        why = None
        for pending, expected in opening:
            if isinstance(expected, _Chance):
                seen.append(self._numbers(pending, expected))
            else:
                self.unscored += 1
                why = expected
        # One event, however many there are: whoever hears of it has one evaluator to mend.
        events = [] if why is None else [Event(EventKind.UNSCORED, {"unscored": self.unscored, "why": why})]
        self._new_slices([one.confidence for one in seen])
        assert self.slices is not None
        for one in seen:
            self._count(one)
        self.slices.replay((one.confidence, one.score, self._excess(one), one.weight) for one in seen)
        return events

    def _new_slices(self, confidences: Sequence[float]) -> None:
        thresholds = grid(confidences, self.settings.min_coverage) if self.settings.deferral else [0.0]
        self.slices = Slices(thresholds, self.settings.delta, confidences)

    def _numbers(self, pending: _Pending, expected: _Chance) -> _Seen:
        for name in pending.parts:
            if name not in self.since_all and len(self.since_all) <= 4 * _MOST_FIELDS:
                self.since_all[name] = Tally()
                if len(self.fields) < _MOST_FIELDS:
                    self.fields.append(name)
        return _Seen(
            pending.confidence,
            round(pending.score, 6),
            expected.score,
            pending.weight if pending.weight == 1.0 else round(pending.weight, 6),
            [round(pending.parts.get(name, -1.0), 4) for name in self.fields],
            [round(expected.parts.get(name, 0.0), 4) for name in self.fields],
        )

    def _excess(self, seen: _Seen) -> float:
        return excess(
            seen.score,
            seen.chance,
            correlation=self.settings.graduate,
            max_disagreement=self.settings.max_disagreement,
        )

    def _count(self, seen: _Seen) -> None:
        self.history.append(seen)
        if len(self.history) > _MEMORY * self.settings.window_size:
            del self.history[0]
        self._tally(self.since_all, seen, seen.weight)
        if self.threshold is not None and seen.confidence >= self.threshold:
            self._tally(self.since_served, seen, 1.0)
            self._enter_window(seen)

    def _tally(self, into: dict[str, Tally], seen: _Seen, weight: float) -> None:
        into[""].add(seen.score, seen.chance, weight)
        for name, part, c in zip(self.fields, seen.parts, seen.chances, strict=False):
            if part >= 0.0:
                if name not in into:
                    into[name] = Tally()
                into[name].add(part, c, weight)

    def _enter_window(self, seen: _Seen) -> None:
        """The served slice's last comparisons: sums over all of them, and over their recent half."""
        window, half = self.settings.window_size, self.settings.window_size // 2
        self.served.append(seen)
        self.served_tally.add(seen.score, seen.chance)
        self.recent_tally.add(seen.score, seen.chance)
        if len(self.served) > half:
            old = self.served[-half - 1]
            self.recent_tally.remove(old.score, old.chance)
        if len(self.served) > window:
            old = self.served.pop(0)
            self.served_tally.remove(old.score, old.chance)

    def _rebuild_window(self, last: int | None = None) -> None:
        """Fill the window with what is remembered of the slice that is served now; only ``last`` where given."""
        inside = []
        if self.threshold is not None:
            inside = [seen for seen in self.history if seen.confidence >= self.threshold]
        self._fill_window(inside[-(last or self.settings.window_size) :])

    def _fill_window(self, rows: Sequence[_Seen]) -> None:
        self.served: list[_Seen] = []
        self.served_tally = Tally()
        self.recent_tally = Tally()
        for seen in rows:
            self._enter_window(seen)

    def _check(self, seen: _Seen, probability: float) -> list[Event]:
        """One spot check of the served slice: the unbiased estimate, and the guard."""
        if self.checked_level is None:
            self.checked_level = seen.score if self.guard is None else self.guard.detector.level
        self.checked_excess += (seen.score - self.checked_level) / max(probability, 1e-9)
        if self.guard is None or self.alarmed:
            return []
        change = self.guard.add(seen.score)
        if change is None:
            return []
        self.alarmed = self.training_due = True
        evidence = {
            "kind": change.kind.value,
            "began_checks_ago": change.began,
            "agreement_before": round(change.before, 4),
            "agreement_after": round(change.after, 4),
            "mean_checks_to_false_alarm": self.settings.arl,
        }
        if self.slices is not None:
            self.slices.restart()
        self.rate = 1.0
        self._rebuild_window(last=max(1, change.began - 1))
        return [Event(EventKind(change.kind.value), evidence)]

    def _settle(self) -> list[Event]:
        """Draw the consequences: certify, coach, retreat, set the rate."""
        events = self._certify()
        if self.slices is not None and self.phase is Phase.SERVE:
            events += self._steer()
        return events

    def _certify(self) -> list[Event]:
        """Serve what is certified."""
        certified = None if self.slices is None else self.slices.threshold
        if certified is None:
            return []
        if self.phase is Phase.SHADOW:
            self.phase = Phase.SERVE
            events = self._widen()
            return [*events, _phase(Phase.SHADOW, Phase.SERVE, Signal.CERTIFIED, events[-1].evidence)]
        if self.phase is Phase.SERVE and (self.alarmed or self.threshold is None or certified < self.threshold):
            return self._widen()
        return []

    def _widen(self) -> list[Event]:
        """Serve the largest certified slice."""
        assert self.slices is not None
        k = self.slices.certified
        assert k is not None
        was_alarmed = self.alarmed
        self.threshold = self.slices.thresholds[k]
        self.alarmed = False
        self._rebuild_window()
        if was_alarmed:
            self.guard = None
        self._set_guard(k)
        evidence = {
            "threshold": self.threshold,
            "coverage": round(self.slices.share(k), 4),
            "agreement": _rounded(self.slices.agreement(k)),
            "comparisons": round(self.slices.weight(k), 1),
            "wealth": float(f"{self.slices.peaks[k]:.4g}"),
            "delta": self.settings.delta,
        }
        events = [Event(EventKind.CERTIFIED, evidence)]
        if was_alarmed:
            self.coaching = False
            events.append(Event(EventKind.RECOVERED, evidence))
        return events

    def _set_guard(self, k: int) -> None:
        """Hold the slice to what is certified, or to what it was seen to do beyond doubt, whichever is more."""
        assert self.slices is not None
        weight = self.slices.weight(k)
        agreement = self.slices.agreement(k)
        if self.settings.max_disagreement is not None:
            promised = 1.0 - self.settings.max_disagreement
        else:
            base = self.since_all[""].u / max(self.since_all[""].w, 1e-9)
            promised = 1.0 - (1.0 - self.settings.graduate) * base
        seen = 0.0 if agreement is None else wilson(agreement, weight, 2.33)[0]
        level = min(0.999, max(promised, seen))
        if self.guard is None:
            self.guard = Guard(level, self.settings.arl)
        else:
            # Another slice, another level; what the sums hold so far is still evidence that something changed.
            self.guard.detector.level = level
        self.guard_weight = weight

    def _steer(self) -> list[Event]:
        """Coaching, emergency and the sampling rate, from the served slice's window."""
        events: list[Event] = []
        settings = self.settings
        rho = self.served_tally.correlation
        if rho is None:
            self.rate = 1.0
            return events
        known = len(self.served) >= settings.min_evidence
        evidence = {
            "correlation": round(rho, 4),
            "agreement": _rounded(self.served_tally.agreement),
            "comparisons": len(self.served),
        }
        if known and rho < settings.emergency_threshold:
            events.append(Event(EventKind.EMERGENCY, {**evidence, "threshold": settings.emergency_threshold}))
            self.training_due = True
            return events + self._to_shadow(Signal.EMERGENCY, evidence)
        if known and not self.coaching and rho < settings.coaching_trigger:
            self.coaching = self.training_due = True
            events.append(Event(EventKind.COACHING, {**evidence, "trigger": settings.coaching_trigger}))
        elif self.coaching and not self.alarmed and rho >= settings.coaching_trigger + settings.hysteresis:
            self.coaching = False
            events.append(Event(EventKind.RECOVERED, evidence))
        if self.alarmed or self.coaching:
            target = 1.0
        else:
            target = target_rate(
                settings.decay_function,
                rho,
                trigger=settings.coaching_trigger,
                floor=settings.min_floor,
                drop=self._falling(),
            )
        self.rate = next_rate(self.rate, target, max_fall=settings.max_fall)
        if self.guard is not None and self.slices is not None and self.slices.certified is not None:
            k = self.slices.certified
            # Look again at each doubling of the evidence, and only ever raise the bar.
            if not self.alarmed and self.slices.weight(k) >= 2.0 * max(self.guard_weight, 50.0):
                level = self.guard.detector.level
                self._set_guard(k)
                self.guard.detector.level = max(level, self.guard.detector.level)
        return events

    def _falling(self) -> float:
        """How far the recent half of the window is below the older; 0 within ``trend_sensitivity`` or noise."""
        window = self.settings.window_size
        half = window // 2
        if len(self.served) < window or half < 2:
            return 0.0
        whole, recent = self.served_tally, self.recent_tally
        base = whole.u / whole.w
        if base <= 1e-9:
            return 0.0
        older_count = whole.w - recent.w
        drop = (recent.d / recent.w - (whole.d - recent.d) / older_count) / base
        p = whole.d / whole.w
        noise = 1.645 * math.sqrt(max(0.0, p * (1.0 - p)) * (1.0 / recent.w + 1.0 / older_count)) / base
        return drop if drop > max(self.settings.trend_sensitivity, noise) else 0.0

    def _to_shadow(self, signal: Signal, evidence: Mapping[str, Any]) -> list[Event]:
        before = self.phase
        move = advance(before, signal, evidence)
        if move is None:
            return []
        self.phase, self.threshold, self.rate = move.after, None, 1.0
        self.guard, self.coaching, self.alarmed = None, False, False
        if self.slices is not None:
            self.slices.restart()
        self._rebuild_window()
        return [_phase(move.before, move.after, signal, evidence)]

    # -- reading it ------------------------------------------------------------------------------------------------

    @property
    def coverage(self) -> float:
        """Share of the traffic in the served slice; 0 where nothing is certified."""
        if self.phase is not Phase.SERVE or self.threshold is None or self.slices is None:
            return 0.0
        k = self.slices.thresholds.index(self.threshold) if self.threshold in self.slices.thresholds else None
        return 0.0 if k is None else self.slices.share(k)

    @property
    def accepted_agreement(self) -> float | None:
        """See `Figures.accepted_agreement`."""
        if self.checked_level is None or self.accepted <= 0.0:
            return None
        return self.checked_level + self.checked_excess / self.accepted

    def figures(self) -> Figures:
        """Everything readable; costs a walk over the window."""
        window = self.history[-self.settings.window_size :]
        return Figures(
            phase=self.phase,
            threshold=self.threshold,
            sampling_rate=self.policy_numbers.sampling_rate,
            coverage=self.coverage,
            comparisons=self.comparisons,
            unscored=self.unscored,
            accepted_agreement=self.accepted_agreement,
            unverified=self.unverified,
            window_all=self._scope([(seen, seen.weight) for seen in window]),
            window_served=self._scope([(seen, 1.0) for seen in self.served]),
            since_all=_scope(self.since_all),
            since_served=_scope(self.since_served),
            slices=[] if self.slices is None else self.slices.curve(),
            coaching=self.coaching,
            alarmed=self.alarmed,
            training_due=self.training_due,
        )

    def _scope(self, weighted: Sequence[tuple[_Seen, float]]) -> Scope:
        tallies: dict[str, Tally] = {"": Tally()}
        for seen, weight in weighted:
            self._tally(tallies, seen, weight)
        return _scope(tallies)


def _scope(tallies: Mapping[str, Tally]) -> Scope:
    whole = tallies[""]
    return Scope(
        whole.agreement_estimate(),
        whole.correlation_estimate(),
        {name: (tally.agreement_estimate(), tally.correlation_estimate()) for name, tally in tallies.items() if name},
    )


def _phase(before: Phase, after: Phase, signal: Signal, evidence: Mapping[str, Any]) -> Event:
    return Event(EventKind.PHASE, {"before": int(before), "after": int(after), "signal": signal.value, **evidence})


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _size(answer: Any) -> int:
    """Roughly how many characters a JSON value takes."""
    kind = type(answer)
    if kind is str:
        return len(answer)
    if kind is dict:
        return sum(len(key) + _size(value) for key, value in answer.items())
    if kind is list or kind is tuple:
        return sum(_size(value) + 1 for value in answer)
    return 8
