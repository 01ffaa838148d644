"""Where comparisons become trust: the evaluator, the mathematics and the store's transaction, joined.

The mathematics is pure and the store knows no mathematics; this is the one place that carries a version's trust from
one to the other. Routers report comparisons and local answers here, the coach its promotions and refusals.

Trust belongs to the version that answered, whichever is champion: while a promoted version cannot be loaded, or another
router has it already, the one that serves goes on being compared, watched and, where it gets worse, withdrawn.

Evaluators are somebody else's code. They run before the transaction, under no lock and with a time limit; whatever they
raise leaves the comparison unscored.
"""

from __future__ import annotations

import contextlib
import math
import random
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from apprentice import secrets
from apprentice.confidence.ceiling import Ceiling, ceiling_of
from apprentice.confidence.correlation import CHANCE_DRAWS
from apprentice.confidence.figures import Figures
from apprentice.confidence.groups import group_of
from apprentice.confidence.novelty import Vocabulary
from apprentice.confidence.phases import Phase
from apprentice.confidence.sampling import as_text, tabulate
from apprentice.confidence.settings import TrustSettings
from apprentice.confidence.trust import Trust
from apprentice.confidence.trust_events import Event, EventKind
from apprentice.confidence.watch import LocalObservation
from apprentice.confidence.weighing import Seed, Stale, Weighed, weigh, weigh_seed
from apprentice.errors import EvaluatorError, MissingExtra
from apprentice.evaluators import Evaluation, Evaluator, made_evaluator
from apprentice.events import kinds
from apprentice.events.emitter import QUIET_S
from apprentice.events.kinds import Level
from apprentice.lifecycle.changes import changed_at, remote_change
from apprentice.local.engine import LocalAnswer
from apprentice.registry import EVALUATORS
from apprentice.request.time_limit import TimeLimit, TookTooLong
from apprentice.schemas.schema import Schema
from apprentice.settings.config import Settings, TaskSettings
from apprentice.store import Store
from apprentice.store.database import within
from apprentice.store.records import ComparisonRecord, EventRecord, PromotedBy, StateChange, TaskState

__all__ = ["Judge", "evaluator_of", "trust_settings"]

_log = secrets.logger(__name__)
# Observations of local answers are handed to the second watch in batches: one transaction for this many.
_WATCH_BATCH = 64
# So many are kept while the store cannot be written.
_MOST_OBSERVED = 10_000
# Inputs that say which words are familiar: the newest ones, when a version comes to serve, and at least some.
_FAMILIAR = 2000
_FEWEST_FAMILIAR = 100


# An evaluator may take so long for a comparison's score, and for its 2 * CHANCE_DRAWS chance scores. One that asks a
# model itself takes seconds a call.
_EVALUATOR_S = 120.0
# How often a comparison is weighed anew because others came before it; then it stays unscored.
_TRIES = 8
_PAIRS = 500  # the newest requests asked twice that say how often the remote agrees with itself
# Versions a task whose trust is kept in memory, on the average: the champion, and those of a roll-out.
_MOST_KNOWN = 4


class _Observed(NamedTuple):
    """A local answer that the second watch has not been handed yet; the input is looked at when it is."""

    value: Mapping[str, Any]
    confidence: float
    served: bool
    valid: bool
    unverified: float


class _Guarded(Evaluator):
    """An evaluator of which nothing but `EvaluatorError` comes out."""

    def __init__(self, evaluate: Evaluator, name: str) -> None:
        self._evaluate = evaluate
        self._name = name
        self.is_quick, self.has_ceiling = evaluate.is_quick, evaluate.has_ceiling

    def __call__(self, local: Mapping[str, Any], remote: Mapping[str, Any]) -> Evaluation:
        try:
            return self._evaluate(local, remote)
        except EvaluatorError:
            raise
        except Exception as error:
            raise EvaluatorError(f"evaluator {self._name} raised {type(error).__name__}: {error}") from error

    def project(self, answer: Mapping[str, Any]) -> Mapping[str, Any]:
        return self._evaluate.project(answer)

    def expect(self, confidences: Mapping[str, float]) -> float | None:
        return self._evaluate.expect(confidences)


