"""Step 3: make the version that is to serve: an adapter, a head, and what was learnt of how to combine them.

No half is judged by what it was fitted on. An adapter never sees the held-out examples, so for judging it stands beside
a head that did not see them either, and so does the champion's adapter: the two students differ in nothing but what is
to be judged. The head that is to serve is then fitted on everything. A refit, which has a head only to judge, asks for
each example a head fitted on the others (`fit_head`): nothing needs to be held out from it. Beside an adapter it is
judged by the examples that the adapter did not learn from, which are more with every answer bought since.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow

from apprentice.errors import TrainingError
from apprentice.local.adapter import adapter_folder, stored_path
from apprentice.local.engine import LocalAnswer, Version
from apprentice.schemas.schema import compact_json
from apprentice.store.records import RunRecord, VersionRecord
from apprentice.student.combiner import Combined, Combiner, HeadAnswer
from apprentice.student.combining import fit_combiner
from apprentice.student.encoder import load_encoder
from apprentice.student.files import OWN, Student, adapter_of, holder_of, read_student, student_name, write_student
from apprentice.student.fitting import fit_head
from apprentice.student.halves import halves_of, halves_wanted
from apprentice.student.head import Head
from flows.answering import RememberedAnswers, answer_all
from flows.dataset import CuratedDataset, load_dataset, write_whole
from flows.embeddings import RememberingEncoder
from flows.runs import advance, run_of
from flows.steps import Assembled, Foretold, Trained, read_result, write_result
from flows.trainers import TrainingRow, read_rows
from flows.workshop import Workshop, workshop

__all__ = ["assemble", "assemble_run"]

_HELD_BACK = "held_back.json"
"""Beside a student: what it said of each example without having learnt from it. Decides no answer."""
_MOST_JUDGED = 4000  # the newest examples that a refitted head is judged and calibrated by
_MOST_ASKED = 400  # of them, those that an adapter has to answer now
_NOT_THE_ADAPTERS = ("student.json", "head.*", "probe.json", "promotion.md", _HELD_BACK)
# A new head that changes one served answer in a hundred is checked at least at this many times that rate.
_CHECKS_PER_CHANGE = 5.0


@flow(name="assemble", flow_run_name="assemble-{task}", log_prints=False)
def assemble(config: str, task: str, run: str) -> str:
    """Assemble a run's version; returns its name."""
    with workshop(config, task) as shop:
        return assemble_run(shop, run_of(shop, task, run)).version


def assemble_run(shop: Workshop, run: RunRecord) -> Assembled:
    """Assemble and register, or take up what an earlier attempt assembled."""
    bench = shop.bench(run)
    known = read_result(bench, "assembled")
    if known is not None:
        return Assembled.of_json(known)
    advance(shop, run, "assemble")
    dataset = load_dataset(shop.datasets(run.task), run.data_digest)
    if run.kind == "refit":
        made = _Maker(shop, run, dataset).refitted()
    else:
        trained = read_result(bench, "trained")
        if trained is None:
            raise TrainingError(f"{bench} holds no trained adapter; run finetune first")
        made = _Maker(shop, run, dataset).trained(Trained(**trained))
    write_result(bench, "assembled", made)
    return made


@dataclass(frozen=True)
class _Learnt:
    """A student's parts, and what it says of examples that none of them was fitted on."""

    head: Head
    combiner: Combiner
    sure: float | None
    said: list[Foretold]


