"""What the remote said when it was asked again."""

from __future__ import annotations

import json

from sqlalchemy import bindparam, func, select, update
from sqlalchemy.dialects.postgresql import insert as upsert

from apprentice.confidence.ceiling import Pair
from apprentice.store.database import Transaction
from apprentice.store.examples import dumps
from apprentice.store.records import SecondAnswer
from apprentice.store.tables import second_answers

__all__ = ["add", "count", "newest", "pairs", "score"]

_add = upsert(second_answers).on_conflict_do_nothing(index_elements=["id"])
_columns = [c for c in second_answers.columns if c.name != "seq"]
_names = [c.name for c in (*_columns, second_answers.c.seq)]
_of = (second_answers.c.task == bindparam("b_task"), second_answers.c.cause == bindparam("b_cause"))
_newest = (
    select(*_columns, second_answers.c.seq)
    .where(*_of)
    .order_by(second_answers.c.seq.desc())
    .limit(bindparam("b_limit"))
)
_SCORES = ("score", "side", "chance", "local_score")
_score = (
    update(second_answers)
    .where(second_answers.c.id == bindparam("b_id"))
    .values({name: bindparam(f"b_{name}") for name in _SCORES})
)
_count = select(func.count()).where(*_of)
_pairs = (
    select(
        second_answers.c.score,
        second_answers.c.chance,
        second_answers.c.probability,
        second_answers.c.sampling_rate,
        second_answers.c.local_score,
    )
    .where(
        *_of,
        second_answers.c.first_at >= bindparam("b_since"),
        second_answers.c.score.is_not(None),
        second_answers.c.chance.is_not(None),
    )
    .order_by(second_answers.c.seq.desc())
    .limit(bindparam("b_limit"))
)


def add(tx: Transaction, s: SecondAnswer) -> None:
    row = {name: getattr(s, name) for name in _names if name != "seq"}
    for name in ("first", "output", "local"):
        row[name] = None if row[name] is None else dumps(row[name])
    tx.run(_add, row)


def score(tx: Transaction, s: SecondAnswer) -> None:
    values = {f"b_{name}": getattr(s, name) for name in _SCORES}
    tx.run(_score, {"b_id": s.id, **values})


def newest(tx: Transaction, task: str, cause: str, limit: int) -> list[SecondAnswer]:
    found = []
    for row in tx.run(_newest, {"b_task": task, "b_cause": cause, "b_limit": limit}).fetchall():
        values = dict(zip(_names, row, strict=True))
        for name in ("first", "output", "local"):
            values[name] = None if values[name] is None else json.loads(values[name])
        found.append(SecondAnswer(**values))
    return found


def count(tx: Transaction, task: str, cause: str) -> int:
    return int(tx.run(_count, {"b_task": task, "b_cause": cause}).fetchone()[0])


def pairs(tx: Transaction, task: str, since: float, limit: int) -> list[Pair]:
    """The newest requests that were asked twice at once, the oldest of them first."""
    rows = tx.run(_pairs, {"b_task": task, "b_cause": "", "b_since": since, "b_limit": limit}).fetchall()
    return [
        Pair(score, chance, min(1.0, rate / probability), local)
        for score, chance, probability, rate, local in reversed(rows)
    ]
