"""A release migrates the store while processes of earlier ones are using it; those must not notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Column, Engine, MetaData, Table, create_engine, func, insert, inspect, select, update

from apprentice.store import ExampleRecord, Store, migrations

SHAPES = range(7, migrations.LATEST)
"""Every shape since there was a ledger; the steps before it make a table each."""


@pytest.fixture
def at_shape(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Makes a store of an earlier shape, as that release left it."""

    def make(url: str, shape: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(migrations, "_STEPS", migrations._STEPS[:shape])
            patch.setattr(migrations, "LATEST", shape)
            patch.setattr(migrations, "_CONTRACTIONS", ())
            Store.open(url).close()

    return make


def tables_of(engine: Engine) -> dict[str, Table]:
    known = MetaData()
    known.reflect(engine)
    return {name: table for name, table in known.tables.items() if name != "schema_version"}


def a_row(table: Table, n: int) -> dict[str, Any]:
    """A value for every column, as an INSERT of that release names them; ``seq`` is the database's."""
    return {column.name: a_value(column, n) for column in table.columns if column.name != "seq"}


def a_value(column: Column[Any], n: int) -> Any:
    if column.name == "state":  # at most one run of a task is running
        return "completed"
    return column.type.python_type(n)


@pytest.mark.parametrize("shape", SHAPES)
def test_statements_of_an_earlier_shape_work_on_the_latest(url: str, shape: int, at_shape: Any) -> None:
    """Prepared before the migration, run after it: every INSERT, UPDATE and SELECT of every table."""
    at_shape(url, shape)
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    try:
        with engine.begin() as connection:
            before = tables_of(engine)
            for table in before.values():
                connection.execute(insert(table), a_row(table, 1))
        Store.open(url).close()  # the new release
        with engine.begin() as connection:
            for name, table in before.items():
                connection.execute(insert(table), a_row(table, 2))
                connection.execute(update(table).values({c.name: c for c in table.columns if not c.primary_key}))
                assert len(connection.execute(select(table)).fetchall()) == 2, name
            # A trigger of a later shape may write tables that this one does not know; it must not stop these.
            assert connection.execute(select(func.count()).select_from(before["calls"])).scalar() == 2
    finally:
        engine.dispose()
    with Store.open(url) as store:
        assert store.count_examples("1") + store.count_examples("2") == 2


@pytest.mark.parametrize("shape", SHAPES)
def test_an_old_process_and_a_new_one_write_in_turn(url: str, shape: int, at_shape: Any) -> None:
    """The new release's INSERTs leave out what it no longer uses, and the old one reads its rows."""
    at_shape(url, shape)
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    try:
        examples = tables_of(engine)["examples"]
        with Store.open(url) as new:
            for n in range(3):
                new.add_example(ExampleRecord(f"new{n}", "a", {"n": n}, {"l": "x"}, "p", "m", float(n)))
                with engine.begin() as connection:
                    values = {"id": f"old{n}", "task": "a", "input": "{}", "output": "{}"}
                    connection.execute(insert(examples), {**a_row(examples, 5), **values})
            assert [e.id for e in new.examples("a")] == ["new0", "old0", "new1", "old1", "new2", "old2"]
        with engine.begin() as connection:
            assert len(connection.execute(select(examples)).fetchall()) == 6
    finally:
        engine.dispose()


@pytest.mark.parametrize("shape", SHAPES)
def test_contracting_ends_where_a_new_store_begins(url: str, shape: int, at_shape: Any, tmp_path: Any) -> None:
    """Once no older process is left an old store gets the columns of a new one, and keeps its rows."""
    at_shape(url, shape)
    with Store.open(url) as store:
        store.add_example(ExampleRecord("x", "a", {}, {}, "p", "m", 1.0))
    for _ in range(2):  # what is done stays done
        Store.contract(url)
    with Store.open(url) as store:
        assert store.count_examples("a") == 1
    fresh = f"sqlite:///{tmp_path / 'fresh.db'}"
    Store.open(fresh).close()
    columns, indexes = [], []
    for one in (url, fresh):
        engine = create_engine(one.replace("postgresql://", "postgresql+psycopg://"))
        look = inspect(engine)
        names = look.get_table_names()
        columns.append({name: {c["name"] for c in look.get_columns(name)} for name in names})
        indexes.append({name: {i["name"] for i in look.get_indexes(name)} for name in names})
        engine.dispose()
    assert columns[0] == columns[1]
    assert indexes[0] == indexes[1]


def test_a_step_that_fails_leaves_the_store_as_it_was(url: str, at_shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All missing steps or none."""
    at_shape(url, 7)

    def fail(op: Any) -> None:
        op.execute("SELECT * FROM there_is_no_such_table")

    with monkeypatch.context() as patch:
        patch.setattr(migrations, "_STEPS", (*migrations._STEPS, fail))
        patch.setattr(migrations, "LATEST", migrations.LATEST + 1)
        with pytest.raises(migrations.StoreError, match="latest shape"):
            Store.open(url)
    with Store.open(url) as store:
        assert store.spend() == []
