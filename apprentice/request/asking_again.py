"""Asking the remote for what it has answered already: how often does it agree with itself, and with what it once said?

Two occasions, neither of which a caller notices:

- a share of the requests that the remote answered (`sampling.asked_twice`) is asked again at once. What comes of it is
  the teacher's own ceiling (`apprentice.confidence.ceiling`);
- after an alarm a sample of stored inputs (`sampling.asked_again`) is asked again, to tell a change of the remote from
  a fall of the local model (`apprentice.confidence.arbiter`).

One thread asks, one call at a time, and only while no cap is near its end and no limit of the vendor is in use. An
answer is recorded as it came, with what it cost, in one transaction, and scored after that: a process that dies in
between leaves a row for the next one to score. The alarms, and how far asking has come, are read from the store, so any
process goes on where another one stopped.
"""

from __future__ import annotations

import copy
import hashlib
import random
import threading
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from apprentice import secrets
from apprentice.confidence.arbiter import ERROR, Reasked, Verdict, judge_remote, needs_arbiter
from apprentice.confidence.ceiling import sentence
from apprentice.confidence.correlation import CHANCE_DRAWS, chance
from apprentice.errors import ApprenticeError, BudgetExceeded, EvaluatorError, OutputError, RemoteError, StoreError
from apprentice.events.emitter import Events
from apprentice.events.kinds import EventKind
from apprentice.lifecycle.changes import ALARMS, began_at
from apprentice.local.engine import LocalAnswer
from apprentice.money.budget import Budget
from apprentice.money.owner import this_process
from apprentice.remote import RemoteAnswer, Teacher
from apprentice.request.backlog import Backlog
from apprentice.request.judge import Judge, trust_settings
from apprentice.settings.config import Settings, TaskSettings
from apprentice.store import EventRecord, ExampleRecord, SecondAnswer, Store, within

__all__ = ["Answered", "AskingAgain"]

LOOK_S = 60.0
"""How often the store is asked for an alarm."""
PAUSE_S = 86_400.0
"""Stored inputs of a task are not asked again more often than that."""

_TOO_LATE_S = 7 * 86_400.0  # after an alarm
_FEWEST = 20  # of the inputs asked again; fewer tell nothing
_POOL = 10  # times as many of the newest inputs are there to choose from
_SPARING = 4  # times as many must have been paid for before
_LEASE_S = 300.0
_UNSCORED = 20  # of the newest answers are looked at for ones that are not scored yet

_log = secrets.logger("apprentice")


@dataclass(frozen=True, slots=True)
class Answered:
    """A request that the remote has answered; ``probability`` and ``sampling_rate`` as in `Comparison`."""

    task: TaskSettings
    id: str
    value: Mapping[str, Any]
    remote: RemoteAnswer
    local: LocalAnswer | None
    probability: float
    sampling_rate: float
    at: float


class _NotNow(Exception):
    """It is left for later: money, the remote or its limits are needed for what somebody waits for."""


