"""Where comparisons become trust: the evaluator, the mathematics and the store's transaction, joined.

The mathematics is pure and the store knows no mathematics; this is the one place that carries a task's trust from one
to the other. Routers report comparisons and local answers here, the coach its promotions and refusals.
"""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from apprentice.alerts import Alerts
from apprentice.confidence.novelty import Vocabulary
from apprentice.confidence.trust import Comparison, Event, EventKind, Figures, LocalObservation, Trust, TrustSettings
from apprentice.config import Settings, TaskSettings
from apprentice.errors import EvaluatorError
from apprentice.evaluators import Evaluator, build_evaluator
from apprentice.local.engine import LocalAnswer
from apprentice.schema import Schema
from apprentice.store import Store
from apprentice.store.records import ComparisonRecord, EventRecord, StateChange, TaskState

__all__ = ["Judge", "evaluator_of", "trust_settings"]

_LEVELS: Mapping[EventKind, Literal["info", "warning", "critical"]] = {
    EventKind.EMERGENCY: "critical",
    EventKind.COACHING: "warning",
    EventKind.DRIFT: "warning",
    EventKind.SHIFT: "warning",
    EventKind.UNUSUAL: "warning",
    EventKind.UNSCORED: "warning",
}
# Observations of local answers are handed to the second watch in batches: one transaction for this many.
_WATCH_BATCH = 64
# Inputs that say which words are familiar: the newest ones, when a version comes to serve, and at least some.
_FAMILIAR = 2000
_FEWEST_FAMILIAR = 100


@dataclass(frozen=True, slots=True)
class _Watched:
    """Local answers that the second watch has not been handed yet."""

    version: str
    seen: list[tuple[float, bool, bool, Mapping[str, Any]]] = field(default_factory=list)
    """Confidence, whether served, whether valid, and the input, which is looked at when they are handed over."""


def evaluator_of(task: TaskSettings) -> Evaluator:
    """The evaluator that the task's configuration names. Raises `EvaluatorError`, `MissingExtra`."""
    return build_evaluator(
        task.evaluator,
        match_fields=task.match_fields,
        field_weights=task.field_weights,
        numeric_tolerance=task.numeric_tolerance,
        ordered=task.ordered_lists,
        model=task.evaluator_model,
        function=task.evaluator_function,
    )


def trust_settings(settings: Settings, task: TaskSettings) -> TrustSettings:
    """The plain numbers that the mathematics gets of the configuration."""
    thresholds, sampling = task.confidence_thresholds, settings.sampling
    return TrustSettings(
        graduate=thresholds.phase2_to_phase3,
        coaching_trigger=thresholds.coaching_trigger,
        emergency_threshold=thresholds.emergency_threshold,
        max_disagreement=thresholds.max_disagreement,
        delta=task.error_rate,
        deferral=task.deferral,
        min_coverage=task.min_coverage,
        window_size=sampling.window_size,
        min_floor=sampling.min_floor,
        decay_function=sampling.decay_function,
        trend_sensitivity=sampling.trend_sensitivity,
        max_fall=1.0 - sampling.max_fall,
        arl=sampling.mean_time_to_false_alarm,
    )


