"""Students of two halves: heads fitted within seconds, adapters that must win their place beside them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from apprentice.lifecycle.due import due_run
from apprentice.local import adapter as adapters
from apprentice.local.probe import read_probes
from apprentice.store.records import ComparisonRecord, ExampleRecord, VersionRecord, VersionStatus
from apprentice.student.engine import StudentEngine, load_head
from apprentice.student.files import OWN, read_student
from flows.assemble import _copy_adapter
from flows.coach import CoachResult, coach_task
from flows.promote import attempts_of
from flows.review import choose, version_named
from flows.trainers import Progress, TrainedAdapter, TrainingJob
from flows.workshop import Workshop
from tests.flows.conftest import MOODS, WITH_PREFECT_AND_MLFLOW, Home, RoteTrainer

pytestmark = WITH_PREFECT_AND_MLFLOW

SAID = {
    "glad": ("we won the match", "the sun is out and we danced", "she said yes and we married", "I passed the exam"),
    "sad": ("my grandfather died", "I lost my oldest friend", "nobody came to the funeral", "the dog never came back"),
    "angry": ("he lied to my face", "they stole my bicycle again", "the neighbour shouted all night", "I was cheated"),
}


PLACES = ("Rome", "a small bar", "the office kitchen", "Lagos", "an old train", "the park", "Oslo harbour")
PEOPLE = ("Ann", "my late uncle", "the postman", "Professor Ito", "a stranger", "our landlady", "Grandma", "Zoe", "Max")


class Writer(RoteTrainer):
    """Writes whole adapters, which have a name by their content."""

    def train(self, job: TrainingJob, progress: Callable[[Progress], None]) -> TrainedAdapter:
        made = super().train(job, progress)
        for name in (adapters.CONFIG, adapters.FRAME):
            (made.folder / name).write_text("{}")
        folder = made.folder.with_name(adapters.content_name(made.folder))
        made.folder.rename(folder)
        recipe, toolchain = {"lora_rank": 4}, {"rote": "1"}
        return TrainedAdapter(folder.name, folder, "rote", made.trained_on, 0, 2, 20, 1.0, 0.5, recipe, toolchain)


@pytest.fixture
def teller(make_home: Callable[..., Home], monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """A task whose inputs say what the answer is, and students in its engine."""
    home = make_home(local={"student": {"head_from": 60}}, task={"confidence_thresholds": {"phase1_to_phase2": 10_000}})
    rote = home.engine
    home.engine = StudentEngine(lambda: rote, lambda folder: load_head(folder, home.settings.root))  # type: ignore[assignment]
    tell(home, 60)
    yield home
    home.engine.close()


def tell(home: Home, count: int) -> None:
    start = home.store.count_examples("mood")
    for i in range(start, start + count):
        mood = MOODS[i * 7 % 3]
        where, who = PLACES[i * 5 % len(PLACES)], PEOPLE[i * 3 % len(PEOPLE)]
        text = f"{who} told me in {where}, when it was {i} degrees: {SAID[mood][i // 3 % 4]}"
        home.truth[text] = mood
        example = ExampleRecord(f"r{i}", "mood", {"text": text}, {"mood": mood}, "anthropic", "a-model", float(i))
        home.store.add_example(example)


def coached(home: Home) -> CoachResult:
    due = due_run(home.settings, home.store, "mood", time.time())
    assert due is not None
    return coach_task(home.settings, "mood", reason=due.reason, kind=due.kind, engine=home.engine)


def live(home: Home, version: str, count: int) -> None:
    """Comparisons of requests that a version answered before it learnt from them."""
    judge_rows = list(home.store.examples("mood"))[-count:]
    for row in judge_rows:
        answer = home.engine.answer(version, row.input, deadline_s=5.0)
        score = float(answer.output == row.output)
        record = ComparisonRecord(
            id=f"c-{row.id}-{version}",
            task="mood",
            request_id=row.id,
            version=version,
            score=score,
            parts={},
            confidence=answer.confidence,
            local=answer.output,
            remote=row.output,
            probability=1.0,
            sampling_rate=1.0,
            served=False,
            created_at=1.0,
        )
        home.store.update_state("mood", lambda state, one=record: state.change(comparisons=[one]), version=version)  # type: ignore[misc]


def test_a_head_is_a_version_after_sixty_answers(teller: Home) -> None:
    """It is judged by all examples, each answered by a head fitted on the others, and nothing is held out from it."""
    result = coached(teller)
    assert result.promoted, result
    rows = result.trained_on
    assert rows > 50
    version = teller.store.version("mood", result.version or "")
    assert version is not None
    assert version.record["halves"] == ["head"]
    assert version.record["kind"] == "refit"
    seeds = teller.store.comparisons("mood", version=version.name)
    assert len(seeds) == rows
    assert all(c.seeded for c in seeds)
    folder = teller.settings.model_dir / "mood" / version.name
    student = read_student(folder)
    assert student is not None
    assert student.adapter is None
    probes = json.loads((folder / "probe.json").read_text())
    assert len(probes) == 24
    answer = teller.engine.answer(version.name, {"text": "we won the match again"}, deadline_s=5.0)
    assert answer.output == {"mood": "glad"}
    assert answer.answered_by == "head"
    assert due_run(teller.settings, teller.store, "mood", time.time()) is None
    assert teller.store.runs("mood")[-1].kind == "refit"


def test_a_refit_goes_on_with_what_its_lineage_has_earned(teller: Home) -> None:
    """Due after a few more answers; it goes on serving as much at least, and its comparisons are not recorded again."""
    first = coached(teller).version or ""
    for _ in range(20):
        if teller.store.policy_row("mood").phase == 3:
            break
        tell(teller, 40)
        first = coached(teller).version or ""
    before = teller.store.policy_row("mood")
    assert before.phase == 3
    tell(teller, 19)
    assert due_run(teller.settings, teller.store, "mood", time.time()) is None
    tell(teller, 40)
    live(teller, first, 59)
    result = coached(teller)
    assert result.promoted, result
    assert result.version != first
    after = teller.store.policy_row("mood")
    assert after.phase == 3
    assert after.threshold is not None
    assert before.threshold is not None
    assert after.threshold <= before.threshold
    assert json.loads(after.trust)["comparisons"] == json.loads(before.trust)["comparisons"]
    assert teller.store.comparisons("mood", version=result.version or "") == []
    assert "not_clearly_worse" in result.reason or "coverage_odds" in result.reason


def test_a_refit_that_is_clearly_worse_is_refused(teller: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """The champion answered what came meanwhile well; a head that would answer it badly does not follow."""
    first = coached(teller).version or ""
    tell(teller, 40)
    live(teller, first, 40)
    import flows.assemble as step

    def spoilt(whole: Callable[..., Any]) -> Callable[..., Any]:
        def fit(schema: Any, inputs: Any, outputs: Any, **given: Any) -> Any:
            turned = [{"mood": MOODS[(MOODS.index(o["mood"]) + 1) % 3]} for o in outputs]
            return whole(schema, inputs, turned, **given)

        return fit

    monkeypatch.setattr(step, "fit_head", spoilt(step.fit_head))
    result = coached(teller)
    assert not result.promoted
    assert teller.store.policy_row("mood").champion == first


def test_an_adapter_wins_its_place_beside_the_same_head(
    make_home: Callable[..., Home], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is compared with the head alone, on examples that neither saw; the student has both, and a refit keeps it."""
    home = make_home(
        local={"base_model": "rote", "student": {"head_from": 60}, "fine_tune_batch_size": 40},
        task={"confidence_thresholds": {"phase1_to_phase2": 200, "phase2_to_phase3": 0.9}},
    )
    rote = home.engine
    home.engine = StudentEngine(lambda: rote, lambda folder: load_head(folder, home.settings.root))  # type: ignore[assignment]
    trainer = Writer()
    trainer.skills = [1.0]
    monkeypatch.setattr("flows.finetune.build_trainer", lambda _backend: trainer)
    start = home.store.count_examples("mood")
    for i in range(start, start + 400):  # what the head cannot know: the number decides
        home.truth[f"letter {i}"] = MOODS[i * 7 % 3]
        output = {"mood": MOODS[i * 7 % 3] if i % 2 else "glad"}
        home.truth[f"letter {i}"] = output["mood"]
        home.store.add_example(
            ExampleRecord(f"r{i}", "mood", {"text": f"letter {i}"}, output, "anthropic", "a-model", float(i))
        )
    coached(home)
    result = coach_task(home.settings, "mood", reason="now", kind="train", engine=home.engine)
    assert result.promoted, result
    name = result.version or ""
    folder = home.settings.model_dir / "mood" / name
    student = read_student(folder)
    assert student is not None
    assert student.adapter == OWN
    assert student.encoder is not None
    version = home.store.version("mood", name)
    assert version is not None
    assert version.record["halves"] == ["head", "lora"]
    assert "not_worse_than_champion" in result.reason or "correlation_low" in result.reason
    answer = home.engine.answer(name, {"text": "letter 33"}, deadline_s=5.0)
    assert answer.output == {"mood": home.truth["letter 33"]}
    assert answer.answered_by == "both"
    loaded: list[str] = []
    load = rote.load
    monkeypatch.setattr(rote, "load", lambda version: (loaded.append(version.name), load(version)))
    again = coach_task(home.settings, "mood", reason="now", kind="refit", engine=home.engine)
    there = home.settings.model_dir / "mood" / (again.version or "")
    refitted = read_student(there)
    assert refitted is not None
    assert refitted.adapter == name
    # What the base model says to the probes is known from the champion, whose adapter it is.
    assert loaded
    assert not [one for one in loaded if one.startswith("base-of-")]
    proven = {probe.input["text"]: probe.base_output for probe in read_probes(folder)}
    probes = read_probes(there)
    assert len(probes) == 24
    assert all(probe.base_output == proven[probe.input["text"]] == {"mood": "glad"} for probe in probes)
    assert any(probe.output != probe.base_output for probe in probes)


