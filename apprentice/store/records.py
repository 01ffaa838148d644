"""What the store hands out and takes in: frozen rows, no behaviour.

Times are Unix seconds, money is `Decimal` in USD, JSON columns come as plain data. `seq` numbers grow in the order in
which rows became visible, so a reader that remembers the last one misses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal

from apprentice.confidence.decision import Policy
from apprentice.confidence.phases import Phase
from apprentice.confidence.weighing import Comparison
from apprentice.events.kinds import Level

__all__ = [
    "CapChanges",
    "CapWindow",
    "Compared",
    "ComparisonRecord",
    "Completed",
    "Count",
    "EventRecord",
    "ExampleRecord",
    "HalfTotals",
    "Lease",
    "Reservation",
    "RunRecord",
    "SecondAnswer",
    "Settlement",
    "SpendRow",
    "StateChange",
    "TaskPolicy",
    "TaskState",
    "Usage",
    "VersionRecord",
    "WindowState",
]

NANO = Decimal(1_000_000_000)
"""Nano-dollars in a dollar; money is kept in whole ones."""

ASKED_AGAIN = " asked again"
"""Ends the provider's name of calls that ask the remote once more for what it has answered."""

type RunState = Literal["running", "completed", "failed", "rejected", "waits_for_review", "cancelled"]
type RunKind = Literal["train", "refit"]
type VersionStatus = Literal["candidate", "champion", "rejected", "retired", "rolled_back"]
type CapChanges = Mapping[str, tuple[Decimal | None, Decimal | None]]
"""What caps were and what they are, by ``scope|period``, in USD; None for no cap."""
type PromotedBy = Literal["gate", "person", "rollback"]


@dataclass(frozen=True, slots=True)
class ExampleRecord:
    """One validated input with the remote's validated output. ``seq`` is given by the store."""

    id: str
    task: str
    input: Mapping[str, Any]
    output: Mapping[str, Any]
    provider: str
    model: str
    created_at: float
    seq: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonRecord(Comparison):
    """A comparison with what it belongs to. ``seq`` is given by the store.

    ``answered_by`` is the half of the student that gave the local answer (see `LocalAnswer`), "" where nobody said.
    """

    task: str
    request_id: str
    version: str
    created_at: float
    answered_by: str = ""
    seq: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondAnswer:
    """What the remote said to a request that it had answered before; ``seq`` is given by the store.

    ``cause`` is "" where it was asked twice at once, else the id of the event that had stored inputs asked again, and
    ``turn`` is 2, or 3 for the arbiter's answer. ``score`` is that of the two answers; ``side``, of an arbiter, what it
    scores against the second answer less that against the first; ``chance`` what it scores against the remote's answers
    to other requests. All are None where the evaluator failed. ``local`` is the local model's answer, if it had one,
    and ``local_score`` its score against the first. ``probability`` and ``sampling_rate`` as in `Comparison`.
    """

    id: str
    task: str
    request_id: str
    first: Mapping[str, Any]
    output: Mapping[str, Any]
    provider: str
    model: str
    first_at: float
    created_at: float
    cause: str = ""
    turn: int = 2
    local: Mapping[str, Any] | None = None
    score: float | None = None
    side: float | None = None
    chance: float | None = None
    local_score: float | None = None
    probability: float = 1.0
    sampling_rate: float = 1.0
    version: str = ""
    seq: int = 0


@dataclass(frozen=True, slots=True)
class EventRecord:
    """Something an operator may want to know. ``task`` is None where it concerns all; ``seq`` is given by the store."""

    id: str
    task: str | None
    kind: str
    level: Level
    evidence: Mapping[str, Any]
    at: float
    seq: int = 0


@dataclass(frozen=True, slots=True)
class TaskPolicy:
    """What the next request of a task needs to know: the version wanted, and the policy of each that may serve."""

    task: str
    champion: str | None
    training_due: str | None
    policies: Mapping[str, Policy]

    def of(self, version: str | None) -> Policy:
        """A version's own policy. One of which the store knows nothing is shadowed; without one the remote answers."""
        if version is None:
            return Policy(Phase.COLLECT)
        return self.policies.get(version) or Policy(Phase.SHADOW, version)


