"""The ledger under SIGKILL, and what its statements cost.

    python -m benchmarks.ledger                        everything, on SQLite
    python -m benchmarks.ledger --url postgresql://... everything, there
    python -m benchmarks.ledger storm|durability|speed [--url URL]

`storm`: processes race for a cap that cannot hold all their calls, some are killed in flight, and nothing may be
overspent, lost or counted twice. `durability`: a process is killed the moment its caller has an answer, again and
again, and every answer must be in the store. The tests run both, small by default and in full with `make test-all`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import select
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from decimal import Decimal
from functools import partial

import httpx

from apprentice.errors import BudgetExceeded
from apprentice.money.budget import Budget
from apprentice.remote import Teacher
from apprentice.remote.transport import Sender
from apprentice.settings.config import BudgetSettings, RemoteSettings, TaskSettings
from apprentice.store import ExampleRecord, Settlement, Store, Usage
from apprentice.testing import FakeVendor

CAP, PRICE, WORST = Decimal("5.00"), Decimal("0.01"), Decimal("0.02")


def _example(request_id: str) -> ExampleRecord:
    return ExampleRecord(request_id, "t", {"text": "x"}, {"label": "y"}, "p", "m", 0.0)


def _budget(store: Store, owner: str = "") -> Budget:
    return Budget(store, BudgetSettings(daily=CAP), owner=owner)


# ---------------------------------------------------------------- storm


@dataclass(frozen=True, slots=True)
class StormResult:
    """What is left of a storm. Money in USD; ``peak`` is the most that was ever seen committed."""

    cap: str
    peak: str
    looks: int
    answered: int
    settled: int
    examples: int
    missing: int
    doubled: int
    killed: int
    held_by_the_dead: str
    spent: str
    usable: str
    used: str


def _storm_worker(url: str, calls: int, threads: int, pipe: int, *, dies: bool) -> None:
    """Make ``calls`` calls from ``threads`` threads at once, and write each answered one's id to ``pipe``.

    One that ``dies`` is killed at its third answer or its first refusal, with its other threads in flight. It does that
    itself: a parent that gets no turn for a while would find it gone.
    """
    owner = str(os.getpid())
    answers = itertools.count(1)
    store = Store.open(url)
    budget = _budget(store, owner)

    def call(n: int) -> None:
        request_id = f"{owner}-{n}"
        try:
            with budget.account("t", request_id) as account:
                with account.call("p", "m", WORST, wait_s=30.0) as paid:
                    paid.sent()
                    time.sleep(random.random() * 0.01)  # the vendor thinks
                    paid.settle(PRICE, Usage(10, 1))
                account.complete(_example(request_id))
        except BudgetExceeded:
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            return
        os.write(pipe, f"{request_id}\n".encode())
        if next(answers) >= 3 and dies:
            os.kill(os.getpid(), signal.SIGKILL)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(call, range(calls)))
    store.close()


@dataclass(slots=True)
class _Child:
    pid: int
    pipe: int
    heard: bytes = b""

    @property
    def answered(self) -> list[str]:
        return [line.decode() for line in self.heard.split(b"\n")[:-1]]


def _fork(work: Callable[[int], None]) -> _Child:
    """A child that does ``work`` with the writing end of a pipe. The parent must have no threads."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            work(writing)
        except BaseException:  # noqa: BLE001  # a forked child must not return into its parent's code
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writing)
    return _Child(pid, reading)


def storm(url: str, *, processes: int = 8, calls: int = 200, kills: int = 3, threads: int = 25) -> StormResult:
    """Let the processes loose on one cap, kill some in flight, and take stock. The caller must have no threads."""
    Store.open(url).close()
    children = [_fork(partial(_storm_worker, url, calls, threads, dies=n < kills)) for n in range(processes)]
    store = Store.open(url)
    budget = _budget(store)
    key = budget.windows("t")[0].key
    peak, looks, killed = Decimal(0), 0, 0
    alive = {child.pipe: child for child in children}
    while alive:
        for pipe in select.select(list(alive), [], [], 0.002)[0]:
            child = alive[pipe]
            chunk = os.read(pipe, 65536)
            child.heard += chunk
            if not chunk:
                os.close(alive.pop(pipe).pipe)
        state = store.window_states([key]).get(key)
        peak = max(peak, state.committed if state else Decimal(0))
        looks += 1
    for child in children:
        code = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"a process of the storm failed with exit code {code}")
        killed += code == -signal.SIGKILL
    answered = [child.answered for child in children]
    told = [request_id for ids in answered for request_id in ids]
    recorded = [e.id for e in store.examples("t")]
    state = store.window_states([key])[key]
    usable = CAP - state.committed
    used = Decimal(0)
    with contextlib.suppress(BudgetExceeded):
        while True:
            budget.settle(budget.reserve("t", "p", "m", PRICE, "after"), PRICE, Usage())
            used += PRICE
    result = StormResult(
        cap=str(CAP),
        peak=str(peak),
        looks=looks,
        answered=len(told),
        settled=sum(row.calls for row in store.spend() if row.state == "settled") - int(used / PRICE),
        examples=len(recorded),
        missing=len(set(told) - set(recorded)),
        doubled=len(recorded) - len(set(recorded)),
        killed=killed,
        held_by_the_dead=str(state.committed - state.spent),
        spent=str(state.spent),
        usable=str(usable),
        used=str(used),
    )
    store.close()
    return result


