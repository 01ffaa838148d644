"""The clients' lives: threads, event loops, forks, cancelled callers, closing, and ending without it."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from apprentice import Apprentice, AsyncApprentice, ClientClosed, ConfigError, StoreError
from apprentice.assembly import check_remote
from apprentice.money.budget import Budget
from apprentice.request.judge import Judge
from apprentice.request.snapshot import SNAPSHOT_S
from apprentice.store import Store
from apprentice.testing import FakeEngine, FakeVendor, Fault
from tests.conftest import Workbench, settings, truth

Bench = Callable[..., Workbench]

LOOP_GAP_S = 0.6
"""The event loop is asked to stand still for no more than 50 ms; a loaded machine may take its processor for longer."""


def open_async(tmp_path: Path, vendor: FakeVendor, **more: Any) -> AsyncApprentice:
    engine = more.pop("engine", None) or FakeEngine(lambda version, value: truth(value))
    return AsyncApprentice.from_config(
        settings(tmp_path, vendor, **more),
        http_client=httpx.Client(transport=vendor.transport()),
        engine=engine,
        environ=vendor.environ,
    )


def two_tasks() -> list[dict[str, Any]]:
    task = {
        "description": "Name it.",
        "input_schema": {"text": "str"},
        "output_schema": {"label": "joy | fear | anger"},
    }
    return [{"name": "mood", **task}, {"name": "tone", **task}]


async def longest_gap_s(work: Any) -> float:
    """The longest time for which the event loop stood still while ``work`` was awaited."""
    longest, last = 0.0, time.monotonic()
    done = asyncio.ensure_future(work)
    while not done.done():
        await asyncio.sleep(0.005)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    await done
    return longest


# ---------------------------------------------------------------- event loops


@pytest.mark.parametrize("slow", ["headroom", "policies", "complete_remote", "add_event_unless_recent", "add_counts"])
def test_a_slow_store_does_not_stop_the_event_loop(slow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that takes two seconds delays the request that waits for it, and nothing else on the loop."""
    of = Budget if slow == "headroom" else Store
    real, called = getattr(of, slow), threading.Event()

    def slowly(*given: Any, **named: Any) -> Any:
        called.set()
        time.sleep(2.0)
        return real(*given, **named)

    async def main() -> float:
        vendor = FakeVendor("anthropic", truth, faults=[Fault("unauthorized")])
        async with open_async(tmp_path, vendor) as client:
            client.parts.router._snapshot.forget()
            monkeypatch.setattr(of, slow, slowly)
            calls = [client.run("mood", {"text": "a fear"}) for _ in range(3)]
            gap_s = await longest_gap_s(asyncio.gather(*calls, client.health(), return_exceptions=True))
            while not called.is_set():  # what is written in the background
                gap_s = max(gap_s, await longest_gap_s(asyncio.sleep(0.1)))
            return gap_s

    assert asyncio.run(main()) < LOOP_GAP_S


def slow_evaluator(local: dict[str, Any], remote: dict[str, Any]) -> float:
    time.sleep(1.0)
    return float(local == remote)


def test_a_slow_evaluator_does_not_stop_the_event_loop(tmp_path: Path) -> None:
    """Nor do `status` and waiting for a version, which read the store."""
    task = {**two_tasks()[0], "evaluator": "custom", "evaluator_function": "tests.test_client:slow_evaluator"}

    async def main() -> float:
        async with open_async(tmp_path, FakeVendor("anthropic", truth), tasks=[task]) as client:
            bench = Workbench(client, None, None)  # type: ignore[arg-type]
            await asyncio.to_thread(bench.add_version, "mood-v1")
            client.parts.judge.promote("mood", "mood-v1", [], reason="test")
            assert await client.wait_until_serving("mood", 10)
            work = asyncio.gather(
                client.run("mood", {"text": "a fear"}), client.run("mood", {"text": "a joy"}), client.status()
            )
            return await longest_gap_s(work)

    assert asyncio.run(main()) < LOOP_GAP_S


