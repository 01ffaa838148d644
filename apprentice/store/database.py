"""Connections and transactions, on SQLite and PostgreSQL.

Statements are written in SQLAlchemy Core, compiled once per dialect, and run on the driver itself: Core's own execution
of a compiled statement costs several times what SQLite takes to carry it out, and every request of every user would
pay for it (`benchmarks/ledger.py` prints both). The tables hold nothing that would need SQLAlchemy's type processors.

Durability, SQLite. In WAL mode a commit with synchronous=NORMAL is safe against the death of the process, at once, and
may be lost when the machine loses power; with FULL it is on the disk. What has been paid for (`durable=True`) is
committed with FULL. A reservation is not: if the power fails, the calls that it guarded fail with it.
A FULL commit syncs the log up to its end, earlier NORMAL commits included. PostgreSQL draws the same line with
synchronous_commit. Nothing outlives its transaction on the server (no prepared statement, no setting, no lock), so
that PgBouncer may stand between in transaction mode.

SQLite has one writer at a time. Threads of this process queue for it on a lock, which is fair and wakes at once; other
processes are waited for by busy_timeout, which polls.
"""

from __future__ import annotations

import math
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, cast

from sqlalchemy import URL, make_url
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import ArgumentError
from sqlalchemy.sql import ClauseElement, Executable
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.dml import Insert

from apprentice.errors import MissingExtra, StoreError
from apprentice.secrets import register_url, scrub_error
from apprentice.store.records import EventRecord

__all__ = [
    "Database",
    "PostgresDatabase",
    "SqliteDatabase",
    "StoreReplaced",
    "Transaction",
    "open_database",
    "within",
]

_BUSY_TIMEOUT_S = 60.0
_LOOK_S = 0.25
_RETRY_S = 0.01
_waiting = threading.local()


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Let all that this thread waits for in a store (locks, connections, servers) end within ``seconds``, together.

    Then it is a `StoreError`. Nested, the shorter one holds; without, each wait has `_BUSY_TIMEOUT_S`.
    """
    before: float | None = getattr(_waiting, "ends", None)
    ends = time.monotonic() + seconds
    _waiting.ends = ends if before is None else min(ends, before)
    try:
        yield
    finally:
        _waiting.ends = before


def _patience_s() -> float:
    """How long this thread may wait now."""
    ends: float | None = getattr(_waiting, "ends", None)
    return _BUSY_TIMEOUT_S if ends is None else min(max(ends - time.monotonic(), 0.0), _BUSY_TIMEOUT_S)


# PostgreSQL allows 100 connections by default, and many processes share it.
_MOST_CONNECTIONS = 8


class StoreReplaced(StoreError):
    """The file of a SQLite store is no longer the one that was opened: what is written to that one is lost."""


class Cursor(Protocol):
    """The part of the DB-API that both drivers share and the store uses."""

    @property
    def rowcount(self) -> int: ...
    def fetchone(self) -> Any: ...
    def fetchmany(self, size: int, /) -> list[Any]: ...
    def fetchall(self) -> list[Any]: ...


class Transaction:
    """A running transaction: `run` executes Core statements, compiled at most once per database."""

    __slots__ = ("_compiled", "_connection", "dialect_name", "events")

    def __init__(self, connection: Any, compiled: _Compiler, dialect_name: str) -> None:
        self._connection = connection
        self._compiled = compiled
        self.dialect_name = dialect_name
        self.events: list[EventRecord] = []
        """The events that this transaction added; `Store` tells them when it is committed."""

    def run(self, statement: Executable, values: Mapping[str, Any] | None = None) -> Cursor:
        """Execute ``statement`` with its bound parameters by name. Insert statements take one value per column."""
        sql, fixed = self._compiled(statement)
        if fixed:
            values = {**fixed, **(values or {})}
        return cast(Cursor, self._connection.execute(sql, values or {}))

    def run_text(self, sql: str) -> Cursor:
        """Execute SQL that one dialect needs and Core does not spell."""
        return cast(Cursor, self._connection.execute(sql))


class _Compiler:
    """Statement -> (SQL, fixed parameters), remembered. Statements are module constants: the memory is bounded."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._known: dict[Executable, tuple[str, dict[str, Any]]] = {}

    def __call__(self, statement: Executable) -> tuple[str, dict[str, Any]]:
        found = self._known.get(statement)
        if found is None:
            keys = None
            if isinstance(statement, Insert) and not statement._values:
                keys = [column.name for column in statement.table.columns if column.name != "seq"]
            compiled = cast(
                SQLCompiler, cast(ClauseElement, statement).compile(dialect=self._dialect, column_keys=keys)
            )
            fixed = {name: bind.value for name, bind in compiled.binds.items() if not bind.required}
            found = self._known[statement] = (str(compiled), fixed)
        return found


