"""Training runs in the store: found, begun, resumed."""

from __future__ import annotations

from apprentice.errors import TrainingError
from apprentice.store.records import RunRecord
from flows.due import LastRun
from flows.workshop import Workshop

__all__ = ["advance", "begin", "last_run", "run_of"]


def run_of(shop: Workshop, task: str, run_id: str) -> RunRecord:
    """A run by its id. Raises `TrainingError`."""
    for run in reversed(shop.store.runs(task)):
        if run.id == run_id:
            return run
    raise TrainingError(f"the store holds no training run {run_id!r} of task {task!r}; start one with apprentice coach")


def begin(shop: Workshop, task: str, reason: str) -> RunRecord:
    """The task's unfinished run, its attempts counted, else a new one over all examples there are now."""
    unfinished = shop.store.open_run(task)
    if unfinished is not None:
        return shop.store.update_run(unfinished.id, attempts=unfinished.attempts + 1)
    runs = shop.store.runs(task)
    high_water = runs[-1].data_high_water if runs else 0
    corpus = runs[-1].corpus_size if runs else 0
    for example in shop.store.examples(task, after=high_water):
        high_water = example.seq
        corpus += 1
    return shop.store.start_run(task, high_water, reason, corpus_size=corpus)


def advance(shop: Workshop, run: RunRecord, step: str) -> None:
    """Note which step a run is at. Attempts are counted by the step: a run that gets further is not stuck."""
    if run_of(shop, run.task, run.id).step != step:
        shop.store.update_run(run.id, step=step, attempts=1)


def last_run(runs: list[RunRecord]) -> LastRun | None:
    """What the arithmetic of `training_due` needs of the newest finished run."""
    finished = [run for run in runs if run.state != "running"]
    return LastRun(finished[-1].corpus_size, failed=finished[-1].state == "failed") if finished else None
