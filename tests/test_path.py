"""The promise of the path, whatever happens at once on both sides, in the store and to the callers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import re
import sqlite3
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apprentice import ApprenticeError, AsyncApprentice, BudgetExceeded, OutputError, RemoteRefused, Unavailable
from apprentice.errors import EngineUnavailable, StoreError
from apprentice.request import router as router_module
from apprentice.store import Store
from apprentice.testing import FakeEngine, FakeVendor
from tests import conftest

REMOTE, LOCAL = {"label": "joy"}, {"label": "anger"}
FRAGILE = ("policies", "reserve", "complete_remote", "window_states", "update_state", "add_counts")


@dataclass(frozen=True)
class Asked:
    """One request of a storm: how either side fares with it, and after how many seconds its caller gives up."""

    remote: Literal["answers", "off schema", "refuses", "raises"]
    local: Literal["answers", "unavailable", "raises"]
    gives_up_s: float | None


asked = st.builds(
    Asked,
    remote=st.sampled_from(["answers", "answers", "answers", "off schema", "refuses", "raises"]),
    local=st.sampled_from(["answers", "answers", "answers", "unavailable", "raises"]),
    gives_up_s=st.sampled_from([None, None, None, 0.0, 0.005, 0.03]),
)


@dataclass
class Storm:
    """What is asked, and what became of it."""

    requests: list[Asked]
    remote_answered: list[int] = field(default_factory=list)
    local_answered: set[int] = field(default_factory=set)

    def vendor(self, value: Mapping[str, Any]) -> Mapping[str, Any]:
        n = number(value["text"])
        if self.requests[n].remote == "off schema":
            return {"label": "none of these"}
        self.remote_answered.append(n)
        return REMOTE

    def engine(self, version: Any, value: Mapping[str, Any]) -> tuple[Mapping[str, Any], float]:
        n = number(value["text"])
        match self.requests[n].local:
            case "unavailable":
                raise EngineUnavailable("not just now")
            case "raises":
                raise ValueError("what nobody foresaw")
        self.local_answered.add(n)
        return LOCAL, 0.9

    def network(self, vendor: FakeVendor) -> httpx.MockTransport:
        to_vendor = vendor.transport()

        def respond(request: httpx.Request) -> httpx.Response:
            match self.requests[number(request.content.decode())].remote:
                case "refuses":
                    return httpx.Response(401, json={"error": {"message": "no"}})
                case "raises":
                    raise ZeroDivisionError("what nobody foresaw")
            return to_vendor.handle_request(request)

        return httpx.MockTransport(respond)

    async def ask(self, client: AsyncApprentice, n: int) -> Any:
        try:
            async with asyncio.timeout(self.requests[n].gives_up_s):
                return (await client.run("mood", {"text": f"number-{n}-"})).output
        except (ApprenticeError, TimeoutError) as error:
            return error


def number(text: str) -> int:
    found = re.search(r"number-(\d+)-", text)
    assert found is not None
    return int(found[1])


async def weather(storm: Storm, folder: Path, phase: str, failures: list[bool], seed: int) -> list[Any]:
    """Ask everything at once, while the store fails as ``failures`` say; then let it be and close."""
    vendor = FakeVendor("anthropic", storm.vendor)
    client = AsyncApprentice.from_config(
        conftest.settings(folder, vendor, budget={"daily": 1000}),
        http_client=httpx.Client(transport=storm.network(vendor)),
        engine=FakeEngine(storm.engine),
        environ=vendor.environ,
        draw=random.Random(seed),
    )
    async with client:
        if phase != "collect":
            bench = conftest.Workbench(client, vendor, None)  # type: ignore[arg-type]
            await asyncio.to_thread(bench.promote, held_out=400 if phase == "serve" else 0, wait=False)
            assert await client.wait_until_serving("mood", 30)
        turn = itertools.cycle(failures)

        def fragile(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*given: Any, **named: Any) -> Any:
                if next(turn):
                    raise StoreError("the server closed the connection")
                return real(*given, **named)

            return call

        with contextlib.ExitStack() as broken:
            for name in FRAGILE:
                broken.enter_context(mock.patch.object(Store, name, fragile(getattr(Store, name))))
            results = await asyncio.gather(*(storm.ask(client, n) for n in range(len(storm.requests))))
            await asyncio.sleep(0.05)  # those whose callers gave up are under way yet
        return list(results)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    requests=st.lists(asked, min_size=1, max_size=25),
    phase=st.sampled_from(["collect", "shadow", "serve"]),
    failures=st.lists(st.booleans(), min_size=1, max_size=40),
    seed=st.integers(0, 1000),
)
def test_whatever_happens_the_best_answer_is_returned_and_every_paid_one_kept(
    requests: list[Asked], phase: str, failures: list[bool], seed: int
) -> None:
    """The caller gets the remote's answer if there was one, else the local model's if that is at hand, else an error
    that `run` documents; every paid answer is one example; and in the end nothing is held.
    """
    storm = Storm(requests)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(router_module, "RECORD_S", 0.05):
        results = asyncio.run(weather(storm, Path(folder), phase, failures, seed))
        with Store.open(f"sqlite:///{folder}/apprentice.db") as store:
            kept = sorted(number(example.input["text"]) for example in store.examples("mood"))
        with contextlib.closing(sqlite3.connect(f"{folder}/apprentice.db")) as database:
            (held,) = database.execute("SELECT count(*) FROM calls WHERE state = 'reserved'").fetchone()
            (committed,) = database.execute("SELECT sum(committed - spent) FROM cap_windows").fetchone()
    for n, result in enumerate(results):
        if isinstance(result, TimeoutError):
            continue
        if n in storm.remote_answered:
            assert result == REMOTE, (n, requests[n])
        elif n in storm.local_answered:
            assert result == LOCAL, (n, requests[n])
        else:
            assert isinstance(result, Unavailable | BudgetExceeded | RemoteRefused | OutputError), result
    assert kept == sorted(storm.remote_answered)
    assert (held, committed or 0) == (0, 0)
