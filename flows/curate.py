"""Step 1: from kept examples to a dataset named by its content."""

from __future__ import annotations

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from apprentice.lifecycle.changes import remote_change
from apprentice.store.records import RunRecord
from flows.curation import curate_examples
from flows.dataset import CuratedDataset, load_dataset
from flows.runs import advance, run_of
from flows.workshop import Workshop, workshop

__all__ = ["curate", "curate_run"]

_DISAGREEMENTS = 500  # the newest comparisons that scored below 1, at most


@flow(name="curate", flow_run_name="curate-{task}", log_prints=False)
def curate(config: str, task: str, run: str) -> str:
    """Curate a run's examples; returns the dataset's digest."""
    with workshop(config, task) as shop:
        dataset = curate_run(shop, run_of(shop, task, run))
    create_markdown_artifact(
        dataset.card.markdown(dataset.digest), key=f"dataset-{task.replace('_', '-')}", description="Dataset card"
    )
    return dataset.digest


def curate_run(shop: Workshop, run: RunRecord) -> CuratedDataset:
    """Curate, or load what an earlier attempt of the same run curated, and record it in the store and MLflow."""
    folder = shop.datasets(run.task)
    if run.data_digest:
        dataset = load_dataset(folder, run.data_digest)
    else:
        advance(shop, run, "curate")
        training = shop.settings.local.training
        changed = remote_change(shop.store, run.task)
        since = changed.since if changed is not None else float("-inf")
        dataset = curate_examples(
            lambda: (
                e for e in shop.store.examples(run.task) if e.seq <= run.data_high_water and e.created_at >= since
            ),
            shop.task(run.task),
            folder,
            held_out=training.held_out,
            max_held_out=training.max_held_out,
            recent_disagreements=shop.store.recent_disagreements(run.task, _DISAGREEMENTS),
            progress=lambda done: shop.advanced("curate", done),
        )
        shop.store.update_run(run.id, data_digest=dataset.digest)
    tracked = shop.tracking.run(run.task, run.id, name=f"{run.task}-{run.id[:8]}")
    profile = {"rows": dataset.card.trained_on, "balance": dataset.card.balance}
    tracked.dataset(
        name=f"{run.task}.train", digest=dataset.digest, source=str(dataset.train), profile=profile, context="training"
    )
    held_out = {"rows": dataset.card.held_out}
    tracked.dataset(
        name=f"{run.task}.held_out",
        digest=dataset.digest,
        source=str(dataset.held_out),
        profile=held_out,
        context="evaluation",
    )
    tracked.text(dataset.card.markdown(dataset.digest), "dataset.md")
    return dataset
