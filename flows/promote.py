"""Step 5: the gate, and what follows from its verdict."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import takewhile
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from apprentice.confidence.settings import TrustSettings
from apprentice.errors import ChosenMeanwhile
from apprentice.events.kinds import EventKind
from apprentice.lifecycle.changes import changed_at
from apprentice.request.judge import trust_settings
from apprentice.store.records import (
    ComparisonRecord,
    PromotedBy,
    PromotionRecord,
    RunRecord,
    RunState,
    VersionRecord,
)
from flows.coverage import both_told, compare
from flows.dataset import Card, load_dataset, write_whole
from flows.gate import Evidence, Pair, Verdict, decide
from flows.promotion_record import promotion_record
from flows.runs import advance, close_run, run_of
from flows.steps import Validated
from flows.tracking import CANDIDATE, CHAMPION
from flows.validate import validate_run
from flows.workshop import Workshop, workshop

__all__ = [
    "BY_ALIAS",
    "attempts_of",
    "make_champion",
    "moved_alias",
    "promote",
    "promote_run",
    "register_champion",
    "seeds",
    "show_statuses",
]

BY_ALIAS = "the alias champion in MLflow"
"""Who chose, if a person moved the alias."""
_NEVER_CHOSEN = ("rejected", "candidate")


@flow(name="promote", flow_run_name="promote-{task}", log_prints=False)
def promote(config: str, task: str, run: str) -> bool:
    """Hold a run's candidate to the gate; True where it became champion."""
    with workshop(config, task) as shop:
        verdict, record = promote_run(shop, run_of(shop, task, run))
    create_markdown_artifact(record, key=f"promotion-{task.replace('_', '-')}", description="Promotion record")
    return verdict.promoted


def promote_run(shop: Workshop, run: RunRecord) -> tuple[Verdict, str]:
    """Decide, carry the decision out, and close the run. Each part can be repeated: a killed run comes here again.

    A person's word stands: over a champion chosen since the run began, and over a version rolled back or refused
    before, nothing is promoted by itself.
    """
    validated = validate_run(shop, run)
    version = shop.store.version(run.task, validated.version)
    if version is None:
        raise LookupError(f"the store holds no version {validated.version!r} of {run.task!r}; run finetune again")
    advance(shop, run, "promote")
    shop.advanced("promote", 0.0)
    task = shop.task(run.task)
    champion = shop.store.policy_row(run.task).champion
    serving = shop.store.version(run.task, champion) if champion is not None else None
    if serving is not None and shop.tracking.aliased(run.task, CHAMPION) == champion != shop.tracking.agreed(run.task):
        register_champion(shop, serving)  # whoever promoted it died half-way
    promotions = [p for p in shop.store.promotions(run.task) if p.seq > run.promotions_seen]
    # Promoted by a worker that was killed since, or trained again, to the byte, by a run of its own.
    already = champion == version.name or any(p.version == version.name and p.how == "gate" for p in promotions)
    verdict = decide(
        evidence(
            validated,
            serving=champion is not None and shop.store.policy_row(run.task).phase == 3,
            refit=run.kind == "refit",
            promise=trust_settings(shop.settings, task),
        ),
        coaching_trigger=task.confidence_thresholds.coaching_trigger,
        margin=shop.settings.local.promotion_margin,
    )
    if already:  # a worker was killed between the store and the registry
        verdict = Verdict(True, version.reason, verdict.checks)
    if not already and version.status == "rejected":
        verdict = Verdict(False, version.reason, verdict.checks)
    why = None
    if verdict.promoted and not already:
        why = _needs_a_person(shop, version, promotions) or ("" if task.promotion == "review" else None)
    waits = why is not None
    card = load_dataset(shop.datasets(run.task), run.data_digest).card
    record = promotion_record(version, run, validated, verdict, card, waits=waits)
    _write_record(shop, version, run, verdict, record, card)
    if verdict.promoted and why is None:
        try:
            if not already:
                seed = seeds(shop, run, validated)
                make_champion(
                    shop,
                    version,
                    seed=seed,
                    reason=verdict.reason,
                    since=run.promotions_seen,
                    carries=validated.carries if champion == validated.champion else None,
                )
            elif champion == version.name:
                register_champion(shop, version)
        except ChosenMeanwhile as chosen:
            why = str(chosen)
    shop.advanced("promote", 1.0)
    state: RunState
    if why is not None:
        state, verdict = "waits_for_review", _wait(shop, version, verdict, why)
    elif verdict.promoted:
        state = "completed"
    else:
        state = "rejected"
        _refuse(shop, version, verdict.reason)
    close_run(shop, run, state)
    return verdict, record