@dataclass(frozen=True, slots=True)
class StateChange:
    """The new values of a version's state, and what is recorded with them. Begin with `TaskState.change`."""

    phase: int
    threshold: float | None
    sampling_rate: float
    trust: str
    training_due: str | None
    comparisons: Sequence[ComparisonRecord] = ()
    events: Sequence[EventRecord] = ()


@dataclass(frozen=True, slots=True)
class TaskState:
    """Where a version of a task stands, by default its champion; None, and phase 1, while there is none.

    ``trust`` is "" until something was learnt of the version, and ``revision`` counts its changes. ``champion`` and
    ``training_due``, the reason why training is due, or None, are the task's.
    """

    task: str
    champion: str | None
    training_due: str | None
    version: str | None
    phase: int
    threshold: float | None
    sampling_rate: float
    revision: int
    updated_at: float
    trust: str

    def change(
        self, *, comparisons: Sequence[ComparisonRecord] = (), events: Sequence[EventRecord] = (), **values: Any
    ) -> StateChange:
        """A change that keeps everything but ``values``."""
        kept: dict[str, Any] = {
            "phase": self.phase,
            "threshold": self.threshold,
            "sampling_rate": self.sampling_rate,
            "trust": self.trust,
            "training_due": self.training_due,
        }
        return StateChange(**{**kept, **values}, comparisons=comparisons, events=events)


@dataclass(frozen=True, slots=True)
class Count:
    """``n`` requests of one outcome on one day. ``day`` is a date such as "2026-03-01"; ``version`` "" for none.

    Outcomes: remote, local, budget, degraded, spot_check, shadow, deferred, failed; local_failed is beside that of the
    request itself. ``answered_by`` is taken in and not read back (`Store.halves` has it): the half of the student that
    gave these answers, "" where callers got the remote's.
    """

    task: str
    day: str
    version: str
    outcome: str
    n: int = 1
    latency_s: float = 0.0
    answered_by: str = ""


@dataclass(frozen=True, slots=True)
class HalfTotals:
    """What one half of a student did for a task; see `AnsweredBy`, and "" for answers of which nobody said.

    ``answers`` of it reached callers. Where the remote answered as well: ``checks`` compares what it was trusted with
    (without the spot check the caller would have got it), ``compared`` everything.
    """

    task: str
    answered_by: str
    answers: int
    checks: Compared
    compared: Compared