class Database(Protocol):
    """Short transactions on one URL. Safe to use from many threads."""

    url: URL
    read_only: bool

    @property
    def dialect_name(self) -> str: ...

    def write(self, *, durable: bool = False) -> Any:
        """A context manager giving a `Transaction` that no other writer of the same rows can interleave with."""

    def read(self) -> Any:
        """A context manager giving a `Transaction` for one statement that reads."""

    def driver_connection(self) -> Any:
        """A context manager giving a driver connection in autocommit, for migrations."""

    def close(self) -> None: ...


def open_database(url: str, *, read_only: bool = False) -> Database:
    """The database behind a URL: ``sqlite:///file.db``, ``sqlite://`` (memory) or ``postgresql://...``.

    With ``read_only`` nothing is written, no file and no folder made, and a SQLite file that does not exist is empty.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise StoreError("store: is no database URL; write sqlite:///apprentice.db or postgresql://...") from None
    match parsed.get_backend_name():
        case "sqlite":
            return SqliteDatabase(parsed, read_only=read_only)
        case "postgresql":
            return PostgresDatabase(parsed, read_only=read_only)
        case other:
            raise StoreError(f"store: {other!r} is not supported; write sqlite:///apprentice.db or postgresql://...")


class SqliteDatabase:
    """One file in WAL mode, or memory."""

    dialect_name = "sqlite"

    def __init__(self, url: URL, *, read_only: bool = False) -> None:
        from sqlalchemy.dialects.sqlite import pysqlite

        self.url = url
        self._path = url.database or ":memory:"
        # There is nothing to be read of a file that is not there.
        self._in_memory = self._path == ":memory:" or (read_only and not Path(self._path).exists())
        self.read_only = read_only and not self._in_memory
        self._mode = "mode=ro"
        self._file: tuple[int, int] | None = None
        self._compiler = _Compiler(pysqlite.dialect(paramstyle="named"))
        self._closed = False
        self._begin_anew()
        if not self._in_memory and not read_only:
            try:
                Path(self._path).parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreError(f"store {self._path}: its folder cannot be made ({error.strerror})") from None
        with self.read():
            pass  # a path that cannot be opened is reported now
        if not self._in_memory:
            with suppress(OSError):  # a name that only SQLite understands
                found = os.stat(self._path)
                self._file = found.st_dev, found.st_ino

    def _begin_anew(self) -> None:
        self._pid = os.getpid()
        # Re-entrant, so that a write inside a write is SQLite's error and no deadlock.
        self._writing = threading.RLock()
        self._write_connection: sqlite3.Connection | None = None
        self._writes_durably = False
        self._readers: list[sqlite3.Connection] = []

    def _check_alive(self) -> None:
        if self._closed:
            raise StoreError("the store is closed")
        if self._pid != os.getpid():
            # After a fork: SQLite's connections and held locks must not cross it, nor be closed on this side of it.
            self._inherited = (self._write_connection, self._readers)
            self._begin_anew()
        if self._file is not None:
            try:
                now = os.stat(self._path)
            except OSError:
                now = None
            if now is None or self._file != (now.st_dev, now.st_ino):
                what = "was deleted" if now is None else "is another file than the one that was opened"
                raise StoreReplaced(
                    f"store {self._path}: {what} while it was in use; put the right file there and restart every "
                    "process, or caps and examples would be kept in two places"
                )

    @contextmanager
    def write(self, *, durable: bool = False) -> Iterator[Transaction]:
        self._check_alive()
        if self.read_only:
            raise StoreError(f"store {self._path}: was opened to be read only")
        with self._turn_to_write():
            try:
                connection = self._writer(durable)
                self._begin_writing(connection)
                try:
                    yield Transaction(connection, self._compiler, "sqlite")
                    connection.execute("COMMIT")
                except BaseException:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise self._explained(error) from error

    @contextmanager
    def _turn_to_write(self) -> Iterator[None]:
        waits_s = _patience_s()
        if not self._writing.acquire(timeout=waits_s):
            raise StoreError(f"store {self._path}: another thread has been writing for more than {waits_s:.1f} s")
        try:
            yield
        finally:
            self._writing.release()

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        self._check_alive()
        if self._in_memory:
            with self._turn_to_write():
                try:
                    yield Transaction(self._writer(False), self._compiler, "sqlite")
                except sqlite3.Error as error:
                    raise self._explained(error) from error
            return
        try:
            connection = self._reader()
        except sqlite3.Error as error:
            raise self._explained(error) from error
        try:
            yield Transaction(connection, self._compiler, "sqlite")
        except sqlite3.Error as error:
            connection.close()
            raise self._explained(error) from error
        except BaseException:
            connection.close()
            raise
        if self._closed:
            connection.close()
        else:
            self._readers.append(connection)

    @staticmethod
    def _log_writes_ahead(connection: sqlite3.Connection) -> None:
        """Put the file in WAL mode, where it is not. While another opener does so, SQLite fails at once: it has read
        the header by then, and its busy handler serves only a transaction that holds no lock yet.
        """
        SqliteDatabase._patiently(connection, "PRAGMA journal_mode=WAL", pause_s=_RETRY_S)

    @staticmethod
    def _begin_writing(connection: sqlite3.Connection) -> None:
        """Wait for other processes' writing to end: SQLite for `_LOOK_S` at a time, and for as long as may be."""
        SqliteDatabase._patiently(connection, "BEGIN IMMEDIATE")

    @staticmethod
    def _patiently(connection: sqlite3.Connection, sql: str, *, pause_s: float = 0.0) -> None:
        """Execute ``sql`` as soon as the file is not busy, for as long as this thread may wait."""
        ends = time.monotonic() + _patience_s()
        while True:
            try:
                connection.execute(sql)
                return
            except sqlite3.OperationalError as error:
                busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
                if not busy or time.monotonic() >= ends:
                    raise
                time.sleep(pause_s)

    def _reader(self) -> sqlite3.Connection:
        try:
            return self._readers.pop()
        except IndexError:
            pass
        if not self.read_only:
            return self._connect("NORMAL")
        connection = self._connect_read_only()
        try:
            connection.execute("SELECT 1 FROM sqlite_schema").fetchone()
        except sqlite3.OperationalError:
            # A log is needed beside the file, and this folder cannot have one: then nobody is writing, and nothing
            # will change.
            connection.close()
            self._mode = "immutable=1"
            connection = self._connect_read_only()
        return connection

    def _connect_read_only(self) -> sqlite3.Connection:
        uri = f"{Path(self._path).absolute().as_uri()}?{self._mode}"
        return sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)

    def _writer(self, durable: bool) -> sqlite3.Connection:
        """The one connection that writes. Two, one for each level, would empty each other's page caches in turn."""
        if self._write_connection is None:
            self._write_connection = self._connect("NORMAL")
            self._writes_durably = False
            self._write_connection.execute(f"PRAGMA busy_timeout={int(1000 * _LOOK_S)}")  # see `_begin_writing`
        if durable is not self._writes_durably:
            self._write_connection.execute("PRAGMA synchronous=FULL" if durable else "PRAGMA synchronous=NORMAL")
            self._writes_durably = durable
        return self._write_connection

    def _connect(self, synchronous: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            ":memory:" if self._in_memory else self._path,
            timeout=_BUSY_TIMEOUT_S,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=256,
        )
        try:
            self._log_writes_ahead(connection)
            connection.execute(f"PRAGMA synchronous={synchronous}")
            # The log is written back every 1000 pages (SQLite's default) and, after a burst, cut down to 16 MiB.
            connection.execute("PRAGMA journal_size_limit=16777216")
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def driver_connection(self) -> Iterator[Any]:
        if self._in_memory:
            yield self._writer(False)
            return
        connection = self._connect("FULL")
        try:
            yield connection
        finally:
            connection.close()

    def _explained(self, error: sqlite3.Error) -> StoreError:
        text = str(error)
        remedy = "check that the folder exists, is writable and has room"
        if "locked" in text or "busy" in text:
            remedy = (
                "another process has held the write lock for longer than this request may wait; for many machines use "
                "PostgreSQL"
            )
        elif isinstance(error, sqlite3.DatabaseError) and ("not a database" in text or "malformed" in text):
            remedy = "the file is damaged or is no SQLite database; restore a copy, or name another file"
        return StoreError(f"store {self._path}: {text}; {remedy}")

    def close(self) -> None:
        self._closed = True
        with self._writing:
            for connection in (self._write_connection, *self._readers):
                if connection is not None:
                    connection.close()
            self._write_connection = None
            self._readers.clear()