def _needs_a_person(shop: Workshop, version: VersionRecord, since: list[PromotionRecord]) -> str | None:
    """Why a version that passed the gate is not promoted by itself, or None."""
    chosen = [p for p in since if p.how != "gate"]
    if chosen:
        return f"{chosen[-1].by} made {chosen[-1].version} champion after this run had begun"
    if version.status == "rolled_back":
        return f"it was rolled back before ({version.reason})"
    moved = moved_alias(shop, version.task)
    if moved is not None:
        return f"the alias champion was moved to {moved}"
    return None


def _wait(shop: Workshop, version: VersionRecord, verdict: Verdict, why: str) -> Verdict:
    reason = "passed the gate; waits for review" + (f": {why}" if why else "")
    if version.status != "rolled_back":
        shop.store.set_version_status(version.task, version.name, "candidate", reason)
        show_statuses(shop, version.task)
    told = shop.store.latest_event(version.task, "waits_for_review")
    if told is None or told.evidence.get("version") != version.name:
        evidence = {"version": version.name, "mlflow_version": version.mlflow_version, "reason": reason}
        remedy = f"move the alias champion to it in MLflow, or run apprentice promote {version.task} {version.name}"
        shop.alerts.emit(
            EventKind.WAITS_FOR_REVIEW, version.task, {**evidence, "to_promote_it": remedy}, about=version.name
        )
    return Verdict(False, reason, verdict.checks)


def _refuse(shop: Workshop, version: VersionRecord, reason: str) -> None:
    shop.store.set_version_status(version.task, version.name, "rejected", reason)
    shop.judge.refuse(version.task, reason)  # first: what is under alarm serves until then
    shop.let_go(version.name)  # a server may be shared and is not ours to fill
    if version.mlflow_version is not None and shop.tracking.aliased(version.task, CANDIDATE) == version.name:
        shop.tracking.drop_alias(version.task, CANDIDATE)
    show_statuses(shop, version.task)


def evidence(validated: Validated, *, serving: bool, promise: TrustSettings, refit: bool = False) -> Evidence:
    """What the gate looks at, from what validate found; ``promise`` is what the task is to keep."""
    pairs = [Pair(a.score or 0.0, a.champion, a.weight) for a in validated.answers if a.champion is not None]
    has_champion = validated.champion not in (None, validated.version)
    ours, theirs, weights = both_told(validated.answers, promise)
    return Evidence(
        answered=validated.answered,
        valid=validated.valid,
        correlation=validated.correlation,
        correlation_low=validated.correlation_low,
        active=validated.active,
        reproduced=validated.reproduced,
        pairs=pairs if has_champion else None,
        serving=serving,
        refit=refit,
        coverage=compare(ours, theirs, weights, promise, seed=validated.version) if has_champion and ours else None,
    )


def seeds(shop: Workshop, run: RunRecord, validated: Validated) -> list[ComparisonRecord]:
    """The held-out comparisons, with which the new champion's trust begins.

    Once a task serves, most examples are requests that were deferred for being hard. Each seed remembers how readily
    its answer was bought, so that together they describe the traffic. After an alarm only what was bought after the
    change it dates is a seed: an older example says nothing about the traffic that the new version will meet. The gate
    may still compare two versions on it. They are in the order of their requests, by which is seen how far one answer
    depends on those before it.
    """
    since = changed_at(shop.store, run.task)
    came_at = {e.id: e.created_at for e in shop.store.examples(run.task)}
    place = {id_: n for n, id_ in enumerate(came_at)}
    answers = validated.answers if validated.evidence is None else validated.evidence
    bought = shop.store.overbought(run.task, {a.id for a in answers})
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
        for a in sorted(answers, key=lambda a: place.get(a.id, -1))
        for rate, probability in [bought.get(a.id, (1.0, 1.0))]
        if a.score is not None and a.local is not None and a.confidence is not None
        if since is None or came_at.get(a.id, 0.0) >= since
    ]


