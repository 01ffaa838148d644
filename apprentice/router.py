"""The path of a request (DESIGN section 4), from the input to the answer, in the caller's thread.

`Router.run` asks the store for the task's policy, lets `decide` make the plan, carries it out, returns the remote's
answer whenever there is one and the local model's otherwise, and records what it learned: an example for every remote
answer, a comparison wherever both answered. It decides nothing itself. Where both are asked at once, a second thread
asks the local model.
"""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from apprentice.alerts import Alerts
from apprentice.budget import Budget
from apprentice.config import Settings, TaskSettings
from apprentice.decision import Headroom, Plan, Policy, Reason, accepts, decide
from apprentice.errors import (
    ApprenticeError,
    BudgetExceeded,
    EngineUnavailable,
    InputError,
    OutputError,
    Problem,
    RemoteRefused,
    Unavailable,
    UnknownTask,
)
from apprentice.judge import Judge
from apprentice.local.engine import LocalAnswer
from apprentice.local.switch import Switch
from apprentice.phases import Phase
from apprentice.remote import RemoteAnswer, Teacher
from apprentice.result import Result
from apprentice.schema import SchemaError
from apprentice.store import Store
from apprentice.store.records import ExampleRecord, PolicyRow
from apprentice.tally import Tally

__all__ = ["Router"]

# How old a policy snapshot may be. A promotion by another process is followed within this time.
SNAPSHOT_S = 1.0

