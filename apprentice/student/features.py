"""What a head sees of an input: embeddings of its texts, and what can be said of it in a few numbers.

`Plan.of` decides it from inputs, once; the plan is stored with the head. Whatever an input holds beyond what the plan
knows is part of its text at most, and what it lacks counts as nothing.

- Two texts that are put side by side (a question and its answer, two offers): the embeddings of both, and how alike
  they are word by word, by their numbers and by letters; of two objects, field by field too. If the two are of like
  length, as two descriptions of one kind are, how the embeddings differ (|a - b| and a * b) and not what they are, and
  products of two likenesses.
- Else the whole input as one text.
- Numbers, and texts of few values, booleans too, are features by themselves as well.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from apprentice.prompts import compact_prompt
from apprentice.schemas.schema import compact_json

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
_NAME = 4
_MOST_NAMES = 16
_MOST_PARTS = 4
_WORD = re.compile(r"[^\W_]+", re.UNICODE)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@dataclass(frozen=True, slots=True)
class Plan:
    """Which features an input has.

    ``sides`` are two fields that are read by themselves, or none; ``compared`` says that their embeddings are
    compared. ``parts`` are fields that both sides, being objects, have. ``numbers`` are fields with the mean and the
    standard deviation of what was seen, ``kinds`` fields with the JSON text of each of their values.
    """

    sides: tuple[str, ...] = ()
    compared: bool = False
    parts: tuple[str, ...] = ()
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
            elif length >= _LONG:
                lengths[name] = length
        if len(lengths) != 2:
            return cls((), False, (), tuple(numbers), tuple(kinds))
        shorter, longer = sorted(lengths.values())
        compared = longer <= _ALIKE_LENGTHS * shorter
        return cls(tuple(lengths), compared, _parts(inputs, tuple(lengths)), tuple(numbers), tuple(kinds))

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
            pairs = [[(one[0], one[1]), *self._part_texts(value)] for one, value in zip(texts, inputs, strict=True)]
            found = np.array([[number for pair in one for number in alike(*pair)] for one in pairs])
            likeness = found.reshape(len(inputs), -1)
            # Of two of one kind, what one likeness is worth depends on another: both are the same brand, and a number
            # differs. Elsewhere likeness is a hint among others.
            blocks += [likeness, _products(likeness)] if self.compared else [_SCALE * likeness]
        blocks += [self._numbers(inputs), self._kinds(inputs)]
        norms = np.linalg.norm(place, axis=1, keepdims=True)
        return np.hstack(blocks), place / np.where(norms > 0.0, norms, 1.0)

    def _part_texts(self, value: Mapping[str, Any]) -> list[tuple[str, str]]:
        a, b = (value.get(name) for name in self.sides)
        return [(_text(_part(a, part)), _text(_part(b, part))) for part in self.parts]

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
            "parts": list(self.parts),
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
        return cls(sides, bool(stored["compared"]), tuple(map(str, stored["parts"])), numbers, kinds)


def _products(x: Floats) -> Floats:
    """Each column times each one from it on."""
    return np.hstack([x[:, at : at + 1] * x[:, at:] for at in range(x.shape[1])])


def _parts(inputs: Sequence[Mapping[str, Any]], sides: tuple[str, ...]) -> tuple[str, ...]:
    """The fields that both sides have in half of the inputs or more, in the order of the first."""
    both: Counter[str] = Counter()
    for value in inputs:
        a, b = (value.get(name) for name in sides)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            both.update(name for name in a if b.get(name) is not None and a[name] is not None)
    return tuple(name for name, count in both.items() if 2 * count >= len(inputs))[:_MOST_PARTS]


def _part(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else None


def whole_text(value: Mapping[str, Any]) -> str:
    """An input as one text: the local model's rendering of it."""
    return compact_prompt(value)


def alike(a: str, b: str) -> list[float]:
    """How alike two texts are, each number in [0, 1].

    By words: the Jaccard index, the same with words counted by their length, and the share of the shorter one's that
    the other has too. By what holds a digit (a model's number, a size): Jaccard and share. By the cosine of the counts
    of three letters in a row, and the ratio of the lengths. By names, four letters and digits or more that mix both:
    how alike the most alike two are from their beginning, whether one's is found in the other text however it is
    spaced there, whether both have names and none is, and whether both have any.
    """
    a, b = a[:_READ].casefold(), b[:_READ].casefold()
    ours, theirs = set(_WORD.findall(a)), set(_WORD.findall(b))
    our_codes, their_codes = _codes(a, ours), _codes(b, theirs)
    our_names, their_names = _names(ours), _names(theirs)
    ours_run_on, theirs_run_on = ("".join(_WORD.findall(text)) for text in (a, b))
    found = any(name in theirs_run_on for name in our_names) or any(name in ours_run_on for name in their_names)
    both = bool(our_names) and bool(their_names)
    shorter, longer = sorted((len(a), len(b)))
    return [
        _jaccard(ours, theirs),
        _by_length(ours & theirs) / max(_by_length(ours | theirs), 1),
        _covered(ours, theirs),
        _jaccard(our_codes, their_codes),
        _covered(our_codes, their_codes),
        _cosine(_trigrams(a), _trigrams(b)),
        shorter / longer if longer else 1.0,
        max((_begins_alike(one, other) for one in our_names for other in their_names), default=0.0),
        float(found),
        float(both and not found),
        float(both),
    ]


def _codes(text: str, words: set[str]) -> set[str]:
    return {word for word in words if any(map(str.isdigit, word))} | set(_NUMBER.findall(text))


def _names(words: set[str]) -> list[str]:
    mixed = [w for w in words if len(w) >= _NAME and any(map(str.isdigit, w)) and any(map(str.isalpha, w))]
    return sorted(mixed)[:_MOST_NAMES]


def _begins_alike(a: str, b: str) -> float:
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
    return same / max(len(a), len(b))


def _by_length(words: set[str]) -> int:
    return sum(map(len, words))


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
