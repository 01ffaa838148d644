"""Replay: recorded traffic through the whole system, before going live.

The remote is the recorded answer, spoken in the vendor's own protocol and priced as the configured model would be.
Everything else is real: router, store, budget, local model, gate, promotion, and training runs, when they are due,
between two requests. Every answered request is a line in HOME/replay.jsonl: a replay that was killed goes on where it
stopped.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args

import click
import httpx
from rich.console import Console

from apprentice.assembly import Assembly
from apprentice.cli import config_option
from apprentice.client import Apprentice
from apprentice.confidence.figures import Figures
from apprentice.confidence.phases import Phase
from apprentice.confidence.settings import TrustSettings
from apprentice.errors import ConfigError, Problem, UnknownTask
from apprentice.lifecycle.due import Due, due_run
from apprentice.local.engine import Engine
from apprentice.registry import ENGINES, TRAINERS
from apprentice.request.judge import trust_settings
from apprentice.schemas.schema import Schema
from apprentice.settings.config import (
    LocalSettings,
    RemoteSettings,
    Settings,
    TrackingSettings,
    load_settings,
    require_key,
)
from apprentice.store import Store
from apprentice.testing import FakeVendor
from apprentice.testing.remote import Vendor
from apprentice.testing.vendors import PROTOCOLS
from flows.coach import CoachResult, coach_task
from flows.lease import LEASE_S, Busy
from flows.replay_promise import Moment, Target, chance_of, course, targets
from flows.replay_view import LiveView, draw_picture, print_summary
from flows.traffic import Recorded, read_traffic

__all__ = ["demo", "replay", "run_replay"]


def run_replay(
    traffic: list[Recorded],
    settings: Settings,
    task_name: str,
    *,
    seed: int,
    view: LiveView,
    live_client: httpx.Client | None = None,
    engine: Engine | None = None,
) -> list[Moment]:
    """Stream ``traffic`` through the system that ``settings`` describe, and go on where an earlier call stopped.

    With ``live_client`` the real remote answers instead of the recording; ``engine`` stands in for the configured one.
    """
    log_path = settings.root / "replay.jsonl"
    moments = list(_logged(log_path))
    remote = settings.remote
    answers: dict[str, dict[str, Any]] = {}
    vendor = FakeVendor(_protocol(remote), lambda value: answers[Schema.dumps(value)], keep_questions=False)
    calls = _Calls(live_client or httpx.Client(transport=vendor.transport()))
    environ = None
    # A recording says the same whenever it is asked, and each call is to be one request's.
    sampling = settings.sampling.model_copy(update={"asked_twice": 0.0, "asked_again": 0})
    settings = settings.model_copy(update={"sampling": sampling})
    if live_client is None:
        # The recording has one answer to each request, so there is nobody to fall back on.
        settings = settings.model_copy(update={"remote": remote.model_copy(update={"additional_providers": ()})})
        environ = {remote.api_key_env: vendor.key}
    draw = random.Random(f"{seed}/{len(moments)}")
    recorded = [row.answer for row in traffic]
    with Apprentice.from_config(
        settings, http_client=calls.client, environ=environ, draw=draw, engine=engine
    ) as apprentice:
        parts, task = apprentice.parts, settings.task(task_name)
        evaluate = parts.judge.evaluator(task_name)
        for moment in moments:
            view.show(moment)
        without = _Without()
        for row, moment in zip(traffic, moments, strict=False):
            estimate = parts.teacher.estimate(task, row.value, row.answer)
            without.resume(moment.spend_without, estimate, asked=moment.asked_remote)
        _, bills = _spent(parts.store)
        _train_if_due(apprentice, task_name, view)
        with log_path.open("a", encoding="utf-8") as log:
            for i, row in enumerate(traffic[len(moments) :], len(moments)):
                answers = {Schema.dumps(row.value): row.answer}
                before = calls.made
                output = apprentice.run(task_name, row.value).output
                asked = calls.made > before
                before_it, (spent, bills) = bills, _spent(parts.store)
                estimate = parts.teacher.estimate(task, row.value, row.answer)
                without.count(bills - before_it if asked else None, estimate)
                state = parts.store.policy_row(task_name)
                moment = Moment(
                    i=i,
                    phase=state.phase,
                    asked_remote=asked,
                    score=evaluate(output, row.answer).score,
                    chance=None if asked else chance_of(output, recorded, i, evaluate),
                    spend=spent,
                    spend_without=without.total,
                    sampling_rate=state.sampling_rate,
                    threshold=state.threshold,
                    correlation=_correlation(parts.judge.figures(task_name)),
                    at=time.time(),
                )
                log.write(json.dumps(asdict(moment), default=str) + "\n")
                log.flush()
                moments.append(moment)
                view.show(moment)
                _train_if_due(apprentice, task_name, view)
    return moments


class _Without:
    """What the remote would have cost for everything: its bill if it was asked, an estimate if it was not.

    The estimate counts bytes for tokens, so it is scaled by what the bills so far say about it.
    """

    def __init__(self) -> None:
        self.total = Decimal(0)
        self._billed = self._estimated = Decimal(0)

    def count(self, bill: Decimal | None, estimate: Decimal) -> None:
        """One more request, whose answer was billed, or (None) came from the local model."""
        if bill is None:
            self.total += estimate * (self._billed / self._estimated if self._estimated else Decimal(1))
        else:
            self.total += bill
            self._billed += bill
            self._estimated += estimate

    def resume(self, total: Decimal, estimate: Decimal, *, asked: bool) -> None:
        """A request that an earlier call counted, after which the sum was ``total``."""
        if asked:
            self._billed += total - self.total
            self._estimated += estimate
        self.total = total


def _spent(store: Store) -> tuple[Decimal, Decimal]:
    """What was spent in all, and the part of it that answers cost; the rest is a vendor's training."""
    rows = store.spend()
    answers = sum((row.cost for row in rows if row.is_answering), Decimal(0))
    return sum((row.cost for row in rows), Decimal(0)), answers


