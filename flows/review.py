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
        version = shop.store.version(task, serving) if serving else None
        if version is not None and version.mlflow_version is not None:
            shop.tracking.crown(task, version.name, version.mlflow_version)
        return None
    version = shop.store.version(task, chosen)
    if version is None:
        _say(shop, task, "unknown_champion", {"alias": chosen, "serving": serving})
        return None
    crown(shop, version, reason="a person moved the alias champion")
    return chosen


def crown(shop: Workshop, version: VersionRecord, *, reason: str) -> None:
    """Make a version champion because a person said so; what its gate measured is its first evidence."""
    _say(shop, version.task, "chosen", {"version": version.name, "was": version.status, "because": version.reason})
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


def _say(shop: Workshop, task: str, kind: str, evidence: dict[str, Any]) -> None:
    level: Level = "warning" if kind == "unknown_champion" else "info"
    shop.store.add_event(EventRecord(uuid.uuid4().hex, task, kind, level, evidence, shop.clock()))
