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
- A lineage carries its evidence on (``succeed``), and each successor is asked again what was compared before, leaving
  the very comparison out of what it learnt. Successors answer nearly alike, so their bets on the same comparisons go
  nearly the same way, and all of them together are wrong little more often than one: docs/trust.md has it measured.
- A version is certified by held-out comparisons that also decided whether it is promoted. delta holds per version:
  P(promoted and wrongly certified) <= P(wrongly certified) <= delta. Where several candidates were tried on the same
  held-out examples before one passed, ``promoted(..., attempts=n)`` lets that evidence certify with delta / n only.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from apprentice.confidence.acceptance import Slice, Slices, grid, promising
from apprentice.confidence.campaign import EVERY, campaign_rate
from apprentice.confidence.certify import excess
from apprentice.confidence.correlation import CHANCE_DRAWS, Tally, effective_size, wilson
from apprentice.confidence.drift import Guard
from apprentice.confidence.figures import Figures, PolicyNumbers, Promise, Scope, scope
from apprentice.confidence.forecast import Widening, widenings, worthwhile
from apprentice.confidence.groups import Groups
from apprentice.confidence.phases import Phase, Signal, advance
from apprentice.confidence.settings import TrustSettings
from apprentice.confidence.steering import Limits, Turn, least_rate, steer
from apprentice.confidence.trust_events import Event, EventKind
from apprentice.confidence.watch import LocalObservation, Watch
from apprentice.confidence.weighing import (
    Basis,
    Chance,
    Comparison,
    Pending,
    Seed,
    Stale,
    Weighed,
    enough,
    weigh,
    weigh_seed,
)
from apprentice.confidence.window import Seen, ServedWindow
from apprentice.evaluators import Evaluator

__all__ = ["Trust"]

FORMAT = 1
# How many windows of plain numbers are remembered, so that a served slice of a third of the traffic fills its window.
_MEMORY = 3
_MOST_FIELDS = 8
# What is kept of answers: this many characters in all, or twice the answers of one draw where these are longer.
_REFERENCE_CHARACTERS = 60_000
_LONGEST_PAIR = 8_000