@dataclass(frozen=True, slots=True)
class Compared:
    """``n`` scored comparisons, and their agreement as the traffic has it: each weighs 1 / p, with p the probability
    with which it was bought. None of none. ``effective`` is how many equally weighted ones say as much (Kish 1965).
    """

    n: int = 0
    agreement: float | None = None
    effective: float = 0.0


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """A trained version of a task's local model. ``name`` is the content hash of its adapter folder."""

    name: str
    task: str
    status: VersionStatus
    adapter: str
    base_model: str
    trained_on: int
    held_out: int
    data_digest: str
    mlflow_version: str | None
    reason: str
    record: Mapping[str, Any] = field(default_factory=dict)
    created_at: float = 0.0
    remote_model: str | None = None


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A training run. ``data_high_water`` is the last example's ``seq`` that it may have read.

    ``kind``: "train" teaches the base model a new adapter, "refit" fits the student's head anew and keeps the adapter.
    ``promotions_seen`` is the ``seq`` of the task's last promotion when it began: the gate does not overrule what a
    person has decided since.
    """

    id: str
    task: str
    state: RunState
    step: str
    reason: str
    data_high_water: int
    corpus_size: int
    data_digest: str
    version: str | None
    attempts: int
    error: str
    started_at: float
    finished_at: float | None
    promotions_seen: int = 0
    kind: RunKind = "train"


@dataclass(frozen=True, slots=True)
class PromotionRecord:
    """A change of champion: which version, instead of which, what its status was before, and who wanted it and why.

    ``how`` is "gate", "person", or "rollback": a person went back to it because the version before was no good.
    """

    task: str
    version: str
    previous: str | None
    was: VersionStatus
    how: PromotedBy
    by: str
    reason: str
    at: float
    seq: int = 0


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to do something alone until ``expires_at``. ``token`` grows with every owner: a fence."""

    name: str
    owner: str
    token: int
    expires_at: float


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one remote call. ``input`` includes cached and cache-writing tokens, ``output`` includes reasoning."""

    input: int = 0
    output: int = 0
    cached: int = 0
    cache_write: int = 0
    reasoning: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input + other.input,
            self.output + other.output,
            self.cached + other.cached,
            self.cache_write + other.cache_write,
            self.reasoning + other.reasoning,
        )


@dataclass(frozen=True, slots=True)
class CapWindow:
    """One cap in one period: ``key`` names it, ``scope`` is "" or a task; a cap left out has no window."""

    key: str
    scope: str
    period: str
    start: str
    cap: Decimal


@dataclass(frozen=True, slots=True)
class Reservation:
    """The worst-case price of a call, held in every window until the call is settled, released or lost.

    ``owner`` names the process that makes the call, as `apprentice.money.owner` does.
    """

    id: int
    task: str
    provider: str
    model: str
    request_id: str
    worst_case: Decimal
    windows: tuple[CapWindow, ...]
    created_at: float
    owner: str = ""

    def numbered(self, number: int) -> Reservation:
        """The same under its number. On the path of every request, so not by `dataclasses.replace`, which is slow."""
        return Reservation(
            number,
            self.task,
            self.provider,
            self.model,
            self.request_id,
            self.worst_case,
            self.windows,
            self.created_at,
            self.owner,
        )


@dataclass(frozen=True, slots=True)
class Settlement:
    """How a reserved call ended: ``settled`` at its price, ``released`` unbilled, ``lost`` and counted as spent.

    Raises `ValueError` for a cost that is negative or no number: it would lift a cap.
    """

    reservation: Reservation
    state: Literal["settled", "released", "lost"]
    cost: Decimal
    usage: Usage = Usage()

    def __post_init__(self) -> None:
        if not (self.cost.is_finite() and self.cost >= 0):
            raise ValueError(f"a call cannot cost {self.cost}")


@dataclass(frozen=True, slots=True)
class WindowState:
    """What a cap's window holds: ``spent`` for sure, and ``committed``, which adds the calls in flight.

    In whole nano-dollars, as they are kept; few look at them, and those who do want `Decimal` in USD.
    """

    key: str
    spent_nano: int
    committed_nano: int

    @property
    def spent(self) -> Decimal:
        return Decimal(self.spent_nano) / NANO

    @property
    def committed(self) -> Decimal:
        return Decimal(self.committed_nano) / NANO


@dataclass(frozen=True, slots=True)
class Completed:
    """What recording a remote answer came to.

    ``state`` is the task's new one, where it changed; ``windows`` are, for each settlement, its cap windows after it,
    or None where it had ended before.
    """

    state: TaskState | None
    windows: list[list[WindowState] | None]


@dataclass(frozen=True, slots=True)
class SpendRow:
    """Calls of one task, day, provider and model that ended in the same way, and what was spent on them.

    ``state`` is settled (``cost`` is the bill), lost (it may have been billed: ``cost`` is the worst case) or released
    (nothing was billed). A vendor's training is a call too, its provider is named "... training"; so is an answer of a
    local model that a vendor hosts, "... hosted", and one that no caller gets, because the remote was asked again, "...
    asked again".
    """

    task: str
    day: str
    provider: str
    model: str
    state: str
    calls: int
    cost: Decimal
    usage: Usage

    @property
    def is_answering(self) -> bool:
        """Whether these calls were made for the remote's answers, which are what local answers save."""
        return not self.provider.endswith((" training", " hosted", ASKED_AGAIN))

    @property
    def is_asked_again(self) -> bool:
        """Whether these calls asked the remote again for what it had answered, to learn how steady it is."""
        return self.provider.endswith(ASKED_AGAIN)

    @property
    def is_hosted(self) -> bool:
        """Whether these calls brought answers of a local model that a vendor hosts: they are what it costs."""
        return self.provider.endswith(" hosted")


@dataclass(frozen=True, slots=True)
class Held:
    """What a task's calls that have not ended hold at most: not spent, and not free for others."""

    task: str
    calls: int
    amount: Decimal
    oldest_at: float


@dataclass(frozen=True, slots=True)
class ExampleTotals:
    """How many examples a task has now, and how many remote answers it ever got."""

    kept: int
    ever: int
