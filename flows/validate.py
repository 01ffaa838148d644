"""Step 4: answer the held-out examples in the engine that will serve, and compare with the champion."""

from __future__ import annotations

import contextlib
import json
import random
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from prefect import flow
from prefect.artifacts import create_table_artifact

from apprentice import secrets
from apprentice.confidence.correlation import CHANCE_DRAWS, Tally, chance
from apprentice.confidence.settings import TrustSettings
from apprentice.errors import EvaluatorError, OutputError, Problem, TrainingError, VersionError
from apprentice.local.adapter import adapter_folder
from apprentice.local.engine import LocalAnswer, Version
from apprentice.local.probe import choose_probes, read_probes
from apprentice.request.judge import trust_settings
from apprentice.schemas.schema import Schema, compact_json
from apprentice.store.records import RunRecord
from apprentice.student.files import holder_of, read_student
from apprentice.student.halves import halves_of
from flows.answering import answer_all
from flows.coverage import NO_ANSWER, both_told, candidate_told, coverage, needs_chance
from flows.dataset import load_dataset, write_whole
from flows.gate import ENOUGH
from flows.runs import advance, run_of
from flows.steps import Answered, Assembled, Foretold, Validated, read_result, write_result
from flows.trainers import TrainingRow, read_rows
from flows.workshop import Workshop, workshop

__all__ = ["figures_of", "validate", "validate_run"]

_log = secrets.logger("apprentice.coach")
_PROBES = 24
_MOST_COMPARED = 100_000
_BASE = "base-of-"


@flow(name="validate", flow_run_name="validate-{task}", log_prints=False)
def validate(config: str, task: str, run: str) -> float:
    """Judge a run's candidate on the held-out examples; returns its correlation with the remote."""
    with workshop(config, task) as shop:
        result = validate_run(shop, run_of(shop, task, run))
    rows: list[dict[str, Any]] = [
        {"figure": "agreement", "value": result.agreement, "low": result.agreement_low, "high": result.agreement_high},
        {
            "figure": "correlation",
            "value": result.correlation,
            "low": result.correlation_low,
            "high": result.correlation_high,
        },
        *({"figure": name, "value": value, "low": None, "high": None} for name, value in result.fields.items()),
    ]
    create_table_artifact(rows, key=f"held-out-{task.replace('_', '-')}", description="On the held-out examples")
    return result.correlation


