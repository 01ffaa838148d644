"""From every kept example to a dataset: duplicates, conflicts, the held-out split, oversampling. No Prefect, no MLflow.

Examples are streamed three times and never held: what is kept of each is a few numbers. The split is decided by the
first example of a group of near duplicates, by a salted hash of its text, when it arrives: later examples change
nothing of it. So an example is held out forever or never, in every run, for every version.
"""

from __future__ import annotations

import hashlib
import importlib
import tempfile
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from apprentice.errors import TrainingError
from apprentice.prompts import compact_prompt
from apprentice.schemas.schema import Schema, SchemaError, compact_json
from apprentice.settings.config import TaskSettings
from apprentice.store.records import ExampleRecord
from flows.dataset import Card, CuratedDataset, adopt_dataset, plain
from flows.duplicates import Duplicates, normalised

__all__ = ["curate_examples", "is_held_out"]

_PAGE = 1000
_DROPPED, _TRAIN, _HELD_OUT = 0, 1, 2
_MOST_REPEATED = 0.10  # share of the training rows shown twice
_MOST_VALUES = 20  # of a field in the balance report


def is_held_out(task: str, group_text: str, share: float) -> bool:
    """Whether a group is held out: a salted hash of its first text, uniform in [0, 1), lies below ``share``."""
    digest = hashlib.sha256(f"held out/{task}/{group_text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


@dataclass(slots=True)
class _Survey:
    """What the first pass learns: a few numbers for each example, by its place in the stream."""

    fate: bytearray
    group: array[int]
    answer: array[int]
    conflicts: dict[int, Counter[int]]
    exact: int = 0
    near: int = 0
    invalid: int = 0
    high_water: int = 0


def curate_examples(
    read: Callable[[], Iterable[ExampleRecord]],
    task: TaskSettings,
    folder: Path,
    *,
    held_out: float,
    max_held_out: int,
    recent_disagreements: Iterable[str] = (),
    progress: Callable[[float], None] = lambda _: None,
) -> CuratedDataset:
    """Curate what ``read()`` streams, in the same order every time it is called, into ``folder``.

    Raises `TrainingError` where nothing is left to train on.
    """
    redact = _function(task.redact) if task.redact else None
    survey = _survey(_usable(read(), task, redact), task, held_out)
    progress(0.5)
    winners = _settled(_usable(read(), task, redact), survey)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".curating-", dir=folder) as work:
        train, gate = Path(work) / "train", Path(work) / "held_out"
        card = _write(
            _usable(read(), task, redact), task, survey, winners, set(recent_disagreements), max_held_out, train, gate
        )
        progress(1.0)
        if card.trained_on == 0:
            raise TrainingError(
                f"task {task.name!r} has {card.examples} examples and none to train on: {card.invalid} are outside "
                f"today's schema and {card.held_out} held out; collect more"
            )
        return adopt_dataset(folder, train, gate, card)


type _Usable = tuple[ExampleRecord, dict[str, Any] | None, dict[str, Any]]


def _usable(
    examples: Iterable[ExampleRecord], task: TaskSettings, redact: Callable[[Any], Any] | None
) -> Iterator[_Usable]:
    """Each example with its redacted input and its output, the input None where they no longer fit the schemas."""
    for example in examples:
        try:
            value = task.input_schema.check(example.input)
            if redact is not None:
                value = task.input_schema.check(redact(value))
            yield example, value, task.output_schema.check(example.output)
        except SchemaError:
            yield example, None, {}


def _survey(examples: Iterator[_Usable], task: TaskSettings, held_out: float) -> _Survey:
    survey = _Survey(bytearray(), array("i"), array("q"), defaultdict(Counter))
    duplicates = Duplicates()
    numbers = array("i")  # number among the duplicates -> place in the stream
    while page := list(islice(examples, _PAGE)):
        survey.high_water = page[-1][0].seq
        usable = [(value, output) for _, value, output in page if value is not None]
        texts = [compact_prompt(value, task.input_schema) for value, _ in usable]
        seen = duplicates.add_page(texts)
        for _, value, output in page:
            place = len(survey.fate)
            survey.fate.append(_DROPPED)
            survey.group.append(place)
            survey.answer.append(_answer_hash(output))
            if value is None:
                survey.invalid += 1
                continue
            this = next(seen)
            numbers.append(place)
            if this.equal_to >= 0:
                _note_equal(survey, place, numbers[this.equal_to])
            elif this.near:
                _note_near(survey, place, [numbers[i] for i in this.near])
            else:
                survey.fate[place] = _HELD_OUT if is_held_out(task.name, _split_text(value), held_out) else _TRAIN
    return survey