def make_champion(
    shop: Workshop,
    version: VersionRecord,
    *,
    seed: list[ComparisonRecord],
    reason: str,
    how: PromotedBy = "gate",
    by: str = "the gate",
    since: int | None = None,
    carries: float | None = None,
) -> None:
    """Switch the policy in one transaction, then the registry's aliases. Nothing happens twice.

    ``carries`` is the least sampling rate at which it goes on with the champion's evidence; None if it begins with
    ``seed``. Raises `ChosenMeanwhile` where a person has chosen after the promotion ``since``.
    """
    if shop.store.policy_row(version.task).champion != version.name:
        attempts = attempts_of(shop.store.versions(version.task), version)
        shop.judge.promote(
            version.task,
            version.name,
            seed,
            attempts=attempts,
            reason=reason,
            how=how,
            by=by,
            since=since,
            carries=carries,
        )
    register_champion(shop, version, over_a_persons_move=how != "gate")


def moved_alias(shop: Workshop, task: str) -> str | None:
    """The version to which a person has moved the alias champion, if the store has not followed yet.

    It differs then from what the two agreed on; or it is that again, though the store has followed a move of it since:
    MLflow was away at that moment, and the alias was moved back.
    """
    moved = shop.tracking.moved(task)
    if moved is not None:
        return moved
    promotions, alias = shop.store.promotions(task), shop.tracking.aliased(task, CHAMPION)
    moved_back = bool(promotions) and promotions[-1].by == BY_ALIAS and promotions[-1].version != alias
    return alias if moved_back else None


def register_champion(shop: Workshop, version: VersionRecord, *, over_a_persons_move: bool = False) -> None:
    """Let the registry follow the store.

    An alias that a person has moved meanwhile is left for `review.follow`, unless it was a person who chose since.
    """
    task = version.task
    number = shop.tracking.number_of(task, version.name)
    takes = number is not None and (over_a_persons_move or moved_alias(shop, task) in (None, version.name))
    if shop.store.policy_row(task).champion != version.name:
        takes = False  # another was promoted meanwhile; to move the alias back now would look like a person's doing
    if number is not None and takes:
        shop.tracking.set_alias(task, CHAMPION, number)
        if shop.tracking.aliased(task, CANDIDATE) == version.name:
            shop.tracking.drop_alias(task, CANDIDATE)
    show_statuses(shop, task)
    if takes:
        shop.tracking.agree(task, version.name)  # last: until then the next look does all of it again


def show_statuses(shop: Workshop, task: str) -> None:
    """Let every registered version's tags say what became of it in the store, and by whom."""
    promotions = {p.version: p for p in shop.store.promotions(task)}
    for version in shop.store.versions(task):
        tags = {"apprentice.status": version.status, "apprentice.reason": version.reason[:4000]}
        if version.name in promotions:
            last = promotions[version.name]
            at = datetime.fromtimestamp(last.at, UTC)
            tags["apprentice.promoted_by"] = f"{last.by}, {at:%Y-%m-%d %H:%M} UTC: {last.reason}"[:4000]
        shop.tracking.show_status(task, version.name, tags)


def attempts_of(versions: Sequence[VersionRecord], version: VersionRecord) -> int:
    """Candidates tried on the held-out examples between two promotions, ``version`` included, whoever chooses.

    Those that were refused and those that passed and wait count alike, and so do the ones trained after it: a person
    who picks one of five has looked at five. What was champion once bounds them on both sides. A refit is the same
    learner a little later: it is no other try, and bounds none.
    """
    if version.record.get("kind") == "refit":
        return 1
    tried = [v for v in versions if v.name != version.name and v.record.get("kind") != "refit"]
    others = sorted(tried, key=lambda v: v.created_at)
    before = [v for v in reversed(others) if v.created_at < version.created_at]
    after = [v for v in others if v.created_at >= version.created_at]
    return 1 + sum(sum(1 for _ in takewhile(lambda v: v.status in _NEVER_CHOSEN, side)) for side in (before, after))


def _write_record(
    shop: Workshop, version: VersionRecord, run: RunRecord, verdict: Verdict, record: str, card: Card
) -> None:
    folder = shop.version_folder(version)
    if folder is not None:
        write_whole(folder / "promotion.md", record)
    tags: dict[str, Any] = {
        "apprentice.verdict": "passed" if verdict.promoted else "refused",
        "apprentice.teachers": ", ".join(f"{model} {n}" for model, n in card.models.items())[:4000],
        **{f"apprentice.{name}": f"{value:.4f}" for name, value in verdict.figures().items()},
    }
    shop.tracking.describe(run.task, version.name, description=record, tags=tags)
    tracked = shop.tracking.run(run.task, run.id, name=f"{run.task}-{run.id[:8]}")
    tracked.text(record, "promotion.md")