def validate_run(shop: Workshop, run: RunRecord) -> Validated:
    """Answer the held-out set with the candidate (and the champion, where it has not), and work out the figures."""
    bench = shop.bench(run)
    known = read_result(bench, "validated")
    if known is not None:
        return Validated.of_json(known)
    advance(shop, run, "validate")
    trained = Assembled.of_json(_needed(bench))
    # The run may have begun on another machine, or in a home that was moved since.
    folder = adapter_folder(shop.settings.model_dir, run.task, trained.version, trained.folder)
    trained = replace(trained, folder=str(folder))
    dataset = load_dataset(shop.datasets(run.task), run.data_digest)
    rows = list(read_rows(dataset.held_out))
    wanted: dict[str, TrainingRow] = {}
    if trained.answers is not None:
        wanted = {row.id: row for row in [*rows, *read_rows(dataset.train)]}
        rows = [wanted[known.id] for known in trained.answers if known.id in wanted]
    schema, takes = shop.task(run.task).output_schema, shop.task(run.task).input_schema
    engine = shop.engine
    engine.load(Version(trained.version, run.task, _folder(trained), schema, trained.remote_model, takes))
    started = time.monotonic()
    inputs = [row.input for row in rows]
    proven = _proven(shop, run, trained)
    asked = inputs
    if trained.answers is not None:
        # Those to which the base model's answer is known come first, and then the newest.
        asked = sorted(inputs, key=lambda value: compact_json(value) in proven)[-_PROBES:]
    told = answer_all(engine, trained.version, asked, lambda done: shop.advanced("validate", done))
    rate = len(asked) / max(time.monotonic() - started, 1e-9)
    champion = shop.store.policy_row(run.task).champion
    champions: dict[str, _Scored] = {}
    bereft: list[str] = []
    answers = told
    if trained.answers is not None:
        answers = [_as_answered(known, trained.version) for known in trained.answers]
    if trained.answers is not None and (run.kind == "refit" or any(one.champion for one in trained.answers)):
        champions = _foretold_champions(shop, run, champion, trained.answers, {row.id: row.output for row in rows})
    elif champion is not None and champion != trained.version:
        try:
            champions = _champion_scores(shop, run.task, champion, [(r.id, r.input, r.output) for r in rows])
        except _Lost as error:
            # It serves nobody who starts now. To insist on the comparison would keep its successor out for ever.
            bereft = [f"not compared with the champion {champion}, which cannot be loaded: {error}"]
            _log.warning("%s: %s", run.task, bereft[0])
            champion = None
    judged, failed = _judged(shop, run.task, rows, answers, champions)
    if 2 * len(failed) > len(rows):
        # The gate would refuse it for want of scores, which would be a verdict on the evaluator.
        raise EvaluatorError(f"{len(failed)} of {len(rows)} held-out answers were not scored: {failed[-1]}")
    more = [known for known in trained.evidence or () if known.id in wanted]
    told_more = [_as_answered(known, trained.version) for known in more]
    begins_with, _ = _judged(shop, run.task, [wanted[known.id] for known in more], told_more, {})
    active, reproduced, notes = _probe(shop, trained, run.task, schema, takes, asked, told, proven)
    promise = trust_settings(shop.settings, shop.task(run.task))
    locals_of = {row_id: one.local for row_id, one in champions.items() if one.local is not None}
    result = figures_of(
        judged,
        shop.judge.bounded_evaluator(run.task),
        trained.version,
        champion,
        active,
        reproduced,
        rate,
        bereft + notes,
        champions=locals_of if needs_chance(promise) else {},
    )
    evidence = None if trained.evidence is None else begins_with
    result = replace(result, carries=trained.carries, evidence=evidence)
    tracked = shop.tracking.run(run.task, run.id, name=f"{run.task}-{run.id[:8]}")
    tracked.metrics(
        {
            "held_out_agreement": result.agreement,
            "held_out_agreement_low": result.agreement_low,
            "held_out_correlation": result.correlation,
            "held_out_correlation_low": result.correlation_low,
            "schema_validity": result.valid / max(1e-9, result.answered),
            "answers_per_s": rate,
            **{f"held_out_agreement.{name}": value for name, value in result.fields.items()},
            **_coverages(result.answers, promise),
        },
        at_s=shop.clock(),
    )
    write_result(bench, "validated", result)
    return result


def _judged(
    shop: Workshop,
    task: str,
    rows: Sequence[TrainingRow],
    answers: Sequence[LocalAnswer | Exception],
    champions: Mapping[str, _Scored],
) -> tuple[list[Answered], list[EvaluatorError]]:
    """The answers with their scores; and why some have none, which says nothing about who answered."""
    evaluate = shop.judge.bounded_evaluator(task)
    bought = shop.store.overbought(task, {row.id for row in rows})
    judged: list[Answered] = []
    failed: list[EvaluatorError] = []
    for row, answer in zip(rows, answers, strict=True):
        if isinstance(answer, LocalAnswer):
            try:
                score, parts = evaluate(answer.output, row.output)
            except EvaluatorError as error:
                failed.append(error)
                continue
            local, confidence = dict(answer.output), shop.judge.rate(task, answer).confidence
        else:
            score, parts, local, confidence = None, {}, None, None
        sampling_rate, probability = bought.get(row.id, (1.0, 1.0))
        judged.append(
            Answered(
                row.id,
                local,
                dict(row.output),
                score,
                dict(parts),
                confidence,
                champions[row.id].score if row.id in champions else None,
                sampling_rate / probability,
                champions[row.id].confidence if row.id in champions else None,
            )
        )
    return judged, failed


def _needed(bench: Path) -> dict[str, Any]:
    assembled = read_result(bench, "assembled")
    if assembled is None:
        raise TrainingError(f"{bench} holds no assembled version; run assemble first")
    return assembled


