"""Every error Apprentice raises on purpose.

    ApprenticeError
    ├── ConfigError            apprentice.yaml is wrong; lists every problem at once
    ├── ClientClosed           the client was closed before it was called
    ├── InputError             the caller's input does not fit the task
    │   └── UnknownTask        there is no such task
    ├── MissingExtra           an optional dependency is needed and not installed
    ├── Unavailable            neither the remote nor the local model could answer
    │   └── BudgetExceeded     a cap is reached and no local model can stand in
    ├── RemoteError            a vendor's API did not answer
    │   ├── RemoteRefused      it refused the request: retrying the same request cannot help
    │   └── RemoteUnavailable  it did not answer in time or at all: another try or vendor may
    ├── OutputError            an answer stayed outside the output schema, after its repair
    ├── LocalError             the local model did not answer
    │   ├── EngineUnavailable  its engine is down, slow, or has tripped the circuit breaker
    │   ├── EngineRefused      its engine answers, and refuses this request: a wrong key, address or setting
    │   └── VersionError       this version's files cannot be served: truncated, corrupt, of another base
    ├── EvaluatorError         an evaluator raised, or returned something that is no score
    ├── StoreError             the store cannot be opened, or was written by a newer Apprentice
    └── TrainingError          a training run cannot start or go on
        ├── LeaseLost          another worker has it now; this one's writes are refused
        └── ChosenMeanwhile    a person has chosen another champion since

Messages say what went wrong, with which value, and what to do about it. None of them holds a secret: whatever text an
error is made of is scrubbed (`apprentice.secrets`) when it is made. All of them travel between processes (pickle, which
multiprocessing, Celery and Prefect use), with their attributes, their causes and their notes.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from datetime import MAXYEAR, datetime
from decimal import Decimal
from typing import Any

from apprentice.secrets import scrub

__all__ = [
    "ApprenticeError",
    "BudgetExceeded",
    "ChosenMeanwhile",
    "ClientClosed",
    "ConfigError",
    "EngineRefused",
    "EngineUnavailable",
    "EvaluatorError",
    "InputError",
    "LeaseLost",
    "LocalError",
    "MissingExtra",
    "OutputError",
    "Problem",
    "RemoteError",
    "RemoteRefused",
    "RemoteUnavailable",
    "StoreError",
    "TrainingError",
    "Unavailable",
    "UnknownTask",
    "VersionError",
]


class ApprenticeError(Exception):
    """The root: catch it to catch everything Apprentice raises on purpose."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(scrub(argument) if isinstance(argument, str) else argument for argument in args))

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is rebuilt from `args`, which here are the message: not what the constructors of ours take. What
        # Python keeps beside the attributes, the cause, would be lost too.
        state = {name: _portable(value) for name, value in self.__dict__.items()}
        chain = _portable(self.__cause__), _portable(self.__context__), self.__suppress_context__
        return _rebuilt, (type(self), self.args, chain), state


def _rebuilt(cls: type[ApprenticeError], args: tuple[object, ...], chain: tuple[Any, Any, bool]) -> ApprenticeError:
    error = cls.__new__(cls, *args)
    error.__cause__, error.__context__, error.__suppress_context__ = chain
    return error


def _portable(value: Any) -> Any:
    """The value; an exception of somebody else that does not survive pickling as one of ours that says the same."""
    if not isinstance(value, BaseException) or isinstance(value, ApprenticeError):
        return value
    try:
        pickle.loads(pickle.dumps(value))
    except Exception:  # noqa: BLE001  # whatever a foreign class makes of it
        return ApprenticeError(f"{type(value).__name__}: {value}")
    return value


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in a document: where it stands, what it is, and the remedy."""

    path: str
    message: str
    remedy: str = ""
    line: int | None = None

    def __str__(self) -> str:
        where = f"{self.path} (line {self.line})" if self.line else self.path
        return f"{where}: {self.message}" + (f" {self.remedy}" if self.remedy else "")


class ConfigError(ApprenticeError):
    """apprentice.yaml cannot be used. ``problems`` holds every one found, in file order."""

    def __init__(self, source: str, problems: list[Problem]) -> None:
        self.source = source
        self.problems = problems
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  - {p}" for p in problems))


class ClientClosed(ApprenticeError):
    """The client was closed before it was called. Nothing was asked, recorded or spent."""

    def __init__(self) -> None:
        super().__init__("this Apprentice is closed: call it before close() or the end of its `with`, or open another")


class InputError(ApprenticeError):
    """The input does not fit the task's schema. Nothing was recorded or spent."""

    def __init__(self, task: str, problems: list[Problem]) -> None:
        self.task = task
        self.problems = problems
        super().__init__(f"input for task {task!r}: " + "; ".join(str(p) for p in problems))


class UnknownTask(InputError):
    """There is no such task in the configuration."""

    def __init__(self, task: str, problems: list[Problem]) -> None:
        super().__init__(task, problems)
        # No input is at fault, so the message does not begin with one.
        self.args = ("; ".join(f"{p.message} {p.remedy}".strip() for p in problems),)