def _split_text(value: Mapping[str, Any]) -> str:
    """The text by whose hash an input is held out or not. It must never change, whatever prompts look like.

    A champion's held-out examples stay those that it never trained on.
    """
    fields = [(name, inner) for name, inner in value.items() if inner not in (None, {}, [])]
    if len(fields) == 1 and isinstance(fields[0][1], str):
        return normalised(fields[0][1])
    return normalised("\n".join(f"{name}: {v if isinstance(v, str) else compact_json(v)}" for name, v in fields))


def _note_equal(survey: _Survey, place: int, first: int) -> None:
    """The same input again: dropped. Where its answer differs, both answers (and all later ones) get a vote."""
    survey.exact += 1
    survey.group[place] = first
    answer = survey.answer[place]
    if answer != survey.answer[first] or first in survey.conflicts:
        votes = survey.conflicts[first]
        if not votes:
            votes[survey.answer[first]] = 1
        votes[answer] += 1


def _note_near(survey: _Survey, place: int, near: list[int]) -> None:
    """Almost the same input: dropped where it teaches nothing new, else kept on the side of its group.

    One that resembles both a held-out and a training example belongs on neither side.
    """
    sides = {survey.fate[survey.group[other]] for other in near} - {_DROPPED}
    survey.group[place] = survey.group[near[0]]
    if len(sides) == 1 and all(survey.answer[other] != survey.answer[place] for other in near):
        survey.fate[place] = sides.pop()
    else:
        survey.near += 1


def _settled(examples: Iterator[_Usable], survey: _Survey) -> dict[int, dict[str, Any]]:
    """The answer that won at each input with conflicting ones: the commonest, the latest of these where they tie."""
    if not survey.conflicts:
        return {}
    latest: dict[int, dict[int, tuple[int, dict[str, Any]]]] = defaultdict(dict)
    for place, (_, value, output) in enumerate(examples):
        if place >= len(survey.fate):
            break
        first = survey.group[place]
        if value is not None and first in survey.conflicts and survey.answer[place] in survey.conflicts[first]:
            latest[first][survey.answer[place]] = (place, output)
    winners = {}
    for first, votes in survey.conflicts.items():
        best = max(votes, key=lambda answer: (votes[answer], latest[first][answer][0]))
        winners[first] = latest[first][best][1]
    return winners


def _write(
    examples: Iterator[_Usable],
    task: TaskSettings,
    survey: _Survey,
    winners: Mapping[int, dict[str, Any]],
    disagreements: set[str],
    max_held_out: int,
    train: Path,
    gate: Path,
) -> Card:
    total = survey.fate.count(_TRAIN)
    older = max(0, survey.fate.count(_HELD_OUT) - max_held_out)
    skipped = repeated = 0
    models: Counter[str] = Counter()
    balance: dict[str, Counter[str]] = defaultdict(Counter)
    with train.open("w", encoding="utf-8") as to_train, gate.open("w", encoding="utf-8") as to_gate:
        for place, (example, value, output) in enumerate(islice(examples, len(survey.fate))):
            fate = survey.fate[place]
            if fate == _DROPPED:
                continue
            row: dict[str, Any] = {"id": example.id, "input": value, "output": winners.get(place, output)}
            if fate == _HELD_OUT:
                if skipped < older:
                    skipped += 1
                    continue
                to_gate.write(plain(row) + "\n")
                continue
            if example.id in disagreements and repeated < _MOST_REPEATED * total:
                row["repeat"] = 2
                repeated += 1
            to_train.write(plain(row) + "\n")
            models[example.model] += 1
            for name, field_value in row["output"].items():
                _count(balance[name], field_value)
    return Card(
        task=task.name,
        examples=len(survey.fate),
        trained_on=total,
        held_out=survey.fate.count(_HELD_OUT) - older,
        held_out_older=older,
        exact_duplicates=survey.exact,
        near_duplicates=survey.near,
        conflicts=len(survey.conflicts),
        invalid=survey.invalid,
        repeated=repeated,
        data_high_water=survey.high_water,
        models=dict(models.most_common()),
        balance={name: dict(counts.most_common(_MOST_VALUES)) for name, counts in balance.items()},
    )


def _count(counts: Counter[str], value: Any) -> None:
    """Count a field's value; free text and objects count by kind, since each value would be a row of its own."""
    if isinstance(value, list):
        counts[f"{len(value)} items" if len(value) < 10 else "10 items or more"] += 1
    elif isinstance(value, dict):
        counts["object"] += 1
    else:
        text = str(value)
        counts[text if len(text) <= 40 and (len(counts) < 1000 or text in counts) else "other text"] += 1


def _answer_hash(output: Mapping[str, Any]) -> int:
    digest = hashlib.blake2b(Schema.dumps(output).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _function(target: str) -> Callable[[Any], Any]:
    module, _, name = target.partition(":")
    try:
        found: Callable[[Any], Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise TrainingError(f"redact: {target!r} cannot be imported ({error}); nothing is trained without it") from None
    return found
