"""Bursts against a cap that is merely held: everybody is answered, and nobody is told that money is gone."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from apprentice import Apprentice, BudgetExceeded
from apprentice.testing import FakeEngine, FakeVendor
from tests.conftest import settings, truth


def client(tmp_path: Path, vendor: FakeVendor, slow_s: float, **more: Any) -> Apprentice:
    def slow(request: httpx.Request) -> httpx.Response:
        time.sleep(slow_s)
        return vendor.transport().handle_request(request)

    return Apprentice.from_config(
        settings(tmp_path, vendor, **more),
        http_client=httpx.Client(transport=httpx.MockTransport(slow)),
        engine=FakeEngine(lambda version, value: truth(value)),
        environ=vendor.environ,
    )


def test_a_burst_is_answered_within_its_deadline(tmp_path: Path) -> None:
    """40 requests at once over two clients; three worst cases fit in the cap, what they truly cost fits 30 times."""
    vendor = FakeVendor("anthropic", truth)
    remote = vendor.settings(deadline_s=60.0)
    clients = [client(tmp_path, vendor, 0.01, budget={"daily": "0.07"}, remote=remote) for _ in range(2)]
    try:
        with ThreadPoolExecutor(40) as pool:
            answers = list(pool.map(lambda n: clients[n % 2].run("mood", {"text": "a joy"}).output, range(40)))
        assert answers == [{"label": "joy"}] * 40
        (cap,) = clients[0].parts.budget.remaining()
        assert cap.reserved == 0
        assert 0 < cap.spent < cap.cap
        assert clients[0].parts.store.events() == []
    finally:
        for one in clients:
            one.close()


def test_a_queue_for_the_vendor_does_not_exhaust_a_cap(tmp_path: Path) -> None:
    """While one call is under way (max_concurrency: 1) twenty wait, and hold nothing: the cap has room for others."""
    vendor = FakeVendor("anthropic", truth)
    remote = vendor.settings(deadline_s=60.0, max_concurrency=1)
    most: list[int] = []
    with client(tmp_path, vendor, 0.02, budget={"daily": 1}, remote=remote) as one:
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.005):
                most.append(len(one.parts.store.open_calls()))

        watching = threading.Thread(target=watch)
        watching.start()
        with ThreadPoolExecutor(20) as pool:
            list(pool.map(lambda _: one.run("mood", {"text": "a joy"}), range(20)))
        over.set()
        watching.join()
    assert max(most) < 10  # the one, and those whose answers are being recorded


def test_who_does_not_get_a_turn_is_told_that_the_cap_is_held(tmp_path: Path) -> None:
    """The event is a warning of its own, not that the budget is exhausted."""
    vendor = FakeVendor("anthropic", truth)
    remote = vendor.settings(deadline_s=0.5)
    with client(tmp_path, vendor, 0.0, budget={"daily": "0.03"}, remote=remote) as one:
        budget = one.parts.budget
        held = budget.reserve("mood", "p", "m", budget.remaining()[0].cap, "another")
        with pytest.raises(BudgetExceeded, match="held by 1 call in flight") as caught:
            one.run("mood", {"text": "a joy"})
        assert caught.value.retry_after_s == 5
        budget.release(held)
        assert one.run("mood", {"text": "a joy"}).output == {"label": "joy"}
        one.parts.alerts.flush()
        assert {event.kind for event in one.parts.store.events()} == {"budget_held"}