# What the counters say of an answer, by the reason of its plan: of one that the local model gave,
_LOCAL_OUTCOMES = {Reason.BUDGET_EXHAUSTED: "budget", Reason.REMOTE_DOWN: "degraded"}
# and of one that the remote gave.
_REMOTE_OUTCOMES = {
    Reason.SHADOWING: "shadow",
    Reason.NOTHING_CERTIFIED: "shadow",
    Reason.SPOT_CHECK: "spot_check",
    Reason.TRUSTED: "deferred",
}


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
        alerts: Alerts,
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
        self._alerts = alerts
        self._clock = clock
        self._draw = draw
        self._snapshot = Snapshot(store, clock)
        self._in_force: dict[str, PolicyRow] = {}

    def run(self, task_name: str, value: Mapping[str, Any]) -> Result:
        """Answer one request. Raises what `Apprentice.run` documents."""
        task = self._task(task_name)
        checked = self._check(task, value)
        state = self._policy(task)
        headroom = Headroom(
            remote_affordable=self._budget.headroom(task.name),
            remote_healthy=self._teacher.healthy(),
            local_healthy=self._switch.healthy(task.name) and self._switch.serving(task.name) == state.champion,
        )
        policy = Policy(
            phase=Phase(state.phase),
            champion=state.champion,
            threshold=state.threshold,
            sampling_rate=state.sampling_rate,
        )
        plan = decide(policy, headroom, self._draw.random())
        request = _Request(uuid.uuid4().hex, task, checked, state, policy, plan, self._clock())
        if plan.local and plan.remote:
            beside = _Beside(lambda: self._ask_local(request))
            remote = _outcome(lambda: self._ask_remote(request))
            return self._conclude(request, remote, beside.outcome())
        if plan.local:
            local = _outcome(lambda: self._ask_local(request))
            if local.value is not None and not (plan.defer and not accepts(policy, local.value.confidence)):
                return self._serve(request, local.value, _LOCAL_OUTCOMES.get(plan.reason, "local"))
            # A deferral, or a local model that failed: the remote answers, if it is to be had.
            return self._conclude(request, _outcome(lambda: self._ask_remote(request)), local)
        # The remote alone. Where the plan has nobody to ask, asking says best what is missing, and spends nothing.
        return self._conclude(request, _outcome(lambda: self._ask_remote(request)), None)

    def wait_until_serving(self, task_name: str, timeout_s: float) -> bool:
        """Follow the task's champion and wait for it to be loaded; True at once where there is none."""
        task = self._task(task_name)
        self._snapshot.read()
        champion = self._snapshot.of(task.name).champion
        self._switch.follow(task.name, champion)
        return champion is None or self._switch.wait_until_serving(task.name, champion, timeout_s)

    # ---------------------------------------------------------------- before

    def _task(self, name: str) -> TaskSettings:
        try:
            return self._settings.task(name)
        except KeyError:
            known = ", ".join(task.name for task in self._settings.tasks)
            problem = Problem("task", f"there is no task {name!r}.", f"Tasks in apprentice.yaml: {known}.")
            raise UnknownTask(name, [problem]) from None

    @staticmethod
    def _check(task: TaskSettings, value: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return task.input_schema.check(value)
        except SchemaError as error:
            raise InputError(task.name, error.problems) from None

    def _policy(self, task: TaskSettings) -> PolicyRow:
        """The task's policy in force.

        After a promotion the store's policy speaks of the new champion while this process may still be loading it.
        Until it answers, the old version goes on under the policy that was made for it.
        """
        if self._snapshot.is_stale():
            self._snapshot.read()
        state = self._snapshot.of(task.name)
        self._switch.follow(task.name, state.champion)
        serving = self._switch.serving(task.name)
        before = self._in_force.get(task.name)
        if before is not None and serving != state.champion and serving == before.champion is not None:
            return before
        self._in_force[task.name] = state
        return state

    # ---------------------------------------------------------------- asking

    def _ask_remote(self, request: _Request) -> RemoteAnswer:
        """Ask the remote and commit the example: it is paid for before the caller gets it."""
        answer = self._teacher.ask(request.task, request.value, request.id)
        example = ExampleRecord(
            id=request.id,
            task=request.task.name,
            input=request.value,
            output=answer.output,
            provider=answer.provider,
            model=answer.model,
            created_at=self._clock(),
        )
        self._budget.complete_remote(settlements=answer.settlements, example=example, hold_next=True)
        return answer

    def _ask_local(self, request: _Request) -> LocalAnswer:
        deadline_s = self._settings.local.deadline_s
        try:
            answer = self._switch.answer(request.task.name, request.value, deadline_s=deadline_s)
        except OutputError:
            self._watch(request, confidence=0.0, served=False, valid=False)
            raise
        if answer.version != request.state.champion:
            raise EngineUnavailable(f"version {answer.version} answered while {request.state.champion} is in force")
        answer = self._judge.rate(request.task.name, answer)
        served = accepts(request.policy, answer.confidence)
        self._watch(request, confidence=answer.confidence, served=served)
        return answer

    def _watch(self, request: _Request, *, confidence: float, served: bool, valid: bool = True) -> None:
        """Let the second watch see what the champion answered."""
        task = request.task.name
        if self._judge.watch(task, request.champion, request.value, confidence=confidence, served=served, valid=valid):
            self._judge.flush(task)

    # ---------------------------------------------------------------- after

    def _conclude(
        self, request: _Request, remote: _Outcome[RemoteAnswer], local: _Outcome[LocalAnswer] | None
    ) -> Result:
        """Settle on the answer when the remote was asked, alone or beside the local model."""
        if local is not None and local.error is not None:
            self._tally.add(request.task.name, request.champion, "local_failed", self._age_s(request))
            self._alerts("local_unavailable", request.task.name, {"cause": str(local.error)})
        if remote.value is not None:
            outcome = "remote"
            if local is not None and local.value is not None:
                self._compare(request, remote.value, local.value)
                outcome = _REMOTE_OUTCOMES[request.plan.reason]
            self._tally.add(request.task.name, request.champion, outcome, self._age_s(request))
            return Result(request.id, remote.value.output)
        assert remote.error is not None
        if not isinstance(remote.error, ApprenticeError):
            raise remote.error
        budget = isinstance(remote.error, BudgetExceeded)
        kind = "budget_exhausted" if budget else "remote_unavailable"
        self._alerts(kind, request.task.name, {"cause": str(remote.error)}, "critical")
        if local is not None and local.value is not None:
            return self._serve(request, local.value, "budget" if budget else "degraded")
        self._tally.add(request.task.name, request.champion, "failed", self._age_s(request))
        raise _final_error(request.task.name, remote.error, local.error if local else None)

    def _serve(self, request: _Request, answer: LocalAnswer, outcome: str) -> Result:
        """Return the local model's answer; ``outcome`` is what the record says of it."""
        if outcome != "local":
            self._alerts(f"answered_locally_{outcome}", request.task.name, {"request": request.id})
        self._tally.add(request.task.name, request.champion, outcome, self._age_s(request))
        return Result(request.id, answer.output)

    def _compare(self, request: _Request, remote: RemoteAnswer, local: LocalAnswer) -> None:
        """Record the comparison and update the task's trust; its own failure must not cost the caller the answer."""
        served = accepts(request.policy, local.confidence)
        try:
            self._judge.compare(
                request.task,
                request_id=request.id,
                local=local,
                remote=remote.output,
                probability=request.plan.probability if served else 1.0,
                sampling_rate=request.policy.sampling_rate,
                served=served,
                at=self._clock(),
            )
        except ApprenticeError as error:
            self._alerts("comparison_failed", request.task.name, {"request": request.id, "cause": str(error)})
        self._snapshot.forget()

    def _age_s(self, request: _Request) -> float:
        return self._clock() - request.at


@dataclass(frozen=True, slots=True)
class _Request:
    id: str
    task: TaskSettings
    value: dict[str, Any]
    state: PolicyRow
    policy: Policy
    plan: Plan
    at: float

    @property
    def champion(self) -> str:
        return self.state.champion or ""


class Snapshot:
    """Every task's policy as of at most `SNAPSHOT_S` ago, in one cheap query for all of them."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._states: dict[str, PolicyRow] = {}
        self._read_at = float("-inf")

    def is_stale(self) -> bool:
        """Whether it should be read again: it is old, was forgotten, or the clock went back."""
        return not 0 <= self._clock() - self._read_at < SNAPSHOT_S

    def read(self) -> None:
        """Read it. Concurrent readers do no harm: each brings a snapshot that is new enough."""
        at = self._clock()
        self._states = self._store.policies()
        self._read_at = at

    def of(self, task: str) -> PolicyRow:
        """The task's policy as last read."""
        return self._states[task]

    def forget(self) -> None:
        """Something has just changed in this process: the next request reads again."""
        self._read_at = float("-inf")


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
        self._result: _Outcome[T] = _Outcome()
        self._thread = threading.Thread(target=self._work, name="apprentice-local", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        self._result = _outcome(self._ask)

    def outcome(self) -> _Outcome[T]:
        """Wait for it to end."""
        self._thread.join()
        return self._result


def _final_error(task: str, remote: ApprenticeError, local: Exception | None) -> ApprenticeError:
    """What the caller gets when nobody answered (the table in DESIGN section 4)."""
    if isinstance(remote, BudgetExceeded):
        return BudgetExceeded(remote.cap, remote.limit, remote.resets_at, local=local)
    if isinstance(remote, RemoteRefused | OutputError):
        return remote
    causes = f"the remote: {remote}" + (f"; the local model: {local}" if local else "")
    return Unavailable(f"nobody can answer task {task!r}: {causes}", remote=remote, local=local)