class _Scored(NamedTuple):
    """The champion on one example; its answer is None where none within the schema came."""

    score: float
    confidence: float
    local: Mapping[str, Any] | None


_UNANSWERED = _Scored(0.0, NO_ANSWER, None)


def _coverages(answers: Sequence[Answered], promise: TrustSettings) -> dict[str, float]:
    """What the candidate would serve at the promise, and the champion where it answered the same examples."""
    ours, theirs, weights = both_told(answers, promise)
    if not ours:
        return {"held_out_coverage": coverage(*candidate_told(answers, promise), promise)}
    return {
        "held_out_coverage": coverage(ours, weights, promise),
        "held_out_coverage_champion": coverage(theirs, weights, promise),
    }


def _as_answered(known: Foretold, version: str) -> LocalAnswer | Exception:
    if known.local is None:
        return OutputError(version, "local", [Problem("", "no answer within the schema")])
    return LocalAnswer(known.local, known.confidence, known.field_confidence, version, 0, 0)


def _foretold_champions(
    shop: Workshop,
    run: RunRecord,
    champion: str | None,
    known: Sequence[Foretold],
    remote: Mapping[str, Mapping[str, Any]],
) -> dict[str, _Scored]:
    """The champion beside a version whose answers were foretold.

    A refit is compared where the champion answered live, before anything was learnt from the example; a new adapter
    with the champion's own, under the same head. A champion that has no head was not foretold, and is asked instead.
    """
    if champion is None:
        return {}
    if run.kind == "refit":
        ids = {one.id for one in known}
        return {
            c.request_id: _Scored(c.score, c.confidence, c.local)
            for c in shop.store.comparisons(run.task, version=champion, limit=_MOST_COMPARED)
            if c.score is not None and not c.seeded and c.request_id in ids
        }
    evaluate, scored = shop.judge.bounded_evaluator(run.task), {}
    for one in known:
        if one.champion is None:
            scored[one.id] = _UNANSWERED
            continue
        answer = LocalAnswer(
            one.champion, one.champion_confidence or 0.0, one.champion_field_confidence or {}, champion, 0, 0
        )
        try:
            score = evaluate(one.champion, remote[one.id]).score
        except EvaluatorError:
            continue  # the two are compared on the others
        scored[one.id] = _Scored(score, shop.judge.rate(run.task, answer).confidence, one.champion)
    return scored


def _folder(trained: Assembled) -> Path | None:
    return None if trained.remote_model else Path(trained.folder)


def _champion_scores(
    shop: Workshop, task: str, champion: str, rows: Iterable[tuple[str, Mapping[str, Any], Mapping[str, Any]]]
) -> dict[str, _Scored]:
    """The champion's score on each held-out example; most are known, from shadowing and from its own gate.

    One that cannot be loaded is compared where its score is known. Raises `_Lost` where that is too seldom to tell the
    two apart.
    """
    rows = list(rows)
    evaluate = shop.judge.bounded_evaluator(task)
    remote = {row_id: output for row_id, _, output in rows}
    known = {
        c.request_id: _Scored(c.score, c.confidence, c.local)
        for c in shop.store.comparisons(task, version=champion, limit=_MOST_COMPARED)
        if c.score is not None and remote.get(c.request_id) == c.remote
    }
    missing = [(row_id, value, output) for row_id, value, output in rows if row_id not in known]
    if missing:
        try:
            _load_champion(shop, task, champion)
        except _Lost as error:
            if len(known.keys() & remote.keys()) < ENOUGH:
                raise
            _log.warning("%s: the champion %s is compared where its score is known: %s", task, champion, error)
            missing = []
    if missing:
        answers = answer_all(shop.engine, champion, [value for _, value, _ in missing], lambda _: None)
        for (row_id, _, output), answer in zip(missing, answers, strict=True):
            try:
                if isinstance(answer, LocalAnswer):
                    score = evaluate(answer.output, output).score
                    known[row_id] = _Scored(score, shop.judge.rate(task, answer).confidence, answer.output)
                else:
                    known[row_id] = _UNANSWERED
            except EvaluatorError:
                continue  # the two are compared on the others
    return {row_id: known[row_id] for row_id in remote if row_id in known}