class _Maker:
    """Assembles one run's version."""

    def __init__(self, shop: Workshop, run: RunRecord, dataset: CuratedDataset) -> None:
        self.shop, self.run, self.dataset = shop, run, dataset
        self.task = shop.task(run.task)
        self.schema = self.task.output_schema
        self.evaluate = shop.judge.bounded_evaluator(run.task)
        state = shop.store.policy_row(run.task)
        self.champion = shop.store.version(run.task, state.champion) if state.champion is not None else None

    # -- the two kinds of run --------------------------------------------------------------------------------------

    def trained(self, trained: Trained) -> Assembled:
        """A new adapter, beside a head if the task has one."""
        if trained.remote_model or not halves_wanted(self.shop.settings, self.run.task).head:
            number = _register(self.shop, self.run, trained.version, Path(trained.folder), trained, ("lora",))
            return Assembled(trained.version, trained.folder, number, trained.trained_on, trained.remote_model)
        # The run may have begun on another machine, or in a home that was moved since.
        folder = adapter_folder(self.shop.settings.model_dir, self.run.task, trained.version, trained.folder)
        train, held_out = list(read_rows(self.dataset.train)), list(read_rows(self.dataset.held_out))
        encoder = self._encoder()
        blind = fit_head(self.schema, *_columns(train), encoder=encoder).head
        inputs, outputs = _columns(held_out)
        heads = blind.predict(inputs)
        remembered = self._answers_of(trained.version)
        loras = remembered.answers(held_out, lambda new: self._asked(trained.version, folder, new))
        remembered.save()
        fit = fit_combiner(self.schema, blind.fields, heads, loras, outputs, evaluator=self.evaluate)
        champions = self._champions(blind, heads, inputs, outputs)
        answers = [
            _foretold(row, answer, None if champions is None else champions[at])
            for at, (row, answer) in enumerate(zip(held_out, fit.answers, strict=True))
        ]
        everything = self._in_order(train + held_out)
        told = {row.id: lora for row, lora in zip(held_out, loras, strict=True)}
        learnt = self._learn(everything, encoder, told)
        student = Student(learnt.head.encoder, OWN, learnt.sure, learnt.combiner.to_json())
        name, there = self._write(student, learnt, adapter=folder)
        number = _register(self.shop, self.run, name, there, trained, ("head", "lora"))
        # It goes on in the lineage of the head beside it, and is checked as a stranger would be.
        carries = None if champions is None else 1.0
        return Assembled(name, str(there), number, trained.trained_on, None, answers, learnt.said, carries)

    def refitted(self) -> Assembled:
        """The head anew on all examples, beside the champion's adapter."""
        rows = self._in_order([*read_rows(self.dataset.train), *read_rows(self.dataset.held_out)])
        encoder = self._encoder()
        before = None if self.champion is None else read_student(self._folder(self.champion))
        shared = None if before is None or self.champion is None else holder_of(self.champion.name, before)
        told = self._of_the_untaught(shared, before, rows) if shared is not None and before is not None else {}
        learnt = self._learn(rows, encoder, told)
        sure = None if shared is None else learnt.sure
        student = Student(learnt.head.encoder, shared, sure, learnt.combiner.to_json())
        name, there = self._write(student, learnt)
        base = learnt.head.encoder if shared is None else self.shop.settings.local.base_model
        made = Trained(name, str(there), len(rows), self.dataset.card.held_out, base, record={"head": "refitted"})
        number = _register(self.shop, self.run, name, there, made, ("head",) if shared is None else ("head", "lora"))
        return Assembled(name, str(there), number, len(rows), None, learnt.said, None, self._carries(learnt.said))

    def _learn(
        self, rows: Sequence[TrainingRow], encoder: RememberingEncoder, told: Mapping[str, LocalAnswer | None]
    ) -> _Learnt:
        """A head fitted on all of ``rows``, and how to combine it with an adapter that said what is ``told`` by id.

        What the two would have said of the newest rows comes with it, neither having learnt from the row: of those that
        are not in ``told``, because the adapter learnt from them, the head speaks alone.
        """
        inputs, outputs = _columns(rows)
        fitted = fit_head(self.schema, inputs, outputs, encoder=encoder)
        encoder.save()
        first = max(0, len(rows) - _MOST_JUDGED)
        judged = rows[first:]
        loras = [told.get(row.id) for row in judged]
        held_back = fitted.held_back[first:]
        fit = fit_combiner(self.schema, fitted.head.fields, held_back, loras, outputs[first:], evaluator=self.evaluate)
        said = [_foretold(row, one, None) for row, one in zip(judged, fit.answers, strict=True) if one is not None]
        return _Learnt(fitted.head, fit.combiner, fit.sure, said)

    # -- what the halves say ---------------------------------------------------------------------------------------

    def _encoder(self) -> RememberingEncoder:
        local = self.shop.settings.local
        return RememberingEncoder(
            load_encoder(local.encoder, self.shop.settings.root), self.shop.datasets(self.run.task)
        )

    def _asked(self, name: str, folder: Path, inputs: Sequence[Mapping[str, Any]]) -> list[LocalAnswer | None]:
        """What an adapter answers by itself; None for an input to which its answer does not fit."""
        engine = self.shop.engine
        held = {one.name for one in engine.loaded()}
        engine.load(Version(name, self.run.task, folder, self.schema, None, self.task.input_schema))
        try:
            answers = answer_all(engine, name, inputs, lambda done: self.shop.advanced("assemble", done))
        finally:
            if name not in held:
                self.shop.let_go(name)
        return [answer if isinstance(answer, LocalAnswer) else None for answer in answers]

    def _adapter_says(
        self, folder: Path, student: Student, inputs: Sequence[Mapping[str, Any]]
    ) -> list[LocalAnswer | None]:
        """What a student's adapter answers by itself, taken out of the student's folder."""
        found = adapter_of(folder, student)
        if found is None:
            return [None] * len(inputs)
        name, there = found
        plain = self.shop.bench(self.run) / name
        _copy_adapter(there, plain)
        try:
            return self._asked(name, plain, inputs)
        finally:
            shutil.rmtree(plain, ignore_errors=True)

    def _champions(
        self,
        blind: Head,
        heads: Sequence[HeadAnswer],
        inputs: Sequence[Mapping[str, Any]],
        outputs: Sequence[Mapping[str, Any]],
    ) -> list[Combined | None] | None:
        """The held-out answers of a student with the champion's adapter and a head that did not see them.

        None if there is no champion, or it has no head: then validate asks it as it is.
        """
        if self.champion is None or "head" not in halves_of(self.champion):
            return None
        folder = self._folder(self.champion)
        student = read_student(folder)
        if student is None:
            raise TrainingError(f"{folder} holds no student, and the store says that it does; restore the folder")
        loras = self._adapter_says(folder, student, inputs)
        return fit_combiner(self.schema, blind.fields, heads, loras, outputs, evaluator=self.evaluate).answers

    def _answers_of(self, adapter: str) -> RememberedAnswers:
        return RememberedAnswers(self.shop.datasets(self.run.task), adapter)

    def _of_the_untaught(
        self, version: str, student: Student, rows: Sequence[TrainingRow]
    ) -> dict[str, LocalAnswer | None]:
        """By id, what the adapter of ``version`` says of the rows that it did not learn from.

        Of those that it was never asked for, the newest few: the others wait until there are fewer.
        """
        folder = self._folder(self.champion)
        found, taught = adapter_of(folder, student), self._taught(version)
        if found is None or taught is None:
            return {}
        remembered = self._answers_of(found[0])
        others = [row for row in rows if row.id not in taught]
        left_out = {row.id for row in [row for row in others if not remembered.knows(row)][:-_MOST_ASKED]}
        asked = [row for row in others if row.id not in left_out]
        told = remembered.answers(asked, lambda inputs: self._adapter_says(folder, student, inputs))
        remembered.save()
        return {row.id: answer for row, answer in zip(asked, told, strict=True)}

    def _taught(self, version: str) -> set[str] | None:
        """The examples that the adapter of ``version`` learnt from; None if nobody knows any more."""
        record = self.shop.store.version(self.run.task, version)
        try:
            assert record is not None
            dataset = load_dataset(self.shop.datasets(self.run.task), record.data_digest)
        except (AssertionError, TrainingError):
            return None
        return {row.id for row in read_rows(dataset.train)}

    def _carries(self, said: Sequence[Foretold]) -> float | None:
        """At which sampling rate a refit may go on with the champion's evidence; None if there is none to go on with.

        Five times the share of what is served that the two students answer otherwise, both asked for examples that they
        did not learn from; of few examples, the larger end of what the share may be.
        """
        if self.champion is None or "head" not in halves_of(self.champion):
            return None
        try:
            before = json.loads((self._folder(self.champion) / _HELD_BACK).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return 1.0
        threshold = self.shop.store.policy_row(self.run.task).threshold or 0.0
        both = [one for one in said if one.id in before and one.confidence >= threshold]
        changed = sum(before[one.id] != _text(one) for one in both)
        return float(min(1.0, _CHECKS_PER_CHANGE * (changed + 1.0) / (len(both) + 2.0)))

    # -- writing it down -------------------------------------------------------------------------------------------

    def _in_order(self, rows: Sequence[TrainingRow]) -> list[TrainingRow]:
        """In the order in which the examples came."""
        place = {example.id: at for at, example in enumerate(self.shop.store.examples(self.run.task))}
        return sorted(rows, key=lambda row: place.get(row.id, -1))

    def _folder(self, version: VersionRecord | None) -> Path:
        folder = None if version is None else self.shop.version_folder(version)
        if folder is None or not folder.is_dir():
            name = None if version is None else version.name
            raise TrainingError(f"version {name} has no folder {folder}; restore it, or choose another champion")
        return folder

    def _write(self, student: Student, learnt: _Learnt, *, adapter: Path | None = None) -> tuple[str, Path]:
        """The student's folder, under its name; whole or not at all."""
        home = self.shop.adapters(self.run.task)
        work = home / f".assembling-{self.run.id}"
        shutil.rmtree(work, ignore_errors=True)
        if adapter is not None:
            _copy_adapter(adapter, work)
        work.mkdir(parents=True, exist_ok=True)
        learnt.head.save(work)
        write_student(work, student)
        said = {one.id: _text(one) for one in learnt.said}
        write_whole(work / _HELD_BACK, json.dumps(said, separators=(",", ":")) + "\n")
        name = student_name(work)
        there = home / name
        if there.is_dir():
            shutil.rmtree(work)  # the same content was assembled before
        else:
            work.rename(there)
        return name, there


def _register(shop: Workshop, run: RunRecord, name: str, folder: Path, trained: Trained, halves: Sequence[str]) -> str:
    shop.confirm()
    tracked = shop.tracking.run(run.task, run.id, name=f"{run.task}-{run.id[:8]}")
    tracked.params({"halves": "+".join(halves), "base_model": trained.base_model, "trained_on": trained.trained_on})
    if not trained.remote_model:
        tracked.folder(folder, "adapter")
    number = shop.tracking.register(
        run.task,
        name,
        tracked,
        tags={
            "apprentice.status": "candidate",
            "apprentice.data_digest": run.data_digest,
            "apprentice.base_model": trained.base_model,
            "apprentice.trained_on": str(trained.trained_on),
            "apprentice.halves": "+".join(halves),
            "apprentice.run": run.id,
        },
        description=f"Learnt from {trained.trained_on} examples (dataset {run.data_digest[:12]}); not judged yet.",
    )
    shop.store.add_version(
        VersionRecord(
            name=name,
            task=run.task,
            status="candidate",
            adapter=stored_path(shop.settings.model_dir, folder),
            base_model=trained.base_model,
            trained_on=trained.trained_on,
            held_out=trained.held_out,
            data_digest=run.data_digest,
            mlflow_version=number,
            reason="waits for the gate",
            record={**trained.record, "halves": list(halves), "kind": run.kind},
            created_at=shop.clock(),
            remote_model=trained.remote_model,
        )
    )
    shop.store.update_run(run.id, version=name)
    return number


def _copy_adapter(there: Path, to: Path) -> None:
    """What is an adapter's own in a version's folder; as hard links where the disk has them."""
    ignored = shutil.ignore_patterns(*_NOT_THE_ADAPTERS)
    shutil.copytree(there, to, ignore=ignored, copy_function=_link, dirs_exist_ok=True)


def _link(file: str, to: str) -> str:
    # Nobody writes into an adapter's files: their content is the version's name. What an earlier attempt left may be a
    # link to the very file, which cannot be copied onto.
    Path(to).unlink(missing_ok=True)
    try:
        os.link(file, to)
    except OSError:  # another disk, or one that knows no links
        shutil.copy2(file, to)
    return to


def _columns(rows: Sequence[TrainingRow]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    return [row.input for row in rows], [row.output for row in rows]


def _text(one: Foretold) -> str:
    return compact_json(one.local)


def _foretold(row: TrainingRow, answer: Combined | None, champion: Combined | None) -> Foretold:
    return Foretold(
        row.id,
        None if answer is None else answer.output,
        0.0 if answer is None else answer.confidence,
        {} if answer is None else dict(answer.field_confidence),
        None if champion is None else champion.output,
        None if champion is None else champion.confidence,
        None if champion is None else dict(champion.field_confidence),
    )
