"""What it all comes to: money by task, day, model and end, and how many examples there are.

Read from running totals, which triggers keep (see `migrations`): what a status page or a health check costs does not
grow with the history. What is merely held for calls in flight is in none of these sums; `held` has it.
"""

from __future__ import annotations

from decimal import Decimal

from sqlalchemy import bindparam, func, select

from apprentice.store.database import Transaction
from apprentice.store.records import NANO, ExampleTotals, Held, SpendRow, Usage
from apprentice.store.tables import call_totals, calls, example_totals

__all__ = ["examples_of", "held", "spend"]

_spend = (
    select(call_totals)
    .where(call_totals.c.day >= bindparam("b_since"))
    .order_by(call_totals.c.day, call_totals.c.task, call_totals.c.provider, call_totals.c.model, call_totals.c.state)
)
_held = (
    select(calls.c.task, func.count(), func.sum(calls.c.worst_case), func.min(calls.c.created_at))
    .where(calls.c.state == "reserved")
    .group_by(calls.c.task)
    .order_by(calls.c.task)
)
_examples_of = select(example_totals.c.kept, example_totals.c.ever).where(example_totals.c.task == bindparam("b_task"))


def spend(tx: Transaction, since_day: str) -> list[SpendRow]:
    """The calls that have ended since a day, by task, day, provider, model and end."""
    rows = tx.run(_spend, {"b_since": since_day}).fetchall()
    return [
        SpendRow(task, day, provider, model, state, n, Decimal(cost) / NANO, Usage(*tokens))
        for task, day, provider, model, state, n, cost, *tokens in rows
    ]


def held(tx: Transaction) -> list[Held]:
    """What calls that have not ended hold, by task."""
    rows = tx.run(_held).fetchall()
    return [Held(task, n, Decimal(int(amount)) / NANO, oldest) for task, n, amount, oldest in rows]


def examples_of(tx: Transaction, task: str) -> ExampleTotals:
    """How many examples a task has, and how many it ever got."""
    row = tx.run(_examples_of, {"b_task": task}).fetchone()
    return ExampleTotals(*row) if row else ExampleTotals(0, 0)
