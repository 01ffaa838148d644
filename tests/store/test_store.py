"""Every method of the store, on SQLite and PostgreSQL alike."""

from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from apprentice.confidence.decision import Policy
from apprentice.confidence.phases import Phase
from apprentice.errors import StoreError
from apprentice.store import (
    CapWindow,
    Compared,
    ComparisonRecord,
    Count,
    EventRecord,
    ExampleRecord,
    Reservation,
    SecondAnswer,
    Settlement,
    StateChange,
    Store,
    TaskState,
    Usage,
    VersionRecord,
    migrations,
)


def example(n: int, task: str = "a", **values: Any) -> ExampleRecord:
    made = ExampleRecord(f"x{n}", task, {"text": f"t{n}"}, {"label": "l"}, "anthropic", "m", float(n))
    return replace(made, **values)


def comparison(n: int, score: float | None, version: str = "v1") -> ComparisonRecord:
    return ComparisonRecord(
        id=f"c{n}",
        task="a",
        request_id=f"r{n}",
        version=version,
        score=score,
        parts={"label": 1.0},
        confidence=0.75,
        local={"label": "l"},
        remote={"label": "m"},
        probability=0.5,
        sampling_rate=0.25,
        served=n % 2 == 0,
        seeded=False,
        created_at=float(n),
    )


def version(name: str, task: str = "a") -> VersionRecord:
    return VersionRecord(name, task, "candidate", f"/m/{name}", "base", 80, 20, "digest", "3", "", {"loss": 0.5}, 5.0)


def reserve(store: Store, cap: str = "1", amount: str = "0.25", task: str = "a") -> Reservation | None:
    window = CapWindow("|daily|2026-03-01", "", "daily", "2026-03-01", Decimal(cap))
    store.open_windows([window])
    return store.reserve(
        task=task,
        provider="anthropic",
        model="m",
        request_id="r",
        owner="me",
        day="2026-03-01",
        worst_case=Decimal(amount),
        windows=[window],
    )


def committed(store: Store) -> tuple[Decimal, Decimal]:
    state = store.window_states(["|daily|2026-03-01"])["|daily|2026-03-01"]
    return state.spent, state.committed


def test_a_new_task_collects(store: Store) -> None:
    """A task begins in phase 1 with every request checked, and ensuring it twice changes nothing."""
    store.ensure_tasks(["a", "b"])
    store.update_state("a", lambda s: s.change(phase=2))
    store.ensure_tasks(["a", "b", "c"])
    assert {name: row.champion for name, row in store.policies().items()} == {"a": None, "b": None, "c": None}
    assert store.policy_row("a").phase == 2
    fresh = store.policy_row("b")
    assert (fresh.champion, fresh.threshold, fresh.sampling_rate, fresh.trust, fresh.revision) == (None, None, 1, "", 0)


def test_an_unknown_task_is_an_error(store: Store) -> None:
    """A state that was never made is reported with the remedy."""
    with pytest.raises(StoreError, match="ensure_tasks"):
        store.policy_row("nowhere")


def test_a_change_of_state_carries_its_records(store: Store) -> None:
    """State, comparisons and events are written together, and the revision counts the change."""
    store.ensure_tasks(["a"])
    event = EventRecord("e1", "a", "phase", "info", {"from": 1}, 1.0)
    after = store.update_state(
        "a", lambda s: s.change(trust="T", threshold=0.5, comparisons=[comparison(1, 1.0)], events=[event])
    )
    assert after == store.policy_row("a")
    assert (after.trust, after.threshold, after.revision) == ("T", 0.5, 1)
    assert [c.id for c in store.comparisons("a")] == ["c1"]
    assert [(e.id, e.evidence) for e in store.events("a")] == [("e1", {"from": 1})]


def test_a_change_that_fails_leaves_nothing(store: Store) -> None:
    """An exception in the middle of a change rolls all of it back."""
    store.ensure_tasks(["a"])

    def bad(state: TaskState) -> StateChange:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        store.update_state("a", bad)
    assert store.policy_row("a").revision == 0