class _Lost(Exception):
    """The champion cannot be loaded, and waiting does not help."""


def _load_champion(shop: Workshop, task: str, champion: str) -> None:
    """Raises `_Lost` where no router could load it either: its record or its files are gone or damaged."""
    record = shop.store.version(task, champion)
    if record is None:
        raise _Lost(f"the store holds no version {champion!r} of {task!r}; was it deleted?")
    adapter = shop.adapter(record)
    if adapter is not None and not adapter.is_dir():
        raise _Lost(f"its folder {adapter} is not there")
    schema, takes = shop.task(task).output_schema, shop.task(task).input_schema
    try:
        shop.engine.load(Version(champion, task, adapter, schema, record.remote_model, takes))
    except VersionError as error:
        raise _Lost(str(error)) from error


def _probe(
    shop: Workshop,
    trained: Assembled,
    task: str,
    schema: Schema,
    takes: Schema,
    inputs: Sequence[Mapping[str, Any]],
    answers: Sequence[LocalAnswer | Exception],
    proven: Mapping[str, Mapping[str, Any] | None],
) -> tuple[bool, float, list[str]]:
    """Whether the loaded adapter changes the base model's answers, and the share of answers given alike twice.

    ``proven`` are the base model's answers that are known (`_proven`); it is asked for the others. The answers are kept
    in probe.json beside the adapter: every engine that loads it later must give them again.
    """
    answered = [
        (value, answer) for value, answer in zip(inputs, answers, strict=True) if isinstance(answer, LocalAnswer)
    ]
    engine = shop.engine
    probed = choose_probes(answered, _PROBES, random.Random(trained.version))
    chosen = [(value, answer.output) for value, answer in probed]
    again = engine.answer_many(trained.version, [value for value, _ in chosen])
    same = sum(
        isinstance(second, LocalAnswer) and second.output == output
        for (_, output), second in zip(chosen, again, strict=True)
    )
    reproduced = same / len(chosen) if chosen else 0.0
    if trained.remote_model:
        return True, reproduced, ["served by its vendor: the base model's answers were not compared"]
    if trained.answers is not None and "lora" not in _halves(shop, task, trained.version):
        alone = [{"input": dict(value), "output": output} for value, output in chosen]
        write_whole(Path(trained.folder) / "probe.json", json.dumps(alone, ensure_ascii=False, indent=1) + "\n")
        return True, reproduced, ["a head alone: there is no base model to compare it with"]
    known = dict(proven)
    new = [value for value, _ in chosen if compact_json(value) not in known]
    if new:
        base = Version(f"{_BASE}{task}", task, None, schema, None, takes)
        engine.load(base)
        try:
            untrained = engine.answer_many(base.name, new)
        finally:
            shop.let_go(base.name)
        for value, first in zip(new, untrained, strict=True):
            known[compact_json(value)] = first.output if isinstance(first, LocalAnswer) else None
    probes: list[dict[str, Any]] = [
        {"input": dict(value), "output": output, "base_output": known[compact_json(value)]} for value, output in chosen
    ]
    write_whole(Path(trained.folder) / "probe.json", json.dumps(probes, ensure_ascii=False, indent=1) + "\n")
    changed = sum(probe["output"] != probe["base_output"] for probe in probes)
    note = f"{changed} of {len(probes)} probe answers differ from the base model's"
    if len(new) < len(probes):
        note += f", which is known for {len(probes) - len(new)} of them from the champion's probes"
    return changed > 0, reproduced, [note]


def _proven(shop: Workshop, run: RunRecord, trained: Assembled) -> dict[str, Mapping[str, Any] | None]:
    """The base model's answers that the champion's probes hold, by input, where a refit shares its adapter.

    The base model has not changed since, so asking it again would prove nothing new. Empty where anything differs.
    """
    if run.kind != "refit":
        return {}
    champion = shop.store.policy_row(run.task).champion
    before = None if champion is None else shop.store.version(run.task, champion)
    ours = shop.store.version(run.task, trained.version)
    there = None if before is None else shop.adapter(before)
    if ours is None or before is None or there is None or before.base_model != ours.base_model:
        return {}
    try:
        student, predecessor = read_student(Path(trained.folder)), read_student(there)
        if student is None or predecessor is None or student.adapter is None:
            return {}
        if student.adapter != holder_of(before.name, predecessor):
            return {}
        return {compact_json(probe.input): probe.base_output for probe in read_probes(there)}
    except (OSError, VersionError) as error:
        _log.warning("the probes of the champion %s are not taken over: %s", before.name, error)
        return {}