class Trust:
    """Make one with ``fresh`` or ``loads``."""

    def __init__(self, settings: TrustSettings) -> None:
        self.settings = settings
        self.phase = Phase.COLLECT
        self.threshold: float | None = None
        # The sampling rate that agreement asks for, and that of a campaign, 0 if there is none: the higher one holds.
        self.rate = 1.0
        self.campaign = 0.0
        self.forced = 0
        self.coaching = False
        self.alarmed = False
        self.training_due = False
        self._reset()

    def _reset(self) -> None:
        """Forget everything about the champion."""
        self.slices: Slices | None = None
        # The bets on the first comparison of each group; None while that is all of them.
        self.firsts: Slices | None = None
        self.groups = Groups()
        self.guard: Guard | None = None
        self.guard_weight = 0.0
        self.limits = Limits(self.settings.arl)
        self.watcher = Watch(self.settings.watch_arl)
        self.pending: list[Pending] = []
        self.reference: list[tuple[Any, Any]] = []
        self.place = 0
        self.history: list[Seen] = []
        self.fields: list[str] = []
        self.since_all: dict[str, Tally] = {"": Tally()}
        self.since_served: dict[str, Tally] = {"": Tally()}
        self.comparisons = 0
        self.unscored = 0
        self.requests = 0
        self.accepted = 0.0
        self.unverified = 0.0
        self.checked_excess = 0.0
        self.checked_level: float | None = None
        # Spot checks, and sums of their weights 1 / p and of the squares of these: what the interval is made of.
        self.checks = 0
        self.check_weights = self.check_squares = 0.0
        # Answers while serving, deferred ones included, that a check could have met; None where nobody counted them.
        self.answered: float | None = 0.0
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
                "campaign": self.campaign,
                "forced": self.forced,
                "coaching": self.coaching,
                "alarmed": self.alarmed,
                "training_due": self.training_due,
                "slices": None if self.slices is None else self.slices.dump(),
                "firsts": None if self.firsts is None else self.firsts.dump(),
                "groups": self.groups.dump(),
                "guard": None if self.guard is None else self.guard.dump(),
                "guard_weight": self.guard_weight,
                "limits": self.limits.dump(),
                "watch": self.watcher.dump(),
                "pending": self.pending,
                "reference": self.reference,
                "place": self.place,
                "history": self.history,
                "served": self.window.rows,
                "fields": self.fields,
                "since_all": {name: tally.sums() for name, tally in self.since_all.items()},
                "since_served": {name: tally.sums() for name, tally in self.since_served.items()},
                "comparisons": self.comparisons,
                "unscored": self.unscored,
                "requests": self.requests,
                "served_count": self.accepted,
                "unverified": self.unverified,
                "checked_excess": self.checked_excess,
                "checked_level": self.checked_level,
                "checks": self.checks,
                "check_weights": self.check_weights,
                "check_squares": self.check_squares,
                "answered": self.answered,
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
        trust.requests = data.get("requests", trust.comparisons)
        trust.campaign = data.get("campaign", 0.0)
        for name in ("checks", "check_weights", "check_squares"):
            setattr(trust, name, data.get(name, 0))
        # States from before they were counted: None, unless nothing was served yet.
        trust.answered = data.get("answered", None if trust.accepted else 0.0)
        trust.slices = None if data["slices"] is None else Slices.load(data["slices"])
        # States from before there were groups have none.
        trust.firsts = None if data.get("firsts") is None else Slices.load(data["firsts"])
        trust.groups = Groups.load(data.get("groups"))
        trust.guard = None if data["guard"] is None else Guard.load(data["guard"], settings.arl)
        # States from before there were limits have none.
        trust.limits = Limits.load(data.get("limits"), settings.arl)
        trust.watcher = Watch.load(data["watch"], settings.watch_arl)
        trust.pending = [Pending(*row) for row in data["pending"]]
        trust.reference = [(local, remote) for local, remote in data["reference"]]
        trust.history = [Seen(*row) for row in data["history"]]
        trust.since_all = {name: Tally(sums) for name, sums in data["since_all"].items()}
        trust.since_served = {name: Tally(sums) for name, sums in data["since_served"].items()}
        trust.window = ServedWindow(settings.window_size, (Seen(*row) for row in data["served"]))
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
        self.threshold, self.guard = None, None
        self._check_all()
        self.coaching = self.alarmed = False
        self.limits = Limits(self.settings.arl)
        if self.slices is not None:
            self.slices, self.firsts = self._new_slices(self.history), None
        self._rebuild_window()

    # -- what changes it -------------------------------------------------------------------------------------------

    @property
    def policy_numbers(self) -> PolicyNumbers:
        """Phase, threshold and sampling rate to decide the next request by."""
        rate = max(self.rate, self.campaign)
        return PolicyNumbers(self.phase, self.threshold, 1.0 if self.forced > 0 else rate)

    def basis(self) -> Basis:
        """What `weigh` needs of the state."""
        waiting = tuple(self.pending) if self.slices is None else None
        return Basis(waiting, enough(self.settings), self.settings.window_size, tuple(self.reference))

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
        if not isinstance(weighed.chance, Chance):
            return self._unscored(comparison, str(weighed.chance))
        self._remember(pending, draw)
        seen = self._numbers(pending, weighed.chance)
        events = []
        if comparison.served and self.phase is Phase.SERVE:
            events += self._check(seen, comparison.probability)
        self._count(seen)
        self._stake(seen, first=self.groups.first(comparison.group))
        return events + self._settle()

    def _check_basis(self, pending: Pending, weighed: Weighed) -> None:
        if self.slices is not None:
            if weighed.chance is None:
                raise Stale
            return
        if weighed.opening is None:
            raise Stale
        waiting = [*self.pending, pending]
        due = waiting if len(waiting) >= enough(self.settings) else []
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
        if self.answered is not None and self.phase is Phase.SERVE:
            self.answered -= answers if accepted else 1.0

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
        self.phase, self.threshold, self.forced = Phase.SHADOW, None, 0
        self._check_all()
        self.coaching = self.alarmed = self.training_due = False
        self.comparisons = self.requests = seed.count
        self.unscored = seed.count - len(seed.waiting)
        self.pending = list(seed.waiting)
        for pending in seed.waiting:
            self._remember(pending, draw)
        events = [Event(EventKind.PROMOTED, {"seed": seed.count, "attempts": attempts})]
        opened = self._open(seed.opening) if seed.opening else []
        if attempts > 1:
            for slices in self._tests:
                slices.hedge(1.0 / attempts)
        certified = self._certify()
        if before is Phase.SERVE and certified:
            # It goes on serving; the two moves that lie between are nobody's news.
            return [*events, *opened, *(event for event in certified if event.kind is not EventKind.PHASE)]
        move = advance(before, Signal.PROMOTED)
        if move is not None:
            opened.append(_phase(move.before, move.after, Signal.PROMOTED, {"seed": seed.count}))
        return [*events, *opened, *certified]

    @property
    def heritable(self) -> bool:
        """Whether a successor of the same lineage may go on from here: not while alarmed or coaching."""
        return self.comparisons > 0 and not (self.alarmed or self.coaching)

    def succeed(self, seed: Seed | None = None, *, carries: float) -> list[Event]:
        """A successor of the same lineage takes over: it goes on from all that its predecessors had earned.

        ``seed`` is what it says of earlier comparisons, each without having learnt from that one; None if it was not
        asked again. They bet for it anew, and if they certify more than is served now, that is served. The earlier
        certificate stands otherwise: it was given to a learner that answered each comparison before it learnt from it,
        and not to one set of weights. Only if they weigh as much as what it was earned with, and by them the served
        slice itself misses its target or nearly so, the smaller slice that they certify is served.

        A successor that is worse is the guard's to find, so the sampling rate does not fall below ``carries``, which is
        clipped to 1: what the caller knows of how different the successor is, 0 where it answers alike.

        Raises `ValueError` where ``carries`` is negative or not a number, or where this trust is not `heritable`.
        """
        if not carries >= 0.0:
            raise ValueError(f"carries must be a rate of at least 0, not {carries}")
        if not self.heritable:
            raise ValueError("trust under alarm or in coaching, or without a comparison, is not carried: begin anew")
        self.rate = max(self.rate, min(1.0, carries))
        evidence = {
            "carried": self.comparisons,
            "seed": 0 if seed is None else seed.count,
            "sampling_rate": round(self.policy_numbers.sampling_rate, 4),
        }
        return [Event(EventKind.PROMOTED, evidence), *([] if seed is None else self._ask_again(seed))]

    def _ask_again(self, seed: Seed) -> list[Event]:
        seen = [self._numbers(pending, expected) for pending, expected in seed.opening if isinstance(expected, Chance)]
        if not seen:
            return []
        asked = self._bet(seen, after=self.slices)
        if self.slices is not None:
            self.slices.test_level = asked.test_level
        known = 0.0 if self.slices is None else sum(self.slices.weights)
        as_much = sum(one.weight for one in seen) >= known
        if self.phase is not Phase.SERVE:
            if as_much:
                self.slices, self.firsts, self.pending = asked, None, []
            return self._certify()
        certified = asked.threshold
        if certified is None or self.threshold is None:
            return []
        if certified > self.threshold and (not as_much or self._holds(seen, self.threshold)):
            return []
        before, self.slices, self.firsts = self.threshold, asked, None
        return self._widen() if certified != before else []

    def _holds(self, seen: Sequence[Seen], threshold: float) -> bool:
        """Whether the slice from ``threshold`` on keeps its targets by its own measure, half a standard error to spare.

        What was proved of it once is not taken back because fewer comparisons, or luck, would not prove it again.
        """
        inside = [(self._excess(one, one.score), one.score, one.weight) for one in seen if one.confidence >= threshold]
        total, weight = sum(one.weight for one in seen), sum(w for *_, w in inside)
        if weight <= 0.0:
            return False
        kept = True
        if self.settings.bounds_served:
            kept = _spare([(x, w) for x, _, w in inside], weight)
        if self.settings.max_disagreement_overall is not None:
            limit = self.settings.max_disagreement_overall
            at_risk = [(limit - (1.0 - score), w) for _, score, w in inside]
            kept = kept and _spare([*at_risk, (limit, total - weight)], total)
        return kept

    def resumed(self, *, before: Phase) -> list[Event]:
        """Champion again: it goes on from what it had earned itself, and is checked from a rate of 1 down."""
        self._check_all()
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
            self.requests += 1
            accepted = seen.served and self.phase is Phase.SERVE
            self.accepted += accepted
            if self.answered is not None:
                self.answered += self.phase is Phase.SERVE
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

    def _remember(self, pending: Pending, draw: random.Random) -> None:
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

    def _open(self, opening: Sequence[tuple[Pending, Chance | str]]) -> list[Event]:
        """Fix the thresholds and let the comparisons that waited for them bet."""
        self.pending = []
        seen: list[Seen] = []
        why = None
        repeats: list[Seen] = []
        for pending, expected in opening:
            first = self.groups.first(pending.group)
            if isinstance(expected, Chance):
                seen.append(self._numbers(pending, expected))
                if not first:
                    repeats.append(seen[-1])
            else:
                self.unscored += 1
                why = expected
        # One event, however many there are: whoever hears of it has one evaluator to mend.
        events = [] if why is None else [Event(EventKind.UNSCORED, {"unscored": self.unscored, "why": why})]
        for one in seen:
            self._count(one)
        self.slices = self._bet(seen, repeats)
        if repeats:
            self.firsts = self._bet(seen, repeats, bet=False)
        return events

    def _bet(
        self, seen: Sequence[Seen], repeats: Sequence[Seen] = (), *, bet: bool = True, after: Slices | None = None
    ) -> Slices:
        """Slices of the traffic that these are a sample of, after they have bet, in the order of their requests.

        ``repeats`` are those of them whose requests were like recent ones: whether these ``bet``, too.
        ``after`` are those of a predecessor that they are to replace: one error holds for both.
        """
        slices = self._new_slices(seen, after)
        again = {id(one) for one in repeats}
        slices.replay(
            (one.confidence, one.score, self._excess(one, one.score), one.weight, id(one) in again)
            for one in seen
            if bet or id(one) not in again
        )
        return slices

    def _stake(self, seen: Seen, *, first: bool) -> None:
        """Let one comparison bet, where it is the ``first`` of its group on both accounts."""
        assert self.slices is not None
        if not first and self.firsts is None:
            self.firsts = Slices.load(self.slices.dump())
        x = self._excess(seen, seen.score)
        for slices in self._tests if first else (self.slices,):
            slices.add(seen.confidence, seen.score, x, seen.weight, repeats=not first)

    @property
    def _tests(self) -> list[Slices]:
        """All that a certificate needs the word of; of one grid."""
        return [slices for slices in (self.slices, self.firsts) if slices is not None]

    @property
    def _certified(self) -> int | None:
        """The number of the largest slice that is certified by every test."""
        certified = [slices.certified for slices in self._tests]
        proved = [k for k in certified if k is not None]
        return min(proved) if proved and len(proved) == len(certified) else None

    def _restart(self) -> None:
        """Forget all evidence for slices."""
        if self.slices is not None:
            self.slices.restart()
        self.firsts = None

    def _new_slices(self, seen: Sequence[Seen], after: Slices | None = None) -> Slices:
        confidences, weights = [one.confidence for one in seen], [one.weight for one in seen]
        deferral = self.settings.deferral
        expected = [(one.confidence, self._excess(one, one.confidence), one.weight) for one in seen]
        testable = all(one.weight == 1.0 and one.score in (0.0, 1.0) for one in seen)
        if after is not None:
            testable = after.exact_share > 0.0
        slices = Slices(
            grid(confidences, self.settings.min_coverage, weights=weights) if deferral else [0.0],
            self.settings.delta,
            confidences,
            weights=weights,
            entry=promising(expected) if deferral and seen else None,
            max_disagreement=self.settings.max_disagreement if testable else None,
            max_disagreement_overall=self.settings.max_disagreement_overall,
            served=self.settings.bounds_served,
        )
        if after is not None:
            slices.test_level = after.test_level
        return slices

    def _numbers(self, pending: Pending, expected: Chance) -> Seen:
        for name in pending.parts:
            if name not in self.since_all and len(self.since_all) <= 4 * _MOST_FIELDS:
                self.since_all[name] = Tally()
                if len(self.fields) < _MOST_FIELDS:
                    self.fields.append(name)
        return Seen(
            pending.confidence,
            round(pending.score, 6),
            expected.score,
            pending.weight if pending.weight == 1.0 else round(pending.weight, 6),
            [round(pending.parts.get(name, -1.0), 4) for name in self.fields],
            [round(expected.parts.get(name, 0.0), 4) for name in self.fields],
        )

    def _excess(self, seen: Seen, score: float) -> float:
        return excess(
            score,
            seen.chance,
            correlation=self.settings.graduate,
            max_disagreement=self.settings.max_disagreement,
        )

    def _count(self, seen: Seen) -> None:
        self.history.append(seen)
        if len(self.history) > _MEMORY * self.settings.window_size:
            del self.history[0]
        self._tally(self.since_all, seen, seen.weight)
        if self.threshold is not None and seen.confidence >= self.threshold:
            self._tally(self.since_served, seen, 1.0)
            self.window.add(seen)
            self.limits.add(seen, self.settings, self._served_share())

    def _tally(self, into: dict[str, Tally], seen: Seen, weight: float) -> None:
        into[""].add(seen.score, seen.chance, weight)
        for name, part, c in zip(self.fields, seen.parts, seen.chances, strict=False):
            if part >= 0.0:
                if name not in into:
                    into[name] = Tally()
                into[name].add(part, c, weight)

    def _rebuild_window(self, last: int | None = None) -> None:
        """Fill the window with what is remembered of the slice that is served now; only ``last`` where given."""
        inside = []
        if self.threshold is not None:
            inside = [seen for seen in self.history if seen.confidence >= self.threshold]
        self.window = ServedWindow(self.settings.window_size, inside[-(last or self.settings.window_size) :])

    def _check(self, seen: Seen, probability: float) -> list[Event]:
        """One spot check of the served slice: the unbiased estimate, and the guard."""
        if self.checked_level is None:
            self.checked_level = seen.score if self.guard is None else self.guard.detector.level
        weight = 1.0 / max(probability, 1e-9)
        self.checked_excess += (seen.score - self.checked_level) * weight
        self.checks += 1
        self.check_weights += weight
        self.check_squares += weight * weight
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
        self._restart()
        self._check_all()
        self._rebuild_window(last=max(1, change.began - 1))
        return [Event(EventKind(change.kind.value), evidence)]

    def _settle(self) -> list[Event]:
        """Draw the consequences: certify, coach, retreat, set the rate."""
        events = self._certify()
        if self.slices is not None and self.phase is Phase.SERVE:
            events += self._steer()
        if events or self.comparisons % EVERY == 0:
            self._campaign()
        return events

    def _check_all(self) -> None:
        """Begin again at a sampling rate of 1."""
        self.rate, self.campaign = 1.0, 0.0

    def _campaign(self) -> None:
        """Whether, and how much, more is to be checked than agreement asks for. In trouble everything is anyway."""
        self.campaign = 0.0
        if self.settings.campaigns and self.phase is Phase.SERVE and not (self.alarmed or self.coaching):
            self.campaign = campaign_rate(
                self._widenings, coverage=self.coverage, horizon=self.requests, rate=self.rate
            )

    def _certify(self) -> list[Event]:
        """Serve what is certified."""
        k = self._certified
        if self.slices is None or k is None:
            return []
        certified = self.slices.thresholds[k]
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
        k = self._certified
        assert k is not None
        was_alarmed = self.alarmed
        self.threshold = self.slices.thresholds[k]
        self.alarmed = False
        self._rebuild_window()
        if was_alarmed:
            self.guard = None
            self.limits = Limits(self.settings.arl)
        self._set_guard(k)
        evidence = {
            "threshold": self.threshold,
            "coverage": round(self.slices.share(k), 4),
            "agreement": _rounded(self.slices.agreement(k)),
            "comparisons": round(self.slices.weight(k), 1),
            "by": "exact test" if any(slices.is_tested(k) for slices in self._tests) else "bets",
            "wealth": float(f"{min(slices.peak(k) for slices in self._tests):.4g}"),
            "design_effect": round(max(slices.dependence.design_effect() for slices in self._tests), 2),
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
        promised = 0.0
        if self.settings.max_disagreement_overall is not None:
            # All that may differ may lie in the slice; its share is measured, and a level above the truth costs alarms.
            share = wilson(self.slices.share(k), sum(self.slices.weights), 2.33)[0]
            promised = 1.0 - self.settings.max_disagreement_overall / max(share, 1e-9)
        if self.settings.max_disagreement is not None:
            promised = max(promised, 1.0 - self.settings.max_disagreement)
        elif self.settings.bounds_served:
            promised = 1.0 - (1.0 - self.settings.graduate) * self._base()
        seen = 0.0 if agreement is None else wilson(agreement, weight, 2.33)[0]
        level = min(0.999, max(0.0, promised, seen))
        if self.guard is None:
            self.guard = Guard(level, self.settings.arl)
        else:
            # Another slice, another level; what the sums hold so far is still evidence that something changed.
            self.guard.detector.level = level
        self.guard_weight = weight

    def _steer(self) -> list[Event]:
        """Carry out what `steer` decides from the served slice's window."""
        steering = steer(
            self.settings,
            self.window,
            self.limits,
            rate=self.rate,
            coaching=self.coaching,
            alarmed=self.alarmed,
            coverage=self._served_share(),
            level=self._level,
        )
        events: list[Event] = []
        if steering.turn is not None:
            events.append(Event(EventKind(steering.turn.value), {**steering.evidence, **steering.limit}))
        if steering.turn is Turn.EMERGENCY:
            self.training_due = True
            return events + self._to_shadow(Signal.EMERGENCY, steering.evidence)
        if steering.turn is Turn.COACHING:
            self.coaching = self.training_due = True
        elif steering.turn is Turn.RECOVERED:
            self.coaching = False
        self.rate = steering.rate
        if self.window.rows:
            self._raise_guard()
        return events

    @property
    def _level(self) -> float | None:
        return None if self.guard is None else self.guard.detector.level

    @property
    def sampling_floor(self) -> float:
        """The smallest sampling rate of the slice that is served now."""
        return least_rate(self.settings, self._level)

    def _served_share(self) -> float:
        """Coverage, where a target of all answers asks for it; else 1, which is quicker to know."""
        return 1.0 if self.settings.max_disagreement_overall is None else self.coverage

    def _raise_guard(self) -> None:
        """Look again at each doubling of the evidence, and only ever raise the bar."""
        k = self._certified
        if self.guard is None or self.alarmed or self.slices is None or k is None:
            return
        if self.slices.weight(k) >= 2.0 * max(self.guard_weight, 50.0):
            level = self.guard.detector.level
            self._set_guard(k)
            self.guard.detector.level = max(level, self.guard.detector.level)

    def _to_shadow(self, signal: Signal, evidence: Mapping[str, Any]) -> list[Event]:
        before = self.phase
        move = advance(before, signal, evidence)
        if move is None:
            return []
        self.phase, self.threshold = move.after, None
        self._check_all()
        self.guard, self.coaching, self.alarmed = None, False, False
        self.limits = Limits(self.settings.arl)
        self._restart()
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

    def _base(self) -> float:
        """The mean of 1 - chance score, over everything since the promotion."""
        return self.since_all[""].u / max(self.since_all[""].w, 1e-9)

    def _widenings(self, rate: float) -> list[Widening]:
        """What is expected of each slice wider than the served one; see `widenings`. Under alarm nothing is served."""
        if self.slices is None or self.phase is Phase.COLLECT:
            return []
        served, settings = None, self.settings
        if self.phase is Phase.SERVE and not self.alarmed:
            if self.threshold not in self.slices.thresholds:
                return []
            served = self.slices.thresholds.index(self.threshold)
        room = settings.max_disagreement
        if room is None:
            room = (1.0 - settings.graduate) * self._base()
        return widenings(self._tests[-1], rate=rate, served=served, room=room, spread=_spread(self.history))

    def forecast(self) -> Widening | None:
        """See `Figures.forecast`."""
        coverage = 0.0 if self.alarmed else self.coverage
        return worthwhile(self._widenings(self.policy_numbers.sampling_rate), coverage=coverage, horizon=self.requests)

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
            sampling_floor=self.sampling_floor,
            coverage=self.coverage,
            comparisons=self.comparisons,
            unscored=self.unscored,
            accepted_agreement=self.accepted_agreement,
            unverified=self.unverified,
            window_all=self._scope([(seen, seen.weight) for seen in window]),
            window_served=self._scope([(seen, 1.0) for seen in self.window.rows]),
            since_all=scope(self.since_all),
            since_served=scope(self.since_served),
            slices=self._curve(),
            coaching=self.coaching,
            alarmed=self.alarmed,
            training_due=self.training_due,
            promises=self._promises(),
            campaign=self.campaign if self.campaign > self.rate else None,
            forecast=self.forecast(),
        )

    def _curve(self) -> list[Slice]:
        """Every slice with the figures of all comparisons, and the wealth of the test that is farther behind."""
        if self.slices is None or self.firsts is None:
            return [] if self.slices is None else self.slices.curve()
        return [
            replace(one, wealth=other.wealth, needed=other.needed, certified=one.certified and other.certified)
            if other.wealth * one.needed < one.wealth * other.needed
            else replace(one, certified=one.certified and other.certified)
            for one, other in zip(self.slices.curve(), self.firsts.curve(), strict=True)
        ]

    def _promises(self) -> list[Promise]:
        """What is promised of the answers, and how it turned out since the promotion."""
        settings, agreement = self.settings, self.accepted_agreement
        promised = (
            ("served answers that differ", settings.max_disagreement, 1.0),
            ("all answers that differ", settings.max_disagreement_overall, self._accepted_share()),
        )
        if agreement is None:
            return [Promise(what, at_most, None) for what, at_most, _ in promised if at_most is not None]
        low: float | None = None
        high: float | None = None
        if self.checks:
            size = effective_size(self.check_weights, self.check_squares)
            low, high = wilson(min(1.0, max(0.0, 1.0 - agreement)), size)
        return [
            Promise(
                what,
                at_most,
                share * (1.0 - agreement),
                None if low is None else share * low,
                None if high is None else share * high,
                self.checks,
            )
            for what, at_most, share in promised
            if at_most is not None
        ]

    def _accepted_share(self) -> float:
        """Of the answers since it began to serve, those above the threshold; coverage, where they were not counted."""
        return min(1.0, self.accepted / self.answered) if self.answered else self.coverage

    def _scope(self, weighted: Sequence[tuple[Seen, float]]) -> Scope:
        tallies: dict[str, Tally] = {"": Tally()}
        for seen, weight in weighted:
            self._tally(tallies, seen, weight)
        return scope(tallies)


def _phase(before: Phase, after: Phase, signal: Signal, evidence: Mapping[str, Any]) -> Event:
    return Event(EventKind.PHASE, {"before": int(before), "after": int(after), "signal": signal.value, **evidence})


def _spare(weighted: Sequence[tuple[float, float]], total: float) -> bool:
    """Whether the weighted mean of X lies half a standard error above 0, or more."""
    mean = sum(x * w for x, w in weighted) / total
    square = sum(w * w * (x - mean) ** 2 for x, w in weighted) / (total * total)
    return mean >= 0.5 * math.sqrt(square)


def _spread(history: Sequence[Seen]) -> float:
    """The variance of the scores in units of that of labels with the same mean, in (0, 1]; 1 where there is none."""
    if not history:
        return 1.0
    mean = sum(seen.score for seen in history) / len(history)
    labels = mean * (1.0 - mean)
    square = sum((seen.score - mean) ** 2 for seen in history) / len(history)
    return min(1.0, max(0.01, square / labels)) if labels > 1e-9 else 1.0


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
