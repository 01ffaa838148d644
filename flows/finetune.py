"""Step 2: train an adapter on the curated dataset."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from apprentice import secrets
from apprentice.store.records import RunRecord
from flows.bill import close_training, reserve_training, settle_training
from flows.dataset import load_dataset
from flows.runs import advance, run_of
from flows.steps import Trained, read_result, write_result
from flows.trainers import Progress, TrainingJob, TrainingNotStarted, build_trainer
from flows.workshop import Workshop, workshop

__all__ = ["finetune", "finetune_run"]

_log = secrets.logger("apprentice.coach")


@flow(name="finetune", flow_run_name="finetune-{task}", log_prints=False)
def finetune(config: str, task: str, run: str) -> str:
    """Train a run's dataset; returns the adapter's name."""
    artifact: list[Any] = []

    def show(done: float) -> None:
        if not artifact:
            artifact.append(
                create_progress_artifact(progress=0.0, key=f"training-{task.replace('_', '-')}", description="Training")
            )
        update_progress_artifact(artifact_id=artifact[0], progress=100.0 * done)

    with workshop(config, task) as shop:
        return finetune_run(shop, run_of(shop, task, run), show=show).version


def finetune_run(shop: Workshop, run: RunRecord, *, show: Any = lambda _done: None) -> Trained:
    """Train, or take up what an earlier attempt trained."""
    bench = shop.bench(run)
    known = read_result(bench, "trained")
    if known is not None:
        return Trained(**known)
    advance(shop, run, "finetune")
    dataset = load_dataset(shop.datasets(run.task), run.data_digest)
    job = training_job(shop, run, dataset.train)
    trainer = build_trainer(shop.settings.local)
    trainer.preflight(job)
    held = reserve_training(shop, run, trainer, job)
    tracked = shop.tracking.run(run.task, run.id, name=f"{run.task}-{run.id[:8]}")
    shown_at = [0.0]

    def report(progress: Progress) -> None:
        speed = progress.tokens / progress.elapsed_s if progress.elapsed_s else None
        with gap_in_the_curve():
            tracked.metrics(
                {"loss": progress.loss, "validation_loss": progress.validation_loss, "tokens_per_s": speed},
                at_s=shop.clock(),
                step=progress.step,
            )
        shop.advanced("finetune", progress.fraction)
        now = time.monotonic()
        if now - shown_at[0] > 2.0 or progress.step == progress.steps:
            shown_at[0] = now
            with gap_in_the_curve():
                show(progress.fraction)

    try:
        with tracked.system_metrics():
            adapter = trainer.train(job, report)
    except TrainingNotStarted:
        close_training(shop, run, unbilled=True)
        raise
    settle_training(shop, held, adapter)
    tracked.params({**adapter.recipe, "base_model": adapter.base_model, "trained_on": adapter.trained_on})
    tracked.params({f"toolchain.{name}": version for name, version in adapter.toolchain.items()})
    tracked.metrics({"train_wall_s": adapter.wall_s, "train_tokens": float(adapter.tokens)}, at_s=shop.clock())
    trained = Trained(
        adapter.name,
        str(adapter.folder),
        adapter.trained_on,
        dataset.card.held_out,
        adapter.base_model,
        adapter.remote_model,
        {
            "recipe": dict(adapter.recipe),
            "toolchain": dict(adapter.toolchain),
            "wall_s": adapter.wall_s,
            "tokens": adapter.tokens,
            "loss": adapter.loss,
            "left_out": adapter.left_out,
        },
    )
    write_result(bench, "trained", trained)
    return trained


@contextlib.contextmanager
def gap_in_the_curve() -> Iterator[None]:
    """Let the record of a curve fail: hours of training are not given up for a point of it."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  # whatever a tracking server that is down raises
        _log.warning("a point of the training curve could not be recorded: %s", error)


def training_job(shop: Workshop, run: RunRecord, dataset: Path) -> TrainingJob:
    """What the trainer is to do."""
    task, local = shop.task(run.task), shop.settings.local
    return TrainingJob(
        task=run.task,
        dataset=dataset,
        output_schema=task.output_schema,
        base_model=local.training_model or local.base_model,
        root=shop.settings.root,
        work=shop.bench(run),
        adapters=shop.adapters(run.task),
        settings=local.training,
        instructions=task.instructions,
        input_schema=task.input_schema,
    )
