"""The path of a request, from the input to the answer, in the caller's thread (docs/architecture.md, "A request").

`Router.run` asks the store for the task's policy, lets `decide` make the plan, carries it out, returns the remote's
answer whenever there is one and the local model's otherwise, and records what it learned: an example for every remote
answer, a comparison wherever both answered. It decides nothing itself. Where both are asked at once, a second thread
asks the local model.
"""

from __future__ import annotations

import copy
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from apprentice import secrets
from apprentice.confidence.decision import Headroom, Plan, Reason, accepts, decide
from apprentice.errors import (
    ApprenticeError,
    BudgetExceeded,
    ClientClosed,
    EngineUnavailable,
    InputError,
    OutputError,
    Problem,
    RemoteRefused,
    RemoteUnavailable,
    StoreError,
    Unavailable,
    UnknownTask,
)
from apprentice.events.emitter import Events
from apprentice.events.kinds import EventKind
from apprentice.local.engine import LocalAnswer
from apprentice.local.switch import Switch
from apprentice.money.budget import Account, Budget
from apprentice.remote import RemoteAnswer, Teacher
from apprentice.request.asking_again import Answered, AskingAgain
from apprentice.request.backlog import Backlog
from apprentice.request.judge import Judge
from apprentice.request.snapshot import Snapshot
from apprentice.request.tally import Tally
from apprentice.result import Result
from apprentice.schemas.json_values import in_words
from apprentice.schemas.schema import SchemaError
from apprentice.settings.config import Settings, TaskSettings
from apprentice.store import Store, within
from apprentice.store.records import ExampleRecord, TaskPolicy

__all__ = ["Health", "Router", "TaskHealth"]

STORE_GRACE_S = 600.0
"""How long requests go on under the last policies that were read, while the store cannot be reached."""
RECORD_S = 5.0
"""How long a paid answer waits to be recorded before the caller gets it all the same."""

_STORE_PATIENCE_S = 5.0  # for a policy
_LEAST_S = 0.5  # that the store is given for what follows an answer, though the deadline is there
_OVERTIME_S = 1.0  # by which a local answer may miss its deadline: engines notice theirs a little late

_LONGEST_NAME = 63  # of a task

_log = secrets.logger("apprentice")

# What the counters say of an answer, by the reason of its plan: of one that the local model gave,
_LOCAL_OUTCOMES = {
    Reason.BUDGET_EXHAUSTED: "budget",
    Reason.REMOTE_DOWN: "degraded",
    Reason.STORE_DOWN: "degraded",
}
# and of one that the remote gave.
_REMOTE_OUTCOMES = {
    Reason.SHADOWING: "shadow",
    Reason.NOTHING_CERTIFIED: "shadow",
    Reason.SPOT_CHECK: "spot_check",
    Reason.TRUSTED: "deferred",
}

# What an operator hears where the remote brought no answer, by what it raised instead.
_ALERTS: tuple[tuple[type[Exception], EventKind], ...] = (
    (BudgetExceeded, EventKind.BUDGET_EXHAUSTED),
    (StoreError, EventKind.STORE_UNAVAILABLE),
    (OutputError, EventKind.REMOTE_ANSWER_UNUSABLE),
    (RemoteRefused, EventKind.REMOTE_REFUSED),
    (RemoteUnavailable, EventKind.REMOTE_UNAVAILABLE),
    (Exception, EventKind.REMOTE_FAILED),
)


@dataclass(frozen=True, slots=True)
class TaskHealth:
    """Where one task stands in this process. ``serving`` is what answers here, ``champion`` what should.

    ``phase`` is that of the version that answers, of the champion while none does.
    """

    phase: int
    champion: str | None
    serving: str | None


@dataclass(frozen=True, slots=True)
class Health:
    """What a process knows of itself. ``store_away_s``: for how long the store has not been reached; None if it is."""

    tasks: dict[str, TaskHealth]
    store_away_s: float | None


