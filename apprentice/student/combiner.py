"""Which half to believe: one answer, and one calibrated probability that the remote agrees, from both halves.

Field by field the halves' distributions are blended log-linearly: log p = a log p_head + b log p_lora + constant (a
logarithmic opinion pool, Genest and Zidek 1986). The weights hold the temperature, too: a + b below 1 flattens. They
maximise the likelihood of what the remote said on held-out examples. How likely the blend's answer is to agree is then
a logistic regression on what the blend's own probability leaves out: what each half gives to the answer, the margin,
whether the halves agree, and how far the input lies from those that the head knows.

Held-out examples are few, so all is shrunk: the weights towards equal ones, the regression towards "the blend's own
probability is right". With many examples both go where the data are; a half that knows nothing loses its weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from apprentice.errors import EvaluatorError
from apprentice.evaluators import Evaluator
from apprentice.local.engine import AnsweredBy, LocalAnswer
from apprentice.schema import Schema, SchemaError, compact_json

__all__ = ["Combined", "Combiner", "Fit", "HeadAnswer", "fit_combiner"]

type Floats = NDArray[np.float64]

_LEAST = 1e-6
"""No probability is taken for less than this, and none for more than 1 minus this."""
_WEIGHT_PENALTY = 4.0
"""Of a blend's weights: as much as four examples that each carry unit information on a weight."""
_PENALTY = 6.0
"""Of a regression's coefficients, on features scaled to a standard deviation of 1."""
_CONSTANT_PENALTY = 1.0
_FOLDS = 10
_FEWEST = 8
"""Examples to learn anything from."""
_MOST_CHANGED = 0.005
"""Share of the head's sure answers that the adapter may be expected to change."""


class HeadAnswer(Protocol):
    """What a head says of one input."""

    @property
    def probabilities(self) -> Mapping[str, Any]:
        """By field: the calibrated probability of each of its values, an array in the order of the head's values."""

    @property
    def distance(self) -> float:
        """How far the input lies from the known ones."""


@dataclass(frozen=True, slots=True)
class Combined:
    """An answer of the student.

    ``confidence`` is the score to expect of it as a whole, ``field_confidence`` that of each field. ``distributions``
    are by finite field: the JSON text of every allowed value to its probability.
    """

    output: dict[str, Any]
    confidence: float
    field_confidence: Mapping[str, float]
    distributions: Mapping[str, Mapping[str, float]]
    answered_by: AnsweredBy


@dataclass(frozen=True, slots=True)
class Fit:
    """What `fit_combiner` learnt, the head's ``sure`` confidence (None: always ask the adapter), and how it would do.

    ``answers`` are cross-fitted: each is by a combiner that did not see the example. None where neither half answered.
    """

    combiner: Combiner
    sure: float | None
    answers: list[Combined | None]


@dataclass(frozen=True, slots=True)
class _Logistic:
    """P = sigmoid(offset + constant + coefficients . (x - mean) / scale); the offset comes with each x."""

    constant: float
    mean: list[float]
    scale: list[float]
    coefficients: list[float]

    def __call__(self, offset: float, x: Sequence[float]) -> float:
        total = offset + self.constant
        for value, mean, scale, coefficient in zip(x, self.mean, self.scale, self.coefficients, strict=True):
            total += coefficient * (value - mean) / scale
        return 1.0 / (1.0 + math.exp(-min(max(total, -30.0), 30.0)))