class _Bounded(Evaluator):
    """An evaluator that comes back in time, with an `EvaluatorError` if it must."""

    def __init__(self, evaluate: Evaluator, limit: TimeLimit) -> None:
        self._evaluate = evaluate
        self._limit = limit
        self.has_ceiling = evaluate.has_ceiling

    def __call__(self, local: Mapping[str, Any], remote: Mapping[str, Any]) -> Evaluation:
        try:
            return self._limit.run(lambda: self._evaluate(local, remote))
        except TookTooLong as error:
            raise EvaluatorError(str(error)) from error

    def project(self, answer: Mapping[str, Any]) -> Mapping[str, Any]:
        return self._evaluate.project(answer)

    def expect(self, confidences: Mapping[str, float]) -> float | None:
        return self._evaluate.expect(confidences)


def evaluator_of(task: TaskSettings) -> Evaluator:
    """The evaluator that the task's configuration names. Raises `EvaluatorError`, `MissingExtra`, `RegistryError`."""
    found = EVALUATORS.find(task.evaluator)
    return made_evaluator(found, task.options_of(found))


def trust_settings(settings: Settings, task: TaskSettings) -> TrustSettings:
    """The plain numbers that the mathematics gets of the configuration."""
    thresholds, sampling = task.confidence_thresholds, settings.sampling
    return TrustSettings(
        graduate=thresholds.phase2_to_phase3,
        coaching_trigger=thresholds.coaching_trigger,
        emergency_threshold=thresholds.emergency_threshold,
        max_disagreement=thresholds.max_disagreement,
        max_disagreement_overall=thresholds.max_disagreement_overall,
        delta=task.error_rate,
        deferral=task.deferral,
        min_coverage=task.min_coverage,
        window_size=sampling.window_size,
        min_floor=sampling.min_floor,
        max_bad_answers=sampling.max_bad_answers,
        campaigns=sampling.campaigns,
        decay_function=sampling.decay_function,
        decay_options=as_text(sampling.decay_options),
        trend_sensitivity=sampling.trend_sensitivity,
        max_fall=sampling.max_fall,
        arl=sampling.mean_time_to_false_alarm,
    )