def test_a_write_inside_a_write_is_an_error(tmp_path: Path) -> None:
    """A change that itself writes to the store gets an error, where it could have hung for ever."""
    with Store.open(f"sqlite:///{tmp_path / 'x.db'}") as store:
        store.ensure_tasks(["a"])

        def nested(state: TaskState) -> StateChange:
            store.ensure_tasks(["b"])
            return state.change()

        with pytest.raises(StoreError, match="transaction"):
            store.update_state("a", nested)
        assert list(store.policies()) == ["a"]
        store.update_state("a", lambda s: s.change(phase=2))


def test_changes_from_many_threads_are_all_kept(store: Store) -> None:
    """Read-modify-write loses no update: eight threads add to one text."""
    store.ensure_tasks(["a"])

    def append(n: int) -> None:
        store.update_state("a", lambda s: s.change(trust=s.trust + f"{n},"))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(append, range(40)))
    state = store.policy_row("a")
    assert sorted(state.trust.split(",")[:-1], key=int) == [str(n) for n in range(40)]
    assert state.revision == 40


def test_examples_stream_in_order_and_resume(store: Store) -> None:
    """Examples come page by page in the order of their seq, from any cursor."""
    for n in range(25):
        store.add_example(example(n))
        store.add_example(example(n, "b"))
    every = list(store.examples("a", limit=7))
    assert [e.id for e in every] == [f"x{n}" for n in range(25)]
    assert every[3].input == {"text": "t3"}
    assert [e.seq for e in every] == sorted(e.seq for e in every)
    assert [e.id for e in store.examples("a", after=every[19].seq, limit=2)] == [f"x{n}" for n in range(20, 25)]
    assert (store.count_examples("a"), store.count_examples("a", after=every[19].seq)) == (25, 5)


def test_any_text_survives(store: Store) -> None:
    """Unicode, control characters and half a surrogate pair come back as they were."""
    value = {"text": "ñ 漢字 🎈 \x00 \ud800 \"quoted\" 'single' %s :name"}
    store.add_example(example(1, input=value))
    assert next(iter(store.examples("a"))).input == value


def test_readers_never_miss_an_example(store: Store) -> None:
    """A reader that follows the cursor while eight threads write sees every example exactly once."""
    done = threading.Event()
    seen: list[str] = []

    def follow() -> None:
        cursor = 0
        while True:
            finished = done.is_set()
            for e in store.examples("a", after=cursor, limit=5):
                seen.append(e.id)
                cursor = e.seq
            if finished:
                return

    reader = threading.Thread(target=follow)
    reader.start()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: store.add_example(example(n)), range(80)))
    done.set()
    reader.join()
    assert sorted(seen) == sorted(f"x{n}" for n in range(80))


def test_comparisons_come_newest_first(store: Store) -> None:
    """Comparisons are read back whole, by version and limit; disagreements are those below 1."""
    store.ensure_tasks(["a"])
    records = [comparison(0, 1.0), comparison(1, 0.5), comparison(2, None, "v2"), comparison(3, 0.0, "v2")]
    store.update_state("a", lambda s: s.change(comparisons=records))
    read = store.comparisons("a")
    assert [replace(c, seq=0) for c in read] == records[::-1]
    assert [c.id for c in store.comparisons("a", version="v1", limit=1)] == ["c1"]
    assert store.recent_disagreements("a", 5) == ["r3", "r1"]


def test_a_deferred_answer_was_overbought_and_a_spot_check_was_not(store: Store) -> None:
    """Only requests that are asked for, that somebody compared, and that were surer than a spot check are named."""
    store.ensure_tasks(["a"])
    deferred, checked = comparison(1, 0.0), replace(comparison(2, 1.0), probability=0.25)
    seeded, other = replace(comparison(3, 1.0), seeded=True), comparison(4, 1.0)
    store.update_state("a", lambda s: s.change(comparisons=[deferred, checked, seeded, other]))
    assert store.overbought("a", {"r1", "r2", "r3"}) == {"r1": (0.25, 0.5)}


