"""How a store came to have its shape: one small function per step, run in order when it is opened.

Each takes Alembic's `Operations`, so that it reads the same on SQLite and PostgreSQL. A step that has shipped is never
changed, which is why it spells out its columns instead of asking `tables`; a new one is appended, and a test compares
the outcome with `tables`. All missing steps run in one transaction under a lock: of many processes that open a new
store together, one migrates and the rest find it done.

Expand first, contract later. While a new release migrates, processes of the release before it go on: they have paid
for answers that their INSERTs must still be able to keep. So a step in `_STEPS` only ever adds: tables, indexes,
triggers, and columns that may be left out of an INSERT (nullable, or with a server default). What is no longer used is
made optional there, and taken away by a step in `_CONTRACTIONS`. Those run by themselves on a store that is new, which
no other process can be using; on any other one `contract` runs them, when a person says that no older process is left.
A test replays the INSERTs, UPDATEs and SELECTs of every earlier shape on the latest one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sqlalchemy import BigInteger, Column, Float, Integer, Text, create_engine, inspect, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import StaticPool

from apprentice.errors import StoreError
from apprentice.secrets import scrub_error
from apprentice.store.database import Database

if TYPE_CHECKING:
    from alembic.operations import Operations

__all__ = ["LATEST", "contract", "migrate"]


def _seq() -> Column[int]:
    return Column("seq", BigInteger().with_variant(Integer(), "sqlite"), primary_key=True, autoincrement=True)


def _texts(*names: str) -> list[Column[str]]:
    return [Column(name, Text, nullable=False) for name in names]


def _wholes(*names: str) -> list[Column[int]]:
    return [Column(name, BigInteger, nullable=False) for name in names]


def _floats(*names: str) -> list[Column[float]]:
    return [Column(name, Float, nullable=False) for name in names]


def create_tasks(op: Operations) -> None:
    """Where each task stands."""
    op.create_table(
        "tasks",
        Column("task", Text, primary_key=True),
        Column("phase", Integer, nullable=False),
        Column("champion", Text),
        Column("threshold", Float),
        *_floats("sampling_rate"),
        *_texts("trust"),
        *_wholes("revision"),
        Column("training_due", Text),
        *_floats("updated_at"),
    )


def create_examples(op: Operations) -> None:
    """What the remote taught."""
    columns = _texts("id", "task", "input", "output", "provider", "model", "input_digest")
    op.create_table("examples", _seq(), *columns, *_floats("created_at"))
    op.create_index("examples_task", "examples", ["task", "seq"])


def create_comparisons(op: Operations) -> None:
    """Requests answered by both."""
    op.create_table(
        "comparisons",
        _seq(),
        *_texts("id", "task", "request_id", "version"),
        Column("score", Float),
        *_texts("parts"),
        *_floats("confidence"),
        *_texts("local", "remote"),
        *_floats("probability", "sampling_rate"),
        Column("served", Integer, nullable=False),
        Column("seeded", Integer, nullable=False),
        *_floats("created_at"),
    )
    disagrees = text("score < 1")
    op.create_index("comparisons_task", "comparisons", ["task", "seq"])
    op.create_index("comparisons_version", "comparisons", ["task", "version", "seq"])
    op.create_index(
        "comparisons_disagreeing",
        "comparisons",
        ["task", "seq"],
        sqlite_where=disagrees,
        postgresql_where=disagrees,
    )


def create_counts(op: Operations) -> None:
    """Requests by outcome and day."""
    keys = [Column(name, Text, primary_key=True) for name in ("task", "day", "version", "outcome")]
    op.create_table("counts", *keys, *_wholes("n"), *_floats("latency_s"), sqlite_with_rowid=False)


def create_training(op: Operations) -> None:
    """Versions, the runs that made them, and the leases that keep runs apart."""
    op.create_table(
        "versions",
        _seq(),
        *_texts("name", "task", "status", "adapter", "base_model"),
        *_wholes("trained_on", "held_out"),
        *_texts("data_digest"),
        Column("mlflow_version", Text),
        *_texts("reason", "record"),
        *_floats("created_at"),
        Column("remote_model", Text),
    )
    op.create_index("versions_name", "versions", ["task", "name"], unique=True)
    op.create_table(
        "runs",
        _seq(),
        *_texts("id", "task", "state", "step", "reason"),
        *_wholes("data_high_water", "corpus_size"),
        *_texts("data_digest"),
        Column("version", Text),
        Column("attempts", Integer, nullable=False),
        *_texts("error"),
        *_floats("started_at"),
        Column("finished_at", Float),
    )
    unfinished = text("state = 'running'")
    op.create_index("runs_id", "runs", ["id"], unique=True)
    op.create_index("runs_task", "runs", ["task", "seq"])
    op.create_index("runs_open", "runs", ["task"], unique=True, sqlite_where=unfinished, postgresql_where=unfinished)
    op.create_table(
        "leases", Column("name", Text, primary_key=True), *_texts("owner"), *_wholes("token"), *_floats("expires_at")
    )


def create_events(op: Operations) -> None:
    """What operators are told."""
    op.create_table(
        "events",
        _seq(),
        *_texts("id"),
        Column("task", Text),
        *_texts("kind", "level", "evidence"),
        *_floats("at"),
    )
    op.create_index("events_id", "events", ["id"], unique=True)


def create_ledger(op: Operations) -> None:
    """Caps, and every remote call that was paid for or may have been."""
    tokens = ("input_tokens", "output_tokens", "cached_tokens", "cache_write_tokens", "reasoning_tokens")
    op.create_table(
        "cap_windows",
        Column("key", Text, primary_key=True),
        *_texts("scope", "period", "start"),
        *_wholes("spent", "committed"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "calls",
        _seq(),
        *_texts("task", "provider", "model", "request_id", "owner", "day"),
        Column("state", Text, nullable=False, server_default="reserved"),
        *_wholes("worst_case"),
        *(Column(name, BigInteger, nullable=False, server_default="0") for name in ("cost", *tokens)),
        *_floats("created_at"),
        Column("ended_at", Float),
    )


def stop_input_digest(op: Operations) -> None:
    """Nobody asks for it: examples come without it. Processes of the release before still bring it."""
    if op.get_bind().dialect.name == "postgresql":
        op.alter_column("examples", "input_digest", server_default="")
        return
    # SQLite cannot give a column a default later on; a copy of the table can have one.
    with op.batch_alter_table("examples", recreate="always") as batch:
        batch.alter_column("input_digest", existing_type=Text, existing_nullable=False, server_default="")


_TOKENS = ("input_tokens", "output_tokens", "cached_tokens", "cache_write_tokens", "reasoning_tokens")


def create_totals(op: Operations) -> None:
    """Running totals, kept by triggers: an older process that still writes to this store is counted as well."""
    keys = ("task", "day", "provider", "model", "state")
    sums = ("calls", "cost", *_TOKENS)
    op.create_table(
        "call_totals",
        *(Column(name, Text, primary_key=True) for name in keys),
        *_wholes(*sums),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "example_totals", Column("task", Text, primary_key=True), *_wholes("kept", "ever"), sqlite_with_rowid=False
    )
    unfinished = text("state = 'reserved'")
    op.create_index("calls_open", "calls", ["task"], sqlite_where=unfinished, postgresql_where=unfinished)
    columns = ", ".join((*keys, *sums))
    ended = ", ".join((*keys, "count(*)", "sum(cost)", *(f"sum({name})" for name in _TOKENS)))
    op.execute(
        f"INSERT INTO call_totals ({columns}) SELECT {ended} FROM calls WHERE state <> 'reserved' "
        f"GROUP BY {', '.join(keys)}"
    )
    op.execute(
        "INSERT INTO example_totals (task, kept, ever) SELECT task, count(*), count(*) FROM examples GROUP BY task"
    )
    new = ", ".join((*(f"NEW.{name}" for name in keys), "1", "NEW.cost", *(f"NEW.{name}" for name in _TOKENS)))
    added = ", ".join(f"{name} = call_totals.{name} + excluded.{name}" for name in sums)
    _on(
        op,
        "count_ended_call",
        "AFTER UPDATE ON calls",
        f"INSERT INTO call_totals ({columns}) VALUES ({new}) ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {added}",
        when="OLD.state = 'reserved' AND NEW.state <> 'reserved'",
    )
    _on(
        op,
        "count_example",
        "AFTER INSERT ON examples",
        "INSERT INTO example_totals (task, kept, ever) VALUES (NEW.task, 1, 1) "
        "ON CONFLICT (task) DO UPDATE SET kept = example_totals.kept + 1, ever = example_totals.ever + 1",
    )
    _on(
        op,
        "count_deleted_example",
        "AFTER DELETE ON examples",
        "UPDATE example_totals SET kept = kept - 1 WHERE task = OLD.task",
    )


def _on(op: Operations, name: str, event: str, statement: str, *, when: str | None = None) -> None:
    """Make a trigger: ``statement`` runs for each row of ``event`` that meets ``when``."""
    condition = f" WHEN ({when})" if when else ""
    if op.get_bind().dialect.name == "postgresql":
        body = f"BEGIN {statement}; RETURN NULL; END"
        op.execute(f"CREATE FUNCTION apprentice_{name}() RETURNS trigger LANGUAGE plpgsql AS $$ {body} $$")
        op.execute(f"CREATE TRIGGER {name} {event} FOR EACH ROW{condition} EXECUTE FUNCTION apprentice_{name}()")
    else:
        op.execute(f"CREATE TRIGGER {name} {event} FOR EACH ROW{condition} BEGIN {statement}; END")


def create_version_states(op: Operations) -> None:
    """Trust belongs to a version, whatever is champion. A task's own row goes on to hold a copy of its champion's."""
    op.create_table(
        "version_states",
        Column("task", Text, primary_key=True),
        Column("version", Text, primary_key=True),
        Column("phase", Integer, nullable=False),
        Column("threshold", Float),
        *_floats("sampling_rate"),
        *_wholes("revision"),
        *_floats("updated_at"),
        *_texts("trust"),
    )
    op.execute(
        "INSERT INTO version_states (task, version, phase, threshold, sampling_rate, revision, updated_at, trust) "
        "SELECT task, champion, phase, threshold, sampling_rate, revision, updated_at, trust FROM tasks "
        "WHERE champion IS NOT NULL"
    )


def create_version_holds(op: Operations) -> None:
    """Which processes use which version on a shared server."""
    keys = [Column(name, Text, primary_key=True) for name in ("server", "version", "owner")]
    op.create_table(
        "version_holds",
        *keys,
        Column("loaded", Integer, nullable=False),
        *_floats("expires_at"),
        sqlite_with_rowid=False,
    )


def bind_caps_and_name_windows(op: Operations) -> None:
    """Keep the caps beside their windows, so that a lower one binds processes that started before.

    And say in every call which windows hold it, so that it can be released. Everything new has a default: an Apprentice
    that was started earlier goes on reserving and settling.
    """
    op.create_table(
        "caps",
        Column("key", Text, primary_key=True),
        Column("cap", BigInteger),
        *_floats("configured_at"),
        sqlite_with_rowid=False,
    )
    for name in ("windows", "reason"):
        op.add_column("calls", Column(name, Text, nullable=False, server_default=""))
    # A call that a person released, and whose owner came to tell what it cost: out of one total, into another.
    keys = ("task", "day", "provider", "model")
    same = " AND ".join(f"{name} = NEW.{name}" for name in keys)
    sums = ("calls", "cost", *_TOKENS)
    new = ", ".join((*(f"NEW.{name}" for name in (*keys, "state")), "1", "NEW.cost", *(f"NEW.{n}" for n in _TOKENS)))
    added = ", ".join(f"{name} = call_totals.{name} + excluded.{name}" for name in sums)
    _on(
        op,
        "count_call_of_the_living",
        "AFTER UPDATE ON calls",
        f"UPDATE call_totals SET calls = calls - 1 WHERE {same} AND state = 'released'; "
        f"INSERT INTO call_totals ({', '.join((*keys, 'state', *sums))}) VALUES ({new}) "
        f"ON CONFLICT ({', '.join((*keys, 'state'))}) DO UPDATE SET {added}",
        when="OLD.state = 'released' AND NEW.state <> 'released'",
    )


def create_promotions(op: Operations) -> None:
    """Who became champion, when and by whom. Of older ones only the order in which they were trained is known."""
    op.create_table(
        "promotions",
        _seq(),
        *_texts("task", "version"),
        Column("previous", Text),
        *_texts("was", "how", "by", "reason"),
        *_floats("at"),
    )
    op.create_index("promotions_task", "promotions", ["task", "seq"])
    op.execute(
        "INSERT INTO promotions (task, version, was, how, by, reason, at) "
        "SELECT task, name, 'candidate', 'gate', '', reason, created_at FROM versions "
        "WHERE status IN ('retired', 'champion') ORDER BY CASE status WHEN 'champion' THEN 1 ELSE 0 END, seq"
    )
    op.add_column("runs", Column("promotions_seen", BigInteger, nullable=False, server_default="0"))


def tell_kinds_of_runs(op: Operations) -> None:
    """All runs so far trained an adapter."""
    op.add_column("runs", Column("kind", Text, nullable=False, server_default="train"))


def create_second_answers(op: Operations) -> None:
    """What the remote said when it was asked more than once."""
    op.create_table(
        "second_answers",
        _seq(),
        *_texts("id", "task", "cause"),
        Column("turn", Integer, nullable=False),
        *_texts("request_id", "first", "output"),
        Column("local", Text),
        *(Column(name, Float) for name in ("score", "side", "chance", "local_score")),
        *_floats("probability", "sampling_rate"),
        *_texts("version", "provider", "model"),
        *_floats("first_at", "created_at"),
    )
    op.create_index("second_answers_task", "second_answers", ["task", "cause", "seq"])
    op.create_index("second_answers_id", "second_answers", ["id"], unique=True)


def tell_halves_apart(op: Operations) -> None:
    """Which half of the student answered. Of answers from before, and of older processes, nobody knows."""
    keys = [Column(name, Text, primary_key=True) for name in ("task", "day", "version", "answered_by")]
    op.create_table("local_answers", *keys, *_wholes("n"), sqlite_with_rowid=False)
    op.add_column("comparisons", Column("answered_by", Text, nullable=False, server_default=""))


_STEPS: tuple[Callable[[Operations], None], ...] = (
    create_tasks,
    create_examples,
    create_comparisons,
    create_counts,
    create_training,
    create_events,
    create_ledger,
    stop_input_digest,
    create_totals,
    create_version_states,
    create_version_holds,
    bind_caps_and_name_windows,
    create_promotions,
    tell_kinds_of_runs,
    create_second_answers,
    tell_halves_apart,
)
LATEST = len(_STEPS)


def drop_input_digest(op: Operations) -> None:
    """What `stop_input_digest` made optional."""
    if "input_digest" in {column["name"] for column in inspect(op.get_bind()).get_columns("examples")}:
        op.drop_column("examples", "input_digest")


# Each may find its work done already.
_CONTRACTIONS: tuple[Callable[[Operations], None], ...] = (drop_input_digest,)

# Any number will do, as long as every Apprentice takes the same.
_ADVISORY_LOCK = 7_233_480_114


def migrate(database: Database) -> None:
    """Bring the store to the latest shape. Raises `StoreError` where a newer Apprentice wrote it."""
    if _is_current(database):
        return  # the usual case, without loading Alembic
    if database.read_only:
        raise StoreError("the store was written by an older Apprentice; open it once with write access to migrate it")
    with _operations(database) as op:
        connection = op.get_bind()
        connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL)")
        found = connection.exec_driver_sql("SELECT max(version) FROM schema_version").scalar() or 0
        _refuse_newer(found)
        for step in _STEPS[found:]:
            step(op)
        if found == 0:
            for step in _CONTRACTIONS:
                step(op)
        connection.exec_driver_sql("DELETE FROM schema_version")
        connection.exec_driver_sql(f"INSERT INTO schema_version VALUES ({LATEST})")


def contract(database: Database) -> None:
    """Take away what only releases before this one use. No process of such a release may be left: it would fail."""
    migrate(database)
    with _operations(database) as op:
        for step in _CONTRACTIONS:
            step(op)


@contextmanager
def _operations(database: Database) -> Iterator[Operations]:
    """Alembic's operations in one transaction, which no other process migrates beside. Raises `StoreError`."""
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext

    with database.driver_connection() as driver:
        engine = create_engine(
            f"{database.url.get_backend_name()}{'+psycopg' if database.dialect_name == 'postgresql' else ''}://",
            creator=lambda: driver,
            poolclass=StaticPool,
            isolation_level="AUTOCOMMIT",
        )
        try:
            with engine.connect() as connection:
                connection.exec_driver_sql("BEGIN" if database.dialect_name == "postgresql" else "BEGIN IMMEDIATE")
                if database.dialect_name == "postgresql":
                    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})")
                yield Operations(MigrationContext.configure(connection))
                connection.exec_driver_sql("COMMIT")
        except SQLAlchemyError as error:
            cause = getattr(error, "orig", None) or error
            raise StoreError(f"the store cannot be brought to its latest shape: {cause}") from scrub_error(error)


def _is_current(database: Database) -> bool:
    try:
        with database.read() as tx:
            row = tx.run_text("SELECT max(version) FROM schema_version").fetchone()
    except StoreError as error:
        if "schema_version" in str(error):
            return False  # a new store: the table is not there yet
        raise
    _refuse_newer(row[0] or 0)
    return bool(row[0] == LATEST)


def _refuse_newer(found: int) -> None:
    if found > LATEST:
        raise StoreError(
            f"the store was written by a newer Apprentice (its shape is {found}, this one knows {LATEST}); "
            "upgrade this installation, or point `store` at another database"
        )
