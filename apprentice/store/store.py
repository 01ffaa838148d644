"""The store: one object per process, whose every method is one short transaction.

Safe to use from many threads and from any number of processes on one URL. What has been paid for is durable when a
method returns (`complete_remote`, `update_state`, `promote`, versions, runs, events); reservations and counts survive
the death of every process, though not the loss of power (see `database`).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal
from typing import Any

from apprentice.confidence.ceiling import Pair
from apprentice.errors import StoreError
from apprentice.events.kinds import EventKind
from apprentice.store import (
    comparisons,
    counts,
    events,
    examples,
    holds,
    ledger,
    runs,
    seconds,
    states,
    totals,
    versions,
)
from apprentice.store.database import Database, StoreReplaced, Transaction, open_database
from apprentice.store.migrations import contract, migrate
from apprentice.store.records import (
    CapChanges,
    CapWindow,
    Compared,
    ComparisonRecord,
    Completed,
    Count,
    EventRecord,
    ExampleRecord,
    ExampleTotals,
    HalfTotals,
    Held,
    Lease,
    PromotedBy,
    PromotionRecord,
    Reservation,
    RunKind,
    RunRecord,
    SecondAnswer,
    Settlement,
    SpendRow,
    StateChange,
    TaskPolicy,
    TaskState,
    VersionRecord,
    VersionStatus,
    WindowState,
)

__all__ = ["Store"]


class _NothingReserved(Exception):
    """Leaves a transaction so that it is rolled back."""


class Store:
    """Everything the next request or training run needs to know. Raises `StoreError`."""

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock
        self._listener: Callable[[EventRecord], None] | None = None
        self._told_replaced = False
        self._lent: frozenset[str] = frozenset()

    @classmethod
    def open(cls, url: str, *, read_only: bool = False, clock: Callable[[], float] = time.time) -> Store:
        """Open, and create or migrate, the store at a URL.

        With ``read_only`` nothing is created, migrated or written; a SQLite file that does not exist is an empty store.
        ``clock`` gives Unix seconds. Raises `StoreError` where it cannot be reached, a newer Apprentice wrote it, or
        (read only) an older one did.
        """
        database = open_database(url, read_only=read_only)
        try:
            migrate(database)
        except BaseException:
            database.close()
            raise
        return cls(database, clock)

    @classmethod
    def contract(cls, url: str) -> None:
        """Take away the columns that only earlier releases use. No process of one may be left: it could not write."""
        database = open_database(url)
        try:
            contract(database)
        finally:
            database.close()

    def close(self) -> None:
        """Let go of every connection. Idempotent."""
        self._database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Store({self._database.url.render_as_string(hide_password=True)!r})"

    @contextmanager
    def _write(self, *, durable: bool = False) -> Iterator[Transaction]:
        """A transaction that writes; the events it adds are told when they are committed, never before or without."""
        with self._noticed(), self._database.write(durable=durable) as tx:
            yield tx
        if self._listener is not None:
            for event in tx.events:
                self._listener(event)

    @contextmanager
    def _read(self) -> Iterator[Transaction]:
        with self._noticed(), self._database.read() as tx:
            yield tx

    @contextmanager
    def _noticed(self) -> Iterator[None]:
        """Tell once, to the listener alone, that the file is gone: no store is left that could keep the event."""
        try:
            yield
        except StoreReplaced as error:
            if self._listener is not None and not self._told_replaced:
                self._told_replaced = True
                kind = EventKind.STORE_REPLACED
                evidence = {"cause": str(error)}
                self._listener(EventRecord(uuid.uuid4().hex, None, kind, kind.level, evidence, self._clock()))
            raise

    # state

    def ensure_tasks(self, names: Iterable[str]) -> None:
        """Make sure that these tasks have a state; a new one is in phase 1. A read-only store only lends them one."""
        if self._database.read_only:
            self._lent = frozenset(names)
            return
        with self._write() as tx:
            states.ensure(tx, names, self._clock())

    def policies(self) -> dict[str, TaskPolicy]:
        """Every task's champion and the policies of its versions, in one cheap query."""
        with self._read() as tx:
            return states.policies(tx)

    def policy_row(self, task: str, version: str | None = None) -> TaskState:
        """All that is known of where a version of a task stands, its champion where none is named."""
        with self._read() as tx:
            return states.state(tx, task, version, lent=task in self._lent)

    def update_state(
        self, task: str, change: Callable[[TaskState], StateChange], *, version: str | None = None
    ) -> TaskState:
        """Read, change and write a version's state (its champion's where none is named) in one transaction.

        ``change`` sees no other writer's half. It runs inside the transaction: it must not wait for anything.
        """
        with self._write(durable=True) as tx:
            return states.update_state(tx, task, version, change, self._clock())

    # examples

    def complete_remote(
        self,
        *,
        settlements: Sequence[Settlement],
        example: ExampleRecord | None = None,
        counts: Sequence[Count] = (),
        change: Callable[[TaskState], StateChange] | None = None,
        task: str | None = None,
        second: SecondAnswer | None = None,
    ) -> Completed:
        """Record a remote answer, all of it or nothing, durably: what it cost, the example, the counts.

        ``second`` is an answer to what had been answered before: no example, but kept beside the first one. With
        ``change`` the state of ``task`` (default: the example's) changes in the same transaction. Doing it again,
        because nobody heard whether it was done, adds no second example and no second count.
        """
        name = task or (example.task if example else None)
        with self._write(durable=True) as tx:
            at = self._clock()
            # One order for everybody (state, windows, example, counts), so that no two of these can deadlock.
            state = None
            if change is not None:
                if name is None:
                    raise TypeError("complete_remote needs task= to change a state without an example")
                state = states.update_state(tx, name, None, change, at)
            windows = ledger.end_calls(tx, settlements, at)
            done_before = bool(windows) and all(states is None for states in windows)
            if example is not None and not done_before:
                examples.add(tx, example)
            if counts and not done_before:
                _add_counts(tx, counts)
            if second is not None:
                seconds.add(tx, second)
            return Completed(state, windows)

    def add_example(self, example: ExampleRecord) -> int:
        """Record an example that cost nothing (imported, replayed); returns its ``seq``."""
        with self._write(durable=True) as tx:
            return examples.add(tx, example)

    def examples(self, task: str, *, after: int | None = None, limit: int = 1000) -> Iterator[ExampleRecord]:
        """Every example of a task in order, from just after the cursor ``after`` (a ``seq``), read page by page.

        ``limit`` is the size of a page: no read transaction lasts longer, whatever the caller does in between.
        """
        cursor = after or 0
        while True:
            with self._read() as tx:
                page = examples.page(tx, task, cursor, limit)
            yield from page
            if len(page) < limit:
                return
            cursor = page[-1].seq

    def count_examples(self, task: str, *, after: int | None = None) -> int:
        """How many examples a task has, after a cursor."""
        with self._read() as tx:
            return examples.count(tx, task, after or 0)

    def corpus(self, task: str) -> tuple[int, int]:
        """How many examples a task has, and the ``seq`` of the last of them (0 if there is none)."""
        with self._database.read() as tx:
            return examples.extent(tx, task)

    def newest_inputs(self, task: str, limit: int) -> list[str]:
        """The inputs of the newest examples as JSON text, the newest first."""
        with self._read() as tx:
            return examples.newest_inputs(tx, task, limit)

    def examples_before(self, task: str, at: float, limit: int) -> list[ExampleRecord]:
        """The newest examples from before a moment (Unix seconds), the newest first. For rare questions."""
        with self._read() as tx:
            return examples.before(tx, task, at, limit)

    def count_examples_since(self, task: str, at: float) -> int:
        """How many examples came since a moment (Unix seconds). Looks at each: for rare questions."""
        with self._read() as tx:
            return examples.count_since(tx, task, at)

    # answers to what was answered before

    def second_answers(self, task: str, *, cause: str = "", limit: int = 1000) -> list[SecondAnswer]:
        """The newest answers to requests asked again because of ``cause`` ("": asked twice at once), newest first."""
        with self._read() as tx:
            return seconds.newest(tx, task, cause, limit)

    def score_second_answer(self, second: SecondAnswer) -> None:
        """Write the scores of an answer that is recorded already."""
        with self._write() as tx:
            seconds.score(tx, second)

    def count_second_answers(self, task: str, *, cause: str = "") -> int:
        """How many of them there are."""
        with self._read() as tx:
            return seconds.count(tx, task, cause)

    def pairs(self, task: str, *, since: float, limit: int) -> list[Pair]:
        """The newest ``limit`` scored requests that were asked twice, first answered since then, the oldest first."""
        with self._read() as tx:
            return seconds.pairs(tx, task, since, limit)

    # comparisons

    def comparisons(self, task: str, *, version: str | None = None, limit: int = 1000) -> list[ComparisonRecord]:
        """The newest comparisons first."""
        with self._read() as tx:
            return comparisons.newest(tx, task, version, limit)

    def recent_disagreements(self, task: str, limit: int) -> list[str]:
        """The request ids of the newest comparisons that scored below 1, the newest first."""
        with self._read() as tx:
            return comparisons.recent_disagreements(tx, task, limit)

    def overbought(self, task: str, request_ids: Container[str]) -> dict[str, tuple[float, float]]:
        """Of these requests, those whose answer was bought more readily than a spot check's.

        request id -> (the sampling rate at that moment, the probability with which it was bought).
        """
        with self._read() as tx:
            return comparisons.overbought(tx, task, request_ids)

    # counts

    def add_counts(self, rows: Sequence[Count]) -> None:
        """Add to the counters; rows of one batch may repeat a counter."""
        with self._write() as tx:
            counts.add(tx, rows)

    def counts(self, task: str | None = None, since: str | None = None) -> list[Count]:
        """The counters of a task, or all, from a day ("2026-03-01") on."""
        with self._read() as tx:
            return counts.counted(tx, task, since)

    def halves(self, *, since_day: str = "", since: float = 0.0) -> list[HalfTotals]:
        """What each half of the students did: answers from a day on, comparisons since a moment (Unix seconds).

        Looks at every comparison since then: for reports.
        """
        with self._read() as tx:
            answers, compared = counts.by_half(tx, since_day), comparisons.by_half(tx, since)
        nothing = (Compared(), Compared())
        return [
            HalfTotals(*key, answers.get(key, 0), *compared.get(key, nothing)) for key in sorted({*answers, *compared})
        ]

    # versions

    def add_version(self, version: VersionRecord) -> None:
        """Record a version; one of the same task and name stays as it is."""
        with self._write(durable=True) as tx:
            versions.add(tx, version)

    def set_version_status(self, task: str, name: str, status: VersionStatus, reason: str) -> None:
        """Change a version's status, and say why."""
        with self._write(durable=True) as tx:
            versions.set_status(tx, task, name, status, reason)

    def versions(self, task: str) -> list[VersionRecord]:
        """A task's versions, the oldest first."""
        with self._read() as tx:
            return versions.of_task(tx, task)

    def version(self, task: str, name: str) -> VersionRecord | None:
        """One version, or None."""
        with self._read() as tx:
            return versions.one(tx, task, name)

    def promote(
        self,
        task: str,
        name: str,
        change: Callable[[TaskState, TaskState], StateChange],
        reason: str,
        *,
        how: PromotedBy = "gate",
        by: str = "the gate",
        since: int | None = None,
    ) -> TaskState:
        """Make a version the champion: leave the old one and write the new one's state, in one transaction.

        ``change`` is given the state of the champion before it, and its own, which may be from an earlier time as
        champion. What the old one had learnt stays with it. One event tells of it, with what ``change`` says in it.

        With ``since`` (a promotion's ``seq``) nothing happens where a person has chosen a champion after it: raises
        `ChosenMeanwhile`.
        """
        with self._write(durable=True) as tx:
            return versions.promote(tx, task, name, change, reason, self._clock(), how=how, by=by, since=since)

    def promotions(self, task: str) -> list[PromotionRecord]:
        """Every change of a task's champion, the oldest first."""
        with self._database.read() as tx:
            return versions.history(tx, task)

    # runs and leases

    def start_run(
        self,
        task: str,
        data_high_water: int,
        reason: str,
        *,
        corpus_size: int = 0,
        run_id: str | None = None,
        kind: RunKind = "train",
    ) -> RunRecord:
        """Record that a training run begins. Raises `StoreError` while another of the task is unfinished."""
        run = RunRecord(
            id=run_id or uuid.uuid4().hex,
            task=task,
            state="running",
            step="",
            reason=reason,
            data_high_water=data_high_water,
            corpus_size=corpus_size,
            data_digest="",
            version=None,
            attempts=1,
            error="",
            started_at=self._clock(),
            finished_at=None,
            kind=kind,
        )
        with self._write(durable=True) as tx:
            promoted = versions.history(tx, task)
            return runs.start(tx, replace(run, promotions_seen=promoted[-1].seq if promoted else 0))

    def update_run(self, run_id: str, **changes: Any) -> RunRecord:
        """Change state, step, corpus_size, data_digest, version, attempts, error or finished_at of a run.

        ``finished_at`` is set by itself when the state leaves "running". Raises `TrainingError` where it has ended.
        """
        with self._write(durable=True) as tx:
            return runs.update_run(tx, run_id, self._clock(), changes)

    def runs(self, task: str) -> list[RunRecord]:
        """A task's runs, the oldest first."""
        with self._read() as tx:
            return runs.of_task(tx, task)

    def open_run(self, task: str) -> RunRecord | None:
        """The task's unfinished run."""
        with self._read() as tx:
            return runs.open_run(tx, task)

    def acquire_lease(self, name: str, owner: str, ttl_s: float) -> Lease | None:
        """Take a lease that is free, expired or one's own already; None while another holds it."""
        with self._write() as tx:
            return runs.acquire(tx, name, owner, ttl_s, self._clock())

    def take_lease(self, name: str, owner: str, ttl_s: float) -> Lease:
        """Take a lease from whoever holds it: everything they still want to write behind its fence is refused."""
        with self._write() as tx:
            return runs.take(tx, name, owner, ttl_s, self._clock())

    def lease(self, name: str) -> Lease | None:
        """Who holds a lease now; None where nobody does."""
        with self._database.read() as tx:
            return runs.lease(tx, name, self._clock())

    def fenced(self, lease: Lease) -> Store:
        """This store, whose every write is refused with `LeaseLost` as soon as another has taken the lease."""
        fenced = Store(runs.FencedDatabase(self._database, lease), self._clock)
        fenced._listener = self._listener
        return fenced

    def renew_lease(self, lease: Lease, ttl_s: float = 60.0) -> Lease | None:
        """Hold on to a lease; None when it was lost to another owner."""
        with self._write() as tx:
            return runs.renew(tx, lease, ttl_s, self._clock())

    def release_lease(self, lease: Lease) -> None:
        """Give a lease back; nothing happens when it was lost already."""
        with self._write() as tx:
            runs.release(tx, lease)

    # versions on shared servers

    def hold_version(self, server: str, version: str, owner: str, ttl_s: float, *, loaded: bool) -> None:
        """Say that ``owner`` uses a version on a server for ``ttl_s`` more seconds; ``loaded``: it brought it there."""
        with self._write() as tx:
            holds.hold(tx, server, version, owner, self._clock() + ttl_s, loaded=loaded)

    def release_version(self, server: str, version: str, owner: str) -> bool:
        """End a hold. True if the owner is to unload the version: Apprentice loaded it, and nobody else holds it.

        Whoever is left inherits that duty, also from owners that died.
        """
        with self._write() as tx:
            return holds.release(tx, server, version, owner, self._clock())

    def abandoned_versions(self, server: str) -> list[str]:
        """What was loaded into a server by owners that have all died."""
        with self._read() as tx:
            return holds.abandoned(tx, server, self._clock())

    # events

    def add_event(self, event: EventRecord) -> bool:
        """Record an event; False where one of that id is recorded already, and stays as it is."""
        with self._write(durable=True) as tx:
            return bool(events.add(tx, [event]))

    def add_event_unless_recent(self, event: EventRecord, quiet_s: float) -> float | None:
        """Record an event unless one about the same matter happened within ``quiet_s`` seconds, in any process.

        Returns None if it was recorded, else the earlier one's time. Its id is MATTER:N, where N counts the windows of
        ``quiet_s`` seconds since 1970. The listener does not hear of it.
        """
        with self._database.write(durable=True) as tx:
            return events.add_unless_recent(tx, event, quiet_s)

    def listen(self, listener: Callable[[EventRecord], None] | None) -> bool:
        """Tell every event that this store commits to ``listener``, which must neither block nor raise.

        A store has one listener: False if another is set already. None takes it away.
        """
        if listener is not None and self._listener is not None:
            return False
        self._listener = listener
        return True

    def events(self, task: str | None = None, since_seq: int = 0, limit: int = 1000) -> list[EventRecord]:
        """Events of a task, or all, after a ``seq``, the oldest first."""
        with self._read() as tx:
            return events.after(tx, task, since_seq, limit)

    def latest_event(self, task: str, kind: str) -> EventRecord | None:
        """A task's newest event of a kind."""
        with self._read() as tx:
            return events.latest(tx, task, kind, "")

    def latest_alert(self, task: str) -> EventRecord | None:
        """A task's newest event that is more than information."""
        with self._read() as tx:
            return events.latest(tx, task, "", "info")

    # ledger

    def reserve(
        self,
        *,
        task: str,
        provider: str,
        model: str,
        request_id: str,
        owner: str,
        day: str,
        worst_case: Decimal,
        windows: Sequence[CapWindow],
    ) -> Reservation | None:
        """Hold a call's worst-case price in every window at once; None where it does not fit in one of them.

        The windows must be open (`open_windows`).
        """
        try:
            with self._write() as tx:
                reservation = ledger.reserve(
                    tx,
                    task=task,
                    provider=provider,
                    model=model,
                    request_id=request_id,
                    owner=owner,
                    day=day,
                    worst_case=worst_case,
                    windows=windows,
                    at=self._clock(),
                )
                if reservation is None:
                    raise _NothingReserved
                return reservation
        except _NothingReserved:
            return None

    def open_windows(self, windows: Sequence[CapWindow]) -> None:
        """Create the rows of windows that are new."""
        with self._write() as tx:
            ledger.open_windows(tx, windows)

    def set_caps(
        self,
        by_key: Mapping[str, Decimal | None],
        configured_at: float,
        event: Callable[[CapChanges], EventRecord],
    ) -> None:
        """Put caps in force, by ``scope|period`` in USD (None: no cap), unless a newer configuration has spoken.

        Where that changes caps that were in force, ``event`` makes what is told of it.
        """
        with self._write() as tx:
            changes = ledger.set_caps(tx, by_key, configured_at)
            if changes:
                events.add(tx, [event(changes)])

    def caps(self) -> dict[str, Decimal | None]:
        """The caps in force, by ``scope|period``."""
        with self._read() as tx:
            return ledger.caps_in_force(tx)

    def end_calls(self, settlements: Sequence[Settlement]) -> list[list[WindowState] | None]:
        """Record how calls ended that brought no answer; see `complete_remote` for those that did."""
        with self._write(durable=True) as tx:
            return ledger.end_calls(tx, settlements, self._clock())

    def open_calls(self) -> list[Reservation]:
        """Every call that is held and has not ended, the oldest first: those in flight, and those of the dead."""
        with self._read() as tx:
            return ledger.open_calls(tx)

    def find_calls(self, request_id: str, provider: str) -> list[tuple[Reservation, str]]:
        """The calls of one request to a provider, each with its state. Slow on a long ledger: for rare questions."""
        with self._read() as tx:
            return ledger.find_calls(tx, request_id, provider)

    def release_by_hand(self, number: int, reason: str, event: Callable[[Reservation], EventRecord]) -> EventRecord:
        """Give back what an open call holds, with its reason and an event, on a person's word.

        Should the call's owner be alive and settle it later, what it cost counts all the same. Raises `StoreError`
        where no such call is open.
        """
        with self._write(durable=True) as tx:
            held = ledger.release_by_hand(tx, number, reason, self._clock())
            if held is None:
                raise StoreError(f"no reservation {number} is open; `apprentice budget` lists those that are")
            told = event(held)
            events.add(tx, [told])
            return told

    def release_unsent(self, is_over: Callable[[Reservation], bool]) -> list[Reservation]:
        """Forget what an Apprentice of old held for calls that nobody had to make; ``is_over``: its owner is gone."""
        if all(call.request_id for call in self.open_calls()):
            return []  # the usual case, without a writer's lock
        with self._write() as tx:
            return ledger.release_unsent(tx, is_over)

    def window_states(self, keys: Sequence[str]) -> dict[str, WindowState]:
        """What is spent and held in these windows; one that does not exist holds nothing and is left out."""
        with self._read() as tx:
            return ledger.window_states(tx, keys)

    # totals

    def spend(self, *, since: str = "") -> list[SpendRow]:
        """What was spent since a day ("2026-03-01"; "": ever), by task, day, provider, model and how the calls ended.

        Spent is what is settled and what is lost. What calls in flight hold is not in it: see `held`.
        """
        with self._read() as tx:
            return totals.spend(tx, since)

    def held(self) -> list[Held]:
        """What calls hold that have not ended, by task: in flight, or left by a process that died."""
        with self._read() as tx:
            return totals.held(tx)

    def example_totals(self, task: str) -> ExampleTotals:
        """How many examples a task has and ever got; costs the same however many there are."""
        with self._read() as tx:
            return totals.examples_of(tx, task)


_add_counts = counts.add
