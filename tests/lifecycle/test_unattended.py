"""A task whose training is due while no coach is there: status says so, and after a while an alert does."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO

from rich.console import Console

from apprentice.operate.status import status_page
from tests.conftest import Workbench


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 1_772_366_400.0

    def __call__(self) -> float:
        return self.now


def page(room: Workbench) -> str:
    shown = StringIO()
    Console(file=shown, width=200).print(status_page(room.client.status()))
    return shown.getvalue()


def kinds(room: Workbench) -> list[str]:
    room.client.parts.alerts.flush()
    return [event.kind for event in room.store.events("mood")]


def test_status_says_that_no_coach_is_watching(bench: Callable[..., Workbench]) -> None:
    """From the example on that makes training due, until a coach watches or trains the task."""
    clock = Clock()
    room = bench(clock=clock)
    for i in range(9):
        room.run(f"a fear {i}")
    assert room.client.status()["mood"].waits_for_coach is None
    room.run("the tenth joy")
    assert room.client.status()["mood"].waits_for_coach == "10 examples, 10 needed for the first run"
    assert "mood: no coach is watching, and training is due (10 examples" in page(room)
    assert "apprentice coach" in page(room)
    lease = room.store.acquire_lease("watch:mood", "a coach", 60.0)
    assert room.client.status()["mood"].waits_for_coach is None
    room.store.release_lease(lease)
    assert room.store.acquire_lease("coach:mood", "a run", 60.0)
    assert room.client.status()["mood"].waits_for_coach is None
    clock.now += 61.0
    assert room.client.status()["mood"].waits_for_coach


def test_an_alert_is_raised_if_it_lasts(bench: Callable[..., Workbench]) -> None:
    """Not for a coach that is restarted; once, not every minute."""
    clock = Clock()
    room = bench(clock=clock)
    for i in range(10):
        room.run(f"a fear {i}")
    chore = room.client.parts.tally._chore
    for _ in range(9):
        clock.now += 61.0
        chore()
    assert "no_coach" not in kinds(room)
    for _ in range(5):
        clock.now += 61.0
        chore()
    assert kinds(room).count("no_coach") == 1
    (event,) = [e for e in room.store.events("mood") if e.kind == "no_coach"]
    assert event.evidence == {"due": "10 examples, 10 needed for the first run"}


def test_later_growth_is_due_too(bench: Callable[..., Workbench]) -> None:
    """Not only the first run: a corpus that has grown, an unfinished run, and one that broke down wait for a coach."""
    clock = Clock()
    room = bench(clock=clock, local={"fine_tune_batch_size": 4})
    store = room.store
    for i in range(10):
        room.run(f"a fear {i}")

    def why() -> str | None:
        return room.client.status()["mood"].waits_for_coach

    run = store.start_run("mood", 10, "10 examples", corpus_size=10)
    assert why() == "resumes: 10 examples"
    store.update_run(run.id, state="completed")
    assert why() is None
    for i in range(10):
        room.run(f"another joy {i}")
    assert why() == "10 new examples since 10"
    run = store.start_run("mood", 20, "10 new examples", corpus_size=20)
    store.update_run(run.id, state="failed", finished_at=1.0)
    assert why() == "tries again: it failed once"
