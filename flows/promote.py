"""Step 4: the gate, and what follows from its verdict."""

from __future__ import annotations

import uuid
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from apprentice.store.records import ComparisonRecord, RunRecord, VersionRecord
from flows.dataset import Card, load_dataset, write_whole
from flows.gate import Evidence, Pair, Verdict, decide
from flows.promotion_record import promotion_record
from flows.runs import advance, run_of
from flows.steps import Validated
from flows.tracking import CANDIDATE
from flows.validate import validate_run
from flows.workshop import Workshop, workshop

__all__ = ["make_champion", "promote", "promote_run"]


@flow(name="promote", log_prints=False)
def promote(config: str, task: str, run: str) -> bool:
    """Hold a run's candidate to the gate; True where it became champion."""
    with workshop(config) as shop:
        verdict, record = promote_run(shop, run_of(shop, task, run))
    create_markdown_artifact(record, key=f"promotion-{task.replace('_', '-')}", description="Promotion record")
    return verdict.promoted


def promote_run(shop: Workshop, run: RunRecord) -> tuple[Verdict, str]:
    """Decide, and carry the decision out. Each part can be repeated: a killed run comes here again."""
    validated = validate_run(shop, run)
    version = shop.store.version(run.task, validated.version)
    if version is None:
        raise LookupError(f"the store holds no version {validated.version!r} of {run.task!r}; run finetune again")
    advance(shop, run, "promote")
    shop.progress("promote", 0.0)
    task = shop.task(run.task)
    already = shop.store.policy_row(run.task).champion == version.name
    verdict = decide(
        evidence(validated, serving=validated.champion is not None and shop.store.policy_row(run.task).phase == 3),
        coaching_trigger=task.confidence_thresholds.coaching_trigger,
        margin=shop.settings.local.promotion_margin,
    )
    if already:  # a worker was killed between the store and the registry
        verdict = Verdict(True, version.reason, verdict.checks)
    waits = verdict.promoted and task.promotion == "review" and not already
    card = load_dataset(shop.datasets(run.task), run.data_digest).card
    record = promotion_record(version, run, validated, verdict, card, waits=waits)
    _write_record(shop, version, run, verdict, record, card)
    if waits:
        shop.store.set_version_status(
            run.task, version.name, "candidate", "passed the gate; waits for a person to move the alias champion"
        )
        return Verdict(False, "passed the gate; waits for review", verdict.checks), record
    if verdict.promoted:
        make_champion(shop, version, seed=seeds(shop, run, validated), reason=verdict.reason)
    else:
        shop.store.set_version_status(run.task, version.name, "rejected", verdict.reason)
        shop.engine.unload(version.name)  # nobody will ask it again; a server may be shared and is not ours to fill
        shop.judge.refuse(run.task, verdict.reason)
        if version.mlflow_version is not None:
            shop.tracking.drop_alias(run.task, CANDIDATE)
    shop.progress("promote", 1.0)
    return verdict, record


def evidence(validated: Validated, *, serving: bool) -> Evidence:
    """What the gate looks at, from what validate found."""
    pairs = [Pair(a.score or 0.0, a.champion) for a in validated.answers if a.champion is not None]
    return Evidence(
        answered=len(validated.answers),
        valid=sum(a.score is not None for a in validated.answers),
        correlation=validated.correlation,
        correlation_low=validated.correlation_low,
        active=validated.active,
        reproduced=validated.reproduced,
        pairs=pairs if validated.champion not in (None, validated.version) else None,
        serving=serving,
    )


def seeds(shop: Workshop, run: RunRecord, validated: Validated) -> list[ComparisonRecord]:
    """The held-out comparisons, with which the new champion's trust begins.

    Once a task serves, most examples are requests that were deferred for being hard. Each seed remembers how readily
    its answer was bought, so that together they describe the traffic.
    """
    bought = shop.store.overbought(run.task, {a.id for a in validated.answers})
    at = shop.clock()
    return [
        ComparisonRecord(
            id=uuid.uuid4().hex,
            task=run.task,
            request_id=a.id,
            version=validated.version,
            score=a.score,
            parts=a.parts,
            confidence=a.confidence,
            local=a.local,
            remote=a.remote,
            probability=probability,
            sampling_rate=rate,
            served=False,
            seeded=True,
            created_at=at,
        )
        for a in validated.answers
        for rate, probability in [bought.get(a.id, (1.0, 1.0))]
        if a.score is not None and a.local is not None and a.confidence is not None
    ]


def make_champion(shop: Workshop, version: VersionRecord, *, seed: list[ComparisonRecord], reason: str) -> None:
    """Switch the policy in one transaction, then the registry's aliases. Nothing happens twice."""
    if shop.store.policy_row(version.task).champion != version.name:
        attempts = _attempts(shop.store.versions(version.task), version)
        shop.judge.promote(version.task, version.name, seed, attempts=attempts, reason=reason)
    if version.mlflow_version is not None:
        shop.tracking.crown(version.task, version.name, version.mlflow_version)
        if shop.tracking.aliased(version.task, CANDIDATE) == version.name:
            shop.tracking.drop_alias(version.task, CANDIDATE)


def _attempts(versions: list[VersionRecord], version: VersionRecord) -> int:
    """Candidates tried on the held-out examples since the last promotion, this one included."""
    tried = 1
    for earlier in reversed([v for v in versions if v.created_at < version.created_at and v.name != version.name]):
        if earlier.status != "rejected":
            break
        tried += 1
    return tried


def _write_record(
    shop: Workshop, version: VersionRecord, run: RunRecord, verdict: Verdict, record: str, card: Card
) -> None:
    folder = shop.version_folder(version)
    if folder is not None:
        write_whole(folder / "promotion.md", record)
    if version.mlflow_version is None:
        return
    tags: dict[str, Any] = {
        "apprentice.status": "passed" if verdict.promoted else "rejected",
        "apprentice.reason": verdict.reason[:4000],
        "apprentice.teachers": ", ".join(f"{model} {n}" for model, n in card.models.items())[:4000],
        **{f"apprentice.{name}": f"{value:.4f}" for name, value in verdict.figures().items()},
    }
    shop.tracking.describe(run.task, version.mlflow_version, description=record, tags=tags)
    tracked = shop.tracking.run(run.task, run.id, name=f"{run.task}-{run.id[:8]}")
    tracked.text(record, "promotion.md")