def _halves(shop: Workshop, task: str, version: str) -> Sequence[str]:
    record = shop.store.version(task, version)
    return () if record is None else halves_of(record)


def figures_of(
    judged: Sequence[Answered],
    evaluate: Callable[[Any, Any], Any],
    version: str,
    champion: str | None,
    active: bool,
    reproduced: float,
    rate: float,
    notes: list[str],
    *,
    champions: Mapping[str, Mapping[str, Any]] | None = None,
) -> Validated:
    """Agreement and correlation of the traffic, with intervals, over the weighted answers within the schema.

    Every answer gets its chance score, and the champion's too where ``champions`` holds that, by the example's id.
    """
    scored = [a for a in judged if a.score is not None and a.local is not None]
    draw = random.Random(version)
    by_chance = _chances(scored, [a.local for a in scored], evaluate, draw)
    beside = [a for a in judged if champions and a.id in champions]
    champions_by_chance = _chances(beside, [(champions or {})[a.id] for a in beside], evaluate, draw)
    judged = [replace(a, chance=by_chance.get(a.id), champion_chance=champions_by_chance.get(a.id)) for a in judged]
    tally = Tally()
    fields: dict[str, list[tuple[float, float]]] = {}
    for a in scored:
        expected = by_chance.get(a.id)
        if expected is None:
            continue  # as for its score: it says nothing about the candidate
        tally.add(a.score or 0.0, expected, a.weight)
        for name, part in a.parts.items():
            fields.setdefault(name, []).append((a.weight, part))
    agreement, correlation = tally.agreement_estimate(), tally.correlation_estimate()
    if agreement is None or correlation is None:
        nothing = (0.0, 0.0, 0.0)
        return Validated(version, champion, list(judged), *nothing, *nothing, {}, active, reproduced, rate, notes)
    return Validated(
        version=version,
        champion=champion,
        answers=list(judged),
        correlation=correlation.value,
        correlation_low=correlation.low,
        correlation_high=correlation.high,
        agreement=agreement.value,
        agreement_low=agreement.low,
        agreement_high=agreement.high,
        fields={name: sum(w * part for w, part in parts) / sum(w for w, _ in parts) for name, parts in fields.items()},
        active=active,
        reproduced=reproduced,
        answers_per_s=rate,
        notes=notes,
    )


def _chances(
    rows: Sequence[Answered], answers: Sequence[Any], evaluate: Callable[[Any, Any], Any], draw: random.Random
) -> dict[str, float]:
    """The chance score of each of a version's answers to ``rows``, by id; without those the evaluator failed on."""
    typical = _typical(rows, draw)
    around = [(answers[j], rows[j].remote) for j in typical] * 2
    found: dict[str, float] = {}
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        # All but itself, from the next one on: what it scores against itself is not chance.
        after = bisect_right(typical, i)
        others = around[after : after + len(typical) - (after > 0 and typical[after - 1] == i)]
        # With nothing to compare it with there is no chance to correct for, as if the answers never varied.
        with contextlib.suppress(EvaluatorError):
            found[row.id] = chance(answer, row.remote, others, evaluate, draw)[0] if others else 1.0
    return found


def _typical(scored: Sequence[Answered], draw: random.Random) -> list[int]:
    """Which answers chance scores are drawn from, ascending: a fair sample of the traffic; all if that is too few."""
    most = max((a.weight for a in scored), default=1.0)
    kept = [i for i, a in enumerate(scored) if a.weight >= most or draw.random() < a.weight / most]
    return kept if len(kept) > 2 * CHANCE_DRAWS else list(range(len(scored)))
