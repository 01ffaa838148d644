"""Curation: what is dropped, what is settled, and who is held out forever."""

from __future__ import annotations

import json
import random
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apprentice.errors import TrainingError
from apprentice.schemas.schema import parse_schema
from apprentice.settings.config import TaskSettings
from apprentice.store.records import ExampleRecord
from flows.curation import curate_examples, is_held_out
from flows.dataset import CuratedDataset, load_dataset

TASK = TaskSettings.model_validate(
    {
        "name": "mood",
        "description": "Say how the writer feels.",
        "input_schema": {"text": "str"},
        "output_schema": {"mood": "glad | sad"},
    }
)
WORDS = (
    "river amber tall quiet seven orchard window cobalt maybe drum lantern frost paper violet engine salt".split()  # noqa: SIM905
)


def _example(seq: int, text: str, mood: str = "glad", model: str = "teacher") -> ExampleRecord:
    return ExampleRecord(f"r{seq}", "mood", {"text": text}, {"mood": mood}, "anthropic", model, 0.0, seq)


def _different(count: int, seed: int = 0) -> list[ExampleRecord]:
    draw = random.Random(seed)
    return [_example(i, " ".join(draw.choices(WORDS, k=12)), draw.choice(["glad", "sad"])) for i in range(1, count + 1)]


def _curate(examples: Sequence[ExampleRecord], folder: Path, **changes: Any) -> CuratedDataset:
    options: dict[str, Any] = {"held_out": 0.2, "max_held_out": 1000, **changes}
    task = options.pop("task", TASK)
    return curate_examples(lambda: iter(examples), task, folder, **options)


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}


def test_an_example_is_held_out_forever_or_never(tmp_path: Path) -> None:
    """However the corpus grows, no example ever changes sides."""
    examples = _different(600)
    sides: dict[str, str] = {}
    for size in (50, 120, 300, 600):
        dataset = _curate(examples[:size], tmp_path)
        for side, path in (("train", dataset.train), ("held out", dataset.held_out)):
            for row_id in _rows(path):
                assert sides.setdefault(row_id, side) == side
    share = sum(side == "held out" for side in sides.values()) / len(sides)
    assert 0.15 < share < 0.25


def test_the_same_examples_give_the_same_dataset(tmp_path: Path) -> None:
    """A dataset is named by its content: curating twice changes nothing, one example more changes the name."""
    examples = _different(60)
    first = _curate(examples, tmp_path)
    assert _curate(examples, tmp_path) == first
    assert _curate([*examples, _example(99, "a new one")], tmp_path).digest != first.digest
    assert load_dataset(tmp_path, first.digest) == first
    assert not list(tmp_path.glob(".curating-*"))


def test_exact_duplicates_are_dropped(tmp_path: Path) -> None:
    """The same input twice is one row."""
    examples = [*_different(40), _example(41, _different(40)[0].input["text"])]
    card = _curate(examples, tmp_path).card
    assert (card.exact_duplicates, card.trained_on + card.held_out) == (1, 40)


def test_case_is_kept_where_the_answer_hangs_on_it(tmp_path: Path) -> None:
    """An apple and Apple are two inputs with two answers, on one side; shouting the same thing is a near duplicate."""
    pairs = [(f"{word} pie {i}", f"{word.title()} pie {i}") for i, word in enumerate(WORDS)]
    examples = [
        _example(2 * i + j, text, mood)
        for i, pair in enumerate(pairs)
        for j, (text, mood) in enumerate(zip(pair, ("glad", "sad"), strict=True))
    ]
    dataset = _curate([*examples, _example(99, pairs[0][0].upper(), "glad")], tmp_path)
    sides = [_rows(dataset.train), _rows(dataset.held_out)]
    assert sum(map(len, sides)) == 2 * len(pairs)
    assert (dataset.card.exact_duplicates, dataset.card.near_duplicates, dataset.card.conflicts) == (0, 1, 0)
    assert all((f"r{2 * i}" in side) == (f"r{2 * i + 1}" in side) for side in sides for i in range(len(pairs)))


def test_two_fields_with_one_text_are_two_inputs(tmp_path: Path) -> None:
    """A question and a statement of the same words may have opposite answers; neither outvotes the other."""
    task = TASK.model_copy(update={"input_schema": parse_schema({"question": "str?", "statement": "str?"})})
    rows = [
        replace(_example(i, "", mood), input={field: f"it is {WORDS[i // 2]}"})
        for i, (field, mood) in enumerate([("question", "glad"), ("statement", "sad")] * 15)
    ]
    card = _curate(rows, tmp_path, task=task).card
    assert (card.exact_duplicates, card.conflicts, card.trained_on + card.held_out) == (0, 0, 30)


def test_a_row_that_cannot_be_used_is_left_out_and_counted(tmp_path: Path) -> None:
    """Old rows exist from before anything was refused: half a surrogate is mended, NaN and nesting are left out."""
    task = TASK.model_copy(update={"output_schema": parse_schema({"mood": "str", "score": "any?"})})
    deep: Any = 1
    for _ in range(150):
        deep = [deep]
    odd = [
        replace(_example(51, "half \ud83d of it"), output={"mood": "half \ud83d"}),
        replace(_example(52, "not a number"), output={"mood": "glad", "score": float("nan")}),
        replace(_example(53, "too large"), output={"mood": "glad", "score": float("inf")}),
        replace(_example(54, "too deep"), output={"mood": "glad", "score": deep}),
        replace(_example(55, "too long"), output={"mood": "glad", "score": 10**40}),
        replace(_example(56, ""), input={"text": 3}),
    ]
    dataset = _curate([*_different(40), *odd], tmp_path, task=task)
    assert (dataset.card.invalid, dataset.card.trained_on + dataset.card.held_out) == (5, 41)
    rows = {**_rows(dataset.train), **_rows(dataset.held_out)}
    assert (rows["r51"]["input"], rows["r51"]["output"]) == ({"text": "half \ufffd of it"}, {"mood": "half \ufffd"})


