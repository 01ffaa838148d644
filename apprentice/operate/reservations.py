"""`apprentice budget` and `apprentice release`: the caps, what calls hold of them, and giving that back by hand."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from apprentice.money.budget import NEVER, Budget, CapState
from apprentice.money.owner import is_dead
from apprentice.settings.config import Settings
from apprentice.store import Store
from apprentice.store.records import Reservation

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["OpenCall", "budget_page", "open_calls", "run_budget", "run_release"]


@dataclass(frozen=True, slots=True)
class OpenCall:
    """A call that has not ended. ``owner_lives`` is None where this machine cannot tell."""

    id: int
    task: str
    provider: str
    model: str
    amount: Decimal
    owner: str
    owner_lives: bool | None
    age_s: float
    request: str


def open_calls(store: Store, now: float) -> list[OpenCall]:
    """Every call that has not ended, the oldest first, as of ``now`` (Unix seconds)."""
    return [_open_call(held, now) for held in store.open_calls()]


def _open_call(held: Reservation, now: float) -> OpenCall:
    dead = is_dead(held.owner)
    return OpenCall(
        id=held.id,
        task=held.task,
        provider=held.provider,
        model=held.model,
        amount=held.worst_case,
        owner=held.owner,
        owner_lives=None if dead is None else not dead,
        age_s=max(now - held.created_at, 0.0),
        request=held.request_id,
    )


def budget_page(caps: list[CapState], calls: list[OpenCall]) -> Group:
    """The caps and the open calls for a terminal."""
    from rich.console import Group
    from rich.table import Table

    from apprentice.operate.report import money

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("cap", "of"):
        table.add_column(name)
    for name in ("limit", "spent", "held", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("resets", no_wrap=True)
    for cap in caps:
        resets = f"{cap.resets_at:%Y-%m-%d %H:%M}" if cap.resets_at < NEVER else "never"
        amounts = (money(cap.cap), money(cap.spent), money(cap.reserved), money(cap.remaining))
        table.add_row(cap.period, cap.scope or "all tasks", *amounts, resets)
    if not caps:
        table.add_row("none", "", "", "", "", "", "")
    held = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("id", "holds", "age"):
        held.add_column(name, justify="right", no_wrap=True)
    for name in ("task", "model", "process"):
        held.add_column(name, overflow="fold")
    for call in calls:
        state = {True: "lives", False: "[red]is gone[/red]", None: "on another machine, or unknown"}[call.owner_lives]
        held.add_row(
            str(call.id),
            money(call.amount),
            _age(call.age_s),
            call.task,
            f"{call.provider} {call.model}",
            f"{call.owner} ({state})",
        )
    if not calls:
        return Group(table, "\nNo call holds anything.")
    advice = "Of a process that is gone: `apprentice release ID --reason ...`, after a look at the vendor's bill."
    return Group(table, "\nCalls that have not ended:", held, advice)


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def run_budget(settings: Settings, *, as_json: bool) -> None:
    """`apprentice budget`: reads the store, and puts no caps in force."""
    import click
    from rich.console import Console

    with Store.open(settings.store_url) as store:
        caps = _budget(settings, store).remaining()
        calls = open_calls(store, time.time())
    if as_json:
        click.echo(json.dumps({"caps": [_plain(cap) for cap in caps], "open_calls": [_plain(c) for c in calls]}))
    else:
        Console(highlight=False).print(budget_page(caps, calls))


def run_release(settings: Settings, number: int, reason: str) -> None:
    """`apprentice release`: give back what one open call holds. Raises `StoreError` where it is not open."""
    import click

    from apprentice.events.emitter import Events

    with Store.open(settings.store_url) as store:
        events = Events.configured(settings.alerts, store)
        told = _budget(settings, store).release_by_hand(number, reason)
        events.close()
    evidence = told.evidence
    click.echo(f"Released {evidence['amount']} USD that call {number} of task {told.task} held ({evidence['owner']}).")
    click.echo("Should its process come back and settle it, what it cost will count all the same.")


def _budget(settings: Settings, store: Store) -> Budget:
    return Budget(store, settings.budget, {task.name: task.budget for task in settings.tasks}, looks_only=True)


def _plain(one: CapState | OpenCall) -> dict[str, Any]:
    fields = {name: getattr(one, name) for name in one.__dataclass_fields__}
    if isinstance(one, CapState):
        fields["resets_at"] = one.resets_at.astimezone(UTC).isoformat() if one.resets_at < NEVER else None
    return {name: str(value) if isinstance(value, Decimal | datetime) else value for name, value in fields.items()}