def _protocol(remote: RemoteSettings) -> Vendor:
    """Whose protocol the recorded answers are given in. Raises `ConfigError`."""
    name = "openai_responses" if remote.provider == "openai" and remote.api == "responses" else remote.provider
    known = [vendor for vendor in get_args(Vendor.__value__) if vendor == name]
    if not known:
        message = f"is {name!r}, for which a replay has no stand-in."
        remedy = (
            f"Replay with one of {', '.join(PROTOCOLS)}: the answers are recorded, so their protocol decides nothing."
        )
        raise ConfigError("replay", [Problem("remote.provider", message, remedy)])
    vendor: Vendor = known[0]
    return vendor


class _Calls:
    """Counts what a client sends."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client
        self.made = 0
        client.event_hooks = {"request": [self._count]}

    def _count(self, request: httpx.Request) -> None:
        self.made += 1


def _correlation(figures: Figures) -> float | None:
    """Of the served slice in phase 3, of everything the two answered before."""
    scope = figures.window_served if figures.phase is Phase.SERVE else figures.window_all
    return scope.correlation.value if scope.correlation else None


def _logged(path: Path) -> Iterator[Moment]:
    """The moments of an earlier call. A last line that a kill cut in half is removed from the file."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    for line in whole.splitlines():
        values = json.loads(line)
        money = {key: Decimal(values[key]) for key in ("spend", "spend_without")}
        yield Moment(**{**values, **money})


def _train_if_due(apprentice: Apprentice, task_name: str, view: LiveView) -> None:
    parts = apprentice.parts
    while (due := due_run(parts.settings, parts.store, task_name, time.time())) is not None:
        result = _coached(parts, task_name, due, view)
        verdict = "promoted" if result.promoted else f"not promoted: {result.reason}"
        done = "trained on" if due.kind == "train" else "head fitted on"
        view.trained(f"{done} {result.trained_on} examples in {result.wall_s:.0f} s: {verdict}")
        apprentice.wait_until_serving(task_name)


def _coached(parts: Assembly, task_name: str, due: Due, view: LiveView) -> CoachResult:
    """Train. Nobody else trains in a replay's home: a lease that is held was left by a replay that was killed."""
    ends = time.monotonic() + 2 * LEASE_S
    while True:
        try:
            return coach_task(
                parts.settings, task_name, reason=due.reason, kind=due.kind, engine=parts.engine, progress=view.train
            )
        except Busy:
            if time.monotonic() > ends:
                raise
            view.train("waiting for the lease of a replay that was killed", 0.0)
            time.sleep(1.0)