@dataclass(frozen=True, slots=True)
class _Mode:
    """What was learnt of the answers of one half, or of both.

    ``weights`` are by finite field, the head's and the adapter's, 0 for a half that is not there. ``right`` gives
    P(agrees) by field, ``whole`` that of the answer; what is missing there is believed as it is.
    """

    weights: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    right: Mapping[str, _Logistic] = field(default_factory=dict)
    whole: _Logistic | None = None


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the halves say of one field of one input: probabilities [values], clipped; None for a missing half."""

    head: Floats | None
    lora: Floats | None
    distance: float

    def blend(self, weights: tuple[float, float]) -> Floats:
        logs = sum(
            weight * np.log(half)
            for weight, half in zip(weights, (self.head, self.lora), strict=True)
            if half is not None
        )
        p = np.exp(logs - np.max(logs))
        return cast(Floats, p / p.sum())

    def features(self, p: Floats, at: int) -> list[float]:
        """What may tell more of answer ``at`` than its probability in the blend ``p`` does."""
        others = np.delete(p, at)
        margin = math.log(p[at] + _LEAST) - math.log(float(others.max(initial=0.0)) + _LEAST)
        features = [margin]
        if self.head is not None:
            features += [_logit(float(self.head[at])), self.distance]
        if self.lora is not None:
            features.append(_logit(float(self.lora[at])))
        if self.head is not None and self.lora is not None:
            features.append(float(self.head.argmax() == self.lora.argmax()))
        return features


class Combiner:
    """Combines the halves' answers. ``fields``: every finite output field with its values, in the head's order.

    With nothing ``learnt``, the halves count alike, and their probabilities are believed. Safe to use from many
    threads.
    """

    def __init__(
        self, schema: Schema, fields: Mapping[str, Sequence[Any]], learnt: Mapping[AnsweredBy, _Mode] | None = None
    ) -> None:
        self._schema = schema
        self._values = {name: tuple(values) for name, values in fields.items()}
        self._texts = {name: tuple(map(compact_json, values)) for name, values in fields.items()}
        self._index = {name: {text: at for at, text in enumerate(texts)} for name, texts in self._texts.items()}
        self._learnt = dict(learnt or {})

    @property
    def is_finite(self) -> bool:
        """Whether every output field is finite, so that a head alone can answer."""
        return bool(self._values) and set(self._schema.fields) == set(self._values)

    def combine(self, head: HeadAnswer | None, lora: LocalAnswer | None) -> Combined:
        """The student's answer, from the halves that answered. Raises `SchemaError` if a head's does not fit."""
        by = _who(head, lora)
        mode = self._learnt.get(by, _Mode())
        seen = self._see(head, lora)
        blends = {name: one.blend(mode.weights.get(name) or _even(by)) for name, one in seen.items()}
        chosen = {name: int(p.argmax()) for name, p in blends.items()}
        output = dict(lora.output) if lora is not None else {}
        try:
            output = self._schema.check(output | {name: self._values[name][at] for name, at in chosen.items()})
        except SchemaError:
            if lora is None:
                raise
            # The values break a rule between fields; what the adapter wrote does not.
            output = dict(lora.output)
            chosen = {name: self._place(name, output, at) for name, at in chosen.items()}
        fields = {} if lora is None else {n: self._believed(mode, n, p) for n, p in lora.field_confidence.items()}
        for name, at in chosen.items():
            p, right = blends[name], mode.right.get(name)
            fields[name] = float(p[at]) if right is None else right(_logit(float(p[at])), seen[name].features(p, at))
        joint = math.prod(fields.values())
        whole = joint if mode.whole is None else mode.whole(_logit(joint), (_logit(joint),))
        distributions = {n: dict(zip(self._texts[n], p.tolist(), strict=True)) for n, p in blends.items()}
        return Combined(output, whole, fields, distributions, by)

    def _believed(self, mode: _Mode, name: str, probability: float) -> float:
        """P(agrees) of a field that is not finite: the adapter's own, corrected."""
        right = None if name in self._values else mode.right.get(name)
        return probability if right is None else right(_logit(probability), (_logit(probability),))

    def _place(self, name: str, output: Mapping[str, Any], otherwise: int) -> int:
        """Which of a field's values an output has. A field left out is null."""
        return self._index[name].get(compact_json(output.get(name)), otherwise)

    def _see(self, head: HeadAnswer | None, lora: LocalAnswer | None) -> dict[str, _Seen]:
        return {
            name: _Seen(
                None if head is None else _clipped(np.asarray(head.probabilities[name], np.float64)),
                None if lora is None else self._of_lora(name, lora),
                0.0 if head is None else float(head.distance),
            )
            for name in self._values
        }

    def _of_lora(self, name: str, answer: LocalAnswer) -> Floats:
        """The adapter's distribution over a field's values: what the engine does not know is spread evenly."""
        texts = self._texts[name]
        told = (answer.distributions or {}).get(name)
        if told is None:
            told = {compact_json(answer.output.get(name)): answer.field_confidence.get(name, 1.0)}
        p = np.array([told.get(text, np.nan) for text in texts], np.float64)
        unknown = np.isnan(p)
        if unknown.any():
            p[unknown] = max(0.0, 1.0 - float(p[~unknown].sum())) / int(unknown.sum())
        return _clipped(p)

    # --- as JSON ------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """What was learnt, for student.json."""
        return {by: asdict(mode) for by, mode in self._learnt.items()}

    @classmethod
    def of_json(cls, schema: Schema, fields: Mapping[str, Sequence[Any]], stored: Mapping[str, Any] | None) -> Combiner:
        """Read `to_json`; None: nothing was learnt. Raises ValueError where it is something else."""
        learnt: dict[AnsweredBy, _Mode] = {}
        try:
            for by, mode in (stored or {}).items():
                if by not in ("head", "lora", "both"):
                    raise ValueError(f"there are no answers by {by!r}")
                weights = {str(n): (float(a), float(b)) for n, (a, b) in mode["weights"].items()}
                right = {str(n): _read_logistic(one) for n, one in mode["right"].items()}
                whole = None if mode["whole"] is None else _read_logistic(mode["whole"])
                if any(len(one.mean) != (_features(by) if n in fields else 1) for n, one in right.items()):
                    raise ValueError(f"the answers by {by} have other features")
                learnt[cast(AnsweredBy, by)] = _Mode(weights, right, whole)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        return cls(schema, fields, learnt)


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

    ``outputs`` are the remote's. ``evaluator`` says how right an answer is, the task's own; None: right or wrong.
    """
    rows = [_Row(h, a, dict(o)) for h, a, o in zip(heads, loras, outputs, strict=True)]
    plain = Combiner(schema, fields)
    fold = (np.random.default_rng(seed).permutation(len(rows)) % _FOLDS).tolist()
    alone: list[Combined | None] = [None] * len(rows)
    best: list[Combined | None] = [None] * len(rows)
    for held in range(_FOLDS):
        learnt = _fit([row for row, f in zip(rows, fold, strict=True) if f != held], plain, evaluator)
        for at, row in enumerate(rows):
            if fold[at] == held:
                best[at] = _try(learnt, row.head, row.lora)
                alone[at] = _try(learnt, row.head, None)
    pairs = list(zip(alone, best, strict=True))
    sures = [_sure_from([pair for pair, f in zip(pairs, fold, strict=True) if f != g]) for g in range(_FOLDS)]
    answers = []
    for (one, both), f in zip(pairs, fold, strict=True):
        sure = sures[f]
        answers.append(one if one is not None and sure is not None and one.confidence >= sure else both)
    return Fit(_fit(rows, plain, evaluator), _sure_from(pairs), answers)


@dataclass(frozen=True, slots=True)
class _Row:
    head: HeadAnswer | None
    lora: LocalAnswer | None
    output: dict[str, Any]

    def halves(self, by: AnsweredBy) -> tuple[HeadAnswer | None, LocalAnswer | None] | None:
        """The halves that ``by`` needs, None if one is missing."""
        head = None if by == "lora" else self.head
        lora = None if by == "head" else self.lora
        missing = (by != "lora" and head is None) or (by != "head" and lora is None)
        return None if missing else (head, lora)


def _try(combiner: Combiner, head: HeadAnswer | None, lora: LocalAnswer | None) -> Combined | None:
    if lora is None and (head is None or not combiner.is_finite):
        return None
    try:
        return combiner.combine(head, lora)
    except SchemaError:
        return None


def _sure_from(pairs: Sequence[tuple[Combined | None, Combined | None]]) -> float | None:
    """The least confidence from which on the head's answers would be changed in at most `_MOST_CHANGED`.

    ``pairs`` are answers by the head alone and by both. The share is estimated as (k + 1/2) / (n + 1) (Krichevsky and
    Trofimov 1981), so that it takes a hundred unchanged answers to be sure.
    """
    by_confidence = sorted(
        ((a.confidence, a.output != b.output) for a, b in pairs if a and b and b.answered_by == "both"), reverse=True
    )
    sure, changed = None, 0
    for n, (confidence, differs) in enumerate(by_confidence, 1):
        changed += differs
        tied = n < len(by_confidence) and by_confidence[n][0] == confidence
        if not tied and changed + 0.5 <= _MOST_CHANGED * (n + 1):
            sure = confidence
    return sure


def _fit(rows: Sequence[_Row], plain: Combiner, evaluator: Evaluator | None) -> Combiner:
    learnt: dict[AnsweredBy, _Mode] = {}
    for by in cast(tuple[AnsweredBy, ...], ("head", "lora", "both")):
        there = [(halves, row.output) for row in rows if (halves := row.halves(by)) is not None]
        if len(there) >= _FEWEST and (by != "head" or plain.is_finite):
            learnt[by] = _fit_mode(by, there, plain, evaluator)
    return Combiner(plain._schema, plain._values, learnt)


def _fit_mode(
    by: AnsweredBy,
    rows: Sequence[tuple[tuple[HeadAnswer | None, LocalAnswer | None], Mapping[str, Any]]],
    plain: Combiner,
    evaluator: Evaluator | None,
) -> _Mode:
    weights = {}
    seen = [plain._see(*halves) for halves, _ in rows]
    for name in plain._values:
        said = [plain._place(name, output, -1) for _, output in rows]
        weights[name] = _fit_weights([one[name] for one in seen], said, _even(by))
    combiner = Combiner(plain._schema, plain._values, {by: _Mode(weights)})
    scored = []
    for (halves, output), one in zip(rows, seen, strict=True):
        answer = _try(combiner, *halves)
        scores = None if answer is None else _scores(answer.output, output, evaluator)
        if answer is not None and scores is not None:
            scored.append((halves, one, answer, *scores))
    if not scored:
        return _Mode(weights)
    right = {}
    for name in {name: None for _, _, answer, _, _ in scored for name in answer.field_confidence}:
        x, offsets, targets = [], [], []
        for _, one, answer, _, parts in scored:
            if name not in answer.field_confidence:
                continue
            offset = _logit(answer.field_confidence[name])
            if name in plain._values:
                p = one[name].blend(weights[name])
                x.append(one[name].features(p, plain._place(name, answer.output, int(p.argmax()))))
            else:
                x.append([offset])
            offsets.append(offset)
            targets.append(parts.get(name, 1.0))  # left out of both answers
        right[name] = _fit_logistic(np.array(x), np.array(offsets), np.array(targets))
    if len(right) == 1 and evaluator is None:
        return _Mode(weights, right)
    combiner = Combiner(plain._schema, plain._values, {by: _Mode(weights, right)})
    joint = np.array([_logit(combiner.combine(*halves).confidence) for halves, *_ in scored])
    whole = np.array([score for *_, score, _ in scored])
    return _Mode(weights, right, _fit_logistic(joint[:, None], joint, whole))


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


def _fit_weights(seen: Sequence[_Seen], said: Sequence[int], prior: tuple[float, float]) -> tuple[float, float]:
    """The blend's weights, at least 0, by penalised maximum likelihood. ``said``: which value, -1 for none of them."""
    known = [(one, at) for one, at in zip(seen, said, strict=True) if at >= 0]
    if not known:
        return prior
    there = [half for half, p in enumerate((known[0][0].head, known[0][0].lora)) if p is not None]
    z = np.log(np.array([[(one.head, one.lora)[half] for half in there] for one, _ in known], np.float64))
    y = np.array([at for _, at in known])
    start = np.array([prior[half] for half in there])
    weights = _newton_weights(z, y, start)
    while (weights < 0).any():
        kept = weights > 0
        weights = np.zeros(len(there))
        if kept.any():
            weights[kept] = _newton_weights(z[:, kept], y, start[kept])
    found = dict(zip(there, weights.tolist(), strict=True))
    return found.get(0, 0.0), found.get(1, 0.0)


