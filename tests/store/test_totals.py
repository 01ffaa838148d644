"""The running totals are what a sum over the raw rows gives, whoever wrote them and in whatever order."""

from __future__ import annotations

import random
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

from apprentice.store import CapWindow, ExampleRecord, Reservation, Settlement, Store, Usage, migrations
from apprentice.store.database import open_database

CAP = CapWindow("|total|", "", "total", "", Decimal(1000))


def reserve(store: Store, task: str, day: str, provider: str, amount: str) -> Reservation:
    held = store.reserve(
        task=task,
        provider=provider,
        model="m",
        request_id="r",
        owner="me",
        day=day,
        worst_case=Decimal(amount),
        windows=[CAP],
    )
    assert held is not None
    return held


def from_raw_rows(url: str) -> tuple[dict[Any, Any], dict[str, tuple[int, Decimal]], dict[str, int]]:
    """Sums over `calls` and `examples` by hand: (ended, open by task, examples by task)."""
    database = open_database(url)
    with database.read() as tx:
        calls = tx.run_text(
            "SELECT task, day, provider, model, state, cost, worst_case, input_tokens, output_tokens, cached_tokens, "
            "cache_write_tokens, reasoning_tokens FROM calls"
        ).fetchall()
        examples = tx.run_text("SELECT task FROM examples").fetchall()
    database.close()
    ended: dict[Any, Any] = defaultdict(lambda: (0, Decimal(0), Usage()))
    held: dict[str, tuple[int, Decimal]] = {}
    for task, day, provider, model, state, cost, worst_case, *tokens in calls:
        if state == "reserved":
            n, amount = held.get(task, (0, Decimal(0)))
            held[task] = (n + 1, amount + Decimal(worst_case) / 10**9)
        else:
            n, total, usage = ended[task, day, provider, model, state]
            ended[task, day, provider, model, state] = (n + 1, total + Decimal(cost) / 10**9, usage + Usage(*tokens))
    of_task: dict[str, int] = defaultdict(int)
    for (task,) in examples:
        of_task[task] += 1
    return dict(ended), held, dict(of_task)


def check(store: Store, url: str) -> None:
    ended, held, examples = from_raw_rows(url)
    rows = {(r.task, r.day, r.provider, r.model, r.state): (r.calls, r.cost, r.usage) for r in store.spend()}
    assert rows == ended
    assert {h.task: (h.calls, h.amount) for h in store.held()} == held
    assert {task: store.example_totals(task).kept for task in examples} == examples


def test_totals_are_the_sums_of_the_rows(store: Store, url: str) -> None:
    """Random calls from four threads that end in every way, some twice, some never; then examples deleted."""
    store.open_windows([CAP])

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for n in range(40):
            task, day = draw.choice("ab"), draw.choice(["2026-03-01", "2026-03-02"])
            calls = [reserve(store, task, day, draw.choice(["x", "y training"]), "0.25") for _ in range(2)]
            ends: list[Settlement] = []
            for held in calls:
                state: Any = draw.choice(["settled", "lost", "released", None])
                if state is not None:
                    usage = Usage(*(draw.randrange(50) for _ in range(5))) if state == "settled" else Usage()
                    ends.append(Settlement(held, state, Decimal(draw.randrange(10**8)) / 10**9, usage))
            if draw.random() < 0.5:
                example = ExampleRecord(f"{seed}/{n}", task, {"text": "t"}, {"label": "l"}, "x", "m", 1.0)
                store.complete_remote(settlements=ends, example=example)
            else:
                store.end_calls(ends)
            store.end_calls(ends[:1])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    check(store, url)
    before = store.example_totals("a")
    database = open_database(url)
    with database.write() as tx:
        gone = tx.run_text("DELETE FROM examples WHERE task = 'a'").rowcount
    database.close()
    assert (before.kept, before.ever) == (gone, gone)
    assert (store.example_totals("a").kept, store.example_totals("a").ever) == (0, gone)
    check(store, url)


def test_spent_never_falls(store: Store) -> None:
    """Whatever happens to calls: what they hold comes and goes in `held`, and spent only grows."""
    store.open_windows([CAP])
    draw, spent, held = random.Random(7), Decimal(0), Decimal(0)
    open_calls: list[Reservation] = []
    for _ in range(60):
        if not open_calls or draw.random() < 0.5:
            open_calls.append(reserve(store, "a", "2026-03-01", "x", "0.5"))
        else:
            end: Any = draw.choice(["settled", "lost", "released"])
            call = open_calls.pop(draw.randrange(len(open_calls)))
            store.end_calls([Settlement(call, end, Decimal("0.1"))])
        now = sum((row.cost for row in store.spend()), Decimal(0))
        assert now >= spent
        spent = now
        held = sum((row.amount for row in store.held()), Decimal(0))
        state = store.window_states([CAP.key])[CAP.key]
        assert (state.spent, state.committed) == (spent, spent + held)
    assert held == Decimal("0.5") * len(open_calls) > 0


def test_a_store_that_had_calls_before_there_were_totals(url: str, clock: Any, monkeypatch: Any) -> None:
    """The step that brings the totals sums up what is there; a process of before goes on, and is counted too."""
    steps = migrations._STEPS
    before = steps[: steps.index(migrations.create_totals)]
    monkeypatch.setattr(migrations, "_STEPS", before)
    monkeypatch.setattr(migrations, "LATEST", len(before))
    Store.open(url, clock=clock).close()
    monkeypatch.undo()
    old = open_database(url)

    def write(*statements: str) -> None:
        with old.write() as tx:
            for statement in statements:
                tx.run_text(statement)

    def end(seq: int, state: str, cost: int, read: int, written: int) -> str:
        return (
            f"UPDATE calls SET state = '{state}', cost = {cost}, input_tokens = {read}, output_tokens = {written} "
            f"WHERE seq = {seq} AND state = 'reserved'"
        )

    one_call = (
        "INSERT INTO calls (task, provider, model, request_id, owner, day, worst_case, created_at) "
        "VALUES ('a', 'x', 'm', 'r', 'me', '2026-03-01', 250000000, 1.0)"
    )
    example = (
        "INSERT INTO examples (id, task, input, output, provider, model, created_at) "
        """VALUES ('1', 'a', '{"text": "t"}', '{"label": "l"}', 'x', 'm', 1.0)"""
    )
    write(*[one_call] * 4, end(1, "settled", 100000000, 10, 2), end(2, "lost", 250000000, 0, 0), example)
    with Store.open(url, clock=clock) as new:
        check(new, url)
        write(end(3, "settled", 200000000, 20, 4), example)
        check(new, url)
        assert sum(row.cost for row in new.spend()) == Decimal("0.55")
    old.close()
