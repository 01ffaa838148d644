"""How long a caller waits for a store that somebody else keeps busy."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.errors import StoreError
from apprentice.store import Store, within
from apprentice.store.database import _BUSY_TIMEOUT_S, _patience_s

LONG_S = 20.0  # far less than the 60 s that a store waits by itself, far more than was asked for


@contextmanager
def busy(url: str) -> Iterator[None]:
    """Another process, as it were, is in the middle of writing to every task's state."""
    with Store.open(url) as other, other._database.write() as tx:
        tx.run_text("UPDATE tasks SET revision = revision")
        yield


def test_waiting_ends_when_the_caller_has_no_time_left(url: str) -> None:
    """And when the other is done, all is as before."""
    with Store.open(url) as store:
        store.ensure_tasks(["a"])
        with busy(url):
            began = time.monotonic()
            with within(0.3), pytest.raises(StoreError):
                store.update_state("a", lambda state: state.change(sampling_rate=0.5))
            assert 0.25 < time.monotonic() - began < LONG_S
        with within(10.0):
            assert store.update_state("a", lambda state: state.change(sampling_rate=0.5)).sampling_rate == 0.5


def test_waiting_is_worth_it_where_the_other_is_done_in_time(url: str) -> None:
    """A busy store is no failing store."""
    with Store.open(url) as store:
        store.ensure_tasks(["a"])
        begun, end = threading.Event(), threading.Event()

        def write() -> None:
            with busy(url):
                begun.set()
                end.wait(10)

        thread = threading.Thread(target=write)
        thread.start()
        assert begun.wait(10)
        threading.Timer(0.6, end.set).start()
        with within(10.0):
            assert store.update_state("a", lambda state: state.change(sampling_rate=0.5)).sampling_rate == 0.5
        thread.join()


def test_threads_of_one_process_wait_no_longer_either(url: str) -> None:
    """One store has one writer at a time, or a few connections, and its threads queue for them."""
    with Store.open(url) as store:
        store.ensure_tasks(["a"])
        begun, end = threading.Event(), threading.Event()

        def write() -> None:
            with store._database.write() as tx:
                tx.run_text("UPDATE tasks SET revision = revision")
                begun.set()
                end.wait(30)

        thread = threading.Thread(target=write)
        thread.start()
        assert begun.wait(10)
        began = time.monotonic()
        with within(0.3), pytest.raises(StoreError):
            store.update_state("a", lambda state: state.change(sampling_rate=0.5))
        assert time.monotonic() - began < LONG_S
        end.set()
        thread.join()


@given(st.lists(st.floats(0.0, 200.0), max_size=5))
def test_of_nested_limits_the_shortest_holds(limits: list[float]) -> None:
    """And none outlives its block, or reaches another thread."""

    def nest(rest: list[float], least: float) -> None:
        assert least - 1.0 < _patience_s() <= least
        if rest:
            with within(rest[0]):
                nest(rest[1:], min(least, rest[0]))
            assert least - 1.0 < _patience_s() <= least

    nest(limits, _BUSY_TIMEOUT_S)
