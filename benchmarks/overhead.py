"""What Apprentice adds to a call, against the bare `httpx.Client` call to the same server, interleaved in one run.

The server is another process that answers at once with a constant Messages API answer, so nothing hides the overhead.
Printed: p50 and p99 in milliseconds and CPU time per call, of

* bare: `httpx.Client.post(url, json=...).json()`
* ask and record: reserve, send, parse, check, price, then settlement and example in one durable SQLite transaction
* run: the same through `Apprentice.run`, router included
* local: `Apprentice.run` answered by the local model (an engine double that answers at once), each after a remote call,
  whose code and data have taken its place in the processor's caches; and alone, one after the other

and whether any of it grows with the store. Run: python -m benchmarks.overhead [calls]
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import socket
import socketserver
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from apprentice import Apprentice
from apprentice.money.budget import Budget
from apprentice.remote import Teacher
from apprentice.remote.transport import Sender
from apprentice.settings.config import Settings
from apprentice.store import ComparisonRecord, ExampleRecord, Store, VersionRecord
from apprentice.testing import FakeEngine

KEY_ENV = "BENCH_KEY"
TEXT = "My invoice of March shows the same item twice and nobody answers the phone. " * 4

_ANSWER = (
    b'{"id":"msg_01","type":"message","role":"assistant","model":"claude-sonnet-4-5","content":[{"type":"text",'
    b'"text":"{\\"category\\":\\"billing\\",\\"priority\\":2}"}],"stop_reason":"end_turn","stop_sequence":null,'
    b'"usage":{"input_tokens":412,"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":14}}'
)
_REPLY = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(_ANSWER) + _ANSWER


class _Handler(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True

    def handle(self) -> None:
        while True:
            length = 0
            while (line := self.rfile.readline()) not in (b"\r\n", b""):
                if line.lower().startswith(b"content-length:"):
                    length = int(line[15:])
            if not line:
                return
            self.rfile.read(length)
            self.wfile.write(_REPLY)


def _serve(listener: socket.socket) -> None:
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Handler, bind_and_activate=False)
    server.daemon_threads = True
    server.socket.close()
    server.socket = listener
    server.serve_forever()


def settings(base_url: str, folder: Path) -> Settings:
    """A configuration such as the one that ships: caps per day, week and month for all tasks together."""
    caps = {"daily": 10_000, "weekly": 10_000, "monthly": 10_000}
    return Settings.model_validate(
        {
            "tasks": [
                {
                    "name": "classify",
                    "description": "Classify a support ticket.",
                    "input_schema": {"text": "str"},
                    "output_schema": {"category": "billing | shipping | other", "priority": "int"},
                }
            ],
            "remote": {
                "provider": "anthropic",
                "model": "claude-sonnet-4-5",
                "api_key_env": KEY_ENV,
                "base_url": base_url,
            },
            "budget": caps,
            "store": f"sqlite:///{folder / 'bench.db'}",
            "source": folder / "apprentice.yaml",
        }
    )


class Timings:
    """Wall and processor time of each call of one kind, in seconds."""

    def __init__(self, name: str, call: Callable[[], Any]) -> None:
        self.name = name
        self._call = call
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def measure(self) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        self._call()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)

    def line(self, bare: Timings) -> str:
        ordered = sorted(self.wall)
        p50, p99 = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
        tenth = max(len(self.wall) // 10, 1)
        first, last = statistics.median(self.wall[:tenth]), statistics.median(self.wall[-tenth:])
        ratio = p50 / statistics.median(bare.wall)
        cpu = statistics.median(self.cpu)
        return (
            f"{self.name:<16} p50 {p50 * 1e3:7.3f} ms   p99 {p99 * 1e3:7.3f} ms   cpu {cpu * 1e3:6.3f} ms"
            f"   {ratio:5.2f} x bare   first tenth {first * 1e3:6.3f} ms, last {last * 1e3:6.3f} ms"
        )


def interleaved(kinds: list[Timings], calls: int) -> None:
    for kind in kinds:  # connections, caches, compiled statements
        for _ in range(50):
            kind.measure()
        kind.wall.clear()
        kind.cpu.clear()
    for _ in range(calls):
        for kind in kinds:
            kind.measure()


def main(calls: int = 3000) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = multiprocessing.get_context("fork").Process(target=_serve, args=(listener,), daemon=True)
    server.start()
    folder = Path(tempfile.mkdtemp(prefix="apprentice-bench-"))
    try:
        remote_path(base_url, folder, calls)
    finally:
        server.kill()
        server.join()
        shutil.rmtree(folder)


def remote_path(base_url: str, folder: Path, calls: int) -> None:
    config = settings(base_url, folder)
    task = config.tasks[0]
    client = httpx.Client(headers={"x-api-key": "k", "anthropic-version": "2023-06-01"})
    store = Store.open(config.store_url)
    budget = Budget(store, config.budget, {task.name: task.budget})
    direct = Sender()
    teacher = Teacher(config.remote, direct.send, {KEY_ENV: "k"}, random=random.Random(1))
    value = {"text": TEXT}
    body = {
        "model": "claude-sonnet-4-5",
        "max_tokens": 1024,
        "system": task.description,
        "messages": [{"role": "user", "content": TEXT}],
    }

    def bare() -> None:
        client.post(f"{base_url}/v1/messages", json=body).json()

    def ask() -> None:
        with budget.account(task.name, "r" * 32) as account:
            answer = teacher.ask(task, value, account)
            by = answer.provider, answer.model
            account.complete(ExampleRecord("r" * 32, task.name, value, answer.output, *by, time.time()))

    engine = FakeEngine(lambda version, asked: {"category": "billing", "priority": 2})
    environ = {KEY_ENV: "k"}
    (folder / "local").mkdir()
    (folder / "remote").mkdir()
    with (
        Apprentice.from_config(settings(base_url, folder / "remote"), engine=engine, environ=environ) as remote,
        Apprentice.from_config(settings(base_url, folder / "local"), engine=engine, environ=environ) as local,
    ):
        trust(local, task.name)
        kinds = [
            Timings("bare httpx", bare),
            Timings("ask and record", ask),
            Timings("run, remote", lambda: remote.run(task.name, value)),
            Timings("run, local", lambda: local.run(task.name, value)),
        ]
        interleaved(kinds, calls)
        alone = Timings("run, local alone", lambda: local.run(task.name, value))
        interleaved([alone], calls)
        kinds.append(alone)
    print(f"{calls} calls each, interleaved; SQLite, synchronous=FULL, caps per day, week and month")
    print(
        "aims: run, remote at most 2.0 x bare at p50; run, local at most 0.15 ms; the last tenth as fast as the first"
    )
    for kind in kinds:
        print(kind.line(kinds[0]))
    disk(folder)
    store.close()
    direct.close()
    client.close()


def trust(client: Apprentice, task: str, held_out: int = 2000) -> None:
    """Promote a version whose held-out answers all agreed, so that nearly every request is its own to answer."""
    store, judge = client.parts.store, client.parts.judge
    store.add_version(VersionRecord("v1", task, "candidate", "", "base", 1, held_out, "d", None, ""))
    seed = []
    for n in range(held_out):
        output = {"category": ("billing", "shipping", "other")[n % 3], "priority": n % 3}
        seed.append(
            ComparisonRecord(
                id=str(n),
                task=task,
                request_id=str(n),
                version="v1",
                score=1.0,
                parts={},
                confidence=1.0,
                local=output,
                remote=output,
                seeded=True,
                created_at=time.time(),
            )
        )
    judge.promote(task, "v1", seed, reason="benchmark")
    if not client.wait_until_serving(task):
        raise RuntimeError("the engine double did not come to serve")


def disk(folder: Path, writes: int = 200) -> None:
    """What one fdatasync costs here: no durable record can be cheaper."""
    handle = os.open(folder / "sync", os.O_CREAT | os.O_RDWR)
    os.write(handle, bytes(16384))
    os.fsync(handle)
    took = []
    for _ in range(writes):
        os.pwrite(handle, bytes(16384), 0)
        began = time.perf_counter()
        os.fdatasync(handle)
        took.append(time.perf_counter() - began)
    os.close(handle)
    print(f"fdatasync of 16 KiB on this disk: p50 {statistics.median(took) * 1e3:.3f} ms, part of both remote paths")


if __name__ == "__main__":
    main(*(int(n) for n in sys.argv[1:2]))