class AskingAgain:
    """See the module. Thread-safe; what is `note`d waits for nothing."""

    def __init__(
        self,
        settings: Settings,
        *,
        store: Store,
        budget: Budget,
        teacher: Teacher,
        judge: Judge,
        backlog: Backlog,
        alerts: Events,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._store = store
        self._budget = budget
        self._teacher = teacher
        self._judge = judge
        self._backlog = backlog
        self._alerts = alerts
        self._clock = clock
        self._share = settings.sampling.asked_twice
        # How many answers of a task until one is looked at; twice as often as the share asks for, to catch up.
        self._until: dict[str, int] = {}
        self._candidates: dict[str, Answered] = {}
        self._jobs: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._looked_at = clock()
        self._hopeless: set[str] = set()
        self._unusable: set[tuple[str, str]] = set()

    # ------------------------------------------------------------- from the router and its background thread

    def note(self, answered: Answered) -> None:
        """A request that the remote answered: now and then it is kept, to be asked again."""
        if self._share <= 0:
            return
        task = answered.task.name
        with self._lock:
            left = self._until.get(task, 0) - 1
            self._until[task] = left if left >= 0 else round(0.5 / self._share) - 1
            if left < 0:
                # The caller may change what it got.
                mine = replace(answered.remote, output=copy.deepcopy(answered.remote.output))
                self._candidates[task] = replace(answered, remote=mine)

    def look(self) -> None:
        """Have asked what is to be asked; cheap, and waits for no answer. Raises `StoreError`."""
        with self._lock:
            candidates, self._candidates = self._candidates, {}
        for answered in candidates.values():
            if self._share_has_room(answered.task.name):
                self._do(lambda answered=answered: self._ask_twice(answered))  # type: ignore[misc]
        now = self._clock()
        if not self._settings.sampling.asked_again or 0 <= now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        for task in self._settings.tasks:
            if self._alarm(task.name) is not None:
                self._do(lambda task=task: self._ask_stored(task))  # type: ignore[misc]

    def close(self) -> None:
        """See the call under way to its end; what waits is not asked."""
        with self._lock:
            self._closed = True
            self._jobs.clear()
            thread = self._thread
        if thread is not None:
            thread.join()

    def wait(self, timeout_s: float) -> bool:
        """Wait until what is to be asked was asked; False where that takes longer."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        return thread is None or not thread.is_alive()

    def _do(self, job: Callable[[], None]) -> None:
        with self._lock:
            if self._closed:
                return
            self._jobs.append(job)
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="apprentice-again", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the interpreter is shutting down
                    self._jobs.clear()
                    return
                self._thread = thread

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._thread = None
                    return
                job = self._jobs.popleft()
            try:
                job()
            except _NotNow as why:
                _log.info("the remote is not asked again now: %s", why)
            except (ApprenticeError, EvaluatorError) as error:
                _log.warning("asking the remote again failed: %s", error)
            except Exception:  # noqa: BLE001  # nobody waits for it, and what comes after it must be asked
                _log.exception("asking the remote again failed unforeseen")

    # ------------------------------------------------------------- twice at once

    def _share_has_room(self, task: str) -> bool:
        """Whether one more stays within the share, of all the answers that the task ever got."""
        allowed = self._share * self._store.example_totals(task).ever
        return self._store.count_second_answers(task) + 1 <= allowed

    def _ask_twice(self, answered: Answered) -> None:
        task, local = answered.task, answered.local
        if not self._share_has_room(task.name):
            return
        first = SecondAnswer(
            id=uuid.uuid4().hex,
            task=task.name,
            request_id=answered.id,
            first=answered.remote.output,
            output={},
            provider=answered.remote.provider,
            model=answered.remote.model,
            first_at=answered.at,
            created_at=0.0,
            local=None if local is None else local.output,
            version="" if local is None else local.version,
            probability=answered.probability,
            sampling_rate=answered.sampling_rate,
        )
        try:
            self._ask(task, answered.value, first)
        except OutputError as error:
            raise _NotNow(str(error)) from None
        self._score(task.name, "")
        self._tell_out_of_reach(task)

    def _tell_out_of_reach(self, task: TaskSettings) -> None:
        """Tell once that a target is out of reach, for as long as it is the target."""
        ceiling = self._judge.ceiling(task.name)
        numbers = trust_settings(self._settings, task)
        said = None if ceiling is None else sentence(ceiling, numbers)
        if ceiling is None or said is None:
            return
        targets = "|".join(f"{one.key}={one.value:g}" for one in ceiling.unreachable)
        evidence = {
            "sentence": said,
            "pairs": ceiling.pairs,
            "self_agreement": round(ceiling.agreement.value, 4),
            "interval": [round(ceiling.agreement.low, 4), round(ceiling.agreement.high, 4)],
            "local_agreement": None if ceiling.local is None else round(ceiling.local.value, 4),
            "delta": numbers.delta,
        }
        kind = EventKind.OUT_OF_REACH
        event_id = f"{kind}|{task.name}|{targets}|deferral={task.deferral}"
        self._store.add_event(EventRecord(event_id, task.name, kind, kind.level, evidence, self._clock()))

    # ------------------------------------------------------------- stored inputs, after an alarm

    def _alarm(self, task: str) -> EventRecord | None:
        """The alarm because of which stored inputs are to be asked again; None where there is none."""
        now = self._clock()
        told = [self._store.latest_event(task, kind) for kind in (EventKind.REMOTE_CHANGED, EventKind.REMOTE_STEADY)]
        last = max((event.at for event in told if event is not None), default=float("-inf"))
        alarms = [alarm for kind in ALARMS if (alarm := self._store.latest_event(task, kind)) is not None]
        due = [a for a in alarms if a.at - last >= PAUSE_S and now - a.at <= _TOO_LATE_S and a.id not in self._hopeless]
        return min(due, key=lambda alarm: alarm.at, default=None)

    def _ask_stored(self, task: TaskSettings) -> None:
        lease = self._store.acquire_lease(f"again:{task.name}", f"{this_process()}/{id(self)}", _LEASE_S)
        if lease is None:
            return
        try:
            alarm = self._alarm(task.name)
            if alarm is None:
                return
            since = began_at(self._store, task.name, alarm)
            inputs = self._inputs(task.name, alarm.id, since)
            if len(inputs) < _FEWEST:
                self._hopeless.add(alarm.id)
                _log.info("%s: too few answers from before the alarm to ask the remote for again", task.name)
                return
            self._score(task.name, alarm.id)  # what a process that died left behind
            for example in inputs:
                if self._closed:
                    return
                held = self._store.renew_lease(lease, _LEASE_S)
                if held is None:
                    return
                lease = held
                self._ask_again(task, alarm, example)
            self._conclude(task, alarm, since, inputs)
        finally:
            self._store.release_lease(lease)

    def _inputs(self, task: str, cause: str, since: float) -> list[ExampleRecord]:
        """A sample of the newest inputs from before the change, the same for every process.

        Chosen by a hash of the example's and the alarm's id, which know nothing of any answer.
        """
        most = self._settings.sampling.asked_again
        pool = self._store.examples_before(task, since, _POOL * most)
        pool = [one for one in pool if self._teacher.asks(one.provider, one.model)]
        pool.sort(key=lambda one: hashlib.sha256(f"{cause}|{one.id}".encode()).digest())
        return pool[: min(most, len(pool) // _SPARING)]

    def _ask_again(self, task: TaskSettings, alarm: EventRecord, example: ExampleRecord) -> None:
        """Whatever of the second and the third answer to one input is still to be asked for."""
        for turn in (2, 3):
            known = self._known(task.name, alarm.id).get(example.id, {})
            if turn in known or (alarm.id, example.id) in self._unusable:
                continue
            if turn == 3 and not (known and known[2].score is not None and needs_arbiter(known[2].score)):
                return
            first = SecondAnswer(
                id=uuid.uuid4().hex,
                task=task.name,
                request_id=example.id,
                cause=alarm.id,
                turn=turn,
                first=example.output,
                output={},
                provider=example.provider,
                model=example.model,
                first_at=example.created_at,
                created_at=0.0,
            )
            try:
                self._ask(task, example.input, first)
            except OutputError:  # to this one it has no answer any more: another try would only cost
                self._unusable.add((alarm.id, example.id))
                return
            self._score(task.name, alarm.id)

    def _known(self, task: str, cause: str) -> dict[str, dict[int, SecondAnswer]]:
        known: dict[str, dict[int, SecondAnswer]] = {}
        for row in self._store.second_answers(task, cause=cause):
            known.setdefault(row.request_id, {})[row.turn] = row
        return known

    def _conclude(self, task: TaskSettings, alarm: EventRecord, since: float, inputs: list[ExampleRecord]) -> None:
        known = self._known(task.name, alarm.id)
        seen = []
        for example in inputs:
            turns = known.get(example.id, {})
            if 2 in turns and turns[2].score is not None:
                seen.append(Reasked(turns[2].score, turns[3].side if 3 in turns else None))
        if len(seen) < _FEWEST:
            self._hopeless.add(alarm.id)
            return
        verdict = judge_remote(seen)
        kind = EventKind.REMOTE_CHANGED if verdict.changed else EventKind.REMOTE_STEADY
        ceiling = self._judge.ceiling(task.name)
        evidence = {
            "sentence": _in_words(verdict, None if ceiling is None else ceiling.agreement.value),
            "alarm": alarm.kind,
            "asked": verdict.asked,
            "agreement": round(verdict.agreement, 4),
            "self_agreement": None if ceiling is None else round(ceiling.agreement.value, 4),
            "with_new_answer": verdict.with_new,
            "with_old_answer": verdict.with_old,
            "p_value": float(f"{verdict.p_value:.3g}"),
            "error": ERROR,
            "since": since,
        }
        event = EventRecord(f"{alarm.id}|asked again", task.name, kind, kind.level, evidence, self._clock())
        self._store.add_event(event)

    # ------------------------------------------------------------- one call

    def _ask(self, task: TaskSettings, value: Mapping[str, Any], first: SecondAnswer) -> None:
        """Ask, and record what came as it came. Raises `_NotNow` where it is left for later, and `OutputError`."""
        if not self._budget.has_spare(task.name):
            raise _NotNow(f"the caps of task {task.name} leave no room for calls that nobody waits for")
        with self._budget.account(task.name, first.id) as account:
            try:
                with within(self._settings.remote.deadline_s):
                    answer = self._teacher.ask_again(task, value, account, provider=first.provider, model=first.model)
            except (BudgetExceeded, RemoteError) as error:
                raise _NotNow(str(error)) from None
            second = replace(first, output=answer.output, created_at=self._clock())
            try:
                account.complete(second=second)
            except StoreError as error:
                account.keep_open()
                evidence = {"request": second.id, "cost": str(answer.cost), "cause": str(error)}
                self._backlog.add(task.name, lambda: account.complete(second=second), evidence)
                raise

    def _score(self, task: str, cause: str) -> None:
        """Score the newest answers that have no score yet: the last one, and what others left behind."""
        rows = self._store.second_answers(task, cause=cause, limit=_UNSCORED + CHANCE_DRAWS)
        evaluate = self._judge.bounded_evaluator(task)
        for place, row in enumerate(rows[:_UNSCORED]):
            if row.score is not None and (cause or row.chance is not None):
                continue
            others = rows[place + 1 :][:CHANCE_DRAWS] or rows[max(0, place - CHANCE_DRAWS) : place][::-1]
            try:
                scored = replace(row, score=evaluate(row.output, row.first).score)
                if row.turn == 3:
                    second = next(r for r in rows if (r.request_id, r.turn) == (row.request_id, 2))
                    scored = replace(scored, side=evaluate(second.output, row.output).score - (scored.score or 0.0))
                if not cause and others:
                    reference = [(other.output, other.first) for other in others]
                    # With as many answers as are drawn there is nothing to choose.
                    by_chance, _ = chance(row.output, row.first, reference, evaluate, random.Random(0))
                    scored = replace(scored, chance=by_chance)
                if row.local is not None:
                    scored = replace(scored, local_score=evaluate(row.local, row.first).score)
            except EvaluatorError as error:
                self._alerts.emit(EventKind.COMPARISON_FAILED, task, {"request": row.id, "cause": str(error)})
                return
            self._store.score_second_answer(scored)


def _in_words(verdict: Verdict, usual: float | None) -> str:
    same, asked = round(verdict.agreement * verdict.asked), verdict.asked
    agree = f"{same} of {asked} re-asked inputs agree"
    if usual is not None:
        agree += f", usually {usual * asked:.0f}"
    if verdict.with_new + verdict.with_old:
        agree += f"; asked a third time, it sides with the new answer {verdict.with_new} times, {verdict.with_old} with"
        agree += " the old"
    changed = "differently than it did" if verdict.changed else "as it did, as far as that can tell"
    return f"the remote answers {changed}: {agree}"