def test_halves_add_up(store: Store) -> None:
    """Answers by day, comparisons by time: weighted by one over p, those that were trusted apart, held-out ones out."""
    store.ensure_tasks(["a"])
    store.add_counts(
        [
            Count("a", "2026-03-01", "v1", "local", 3, answered_by="head"),
            Count("a", "2026-03-01", "v1", "degraded", 1, answered_by="head"),
            Count("a", "2026-03-02", "v1", "local", 2, answered_by="both"),
            Count("a", "2026-03-02", "v1", "deferred", 9),
        ]
    )
    store.add_counts([Count("a", "2026-03-02", "v2", "local", 5, answered_by="head")])
    bought = [
        replace(comparison(n, score), answered_by=half, served=served, probability=p, seeded=seeded)
        for n, (score, half, served, p, seeded) in enumerate(
            [
                (1.0, "head", True, 0.5, False),
                (0.0, "head", True, 0.25, False),
                (0.5, "head", False, 1.0, False),
                (0.0, "head", True, 0.5, True),
                (None, "head", True, 0.5, False),
                (1.0, "lora", False, 1.0, False),
            ]
        )
    ]
    store.update_state("a", lambda s: s.change(comparisons=bought))
    head, both, lora = (next(h for h in store.halves() if h.answered_by == half) for half in ("head", "both", "lora"))
    assert (head.answers, both.answers, lora.answers) == (9, 2, 0)
    assert head.checks == Compared(2, pytest.approx(2 / 6), pytest.approx(36 / 20))
    assert head.compared == Compared(3, pytest.approx(2.5 / 7), pytest.approx(49 / 21))
    assert both.compared == Compared() == lora.checks
    assert lora.compared == Compared(1, 1.0, 1.0)
    later = {half.answered_by: half for half in store.halves(since_day="2026-03-02", since=2.0)}
    assert (later["head"].answers, later["head"].compared.n, later["both"].answers) == (5, 1, 2)
    assert {c.outcome: c.n for c in store.counts("a")} == {"local": 5, "degraded": 1, "deferred": 9}
    assert [c.answered_by for c in store.comparisons("a")] == ["lora", *["head"] * 5]


def test_counts_add_up(store: Store) -> None:
    """Counting the same outcome again adds to its row; days and tasks select."""
    store.add_counts([Count("a", "2026-03-01", "", "remote", 1, 0.5)] * 2)
    store.add_counts([Count("a", "2026-03-01", "", "remote", 3, 1.0), Count("b", "2026-03-02", "v", "local")])
    assert store.counts("a") == [Count("a", "2026-03-01", "", "remote", 5, 2.0)]
    assert [c.task for c in store.counts(since="2026-03-02")] == ["b"]


def test_promotion_is_one_step(store: Store) -> None:
    """The old champion retires and keeps what it learnt, the new one begins, and may come back to its own."""
    store.ensure_tasks(["a"])
    for name in ("one", "two"):
        store.add_version(version(name))
        store.add_version(replace(version(name), reason="added again"))
        store.promote("a", name, lambda _, own: own.change(phase=2, trust=f"T {own.version}"), f"{name} is better")
        store.update_state("a", lambda s: s.change(trust=s.trust + "!"))
    assert {v.name: (v.status, v.reason) for v in store.versions("a")} == {
        "one": ("retired", "succeeded by two"),
        "two": ("champion", "two is better"),
    }
    assert store.policy_row("a").champion == "two"
    assert store.policy_row("a").trust == "T two!"
    assert store.policy_row("a", "one").trust == "T one!"
    store.promote("a", "one", lambda before, own: own.change(trust=f"{own.trust} after {before.version}"), "back")
    assert store.policy_row("a").trust == "T one! after two"
    found = store.version("a", "two")
    assert found is not None
    assert found.record == {"loss": 0.5}


def test_every_version_has_a_state_of_its_own(store: Store) -> None:
    """What one version learns changes no other; all policies come in one look; an unknown one is shadowed."""
    store.ensure_tasks(["a", "b"])
    for name in ("one", "two"):
        store.add_version(version(name))
        store.promote("a", name, lambda _, own: own.change(phase=3, threshold=0.5, sampling_rate=0.1), "better")
    store.update_state("a", lambda s: s.change(phase=2, threshold=None, training_due="escalated"), version="one")
    policies = store.policies()["a"]
    assert (policies.champion, policies.training_due) == ("two", "escalated")
    assert policies.of("one") == Policy(Phase.SHADOW, "one", None, 0.1)
    assert policies.of("two") == Policy(Phase.SERVE, "two", 0.5, 0.1)
    assert policies.of("ghost") == Policy(Phase.SHADOW, "ghost", None, 1.0)
    assert policies.of(None) == Policy(Phase.COLLECT)
    assert store.policies()["b"].of(None) == Policy(Phase.COLLECT)
    assert store.policy_row("a", "ghost").phase == 2


