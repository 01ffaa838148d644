"""Replay: recorded traffic through the whole system, before going live.

The remote is the recorded answer, spoken in the vendor's own protocol and priced as the configured model would be.
Everything else is real: router, store, budget, local model, training runs (when they are due, between two requests),
gate, promotion. Every answered request is a line in HOME/replay.jsonl, so that a replay that was killed goes on where it
stopped.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import click
import httpx
from rich.console import Console

from apprentice.assembly import assemble
from apprentice.cli import config_option
from apprentice.client import Apprentice
from apprentice.config import Settings, load_settings
from apprentice.errors import ApprenticeError, ConfigError, Problem
from apprentice.schema import SchemaError
from apprentice.testing import RecordedRemote
from flows.coach import coach_task, due_reason
from flows.replay_view import LiveView, Moment, draw_picture, print_summary

__all__ = ["Recorded", "demo", "read_traffic", "replay", "run_replay"]


@dataclass(frozen=True, slots=True)
class Recorded:
    """One recorded request: its line in the file, the input and the answer that the remote gave."""

    line: int
    value: dict[str, Any]
    answer: dict[str, Any]


def read_traffic(
    path: Path, settings: Settings, task_name: str, *, input_key: str, answer_key: str
) -> Iterator[Recorded | Problem]:
    """The usable lines of a JSONL file in order, and a `Problem` with its line number for each that is not.

    ``input_key`` and ``answer_key`` are dotted paths into each object, such as ``answers.gpt-4o``: the longest key that
    exists wins, so that a model's name may hold dots itself.
    """
    task = settings.task(task_name)
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                document = json.loads(text)
            except ValueError as error:
                yield Problem(str(path), f"does not parse ({error}).", "The line is left out.", number)
                continue
            try:
                value, answer = _pick(document, input_key), _pick(document, answer_key)
                yield Recorded(number, task.input_schema.check(value), task.output_schema.check(answer))
            except KeyError as error:
                yield Problem(str(path), f"has no {error.args[0]!r}.", "The line is left out.", number)
            except SchemaError as error:
                yield Problem(str(path), f"does not fit the task: {error}", "The line is left out.", number)


def _pick(document: Any, dotted: str) -> Any:
    if not dotted:
        return document
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        key = ".".join(parts[:n])
        if isinstance(document, Mapping) and key in document:
            return _pick(document[key], ".".join(parts[n:]))
    raise KeyError(dotted)


def run_replay(
    traffic: list[Recorded],
    settings: Settings,
    task_name: str,
    *,
    seed: int,
    view: LiveView,
    live_client: httpx.Client | None = None,
) -> list[Moment]:
    """Stream ``traffic`` through the system that ``settings`` describe, and go on where an earlier call stopped.

    With ``live_client`` the real remote answers instead of the recording.
    """
    log_path = settings.root / "replay.jsonl"
    moments = [_moment(line) for line in _whole_lines(log_path)]
    remote = RecordedRemote()
    draw = random.Random(f"{seed}/{len(moments)}")
    environ = None if live_client else {p.api_key_env: "recorded" for p in settings.remote.providers}
    client = live_client or httpx.Client(transport=remote)
    spend_without = moments[-1].spend_without if moments else Decimal(0)
    with Apprentice.from_config(settings, http_client=client, environ=environ, draw=draw) as apprentice:
        parts = apprentice.parts
        evaluate = parts.judge.evaluator(task_name)
        task = settings.task(task_name)
        for moment in moments:
            view.show(moment)
        _train_if_due(apprentice, task_name, view)
        apprentice.wait_until_serving(task_name)
        with log_path.open("a", encoding="utf-8") as log:
            for i, row in enumerate(traffic[len(moments) :], len(moments)):
                remote.expect(row.value, row.answer)
                calls = remote.calls
                output = apprentice.run(task_name, row.value).output
                asked = remote.calls > calls
                spend_without += parts.teacher.price_of(task, row.value, row.answer)
                state = parts.store.policy_row(task_name)
                moment = Moment(
                    i=i,
                    phase=state.phase,
                    asked_remote=asked,
                    score=evaluate(output, row.answer).score,
                    spend=parts.budget.spent(),
                    spend_without=spend_without,
                    sampling_rate=state.sampling_rate,
                    threshold=state.threshold,
                    correlation=parts.judge.correlation(task_name),
                )
                log.write(json.dumps(asdict(moment), default=str) + "\n")
                log.flush()
                moments.append(moment)
                view.show(moment)
                _train_if_due(apprentice, task_name, view)
    return moments


def _train_if_due(apprentice: Apprentice, task_name: str, view: LiveView) -> None:
    parts = apprentice.parts
    reason = due_reason(parts.settings, parts.store, task_name)
    if reason is None:
        return
    result = coach_task(parts.settings, task_name, reason=reason, engine=parts.engine, progress=view.train)
    verdict = "promoted" if result.promoted else f"not promoted: {result.reason}"
    view.trained(f"trained on {result.trained_on} examples in {result.wall_s:.0f} s: {verdict}")
    apprentice.wait_until_serving(task_name)