def summarise(
    moments: list[Moment], store: Store, task_name: str, wall_s: float, promise: TrustSettings
) -> dict[str, Any]:
    """The figures of a replay, as its ``--json`` writes them; ``promise`` is what the task's thresholds promise."""
    tail = moments[len(moments) * 2 // 3 :]
    local = [m for m in moments if not m.asked_remote]
    counts = {"local": 0, "deferred": 0, "spot_check": 0}
    for count in store.counts(task_name):
        if count.outcome in counts:
            counts[count.outcome] += count.n
    decided = counts["local"] + counts["deferred"]
    phases = [{"phase": 1, "from_request": 0}]
    for moment in moments:
        if moment.phase != phases[-1]["phase"]:
            phases.append({"phase": moment.phase, "from_request": moment.i + 1})
    return {
        "requests": len(moments),
        "remote_calls": sum(m.asked_remote for m in moments),
        "remote_share": _mean([m.asked_remote for m in moments]),
        "remote_share_tail": _mean([m.asked_remote for m in tail]),
        "agreement": _mean([m.score for m in moments]),
        "agreement_local": _mean([m.score for m in local]) if local else None,
        # Spot checks are drawn before the answer is known, so leaving them out does not bend the share.
        "coverage": counts["local"] / decided if decided else None,
        "checks": counts["spot_check"],
        "deferred": counts["deferred"],
        "promises": [_outcome(moments, target) for target in targets(promise)],
        "phases": phases,
        "versions": [
            {
                "version": version.name,
                "kind": version.record.get("kind", "train"),
                "trained_on": version.trained_on,
                "promoted": version.status in ("champion", "retired", "rolled_back"),
                "reason": version.reason,
                "at_request": sum(1 for m in moments if m.at <= version.created_at),
            }
            for version in store.versions(task_name)
        ],
        "spend": float(moments[-1].spend) if moments else 0.0,
        "spend_without": float(moments[-1].spend_without) if moments else 0.0,
        "wall_seconds": round(wall_s, 1),
    }


def _outcome(moments: list[Moment], target: Target) -> dict[str, Any]:
    """A target beside what came of it, with its 95 % interval; None where nothing was answered locally."""
    *_, last = [None, *course(moments, target.figure)]
    found = (None, None, None) if last is None else (last.value, last.low, last.high)
    promised = {"figure": target.figure, "bound": target.bound, "limit": target.limit}
    return {**promised, **dict(zip(("realised", "low", "high"), found, strict=True))}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _in_home(config: Path, home: Path) -> Settings:
    """The settings of ``config``, with everything that they write under ``home``."""
    home.mkdir(parents=True, exist_ok=True)
    copy = home / "apprentice.yaml"
    if copy.exists() and copy.read_bytes() != config.read_bytes():
        problem = Problem(
            "--home", f"{home} holds a replay of another configuration.", "Give another folder, or remove it."
        )
        raise ConfigError(str(config), [problem])
    shutil.copyfile(config, copy)
    settings = load_settings(copy)
    _refuse_bills(settings.local)
    # What the file says of other places is meant for going live: a replay stays in its folder.
    local = settings.local.model_copy(update={"model_dir": Path("models")})
    return settings.model_copy(
        update={"local": local, "store": "sqlite:///apprentice.db", "tracking": TrackingSettings()}
    )


def _refuse_bills(local: LocalSettings) -> None:
    """A replay has a store, and so caps, of its own: what a vendor bills for it would count under no cap of yours."""
    paid = {
        "local.fine_tune_backend": TRAINERS.find(local.fine_tune_backend).made.is_paid,
        "local.backend": ENGINES.find(local.backend).made.is_paid,
    }
    remedy = "Replay with fine_tune_backend: huggingface and backend: embedded; for the real thing, go live."
    problems = [
        Problem(path, "has a vendor train or answer for money, outside the caps of your installation.", remedy)
        for path, is_paid in paid.items()
        if is_paid
    ]
    if problems:
        raise ConfigError("replay", problems)


def _play(
    file: Path,
    settings: Settings,
    task_name: str,
    *,
    input_key: str,
    answer_key: str,
    limit: int | None,
    seed: int,
    title: str,
    json_out: Path | None,
    live_client: httpx.Client | None = None,
) -> dict[str, Any]:
    """Read, replay, summarise and show. The figures are written first: a picture that fails must not lose them."""
    console = Console()
    if task_name not in {task.name for task in settings.tasks}:
        known = ", ".join(task.name for task in settings.tasks)
        raise UnknownTask(task_name, [Problem("--task", f"there is no task {task_name!r}.", f"Tasks: {known}.")])
    traffic: list[Recorded] = []
    skipped: list[Problem] = []
    for row in read_traffic(file, settings, task_name, input_key=input_key, answer_key=answer_key):
        if limit is not None and len(traffic) == limit:
            break
        if isinstance(row, Recorded):
            traffic.append(row)
        else:
            skipped.append(row)
    for problem in skipped[:5]:
        console.print(f"[yellow]{problem}[/yellow]", soft_wrap=True)
    if skipped:
        console.print(f"[yellow]{len(skipped)} of {len(skipped) + len(traffic)} lines are left out.[/yellow]")
    if not traffic:
        raise ConfigError(str(file), [Problem("file", "holds no usable line.", "Check --input, --answer and --task.")])
    started = time.monotonic()
    with LiveView(console, len(traffic), title) as view:
        moments = run_replay(traffic, settings, task_name, seed=seed, view=view, live_client=live_client)
    wall_s = time.monotonic() - started
    promise = trust_settings(settings, settings.task(task_name))
    with Store.open(settings.store_url) as store:
        summary = {**summarise(moments, store, task_name, wall_s, promise), "skipped_lines": len(skipped)}
    if json_out is not None:
        json_out.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print_summary(console, summary, moments)
    picture = settings.root / "replay.png"
    draw_picture(picture, moments, summary, title)
    console.print(f"picture: {picture}")
    return summary


_ROOT = Path(__file__).parents[1]
_file = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("file", type=_file)
@click.option("--task", "task_name", required=True, help="The task that the traffic belongs to.")
@config_option
@click.option("--input", "input_key", default="input", show_default=True, help="Where each line has the input.")
@click.option(
    "--answer",
    "answer_key",
    default="answer",
    show_default=True,
    help="Where it has the answer: choices.0.message.content",
)
@click.option("--limit", type=click.IntRange(min=1), help="Stop after this many requests.")
@click.option("--seed", default=0, show_default=True, help="Of the spot checks.")
@click.option(
    "--home",
    type=click.Path(file_okay=False, path_type=Path),
    help="A folder of its own; one that was stopped goes on.",
)
@click.option("--json", "json_out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here.")
def replay(
    file: Path,
    task_name: str,
    config: Path,
    input_key: str,
    answer_key: str,
    limit: int | None,
    seed: int,
    home: Path | None,
    json_out: Path | None,
) -> None:
    """Stream recorded traffic through the whole system.

    FILE has a JSON object on each line, with a request's input and the answer that the remote gave, which may be JSON
    text. The remote is that answer, at the price of the configured model; everything else is real, training included.

    Exits with 1 when lines had to be left out.
    """
    home = home or Path(tempfile.mkdtemp(prefix="replay-", dir="."))
    settings = _in_home(config, home)
    summary = _play(
        file,
        settings,
        task_name,
        input_key=input_key,
        answer_key=answer_key,
        limit=limit,
        seed=seed,
        title=f"{file.name}: {task_name}",
        json_out=json_out,
    )
    if summary["skipped_lines"]:
        sys.exit(1)


@click.command()
@click.option("--live", is_flag=True, help="Ask the real remote (its key must be set), for a dollar at most.")
@click.option("--home", default=".demo", show_default=True, type=click.Path(file_okay=False, path_type=Path))
def demo(live: bool, home: Path) -> None:
    """Replay 660 support tickets through the whole system, training included."""
    if home.exists():
        shutil.rmtree(home)
    settings = _in_home(_ROOT / "apprentice.yaml", home)
    client = None
    if live:
        cap = settings.budget.model_copy(update={"daily": Decimal(1), "weekly": Decimal(1), "monthly": Decimal(1)})
        settings = settings.model_copy(update={"budget": cap})
        require_key(settings.remote)
        client = httpx.Client()
    _play(
        _ROOT / "examples" / "support_tickets" / "tickets.jsonl",
        settings,
        "classify_ticket",
        input_key="input",
        answer_key="answer",
        limit=None,
        seed=0,
        title="660 support tickets",
        json_out=home / "summary.json",
        live_client=client,
    )
    Console().print(_NEXT.format(home=home), soft_wrap=True, highlight=False)


_NEXT = """
What to open next, in {home}/:
  replay.png     the picture;  summary.json  the figures
  mlflow ui      .venv/bin/mlflow ui --backend-store-uri sqlite:///{home}/mlflow.db
  prefect ui     PREFECT_HOME={home}/.prefect .venv/bin/prefect server start
With a real key:
  export ANTHROPIC_API_KEY=...
  make demo LIVE=1                   the same tickets, answered by the real model, for a dollar at most
  .venv/bin/apprentice serve         POST a ticket to http://127.0.0.1:8000/v1/tasks/classify_ticket
"""