def test_the_split_hangs_on_nothing_that_prompts_may_change(tmp_path: Path) -> None:
    """Which examples are held out is fixed for good, to the very rows: champions of long ago never trained on them."""
    dataset = _curate(_different(40), tmp_path)
    held_out = ["r1", "r11", "r16", "r18", "r23", "r29", "r32", "r35", "r36", "r37", "r8", "r9"]
    assert sorted(_rows(dataset.held_out)) == held_out


def test_near_duplicates_stay_on_one_side(tmp_path: Path) -> None:
    """A near duplicate with the same answer is dropped; with another answer it joins its group's side."""
    text = " ".join(WORDS * 2)
    examples = [
        *_different(40),
        _example(41, text),
        _example(42, text + " today"),
        _example(43, text + " again", "sad"),
    ]
    dataset = _curate(examples, tmp_path)
    sides = [_rows(dataset.train), _rows(dataset.held_out)]
    assert dataset.card.near_duplicates == 1
    assert all("r42" not in side for side in sides)
    assert [("r41" in side) == ("r43" in side) for side in sides] == [True, True]


def test_conflicting_answers_are_settled_by_majority_then_by_the_latest(tmp_path: Path) -> None:
    """Two against one wins; one against one, the later one wins; both are reported."""
    votes = [("first text of all", ["sad", "glad", "glad"]), ("second text of all", ["glad", "sad"])]
    examples = _different(40)
    for text, moods in votes:
        examples += [_example(len(examples) + 1, text, mood) for mood in moods]
    dataset = _curate(examples, tmp_path)
    rows = {**_rows(dataset.train), **_rows(dataset.held_out)}
    assert (rows["r41"]["output"], rows["r44"]["output"]) == ({"mood": "glad"}, {"mood": "sad"})
    assert dataset.card.conflicts == 2


def test_examples_outside_todays_schema_are_left_out(tmp_path: Path) -> None:
    """An answer that the output schema no longer allows is counted and not learnt."""
    dataset = _curate([*_different(40), _example(41, "odd one", "furious")], tmp_path)
    assert dataset.card.invalid == 1
    assert "r41" not in {**_rows(dataset.train), **_rows(dataset.held_out)}


def test_recent_disagreements_are_shown_twice_up_to_a_cap(tmp_path: Path) -> None:
    """At most a tenth of the rows is repeated, however many disagreements there were."""
    examples = _different(100)
    dataset = _curate(examples, tmp_path, recent_disagreements=[e.id for e in examples])
    repeats = [row.get("repeat", 1) for row in _rows(dataset.train).values()]
    assert repeats.count(2) == dataset.card.repeated
    assert 0.08 * len(repeats) < repeats.count(2) <= 0.1 * len(repeats) + 1


def test_the_newest_held_out_examples_are_used(tmp_path: Path) -> None:
    """max_held_out keeps the newest; the older ones are not trained on either."""
    dataset = _curate(_different(300), tmp_path, max_held_out=20)
    kept, everything = _rows(dataset.held_out), _rows(_curate(_different(300), tmp_path).held_out)
    assert list(kept) == list(everything)[-20:]
    assert not set(everything) & set(_rows(dataset.train))
    assert dataset.card.held_out_older == len(everything) - 20


def test_redaction_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What redact removes is in no file."""

    def redact(value: dict[str, Any]) -> dict[str, Any]:
        return {"text": value["text"].replace("salt", "[name]")}

    module = types.ModuleType("a_redaction")
    module.redact = redact  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_redaction", module)
    task = TASK.model_copy(update={"redact": "a_redaction:redact"})
    dataset = _curate(_different(100), tmp_path, task=task)
    text = dataset.train.read_text() + dataset.held_out.read_text()
    assert "[name]" in text
    assert "salt" not in text


def test_a_redaction_that_cannot_be_imported_trains_nothing(tmp_path: Path) -> None:
    """Personal data is never trained on by mistake."""
    task = TASK.model_copy(update={"redact": "no_such_module:redact"})
    with pytest.raises(TrainingError, match="no_such_module:redact"):
        _curate(_different(10), tmp_path, task=task)


def test_nothing_left_is_an_error_with_its_cause(tmp_path: Path) -> None:
    """A corpus without a usable example says what became of them."""
    with pytest.raises(TrainingError, match="1 are outside"):
        _curate([_example(1, "odd one", "furious")], tmp_path)


def test_the_card_names_teachers_and_balance(tmp_path: Path) -> None:
    """Who taught, and how the answers are spread, can be read off the card."""
    examples = [*_different(30), *(_example(i, f"text number {i}", "sad", "other") for i in range(31, 41))]
    card = _curate(examples, tmp_path).card
    assert set(card.models) == {"teacher", "other"}
    assert sum(card.balance["mood"].values()) == card.trained_on
    assert "Taught by teacher" in card.markdown("0" * 64)


def test_the_split_is_salted_by_task() -> None:
    """Two tasks hold out different examples."""
    texts = [f"text {i}" for i in range(500)]
    both: Callable[[str], list[bool]] = lambda task: [is_held_out(task, text, 0.2) for text in texts]  # noqa: E731
    assert both("a") != both("b")
    assert 60 < sum(both("a")) < 140