def _newton_weights(z: Floats, y: NDArray[np.int64], prior: Floats) -> Floats:
    """Maximise sum_i log softmax(w . z_i)[y_i] - penalty / 2 |w - prior|^2. z: [examples, halves, values].

    It is concave: Newton's steps, halved where they go too far.
    """
    w = prior.copy()
    rows = np.arange(len(y))
    picked = z[rows, :, y]

    def objective(w: Floats) -> tuple[float, Floats]:
        logits = np.einsum("h,nhv->nv", w, z)
        logits -= logits.max(axis=1, keepdims=True)
        norm = np.log(np.exp(logits).sum(axis=1))
        penalty = _WEIGHT_PENALTY / 2 * ((w - prior) ** 2).sum()
        return float((logits[rows, y] - norm).sum() - penalty), np.exp(logits - norm[:, None])

    value, p = objective(w)
    for _ in range(50):
        mean = np.einsum("nhv,nv->nh", z, p)
        gradient = (picked - mean).sum(axis=0) - _WEIGHT_PENALTY * (w - prior)
        second = np.einsum("nhv,nkv->hk", z * p[:, None], z)
        step = np.linalg.solve(second - mean.T @ mean + _WEIGHT_PENALTY * np.eye(len(w)), gradient)
        size = 1.0
        better, q = objective(w + step)
        while better < value and size > 1e-4:
            size /= 2
            better, q = objective(w + size * step)
        if better <= value + 1e-6:
            break
        w, value, p = w + size * step, better, q
    return w


