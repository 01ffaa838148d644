"""PostgreSQL behind PgBouncer in transaction mode, where each transaction may run in another session. A real one."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from apprentice.store import CapWindow, EventRecord, ExampleRecord, Settlement, Store, Usage

_COMMAND = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
_SESSIONS = 3

pytestmark = pytest.mark.skipif(_COMMAND is None, reason="there is no pgbouncer here: apt-get install pgbouncer")


@pytest.fixture
def pooled(new_postgres: Callable[[], str]) -> Iterator[str]:
    """The URL of a new database through a pooler that shares three sessions among all clients."""
    parts = urlsplit(new_postgres())
    folder = Path(tempfile.mkdtemp(prefix="pb", dir="/tmp"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    name = parts.path.lstrip("/")
    config = folder / "pgbouncer.ini"
    config.write_text(
        f"[databases]\n{name} = host={parse_qs(parts.query)['host'][0]} dbname={name} user=postgres\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
        f"pool_mode = transaction\ndefault_pool_size = {_SESSIONS}\nmax_client_conn = 100\n"
    )
    # It refuses to run as root; PostgreSQL's own user may read its socket, and must read this file.
    as_user = ["-u", Path(parse_qs(parts.query)["host"][0]).owner()] if os.getuid() == 0 else []
    folder.chmod(0o755)
    log = (folder / "log").open("wb")
    with subprocess.Popen([str(_COMMAND), *as_user, str(config)], stdout=log, stderr=log) as pooler:
        try:
            for _ in range(200):
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    assert pooler.poll() is None, (folder / "log").read_text()
                    time.sleep(0.05)
            yield f"postgresql://postgres@127.0.0.1:{port}/{name}"
        finally:
            pooler.terminate()
            pooler.wait()
            log.close()
            shutil.rmtree(folder)


def test_everything_works_through_a_pooler(pooled: str) -> None:
    """Eight threads of two stores, more than there are sessions: migrations, reservations, answers, events, reads."""
    window = CapWindow("daily", "", "daily", "2026-03-01", Decimal(1000))
    with Store.open(pooled) as first, Store.open(pooled) as second:
        first.ensure_tasks(["a"])
        first.open_windows([window])

        def use(n: int) -> None:
            store = (first, second)[n % 2]
            kept = store.reserve(
                task="a",
                provider="p",
                model="m",
                request_id=f"r{n}",
                owner="o",
                day="2026-03-01",
                worst_case=Decimal(1),
                windows=[window],
            )
            assert kept is not None
            example = ExampleRecord(f"x{n}", "a", {"n": n}, {"label": "l"}, "p", "m", float(n))
            settled = Settlement(kept, "settled", Decimal("0.5"), Usage(1, 1))
            store.complete_remote(settlements=[settled], example=example)
            store.update_state(
                "a", lambda state: state.change(events=[EventRecord(f"e{n}", "a", "phase", "info", {}, 1.0)])
            )
            store.add_event_unless_recent(EventRecord(f"matter:{n}", "a", "drift", "warning", {}, n * 10.0), 10.0)
            store.policies(), store.count_examples("a"), store.spend()

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(use, range(120)))
        assert first.count_examples("a") == 120
        assert second.policy_row("a").revision == 120
        assert len(second.events(limit=1000)) == 240
        assert first.window_states(["daily"])["daily"].spent == Decimal(60)


def test_a_transaction_leaves_no_setting_behind(pooled: str) -> None:
    """The next one in the same session, which may be another application's, has the server's own settings."""
    import psycopg

    with Store.open(pooled) as store:
        store.ensure_tasks(["a"])
        for _ in range(4 * _SESSIONS):
            with psycopg.connect(pooled, autocommit=True, prepare_threshold=None) as session:
                rows = [session.execute(f"SHOW {name}").fetchone() for name in ("lock_timeout", "synchronous_commit")]
            assert rows == [("0",), ("on",)]
