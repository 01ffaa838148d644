"""The coach at work: what it trains first, what it follows, and the command line in front of it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from apprentice.errors import TrainingError
from apprentice.lifecycle.due import Due
from apprentice.store.records import RunRecord
from flows.cancellation import RunCancelled
from flows.commands import abandon, coach, promote, rollback
from flows.dispatch import due_tasks, watch
from flows.lease import watch_lease
from flows.review import follow
from flows.tracking import CHAMPION
from flows.trainers.backends.axolotl import AxolotlTrainer
from flows.up import Member, members, run_together
from flows.workshop import Workshop
from tests.flows.conftest import WITH_PREFECT_AND_MLFLOW

pytestmark = WITH_PREFECT_AND_MLFLOW


def test_a_watch_trains_what_is_due_and_follows_the_registry(home: Any, trainer: Any) -> None:
    """A watch left alone trains once; an alias moved by hand afterwards is in the store within its next looks."""
    trainer.skills = [0.6, 0.95]
    stop, ended = threading.Event(), []

    def told(task: str, result: Any) -> None:
        ended.append((task, result))
        if len(ended) == 1:
            home.teach(300)
        else:
            stop.set()

    watch(home.settings, stop=stop, engine=home.engine, told=told, poll_s=0.05)
    assert [result.promoted for _, result in ended] == [True, True]
    first, second = (result.version for _, result in ended)
    assert home.store.policy_row("mood").champion == second
    shop = Workshop.open(home.settings)
    shop.tracking.set_alias("mood", CHAMPION, shop.tracking.number_of("mood", first))
    assert follow(shop, "mood") == first
    runner = CliRunner()
    config = ["--config", str(home.config)]
    assert f"{first} -> {second}" in runner.invoke(promote, ["mood", second, *config]).output
    assert f"{second} -> {first}" in runner.invoke(rollback, ["mood", *config]).output
    assert shop.tracking.aliased("mood", CHAMPION) == first
    shop.close()


def test_escalations_go_first(make_home: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order in the configuration: refits, which take seconds, then escalated tasks, then the others."""
    home = make_home()
    runs = {"mood": Due("train", "100 new examples since 50")}
    monkeypatch.setattr("flows.dispatch.due_run", lambda _settings, _store, task, *_: runs[task])
    more = [home.settings.tasks[0].model_copy(update={"name": name}) for name in ("late", "quick")]
    three = home.settings.model_copy(update={"tasks": (*home.settings.tasks, *more)})
    runs |= {"late": Due("train", "escalated"), "quick": Due("refit", "20 new examples since 100")}
    shop = Workshop.open(three)
    assert [task for task, _ in due_tasks(three, shop)] == ["quick", "late", "mood"]
    shop.close()


def test_a_worker_that_was_killed_again_and_again_is_stopped(home: Any, trainer: Any) -> None:
    """A run whose worker died three times in one step is closed with an alert instead of killing a fourth."""
    from flows.coach import coach_task

    run: RunRecord = home.store.start_run("mood", 60, "due", corpus_size=60)
    home.store.update_run(run.id, step="finetune", attempts=3)
    result = coach_task(home.settings, "mood", reason="due", engine=home.engine)
    assert (result.version, result.promoted) == (None, False)
    assert "killed 3 times in the step 'finetune'" in result.reason
    assert [e.kind for e in home.store.events("mood")] == ["training_failed"]


def test_commands_say_what_is_wrong(home: Any) -> None:
    """An unknown task, and --now without a task, are clear errors and not tracebacks."""
    runner = CliRunner()
    config = ["--config", str(home.config)]
    unknown = runner.invoke(coach, ["moodd", "--now", *config])
    assert str(unknown.exception) == f"there is no task 'moodd'. Tasks in {home.config}: mood."
    assert "name the task" in runner.invoke(coach, ["--now", *config]).output


def test_up_starts_what_a_machine_needs(home: Any) -> None:
    """Four processes, each told where the others are; with an MLflow server of one's own, three."""
    found = members(home.settings, home.config, port=1, prefect_port=2, mlflow_port=3)
    assert [m.name for m in found] == ["prefect", "mlflow", "coach", "router"]
    assert found[2].environment["PREFECT_API_URL"] == "http://127.0.0.1:2/api"
    tracking = home.settings.tracking.model_copy(update={"uri": "http://mlflow:5000"})
    elsewhere = home.settings.model_copy(update={"tracking": tracking})
    (mlflow,) = [m for m in found if m.name == "mlflow"]
    assert mlflow.environment["MLFLOW_BACKEND_STORE_URI"] == home.settings.tracking_uri
    assert not any(home.settings.tracking_uri in word for m in found for word in m.command)  # it may hold a password
    names = [m.name for m in members(elsewhere, home.config, port=1, prefect_port=2, mlflow_port=3)]
    assert names == ["prefect", "coach", "router"]


