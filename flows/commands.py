"""The commands of this room: apprentice coach, abandon, observe, promote, rollback, up."""

from __future__ import annotations

import getpass
import signal
import socket
import threading
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from apprentice.cli import config_option
from apprentice.errors import Problem, TrainingError, UnknownTask
from apprentice.settings.config import Settings, load_settings
from apprentice.store.records import PromotedBy
from apprentice.student.halves import halves_wanted

__all__ = ["abandon", "coach", "observe", "promote", "rollback", "up"]


def _settings(config: Path, task: str | None = None) -> Settings:
    settings = load_settings(config)
    names = [t.name for t in settings.tasks]
    if task is not None and task not in names:
        raise UnknownTask(
            task, [Problem("task", f"there is no task {task!r}.", f"Tasks in {config}: {', '.join(names)}.")]
        )
    return settings


@click.command()
@click.argument("task", required=False)
@config_option
@click.option("--now", is_flag=True, help="Train TASK now (fit its head, if it has no adapter), due or not, and exit.")
def coach(task: str | None, config: Path, now: bool) -> None:
    """Watch the store and train what is due, or train TASK --now.

    Stop it at any time: a run that was interrupted goes on when a coach is started again.
    """
    from flows.coach import coach_task
    from flows.dispatch import watch

    settings = _settings(config, task)
    console = Console(stderr=True)
    if now:
        if task is None:
            raise click.UsageError("name the task to train: apprentice coach TASK --now")
        columns = (TextColumn("{task.description:<9}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            shown = bar.add_task("starting", total=1.0)
            result = coach_task(
                settings,
                task,
                reason="asked for by a person",
                kind="train" if halves_wanted(settings, task).lora else "refit",
                progress=lambda step, done: bar.update(shown, description=step, completed=done),
            )
        click.echo(f"{task}: {result.in_words} ({result.trained_on} examples, {result.wall_s:.0f} s)")
        if result.version is None:
            raise SystemExit(1)
        return
    if task is not None:
        raise click.UsageError("a single task is trained with --now; without a task all of them are watched")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    click.echo(f"watching {', '.join(t.name for t in settings.tasks)}; stop with Ctrl-C")
    watch(
        settings,
        stop=stop,
        told=lambda name, result: click.echo(f"{name}: {result.in_words}"),
    )


@click.command()
@config_option
def observe(config: Path) -> None:
    """Write every task's correlation, sampling, spend and savings to MLflow."""
    from flows.coach import prefect_at
    from flows.observe import observe as flow

    settings = _settings(config)
    with prefect_at(settings):
        click.echo(f"observed {flow(str(config.resolve()))} champions of {len(settings.tasks)} tasks")


_reason = click.option("--reason", default="", help="Why; kept with the promotion and shown in MLflow.")


@click.command()
@click.argument("task")
@config_option
@click.option("--reason", default="abandoned by a person", show_default=True, help="Why; kept with the run.")
def abandon(task: str, config: Path, reason: str) -> None:
    """Close the unfinished training run of TASK for good; a worker that is at it stops."""
    from flows.coach import abandon as close

    run = close(_settings(config, task), task, reason=f"{reason} ({_person()})")
    if run is None:
        raise TrainingError(f"task {task!r} has no unfinished training run")
    click.echo(f"{task}: the run {run.id} is cancelled; apprentice coach {task} --now starts another")


@click.command()
@click.argument("task")
@click.argument("version")
@config_option
@_reason
def promote(task: str, version: str, config: Path, reason: str) -> None:
    """Make VERSION (its name, or its number in MLflow) the champion of TASK. Does not wait for a training run."""
    _choose(task, version, config, how="person", reason=reason)


@click.command()
@click.argument("task")
@click.argument("version", required=False)
@config_option
@_reason
def rollback(task: str, version: str | None, config: Path, reason: str) -> None:
    """Go back to the champion before this one, or to VERSION. Does not wait for a training run.

    The version that is left counts as no good: nothing goes back to it by itself. apprentice promote undoes it.
    """
    _choose(task, version, config, how="rollback", reason=reason)


def _choose(task: str, name: str | None, config: Path, *, how: PromotedBy, reason: str) -> None:
    from flows.review import choose, previous_champion, version_named
    from flows.workshop import Workshop

    shop = Workshop.open(_settings(config, task))
    try:
        version = version_named(shop, task, name) if name is not None else previous_champion(shop, task)
        champion = shop.store.policy_row(task).champion
        if version.name == champion:
            raise TrainingError(f"{version.name} is the champion of {task!r} already")
        shop.require_adapter(version)
        choose(shop, version, how=how, by=_person(), reason=reason or "no reason given")
        click.echo(f"{task}: {champion} -> {version.name}; routers follow within seconds")
    finally:
        shop.close()


def _person() -> str:
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):  # a container whose user has no name
        return f"somebody@{socket.gethostname()}"


@click.command()
@config_option
@click.option("--port", default=8700, show_default=True, help="Of the router.")
@click.option("--prefect-port", default=4200, show_default=True)
@click.option("--mlflow-port", default=5000, show_default=True)
def up(config: Path, port: int, prefect_port: int, mlflow_port: int) -> None:
    """Start Prefect, MLflow, coach and router together on this machine, and stop them together."""
    from flows.up import run_together

    run_together(_settings(config), config.resolve(), port=port, prefect_port=prefect_port, mlflow_port=mlflow_port)
