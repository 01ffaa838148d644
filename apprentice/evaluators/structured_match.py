"""`evaluator: structured_match`, the one that a task has unless it names another."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from apprentice.errors import EvaluatorError
from apprentice.evaluators.protocol import Answer, Evaluation, Evaluator
from apprentice.evaluators.values import MISSING, at, canonical, same, shorten

__all__ = ["StructuredMatch"]

# Objects in two lists are matched as well as can be up to this many a side: for the lists of an answer's own fields,
# for lists inside the items of those, and for lists further in. More of them are matched block by block.
_EXACT = (64, 16, 4)


class StructuredMatch(Evaluator):
    """The weighted mean over fields of how alike two answers are.

    ``match_fields`` are dotted paths ("address.city"); all top-level fields of either answer when empty. A field is

    - a number: 1 within ``numeric_tolerance`` (absolute), else 0;
    - a list with ``ordered``: the share of positions that match, of the longer list;
    - a list otherwise: F1 of the best one-to-one matching of its items (two empty lists match). Text, numbers and the
      like are counted, however many; of objects and lists up to 64 a side are matched as well as can be, of more the
      equal ones first and the others block by block in the order of their text, which may miss some likeness;
    - an object: the mean over its keys, a key missing on one side counting 0;
    - anything else: 1 where equal, else 0. Text is compared without its surrounding and repeated white space.

    A field absent from both answers counts as equal: null and absent are the same.
    """

    is_quick = True

    class Options(BaseModel):
        """Keys of the task."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        match_fields: tuple[str, ...] = ()
        field_weights: Mapping[str, float] = {}
        numeric_tolerance: float = 0.0
        ordered_lists: bool = False

    @classmethod
    def configured(cls, options: Any) -> StructuredMatch:
        return cls(
            options.match_fields,
            options.field_weights,
            numeric_tolerance=options.numeric_tolerance,
            ordered=options.ordered_lists,
        )

    def __init__(
        self,
        match_fields: Sequence[str] = (),
        field_weights: Mapping[str, float] | None = None,
        *,
        numeric_tolerance: float = 0.0,
        ordered: bool = False,
    ) -> None:
        self.fields = tuple(match_fields)
        self.weights = dict(field_weights or {})
        self.tolerance = numeric_tolerance
        self.ordered = ordered
        self.has_ceiling = not numeric_tolerance  # what is near to what is near need not be near
        unused = [name for name in self.weights if self.fields and name not in self.fields]
        if unused:
            raise EvaluatorError(
                f"field_weights names {', '.join(unused)}, which match_fields does not compare; "
                f"it compares {', '.join(self.fields)}"
            )
        for name, weight in self.weights.items():
            if not (math.isfinite(weight) and weight > 0.0):
                raise EvaluatorError(f"the field weight of {name!r} is {weight!r}; it must be a positive number")
        self._paths = tuple((name, tuple(name.split("."))) for name in self.fields)

    def __call__(self, local: Answer, remote: Answer) -> Evaluation:
        paths = self._paths or tuple((name, (name,)) for name in dict.fromkeys((*local, *remote)))
        if not paths:
            return Evaluation(1.0, {})
        parts = {}
        total = weights = 0.0
        for name, path in paths:
            score = self._alike(at(local, path), at(remote, path))
            weight = self.weights.get(name, 1.0)
            parts[name] = score
            total += weight * score
            weights += weight
        return Evaluation(total / weights, parts)

    def expect(self, confidences: Mapping[str, float]) -> float | None:
        """The score to expect of an answer whose fields are right with these probabilities; None where none is known.

        A better confidence than that of the weakest field: a field that is not compared, or hardly weighs, then does
        not hide that the others are sure. On 200 support tickets (category to priority 3 : 1) the most confident fifth
        scores .72 by it and .59 by the weakest field.
        """
        total = weights = 0.0
        for name in self.fields or tuple(confidences):
            confidence = confidences.get(name, confidences.get(name.split(".")[0]))
            if confidence is not None:
                weight = self.weights.get(name, 1.0)
                total += weight * confidence
                weights += weight
        return total / weights if weights else None

    def project(self, answer: Answer) -> Answer:
        """The compared fields alone, long texts by their hash."""
        if not self._paths:
            return {name: shorten(value) for name, value in answer.items()}
        kept: dict[str, Any] = {}
        for _, path in self._paths:
            value = at(answer, path)
            if value is MISSING:
                continue
            place = kept
            for key in path[:-1]:
                place = place.setdefault(key, {})
            place[path[-1]] = shorten(value)
        return kept

    def _alike(self, a: Any, b: Any, depth: int = 0) -> float:
        a = None if a is MISSING else a
        b = None if b is MISSING else b
        if isinstance(a, str) and isinstance(b, str):
            return 1.0 if a == b or a.split() == b.split() else 0.0
        if _is_number(a) and _is_number(b):
            return 1.0 if self._near(a, b) else 0.0
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            keys = {*a, *b}
            if not keys:
                return 1.0
            return sum(self._alike(a.get(key), b.get(key), depth) for key in keys) / len(keys)
        if isinstance(a, list | tuple) and isinstance(b, list | tuple):
            return self._lists(a, b, depth)
        return 1.0 if same(a, b) else 0.0

    def _near(self, a: float, b: float) -> bool:
        # With a tolerance, a little more for what decimal fractions lose in binary: 0.3 - 0.1 is more than 0.2.
        slack = 1e-9 * max(abs(a), abs(b)) if self.tolerance > 0 else 0.0
        return a == b or abs(a - b) <= self.tolerance + slack

    def _lists(self, a: Sequence[Any], b: Sequence[Any], depth: int) -> float:
        if not a and not b:
            return 1.0
        if not a or not b:
            return 0.0
        if self.ordered:
            return sum(self._alike(x, y, depth) for x, y in zip(a, b, strict=False)) / max(len(a), len(b))
        # What has no parts matches its like or nothing, and never an object or a list.
        plain = self._plain_matches([x for x in a if not _has_parts(x)], [y for y in b if not _has_parts(y)])
        parted = self._parted_matches([x for x in a if _has_parts(x)], [y for y in b if _has_parts(y)], depth)
        return 2.0 * (plain + parted) / (len(a) + len(b))

    def _plain_matches(self, a: Sequence[Any], b: Sequence[Any]) -> int:
        """How many pairs of equals two lists of text, numbers, booleans and nulls make. O(n log n)."""
        ours, theirs = Counter(map(_kind, a)), Counter(map(_kind, b))
        matched = sum(min(count, theirs[kind]) for kind, count in ours.items() if kind[0] is not float)
        numbers = [
            sorted(kind[1] for kind in counted.elements() if kind[0] is float and kind[1] == kind[1])
            for counted in (ours, theirs)
        ]
        # Whom a number is near to is an interval that moves up with it: going up and taking the first is the best.
        i = j = 0
        while i < len(numbers[0]) and j < len(numbers[1]):
            x, y = numbers[0][i], numbers[1][j]
            if self._near(x, y):
                matched += 1
                i += 1
                j += 1
            elif x < y:
                i += 1
            else:
                j += 1
        return matched

    def _parted_matches(self, a: Sequence[Any], b: Sequence[Any], depth: int) -> float:
        """The total likeness of a one-to-one matching of objects and lists: the best, up to `_EXACT` of them a side."""
        most = _EXACT[min(depth, len(_EXACT) - 1)]
        if not a or not b:
            return 0.0
        total = 0.0
        if max(len(a), len(b)) > most:
            ours, theirs = Counter(map(canonical, a)), Counter(map(canonical, b))
            total = float((ours & theirs).total())
            # In the order of their text those that begin alike come into one block.
            a = [json.loads(text) for text in sorted((ours - theirs).elements())]
            b = [json.loads(text) for text in sorted((theirs - ours).elements())]
        blocks = max(1, -(-max(len(a), len(b)) // most))
        for block in range(blocks):
            x, y = (items[len(items) * block // blocks : len(items) * (block + 1) // blocks] for items in (a, b))
            if x and y:
                total += _best_matching([[self._alike(one, other, depth + 1) for other in y] for one in x])
        return total


def _has_parts(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple)


def _kind(value: Any) -> tuple[type | None, Any]:
    """What a value without parts is equal to: text without its surrounding and repeated space, numbers as numbers."""
    if isinstance(value, str):
        return str, " ".join(value.split())
    if _is_number(value):
        return float, value
    return type(value), value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _best_matching(alike: list[list[float]]) -> float:
    """The largest total similarity of a one-to-one matching (the assignment problem).

    Exact: the Hungarian method with potentials, O(n^2 m) for n rows and m >= n columns.
    """
    if len(alike) > len(alike[0]):
        alike = [list(column) for column in zip(*alike, strict=True)]
    rows, columns = len(alike), len(alike[0])
    if rows == 1:
        return max(alike[0])
    u = [0.0] * (rows + 1)
    v = [0.0] * (columns + 1)
    match = [0] * (columns + 1)
    for row in range(1, rows + 1):
        match[0] = row
        column = 0
        least = [math.inf] * (columns + 1)
        came = [0] * (columns + 1)
        used = [False] * (columns + 1)
        while True:
            used[column] = True
            current = match[column]
            step, following = math.inf, 0
            for j in range(1, columns + 1):
                if used[j]:
                    continue
                cost = -alike[current - 1][j - 1] - u[current] - v[j]
                if cost < least[j]:
                    least[j], came[j] = cost, column
                if least[j] < step:
                    step, following = least[j], j
            for j in range(columns + 1):
                if used[j]:
                    u[match[j]] += step
                    v[j] -= step
                else:
                    least[j] -= step
            column = following
            if match[column] == 0:
                break
        while column:
            match[column] = match[came[column]]
            column = came[column]
    return sum(alike[match[j] - 1][j - 1] for j in range(1, columns + 1) if match[j])


REGISTERED = StructuredMatch
