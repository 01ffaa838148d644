"""What a head sees of an input: embeddings of its texts, and what can be said of it in a few numbers.

`Plan.of` decides it from inputs, once; the plan is stored with the head. Whatever an input holds beyond what the plan
knows is part of its text at most, and what it lacks counts as nothing.

- Two texts that are put side by side (a question and its answer, two offers): the embeddings of both, and how
  alike they are word by word, by their numbers and by letters. If the two are of like length, as two descriptions of
  one kind are, also how the embeddings differ (|a - b| and a * b).
- Else the whole input as one text.
- Numbers, and texts of few values, booleans too, are features by themselves as well.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from apprentice.prompts import compact_prompt
from apprentice.schema import compact_json

__all__ = ["Plan", "whole_text"]

type Floats = NDArray[np.float64]

_LONG = 4
"""Characters that a field's texts have on average to be read by themselves."""
_FEW = 20
"""Values of a field that are one feature each."""
_ALIKE_LENGTHS = 3.0
"""Two texts whose mean lengths are within this factor are compared."""
_SCALE = 0.3
"""A standard deviation of a number, or a value that is there: well above that of an embedding's components, 0.05 at
384 dimensions, so that a fit that shrinks the embeddings hardly shrinks these."""
_MOST = 4.0
"""Standard deviations beyond which a number is no further out."""
_READ = 2000
_WORD = re.compile(r"[^\W_]+", re.UNICODE)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@dataclass(frozen=True, slots=True)
class Plan:
    """Which features an input has.

    ``sides`` are two fields that are read by themselves, or none; ``compared`` says that their embeddings are
    compared. ``numbers`` are fields with the mean and the standard deviation of what was seen, ``kinds`` fields with
    the JSON text of each of their values.
    """

    sides: tuple[str, ...] = ()
    compared: bool = False
    numbers: tuple[tuple[str, float, float], ...] = ()
    kinds: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @classmethod
    def of(cls, inputs: Sequence[Mapping[str, Any]]) -> Plan:
        """Decide it from inputs, one at least."""
        seen: dict[str, list[Any]] = {}
        for one in inputs:
            for name, value in one.items():
                if value is not None:
                    seen.setdefault(name, []).append(value)
        often = {name: values for name, values in seen.items() if 2 * len(values) >= len(inputs)}
        lengths: dict[str, float] = {}
        numbers, kinds = [], []
        for name, values in often.items():
            if all(map(_is_number, values)):
                spread = float(np.std(np.array(values, np.float64)))
                if math.isfinite(spread) and spread > 0.0:
                    numbers.append((name, float(np.mean(np.array(values, np.float64))), spread))
                continue
            length = sum(len(_text(value)) for value in values) / len(values)
            plain = not any(isinstance(value, Mapping | list | tuple) for value in values)
            texts = {compact_json(value) for value in values} if plain else set()
            if 2 <= len(texts) <= min(_FEW, len(values) / 5) and len(often) > 1:
                kinds.append((name, tuple(sorted(texts))))
            elif length >= _LONG and not all(map(_is_number, values)):
                lengths[name] = length
        if len(lengths) != 2:
            return cls((), False, tuple(numbers), tuple(kinds))
        shorter, longer = sorted(lengths.values())
        return cls(tuple(lengths), longer <= _ALIKE_LENGTHS * shorter, tuple(numbers), tuple(kinds))

    def texts(self, value: Mapping[str, Any]) -> list[str]:
        """The texts of an input that are to be encoded, as many for each; "" for one that is not there."""
        if not self.sides:
            return [whole_text(value)]
        return [_text(value.get(name)) for name in self.sides]

    def vectors(
        self, inputs: Sequence[Mapping[str, Any]], encode: Callable[[Sequence[str]], NDArray[Any]]
    ) -> tuple[Floats, Floats]:
        """The features of inputs, [inputs, features], and where they lie among texts, unit vectors [inputs, place].

        ``encode`` gives the embeddings of texts, [texts, dimensions], and is called once.
        """
        texts = [self.texts(value) for value in inputs]
        width = max(len(self.sides), 1)
        flat = [text for one in texts for text in one]
        encoded = np.asarray(encode(flat), np.float64)
        encoded[[not text for text in flat]] = 0.0
        sides = encoded.reshape(len(inputs), width, encoded.shape[1])
        place = sides.reshape(len(inputs), -1)
        blocks = [place]
        if self.sides:
            a, b = sides[:, 0], sides[:, 1]
            if self.compared:
                # The mean |a - b| of two unit vectors grows as an embedding's component, their product with its square.
                blocks = [np.abs(a - b), math.sqrt(a.shape[1]) * a * b]
            blocks.append(_SCALE * np.array([alike(*pair) for pair in texts]).reshape(len(inputs), -1))
        blocks += [self._numbers(inputs), self._kinds(inputs)]
        norms = np.linalg.norm(place, axis=1, keepdims=True)
        return np.hstack(blocks), place / np.where(norms > 0.0, norms, 1.0)

    def _numbers(self, inputs: Sequence[Mapping[str, Any]]) -> Floats:
        found = np.zeros((len(inputs), len(self.numbers)))
        for column, (name, mean, spread) in enumerate(self.numbers):
            for row, value in enumerate(inputs):
                number = value.get(name)
                if _is_number(number):
                    found[row, column] = _SCALE * min(max((float(number) - mean) / spread, -_MOST), _MOST)
        return found

    def _kinds(self, inputs: Sequence[Mapping[str, Any]]) -> Floats:
        columns = {key: at for at, key in enumerate((name, text) for name, texts in self.kinds for text in texts)}
        found = np.zeros((len(inputs), len(columns)))
        for row, value in enumerate(inputs):
            for name, _ in self.kinds:
                at = columns.get((name, compact_json(value.get(name))))
                if at is not None:
                    found[row, at] = _SCALE
        return found

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "sides": list(self.sides),
            "compared": self.compared,
            "numbers": [list(one) for one in self.numbers],
            "kinds": [[name, list(texts)] for name, texts in self.kinds],
        }

    @classmethod
    def of_json(cls, stored: Mapping[str, Any]) -> Plan:
        """Read `to_json`. Raises KeyError, TypeError or ValueError where it is something else."""
        sides = tuple(map(str, stored["sides"]))
        numbers = tuple((str(name), float(mean), float(spread)) for name, mean, spread in stored["numbers"])
        if len(sides) not in (0, 2) or any(not spread > 0.0 for _, _, spread in numbers):
            raise ValueError("the features are not what a plan has")
        kinds = tuple((str(name), tuple(map(str, texts))) for name, texts in stored["kinds"])
        return cls(sides, bool(stored["compared"]), numbers, kinds)


