"""Learning how to combine the halves, from examples that neither was fitted on.

A blend's weights maximise the likelihood of what the remote said; the regressions fit how right the blend's answers
were. Held-out examples are few, so all is shrunk: the weights towards equal ones, the regressions towards "the blend's
own probability is right". With many examples both go where the data are; a half that knows nothing loses its weight.

Everything is fitted eleven times, on all examples and on each nine tenths of them, for the cross-fitted answers. So
each example is looked at once, a fit takes its rows of those arrays, and each distinct answer is checked and scored
once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from apprentice.errors import EvaluatorError
from apprentice.evaluators import Evaluator
from apprentice.local.engine import AnsweredBy, LocalAnswer
from apprentice.schemas.schema import Schema, SchemaError, compact_json
from apprentice.student.combiner import Combined, Combiner, HeadAnswer
from apprentice.student.pooling import Floats, Logistic, Mode, Numbers, Seen, logit, pick
from apprentice.student.shrinkage import Booleans, Integers, fit_logistic, fit_weights

__all__ = ["Fit", "fit_combiner"]

_FOLDS = 10
_FEWEST = 8
"""Examples to learn anything from."""
_MOST_CHANGED = 0.005
"""Share of the head's sure answers that the adapter may be expected to change."""
_NONE = -1
"""Instead of an output's number: there is none, since the head's values break a rule between fields."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What `fit_combiner` learnt, and how it would do.

    ``answers`` are cross-fitted: each is by a combiner that did not see the example. None where neither half answered.
    """

    combiner: Combiner
    answers: list[Combined | None]

    @property
    def sure(self) -> float | None:
        """The confidence from which on the head answers without the adapter; None: it always asks."""
        return self.combiner.sure


def fit_combiner(
    schema: Schema,
    fields: Mapping[str, Sequence[Any]],
    heads: Sequence[HeadAnswer | None],
    loras: Sequence[LocalAnswer | None],
    outputs: Sequence[Mapping[str, Any]],
    *,
    evaluator: Evaluator | None = None,
    seed: int = 0,
) -> Fit:
    """Learn from examples that neither half was fitted on. Rows of equal length, None where a half did not answer.

    ``outputs`` are the remote's. ``evaluator`` says how right an answer is, the task's own; None: right or wrong. It
    is asked once for each distinct pair of answers.
    """
    if not len(heads) == len(loras) == len(outputs):
        raise ValueError(
            f"there are {len(heads)} answers of a head, {len(loras)} of an adapter and {len(outputs)} of the remote; "
            "give one of each for every example, None where a half did not answer"
        )
    plain, fold = Combiner(schema, fields), np.random.default_rng(seed).permutation(len(outputs)) % _FOLDS
    known = _Outputs(plain, evaluator)
    views = _views(plain, known, heads, loras, outputs)
    learnt: dict[AnsweredBy, Mode] = {}
    crossed: dict[AnsweredBy, _Answers] = {}
    for by, view in views.items():
        folds = fold[view.rows]
        mode, answers = _fit(view, known, np.ones(len(folds), bool))
        if mode is not None:
            learnt[by] = mode
        for held in range(_FOLDS):
            own = view.asked & (folds == held)
            if own.any():
                answers = answers.replaced(own, _fit(view, known, folds != held)[1])
        crossed[by] = answers
    sure, answered_by = _who_answers(views, crossed, known, fold)
    combined: list[Combined | None] = [None] * len(outputs)
    for by, view in views.items():
        for at, row in enumerate(view.rows.tolist()):
            if answered_by[row] == by and crossed[by].outputs[at] != _NONE:
                combined[row] = crossed[by].combined(at, by, plain, known)
    return Fit(Combiner(schema, fields, learnt, sure), combined)


# --- the examples, looked at once -----------------------------------------------------------------------------------