def test_one_client_works_in_one_event_loop_after_another(tmp_path: Path) -> None:
    """Celery, notebooks and tests call `asyncio.run` again and again."""
    vendor = FakeVendor("anthropic", truth)
    client = open_async(tmp_path, vendor)
    for i in range(4):
        assert asyncio.run(client.run("mood", {"text": f"a fear {i}"})).output == {"label": "fear"}
    assert asyncio.run(client.status())["mood"].examples == vendor.asked == 4
    asyncio.run(client.aclose())


def test_one_client_works_in_two_event_loops_at_once(tmp_path: Path) -> None:
    """It belongs to neither."""
    client = open_async(tmp_path, FakeVendor("anthropic", truth))

    async def several() -> int:
        return len(await asyncio.gather(*(client.run("mood", {"text": f"joy {i}"}) for i in range(10))))

    done: list[int] = []
    threads = [threading.Thread(target=lambda: done.append(asyncio.run(several()))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [10, 10]
    asyncio.run(client.aclose())


def test_a_hung_engine_of_one_task_does_not_hold_up_another(tmp_path: Path) -> None:
    """However many requests wait for it."""
    release = threading.Event()

    def answer(version: Any, value: Any) -> dict[str, Any]:
        release.wait(20)
        return truth(value)

    async def main() -> float:
        client = open_async(tmp_path, FakeVendor("anthropic", truth), tasks=two_tasks(), engine=FakeEngine(answer))
        async with client:
            bench = Workbench(client, None, None)  # type: ignore[arg-type]
            bench.add_version("mood-v1")
            client.parts.judge.promote("mood", "mood-v1", [], reason="test")
            assert await client.wait_until_serving("mood", 10)
            hung = [asyncio.ensure_future(client.run("mood", {"text": f"joy {i}"})) for i in range(100)]
            await asyncio.sleep(0.2)
            began = time.monotonic()
            assert (await client.run("tone", {"text": "a fear"})).output == {"label": "fear"}
            took = time.monotonic() - began
            release.set()
            assert len(await asyncio.gather(*hung)) == 100
            return took

    assert asyncio.run(main()) < 5.0  # local.deadline_s is 10


# ---------------------------------------------------------------- cancelled callers


@pytest.mark.parametrize("slow", ["reserve", "complete_remote"])
def test_what_a_cancelled_caller_has_begun_is_seen_to_its_end(
    slow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the store was slow: each answer asked for is paid, kept and settled, and nothing stays held."""
    real = getattr(Store, slow)

    def slowly(*given: Any, **named: Any) -> Any:
        time.sleep(0.1)
        return real(*given, **named)

    monkeypatch.setattr(Store, slow, slowly)
    vendor = FakeVendor("anthropic", truth)

    cancelled = 0

    async def main() -> None:
        nonlocal cancelled
        async with open_async(tmp_path, vendor, budget={"daily": 10}) as client:
            for i in range(12):
                try:
                    async with asyncio.timeout(0.01 * (i % 3)):
                        await client.run("mood", {"text": f"joy {i}"})
                except TimeoutError:
                    cancelled += 1

    asyncio.run(main())
    assert cancelled >= 4
    with Store.open(f"sqlite:///{tmp_path}/apprentice.db") as store:
        assert store.count_examples("mood") == vendor.asked > 0
        assert {row.state for row in store.spend()} == {"settled"}
        assert sum(row.calls for row in store.spend()) == vendor.asked


def test_aclose_sees_requests_to_their_end(tmp_path: Path) -> None:
    """Those that wait for a thread too."""
    vendor = FakeVendor("anthropic", truth)

    async def main() -> None:
        client = open_async(tmp_path, vendor)
        running = [asyncio.ensure_future(client.run("mood", {"text": f"joy {i}"})) for i in range(80)]
        await asyncio.sleep(0)
        await client.aclose()
        assert [r.output for r in await asyncio.gather(*running)] == [{"label": "joy"}] * 80
        with pytest.raises(ClientClosed):
            await client.run("mood", {"text": "joy"})

    asyncio.run(main())


# ---------------------------------------------------------------- closing


def test_a_closed_client_says_so_and_alerts_nobody(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """It is the caller's mistake: no vendor is down, and nothing is logged."""
    at = bench()
    at.run()
    at.client.close()
    at.client.close()
    for call in (lambda: at.run(), lambda: at.client.status(), lambda: at.client.wait_until_serving("mood")):
        with pytest.raises(ClientClosed, match="closed"):
            call()
    assert caplog.text == ""


def test_close_waits_for_requests_under_way(bench: Bench) -> None:
    """What another thread has asked for is answered and recorded first."""
    at = bench()
    asked, go_on = threading.Event(), threading.Event()
    answers: list[Any] = []

    def patiently(value: Any) -> dict[str, Any]:
        asked.set()
        go_on.wait(20)
        return truth(value)

    at.vendor._answer = patiently
    caller = threading.Thread(target=lambda: answers.append(at.run("a fear")))
    caller.start()
    assert asked.wait(10)
    closer = threading.Thread(target=at.client.close)
    closer.start()
    time.sleep(0.1)
    assert closer.is_alive()
    go_on.set()
    closer.join(20)
    caller.join(20)
    assert answers == [{"label": "fear"}]
    with Store.open(at.client.settings.store_url) as store:
        assert store.count_examples("mood") == 1


@pytest.mark.parametrize("broken", ["switch", "judge", "tally", "backlog", "engine", "alerts"])
def test_whatever_fails_at_close_the_rest_is_released(
    broken: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge that cannot write leaves no engine running, no money held and no store open; then its error is raised."""
    at = bench()
    at.run()
    parts = at.client.parts
    closed: list[str] = []
    for name in ("switch", "judge", "tally", "backlog", "engine", "alerts", "sender", "store"):
        kind = type(getattr(parts, name))

        def close(self: Any, name: str = name, real: Any = kind.close) -> None:
            closed.append(name)
            real(self)
            if name == broken:
                raise StoreError("the disk is full")

        monkeypatch.setattr(kind, "close", close)
    with pytest.raises(StoreError, match="disk is full"):
        at.client.close()
    assert sorted(closed) == sorted(["switch", "judge", "tally", "backlog", "engine", "alerts", "sender", "store"])


def test_what_was_opened_before_the_start_failed_is_closed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing key or an evaluator that cannot be built leaves no store open behind its error."""
    opened: list[Store] = []
    closed: list[Store] = []
    real_open, real_close = Store.open, Store.close
    monkeypatch.setattr(Store, "open", lambda *a, **k: opened.append(real_open(*a, **k)) or opened[-1])
    monkeypatch.setattr(Store, "close", lambda self: (closed.append(self), real_close(self)))
    with pytest.raises(ConfigError, match="FAKE_ANTHROPIC_KEY"):
        Apprentice.from_config(settings(tmp_path, FakeVendor("anthropic")), environ={})

    def broken(*_: Any) -> None:
        raise ConfigError("apprentice.yaml", [])

    monkeypatch.setattr(Judge, "__init__", broken)
    vendor = FakeVendor("anthropic")
    with pytest.raises(ConfigError):
        Apprentice.from_config(settings(tmp_path, vendor), environ=vendor.environ)
    assert opened == closed


def test_one_task_that_cannot_be_written_does_not_keep_the_others_from_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At close every task's observations are handed over, each for itself."""
    at = bench(tasks=two_tasks())
    flushed = []

    def flush(task: str) -> None:
        flushed.append(task)
        raise StoreError(task)

    monkeypatch.setattr(at.client.parts.judge, "flush", flush)
    with pytest.raises(StoreError):
        at.client.close()
    assert sorted(flushed) == ["mood", "tone"]


# ---------------------------------------------------------------- ending without it


def threads_and_files() -> tuple[int, int]:
    gc.collect()
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files by /proc")
def test_clients_that_nobody_closes_are_closed_when_collected(tmp_path: Path) -> None:
    """A notebook's cell that is run again and again leaves neither threads nor open files."""

    def use(n: int) -> None:
        vendor = FakeVendor("anthropic", truth)
        client = Apprentice.from_config(
            settings(tmp_path, vendor, store=f"sqlite:///{tmp_path}/{n}.db"),
            http_client=httpx.Client(transport=vendor.transport()),
            environ=vendor.environ,
        )
        client.run("mood", {"text": "a joy"})

    use(0)
    before = threads_and_files()
    for n in range(1, 9):
        use(n)
    ends = time.monotonic() + 30
    while threads_and_files() > before and time.monotonic() < ends:
        time.sleep(0.05)
    threads, files = threads_and_files()
    assert (threads, files) <= before
    for n in range(9):
        with Store.open(f"sqlite:///{tmp_path}/{n}.db") as store:
            assert [(row.outcome, row.n) for row in store.counts("mood")] == [("remote", 1)]


ENDS = """
    import httpx
    from pathlib import Path
    from apprentice import {client} as Client
    from apprentice.testing import FakeVendor
    from tests.conftest import settings, truth

    vendor = FakeVendor("anthropic", truth)
    client = Client.from_config(
        settings(Path({folder!r}), vendor, budget={{"daily": 10}}),
        http_client=httpx.Client(transport=vendor.transport()),
        environ=vendor.environ,
    )
    {use}
"""


@pytest.mark.parametrize(
    ("client", "use"),
    [
        ("Apprentice", 'client.run("mood", {"text": "a joy"})'),
        ("AsyncApprentice", 'import asyncio; asyncio.run(client.run("mood", {"text": "a joy"}))'),
        ("Apprentice", 'client.run("mood", {"text": "a joy"}); raise SystemExit(0)'),
    ],
)
def test_a_process_that_ends_without_close_has_written_everything(client: str, use: str, tmp_path: Path) -> None:
    """A cron job of two lines: its request is counted, its call settled, and nothing is held."""
    code = textwrap.dedent(ENDS).format(client=client, folder=str(tmp_path), use=use)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    with Store.open(f"sqlite:///{tmp_path}/apprentice.db") as store:
        assert [(row.outcome, row.n) for row in store.counts("mood")] == [("remote", 1)]
        (row,) = store.spend()
        assert (row.state, row.calls) == ("settled", 1)
        budget = Budget(store, settings(tmp_path, FakeVendor("anthropic"), budget={"daily": 10}).budget)
        assert budget.remaining()[0].reserved == 0


# ---------------------------------------------------------------- forks


@pytest.fixture
def forked() -> Iterator[Callable[[Callable[[], None]], int]]:
    """Call something in a fork of this process, and return its exit code."""

    def call(work: Callable[[], None]) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which is what is tested
            child = multiprocessing.get_context("fork").Process(target=work)
            child.start()
        child.join(60)
        if child.exitcode is None:
            child.kill()
            child.join()
            pytest.fail("the forked process hangs")
        return child.exitcode

    return call  # type: ignore[return-value]


def test_a_fork_has_parts_of_its_own(bench: Bench, forked: Any) -> None:
    """gunicorn --preload: after the parent has answered in shadow, a child answers, compares and counts, once each."""
    at = bench(budget={"daily": 10})
    at.promote()
    at.run("a joy")  # the parent's count is not written yet

    def work() -> None:
        assert at.client.wait_until_serving("mood", 10)
        for _ in range(3):
            assert at.run("a fear") == {"label": "fear"}
        at.client.close()

    assert forked(work) == 0
    assert forked(work) == 0
    at.run("a joy")
    at.client.close()
    with Store.open(at.client.settings.store_url) as store:
        assert sum(row.n for row in store.counts("mood") if row.outcome == "shadow") == 8
        assert len(store.comparisons("mood")) == 8
        assert store.count_examples("mood") == 8
        (row,) = store.spend()
        assert (row.state, row.calls) == ("settled", 8)


def test_an_asynchronous_client_survives_a_fork(tmp_path: Path, forked: Any) -> None:
    """Its threads stay with the parent; the child has its own."""
    vendor = FakeVendor("anthropic", truth)
    client = open_async(tmp_path, vendor)
    asyncio.run(client.run("mood", {"text": "a joy"}))

    def work() -> None:
        assert asyncio.run(client.run("mood", {"text": "a fear"})).output == {"label": "fear"}
        asyncio.run(client.aclose())

    assert forked(work) == 0
    assert asyncio.run(client.run("mood", {"text": "a fear"})).output == {"label": "fear"}
    asyncio.run(client.aclose())
    with Store.open(f"sqlite:///{tmp_path}/apprentice.db") as store:
        assert sum(row.n for row in store.counts("mood")) == 3


def test_a_client_closed_before_a_fork_is_closed_after_it(bench: Bench, forked: Any) -> None:
    at = bench()
    at.client.close()

    def work() -> None:
        with pytest.raises(ClientClosed):
            at.run()

    assert forked(work) == 0


# ---------------------------------------------------------------- the environment


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SSL_CERT_FILE", "/nonexistent/ca.pem"),
        ("SSL_CERT_FILE", __file__),
        ("ALL_PROXY", "socks5://127.0.0.1:1080"),
        ("https_proxy", "socks5h://127.0.0.1:1080"),
        ("HTTPS_PROXY", "ftp://127.0.0.1:1080"),
        ("HTTP_PROXY", "http://[::1:80"),
        ("NO_PROXY", "localhost,fd07:b51a:cc66:f0::/64"),
        ("NO_PROXY", "localhost,[::1]"),
    ],
)
@pytest.mark.parametrize("client", [Apprentice, AsyncApprentice])
def test_an_environment_that_cannot_be_used_is_named(
    name: str, value: str, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start, with the variable and the remedy, and nothing is left open."""
    for other in ("SSL_CERT_FILE", "SSL_CERT_DIR", "ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY"):
        monkeypatch.delenv(other, raising=False)
        monkeypatch.delenv(other.lower(), raising=False)
    monkeypatch.setenv(name, value)
    vendor = FakeVendor("anthropic")
    threads = threading.active_count()
    with pytest.raises(ConfigError) as caught:
        client.from_config(settings(tmp_path, vendor), environ=vendor.environ)
    assert [problem.path for problem in caught.value.problems] == [name]
    assert caught.value.problems[0].remedy
    assert threading.active_count() == threads
    assert not list(tmp_path.glob("*.db"))


def test_check_finds_an_environment_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`apprentice check` says what a start would say."""
    vendor = FakeVendor("anthropic")
    check_remote(settings(tmp_path, vendor), vendor.environ)
    monkeypatch.setenv("NO_PROXY", "[::1]")
    with pytest.raises(ConfigError, match="NO_PROXY"):
        check_remote(settings(tmp_path, vendor), vendor.environ)


@pytest.mark.parametrize("value", ["::1", "*.corp", "localhost\n", "10.0.0.0/8", "host:8080", ""])
def test_an_environment_that_can_be_used_is(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", value)
    vendor = FakeVendor("anthropic")
    Apprentice.from_config(settings(tmp_path, vendor), environ=vendor.environ).close()


def test_a_store_that_fails_while_champions_are_looked_up_stops_no_start(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first request looks again."""
    real, failed = Store.policies, []

    def fails_once(self: Store) -> Any:
        if not failed:
            failed.append(1)
            raise StoreError("the server closed the connection")
        return real(self)

    monkeypatch.setattr(Store, "policies", fails_once)
    at = bench()
    assert failed
    time.sleep(SNAPSHOT_S)
    assert at.run("a fear") == {"label": "fear"}


def test_champions_are_loaded_at_the_start(bench: Bench) -> None:
    """Without waiting for a first request; a process that only forks can do without."""
    at = bench()
    at.promote()
    at.client.close()
    again = bench()
    assert again.client.wait_until_serving("mood", timeout_s=10)
    assert again.engine.loads == ["mood-v1"]
    again.client.close()
    settled = again.client.settings
    for warm, loads in ((False, []), (True, ["mood-v1"])):
        engine = FakeEngine(lambda version, value: truth(value))
        with Apprentice.from_config(settled, environ=again.vendor.environ, engine=engine, warm=warm) as client:
            ends = time.monotonic() + (10 if warm else 0.2)
            while engine.loads != loads and time.monotonic() < ends:
                time.sleep(0.01)
            assert engine.loads == loads
            if warm:
                ends = time.monotonic() + 10
                while client.health().tasks["mood"].serving is None and time.monotonic() < ends:
                    time.sleep(0.01)
                assert client.health().tasks["mood"].serving == "mood-v1"