class Judge:
    """Updates the trust of every version in one store. Safe to use from many threads; other processes may do the same.

    ``evaluator_s`` is how long a comparison's score may take, and its chance scores together.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        clock: Callable[[], float],
        draw: random.Random,
        *,
        evaluator_s: float = _EVALUATOR_S,
    ) -> None:
        self._store = store
        self._clock = clock
        self._draw = draw
        self._tasks = {task.name: task for task in settings.tasks}
        self._evaluators: dict[str, Evaluator] = {}
        self._limits = {
            task.name: TimeLimit(f"evaluator {task.evaluator_function or task.evaluator}", evaluator_s)
            for task in settings.tasks
        }
        self._settings = {task.name: trust_settings(settings, task) for task in settings.tasks}
        self._locks = {task.name: threading.Lock() for task in settings.tasks}
        # The trust as this process last wrote it. Another process's change shows in the revision, and it is read again.
        self._known: dict[tuple[str, str], tuple[int, Trust]] = {}
        self._unscored_at: dict[tuple[str, str], float] = {}  # when it was last told (Unix seconds)
        self._watching = threading.Lock()
        self._observed: dict[tuple[str, str], list[_Observed]] = {}
        self._vocabularies: dict[tuple[str, str], Vocabulary | None] = {}

    def prepare(self) -> None:
        """Find out now whether every evaluator and decay function can be used; who only reads needs none of them.

        Raises `EvaluatorError`, `MissingExtra`, `ApprenticeError`.
        """
        for task, numbers in self._settings.items():
            self.evaluator(task)
            tabulate(
                numbers.decay_function,
                trigger=numbers.coaching_trigger,
                floor=numbers.min_floor,
                options=numbers.decay_options,
            )

    def evaluator(self, task: str) -> Evaluator:
        """The task's evaluator; whatever goes wrong in it is an `EvaluatorError`."""
        known = self._evaluators.get(task)
        if known is None:
            settings = self._tasks[task]
            name = settings.evaluator_function or settings.evaluator
            known = self._evaluators[task] = _Guarded(evaluator_of(settings), name)
        return known

    def bounded_evaluator(self, task: str) -> Evaluator:
        """The evaluator; one that hangs is an `EvaluatorError` too, after its time limit."""
        evaluate = self.evaluator(task)
        return evaluate if evaluate.is_quick else _Bounded(evaluate, self._limits[task])

    def rate(self, task: str, answer: LocalAnswer) -> LocalAnswer:
        """The answer with the confidence that this task's evaluator cares about; see `Evaluator.expect`."""
        expected = self.evaluator(task).expect(answer.field_confidence)
        return answer if expected is None else replace(answer, confidence=expected)

    def figures(self, task: str, version: str | None = None) -> Figures:
        """What is known of a version, the task's champion where none is named, with intervals."""
        return self._loaded(self._store.policy_row(task, version)).figures()

    def ceiling(self, task: str) -> Ceiling | None:
        """How often the remote agrees with itself; None before it was asked twice. See `confidence.ceiling`.

        Of the newest pairs since the remote last changed, as far as that was found out.
        """
        changed = remote_change(self._store, task)
        pairs = self._store.pairs(task, since=changed.since if changed else 0.0, limit=_PAIRS)
        return ceiling_of(pairs, self._settings[task], bounded=self.evaluator(task).has_ceiling)

    # ------------------------------------------------------------- from routers

    def compare(
        self,
        task: TaskSettings,
        *,
        request_id: str,
        local: LocalAnswer,
        remote: Mapping[str, Any],
        probability: float,
        sampling_rate: float,
        served: bool,
        at: float,
        value: Mapping[str, Any] | None = None,
        store_s: Callable[[], float] = lambda: math.inf,
    ) -> None:
        """Score one request that both answered, record it, and update the trust in the version that answered.

        The evaluator runs first; recording and updating are one short transaction. An evaluator that fails or takes
        too long leaves the comparison recorded and counted as unscored, and raises `EvaluatorError`. ``value`` is the
        input; where it repeats a recent one, it bets on no certificate again (see ``groups``). ``store_s`` says
        how long the store may take, and is asked when the evaluator is done: what that took is not the store's.
        """
        comparison = ComparisonRecord(
            id=uuid.uuid4().hex,
            task=task.name,
            request_id=request_id,
            version=local.version,
            score=None,
            parts={},
            confidence=local.confidence,
            local=local.output,
            remote=dict(remote),
            probability=probability,
            sampling_rate=sampling_rate,
            served=served,
            group="" if value is None else group_of(Schema.dumps(value)),
            created_at=at,
            answered_by=local.answered_by,
        )
        failure: Exception | None = None
        try:
            score, parts = self._limited(task.name, lambda: self.evaluator(task.name)(local.output, remote))
            comparison = replace(comparison, score=score, parts=dict(parts))
        except (EvaluatorError, TookTooLong) as error:
            failure = error
        for _ in range(_TRIES):
            weighed = Weighed(comparison, None)
            if failure is None:
                try:
                    weighed = self._weighed(comparison, store_s)
                except TookTooLong as error:
                    failure = error
            if isinstance(weighed.chance, str):
                failure = EvaluatorError(weighed.chance)
            try:
                self._take(weighed, comparison, store_s)
                break
            except Stale:  # others came first; only what depends on them is done again
                continue
        else:
            failure = EvaluatorError(f"comparison {comparison.id} was overtaken {_TRIES} times, and stays unscored")
            self._take(Weighed(comparison, None), comparison, store_s)
        if failure is not None:
            raise EvaluatorError(str(failure)) from failure

    def _weighed(self, comparison: ComparisonRecord, store_s: Callable[[], float]) -> Weighed:
        task, version = comparison.task, comparison.version
        with self._locks[task]:
            known = self._known.get((task, version))
            basis = known[1].basis() if known is not None else None
        if basis is None:
            with within(store_s()):
                basis = self._loaded(self._store.policy_row(task, version)).basis()
        # Where it completes the warm-up, all that waited are weighed with it; a slow evaluator is asked less of each.
        many = basis.waiting is not None and len(basis.waiting) + 1 >= basis.enough
        evaluate = self.evaluator(task)
        draws = CHANCE_DRAWS if evaluate.is_quick or not many else 1
        return self._limited(
            task, lambda: weigh(comparison, basis, evaluate, self._draw, opening_draws=draws), times=5 if many else 1
        )

    def _take(self, weighed: Weighed, record: ComparisonRecord, store_s: Callable[[], float]) -> None:
        def change(_: TaskState, trust: Trust) -> tuple[list[Event], list[ComparisonRecord]]:
            return trust.take(weighed, self._draw), [record]

        with within(store_s()):
            self._update(record.task, change, version=record.version)

    def _limited[T](self, task: str, ask: Callable[[], T], *, times: int = 1) -> T:
        return ask() if self.evaluator(task).is_quick else self._limits[task].run(ask, times=times)

    def watch(
        self,
        task: str,
        version: str,
        value: Mapping[str, Any],
        *,
        confidence: float,
        served: bool,
        valid: bool = True,
        unverified: float = 0.0,
    ) -> bool:
        """Note one answer of ``version`` for the second watch, which sees them all; True when it is time to `flush`.

        An answer that did not fit the output schema is not ``valid``, and has no confidence to speak of: 0. For
        ``unverified`` see `LocalObservation`. Waits for nothing.
        """
        with self._watching:
            observed = self._observed.setdefault((task, version), [])
            observed.append(_Observed(value, confidence, served, valid, unverified))
            return len(observed) >= _WATCH_BATCH

    def _vocabulary(self, task: str, version: str) -> Vocabulary | None:
        """The words of what the remote answered lately; None where that is too little to call a word new."""
        if (task, version) not in self._vocabularies:
            if len(self._vocabularies) >= _MOST_KNOWN * len(self._locks):
                self._vocabularies.clear()
            inputs = self._store.newest_inputs(task, _FAMILIAR)
            known = Vocabulary(inputs) if len(inputs) >= _FEWEST_FAMILIAR else None
            self._vocabularies[task, version] = known
            return known
        return self._vocabularies.get((task, version))

    def flush(self, task: str) -> None:
        """Hand over what the second watch has not seen yet. What cannot be written is kept for the next time."""
        with self._watching:
            versions = [version for of, version in self._observed if of == task]
        for version in versions:
            self._hand_over(task, version)

    def _hand_over(self, task: str, version: str) -> None:
        with self._watching:
            observed = self._observed.pop((task, version), [])
        try:
            seen = [self._observation(task, version, one) for one in observed]
            self._update(task, lambda _, trust: (trust.watch(seen), []), version=version)
        except BaseException:
            with self._watching:
                kept = observed + self._observed.get((task, version), [])
                self._observed[task, version] = kept[-_MOST_OBSERVED:]
            raise

    def _observation(self, task: str, version: str, one: _Observed) -> LocalObservation:
        vocabulary, text = self._vocabulary(task, version), Schema.dumps(one.value)
        return LocalObservation(
            confidence=one.confidence,
            valid=one.valid,
            served=one.served,
            input_length=len(text),
            novelty=vocabulary.novelty(text) if vocabulary is not None else None,
            unverified=one.unverified,
        )

    def close(self) -> None:
        """Hand over everything."""
        with contextlib.ExitStack() as every:  # a task that cannot be written must not keep the others from it
            for task in self._locks:
                every.callback(self.flush, task)

    # ------------------------------------------------------------- from the coach

    def promote(
        self,
        task: str,
        version: str,
        seed: Sequence[ComparisonRecord],
        *,
        attempts: int = 1,
        carries: float | None = None,
        reason: str,
        how: PromotedBy = "gate",
        by: str = "the gate",
        since: int | None = None,
    ) -> TaskState:
        """Make ``version`` the task's champion; its held-out comparisons are the first evidence for or against it.

        ``carries``: the version is the champion's successor in one lineage, and every comparison so far was answered
        before the lineage learnt from it. It goes on from all that the champion had earned, with a sampling rate of at
        least ``carries`` (at least 0), and what it says of the same comparisons today bets anew: see `Trust.succeed`.
        While the champion is under alarm or in coaching, or knows nothing of today's target, it begins with them.

        A version that was champion before goes on from all that it had earned, for as long as that is remembered and
        the target is the same; the evaluator is not asked then. If all of it was earned before the last change that an
        alarm dates, it begins with its held-out comparisons like a new one.

        Where the evaluator fails or takes too long, the gate's promotion raises `EvaluatorError`, and a person's takes
        effect all the same: the version begins with no evidence. The champion, its policy, the comparisons and the
        events change in one transaction. Who wanted it, and since which promotion nobody else may have: see
        `Store.promote`.
        """
        if carries is not None and not carries >= 0.0:
            raise ValueError(f"carries must be a sampling rate of at least 0, not {carries}")
        settings = self._settings[task]
        if carries is not None:
            inherits = self._heritage(self._store.policy_row(task), self._store.policy_row(task, version)) is not None
            carries = carries if inherits else None
        resumes = self._resumes(task, version)
        weighed, begun = self._weighed_seed(task, version, () if resumes else seed, must=how == "gate")

        def change(before: TaskState, own: TaskState) -> StateChange:
            phase = Phase(before.phase)
            records: Sequence[ComparisonRecord]
            due = None
            if carries is not None:
                trust = self._heritage(before, own)
                if trust is None:
                    raise Stale
                records = ()  # the same comparisons as before, in other words
                events = trust.succeed(weighed, carries=carries)
                due = before.training_due  # a refit is not the training that was asked for
            elif resumes and Trust.is_evidence(own.trust, settings):
                trust, records = Trust.loads(own.trust, settings), ()
                events = trust.resumed(before=phase)
            else:
                trust, records = Trust.fresh(settings), begun
                events = trust.begin(weighed, self._draw, attempts=attempts, before=phase)
            promoted, *others = events
            promoted = Event(EventKind.PROMOTED, {**promoted.evidence, "reason": reason})
            return self._changed(replace(own, training_due=due), trust, [promoted, *others], records)

        try:
            with self._locks[task]:
                self._known.clear()
                return self._store.promote(task, version, change, reason, how=how, by=by, since=since)
        except Stale:  # an alarm came in between: the version begins with its held-out comparisons
            return self.promote(task, version, seed, attempts=attempts, reason=reason, how=how, by=by, since=since)

    def _resumes(self, task: str, version: str) -> bool:
        """Whether a version has evidence of its own that is worth anything: of today's target and today's traffic."""
        if not Trust.is_evidence(self._store.policy_row(task, version).trust, self._settings[task]):
            return False
        changed = changed_at(self._store, task)
        newest = self._store.comparisons(task, version=version, limit=1)
        return changed is None or not newest or newest[0].created_at >= changed

    def _heritage(self, before: TaskState, own: TaskState) -> Trust | None:
        """A copy of the champion's trust for its successor; None where that has its own, or may not go on from it."""
        settings = self._settings[before.task]
        if Trust.is_evidence(own.trust, settings) or not Trust.is_evidence(before.trust, settings):
            return None
        trust = Trust.loads(before.trust, settings)
        trust.training_due = before.training_due is not None
        return trust if trust.heritable else None

    def _weighed_seed(
        self, task: str, version: str, seed: Sequence[ComparisonRecord], *, must: bool
    ) -> tuple[Seed, Sequence[ComparisonRecord]]:
        """The held-out comparisons that a version's trust begins with, weighed."""
        settings = self._settings[task]
        if not seed:
            return Seed(0, (), ()), ()
        # A person who rolls back does not wait for as many calls of a slow evaluator as a gate does.
        times = len(seed) if must else 1
        try:
            evaluate = self.evaluator(task)
            return self._limited(task, lambda: weigh_seed(seed, settings, evaluate, self._draw), times=times), seed
        except (EvaluatorError, MissingExtra, TookTooLong) as error:
            if must:
                raise EvaluatorError(f"the held-out comparisons of {version} cannot be weighed: {error}") from error
            _log.warning("%s: %s becomes champion with no evidence of its own: %s", task, version, error)
            return Seed(0, (), ()), ()

    def refuse(self, task: str, reason: str) -> None:
        """A retrained candidate did not pass the gate: versions that are under alarm serve no longer."""
        policies = self._store.policies()[task]
        serving = [name for name, policy in policies.policies.items() if policy.phase is Phase.SERVE]
        for version in {policies.champion, *serving}:
            self._update(task, lambda _, trust: (trust.refused(reason), []), version=version)

    def training_started(self, task: str) -> None:
        """The training that was due has begun."""

        def change(_: TaskState, trust: Trust) -> tuple[list[Event], list[ComparisonRecord]]:
            trust.training_started()
            return [], []

        self._update(task, change)

    # ------------------------------------------------------------- the transaction

    def _update(
        self,
        task: str,
        change: Callable[[TaskState, Trust], tuple[list[Event], Sequence[ComparisonRecord]]],
        *,
        version: str | None = None,
    ) -> TaskState:
        """Load a version's trust (the champion's where none is named), change it and write it, in one transaction."""
        written: list[Trust] = []
        failed = False

        def apply(state: TaskState) -> StateChange:
            key = (task, state.version or "")
            revision, trust = self._known.pop(key, (-1, None))  # it is put back when the change is kept
            if trust is None or revision != state.revision:
                trust = self._loaded(state)
            trust.training_due = state.training_due is not None  # the task's, and another version's alarm may set it
            nonlocal failed
            events, comparisons = change(state, trust)
            written[:] = [trust]
            failed = any(event.kind is EventKind.UNSCORED for event in events)
            if failed and 0 <= self._clock() - self._unscored_at.get(key, -math.inf) < QUIET_S:
                # An evaluator that is away fails for every request; whoever hears of it has one evaluator to mend.
                failed = False
                events = [event for event in events if event.kind is not EventKind.UNSCORED]
            return self._changed(state, trust, events, comparisons)

        with self._locks[task]:
            state = self._store.update_state(task, apply, version=version)
            self._known[task, state.version or ""] = (state.revision, written[0])
            if failed:
                self._unscored_at[task, state.version or ""] = self._clock()
            if len(self._known) > _MOST_KNOWN * len(self._locks):
                self._known.clear()
        return state

    def _loaded(self, state: TaskState) -> Trust:
        settings = self._settings[state.task]
        if not state.trust and state.version is not None:
            return Trust.unknown(settings)
        return Trust.loads(state.trust, settings)

    def _changed(
        self, state: TaskState, trust: Trust, events: Sequence[Event], comparisons: Sequence[ComparisonRecord]
    ) -> StateChange:
        now = self._clock()
        numbers = trust.policy_numbers
        due = state.training_due
        if trust.training_due and not due:
            due = "escalated"
        records = [
            EventRecord(
                id=uuid.uuid4().hex,
                task=state.task,
                kind=event.kind.value,
                level=_level(event.kind),
                evidence={"version": state.version, **event.evidence},
                at=now,
            )
            for event in events
        ]
        return state.change(
            phase=int(numbers.phase),
            threshold=numbers.threshold,
            sampling_rate=numbers.sampling_rate,
            trust=trust.dumps(),
            training_due=due if trust.training_due else None,
            comparisons=comparisons,
            events=records,
        )


def _level(kind: EventKind) -> Level:
    known = kinds.EventKind.named(kind.value)
    assert known is not None  # a test holds the two lists together
    return known.level
