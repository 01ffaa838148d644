"""A SQLite store is a file, and files are moved, deleted, replaced, read by others, and lie in folders of any name."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine

from apprentice import Settings
from apprentice.errors import StoreError
from apprentice.events.emitter import Events
from apprentice.store import EventRecord, ExampleRecord, Store
from apprentice.testing import FakeVendor
from tests.conftest import settings

EXAMPLE = ExampleRecord("x", "a", {"n": 1}, {"l": "x"}, "p", "m", 1.0)


class Collecting:
    name = "collecting"

    def __init__(self) -> None:
        self.taken: list[EventRecord] = []

    def send(self, event: EventRecord, timeout_s: float) -> None:
        self.taken.append(event)


@pytest.mark.parametrize("how", ["deleted", "replaced", "restored"])
def test_a_file_that_is_no_longer_the_stores_is_noticed_and_told_once(tmp_path: Path, how: str) -> None:
    """Nothing is written into a file that nobody will find again; the sinks hear of it, though no store can keep it."""
    path = tmp_path / "store.db"
    sink = Collecting()
    with Store.open(f"sqlite:///{path}") as store:
        store.ensure_tasks(["a"])
        events = Events(store, [sink])
        if how == "deleted":
            path.unlink()
        else:
            copy = tmp_path / "copy.db"
            if how == "restored":
                with sqlite3.connect(path) as source, sqlite3.connect(copy) as target:
                    source.backup(target)
            else:
                Store.open(f"sqlite:///{copy}").close()
            copy.rename(path)
        for _ in range(2):
            with pytest.raises(StoreError, match="restart every process"):
                store.add_example(EXAMPLE)
            with pytest.raises(StoreError, match="restart every process"):
                store.policies()
        events.close()
    assert [e.kind for e in sink.taken] == ["store_replaced"]
    if how == "restored":
        with Store.open(f"sqlite:///{path}") as store:  # after a restart
            store.add_example(EXAMPLE)


def test_reading_creates_nothing(tmp_path: Path) -> None:
    """A mistyped path of `status` makes no folder and no empty database."""
    with Store.open(f"sqlite:///{tmp_path / 'no' / 'such' / 'store.db'}", read_only=True) as store:
        store.ensure_tasks(["a"])
        assert store.policy_row("a").phase == 1
        assert store.spend() == []
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_read_only_is_read_beside_a_writer(url: str) -> None:
    """On both databases: what is committed is seen, and writing is refused with the reason."""
    with Store.open(url) as writer:
        writer.ensure_tasks(["a"])
        with Store.open(url, read_only=True) as reader:
            reader.ensure_tasks(["a", "new"])
            for n in range(3):
                writer.add_example(ExampleRecord(f"x{n}", "a", {}, {}, "p", "m", 1.0))
                assert reader.count_examples("a") == n + 1
            assert (reader.policy_row("a").phase, reader.policy_row("new").phase) == (1, 1)
            with pytest.raises(StoreError, match="read only"):
                reader.add_example(EXAMPLE)
        assert set(writer.policies()) == {"a"}


def _read_as_nobody(path: Path, answers: Any) -> None:
    os.chdir("/")
    if os.getuid() == 0:
        os.setuid(65534)
    try:
        with Store.open(f"sqlite:///{path}", read_only=True) as store:
            answers.put(store.count_examples("a"))
    except BaseException as error:  # noqa: BLE001  # the parent shows it
        answers.put(repr(error))


@pytest.mark.parametrize("in_use", [False, True])
def test_a_folder_that_cannot_be_written_is_read(in_use: bool) -> None:
    """A mounted backup, or another user's folder while that user's router runs."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        path = folder / "store.db"
        store = Store.open(f"sqlite:///{path}")
        store.add_example(EXAMPLE)
        if not in_use:
            store.close()
        for file in folder.iterdir():
            file.chmod(0o444)
        folder.chmod(0o555)
        context = multiprocessing.get_context("fork")
        answers = context.Queue()
        reader = context.Process(target=_read_as_nobody, args=(path, answers))
        reader.start()
        assert answers.get(timeout=30) == 1
        reader.join()
        store.close()
        folder.chmod(0o755)


@pytest.mark.parametrize("name", ["a%20b", "a?b", "a b", "50% off", "a#b", "ü", "it's", "%2F", "a+b&c=d"])
def test_a_project_may_lie_in_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    """Both databases are in that folder, each in its own file, and no other folder is made."""
    folder = tmp_path / name
    folder.mkdir()
    config: Settings = settings(folder, FakeVendor("anthropic", dict))
    with Store.open(config.store_url) as store:
        store.add_example(EXAMPLE)
    assert (folder / "apprentice.db").is_file()
    database = create_engine(config.tracking_uri)  # which is what MLflow does with it
    with database.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE t (n INTEGER)")
    database.dispose()
    assert (folder / "mlflow.db").is_file()
    assert [one.name for one in tmp_path.iterdir()] == [name]