# ---------------------------------------------------------------- durability


@dataclass(frozen=True, slots=True)
class DurabilityResult:
    """``kills`` processes were killed right after an answer; ``missing`` of the ``answered`` are not in the store."""

    kills: int
    answered: int
    missing: int


def _answer_forever(url: str, pipe: int) -> None:
    task = TaskSettings(name="t", description="Label.", input_schema={"text": "str"}, output_schema={"label": "str"})
    vendor = FakeVendor("anthropic", lambda value: {"label": "y"})
    store = Store.open(url)
    budget = Budget(store, BudgetSettings(daily=Decimal(1000)))
    with httpx.Client(transport=vendor.transport()) as client:
        teacher = Teacher(RemoteSettings(**vendor.settings()), Sender(client).send, vendor.environ)
        for n in range(1000):
            request_id = f"{os.getpid()}-{n}"
            with budget.account("t", request_id) as account:
                teacher.ask(task, {"text": "x"}, account)
                account.complete(_example(request_id))
            os.write(pipe, f"{request_id}\n".encode())


def durability(url: str, *, kills: int) -> DurabilityResult:
    """Kill a process the moment its caller has an answer, ``kills`` times. To be run in a process without threads."""
    # What is imported late is imported here, once, and not again by every child.
    with Store.open(url) as store:
        vendor = FakeVendor("anthropic")
        Teacher(RemoteSettings(**vendor.settings()), Sender().send, vendor.environ).price_check()
    told: list[str] = []
    for n in range(kills):
        child = _fork(lambda pipe: _answer_forever(url, pipe))
        while len(child.answered) <= n % 3:
            chunk = os.read(child.pipe, 65536)
            if not chunk:
                raise RuntimeError("the process under test ended by itself")
            child.heard += chunk
        os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)
        while chunk := os.read(child.pipe, 65536):
            child.heard += chunk
        os.close(child.pipe)
        told += child.answered
    with Store.open(url) as store:
        recorded = {e.id for e in store.examples("t")}
    return DurabilityResult(kills, len(told), len(set(told) - recorded))


# ---------------------------------------------------------------- speed


def speed(url: str, calls: int = 500) -> dict[str, float]:
    """Median milliseconds of the ledger's two transactions, and of one statement by Core and by the driver."""
    from sqlalchemy import create_engine

    from apprentice.store.states import _policies

    store = Store.open(url)
    store.ensure_tasks(["t"])
    budget = Budget(store, BudgetSettings(daily=Decimal(10**6), weekly=Decimal(10**6), monthly=Decimal(10**6)))
    engine = create_engine(store._database.url)
    times: dict[str, list[float]] = {"reserve": [], "settle and example": [], "select, driver": [], "select, Core": []}

    def timed(name: str, began: float) -> None:
        times[name].append(time.perf_counter() - began)

    with engine.connect() as connection, store._database.read() as tx:
        for n in range(calls):
            began = time.perf_counter()
            held = budget.reserve("t", "p", "m", WORST, "r")
            timed("reserve", began)
            began = time.perf_counter()
            budget.complete_remote(settlements=[Settlement(held, "settled", PRICE)], example=_example(str(n)))
            timed("settle and example", began)
            began = time.perf_counter()
            tx.run(_policies).fetchall()
            timed("select, driver", began)
            began = time.perf_counter()
            connection.execute(_policies).fetchall()
            timed("select, Core", began)
            connection.rollback()
    engine.dispose()
    store.close()
    return {name: round(sorted(ts)[len(ts) // 2] * 1e3, 4) for name, ts in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ledger")
    parser.add_argument("what", nargs="?", choices=["storm", "durability", "speed"])
    parser.add_argument("--url")
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--threads", type=int, default=25)
    parser.add_argument("--kills", type=int)
    parser.add_argument("--json", action="store_true", help="one line of JSON, for tests")
    args = parser.parse_args([] if __name__ != "__main__" else None)
    with tempfile.TemporaryDirectory() as folder:
        for what in [args.what] if args.what else ["durability", "storm", "speed"]:
            url = args.url or f"sqlite:///{folder}/{what}.db"
            match what:
                case "storm":
                    figures = asdict(storm(url, calls=args.calls, threads=args.threads, kills=args.kills or 3))
                case "durability":
                    figures = asdict(durability(url, kills=args.kills or 100))
                case _:
                    figures = speed(url)
            print(json.dumps(figures) if args.json else f"{what}: {figures}")


if __name__ == "__main__":
    main()
