"""The tables, as SQLAlchemy Core knows them; `migrations` brings them about.

Column types are few on purpose: integers, floats and text pass through both drivers unchanged, so statements can be
compiled once and run on the driver itself (see `database`). Money is whole nano-dollars.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Float, Index, Integer, MetaData, Table, Text

__all__ = [
    "call_totals",
    "calls",
    "cap_windows",
    "caps",
    "comparisons",
    "counts",
    "events",
    "example_totals",
    "examples",
    "leases",
    "local_answers",
    "metadata",
    "promotions",
    "runs",
    "second_answers",
    "tasks",
    "version_holds",
    "version_states",
    "versions",
]

metadata = MetaData()

# SQLite's rowid alias must be spelt INTEGER; it holds 64 bits all the same.
_Seq = BigInteger().with_variant(Integer(), "sqlite")


def _seq() -> Column[int]:
    return Column("seq", _Seq, primary_key=True, autoincrement=True)


# ``champion`` is the version that is wanted. The numbers beside it are a copy of that version's row in
# ``version_states``, for processes from before there was one; see `states`.
tasks = Table(
    "tasks",
    metadata,
    Column("task", Text, primary_key=True),
    Column("phase", Integer, nullable=False),
    Column("champion", Text),
    Column("threshold", Float),
    Column("sampling_rate", Float, nullable=False),
    Column("trust", Text, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("training_due", Text),
    Column("updated_at", Float, nullable=False),
)

# Where each version of a task stands. The trust comes last: who reads the numbers does not read through it.
version_states = Table(
    "version_states",
    metadata,
    Column("task", Text, primary_key=True),
    Column("version", Text, primary_key=True),
    Column("phase", Integer, nullable=False),
    Column("threshold", Float),
    Column("sampling_rate", Float, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("updated_at", Float, nullable=False),
    Column("trust", Text, nullable=False),
)

examples = Table(
    "examples",
    metadata,
    _seq(),
    Column("id", Text, nullable=False),
    Column("task", Text, nullable=False),
    Column("input", Text, nullable=False),
    Column("output", Text, nullable=False),
    Column("provider", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("created_at", Float, nullable=False),
)
Index("examples_task", examples.c.task, examples.c.seq)

comparisons = Table(
    "comparisons",
    metadata,
    _seq(),
    Column("id", Text, nullable=False),
    Column("task", Text, nullable=False),
    Column("request_id", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("score", Float),
    Column("parts", Text, nullable=False),
    Column("confidence", Float, nullable=False),
    Column("local", Text, nullable=False),
    Column("remote", Text, nullable=False),
    Column("probability", Float, nullable=False),
    Column("sampling_rate", Float, nullable=False),
    Column("served", Integer, nullable=False),
    Column("seeded", Integer, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("answered_by", Text, nullable=False, server_default=""),  # head, lora or both; "" where nobody said
)
Index("comparisons_task", comparisons.c.task, comparisons.c.seq)
Index("comparisons_version", comparisons.c.task, comparisons.c.version, comparisons.c.seq)
_disagrees = comparisons.c.score < 1
Index(
    "comparisons_disagreeing",
    comparisons.c.task,
    comparisons.c.seq,
    sqlite_where=_disagrees,
    postgresql_where=_disagrees,
)

# What the remote said when it was asked a second or a third time, beside what it had said at first. Of a request that
# was asked twice at once ``cause`` is ""; else it is the event that had stored inputs asked again.
second_answers = Table(
    "second_answers",
    metadata,
    _seq(),
    Column("id", Text, nullable=False),
    Column("task", Text, nullable=False),
    Column("cause", Text, nullable=False),
    Column("turn", Integer, nullable=False),
    Column("request_id", Text, nullable=False),
    Column("first", Text, nullable=False),
    Column("output", Text, nullable=False),
    Column("local", Text),
    Column("score", Float),
    Column("side", Float),
    Column("chance", Float),
    Column("local_score", Float),
    Column("probability", Float, nullable=False),
    Column("sampling_rate", Float, nullable=False),
    Column("version", Text, nullable=False),
    Column("provider", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("first_at", Float, nullable=False),
    Column("created_at", Float, nullable=False),
)
Index("second_answers_task", second_answers.c.task, second_answers.c.cause, second_answers.c.seq)
Index("second_answers_id", second_answers.c.id, unique=True)

counts = Table(
    "counts",
    metadata,
    Column("task", Text, primary_key=True),
    Column("day", Text, primary_key=True),
    Column("version", Text, primary_key=True),
    Column("outcome", Text, primary_key=True),
    Column("n", BigInteger, nullable=False),
    Column("latency_s", Float, nullable=False),
    sqlite_with_rowid=False,
)

# Which half of the student gave the answers that callers got from the local model: counted beside `counts`, so that who
# sums up requests need not know of halves.
local_answers = Table(
    "local_answers",
    metadata,
    Column("task", Text, primary_key=True),
    Column("day", Text, primary_key=True),
    Column("version", Text, primary_key=True),
    Column("answered_by", Text, primary_key=True),
    Column("n", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

versions = Table(
    "versions",
    metadata,
    _seq(),
    Column("name", Text, nullable=False),
    Column("task", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("adapter", Text, nullable=False),
    Column("base_model", Text, nullable=False),
    Column("trained_on", BigInteger, nullable=False),
    Column("held_out", BigInteger, nullable=False),
    Column("data_digest", Text, nullable=False),
    Column("mlflow_version", Text),
    Column("reason", Text, nullable=False),
    Column("record", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("remote_model", Text),
)
Index("versions_name", versions.c.task, versions.c.name, unique=True)

# Every change of champion, in the order in which they happened: what a rollback goes back along.
promotions = Table(
    "promotions",
    metadata,
    _seq(),
    Column("task", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("previous", Text),
    Column("was", Text, nullable=False),
    Column("how", Text, nullable=False),
    Column("by", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", Float, nullable=False),
)
Index("promotions_task", promotions.c.task, promotions.c.seq)

runs = Table(
    "runs",
    metadata,
    _seq(),
    Column("id", Text, nullable=False),
    Column("task", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("step", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("data_high_water", BigInteger, nullable=False),
    Column("corpus_size", BigInteger, nullable=False),
    Column("data_digest", Text, nullable=False),
    Column("version", Text),
    Column("attempts", Integer, nullable=False),
    Column("error", Text, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("finished_at", Float),
    Column("promotions_seen", BigInteger, nullable=False, server_default="0"),
    Column("kind", Text, nullable=False, server_default="train"),
)
Index("runs_id", runs.c.id, unique=True)
Index("runs_task", runs.c.task, runs.c.seq)
# One unfinished run per task: the database itself says so, whatever happens to leases.
_unfinished = runs.c.state == "running"
Index("runs_open", runs.c.task, unique=True, sqlite_where=_unfinished, postgresql_where=_unfinished)

leases = Table(
    "leases",
    metadata,
    Column("name", Text, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("token", BigInteger, nullable=False),
    Column("expires_at", Float, nullable=False),
)

version_holds = Table(
    "version_holds",
    metadata,
    Column("server", Text, primary_key=True),
    Column("version", Text, primary_key=True),
    Column("owner", Text, primary_key=True),
    Column("loaded", Integer, nullable=False),  # 1: Apprentice loaded it there, so the last holder unloads it
    Column("expires_at", Float, nullable=False),
    sqlite_with_rowid=False,
)

events = Table(
    "events",
    metadata,
    _seq(),
    Column("id", Text, nullable=False),
    Column("task", Text),
    Column("kind", Text, nullable=False),
    Column("level", Text, nullable=False),
    Column("evidence", Text, nullable=False),
    Column("at", Float, nullable=False),
)
Index("events_id", events.c.id, unique=True)

# One row per cap there may be ("scope|period"), as the newest configuration has it: NULL where it has none.
caps = Table(
    "caps",
    metadata,
    Column("key", Text, primary_key=True),
    Column("cap", BigInteger),
    Column("configured_at", Float, nullable=False),
    sqlite_with_rowid=False,
)

# One row per cap and period. committed = spent + what calls in flight may still cost; no reservation lifts it above
# the cap.
cap_windows = Table(
    "cap_windows",
    metadata,
    Column("key", Text, primary_key=True),
    Column("scope", Text, nullable=False),
    Column("period", Text, nullable=False),
    Column("start", Text, nullable=False),
    Column("spent", BigInteger, nullable=False),
    Column("committed", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

# One row per remote call that was paid for or may have been: the ledger.
calls = Table(
    "calls",
    metadata,
    _seq(),
    Column("task", Text, nullable=False),
    Column("provider", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("request_id", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Column("day", Text, nullable=False),
    Column("state", Text, nullable=False, server_default="reserved"),  # then settled, released or lost
    Column("worst_case", BigInteger, nullable=False),
    Column("cost", BigInteger, nullable=False, server_default="0"),
    Column("input_tokens", BigInteger, nullable=False, server_default="0"),
    Column("output_tokens", BigInteger, nullable=False, server_default="0"),
    Column("cached_tokens", BigInteger, nullable=False, server_default="0"),
    Column("cache_write_tokens", BigInteger, nullable=False, server_default="0"),
    Column("reasoning_tokens", BigInteger, nullable=False, server_default="0"),
    Column("created_at", Float, nullable=False),
    Column("ended_at", Float),
    # The keys of the windows that hold it, one a line, "-" for none; "" where an older Apprentice did not say.
    Column("windows", Text, nullable=False, server_default=""),
    Column("reason", Text, nullable=False, server_default=""),  # why a person released it
)
_open = calls.c.state == "reserved"
Index("calls_open", calls.c.task, sqlite_where=_open, postgresql_where=_open)

# What the ended calls of a day come to: kept by triggers on `calls`, so that every writer's calls are in it.
call_totals = Table(
    "call_totals",
    metadata,
    Column("task", Text, primary_key=True),
    Column("day", Text, primary_key=True),
    Column("provider", Text, primary_key=True),
    Column("model", Text, primary_key=True),
    Column("state", Text, primary_key=True),  # settled, released or lost
    *(
        Column(name, BigInteger, nullable=False)
        for name in (
            *("calls", "cost"),
            *("input_tokens", "output_tokens", "cached_tokens", "cache_write_tokens", "reasoning_tokens"),
        )
    ),
    sqlite_with_rowid=False,
)

# How many examples a task has, and how many it ever got: kept by triggers on `examples`.
example_totals = Table(
    "example_totals",
    metadata,
    Column("task", Text, primary_key=True),
    Column("kept", BigInteger, nullable=False),
    Column("ever", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
