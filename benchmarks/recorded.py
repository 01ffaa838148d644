"""Streams of recorded answers of real models: what `benchmarks.baseline` and `benchmarks.streams` replay.

Each is a task as an application would configure it; an answer agrees if every field equals the remote's. How made:

- ``isear``: a sentence about a situation -> one of seven emotions; gpt-3.5-turbo-1106. 7,666 requests.
- ``em_abt_buy``: two product offers -> the same product, yes or no; gpt-5.2; 14 % yes. 6,000 requests.
- ``isear_two``: the sentences of isear -> {emotion, reading}: gpt-3.5-turbo-1106's answer and llama-2-70b-chat's, as if
  one remote were asked for two labels. They differ on 21 % of the 7,425 sentences that both answered.
- ``oa_nodes``: {phrase, title} -> the node of a catalogue that the phrase of the title fills, such as "Tea/Flavor": one
  of 106. Each attribute that gpt-4-0613 found in a title of OA-Mine (not "n/a") is a request, its phrase taken from the
  answer: 2,499. The remote was told the category of the title, the student is not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["STREAMS", "Stream", "read_stream"]

STREAMS = ("isear", "em_abt_buy", "isear_two", "oa_nodes")


@dataclass(frozen=True, slots=True)
class Stream:
    """Requests with the remote's recorded answers, in the order in which they arrive."""

    name: str
    inputs: Sequence[Mapping[str, Any]]
    answers: Sequence[Mapping[str, str]]

    def __len__(self) -> int:
        return len(self.inputs)

    def values(self) -> dict[str, tuple[str, ...]]:
        """The allowed values of each field, as its schema would list them."""
        return {field: tuple(sorted({a[field] for a in self.answers})) for field in self.answers[0]}

    def texts(self) -> list[tuple[str, ...]]:
        """The text of every request: one, or two if two things are put side by side."""
        return [tuple(_text(part) for part in one.values()) for one in self.inputs]

    def shuffled(self, order: int) -> tuple[Stream, list[int]]:
        """The same requests in the order that numpy's default generator draws with this seed; and which they were."""
        places: list[int] = np.random.default_rng(order).permutation(len(self)).tolist()
        return Stream(self.name, [self.inputs[i] for i in places], [self.answers[i] for i in places]), places


def read_stream(folder: Path, name: str) -> Stream:
    """One of `STREAMS`, from the recorded answers in ``folder``. Raises OSError, ValueError."""
    if name not in STREAMS:
        raise ValueError(f"there is no stream {name!r}; there are {', '.join(STREAMS)}")
    if name == "oa_nodes":
        return Stream(name, *_nodes(_rows(folder / "oa_mine.jsonl")))
    rows = _rows(folder / f"{name.removesuffix('_two')}.jsonl")
    if name == "isear_two":
        both = [row for row in rows if len(row["answers"]) == 2]
        answers = [
            {
                "emotion": row["answers"]["gpt-3.5-turbo-1106"]["emotion"],
                "reading": row["answers"]["llama-2-70b-chat"]["emotion"],
            }
            for row in both
        ]
        return Stream(name, [row["input"] for row in both], answers)
    remote = "gpt-5.2" if name == "em_abt_buy" else "gpt-3.5-turbo-1106"
    return Stream(name, [row["input"] for row in rows], [row["answers"][remote] for row in rows])


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _nodes(rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    inputs, answers = [], []
    for row in rows:
        for attribute, phrase in row["answers"]["gpt-4-0613"].items():
            if phrase != "n/a":
                inputs.append({"phrase": phrase, "title": row["input"]["title"]})
                answers.append({"node": f"{row['input']['category']}/{attribute}"})
    return inputs, answers


def _text(value: Any) -> str:
    return ", ".join(f"{key}: {one}" for key, one in value.items()) if isinstance(value, Mapping) else str(value)
