"""The promotion record: one page a version, saying what it was trained on, how it fared, and why it passed or not."""

from __future__ import annotations

from datetime import UTC, datetime

from apprentice.store.records import RunRecord, VersionRecord
from flows.dataset import Card
from flows.gate import Verdict
from flows.steps import Validated

__all__ = ["promotion_record"]


def promotion_record(
    version: VersionRecord, run: RunRecord, validated: Validated, verdict: Verdict, card: Card, *, waits: bool
) -> str:
    """Markdown, for the adapter's folder, MLflow's version page and Prefect's artifacts."""
    decided = "waits for review" if waits else "promoted" if verdict.promoted else "not promoted"
    valid = sum(a.score is not None for a in validated.answers)
    total = sum(card.models.values()) or 1
    lines = [
        f"# {version.task} {version.name}: {decided}",
        "",
        verdict.reason,
        "",
        "| condition | figure | needed | |",
        "| --- | ---: | ---: | --- |",
        *(
            f"| {c.name} | {c.value:.4f} | {c.needed:.4f} | {'passed' if c.passed else 'failed'} |"
            for c in verdict.checks
        ),
        "",
        f"On {len(validated.answers)} held-out examples, answered in the serving engine "
        f"({validated.answers_per_s:.1f} answers/s), {valid} within the schema:",
        "",
        "| | value | 95 % interval |",
        "| --- | ---: | --- |",
        f"| agreement | {validated.agreement:.4f} | {validated.agreement_low:.4f} to {validated.agreement_high:.4f} |",
        f"| correlation | {validated.correlation:.4f} | "
        f"{validated.correlation_low:.4f} to {validated.correlation_high:.4f} |",
        *(f"| {name} | {value:.4f} | |" for name, value in validated.fields.items()),
        "",
        f"Compared with champion {validated.champion}." if validated.champion else "There was no champion before it.",
        *(f"{note}." for note in validated.notes),
        "",
        "## Lineage",
        "",
        f"- dataset `{version.data_digest}`: {card.trained_on} examples trained on, {card.held_out} held out, "
        f"up to example {run.data_high_water} of the store",
        "- taught by " + ", ".join(f"{model} ({n / total:.0%})" for model, n in card.models.items()),
        f"- base model {version.base_model}",
        f"- run {run.id}, because: {run.reason}",
        f"- trained {datetime.fromtimestamp(version.created_at, UTC):%Y-%m-%d %H:%M} UTC",
    ]
    for title, values in (
        ("Recipe", version.record.get("recipe", {})),
        ("Toolchain", version.record.get("toolchain", {})),
    ):
        if values:
            lines += ["", f"## {title}", "", *(f"- {name}: {value}" for name, value in values.items())]
    return "\n".join(lines) + "\n"
