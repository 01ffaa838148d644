"""The commands of this room: apprentice coach, observe, promote, rollback, up."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from apprentice.cli import config_option
from apprentice.config import Settings, load_settings
from apprentice.errors import Problem as _Problem
from apprentice.errors import TrainingError, UnknownTask

__all__ = ["coach", "observe", "promote", "rollback", "up"]


def _settings(config: Path, task: str | None = None) -> Settings:
    settings = load_settings(config)
    names = [t.name for t in settings.tasks]
    if task is not None and task not in names:
        raise UnknownTask(task, [_Problem("task", f"is {task!r}.", f"Configured tasks: {', '.join(names)}.")])
    return settings


@click.command()
@click.argument("task", required=False)
@config_option
@click.option("--now", is_flag=True, help="Train TASK now, due or not, and exit.")
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
                progress=lambda step, done: bar.update(shown, description=step, completed=done),
            )
        click.echo(f"{task}: {result.version or 'no version'}, {'promoted' if result.promoted else 'not promoted'}")
        click.echo(f"{result.reason} ({result.trained_on} examples, {result.wall_s:.0f} s)")
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
        told=lambda name, result: click.echo(
            f"{name}: {result.version} {'promoted' if result.promoted else 'not promoted'}: {result.reason}"
        ),
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


@click.command()
@click.argument("task")
@click.argument("version")
@config_option
def promote(task: str, version: str, config: Path) -> None:
    """Make VERSION (its name, or its number in MLflow) the champion of TASK."""
    _crown(task, version, config)


@click.command()
@click.argument("task")
@click.argument("version", required=False)
@config_option
def rollback(task: str, version: str | None, config: Path) -> None:
    """Go back to the champion before this one, or to VERSION."""
    _crown(task, version, config)


def _crown(task: str, name: str | None, config: Path) -> None:
    from flows.coach import held_lease
    from flows.review import before, crown
    from flows.workshop import Workshop

    shop = Workshop.open(_settings(config, task))
    try:
        version = before(shop, task, name)
        champion = shop.store.policy_row(task).champion
        if version.name == champion:
            raise TrainingError(f"{version.name} is the champion of {task!r} already")
        shop.require_adapter(version)
        with held_lease(shop.store, task):
            crown(shop, version, reason="chosen on the command line")
        click.echo(f"{task}: {champion} -> {version.name}; routers follow within seconds")
    finally:
        shop.close()


@click.command()
@config_option
@click.option("--port", default=8700, show_default=True, help="Of the router.")
@click.option("--prefect-port", default=4200, show_default=True)
@click.option("--mlflow-port", default=5000, show_default=True)
def up(config: Path, port: int, prefect_port: int, mlflow_port: int) -> None:
    """Start Prefect, MLflow, coach and router together on this machine, and stop them together."""
    from flows.up import run_together

    run_together(_settings(config), config.resolve(), port=port, prefect_port=prefect_port, mlflow_port=mlflow_port)
