"""The promotion record: one page a version, saying what it was trained on, how it fared, and why it passed or not."""

from __future__ import annotations

from datetime import UTC, datetime

from apprentice.store.records import RunRecord, VersionRecord
from flows.dataset import Card
from flows.gate import Verdict
from flows.steps import Validated

__all__ = ["promotion_record"]

# The gate's conditions, in words for who has not read it.
_WORDS = {
    "schema_validity": "answers within the schema",
    "probe_active": "the adapter changes the base model's answers",
    "probe_reproduced": "probe answers given again",
    "correlation_low": "correlation, lower end of its 95 % interval",
    "correlation": "correlation",
    "coverage_odds": "odds that it would serve more of the traffic than the champion",
    "not_worse_than_champion": "difference from the champion, lower bound",
    "not_clearly_worse": "difference from the champion, upper bound",
}


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
        _in_short(verdict),
        "",
        "| condition | figure | needed | |",
        "| :--- | ---: | ---: | --- |",
        *(
            f"| {_WORDS[c.name]} | {c.value:.3f} | {c.needed:.3f} | {'passed' if c.passed else '**failed**'} |"
            for c in verdict.checks
        ),
        *(f"\nThe version {c.note}." for c in verdict.checks if c.note),
        "",
        f"On {len(validated.answers)} held-out examples, answered in the serving engine "
        f"({validated.answers_per_s:.1f} answers/s), {valid} within the schema:",
        "",
        "| | value | 95 % interval |",
        "| :--- | ---: | --- |",
        f"| agreement | {validated.agreement:.3f} | {validated.agreement_low:.3f} to {validated.agreement_high:.3f} |",
        f"| correlation | {validated.correlation:.3f} | "
        f"{validated.correlation_low:.3f} to {validated.correlation_high:.3f} |",
        *(f"| agreement of `{name}` | {value:.3f} | |" for name, value in validated.fields.items()),
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
            lines += ["", f"## {title}", "", *(f"- {name}: {_plain(value)}" for name, value in values.items())]
    return "\n".join(lines) + "\n"


def _in_short(verdict: Verdict) -> str:
    """Why, in one line; the figures are in the table below it."""
    failed = [_WORDS[check.name] for check in verdict.checks if not check.passed]
    if failed:
        return "The gate refuses it for: " + "; ".join(failed) + "."
    return (
        f"All {len(verdict.checks)} conditions of the gate hold."
        if verdict.checks
        else f"Not judged: {verdict.reason}."
    )


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