class Router:
    """Walks requests along the path. Holds no state that matters: any number may share one store."""

    def __init__(
        self,
        settings: Settings,
        *,
        store: Store,
        budget: Budget,
        teacher: Teacher,
        switch: Switch,
        judge: Judge,
        tally: Tally,
        backlog: Backlog,
        alerts: Events,
        asking_again: AskingAgain,
        clock: Callable[[], float],
        draw: random.Random,
    ) -> None:
        self._settings = settings
        self._store = store
        self._budget = budget
        self._teacher = teacher
        self._switch = switch
        self._judge = judge
        self._tally = tally
        self._backlog = backlog
        self._alerts = alerts
        self._asking_again = asking_again
        self._clock = clock
        self._draw = draw
        self._snapshot = Snapshot(store, clock)
        self._calls = 0
        self._ended = threading.Condition()
        self.closed = False

    def run(self, task_name: str, value: Mapping[str, Any]) -> Result:
        """Answer one request. Raises what `Apprentice.run` documents."""
        with self.call():
            task = self._task(task_name)
            return self._run(task, self._check(task, value))

    def _run(self, task: TaskSettings, value: dict[str, Any]) -> Result:
        request = self._planned(task, value)
        plan = request.plan
        if plan.local and plan.remote:
            beside = _Beside(lambda: self._ask_local(request))
            remote = _outcome(lambda: self._ask_remote(request))
            local = beside.outcome(self._settings.local.deadline_s + _OVERTIME_S)
            return self._conclude(request, remote, local)
        if plan.local:
            local = _outcome(lambda: self._ask_local(request))
            if local.value is not None and (request.accepts(local.value) or not plan.defer):
                outcome = _LOCAL_OUTCOMES.get(plan.reason, "local")
                return self._serve(request, local, local.value, outcome, unverified=float(plan.probability == 0.0))
            # A deferral, or a local model that failed: the remote answers, if it is to be had.
            return self._conclude(request, _outcome(lambda: self._ask_remote(request)), local)
        # The remote alone. Where the plan has nobody to ask, asking says best what is missing, and spends nothing.
        return self._conclude(request, _outcome(lambda: self._ask_remote(request)), None)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Round everything that uses the parts: `close` waits for it. Raises `ClientClosed`."""
        with self._ended:
            if self.closed:
                raise ClientClosed
            self._calls += 1
        try:
            yield
        finally:
            with self._ended:
                self._calls -= 1
                self._ended.notify_all()

    def close(self) -> None:
        """Take no more calls, and wait for those under way; each has its deadline."""
        longest_s = self._settings.local.deadline_s + self._settings.remote.deadline_s + RECORD_S
        with self._ended:
            self.closed = True
            if not self._ended.wait_for(lambda: not self._calls, timeout=longest_s + 2 * _STORE_PATIENCE_S):
                _log.warning("closing although %d requests are still under way after their deadline", self._calls)

    def warm(self) -> None:
        """Begin to load every task's champion, in the background."""
        with self.call(), within(_STORE_PATIENCE_S):
            if self._refresh() is not None:
                return  # the first request tries again
            for task in self._settings.tasks:
                self._switch.follow(task.name, self._snapshot.of(task.name).champion)

    def health(self) -> Health:
        """What this process knows of itself. Reads one row a task, and nothing while the store is away."""
        with self.call():
            tasks = {}
            with within(_LEAST_S):
                away = self._refresh()
            for task in self._settings.tasks if self._snapshot.is_there() else ():
                known, serving = self._snapshot.of(task.name), self._switch.serving(task.name)
                phase = known.of(serving or known.champion).phase
                tasks[task.name] = TaskHealth(int(phase), known.champion, serving)
            return Health(tasks, self._snapshot.age_s() if away is not None else None)

    def wait_until_serving(self, task_name: str, timeout_s: float) -> bool:
        """Follow the task's champion and wait for it to be loaded; True at once where there is none."""
        task = self._task(task_name)
        with self.call():
            self._snapshot.read()
        champion = self._snapshot.of(task.name).champion
        self._switch.follow(task.name, champion)
        return champion is None or self._switch.wait_until_serving(task.name, champion, timeout_s)

    # ---------------------------------------------------------------- before

    def _task(self, name: str) -> TaskSettings:
        try:
            return self._settings.task(name)
        except (KeyError, TypeError):  # a name that is a list, say, can be no key
            known = ", ".join(task.name for task in self._settings.tasks)
            problem = Problem("task", f"there is no task {in_words(name)}.", f"Tasks in apprentice.yaml: {known}.")
            raise UnknownTask(str(name)[:_LONGEST_NAME], [problem]) from None

    @staticmethod
    def _check(task: TaskSettings, value: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return task.input_schema.check(value)
        except SchemaError as error:
            raise InputError(task.name, error.problems) from None

    def _planned(self, task: TaskSettings, value: dict[str, Any]) -> _Request:
        """The request with what is to be done about it."""
        deadlines = self._settings.remote.deadline_s, self._settings.local.deadline_s
        began = time.monotonic()
        with within(min(_STORE_PATIENCE_S, *deadlines)):
            away = self._refresh()
            if away is not None and not 0 <= self._snapshot.age_s() <= STORE_GRACE_S:
                raise Unavailable(f"nobody can answer task {task.name!r}: {away}", remote=away)
            known = self._snapshot.of(task.name)
            self._switch.follow(task.name, known.champion)
            # After a promotion this process may still be loading the champion, or fail to. Until that answers the old
            # version does, under its own policy, which its comparisons go on changing.
            policy = known.of(self._switch.serving(task.name) or known.champion)
            headroom = Headroom(
                remote_affordable=away is None and self._affordable(task),
                remote_healthy=self._teacher.healthy(),
                local_healthy=self._switch.healthy(task.name),
                store_there=self._snapshot.away is None,
            )
        plan = decide(policy, headroom, self._draw.random())
        # Where the local model is asked first, the remote has its time after it.
        ends = began + deadlines[0] + (deadlines[1] if plan.local and not plan.remote else 0.0)
        return _Request(uuid.uuid4().hex, task, value, known, policy.version or "", plan, self._clock(), ends)

    def _refresh(self) -> Exception | None:
        """Have policies that are new enough, or say why there are none."""
        before = self._snapshot.away
        try:
            self._snapshot.refresh()
        except Exception as error:  # noqa: BLE001  # whatever it is: the store did not say what the policy is
            if before is None:
                evidence = {"cause": str(error), "goes_on_s": STORE_GRACE_S}
                self._alerts.emit(EventKind.STORE_UNAVAILABLE, None, evidence)
        else:
            if before is not None and self._snapshot.away is None:
                self._alerts.emit(EventKind.STORE_RECOVERED)
        return self._snapshot.away

    def _affordable(self, task: TaskSettings) -> bool:
        try:
            return self._budget.headroom(task.name)
        except StoreError as error:
            self._snapshot.lost(error)
            return False

    # ---------------------------------------------------------------- asking

    def _ask_remote(self, request: _Request) -> RemoteAnswer:
        """Ask the remote and commit the example: it is paid for before the caller gets it."""
        with self._budget.account(request.task.name, request.id) as account:
            with within(self._settings.remote.deadline_s):
                answer = self._teacher.ask(request.task, request.value, account)
            self._record(request, answer, account)
        return answer

    def _record(self, request: _Request, answer: RemoteAnswer, account: Account) -> None:
        """Commit a paid answer; where the store does not take it in time, keep it, to be committed when it does."""
        example = ExampleRecord(
            id=request.id,
            task=request.task.name,
            input=request.value,
            output=copy.deepcopy(answer.output),  # it may be written later, and what the caller gets is the caller's
            provider=answer.provider,
            model=answer.model,
            created_at=self._clock(),
        )

        def record() -> None:
            account.complete(example)

        now = time.monotonic()
        ends = min(now + RECORD_S, max(request.ends, now + _LEAST_S))
        pause_s = 0.05
        while True:
            try:
                with within(ends - now):
                    return record()
            except Exception as error:  # noqa: BLE001  # the answer is there and paid for, whatever became of its record
                now = time.monotonic() + pause_s
                if now >= ends:
                    account.keep_open()
                    self._keep(request, answer, record, error)
                    return None
            time.sleep(pause_s)
            pause_s *= 2

    def _keep(self, request: _Request, answer: RemoteAnswer, record: Callable[[], None], error: Exception) -> None:
        evidence = {
            "request": request.id,
            "provider": answer.provider,
            "model": answer.model,
            "cost": str(answer.cost),
            "cause": str(error),
        }
        self._backlog.add(request.task.name, record, evidence)
        self._tally.wake()
        self._alerts.emit(EventKind.RECORD_DELAYED, request.task.name, evidence)

    def _ask_local(self, request: _Request) -> LocalAnswer:
        deadline_s = self._settings.local.deadline_s
        answer = self._switch.answer(request.task.name, request.value, deadline_s=deadline_s)
        return self._judge.rate(request.task.name, answer)

    def _watch(self, request: _Request, local: _Outcome[LocalAnswer], *, unverified: float = 0.0) -> None:
        """Let the second watch see what a version answered, once it is known what became of the answer.

        ``unverified`` is how many answers nobody can speak for because of this one; see `LocalObservation`.
        """
        task, answer = request.task.name, local.value
        if answer is None and not isinstance(local.error, OutputError):
            return
        try:
            due = self._judge.watch(
                task,
                request.version if answer is None else answer.version,
                request.value,
                confidence=0.0 if answer is None else answer.confidence,
                served=answer is not None and request.accepts(answer),
                valid=answer is not None,
                unverified=unverified,
            )
            if due:
                with within(request.left_s()):
                    self._judge.flush(task)
        except Exception as error:  # noqa: BLE001  # what is only watched must not cost the caller the answer
            self._tell(request, EventKind.WATCH_FAILED, error)

    # ---------------------------------------------------------------- after

    def _conclude(
        self, request: _Request, remote: _Outcome[RemoteAnswer], local: _Outcome[LocalAnswer] | None
    ) -> Result:
        """Settle on the answer when the remote was asked, alone or beside the local model."""
        if local is not None and local.error is not None:
            self._tally.add(request.task.name, request.version, "local_failed", self._age_s(request))
            self._watch(request, local)
            self._tell(request, EventKind.LOCAL_UNAVAILABLE, local.error)
        if remote.value is not None:
            outcome, version = "remote", request.version
            if local is not None and local.value is not None:
                self._watch(request, local)
                self._compare(request, remote.value, local.value)
                outcome, version = _REMOTE_OUTCOMES[request.plan.reason], local.value.version
            self._asking_again.note(self._answered(request, remote.value, local.value if local else None))
            self._tally.add(request.task.name, version, outcome, self._age_s(request))
            return Result(request.id, remote.value.output)
        assert remote.error is not None
        if not isinstance(remote.error, ApprenticeError):
            _log.error("asking the remote for task %s failed unforeseen", request.task.name, exc_info=remote.error)
        kind = next(kind for of, kind in _ALERTS if isinstance(remote.error, of))
        if isinstance(remote.error, BudgetExceeded) and remote.error.in_flight:
            kind = EventKind.BUDGET_HELD
        if kind is not EventKind.BUDGET_EXHAUSTED:  # which the budget tells itself, once for each cap
            self._tell(request, kind, remote.error)
        if local is not None and local.value is not None:
            outcome = "budget" if isinstance(remote.error, BudgetExceeded) else "degraded"
            # A spot check that brought no answer stands for as many answers as it was one of.
            unverified = 1.0 / request.plan.probability if request.plan.remote else 1.0
            return self._serve(request, local, local.value, outcome, unverified=unverified)
        self._tally.add(request.task.name, request.version, "failed", self._age_s(request))
        raise _final_error(request.task.name, remote.error, local.error if local else None)

    def _answered(self, request: _Request, remote: RemoteAnswer, local: LocalAnswer | None) -> Answered:
        version = local.version if local is not None else request.version
        rate = request.known.of(version).sampling_rate if request.plan.local else 1.0
        trusted = local is not None and request.accepts(local)
        return Answered(
            request.task,
            request.id,
            request.value,
            remote,
            local,
            probability=request.plan.probability if trusted else 1.0,
            sampling_rate=rate,
            at=request.at,
        )

    def _serve(
        self,
        request: _Request,
        local: _Outcome[LocalAnswer],
        answer: LocalAnswer,
        outcome: str,
        *,
        unverified: float,
    ) -> Result:
        """Return the local model's answer; ``outcome`` is what the record says of it, for the rest see `_watch`."""
        self._watch(request, local, unverified=unverified)
        if outcome == "degraded":  # that a cap is used up has been told, once, by whoever keeps it
            self._alerts.emit(EventKind.ANSWERED_LOCALLY_DEGRADED, request.task.name, {"request": request.id})
        age_s = self._age_s(request)
        self._tally.add(request.task.name, answer.version, outcome, age_s, answered_by=answer.answered_by)
        return Result(request.id, answer.output)

    def _compare(self, request: _Request, remote: RemoteAnswer, local: LocalAnswer) -> None:
        """Record the comparison and update the version's trust; its own failure must not cost the caller the answer."""
        served = request.accepts(local)
        try:
            self._judge.compare(
                request.task,
                request_id=request.id,
                local=local,
                remote=remote.output,
                probability=request.plan.probability if served else 1.0,
                sampling_rate=request.known.of(local.version).sampling_rate,
                served=served,
                at=self._clock(),
                value=request.value,
                store_s=request.left_s,
            )
        except Exception as error:  # noqa: BLE001  # see the docstring
            self._tell(request, EventKind.COMPARISON_FAILED, error)
        self._snapshot.forget()

    def _tell(self, request: _Request, kind: EventKind, error: Exception) -> None:
        """Alert somebody of what went wrong with a request; a store that is away is told of as just that."""
        if isinstance(error, StoreError):
            kind = EventKind.STORE_UNAVAILABLE
        evidence = {"request": request.id, "cause": str(error) or type(error).__name__}
        self._alerts.emit(kind, request.task.name, evidence)

    def _age_s(self, request: _Request) -> float:
        return self._clock() - request.at


@dataclass(frozen=True, slots=True)
class _Request:
    id: str
    task: TaskSettings
    value: dict[str, Any]
    known: TaskPolicy
    version: str
    """The version that served when the plan was made, "" for none; another may have come in when it is carried out."""
    plan: Plan
    at: float
    ends: float
    """When it should be over, by the monotonic clock."""

    def left_s(self) -> float:
        """How long the store may take for what is still to do."""
        return max(self.ends - time.monotonic(), _LEAST_S)

    def accepts(self, answer: LocalAnswer) -> bool:
        """Whether the version that gave the answer is trusted with one of this confidence."""
        return accepts(self.known.of(answer.version), answer.confidence)


@dataclass(frozen=True, slots=True)
class _Outcome[T]:
    """How asking one side ended: with its answer, or with the exception it raised."""

    value: T | None = None
    error: Exception | None = None


def _outcome[T](ask: Callable[[], T]) -> _Outcome[T]:
    try:
        return _Outcome(value=ask())
    except Exception as error:  # noqa: BLE001  # what it means depends on how the other side fares
        return _Outcome(error=error)


class _Beside[T]:
    """Something that is asked in a thread of its own, from the moment it is made, while the caller asks the other."""

    def __init__(self, ask: Callable[[], T]) -> None:
        self._ask = ask
        self._began = time.monotonic()
        self._result: _Outcome[T] = _Outcome()
        self._thread = threading.Thread(target=self._work, name="apprentice-local", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            self._result = _outcome(self._ask)
        except BaseException as error:  # noqa: BLE001  # SystemExit and its like: here they would end a thread unseen
            self._result = _Outcome(error=EngineUnavailable(f"the local engine raised {type(error).__name__}"))

    def outcome(self, within_s: float) -> _Outcome[T]:
        """How it ended, ``within_s`` of its beginning; what takes longer is not waited for."""
        self._thread.join(max(0.0, self._began + within_s - time.monotonic()))
        if self._thread.is_alive():
            return _Outcome(error=EngineUnavailable(f"the local engine did not answer within {within_s:g} s"))
        return self._result


def _final_error(task: str, remote: Exception, local: Exception | None) -> ApprenticeError:
    """What the caller gets when nobody answered (docs/application.md, "When something fails")."""
    if isinstance(remote, BudgetExceeded):
        return remote.beside(local)
    if isinstance(remote, RemoteRefused | OutputError):
        return remote
    side = "the store" if isinstance(remote, StoreError) else "the remote"
    said = str(remote) if isinstance(remote, ApprenticeError) else f"{type(remote).__name__}: {remote}"
    causes = f"{side}: {said}" + (f"; the local model: {local}" if local else "")
    return Unavailable(f"nobody can answer task {task!r}: {causes}", remote=remote, local=local)