@pytest.fixture
def own_signals() -> Iterator[None]:
    """`run_together` takes Ctrl-C for itself; the test runner wants it back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _member(name: str, code: str, ready: str | None = None) -> Member:
    return Member(name, (sys.executable, "-c", code), {}, ready)


_WATCHES = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
_AFTER_IT = "import os, time\nwhile not os.path.exists('pid') or not open('pid').read(): time.sleep(0.05)\n"


@pytest.mark.usefixtures("own_signals")
@pytest.mark.parametrize(
    ("fails", "ready", "told"),
    [
        ("raise SystemExit(3)", None, "router ended by itself"),
        ("raise SystemExit(3)", "http://127.0.0.1:9/", "router ended by itself"),
        ("time.sleep(600)", "http://127.0.0.1:9/", "router did not answer within 5 s"),
    ],
)
def test_up_stops_everything_where_one_fails(
    home: Any, monkeypatch: pytest.MonkeyPatch, fails: str, ready: str | None, told: str
) -> None:
    """One that ends, before or after it was ready, or never answers, is named with its log; the others are stopped."""
    monkeypatch.setattr("flows.up._READY_S", 5.0)
    both = [_member("coach", _WATCHES), _member("router", _AFTER_IT + fails, ready)]
    monkeypatch.setattr("flows.up.members", lambda *_, **__: both)
    with pytest.raises(TrainingError, match=told) as failed:
        run_together(home.settings, home.config, port=1, prefect_port=2, mlflow_port=3)
    assert str(home.settings.root / ".logs" / "router.log") in str(failed.value)
    with pytest.raises(ProcessLookupError):
        os.kill(int((home.settings.root / "pid").read_text()), 0)


def test_a_watch_says_that_it_watches_and_observes(home: Any, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default: the store can tell that a coach is there, and the champion's run in MLflow gets its live figures."""
    assert home.store.lease(watch_lease("mood")) is None
    monkeypatch.setattr("flows.dispatch.OBSERVE_S", 0.2)
    monkeypatch.setattr("flows.dispatch.WATCH_S", 1.0)
    stop, shop = threading.Event(), Workshop.open(home.settings)
    watching = threading.Thread(
        target=watch, args=(home.settings,), kwargs={"stop": stop, "engine": home.engine, "poll_s": 0.05}
    )
    watching.start()
    try:
        deadline = time.monotonic() + 120
        while True:
            assert time.monotonic() < deadline
            time.sleep(0.1)
            champion = home.store.policy_row("mood").champion
            run = shop.tracking.run_of_version("mood", champion) if champion else None
            if run is not None and "live.coverage" in shop.tracking._client.get_run(run.id).data.metrics:
                break
        assert home.store.lease(watch_lease("mood")) is not None
    finally:
        stop.set()
        watching.join()
        shop.close()
    while home.store.lease(watch_lease("mood")) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_run_is_abandoned_by_command(home: Any) -> None:
    """It says which, and that there is none where there is none."""
    runner, config = CliRunner(), ["--config", str(home.config)]
    assert "no unfinished" in str(runner.invoke(abandon, ["mood", *config]).exception)
    run = home.store.start_run("mood", 60, "due", corpus_size=60)
    assert run.id in runner.invoke(abandon, ["mood", "--reason", "too dear", *config]).output
    (closed,) = home.store.runs("mood")
    assert closed.state == "cancelled"
    assert closed.error.startswith("too dear (")


def test_axolotl_ends_with_the_run_that_started_it(tmp_path: Path) -> None:
    """A run that is cancelled stops its command, and what that has started on other GPUs."""
    script = tmp_path / "axolotl.sh"
    script.write_text(f"#!/bin/sh\nsleep 600 & echo $! > {tmp_path}/child\nwait\n")
    script.chmod(0o755)
    trainer = AxolotlTrainer(str(script))

    def cancelled() -> None:
        if (tmp_path / "child").exists() and (tmp_path / "child").read_text().strip():
            raise RunCancelled("a person has cancelled the run in Prefect")

    with pytest.raises(RunCancelled):
        trainer._run(tmp_path / "axolotl.yaml", cancelled)
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_axolotls_last_words_are_told(tmp_path: Path) -> None:
    """Why it ended is in the error."""
    script = tmp_path / "axolotl.sh"
    script.write_text("#!/bin/sh\necho CUDA out of memory\nexit 3\n")
    script.chmod(0o755)
    with pytest.raises(TrainingError, match=r"ended with 3.*CUDA out of memory"):
        AxolotlTrainer(str(script))._run(tmp_path / "axolotl.yaml", lambda: None)
