"""Review and rollback: who is champion, agreed between the registry, where people decide, and the store, which
routers follow.

A person decides by moving the alias `champion` in the MLflow UI, or with `apprentice promote` and `apprentice
rollback`. Both sides can be changed by a process that dies half-way, so the registry also remembers, in a tag, which
version the two last agreed on. Where they differ, the side that moved away from it is right.
"""

from __future__ import annotations

import json
import uuid
from typing import Any, Literal

from apprentice.errors import TrainingError
from apprentice.store.records import EventRecord, VersionRecord
from flows.promote import make_champion, seeds
from flows.steps import Answered, Validated
from flows.tracking import CHAMPION
from flows.workshop import Workshop

__all__ = ["before", "crown", "follow"]

type Level = Literal["info", "warning", "critical"]

_WARNINGS = {
    "unregistered_champion": "the champion serves on, but MLflow has its version no longer; make another one champion",
    "unknown_champion": "MLflow's champion is no version of this store; the old one serves on",
}


def follow(shop: Workshop, task: str) -> str | None:
    """Make store and registry agree; the new champion's name where a person moved the alias, else None.

    Not to be called while a run of the task is being promoted: hold the task's lease.
    """
    chosen = shop.tracking.aliased(task, CHAMPION)
    serving = shop.store.policy_row(task).champion
    if chosen == serving:
        return None
    agreed = shop.tracking.agreed(task)
    if chosen is None or chosen == agreed:
        # Nobody touched the alias since the two agreed: a promotion got as far as the store.
        if serving is not None:
            number = shop.tracking.number_of(task, serving)
            if number is None:
                _warn(shop, task, "unregistered_champion", {"serving": serving})
            else:
                shop.tracking.crown(task, serving, number)
        return None
    version = shop.store.version(task, chosen)
    if version is None:
        _warn(shop, task, "unknown_champion", {"alias": chosen, "serving": serving})
        return None
    crown(shop, version, reason="a person moved the alias champion")
    return chosen


def crown(shop: Workshop, version: VersionRecord, *, reason: str) -> None:
    """Make a version champion because a person said so; what its gate measured is its first evidence."""
    evidence = {"version": version.name, "was": version.status, "because": version.reason}
    _say(shop, version.task, "chosen", "info", evidence)
    make_champion(shop, version, seed=_evidence(shop, version), reason=reason)


def before(shop: Workshop, task: str, name: str | None) -> VersionRecord:
    """The version of that name, or the newest one that was champion before. Raises `TrainingError`."""
    champion = shop.store.policy_row(task).champion
    versions = shop.store.versions(task)
    if name is not None:
        found = [v for v in versions if v.name == name or v.mlflow_version == name]
        if not found:
            known = ", ".join(f"{v.name} ({v.status})" for v in versions) or "none"
            raise TrainingError(f"task {task!r} has no version {name!r}; it has {known}")
        return found[-1]
    retired = [v for v in versions if v.status == "retired" and v.name != champion]
    if not retired:
        raise TrainingError(f"no version of {task!r} was champion before {champion}; there is nothing to go back to")
    return retired[-1]


def _evidence(shop: Workshop, version: VersionRecord) -> list[Any]:
    """The held-out comparisons of the run that trained a version, as long as its folder is there."""
    for run in shop.store.runs(version.task):
        path = shop.bench(run) / "validated.json"
        if run.version == version.name and path.is_file():
            known = json.loads(path.read_text(encoding="utf-8"))
            validated = Validated(**{**known, "answers": [Answered(**row) for row in known["answers"]]})
            return seeds(shop, run, validated)
    return []


def _warn(shop: Workshop, task: str, kind: str, evidence: dict[str, Any]) -> None:
    """Say once what will be seen again at every look, until something happens to the task's champion."""
    evidence = {**evidence, "meaning": _WARNINGS[kind]}
    said, promoted = shop.store.latest_event(task, kind), shop.store.latest_event(task, "promoted")
    if said is not None and said.evidence == evidence and (promoted is None or promoted.seq < said.seq):
        return
    _say(shop, task, kind, "warning", evidence)
    shop.alerts.announce(kind, task, evidence, "warning")


def _say(shop: Workshop, task: str, kind: str, level: Level, evidence: dict[str, Any]) -> None:
    shop.store.add_event(EventRecord(uuid.uuid4().hex, task, kind, level, evidence, shop.clock()))