def whole_text(value: Mapping[str, Any]) -> str:
    """An input as one text: the local model's rendering of it."""
    return compact_prompt(value)


def alike(a: str, b: str) -> list[float]:
    """How alike two texts are, each in [0, 1].

    By words: the Jaccard index, and the share of the shorter one's that the other has too; the same of what holds a
    digit (a model's number, a size); the cosine of the counts of three letters in a row; the ratio of the lengths; and
    whether both have something with a digit.
    """
    a, b = a[:_READ].casefold(), b[:_READ].casefold()
    ours, theirs = set(_WORD.findall(a)), set(_WORD.findall(b))
    our_codes, their_codes = _codes(a, ours), _codes(b, theirs)
    lengths = sorted((len(a), len(b)))
    return [
        _jaccard(ours, theirs),
        _covered(ours, theirs),
        _jaccard(our_codes, their_codes),
        _covered(our_codes, their_codes),
        _cosine(_trigrams(a), _trigrams(b)),
        lengths[0] / lengths[1] if lengths[1] else 1.0,
        float(bool(our_codes) and bool(their_codes)),
    ]


def _codes(text: str, words: set[str]) -> set[str]:
    return {word for word in words if any(map(str.isdigit, word))} | set(_NUMBER.findall(text))


def _jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b) if a or b else 0.0


def _covered(a: set[str], b: set[str]) -> float:
    return len(a & b) / min(len(a), len(b)) if a and b else 0.0


def _trigrams(text: str) -> Counter[str]:
    text = f" {' '.join(text.split())} "
    return Counter(text[at : at + 3] for at in range(len(text) - 2))


def _cosine(a: Counter[str], b: Counter[str]) -> float:
    if not a or not b:
        return 0.0
    dot = sum(count * b[key] for key, count in a.items() if key in b)
    return dot / math.sqrt(sum(n * n for n in a.values()) * sum(n * n for n in b.values()))


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return compact_prompt(value) if isinstance(value, Mapping) else compact_json(value)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
