"""Which half to believe: one answer, and one calibrated probability that the remote agrees, from both halves.

`apprentice.student.pooling` has the formulas, `apprentice.student.combining` learns their numbers from examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

import numpy as np

from apprentice.local.engine import AnsweredBy, LocalAnswer
from apprentice.schemas.schema import Schema, SchemaError, compact_json
from apprentice.student.pooling import FEATURES, Floats, Logistic, Mode, Seen, logit, pick

__all__ = ["Combined", "Combiner", "HeadAnswer"]

_UNTAUGHT = Mode()


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


class Combiner:
    """Combines the halves' answers. ``fields``: every finite output field with its values, in the head's order.

    With nothing ``learnt``, the halves count alike, and their probabilities are believed. ``sure`` is the confidence
    from which on the head's answer stands without the adapter's; None: the adapter is always asked. Safe to use from
    many threads.
    """

    def __init__(
        self,
        schema: Schema,
        fields: Mapping[str, Sequence[Any]],
        learnt: Mapping[AnsweredBy, Mode] | None = None,
        sure: float | None = None,
    ) -> None:
        self.schema = schema
        self.values = {name: tuple(values) for name, values in fields.items()}
        self.texts = {name: tuple(map(compact_json, values)) for name, values in fields.items()}
        self.sure = sure
        self._index = {name: {text: at for at, text in enumerate(texts)} for name, texts in self.texts.items()}
        self._learnt = dict(learnt or {})

    @property
    def is_finite(self) -> bool:
        """Whether every output field is finite, so that a head alone can answer."""
        return bool(self.values) and set(self.schema.fields) == set(self.values)

    # --- answers ------------------------------------------------------------------------------------------------

    def answer(self, head: HeadAnswer | None, lora: LocalAnswer | None) -> Combined | None:
        """What the student answers: the head alone where it is sure, else whoever answered; None where nobody can."""
        alone = self.alone(head)
        if lora is None or (alone is not None and self.is_sure(alone)):
            return alone
        return self.combine(head, lora)

    def alone(self, head: HeadAnswer | None) -> Combined | None:
        """The head's own answer, None if it has none for every field or its values break a rule between fields."""
        if head is None or not self.is_finite:
            return None
        try:
            return self.combine(head, None)
        except SchemaError:
            return None

    def is_sure(self, alone: Combined) -> bool:
        """Whether a head's own answer stands without the adapter's."""
        return self.sure is not None and alone.confidence >= self.sure

    def combine(self, head: HeadAnswer | None, lora: LocalAnswer | None) -> Combined:
        """The answer of the halves that are given. Raises `SchemaError` if a head's alone does not fit."""
        if head is None and lora is None:
            raise ValueError("neither half answered")
        by: AnsweredBy = "lora" if head is None else "head" if lora is None else "both"
        mode = self._learnt.get(by, _UNTAUGHT)
        seen = {
            name: Seen.of(
                None if head is None else np.asarray(head.probabilities[name], np.float64),
                None if lora is None else self.told(name, lora),
                0.0 if head is None else float(head.distance),
            )
            for name in self.values
        }
        blends = {name: one.blend(mode.weights.get(name)) for name, one in seen.items()}
        output, chosen = self.settle(
            {name: int(p.argmax()) for name, p in blends.items()}, None if lora is None else lora.output
        )
        fields = {
            name: float(mode.of_field(name, pick(p, chosen[name]), seen[name].features(p, chosen[name])))
            for name, p in blends.items()
        }
        for name, p in self.open_fields(lora).items():
            fields[name] = float(mode.of_field(name, p, [logit(p)]))
        whole = float(mode.of_whole(math.prod(fields.values())))
        return Combined(output, whole, fields, self.distributions(blends), by)

    # --- what they are made of ----------------------------------------------------------------------------------

    def settle(
        self, chosen: Mapping[str, int], own: Mapping[str, Any] | None
    ) -> tuple[dict[str, Any], Mapping[str, int]]:
        """The output with these values, by their places, and the rest from the adapter's ``own``; and its values.

        Values that break a rule between fields give way to the adapter's. Raises `SchemaError` where it has none.
        """
        values = {name: self.values[name][at] for name, at in chosen.items()}
        if own is None:
            return self.schema.check(values), chosen
        try:
            return self.schema.check({**own, **values}), chosen
        except SchemaError:
            return dict(own), {name: self.place(name, own, at) for name, at in chosen.items()}

    def place(self, name: str, output: Mapping[str, Any], otherwise: int) -> int:
        """Which of a field's values an output has. A field left out is null."""
        return self._index[name].get(compact_json(output.get(name)), otherwise)

    def told(self, name: str, answer: LocalAnswer) -> Floats:
        """The adapter's distribution over a field's values: what the engine does not know is spread evenly."""
        texts = self.texts[name]
        told = (answer.distributions or {}).get(name)
        if told is None:
            told = {compact_json(answer.output.get(name)): answer.field_confidence.get(name, 1.0)}
        p = np.array([told.get(text, np.nan) for text in texts], np.float64)
        unknown = np.isnan(p)
        if unknown.any():
            p[unknown] = max(0.0, 1.0 - float(p[~unknown].sum())) / int(unknown.sum())
        return p

    def distributions(self, blends: Mapping[str, Floats]) -> dict[str, dict[str, float]]:
        """Probabilities [values] by field, with the JSON texts of the values."""
        return {name: dict(zip(self.texts[name], p.tolist(), strict=True)) for name, p in blends.items()}

    def open_fields(self, lora: LocalAnswer | None) -> dict[str, float]:
        """The adapter's confidence in the fields that are not finite."""
        if lora is None:
            return {}
        return {name: p for name, p in sorted(lora.field_confidence.items()) if name not in self.values}

    # --- as JSON ------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """What was learnt, for student.json; ``sure`` stands beside it there."""
        return {by: asdict(mode) for by, mode in self._learnt.items()}

    @classmethod
    def of_json(
        cls,
        schema: Schema,
        fields: Mapping[str, Sequence[Any]],
        stored: Mapping[str, Any] | None,
        sure: float | None = None,
    ) -> Combiner:
        """Read `to_json`; None: nothing was learnt. Raises ValueError where it is something else."""
        learnt: dict[AnsweredBy, Mode] = {}
        try:
            for by, mode in (stored or {}).items():
                if by not in FEATURES:
                    raise ValueError(f"there are no answers by {by!r}")
                weights = {str(n): (float(a), float(b)) for n, (a, b) in mode["weights"].items()}
                right = {str(n): Logistic.of_json(one) for n, one in mode["right"].items()}
                whole = None if mode["whole"] is None else Logistic.of_json(mode["whole"])
                if any(len(one.mean) != (FEATURES[by] if n in fields else 1) for n, one in right.items()):
                    raise ValueError(f"the answers by {by} have other features")
                learnt[cast(AnsweredBy, by)] = Mode(weights, right, whole)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        return cls(schema, fields, learnt, sure)
