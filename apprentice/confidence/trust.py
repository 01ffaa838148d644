"""The trust state of one task: one object, one JSON text, one transition per comparison.

``Trust`` is pure. The store keeps ``dumps()`` in a text column and, in one transaction per comparison, loads it, lets
it ``observe`` and writes it back, so two processes never lose a comparison. Everything random comes in as ``draw``.

What it knows of the past is bounded: the last comparisons as numbers, the answers of a window as the evaluator
projects them (what the chance scores are drawn from), and sums since the last promotion.

Selection effects, and what is done about them:

- Once serving, the comparisons at hand are mostly deferred requests, which are the hard ones. Every comparison bets
  and counts with weight sampling_rate / probability (see ``certify``), and enters the reference answers with that
  probability, so both describe the traffic.
- The agreement of what was served since the promotion is m + sum((s - m) / p) / N over the N served requests, with m
  fixed at certification. It is unbiased however the rate p followed the scores before; the plain mean is not.
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
    "Comparison",
    "Event",
    "EventKind",
    "Figures",
    "LocalObservation",
    "PolicyNumbers",
    "Scope",
    "Trust",
    "TrustSettings",
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
    max_fall: float = 0.95
    """A comparison lowers the sampling rate at most by this factor."""
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
    served_unbiased: float | None
    """Agreement of all that was served since the promotion, unbiased under a varying rate; None before any check."""
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
        self.served_count = 0
        self.checked_excess = 0.0
        self.checked_level: float | None = None
        self._rebuild_window()

    # -- making one, keeping it ------------------------------------------------------------------------------------

    @classmethod
    def fresh(cls, settings: TrustSettings) -> Trust:
        """A task without a local model."""
        return cls(settings)

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
                "served_count": self.served_count,
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
            "served_count",
            "checked_excess",
            "checked_level",
        ):
            setattr(trust, name, data[name])
        trust.slices = None if data["slices"] is None else Slices.load(data["slices"])
        trust.guard = None if data["guard"] is None else Guard.load(data["guard"])
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

    def observe(self, comparison: Comparison, evaluate: Evaluator, draw: random.Random) -> list[Event]:
        """Take in one comparison; what happened because of it, in order.

        ``evaluate`` scores answers to different requests, for chance; where it raises EvaluatorError the comparison
        counts as unscored. Costs O(K) evaluations and a bet on each slice, whatever the window. Ignored in phase 1.
        """
        if self.phase is Phase.COLLECT:
            return []
        self.comparisons += 1
        if self.forced > 0:
            self.forced -= 1
        pending = self._admit(comparison, evaluate)
        if pending is None:
            self.unscored += 1
            return [Event(EventKind.UNSCORED, {"comparison": comparison.id, "unscored": self.unscored})]
        if self.slices is None:
            self.pending.append(pending)
            self._remember(pending, draw)
            return self._open(evaluate, draw) + self._settle() if len(self.pending) >= self._enough() else []
        try:
            c, chances = chance(pending.local, pending.remote, self.reference, evaluate, draw)
        except EvaluatorError:
            self.unscored += 1
            return [Event(EventKind.UNSCORED, {"comparison": comparison.id, "unscored": self.unscored})]
        self._remember(pending, draw)
        seen = self._numbers(pending, c, chances)
        events = []
        if comparison.served and self.phase is Phase.SERVE:
            events += self._check(seen, comparison.probability)
        self._count(seen)
        x = self._excess(seen)
        self.slices.add(seen.confidence, seen.score, x, seen.weight)
        return events + self._settle()

    def promoted(
        self, seed: Sequence[Comparison], evaluate: Evaluator, draw: random.Random, *, attempts: int = 1
    ) -> list[Event]:
        """A new champion, with its comparisons on the held-out examples.

        ``attempts`` counts the candidates tried on these examples since the last promotion, this one included.
        Phase 1 becomes 2, and any phase becomes 3 at once where the seed certifies a slice.
        """
        before, rate = self.phase, self.rate
        self._reset()
        self.threshold, self.rate, self.forced = None, 1.0, 0
        self.coaching = self.alarmed = self.training_due = False
        events = [Event(EventKind.PROMOTED, {"seed": len(seed), "attempts": attempts})]
        # Any phase may be entered again from here; which one it is, is told once, below.
        self.phase = Phase.SHADOW
        for comparison in seed:
            self.comparisons += 1
            pending = self._admit(comparison, evaluate)
            if pending is None:
                self.unscored += 1
                continue
            self.pending.append(pending)
            self._remember(pending, draw)
        if len(self.pending) >= self._enough():
            events += self._open(evaluate, draw)
            if attempts > 1 and self.slices is not None:
                self.slices.hedge(1.0 / attempts)
        certified = self.slices is not None and self.slices.certified is not None
        if before is Phase.SERVE and certified:
            self.phase, self.rate = Phase.SERVE, rate
            events += self._widen()
            return events
        move = advance(before, Signal.PROMOTED)
        if move is not None:
            events.append(_phase(move.before, move.after, Signal.PROMOTED, {"seed": len(seed)}))
        return events + self._settle()

    def withdrawn(self) -> list[Event]:
        """There is no champion any more: back to phase 1."""
        before = self.phase
        self._reset()
        self.phase, self.threshold, self.rate = Phase.COLLECT, None, 1.0
        self.coaching = self.alarmed = False
        return [] if before is Phase.COLLECT else [_phase(before, Phase.COLLECT, Signal.WITHDRAWN, {})]

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
            if seen.served and self.phase is Phase.SERVE:
                self.served_count += 1
            if self.phase is not Phase.SERVE and self.watcher.detectors:
                continue
            signs = self.watcher.add(seen)
            if signs:
                self.force(self.settings.watch_checks)
                events.append(Event(EventKind.UNUSUAL, {"signs": signs, "forced_checks": self.settings.watch_checks}))
        return events

    # -- inside ----------------------------------------------------------------------------------------------------

    def _enough(self) -> int:
        return self.settings.warm_up if self.settings.deferral else 10

    def _admit(self, comparison: Comparison, evaluate: Evaluator) -> _Pending | None:
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
        return _Pending(round(comparison.confidence, 9), score, weight, dict(comparison.parts), local, remote)

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

    def _open(self, evaluate: Evaluator, draw: random.Random) -> list[Event]:
        """Fix the thresholds and let the comparisons that waited for them bet."""
        waiting, self.pending = self.pending, []
        seen: list[_Seen] = []
        events = []
        answers = [(pending.local, pending.remote) for pending in waiting] * 2
        span = min(len(waiting) - 1, self.settings.window_size)
        for i, pending in enumerate(waiting):
            others = answers[i + 1 : i + 1 + span]
            try:
                c, chances = chance(pending.local, pending.remote, others, evaluate, draw)
            except EvaluatorError as error:
                self.unscored += 1
                events.append(Event(EventKind.UNSCORED, {"unscored": self.unscored, "error": str(error)}))
                continue
            seen.append(self._numbers(pending, c, chances))
        self._new_slices([one.confidence for one in seen])
        assert self.slices is not None
        for one in seen:
            self._count(one)
        self.slices.replay((one.confidence, one.score, self._excess(one), one.weight) for one in seen)
        return events

    def _new_slices(self, confidences: Sequence[float]) -> None:
        thresholds = grid(confidences, self.settings.min_coverage) if self.settings.deferral else [0.0]
        self.slices = Slices(thresholds, self.settings.delta, confidences)

    def _numbers(self, pending: _Pending, c: float, chances: Mapping[str, float]) -> _Seen:
        for name in pending.parts:
            if name not in self.since_all and len(self.since_all) <= 4 * _MOST_FIELDS:
                self.since_all[name] = Tally()
                if len(self.fields) < _MOST_FIELDS:
                    self.fields.append(name)
        return _Seen(
            pending.confidence,
            round(pending.score, 6),
            c,
            pending.weight if pending.weight == 1.0 else round(pending.weight, 6),
            [round(pending.parts.get(name, -1.0), 4) for name in self.fields],
            [round(chances.get(name, 0.0), 4) for name in self.fields],
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
        events: list[Event] = []
        if self.slices is None:
            return events
        certified = self.slices.threshold
        if self.phase is Phase.SHADOW and certified is not None:
            self.phase = Phase.SERVE
            events += self._widen()
            events.append(_phase(Phase.SHADOW, Phase.SERVE, Signal.CERTIFIED, events[-1].evidence))
        elif (
            self.phase is Phase.SERVE
            and certified is not None
            and (self.alarmed or self.threshold is None or certified < self.threshold)
        ):
            events += self._widen()
        if self.phase is Phase.SERVE:
            events += self._steer()
        return events

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
    def served_agreement(self) -> float | None:
        """Agreement of all that was served since the promotion, unbiased; None before the first spot check."""
        if self.checked_level is None or self.served_count == 0:
            return None
        return self.checked_level + self.checked_excess / self.served_count

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
            served_unbiased=self.served_agreement,
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