def test_changes_of_two_versions_at_once_are_all_kept(store: Store) -> None:
    """Routers on two versions, and promotions back and forth between them: no version loses what it learnt."""
    store.ensure_tasks(["a"])
    names = ("one", "two")
    for name in names:
        store.add_version(version(name))
        store.promote("a", name, lambda _, own: own.change(phase=2), "better")

    def learn(n: int) -> None:
        if n % 10 == 9:
            store.promote("a", names[n // 10 % 2], lambda _, own: own.change(), "and back")
        store.update_state("a", lambda s: s.change(trust=s.trust + f"{n},"), version=names[n % 2])

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(learn, range(40)))
    for even, name in enumerate(names):
        learnt = store.policy_row("a", name).trust
        assert sorted(map(int, learnt.split(",")[:-1])) == list(range(even, 40, 2))
    champion = store.policy_row("a")
    assert champion.trust == store.policy_row("a", champion.version).trust


def test_versions_that_nothing_serves_are_forgotten_in_the_end(store: Store, clock: Any) -> None:
    """The newest sixteen and the two that may serve are remembered, the champion before among them."""
    store.ensure_tasks(["a"])
    for n in range(30):
        clock.now += 1
        store.add_version(version(f"v{n}"))
        store.promote("a", f"v{n}", lambda _, own: own.change(trust="T"), "better")
    assert set(store.policies()["a"].policies) == {f"v{n}" for n in range(14, 30)}
    store.promote("a", "v0", lambda _, own: own.change(trust=own.trust), "back")
    assert store.policy_row("a").trust == ""


OLD_WRITE = (
    "UPDATE tasks SET phase = 2, threshold = NULL, sampling_rate = 1.0, trust = trust || '+old', "
    "revision = revision + 1 WHERE task = 'a'"
)


def test_processes_from_before_versions_had_states_go_on_beside_new_ones(store: Store) -> None:
    """They read and write the champion's numbers in the task's row: neither side loses what the other learnt."""
    store.ensure_tasks(["a"])
    store.add_version(version("one"))
    store.add_version(version("two"))
    store.promote("a", "one", lambda _, own: own.change(phase=3, threshold=0.5, sampling_rate=0.1, trust="new"), "good")

    def old_reads() -> tuple[Any, ...]:
        with store._database.read() as tx:
            return tuple(tx.run_text("SELECT champion, phase, trust FROM tasks WHERE task = 'a'").fetchone())

    def old_writes(sql: str) -> None:
        with store._database.write(durable=True) as tx:
            tx.run_text(sql)

    assert old_reads() == ("one", 3, "new")
    old_writes(OLD_WRITE)
    assert store.policies()["a"].of("one") == Policy(Phase.SHADOW, "one", None, 1.0)
    store.update_state("a", lambda s: s.change(trust=s.trust + "+new"))
    assert old_reads() == ("one", 2, "new+old+new")
    old_writes(OLD_WRITE)
    # A new process promotes: what an old one taught the champion before it is kept with that version.
    store.promote("a", "two", lambda before, own: own.change(phase=2, trust="fresh"), "better")
    assert store.policy_row("a", "one").trust == "new+old+new+old"
    store.update_state("a", lambda s: s.change(trust=s.trust + "!"), version="one")
    assert old_reads() == ("two", 2, "fresh")
    # An old process promotes a version that no new one has heard of.
    old_writes("UPDATE tasks SET champion = 'three', phase = 3, trust = 'theirs', revision = revision + 1")
    assert (store.policy_row("a").version, store.policy_row("a").trust) == ("three", "theirs")
    assert store.policies()["a"].of("three").phase is Phase.SERVE
    assert store.policy_row("a", "two").trust == "fresh"


def test_promoting_what_is_not_there_changes_nothing(store: Store) -> None:
    """A version nobody added cannot be promoted, and the champion stays."""
    store.ensure_tasks(["a"])
    store.add_version(version("one"))
    store.promote("a", "one", lambda _, own: own.change(), "good")
    with pytest.raises(StoreError, match="no version 'ghost'"):
        store.promote("a", "ghost", lambda _, own: own.change(), "?")
    assert store.policy_row("a").champion == "one"
    assert store.version("a", "ghost") is None


def test_one_run_at_a_time(store: Store, clock: Any) -> None:
    """A task has one unfinished run; finishing it stamps the time and makes room."""
    run = store.start_run("a", 25, "due", corpus_size=25)
    assert store.open_run("a") == run
    with pytest.raises(StoreError, match=run.id):
        store.start_run("a", 30, "due")
    store.start_run("b", 1, "other tasks may")
    clock.now += 60
    store.update_run(run.id, step="finetune", attempts=2)
    ended = store.update_run(run.id, state="completed", version="v1")
    assert (ended.finished_at, ended.step, ended.attempts) == (clock.now, "finetune", 2)
    assert store.open_run("a") is None
    second = store.start_run("a", 30, "due")
    assert [r.id for r in store.runs("a")] == [run.id, second.id]
    with pytest.raises(StoreError, match="no training run 'ghost'"):
        store.update_run("ghost", step="x")


def test_leases_pass_on_with_growing_tokens(store: Store, clock: Any) -> None:
    """A lease excludes others until it expires or is released; the loser's renewal fails."""
    mine = store.acquire_lease("coach.a", "me", 10)
    assert mine is not None
    assert store.acquire_lease("coach.a", "you", 10) is None
    clock.now += 9
    renewed = store.renew_lease(mine, 10)
    assert renewed is not None
    clock.now += 9
    assert store.acquire_lease("coach.a", "you", 10) is None
    clock.now += 2
    yours = store.acquire_lease("coach.a", "you", 10)
    assert yours is not None
    assert yours.token > mine.token
    assert store.renew_lease(mine, 10) is None
    store.release_lease(mine)
    assert store.acquire_lease("coach.a", "me", 10) is None
    store.release_lease(yours)
    again = store.acquire_lease("coach.a", "me", 10)
    assert again is not None
    assert again.token > yours.token


def test_one_of_many_gets_the_lease(store: Store) -> None:
    """Of sixteen that ask at once one is let in."""
    with ThreadPoolExecutor(16) as threads:
        taken = list(threads.map(lambda n: store.acquire_lease("x", f"owner{n}", 60), range(16)))
    assert sum(lease is not None for lease in taken) == 1


def test_an_event_is_recorded_once(store: Store) -> None:
    """The same id from several processes is one event; all tasks' events come in order, after a cursor."""
    first = EventRecord("e1", None, "budget_warning", "warning", {"n": 1}, 1.0)
    assert store.add_event(first)
    assert not store.add_event(replace(first, at=2.0))
    store.add_event(EventRecord("e2", "a", "phase", "info", {}, 3.0))
    every = store.events()
    assert [e.id for e in every] == ["e1", "e2"]
    assert [e.id for e in store.events(since_seq=every[0].seq)] == ["e2"]
    assert [e.id for e in store.events("a")] == ["e2"]


def test_the_newest_event_is_found_behind_any_number(store: Store) -> None:
    """Of a kind, or any that is more than information; of this task alone."""
    for n in range(1100):
        store.add_event(EventRecord(f"p{n}", "a", "phase", "info", {"n": n}, float(n)))
    assert store.latest_alert("a") is None
    store.add_event(EventRecord("d1", "a", "drift", "warning", {}, 2000.0))
    store.add_event(EventRecord("d2", "b", "drift", "critical", {}, 2001.0))
    store.add_event(EventRecord("p", "a", "phase", "info", {"n": -1}, 2002.0))
    alert, phase = store.latest_alert("a"), store.latest_event("a", "phase")
    assert (alert and alert.id, phase and phase.evidence) == ("d1", {"n": -1})
    assert store.latest_event("a", "emergency") is None


def test_a_reservation_holds_until_it_ends(store: Store) -> None:
    """Held money counts against the cap; settling frees the difference, releasing all of it, losing none."""
    held = [reserve(store) for _ in range(4)]
    assert reserve(store) is None
    assert committed(store) == (Decimal(0), Decimal(1))
    first, second, third, fourth = (r for r in held if r is not None)
    store.end_calls([Settlement(first, "settled", Decimal("0.10"), Usage(100, 10, 5, 2, 1))])
    store.end_calls([Settlement(second, "released", Decimal(0)), Settlement(third, "lost", Decimal(0))])
    assert committed(store) == (Decimal("0.35"), Decimal("0.60"))
    rows = {row.state: row for row in store.spend()}
    assert {state: (row.calls, row.cost) for state, row in rows.items()} == {
        "settled": (1, Decimal("0.10")),
        "released": (1, Decimal(0)),
        "lost": (1, Decimal("0.25")),
    }
    assert [(row.calls, row.amount) for row in store.held()] == [(1, Decimal("0.25"))]
    assert rows["settled"].usage == Usage(100, 10, 5, 2, 1)
    assert fourth.worst_case == Decimal("0.25")


def test_a_call_ends_once(store: Store) -> None:
    """Settling again, whatever it says, changes nothing."""
    held = reserve(store)
    assert held is not None
    store.end_calls([Settlement(held, "settled", Decimal("0.10"))])
    assert store.end_calls([Settlement(held, "settled", Decimal("0.20"))]) == [None]
    store.end_calls([Settlement(held, "released", Decimal(0))])
    assert committed(store) == (Decimal("0.10"), Decimal("0.10"))


def test_a_dead_owners_call_stays_held(store: Store, clock: Any) -> None:
    """A reservation nobody ended stays within the cap for ever, and is never said to be spent."""
    reserve(store)
    began, clock.now = clock.now, clock.now + 86_400
    assert store.spend() == []
    assert [(row.task, row.amount, row.oldest_at) for row in store.held()] == [("a", Decimal("0.25"), began)]
    assert committed(store) == (Decimal(0), Decimal("0.25"))


def test_completing_records_everything_or_nothing(store: Store) -> None:
    """Settlement, example, counts and state are one transaction."""
    store.ensure_tasks(["a"])
    held = reserve(store)
    assert held is not None
    settled = Settlement(held, "settled", Decimal("0.10"))

    def bad(state: TaskState) -> StateChange:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        store.complete_remote(settlements=[settled], example=example(1), change=bad)
    assert (store.count_examples("a"), committed(store)) == (0, (Decimal(0), Decimal("0.25")))
    done = store.complete_remote(
        settlements=[settled],
        example=example(1),
        counts=[Count("a", "2026-03-01", "", "remote")],
        change=lambda s: s.change(phase=2),
    )
    assert done.state is not None
    assert (done.state.phase, [w.spent for w in done.windows[0] or ()]) == (2, [Decimal("0.10")])
    assert (store.count_examples("a"), store.counts()[0].n) == (1, 1)


def test_stores_open_together(url: str) -> None:
    """Eight openers of one new store migrate it once and all work."""
    with ThreadPoolExecutor(8) as threads:
        opened = list(threads.map(lambda _: Store.open(url), range(8)))
    for n, one in enumerate(opened):
        one.add_example(example(n))
    assert [one.count_examples("a") for one in opened] == [8] * 8
    for one in opened:
        one.close()


def test_a_new_file_that_another_process_is_writing_is_waited_for(tmp_path: Path) -> None:
    """SQLite's busy timeout does not cover the change to WAL: it failed at once where two openers met."""
    path = tmp_path / "store.db"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("CREATE TABLE theirs (n INTEGER)")
    other.execute("BEGIN IMMEDIATE")
    ends = threading.Timer(0.3, other.execute, ["COMMIT"])
    ends.start()
    with Store.open(f"sqlite:///{path}") as store:
        store.add_example(example(1))
        assert store.count_examples("a") == 1
    ends.join()
    other.close()


def test_an_older_store_is_brought_up_to_date(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store of the first shape, with an example in it, loses nothing by the steps that came later."""
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "_STEPS", migrations._STEPS[:7])
        patch.setattr(migrations, "LATEST", 7)
        patch.setattr(migrations, "_CONTRACTIONS", ())
        with Store.open(url) as store, store._database.write(durable=True) as tx:
            columns = "id, task, input, output, provider, model, input_digest, created_at"
            tx.run_text(
                f"INSERT INTO examples ({columns}) VALUES "
                """('x1', 'a', '{"text":"t1"}', '{"label":"l"}', 'anthropic', 'm', 'd', 1.0)"""
            )
            columns = "task, phase, champion, threshold, sampling_rate, trust, revision, updated_at"
            tx.run_text(f"INSERT INTO tasks ({columns}) VALUES ('a', 3, 'v1', 0.5, 0.1, 'T', 7, 1.0)")
            tx.run_text(f"INSERT INTO tasks ({columns}) VALUES ('b', 1, NULL, NULL, 1.0, '', 0, 1.0)")
    with Store.open(url) as store:
        state = store.policy_row("a", "v1")
        assert (state.phase, state.threshold, state.sampling_rate, state.trust, state.revision) == (3, 0.5, 0.1, "T", 7)
        assert set(store.policies()["a"].policies) == {"v1"}
        assert store.policy_row("b").version is None
        assert [replace(one, seq=0) for one in store.examples("a")] == [example(1)]
        store.add_example(example(2))
        assert store.count_examples("a") == 2


def test_a_newer_store_is_refused(url: str) -> None:
    """A store of a later version is left alone, with the remedy."""
    with Store.open(url) as store, store._database.write(durable=True) as tx:
        tx.run_text("UPDATE schema_version SET version = 999")
    with pytest.raises(StoreError, match="newer Apprentice"):
        Store.open(url)


def test_the_migrations_make_the_tables(store: Store) -> None:
    """What the steps brought about is what the statements believe in."""
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext
    from sqlalchemy import create_engine

    from apprentice.store.tables import metadata

    engine = create_engine(store._database.url)
    with engine.connect() as connection:
        found = compare_metadata(MigrationContext.configure(connection), metadata)
    engine.dispose()
    assert [d for d in found if not (d[0] == "remove_table" and d[1].name == "schema_version")] == []


def test_a_closed_store_says_so(url: str) -> None:
    """Using a closed store is a `StoreError`, and closing twice is fine."""
    store = Store.open(url)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.policies()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://u:secret@h/d", "not supported"),
        ("nonsense", "no database URL"),
        ("postgresql://user:secret@127.0.0.1:1/x", "connection"),
        ("sqlite:////proc/nowhere/x.db", "nowhere"),
    ],
)
def test_a_store_that_cannot_be_opened(url: str, message: str) -> None:
    """Wrong URLs and unreachable places are a `StoreError` that holds no password."""
    with pytest.raises(StoreError, match=message) as caught:
        Store.open(url)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    """A damaged file is named, with the remedy, and not touched."""
    path = tmp_path / "x.db"
    path.write_text("This is not a database. " * 100)
    with pytest.raises(StoreError, match="damaged"):
        Store.open(f"sqlite:///{path}")
    assert path.read_text().startswith("This is not")


def test_the_store_in_memory() -> None:
    """sqlite:// works for trials, and threads share it."""
    with Store.open("sqlite://") as store, ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda n: store.add_example(example(n)), range(20)))
        assert store.count_examples("a") == 20


