"""A client over a real PostgreSQL that cuts every connection again and again."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from apprentice import Apprentice, Unavailable
from apprentice.testing import FakeEngine, FakeVendor
from tests.conftest import settings, truth


def test_no_paid_answer_is_lost_while_the_server_drops_connections(
    new_postgres: Callable[[], str], tmp_path: Path
) -> None:
    """Whoever was answered by the vendor has the answer; each is kept once; in the end nothing is held."""
    import psycopg

    url = new_postgres()
    vendor = FakeVendor("anthropic", truth)
    done = threading.Event()
    cuts = []

    def cut() -> None:
        draw = random.Random(1)
        with psycopg.connect(url, autocommit=True) as connection:
            while not done.wait(draw.uniform(0.01, 0.1)):
                found = connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                ).fetchall()
                cuts.append(len(found))

    client = Apprentice.from_config(
        settings(tmp_path, vendor, store=url, budget={"daily": 1000}),
        http_client=httpx.Client(transport=vendor.transport()),
        engine=FakeEngine(lambda version, value: truth(value)),
        environ=vendor.environ,
    )

    def ask(n: int) -> Any:
        try:
            return client.run("mood", {"text": f"a fear, number {n}"}).output
        except Unavailable as error:
            return error

    cutter = threading.Thread(target=cut)
    cutter.start()
    try:
        with ThreadPoolExecutor(8) as threads:
            results = list(threads.map(ask, range(200)))
    finally:
        done.set()
        cutter.join()
    client.close()
    assert sum(cuts) > 10
    answered = [n for n, result in enumerate(results) if result == {"label": "fear"}]
    assert len(answered) == vendor.asked
    with psycopg.connect(url, autocommit=True) as connection:
        inputs = [row[0] for row in connection.execute("SELECT input FROM examples").fetchall()]
        states = dict(connection.execute("SELECT state, count(*) FROM calls GROUP BY state").fetchall())
        (held,) = connection.execute("SELECT sum(committed - spent) FROM cap_windows").fetchone() or (0,)
    assert len(inputs) == len(set(inputs)) == vendor.asked
    assert states.get("settled") == vendor.asked
    assert states.get("reserved", 0) == 0
    assert held == 0
