"""Comparing two answers to one request: a score in [0, 1] and what it is made of.

An evaluator is called with the local and the remote answer. Those that look at only a part of an answer also have
``project``, which keeps that part, short: what the trust state remembers of an answer. For any a and b,
``evaluate(project(a), project(b)) == evaluate(a, b)``.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

from apprentice.errors import ConfigError, EvaluatorError, MissingExtra

__all__ = [
    "EVALUATORS",
    "CustomEvaluator",
    "Evaluation",
    "Evaluator",
    "ExactMatch",
    "SemanticSimilarity",
    "StructuredMatch",
    "build_evaluator",
]

type Answer = Mapping[str, Any]

EVALUATORS = ("exact_match", "structured_match", "semantic_similarity", "custom")
_LONG = 200
# Sentence encoders read some 256 tokens; what comes after these characters they would not see anyway.
_READ = 2000
_EMBEDDINGS = 1024
# Objects in two lists are matched as well as can be up to this many a side: for the lists of an answer's own fields,
# for lists inside the items of those, and for lists further in. More of them are matched block by block.
_EXACT = (64, 16, 4)
_MISSING: Any = object()


class Evaluation(NamedTuple):
    """A score in [0, 1] and the scores of its parts, by field."""

    score: float
    parts: Mapping[str, float]


@runtime_checkable
class Evaluator(Protocol):
    """Scores a local answer against the remote's. Raises EvaluatorError where it cannot."""

    def __call__(self, local: Answer, remote: Answer) -> Evaluation: ...


def build_evaluator(
    name: str,
    *,
    match_fields: Sequence[str] = (),
    field_weights: Mapping[str, float] | None = None,
    numeric_tolerance: float = 0.0,
    ordered: bool = False,
    model: str = "sentence-transformers/all-MiniLM-L6-v2",
    function: str | Callable[..., Any] | None = None,
) -> Evaluator:
    """The evaluator called ``name`` (one of EVALUATORS).

    Raises EvaluatorError for an unknown name or a custom function that cannot be used, MissingExtra where
    semantic_similarity lacks its library.
    """
    if name == "exact_match":
        return ExactMatch()
    if name == "structured_match":
        return StructuredMatch(match_fields, field_weights or {}, numeric_tolerance=numeric_tolerance, ordered=ordered)
    if name == "semantic_similarity":
        return SemanticSimilarity(model, match_fields)
    if name == "custom":
        if function is None:
            raise EvaluatorError("evaluator 'custom' needs a function: set evaluator_function to module:function")
        return CustomEvaluator(function)
    raise EvaluatorError(f"there is no evaluator {name!r}; use one of {', '.join(EVALUATORS)}")


class ExactMatch:
    """1 where both answers are equal as JSON values, else 0: key order is free, 1 equals 1.0, "a" is not "A".

    A field that is null and one that is left out are the same: which of the two is written depends on the vendor.
    """

    def __call__(self, local: Answer, remote: Answer) -> Evaluation:
        return Evaluation(1.0 if _same(_without_nulls(local), _without_nulls(remote)) else 0.0, {})

    def project(self, answer: Answer) -> Answer:
        """The answer, or its hash where it is long."""
        text = _canonical(_without_nulls(answer))
        return answer if len(text) <= _LONG else {"#": _digest(text)}


class StructuredMatch:
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
            score = self._alike(_at(local, path), _at(remote, path))
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
            return {name: _shorten(value) for name, value in answer.items()}
        kept: dict[str, Any] = {}
        for _, path in self._paths:
            value = _at(answer, path)
            if value is _MISSING:
                continue
            place = kept
            for key in path[:-1]:
                place = place.setdefault(key, {})
            place[path[-1]] = _shorten(value)
        return kept

    def _alike(self, a: Any, b: Any, depth: int = 0) -> float:
        a = None if a is _MISSING else a
        b = None if b is _MISSING else b
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
        return 1.0 if _same(a, b) else 0.0

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
            ours, theirs = Counter(map(_canonical, a)), Counter(map(_canonical, b))
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