def _fit_logistic(x: Floats, offset: Floats, target: Floats) -> _Logistic:
    """Penalised logistic regression with an offset; targets may lie between 0 and 1. x: [examples, features]."""
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    z = np.column_stack([np.ones(len(x)), (x - mean) / scale])
    penalty = np.array([_CONSTANT_PENALTY, *[_PENALTY] * x.shape[1]])
    b = np.zeros(z.shape[1])
    for _ in range(50):
        p = 1.0 / (1.0 + np.exp(-np.clip(offset + z @ b, -30.0, 30.0)))
        gradient = z.T @ (target - p) - penalty * b
        # At least a little curvature: a step from where all is certain would fly off.
        curvature = np.maximum(p * (1.0 - p), 0.01)
        step = np.linalg.solve((z.T * curvature) @ z + np.diag(penalty), gradient)
        b += step
        if np.abs(step).max() < 1e-6:
            break
    return _Logistic(float(b[0]), mean.tolist(), scale.tolist(), b[1:].tolist())


def _read_logistic(stored: Mapping[str, Any]) -> _Logistic:
    mean, scale, coefficients = ([float(v) for v in stored[name]] for name in ("mean", "scale", "coefficients"))
    if not len(mean) == len(scale) == len(coefficients) or min(scale, default=1.0) <= 0.0:
        raise ValueError("a regression's numbers do not belong together")
    return _Logistic(float(stored["constant"]), mean, scale, coefficients)


def _features(by: str) -> int:
    """How many features `_Seen.features` gives."""
    return {"head": 3, "lora": 2, "both": 5}[by]


def _who(head: HeadAnswer | None, lora: LocalAnswer | None) -> AnsweredBy:
    if head is None and lora is None:
        raise ValueError("neither half answered")
    return "lora" if head is None else "head" if lora is None else "both"


def _even(by: AnsweredBy) -> tuple[float, float]:
    return {"head": (1.0, 0.0), "lora": (0.0, 1.0), "both": (0.5, 0.5)}[by]


def _clipped(p: Floats) -> Floats:
    return np.clip(p, _LEAST, 1.0 - _LEAST)


def _logit(p: float) -> float:
    p = min(max(p, _LEAST), 1.0 - _LEAST)
    return math.log(p / (1.0 - p))