class Judge:
    """Updates the trust of every task in one store. Safe to use from many threads; other processes may do the same."""

    def __init__(
        self, settings: Settings, store: Store, alerts: Alerts, clock: Callable[[], float], draw: random.Random
    ) -> None:
        self._store = store
        self._alerts = alerts
        self._clock = clock
        self._draw = draw
        self._evaluators = {task.name: evaluator_of(task) for task in settings.tasks}
        self._settings = {task.name: trust_settings(settings, task) for task in settings.tasks}
        self._locks = {task.name: threading.Lock() for task in settings.tasks}
        # The trust as this process last wrote it. Another process's change shows in the revision, and it is read again.
        self._known: dict[str, tuple[int, Trust]] = {}
        self._watched: dict[str, _Watched] = {}
        self._vocabularies: dict[str, tuple[str, Vocabulary | None]] = {}

    def evaluator(self, task: str) -> Evaluator:
        """The task's evaluator."""
        return self._evaluators[task]

    def rate(self, task: str, answer: LocalAnswer) -> LocalAnswer:
        """The answer with the confidence that this task's evaluator cares about; see `StructuredMatch.expect`."""
        expect = getattr(self._evaluators[task], "expect", None)
        expected = expect(answer.field_confidence) if expect is not None else None
        return answer if expected is None else replace(answer, confidence=expected)

    def figures(self, task: str) -> Figures:
        """What is known of the task's local model, with intervals."""
        with self._locks[task]:
            return self._trust(self._store.policy_row(task)).figures()

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
    ) -> None:
        """Score one request that both answered, record it, and update the task's trust, in one transaction.

        An evaluator that fails leaves the comparison recorded without a score and raises `EvaluatorError`.
        A comparison with a version that is no longer the champion is recorded and teaches nothing.
        """
        evaluate = self._evaluators[task.name]
        score, parts, failure = None, {}, None
        try:
            evaluation = evaluate(local.output, remote)
            score, parts = evaluation.score, dict(evaluation.parts)
        except EvaluatorError as error:
            failure = error
        comparison = Comparison(
            id=uuid.uuid4().hex,
            score=score,
            parts=parts,
            confidence=local.confidence,
            local=local.output,
            remote=dict(remote),
            probability=probability,
            sampling_rate=sampling_rate,
            served=served,
        )
        record = comparison_record(comparison, task=task.name, request_id=request_id, version=local.version, at=at)

        def change(state: TaskState, trust: Trust) -> tuple[list[Event], list[ComparisonRecord]]:
            current = state.champion == local.version
            return (trust.observe(comparison, evaluate, self._draw) if current else []), [record]

        self._update(task.name, change)
        if failure is not None:
            raise failure

    def watch(
        self, task: str, version: str, value: Mapping[str, Any], *, confidence: float, served: bool, valid: bool = True
    ) -> bool:
        """Note one answer of ``version`` for the second watch, which sees them all; True when it is time to `flush`.

        An answer that did not fit the output schema is not ``valid``, and has no confidence to speak of: 0.
        """
        with self._locks[task]:
            watched = self._watched.get(task)
            if watched is None or watched.version != version:
                # What the version before did says nothing of this one.
                watched = self._watched[task] = _Watched(version)
            watched.seen.append((confidence, served, valid, value))
            return len(watched.seen) >= _WATCH_BATCH

    def _vocabulary(self, task: str, version: str) -> Vocabulary | None:
        """The words of what the remote answered lately; None where that is too little to call a word new."""
        known = self._vocabularies.get(task)
        if known is None or known[0] != version:
            inputs = self._store.newest_inputs(task, _FAMILIAR)
            known = (version, Vocabulary(inputs) if len(inputs) >= _FEWEST_FAMILIAR else None)
            self._vocabularies[task] = known
        return known[1]

    def flush(self, task: str) -> None:
        """Hand over what the second watch has not seen yet."""
        with self._locks[task]:
            watched = self._watched.pop(task, None)
        if watched is None:
            return
        vocabulary = self._vocabulary(task, watched.version)
        seen = [
            LocalObservation(
                confidence=confidence,
                valid=valid,
                served=served,
                input_length=len(text),
                novelty=vocabulary.novelty(text) if vocabulary is not None else None,
            )
            for confidence, served, valid, value in watched.seen
            for text in [Schema.dumps(value)]
        ]
        self._update(task, lambda state, trust: (trust.watch(seen) if state.champion == watched.version else [], []))

    def close(self) -> None:
        """Hand over everything."""
        for task in self._locks:
            self.flush(task)

    # ------------------------------------------------------------- from the coach

    def promote(
        self, task: str, version: str, seed: Sequence[ComparisonRecord], *, attempts: int = 1, reason: str
    ) -> TaskState:
        """Make ``version`` the task's champion; its held-out comparisons are the first evidence for or against it.

        The champion, the policy, the comparisons and the events change in one transaction.
        """
        comparisons = [_comparison(record) for record in seed]
        evaluate = self._evaluators[task]

        def change(state: TaskState) -> StateChange:
            trust = Trust.loads(state.trust, self._settings[task])
            events = trust.promoted(comparisons, evaluate, self._draw, attempts=attempts)
            return replace(self._changed(state, trust, events, seed), champion=version, training_due=None)

        with self._locks[task]:
            self._known.pop(task, None)
            return self._store.promote(task, version, change, reason)

    def refuse(self, task: str, reason: str) -> None:
        """A retrained candidate did not pass the gate."""
        self._update(task, lambda state, trust: (trust.refused(reason), []))

    def training_started(self, task: str) -> None:
        """The training that was due has begun."""

        def change(state: TaskState, trust: Trust) -> tuple[list[Event], list[ComparisonRecord]]:
            trust.training_started()
            return [], []

        self._update(task, change)

    # ------------------------------------------------------------- the transaction

    def _update(
        self,
        task: str,
        change: Callable[[TaskState, Trust], tuple[list[Event], Sequence[ComparisonRecord]]],
    ) -> TaskState:
        announced: list[Event] = []

        def apply(state: TaskState) -> StateChange:
            trust = self._trust(state)
            events, comparisons = change(state, trust)
            announced[:] = events
            self._known[task] = (state.revision + 1, trust)
            return self._changed(state, trust, events, comparisons)

        with self._locks[task]:
            try:
                state = self._store.update_state(task, apply)
            except BaseException:
                self._known.pop(task, None)  # it was changed, and the change was not kept
                raise
        for event in announced:
            self._alerts.announce(event.kind.value, task, dict(event.evidence), _LEVELS.get(event.kind, "info"))
        return state

    def _trust(self, state: TaskState) -> Trust:
        revision, trust = self._known.get(state.task, (-1, None))
        if trust is not None and revision == state.revision:
            return trust
        return Trust.loads(state.trust, self._settings[state.task])

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
                level=_LEVELS.get(event.kind, "info"),
                evidence=dict(event.evidence),
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


def comparison_record(
    comparison: Comparison, *, task: str, request_id: str, version: str, at: float
) -> ComparisonRecord:
    """A comparison as the store keeps it."""
    return ComparisonRecord(
        id=comparison.id,
        task=task,
        request_id=request_id,
        version=version,
        score=comparison.score,
        parts=comparison.parts,
        confidence=comparison.confidence,
        local=comparison.local,
        remote=comparison.remote,
        probability=comparison.probability,
        sampling_rate=comparison.sampling_rate,
        served=comparison.served,
        seeded=comparison.seeded,
        created_at=at,
    )


def _comparison(record: ComparisonRecord) -> Comparison:
    return Comparison(
        id=record.id,
        score=record.score,
        parts=record.parts,
        confidence=record.confidence,
        local=record.local,
        remote=record.remote,
        probability=record.probability,
        sampling_rate=record.sampling_rate,
        served=record.served,
        seeded=record.seeded,
    )