class SemanticSimilarity:
    """The cosine of two sentence embeddings, negative ones counting 0; parts are the cosines of the single fields.

    With ``match_fields`` the score is the mean over these fields, else the whole answer is compared as text. The model
    (a hub name or a folder, for sentence-transformers) loads on the first call. Raises MissingExtra at once where the
    library is not there: found at the first comparison, it would cost the task every comparison.
    """

    def __init__(self, model: str, match_fields: Sequence[str] = ()) -> None:
        if not _is_installed("sentence_transformers"):
            raise MissingExtra("evaluator semantic_similarity", "semantic")
        self.model = model
        self.fields = tuple(match_fields)
        self._embed = lru_cache(_EMBEDDINGS)(self._encode)

    def __call__(self, local: Answer, remote: Answer) -> Evaluation:
        if not self.fields:
            return Evaluation(self._cosine(_text(local), _text(remote)), {})
        parts = {}
        for name in self.fields:
            path = tuple(name.split("."))
            parts[name] = self._cosine(_text(_at(local, path)), _text(_at(remote, path)))
        return Evaluation(sum(parts.values()) / len(parts), parts)

    def project(self, answer: Answer) -> Answer:
        """The answer, its texts as far as the model reads them."""
        kept: Answer = _clip(answer)
        return kept

    def _cosine(self, a: str, b: str) -> float:
        a, b = a[:_READ], b[:_READ]
        if a == b:
            return 1.0
        va, vb = self._embed(a), self._embed(b)
        return min(1.0, max(0.0, float(va @ vb)))

    def _encode(self, text: str) -> Any:
        # Here and not above: only this evaluator, at its first comparison, needs it.
        from apprentice.student.encoder import load_encoder

        try:
            return load_encoder(self.model).encode([text])[0]
        except MissingExtra as error:
            raise MissingExtra("evaluator semantic_similarity", "semantic") from error
        except ConfigError as error:
            raise EvaluatorError(
                f"evaluator semantic_similarity cannot load {self.model!r}: {error}. Set evaluator_model to a "
                "folder or a hub name that sentence-transformers can load."
            ) from error


class CustomEvaluator:
    """A function of the user's: (local, remote) -> number in [0, 1], or (number, parts), or Evaluation.

    Whatever goes wrong inside becomes an EvaluatorError that names the function; the comparison is then kept unscored.
    """

    def __init__(self, function: str | Callable[..., Any]) -> None:
        self.name = function if isinstance(function, str) else getattr(function, "__qualname__", repr(function))
        self.function = _imported(function) if isinstance(function, str) else function
        self._check()

    def __call__(self, local: Answer, remote: Answer) -> Evaluation:
        try:
            # copies: a function that tidies them up before it compares must not change what is answered and recorded
            returned = self.function(copy.deepcopy(local), copy.deepcopy(remote))
        except Exception as error:
            raise EvaluatorError(f"evaluator {self.name} raised {type(error).__name__}: {error}") from error
        parts: Any = {}
        score = returned
        if isinstance(returned, tuple) and len(returned) == 2:
            score, parts = returned
        if not isinstance(parts, Mapping):
            raise EvaluatorError(f"evaluator {self.name} returned parts {parts!r}; they must map field to score")
        for what, value in (("score", score), *((f"part {name!r}", part) for name, part in parts.items())):
            if isinstance(value, bool | int | float) and 0.0 <= float(value) <= 1.0:
                continue
            raise EvaluatorError(f"evaluator {self.name} returned {what} {value!r}; it must be a number in [0, 1]")
        return Evaluation(float(score), {str(name): float(part) for name, part in parts.items()})

    def _check(self) -> None:
        if not callable(self.function):
            raise EvaluatorError(f"evaluator {self.name} is a {type(self.function).__name__}, not a function")
        if inspect.iscoroutinefunction(self.function):
            raise EvaluatorError(f"evaluator {self.name} is async; it must be a plain function (local, remote)")
        try:
            signature = inspect.signature(self.function)
        except ValueError:
            return
        try:
            signature.bind({}, {})
        except TypeError as error:
            raise EvaluatorError(
                f"evaluator {self.name}{signature} cannot be called as (local, remote): {error}"
            ) from error


def _imported(path: str) -> Any:
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise EvaluatorError(f"evaluator_function is {path!r}; it must read module:function")
    try:
        found: Any = importlib.import_module(module)
        for name in attribute.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise EvaluatorError(f"evaluator_function {path!r} cannot be imported: {error}") from error
    return found


def _at(answer: Any, path: Sequence[str]) -> Any:
    for key in path:
        if isinstance(answer, Mapping) and key in answer:
            answer = answer[key]
        elif isinstance(answer, list | tuple) and key.isdecimal() and int(key) < len(answer):
            answer = answer[int(key)]
        else:
            return _MISSING
    return answer


def _is_installed(module: str) -> bool:
    """Without importing it, which may take seconds."""
    if module in sys.modules:
        return sys.modules[module] is not None
    return importlib.util.find_spec(module) is not None


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


def _same(a: Any, b: Any) -> bool:
    """Equality as JSON values: True is not 1, and a tuple is a list."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _without_nulls(value: Any) -> Any:
    """The value without the fields that are null, at every depth."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(inner) for inner in value]
    return value


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _shorten(value: Any) -> Any:
    if isinstance(value, str) and len(value) > _LONG:
        return "#" + _digest(" ".join(value.split()))
    if isinstance(value, Mapping):
        return {key: _shorten(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_shorten(inner) for inner in value]
    return value


def _clip(value: Any) -> Any:
    if isinstance(value, str):
        return value[:_READ]
    if isinstance(value, Mapping):
        return {key: _clip(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_clip(inner) for inner in value]
    return value


def _text(value: Any) -> str:
    if value is _MISSING or value is None:
        return ""
    return value if isinstance(value, str) else _canonical(value)


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
