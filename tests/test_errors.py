"""Errors travel between processes whole: multiprocessing, Celery and Prefect pickle them."""

from __future__ import annotations

import concurrent.futures
import copy
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import httpx
import pytest

import flows.cancellation
import flows.lease
import flows.trainers  # noqa: F401  # for its errors: every subclass that exists is to be tried
from apprentice import errors
from apprentice.errors import (
    ApprenticeError,
    BudgetExceeded,
    ClientClosed,
    ConfigError,
    InputError,
    MissingExtra,
    OutputError,
    Problem,
    RemoteError,
    RemoteRefused,
    RemoteUnavailable,
    StoreError,
    Unavailable,
    UnknownTask,
)
from apprentice.schemas.json_values import InvalidValue, NotJson
from apprentice.schemas.schema import SchemaError

PROBLEMS = [Problem("text", "is missing.", "Give it.", 3), Problem("n", "is -1.")]


def budget_exceeded() -> BudgetExceeded:
    return BudgetExceeded(
        "task:daily",
        Decimal("2.50"),
        datetime(2026, 3, 2, tzinfo=UTC),
        spent=Decimal("2.4"),
        held=Decimal("0.05"),
        needs=Decimal("0.2"),
        in_flight=2,
        retry_after_s=3.5,
        local=errors.EngineUnavailable("it hangs"),
    )


MAKE: dict[type[ApprenticeError], Callable[[], ApprenticeError]] = {
    ConfigError: lambda: ConfigError("apprentice.yaml", PROBLEMS),
    ClientClosed: ClientClosed,
    InputError: lambda: InputError("mood", PROBLEMS),
    UnknownTask: lambda: UnknownTask("moods", PROBLEMS),
    MissingExtra: lambda: MissingExtra("a head", "head"),
    Unavailable: lambda: Unavailable(
        "nobody can answer", remote=RemoteUnavailable("openai", "slow", status=503, retry_after_s=2.0), local=OSError(5)
    ),
    BudgetExceeded: budget_exceeded,
    RemoteError: lambda: RemoteError("openai", "no", status=418),
    RemoteRefused: lambda: RemoteRefused("openai", "wrong key", status=401),
    RemoteUnavailable: lambda: RemoteUnavailable("openai", "busy", status=429, retry_after_s=60.0),
    OutputError: lambda: OutputError("mood", "openai", PROBLEMS),
}
"""How those are made that take more than a message."""


def every() -> Iterator[type[ApprenticeError]]:
    """Every class of ours, the other rooms' included."""
    waiting: list[type[ApprenticeError]] = [ApprenticeError]
    while waiting:
        cls = waiting.pop()
        yield cls
        waiting += cls.__subclasses__()


ALL = sorted({cls for cls in every() if not cls.__module__.startswith("tests")}, key=lambda cls: cls.__qualname__)


def made(cls: type[ApprenticeError]) -> ApprenticeError:
    return MAKE[cls]() if cls in MAKE else cls("what is wrong, and what to do")


def told(value: Any) -> Any:
    """What two copies of an exception have in common, those inside it included."""
    if isinstance(value, BaseException):
        inside = {name: told(one) for name, one in vars(value).items()}
        return type(value), str(value), told(list(value.args)), inside, told(value.__cause__)
    return [told(one) for one in value] if isinstance(value, list) else value


def test_none_is_left_out() -> None:
    """Every class that `apprentice.errors` names is among those tried, and the three rooms that derive from them."""
    named = {getattr(errors, name) for name in errors.__all__ if name != "Problem"}
    assert named <= set(ALL)
    assert {cls.__module__ for cls in ALL} >= {"apprentice.store.database", "flows.lease", "flows.cancellation"}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_error_survives_pickling(cls: type[ApprenticeError], protocol: int) -> None:
    """The class, the message, every attribute, the cause and the notes are those of the error that was sent."""
    sent = made(cls)
    sent.add_note("while replaying")
    sent.__cause__ = StoreError("the disk is full")
    got = pickle.loads(pickle.dumps(sent, protocol))
    assert told(got) == told(sent)
    assert got.__notes__ == ["while replaying"]
    assert got.__suppress_context__ is sent.__suppress_context__ is True
    assert told(copy.deepcopy(sent)) == told(copy.copy(sent)) == told(sent)


def test_a_foreign_cause_that_cannot_travel_is_told_of_in_words() -> None:
    """httpx's status errors do not unpickle: the error that holds one does, and still says what it was."""
    request = httpx.Request("POST", "https://vendor.example")
    foreign = httpx.HTTPStatusError("429 of a vendor", request=request, response=httpx.Response(429, request=request))
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(foreign))
    sent = Unavailable("nobody can answer", remote=foreign)
    sent.__cause__ = foreign
    got = pickle.loads(pickle.dumps(sent))
    assert (str(got), str(got.remote)) == ("nobody can answer", "HTTPStatusError: 429 of a vendor")
    assert str(got.__cause__) == "HTTPStatusError: 429 of a vendor"
    assert sent.remote is foreign, "sending it must not change what the sender holds"


@pytest.mark.parametrize("cls", [InvalidValue, NotJson, SchemaError])
def test_what_a_schema_says_survives_too(cls: type[InvalidValue]) -> None:
    """They are no errors of ours, and whoever checks values in worker processes meets them."""
    sent = cls(PROBLEMS)
    got = pickle.loads(pickle.dumps(sent))
    assert told(got) == told(sent)
    assert got.problems == PROBLEMS


def raise_it() -> None:
    raise budget_exceeded()


def test_a_process_pool_hands_the_error_over() -> None:
    """As an application meets it: the worker raises, the parent catches the same class and reads its attributes."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool, pytest.raises(BudgetExceeded) as caught:
        pool.submit(raise_it).result(timeout=120)
    got = caught.value
    assert (got.cap, got.limit, got.in_flight, got.retry_after_s) == ("task:daily", Decimal("2.50"), 2, 3.5)
    assert str(got.local) == "it hangs"