class _Outputs:
    """Distinct outputs by number. Each is checked once, and each pair of two scored once."""

    def __init__(self, plain: Combiner, evaluator: Evaluator | None) -> None:
        self._plain = plain
        self._evaluator = evaluator
        self._outputs: list[dict[str, Any]] = []
        self._numbers: dict[str, int] = {}
        self._settled: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._scored: dict[tuple[int, int], tuple[float, Mapping[str, float]]] = {}

    @property
    def all_count(self) -> bool:
        """Whether an answer is right if all its fields are."""
        return self._evaluator is None

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self._outputs[number]

    def number(self, output: Mapping[str, Any]) -> int:
        """Its number, given to it now if it is new."""
        number = self._numbers.setdefault(compact_json(output), len(self._outputs))
        if number == len(self._outputs):
            self._outputs.append(dict(output))
        return number

    def settle(self, own: Sequence[int], chosen: Mapping[str, Integers]) -> tuple[Integers, dict[str, Integers]]:
        """`Combiner.settle` of many rows. ``own``: the numbers of the adapter's outputs, _NONE where it has none."""
        settled = []
        for key in zip(own, *(at.tolist() for at in chosen.values()), strict=True):
            if key not in self._settled:
                self._settled[key] = self._settle(key[0], dict(zip(chosen, key[1:], strict=True)))
            settled.append(self._settled[key])
        columns = np.array(settled, np.int64).reshape(len(settled), 1 + len(chosen)).T
        return columns[0], dict(zip(chosen, columns[1:], strict=True))

    def _settle(self, own: int, chosen: Mapping[str, int]) -> tuple[int, ...]:
        try:
            output, chosen = self._plain.settle(chosen, None if own == _NONE else self[own])
        except SchemaError:
            return _NONE, *chosen.values()
        return self.number(output), *chosen.values()

    def scores(self, ours: Integers, theirs: Integers, names: Iterable[str]) -> tuple[Floats, dict[str, Floats]]:
        """How right answers are as a whole, NaN where the evaluator cannot say, and by field; [rows] each."""
        size = len(self._outputs)
        pairs, places = np.unique(ours * size + theirs, return_inverse=True)
        scored = [self._score(pair // size, pair % size) for pair in pairs.tolist()]
        # A field that both answers leave out is right.
        by_field = {name: np.array([parts.get(name, 1.0) for _, parts in scored]) for name in names}
        return np.array([whole for whole, _ in scored])[places], {n: each[places] for n, each in by_field.items()}

    def _score(self, ours: int, theirs: int) -> tuple[float, Mapping[str, float]]:
        key = ours, theirs
        if key not in self._scored:
            self._scored[key] = _scores(self[ours], self[theirs], self._evaluator) or (math.nan, {})
        return self._scored[key]


@dataclass(frozen=True, slots=True)
class _View:
    """What the halves of one mode say of the ``rows`` in which all of them answered.

    ``asked``: whose cross-fitted answers somebody needs. ``own`` and ``theirs`` are the numbers of the adapter's and
    the remote's outputs, ``said`` by field the place of the remote's value, -1 for none. ``open`` is the adapter's
    confidence in the fields that are not finite, NaN where it leaves one out.
    """

    rows: Integers
    asked: Booleans
    seen: Mapping[str, Seen]
    open: Mapping[str, Floats]
    own: list[int]
    theirs: Integers
    said: Mapping[str, Integers]


def _views(
    plain: Combiner,
    known: _Outputs,
    heads: Sequence[HeadAnswer | None],
    loras: Sequence[LocalAnswer | None],
    outputs: Sequence[Mapping[str, Any]],
) -> dict[AnsweredBy, _View]:
    has_head = np.array([one is not None for one in heads], bool)
    has_lora = np.array([one is not None for one in loras], bool)
    head, lora = {}, {}
    for name, values in plain.values.items():
        head[name] = _stacked([None if one is None else one.probabilities[name] for one in heads], len(values))
        lora[name] = _stacked([None if one is None else plain.told(name, one) for one in loras], len(values))
    distance = np.array([np.nan if one is None else one.distance for one in heads], np.float64)
    said = {name: np.array([plain.place(name, one, -1) for one in outputs], np.int64) for name in plain.values}
    own = np.array([_NONE if one is None else known.number(one.output) for one in loras], np.int64)
    theirs = np.array([known.number(one) for one in outputs], np.int64)
    confidences = [plain.open_fields(one) for one in loras]
    names = sorted({name for one in confidences for name in one})
    open_ = {name: np.array([one.get(name, np.nan) for one in confidences]) for name in names}

    def view(by: AnsweredBy, there: Booleans, asked: Booleans) -> _View:
        rows = np.flatnonzero(there)
        return _View(
            rows,
            asked[rows],
            {
                name: Seen.of(
                    None if by == "lora" else head[name][rows],
                    None if by == "head" else lora[name][rows],
                    distance[rows],
                )
                for name in plain.values
            },
            {} if by == "head" else {name: p[rows] for name, p in open_.items()},
            [_NONE] * len(rows) if by == "head" else own[rows].tolist(),
            theirs[rows],
            {name: at[rows] for name, at in said.items()},
        )

    return {
        "head": view("head", has_head & plain.is_finite, has_head),
        "lora": view("lora", has_lora, ~has_head),
        "both": view("both", has_head & has_lora, has_head),
    }


def _stacked(distributions: Sequence[Any], values: int) -> Floats:
    """[rows, values]; NaN where there is none."""
    nothing = np.full(values, np.nan)
    rows = [nothing if one is None else one for one in distributions]
    return np.array(rows, np.float64).reshape(len(rows), values)


# --- fits and answers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Answers:
    """The answers to a view's rows: the numbers of the ``outputs``, and the other columns of `Combined`."""

    outputs: Integers
    whole: Floats
    fields: Mapping[str, Floats]
    blends: Mapping[str, Floats]

    def replaced(self, own: Booleans, other: _Answers) -> _Answers:
        """With another's answers to the rows ``own``."""

        def replaced(column: NDArray[Any], others: NDArray[Any]) -> NDArray[Any]:
            column = column.copy()
            column[own] = others[own]
            return column

        return _Answers(
            replaced(self.outputs, other.outputs),
            replaced(self.whole, other.whole),
            {name: replaced(p, other.fields[name]) for name, p in self.fields.items()},
            {name: replaced(p, other.blends[name]) for name, p in self.blends.items()},
        )

    def combined(self, at: int, by: AnsweredBy, plain: Combiner, known: _Outputs) -> Combined:
        """One of them, as `Combiner.combine` gives it."""
        return Combined(
            dict(known[int(self.outputs[at])]),
            float(self.whole[at]),
            {name: float(p[at]) for name, p in self.fields.items() if not math.isnan(p[at])},
            plain.distributions({name: p[at] for name, p in self.blends.items()}),
            by,
        )


@dataclass(frozen=True, slots=True)
class _Blended:
    """A view's rows under certain weights: the numbers of the ``outputs``, and what there is to judge them by.

    ``said`` is by field how probable the chosen value is said to be, ``features`` what a regression sees beside it.
    """

    outputs: Integers
    blends: Mapping[str, Floats]
    said: Mapping[str, Floats]
    features: Mapping[str, Sequence[Numbers]]

    @classmethod
    def of(cls, view: _View, known: _Outputs, weights: Mapping[str, tuple[float, float]]) -> _Blended:
        blends = {name: seen.blend(weights.get(name)) for name, seen in view.seen.items()}
        outputs, chosen = known.settle(view.own, {name: p.argmax(axis=-1) for name, p in blends.items()})
        said = {name: np.asarray(pick(p, chosen[name])) for name, p in blends.items()}
        features = {name: view.seen[name].features(p, chosen[name]) for name, p in blends.items()}
        return cls(outputs, blends, said | dict(view.open), features | {n: [logit(p)] for n, p in view.open.items()})

    def answers(self, mode: Mode) -> _Answers:
        fields = {name: np.asarray(mode.of_field(name, p, self.features[name])) for name, p in self.said.items()}
        # A field that is left out takes nothing away.
        factors = [np.where(np.isnan(p), 1.0, p) for p in fields.values()]
        joint = math.prod(factors, start=np.ones(len(self.outputs)))
        return _Answers(self.outputs, np.asarray(mode.of_whole(joint)), fields, self.blends)


def _fit(view: _View, known: _Outputs, learn: Booleans) -> tuple[Mode | None, _Answers]:
    """What is learnt from the rows ``learn`` (None: they are too few), and the answers to all rows by it."""
    if int(learn.sum()) < _FEWEST:
        return None, _Blended.of(view, known, {}).answers(Mode())
    weights = {name: fit_weights(seen, view.said[name], learn) for name, seen in view.seen.items()}
    blended = _Blended.of(view, known, weights)
    right, whole = _fit_right(view, known, blended, learn)
    mode = Mode(weights, right, whole)
    return mode, blended.answers(mode)


def _fit_right(
    view: _View, known: _Outputs, blended: _Blended, learn: Booleans
) -> tuple[Mapping[str, Logistic], Logistic | None]:
    """The regressions of the fields, and that of the whole answer. What cannot be scored teaches nothing."""
    rows = np.flatnonzero(learn & (blended.outputs != _NONE))
    whole, parts = known.scores(blended.outputs[rows], view.theirs[rows], blended.said)
    scored = ~np.isnan(whole)
    if not scored.any():
        return {}, None
    right = {}
    for name, p in blended.said.items():
        kept = scored & ~np.isnan(p[rows])
        if kept.any():
            at = rows[kept]
            x = np.column_stack([np.asarray(feature)[at] for feature in blended.features[name]])
            right[name] = fit_logistic(x, np.asarray(logit(p[at])), parts[name][kept])
    if len(right) == 1 and known.all_count:
        return right, None
    joint = np.asarray(logit(blended.answers(Mode(right=right)).whole[rows[scored]]))
    return right, fit_logistic(joint[:, None], joint, whole[scored])


def _who_answers(
    views: Mapping[AnsweredBy, _View], crossed: Mapping[AnsweredBy, _Answers], known: _Outputs, fold: Integers
) -> tuple[float | None, list[AnsweredBy]]:
    """From which confidence on the head is sure, and who answers each row: the head alone where it is sure.

    From when on it is sure of a row is learnt from the other folds.
    """
    by: list[AnsweredBy] = ["head"] * len(fold)
    for halves in cast(tuple[AnsweredBy, ...], ("lora", "both")):
        for row in views[halves].rows.tolist():
            by[row] = halves
    head, both = views["head"].rows, views["both"].rows
    confidence, outputs = np.full(len(fold), -np.inf), np.full(len(fold), _NONE)
    confidence[head], outputs[head] = crossed["head"].whole, crossed["head"].outputs
    confidence[outputs == _NONE] = -np.inf
    pairs = zip(outputs[both].tolist(), crossed["both"].outputs.tolist(), strict=True)
    changed = np.array([known[alone] != known[together] for alone, together in pairs if alone != _NONE], bool)
    compared = both[outputs[both] != _NONE]
    sures = []
    for held in range(_FOLDS):
        learn = fold[compared] != held
        sures.append(_sure_from(confidence[compared][learn], changed[learn]))
    for row in head.tolist():
        sure = sures[fold[row]]
        if sure is not None and confidence[row] >= sure:
            by[row] = "head"
    return _sure_from(confidence[compared], changed), by


def _sure_from(confidence: Floats, changed: Booleans) -> float | None:
    """The least confidence from which on the head's answers would be changed in at most `_MOST_CHANGED`.

    [rows] each: the head's confidence, and whether the answer by both differs. The share is estimated as (k + 1/2) /
    (n + 1) (Krichevsky and Trofimov 1981), so that it takes a hundred unchanged answers to be sure.
    """
    order = np.argsort(-confidence, kind="stable")
    confidence, changes = confidence[order], np.cumsum(changed[order])
    n = np.arange(1, len(order) + 1)
    ties = np.append(confidence[1:] == confidence[:-1], False)[: len(order)]
    sure = np.flatnonzero(~ties & (changes + 0.5 <= _MOST_CHANGED * (n + 1)))
    return float(confidence[sure[-1]]) if len(sure) else None


def _scores(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], evaluator: Evaluator | None
) -> tuple[float, Mapping[str, float]] | None:
    """How right an answer is as a whole, and by top-level field. None if the evaluator cannot say."""
    equal = {name: float(ours.get(name) == theirs.get(name)) for name in ours.keys() | theirs.keys()}
    if evaluator is None:
        return float(all(equal.values())), equal
    try:
        score, parts = evaluator(ours, theirs)
    except EvaluatorError:
        return None
    by_field: dict[str, list[float]] = {}
    for path, part in parts.items():
        by_field.setdefault(path.split(".")[0], []).append(part)
    return score, equal | {name: sum(each) / len(each) for name, each in by_field.items()}
