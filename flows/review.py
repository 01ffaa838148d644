"""Review and rollback: who is champion, agreed between the registry, where people decide, and the store, which
routers follow.

A person decides by moving the alias `champion` in the MLflow UI, or with `apprentice promote` and `apprentice
rollback`. Neither waits for a training run: the store refuses what a run that began before would promote over it. Both
sides can be changed by a process that dies half-way, so the registry also remembers, in a tag, which version the two
last agreed on. Where they differ, the side that moved away from it is right.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from apprentice import secrets
from apprentice.errors import ChosenMeanwhile, TrainingError
from apprentice.events.kinds import EventKind
from apprentice.store.records import PromotedBy, PromotionRecord, VersionRecord
from flows.promote import BY_ALIAS, make_champion, moved_alias, register_champion, seeds
from flows.steps import Validated, read_result
from flows.tracking import CHAMPION
from flows.workshop import Workshop

__all__ = ["champions_before", "choose", "follow", "previous_champion", "version_named"]

_log = secrets.logger("apprentice.coach")


def follow(shop: Workshop, task: str) -> str | None:
    """Make store and registry agree; the new champion's name where a person moved the alias, else None."""
    chosen = shop.tracking.aliased(task, CHAMPION)
    serving = shop.store.policy_row(task).champion
    agreed = shop.tracking.agreed(task)
    if chosen == serving:
        version = shop.store.version(task, chosen) if chosen is not None and agreed != chosen else None
        if version is not None:
            register_champion(shop, version)  # whoever promoted it died half-way
        return None
    if shop.tracking.aliased(task, CHAMPION) != chosen:
        return None  # a promotion is under way; the next look finds it done
    moved = None if chosen is None else moved_alias(shop, task)
    if moved is not None and moved != chosen:
        return None  # the same: what was read first is the alias of before
    if chosen is None or moved is None:
        # Nobody touched the alias since the two agreed: a promotion got as far as the store.
        version = shop.store.version(task, serving) if serving is not None else None
        if version is not None:
            if shop.tracking.number_of(task, version.name) is None:
                _warn(shop, task, EventKind.UNREGISTERED_CHAMPION, {"serving": serving})
            else:
                register_champion(shop, version)
        return None
    version = shop.store.version(task, chosen)
    if version is None:
        _warn(shop, task, EventKind.UNKNOWN_CHAMPION, {"alias": chosen, "serving": serving})
        return None
    names = [v.name for v in shop.store.versions(task)]
    earlier = serving in names and names.index(chosen) < names.index(serving)
    try:
        choose(
            shop,
            version,
            how="rollback" if earlier else "person",
            by=BY_ALIAS,
            reason="the alias was moved",
        )
    except ChosenMeanwhile:
        return None  # another coach has followed it, or a person has thought better of it
    return chosen


def choose(shop: Workshop, version: VersionRecord, *, how: PromotedBy, by: str, reason: str) -> None:
    """Make a version champion because a person said so; what its gate measured is its first evidence.

    It takes effect in the store, whether or not MLflow can be told: a coach sees to that later. Raises
    `ChosenMeanwhile` where another person was quicker.
    """
    task = version.task
    promotions = shop.store.promotions(task)
    seed = _evidence(shop, version)
    since = promotions[-1].seq if promotions else 0
    try:
        make_champion(shop, version, seed=seed, reason=reason, how=how, by=by, since=since)
    except Exception:
        if shop.store.policy_row(task).champion != version.name:
            raise
        _log.warning("%s: MLflow could not be told that %s is champion", task, version.name, exc_info=True)
    for run in shop.store.runs(task):
        if run.version == version.name and run.state == "waits_for_review":
            shop.store.update_run(run.id, state="completed")


def version_named(shop: Workshop, task: str, name: str) -> VersionRecord:
    """The version of that name or MLflow number. Raises `TrainingError`."""
    versions = shop.store.versions(task)
    found = [v for v in versions if v.name == name or v.mlflow_version == name]
    if not found:
        known = ", ".join(f"{v.name} ({v.status})" for v in versions) or "none"
        raise TrainingError(f"task {task!r} has no version {name!r}; it has {known}")
    return found[-1]


def previous_champion(shop: Workshop, task: str) -> VersionRecord:
    """The version that was champion before this one and may be again. Raises `TrainingError` where there is none."""
    versions = {v.name: v for v in shop.store.versions(task)}
    for name in champions_before(shop.store.promotions(task)):
        if name in versions and versions[name].status == "retired":
            return versions[name]
    champion = shop.store.policy_row(task).champion
    raise TrainingError(
        f"no version of {task!r} that was neither refused nor rolled back was champion before {champion}; "
        "there is nothing to go back to"
    )


def champions_before(promotions: Sequence[PromotionRecord]) -> list[str]:
    """The champions to go back to, the nearest first: as in an editor, going back forgets what was gone back from.

    A version that the gate had refused, and that a person made champion all the same, is none of them.
    """
    line: list[PromotionRecord] = []
    for promotion in promotions:
        if promotion.how == "rollback":
            while line and line[-1].version != promotion.version:
                line.pop()
            if line:
                continue
        line.append(promotion)
    refused = {p.version for p in promotions if p.was == "rejected"}
    current = line[-1].version if line else None
    return list(dict.fromkeys(p.version for p in reversed(line) if p.version not in refused | {current}))


def _evidence(shop: Workshop, version: VersionRecord) -> list[Any]:
    """The held-out comparisons of the run that trained a version, as long as its folder is there."""
    for run in shop.store.runs(version.task):
        known = read_result(shop.bench(run), "validated") if run.version == version.name else None
        if known is not None:
            return seeds(shop, run, Validated.of_json(known))
    return []


def _warn(shop: Workshop, task: str, kind: EventKind, evidence: dict[str, Any]) -> None:
    """Say once what will be seen again at every look, until something happens to the task's champion."""
    said, promoted = shop.store.latest_event(task, kind), shop.store.latest_event(task, "promoted")
    if said is not None and said.evidence == evidence and (promoted is None or promoted.seq < said.seq):
        return
    shop.alerts.emit(kind, task, evidence, about=json.dumps(evidence))