class PostgresDatabase:
    """A PostgreSQL server, through psycopg 3 and a pool of at most `_MOST_CONNECTIONS`; more threads wait for one."""

    dialect_name = "postgresql"

    def __init__(self, url: URL, *, read_only: bool = False) -> None:
        try:
            import psycopg
        except ImportError:
            raise MissingExtra("a PostgreSQL store", "postgres") from None
        from sqlalchemy.dialects.postgresql import psycopg as core

        self._psycopg = psycopg
        self.read_only = read_only
        register_url(url.render_as_string(hide_password=False))
        self.url = url.set(drivername="postgresql+psycopg")
        self._conninfo = url.set(drivername="postgresql").render_as_string(hide_password=False)
        self._compiler = _Compiler(core.dialect())  # type: ignore[no-untyped-call]  # SQLAlchemy left it untyped
        self._closed = False
        self._begin_anew()
        with self.read():
            pass  # a server that cannot be reached is reported now

    @contextmanager
    def write(self, *, durable: bool = False) -> Iterator[Transaction]:
        if self.read_only:
            raise StoreError(f"store {self.url.render_as_string(hide_password=True)}: was opened to be read only")
        connection = self._begin("BEGIN" if durable else "BEGIN; SET LOCAL synchronous_commit = off")
        try:
            yield Transaction(connection, self._compiler, "postgresql")
            connection.execute("COMMIT")
        except self._psycopg.Error as error:
            self._give_up(connection)
            raise self._explained(error) from error
        except BaseException:
            self._give_up(connection)
            raise
        self._give_back(connection)

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        connection = self._begin("BEGIN READ ONLY")
        try:
            yield Transaction(connection, self._compiler, "postgresql")
            connection.execute("COMMIT")
        except self._psycopg.Error as error:
            self._give_up(connection)
            raise self._explained(error) from error
        except BaseException:
            self._give_up(connection)
            raise
        self._give_back(connection)

    def _begin_anew(self) -> None:
        self._pid = os.getpid()
        self._idle: list[Any] = []
        self._free = threading.BoundedSemaphore(_MOST_CONNECTIONS)

    def _begin(self, how: str) -> Any:
        """A connection in a transaction."""
        if self._closed:
            raise StoreError("the store is closed")
        if self._pid != os.getpid():
            self._begin_anew()  # after a fork the parent's sockets are the parent's
        waits_s = _patience_s()
        if not self._free.acquire(timeout=waits_s):
            raise StoreError(f"no connection to PostgreSQL became free within {waits_s:.1f} s")
        try:
            return self._connected(how)
        except BaseException:
            self._free.release()
            raise

    def _connected(self, how: str) -> Any:
        """An idle connection, where there is one that the server has not dropped, else a new one."""
        waits_s = _patience_s()
        wait_ms = max(int(1000 * waits_s), 1)  # 0 would mean for ever
        # A pooler may give each transaction another session, so settings are the transaction's own.
        how = f"{how}; SET LOCAL lock_timeout = {wait_ms}"
        if waits_s < _BUSY_TIMEOUT_S:
            how = f"{how}; SET LOCAL statement_timeout = {wait_ms}"
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                break
            try:
                connection.execute(how)
            except self._psycopg.Error:
                connection.close()
            else:
                return connection
        try:
            connection = self._connect(waits_s)
            connection.execute(how)
        except self._psycopg.Error as error:
            raise self._explained(error) from error
        return connection

    def _connect(self, waits_s: float = _BUSY_TIMEOUT_S) -> Any:
        # No statement is prepared on the server: behind PgBouncer in transaction mode it would be another session's.
        # libpq counts in whole seconds, and takes 1 for 2.
        timeout_s = max(math.ceil(waits_s), 2)
        return self._psycopg.connect(self._conninfo, autocommit=True, prepare_threshold=None, connect_timeout=timeout_s)

    @contextmanager
    def driver_connection(self) -> Iterator[Any]:
        with self._connect() as connection:
            yield connection

    def _give_back(self, connection: Any) -> None:
        if self._closed or connection.closed:
            connection.close()
        else:
            self._idle.append(connection)
        self._free.release()

    def _give_up(self, connection: Any) -> None:
        try:
            connection.execute("ROLLBACK")
        except self._psycopg.Error:
            connection.close()
        self._give_back(connection)

    def _explained(self, error: Exception) -> StoreError:
        text = str(scrub_error(error)).strip()
        return StoreError(f"store {self.url.render_as_string(hide_password=True)}: {text}")

    def close(self) -> None:
        self._closed = True
        while self._idle:
            self._idle.pop().close()