def test_a_students_adapter_takes_no_second_place_on_the_disk(
    make_home: Callable[..., Home], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter's files in a student's folder are those that the trainer wrote; without links they are copied."""
    home = make_home(local={"student": {"head_from": 60}}, task={"confidence_thresholds": {"phase1_to_phase2": 60}})
    rote, trainer = home.engine, Writer()
    trainer.skills = [0.9, 0.95]
    home.engine = StudentEngine(lambda: rote, lambda folder: load_head(folder, home.settings.root))  # type: ignore[assignment]
    monkeypatch.setattr("flows.finetune.build_trainer", lambda _backend: trainer)
    for linked in (True, False):
        if not linked:
            monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
        home.teach(60)
        result = coach_task(home.settings, "mood", reason="now", kind="train", engine=home.engine)
        folder = home.settings.model_dir / "mood" / (result.version or "")
        found = [there for there in folder.parent.glob(f"*/{adapters.WEIGHTS}") if there.parent != folder]
        same = [there.samefile(folder / adapters.WEIGHTS) for there in found]
        assert any(same) is linked, (linked, found)


def test_an_adapter_is_taken_again_where_a_killed_attempt_left_it(tmp_path: Path) -> None:
    """What it left are links to the same files: they are made again, and the adapter itself is as it was."""
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / adapters.WEIGHTS).write_bytes(b"weights")
    for _ in range(2):
        _copy_adapter(tmp_path / "v1", tmp_path / "plain")
    assert (tmp_path / "plain" / adapters.WEIGHTS).samefile(tmp_path / "v1" / adapters.WEIGHTS)
    assert (tmp_path / "v1" / adapters.WEIGHTS).read_bytes() == b"weights"


def test_a_champion_without_a_head_is_asked_as_it_is(
    make_home: Callable[..., Home], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first student beside an adapter that serves alone is compared with that adapter's own answers."""
    before = make_home()
    before.teach(200)
    trainer = Writer()
    trainer.skills = [0.95]
    monkeypatch.setattr("flows.finetune.build_trainer", lambda _backend: trainer)
    champion = coached(before).version
    home = make_home(local={"student": {"head_from": 60}}, task={"confidence_thresholds": {"phase1_to_phase2": 60}})
    home.truth, rote = before.truth, before.engine
    home.engine = StudentEngine(lambda: rote, lambda folder: load_head(folder, home.settings.root))  # type: ignore[assignment]
    trainer.skills = [0.7]
    home.teach(200)
    result = coach_task(home.settings, "mood", reason="now", kind="train", engine=home.engine)
    assert not result.promoted, result
    assert home.store.policy_row("mood").champion == champion
    (run,) = [run for run in home.store.runs("mood") if run.version == result.version]
    validated = json.loads((home.settings.model_dir / "mood" / "runs" / run.id / "validated.json").read_text())
    scores = [row["champion"] for row in validated["answers"]]
    assert sum(scores) / len(scores) > 0.9


def test_a_refit_is_no_other_attempt_and_makes_none_forgotten() -> None:
    """The same learner a little later; adapters that were refused still count over the refits between them."""

    def version(at: int, status: VersionStatus, kind: str) -> VersionRecord:
        rest = ("", "", 1, 1, "", None, "")
        return VersionRecord(f"v{at}", "mood", status, *rest, record={"kind": kind}, created_at=float(at))

    row = [version(1, "retired", "refit"), version(2, "rejected", "train"), version(3, "retired", "refit")]
    row += [version(4, "candidate", "train"), version(5, "champion", "refit")]
    assert attempts_of(row, row[-1]) == 1
    assert attempts_of(row, row[3]) == 2
    row[1] = version(2, "retired", "train")
    assert attempts_of(row, row[3]) == 1


def test_a_killed_refit_assembles_one_version(teller: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken after each of its parts, it goes on, and one version is registered."""
    for module, name in (("assemble", "_register"), ("validate", "figures_of"), ("promote", "make_champion")):
        whole: Callable[..., Any] = __import__(f"flows.{module}", fromlist=[name]).__dict__[name]
        broken = [True]

        def once(*args: Any, whole: Any = whole, broken: list[bool] = broken, **given: Any) -> Any:
            if broken.pop() if broken else False:
                raise RuntimeError("killed")
            return whole(*args, **given)

        monkeypatch.setattr(f"flows.{module}.{name}", once)
    result = coached(teller)
    assert result.promoted
    assert [v.name for v in teller.store.versions("mood")] == [result.version]
    assert not list(Path(teller.settings.model_dir / "mood").glob(".assembling-*"))


def test_a_version_that_a_person_chooses_begins_with_what_the_gate_would_give_it(
    make_home: Callable[..., Home], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged by what was held out, and trusted by all that its halves say without having learnt it."""
    home = make_home(
        local={"student": {"head_from": 60}},
        task={"promotion": "review", "confidence_thresholds": {"phase1_to_phase2": 60}},
    )
    rote = home.engine
    home.engine = StudentEngine(lambda: rote, lambda folder: load_head(folder, home.settings.root))  # type: ignore[assignment]
    monkeypatch.setattr("flows.finetune.build_trainer", lambda _backend: Writer())
    home.teach(100)
    result = coach_task(home.settings, "mood", reason="now", kind="train", engine=home.engine)
    shop = Workshop.open(home.settings)
    choose(shop, version_named(shop, "mood", result.version or ""), how="person", by="me", reason="it is good")
    shop.close()
    state = home.store.policy_row("mood")
    assert state.champion == result.version
    seeds = home.store.comparisons("mood", version=result.version)
    assert len(seeds) == result.trained_on + result.held_out > result.held_out
