"""When a task is to be trained: the arithmetic, and what it needs of the store. `flows.dispatch` carries it out.

Two kinds of run: a *refit* fits the student's head anew and takes seconds, *training* teaches the base model an
adapter. A refit goes first: what it costs is nothing beside what an adapter's training does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from apprentice.lifecycle.changes import RemoteChange, remote_change
from apprentice.settings.config import Settings
from apprentice.store import Store
from apprentice.store.records import RunKind, RunRecord
from apprentice.student.halves import halves_of, halves_wanted

__all__ = ["Due", "LastRun", "due_reason", "due_run", "last_run", "training_due"]

_AGAIN_S, _AGAIN_AT_MOST_S = 900.0, 86_400.0


@dataclass(frozen=True, slots=True)
class Due:
    """A run that is due now, and why, in words."""

    kind: RunKind
    reason: str


@dataclass(frozen=True, slots=True)
class LastRun:
    """The newest finished run of a task: how many examples there were, and if it broke down, when.

    ``failures`` counts the runs that broke down in a row, ``ended_s_ago`` is the time since the last of them.
    """

    corpus_size: int
    failures: int = 0
    ended_s_ago: float = 0.0


def training_due(
    examples: int,
    last: LastRun | None,
    *,
    first_at: int,
    batch: int,
    growth: float,
    escalated: str | None = None,
    has_champion: bool = True,
) -> str | None:
    """Why training is due now, in words; None where it is not.

    The first run is due at ``first_at`` examples. Later ones are due when ``batch`` new examples have come and the
    corpus grew by the share ``growth``: runs then cost together at most (1 + growth) / growth times the last one, so
    the bill stays linear in the traffic. An escalation is due at once, provided there is anything new to learn from.
    While nothing is promoted, half the growth is enough: the first version is worth the most. A run that broke down is
    tried again after a quarter of an hour, then after twice as long each time, a day at most.
    """
    if last is None:
        return f"{examples} examples, {first_at} needed for the first run" if examples >= first_at else None
    if last.failures and last.ended_s_ago >= min(_AGAIN_S * 2 ** (last.failures - 1), _AGAIN_AT_MOST_S):
        times = "once" if last.failures == 1 else f"{last.failures} times in a row"
        return f"tries again: it failed {times}"
    new = examples - last.corpus_size
    if escalated and new > 0:
        return f"escalated: {escalated}" if not escalated.startswith("escalated") else escalated
    needed = growth if has_champion else growth / 2
    if new >= batch and new >= needed * last.corpus_size:
        return f"{new} new examples since {last.corpus_size}"
    return None


def last_run(runs: Sequence[RunRecord], now: float) -> LastRun | None:
    """What `training_due` needs of the newest finished one of a task's runs. ``now`` is in Unix seconds."""
    finished = [run for run in runs if run.state != "running"]
    if not finished:
        return None
    last, failures = finished[-1], 0
    for run in reversed(finished):
        if run.state != "failed":
            break
        failures += 1
    return LastRun(last.corpus_size, failures, max(0.0, now - (last.finished_at or now)))


def due_reason(settings: Settings, store: Store, task: str, now: float) -> str | None:
    """Why a run of a task is due at ``now``, in words; None if none is. See `due_run`."""
    due = due_run(settings, store, task, now)
    return None if due is None else due.reason


def due_run(settings: Settings, store: Store, task: str, now: float) -> Due | None:
    """The run that a task is due at ``now`` (Unix seconds), an unfinished one to be taken up included; None if none."""
    unfinished = store.open_run(task)
    if unfinished is not None:
        return Due(unfinished.kind, f"resumes: {unfinished.reason}")
    state, runs, kept = store.policy_row(task), store.runs(task), store.example_totals(task).kept
    wanted, student = halves_wanted(settings, task), settings.local.student
    first_at = settings.task(task).confidence_thresholds.phase1_to_phase2
    changed = remote_change(store, task)
    fresh = kept if changed is None else store.count_examples_since(task, changed.since)
    serving = store.version(task, state.champion) if state.champion is not None else None
    # A version with no head, trained before there were any, gets one with its next adapter.
    learnable = changed is None or fresh >= student.head_from
    if learnable and wanted.head and ("head" in halves_of(serving) if serving is not None else wanted.alone):
        reason = training_due(
            kept,
            last_run(runs, now),  # of either kind: training fits the head, too
            first_at=student.head_from,
            batch=student.refit_every,
            growth=student.refit_growth,
            escalated=_not_yet_learnt(changed, runs),
        )
        if reason is not None:
            return Due("refit", reason)
    if not wanted.lora or (changed is not None and fresh < first_at):
        return None
    trained = [run for run in runs if run.kind == "train"]
    reason = training_due(
        kept,
        last_run(trained, now),
        first_at=first_at,
        batch=settings.local.fine_tune_batch_size,
        growth=settings.local.fine_tune_growth,
        escalated=_not_yet_learnt(changed, trained) or state.training_due,
        has_champion=state.champion is not None,
    )
    return None if reason is None else Due("train", reason)


def _not_yet_learnt(changed: RemoteChange | None, runs: Sequence[RunRecord]) -> str | None:
    """Why there must be another run: none of these began since it is known that the remote changed."""
    if changed is None or any(run.started_at >= changed.at for run in runs):
        return None
    return "the remote answers differently than it did"