class MissingExtra(ApprenticeError):
    """Something optional was asked for and is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        self.extra = extra
        super().__init__(f"{what} needs an extra: pip install 'apprentice-llm[{extra}]'")


class Unavailable(ApprenticeError):
    """Nobody could answer. ``remote`` and ``local`` hold the two causes, None where that side was not asked.

    ``retry_after_s`` is how long to wait before asking again, None if that is not known.
    """

    def __init__(self, message: str, *, remote: Exception | None = None, local: Exception | None = None) -> None:
        self.remote = remote
        self.local = local
        self.retry_after_s = remote.retry_after_s if isinstance(remote, RemoteUnavailable) else None
        super().__init__(message)


class BudgetExceeded(Unavailable):
    """A cap leaves no room for a call, and there is no local model to answer instead.

    ``cap`` names it ("daily", "weekly", "monthly", "total", with "task:" before it for a task's own), ``limit`` is its
    size and ``resets_at`` the moment from which it is empty again (in the year 9999 for a total cap). ``spent`` and
    ``held`` say what is in it and ``needs`` what the call may cost at most, all in USD; None where they are not known.

    ``in_flight`` is the number of calls that hold what is missing: above 0, money comes back within seconds, as soon
    as they end. ``retry_after_s`` is how long to wait before asking again, None where no waiting helps.
    """

    def __init__(
        self,
        cap: str,
        limit: Decimal,
        resets_at: datetime,
        *,
        spent: Decimal | None = None,
        held: Decimal | None = None,
        needs: Decimal | None = None,
        in_flight: int = 0,
        retry_after_s: float | None = None,
        local: Exception | None = None,
    ) -> None:
        self.cap = cap
        self.limit = limit
        self.resets_at = resets_at
        self.spent = spent
        self.held = held
        self.needs = needs
        self.in_flight = in_flight
        super().__init__(self._words(), local=local)
        self.retry_after_s = retry_after_s

    def beside(self, local: Exception | None) -> BudgetExceeded:
        """The same, with why the local model did not answer either."""
        return BudgetExceeded(
            self.cap,
            self.limit,
            self.resets_at,
            spent=self.spent,
            held=self.held,
            needs=self.needs,
            in_flight=self.in_flight,
            retry_after_s=self.retry_after_s,
            local=local,
        )

    def _words(self) -> str:
        setting = f"budget.{self.cap.removeprefix('task:')}"
        inside = ""
        if self.spent is not None and self.held is not None:
            held = f", {_plain(self.held)} held" if self.held else ""
            needs = f"; this call may cost up to {_plain(self.needs)}" if self.needs is not None else ""
            inside = f" ({_plain(self.spent)} spent{held}{needs})"
        if self.in_flight:
            calls = f"{self.in_flight} call{'s' if self.in_flight != 1 else ''} in flight"
            return (
                f"the {self.cap} budget of {self.limit} is held by {calls}{inside}, and none gave enough back in time; "
                f"try again in a few seconds, or raise {setting} in apprentice.yaml"
            )
        until = f"until {self.resets_at.isoformat()}" if self.resets_at.year < MAXYEAR else "for good"
        state = "is used up"
        if self.needs is not None and self.needs > self.limit:
            state, until = "is less than one call may cost", ""
        elif self.spent is not None and self.spent < self.limit:
            state = "leaves no room for this call"
        dead = "; what calls of dead processes hold is listed by `apprentice budget`" if self.held else ""
        return (
            f"the {self.cap} budget of {self.limit} {' '.join(filter(None, (state, until)))}{inside}; raise {setting} "
            f"in apprentice.yaml, which binds every process as soon as one starts with it, or wait{dead}"
        )


def _plain(amount: Decimal) -> str:
    return f"{amount.normalize():f}"


class RemoteError(ApprenticeError):
    """A vendor's API did not answer. ``status`` is None when no HTTP status came back."""

    def __init__(self, provider: str, message: str, *, status: int | None = None) -> None:
        self.provider = provider
        self.status = status
        super().__init__(f"{provider}{f' answered {status}' if status else ''}: {message}")


class RemoteRefused(RemoteError):
    """The vendor refuses this request (400, 401, 403, 404, 413, 422): the same request would fail again."""


class RemoteUnavailable(RemoteError):
    """The vendor did not answer in time, within every retry that the deadline allowed.

    ``retry_after_s`` is for how long it is left alone, because it asked for that or keeps failing; None if it is not.
    """

    def __init__(
        self, provider: str, message: str, *, status: int | None = None, retry_after_s: float | None = None
    ) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(provider, message, status=status)


class OutputError(ApprenticeError):
    """The remote's answer stayed outside the output schema after one repair attempt. It is not kept as an example."""

    def __init__(self, task: str, provider: str, problems: list[Problem]) -> None:
        self.task = task
        self.provider = provider
        self.problems = problems
        super().__init__(
            f"{provider}'s answer to task {task!r} does not fit its output schema: "
            + "; ".join(str(p) for p in problems)
        )


class LocalError(ApprenticeError):
    """The local model did not answer."""


class EngineUnavailable(LocalError):
    """The engine is down, hangs, or is being left alone by its circuit breaker."""


class EngineRefused(LocalError):
    """The engine answers and refuses the request (401, 403, 404, 400): a setting is wrong; waiting does not help."""


class VersionError(LocalError):
    """A version's files cannot be served; whatever was served before still is."""


class EvaluatorError(ApprenticeError):
    """An evaluator raised, or returned something that is not a number in [0, 1]. The message names it."""


class StoreError(ApprenticeError):
    """The store cannot be opened or used."""


class TrainingError(ApprenticeError):
    """A training run cannot start or go on; the message holds the remedy."""


class LeaseLost(TrainingError):
    """Another worker holds the lease now: what this one still wants to write is refused, and it stops."""


class ChosenMeanwhile(TrainingError):
    """A person has chosen a champion since: theirs stands."""