def test_what_was_paid_for_is_synced(tmp_path: Path) -> None:
    """Durable transactions run with synchronous=FULL, reservations with NORMAL; the log is a write-ahead log."""
    with Store.open(f"sqlite:///{tmp_path / 'x.db'}") as store:
        levels = []
        for durable in (True, False, True):
            with store._database.write(durable=durable) as tx:
                levels.append(tx.run_text("PRAGMA synchronous").fetchone()[0])
        assert levels == [2, 1, 2]
    with sqlite3.connect(tmp_path / "x.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_a_dropped_connection_is_replaced(new_postgres: Any) -> None:
    """After the server ended every connection the next request opens a new one."""
    with Store.open(new_postgres()) as store:
        store.ensure_tasks(["a"])
        with store._database.read() as tx:
            pid = tx.run_text("SELECT pg_backend_pid()").fetchone()[0]
        other = Store.open(store._database.url.render_as_string(hide_password=False))
        with other._database.read() as tx:
            tx.run_text(f"SELECT pg_terminate_backend({pid})")
        other.close()
        assert list(store.policies()) == ["a"]


def test_the_last_who_holds_a_version_is_to_unload_it(store: Store, clock: Any) -> None:
    """Whoever loaded it: the duty passes on to those who are left, also from those who died."""
    store.hold_version("s", "v", "a", 60, loaded=True)
    store.hold_version("s", "v", "a", 60, loaded=False)  # a renewal forgets nothing
    store.hold_version("s", "v", "b", 60, loaded=False)
    store.hold_version("s", "v", "c", 60, loaded=False)
    store.hold_version("elsewhere", "v", "d", 1000, loaded=True)
    assert not store.release_version("s", "v", "a")
    assert not store.release_version("s", "v", "a"), "once"
    clock.now += 61
    assert store.abandoned_versions("s") == ["v"]
    store.hold_version("s", "v", "b", 60, loaded=False)
    assert store.abandoned_versions("s") == []
    assert store.release_version("s", "v", "b")
    assert store.abandoned_versions("s") == []
    assert not store.release_version("s", "v", "b")
    store.hold_version("s", "operator's", "a", 60, loaded=False)
    clock.now += 61
    assert store.abandoned_versions("s") == []
    assert not store.release_version("s", "operator's", "a")


def second(n: int, **values: Any) -> SecondAnswer:
    made = SecondAnswer(
        id=f"s{n}",
        task="a",
        request_id=f"x{n}",
        first={"label": "l"},
        output={"label": "Ü"},
        provider="anthropic",
        model="m",
        first_at=float(n),
        created_at=n + 0.5,
    )
    return replace(made, **values)


def test_second_answers_are_kept_raw_with_what_they_cost(store: Store) -> None:
    """In the transaction that ends the call, once however often it is tried, and no example."""
    held = reserve(store)
    assert held is not None
    settled = Settlement(held, "settled", Decimal("0.10"), Usage(10, 5))
    for _ in range(2):
        store.complete_remote(settlements=[settled], second=second(1, local={"label": "k"}, probability=0.25))
    (row,) = store.second_answers("a")
    assert replace(row, seq=0) == second(1, local={"label": "k"}, probability=0.25)
    assert committed(store) == (Decimal("0.10"), Decimal("0.10"))
    assert store.count_examples("a") == 0
    assert store.example_totals("a").ever == 0


def test_second_answers_are_found_by_what_they_were_asked_for(store: Store) -> None:
    """Those of an alarm apart from those asked at once; the newest first, and pairs in the order of asking."""
    for n in range(6):
        store.complete_remote(settlements=[], second=second(n, cause="alarm" if n == 3 else "", sampling_rate=0.5))
    store.complete_remote(settlements=[], second=second(9, task="b"))
    assert [row.id for row in store.second_answers("a")] == ["s5", "s4", "s2", "s1", "s0"]
    assert [row.id for row in store.second_answers("a", limit=2)] == ["s5", "s4"]
    assert [row.id for row in store.second_answers("a", cause="alarm")] == ["s3"]
    assert (store.count_second_answers("a"), store.count_second_answers("a", cause="alarm")) == (5, 1)
    assert store.pairs("a", since=0.0, limit=10) == []  # nothing is scored yet
    for n in (1, 2, 3, 5):
        store.score_second_answer(second(n, score=n / 10, chance=0.25, local_score=1.0, side=0.5))
    (third,) = store.second_answers("a", cause="alarm")
    assert (third.score, third.chance, third.local_score, third.side) == (0.3, 0.25, 1.0, 0.5)
    assert store.pairs("a", since=0.0, limit=10) == [
        (0.1, 0.25, 0.5, 1.0),
        (0.2, 0.25, 0.5, 1.0),
        (0.5, 0.25, 0.5, 1.0),
    ]
    assert [pair.score for pair in store.pairs("a", since=2.0, limit=10)] == [0.2, 0.5]
    assert [pair.score for pair in store.pairs("a", since=0.0, limit=1)] == [0.5]


def test_examples_from_before_and_since_a_moment(store: Store) -> None:
    """The newest from before it come first; the moment itself is since."""
    for n in range(6):
        store.add_example(example(n))
    store.add_example(example(7, task="b", created_at=1.0))
    assert [e.id for e in store.examples_before("a", 4.0, 3)] == ["x3", "x2", "x1"]
    assert store.examples_before("a", 0.0, 3) == []
    assert store.count_examples_since("a", 4.0) == 2
