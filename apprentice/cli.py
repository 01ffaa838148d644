"""The command `apprentice`.

Commands of other rooms (flows, serving) are named here and imported when they are called: the library itself never
imports them, and `apprentice --help` stays quick.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

import click

from apprentice.errors import ApprenticeError

__all__ = ["main"]

# command -> module:object, and its line in the help
_ELSEWHERE = {
    "serve": ("serving.command:serve", "Answer requests over HTTP."),
    "abandon": ("flows.commands:abandon", "Close a task's unfinished training run for good."),
    "coach": ("flows.commands:coach", "Watch the store and train what is due, or one task now."),
    "observe": ("flows.commands:observe", "Write every task's correlation and cost to MLflow."),
    "promote": ("flows.commands:promote", "Make a version the champion of its task."),
    "rollback": ("flows.commands:rollback", "Go back to the champion before, or to a given version."),
    "replay": ("flows.replay:replay", "Stream recorded traffic through the whole system."),
    "demo": ("flows.replay:demo", "Replay the support tickets in examples/."),
    "up": ("flows.commands:up", "Start router, coach, Prefect and MLflow together."),
}


class _Commands(click.Group):
    def list_commands(self, context: click.Context) -> list[str]:
        return sorted([*super().list_commands(context), *_ELSEWHERE])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _ELSEWHERE:
            return super().get_command(context, name)
        if name in ("replay", "demo"):
            # They show training in a view of their own. Prefect reads this once, when it is imported.
            os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "WARNING")
        target, _ = _ELSEWHERE[name]
        module, _, attribute = target.partition(":")
        try:
            command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            _explain_missing(name, error)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        # Each command's own help would import its room; the table above has the lines.
        rows = []
        for name in self.list_commands(context):
            own = super().get_command(context, name)
            rows.append((name, own.get_short_help_str() if own else _ELSEWHERE[name][1]))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _explain_missing(command: str, error: ModuleNotFoundError) -> NoReturn:
    room = (error.name or "").split(".")[0]
    if room in ("flows", "serving"):
        raise click.ClickException(
            f"`apprentice {command}` runs from a checkout of Apprentice: no {room}/ was found here."
        )
    extra = "server" if command == "serve" else "embedded,flows"
    raise click.ClickException(f"`apprentice {command}` needs {error.name}: pip install 'apprentice-llm[{extra}]'")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="apprentice-llm", prog_name="apprentice")
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
def cli(verbose: bool) -> None:
    """Teach a small local model from the frontier model you pay for, and let it take over what it has earned."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )


config_option = click.option(
    "-c",
    "--config",
    default="apprentice.yaml",
    show_default=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The configuration.",
)


@cli.command()
@config_option
def check(config: Path) -> None:
    """Try what start-up and the first training need.

    Nothing is written, and no vendor is asked. Exits with 1 if there is a problem; what could not be tried is none.
    """
    from apprentice.operate.check import findings
    from apprentice.settings.config import load_settings

    settings = load_settings(config)
    problems = 0
    for finding in findings(settings):
        problems += finding.state == "problem"
        click.echo(f"{finding.state:<9}  {finding.part}: {finding.detail}")
    if problems:
        raise ApprenticeError(f"{config}: {problems} problem{'s' if problems > 1 else ''}, see above")
    tasks = ", ".join(task.name for task in settings.tasks)
    count = f"{len(settings.tasks)} task{'s' if len(settings.tasks) > 1 else ''}"
    click.echo(f"{config} is fine: {count} ({tasks}), remote {settings.remote.model}.")


@cli.command()
def schema() -> None:
    """Print the JSON Schema of apprentice.yaml, for an editor to complete and check it."""
    import json

    from apprentice.settings.settings_schema import settings_schema

    click.echo(json.dumps(settings_schema(), indent=2, ensure_ascii=False))


@cli.command()
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def status(config: Path, as_json: bool) -> None:
    """Show each task's phase, trust, sampling and money."""
    from apprentice.operate.status import run_command

    run_command(config, as_json=as_json)


@cli.command()
@config_option
@click.option("--since", help="First day to count: 2026-03-01, or 30d for the last 30 days.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a page with a picture.")
def report(config: Path, since: str | None, as_json: bool, as_csv: bool, html: Path | None) -> None:
    """Show what was spent and saved, by task, provider, model and day."""
    from apprentice.operate.report import run_command
    from apprentice.settings.config import load_settings

    run_command(load_settings(config), since=since, as_json=as_json, as_csv=as_csv, html_path=html)


@cli.command()
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def budget(config: Path, as_json: bool) -> None:
    """Show the caps, what is spent of them, and which calls hold the rest."""
    from apprentice.operate.reservations import run_budget
    from apprentice.settings.config import load_settings

    run_budget(load_settings(config), as_json=as_json)


@cli.command()
@click.argument("call", type=int)
@click.option("--reason", required=True, help="Why; it is kept with the call and told as an event.")
@config_option
def release(call: int, reason: str, config: Path) -> None:
    """Give back what a CALL holds that its dead process can no longer end; `apprentice budget` has its number."""
    from apprentice.operate.reservations import run_release
    from apprentice.settings.config import load_settings

    run_release(load_settings(config), call, reason)


@cli.command()
@click.argument("scenario", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Where the picture goes (PNG).")
@click.option("--json", "json_out", type=click.Path(dir_okay=False, path_type=Path), help="Where the figures go.")
@click.option("--seed", type=int, help="Random seed of the simulated traffic; the scenario's own if left out.")
@click.option("--task", help="Try this task's thresholds, from the configuration, instead of the scenario's.")
@config_option
def simulate(
    scenario: Path, out: Path | None, json_out: Path | None, seed: int | None, task: str | None, config: Path
) -> None:
    """Try thresholds against a simulated remote and local model."""
    from apprentice.simulation.simulate import run_command

    trust = None
    if task is not None:
        from apprentice.request.judge import trust_settings
        from apprentice.settings.config import load_settings

        settings = load_settings(config)
        if task not in (names := [one.name for one in settings.tasks]):
            raise click.BadParameter(f"{config} has no task {task!r}; it has {', '.join(names)}", param_hint="--task")
        trust = trust_settings(settings, settings.task(task))
    run_command(scenario, out, json_out, seed, trust)


def main() -> None:
    """The entry point: errors of ours are one clear message and exit status 1, never a traceback.

    Exit status 0: done; 1: it failed, or `check` found a problem; 2: the command line was wrong; 130: Ctrl-C.
    """
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # module:Model and module:function stand beside apprentice.yaml, more often than not
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.Abort:
        click.echo("Stopped.", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ApprenticeError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
