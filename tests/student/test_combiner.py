"""The combiner believes whichever half knows, says how sure it is, and is as honest as its examples are few."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("numpy")

import numpy as np

from apprentice.errors import EvaluatorError
from apprentice.evaluators import Evaluation, StructuredMatch
from apprentice.local.engine import LocalAnswer
from apprentice.schemas.schema import SchemaError, parse_schema
from apprentice.student.combiner import Combiner
from apprentice.student.combining import Fit, fit_combiner


@dataclass(frozen=True)
class Head:
    """A head's answer."""

    probabilities: dict[str, Any]
    distance: float = 0.3


def lora(output: dict[str, Any], distributions: Any = None, confidence: float = 0.9, **fields: float) -> LocalAnswer:
    by_field = dict.fromkeys(output, confidence) | fields
    return LocalAnswer(output, min(by_field.values()), by_field, "v", 10, 2, distributions=distributions)


def guess(draw: np.random.Generator, truth: int, k: int, skill: float, heat: float = 1.0) -> Any:
    """A distribution over k values that knows ``truth`` as well as ``skill`` says; ``heat`` makes it too sure."""
    logits = draw.normal(size=k)
    logits[truth] += skill
    p = np.exp(heat * (logits - logits.max()))
    return p / p.sum()


@dataclass
class World:
    """A task with one enum of ``k`` values, and what two halves of different skills say of n inputs."""

    k: int
    heads: list[Any]
    loras: list[Any]
    truths: list[dict[str, Any]]

    @classmethod
    def of(cls, seed: int, n: int, *, k: int, skills: tuple[float, float], heat: tuple[float, float] = (1, 1)) -> World:
        draw = np.random.default_rng(seed)
        rows = []
        for truth in draw.integers(k, size=n):
            h, a = (guess(draw, int(truth), k, skill, hot) for skill, hot in zip(skills, heat, strict=True))
            told = {json.dumps(f"v{i}"): float(a[i]) for i in range(k)}
            answer = lora({"label": f"v{a.argmax()}"}, {"label": told}, float(a.max()))
            rows.append((Head({"label": h}), answer, {"label": f"v{truth}"}))
        return cls(k, *(list(column) for column in zip(*rows, strict=True)))

    @property
    def schema(self) -> Any:
        return parse_schema({"label": " | ".join(f"v{i}" for i in range(self.k))})

    @property
    def fields(self) -> dict[str, tuple[str, ...]]:
        return {"label": tuple(f"v{i}" for i in range(self.k))}

    def fit(self, **more: Any) -> Fit:
        return fit_combiner(self.schema, self.fields, self.heads, self.loras, self.truths, **more)

    def right(self, answers: list[Any]) -> Any:
        return np.array([answer.output == truth for answer, truth in zip(answers, self.truths, strict=True)])

    def halves(self) -> tuple[float, float]:
        """How often each half alone is right."""
        by_head = [
            f"v{h.probabilities['label'].argmax()}" == t["label"] for h, t in zip(self.heads, self.truths, strict=True)
        ]
        return float(np.mean(by_head)), float(self.right(self.loras).mean())


WORLDS: dict[str, dict[str, Any]] = {
    "pairs: the head knows nothing, and is sure of it": {"k": 2, "skills": (0.0, 2.0), "heat": (3.0, 1.0)},
    "few answers to 77 classes: the adapter is weak": {"k": 77, "skills": (5.0, 1.0), "heat": (1.0, 2.0)},
    "the adapter knows nothing": {"k": 7, "skills": (3.0, 0.0), "heat": (1.0, 3.0)},
    "the head is flat": {"k": 7, "skills": (0.0, 3.0), "heat": (0.0, 1.0)},
    "both know something": {"k": 7, "skills": (2.0, 2.0)},
}


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("n", [60, 300])
def test_the_student_is_as_good_as_its_better_half(name: str, n: int) -> None:
    """Over ten draws, cross-fitted answers are right as often as the better half's are, and say how often that is."""
    halves, ours, claimed = [], [], []
    for seed in range(10):
        world = World.of(seed, n, **WORLDS[name])
        answers = world.fit().answers
        halves.append(world.halves())
        ours.append(world.right(answers).mean())
        claimed.append(np.mean([answer.confidence for answer in answers]))  # type: ignore[union-attr]
    best = float(np.mean(halves, axis=0).max())
    noise = math.sqrt(best * (1 - best) / (10 * n))
    assert np.mean(ours) >= best - 2 * noise
    assert abs(np.mean(claimed) - np.mean(ours)) <= 2 * noise + 0.02


def test_two_halves_that_know_different_things_are_better_than_either() -> None:
    worlds = [World.of(seed, 300, k=7, skills=(2.0, 2.0)) for seed in range(5)]
    ours = np.mean([world.right(world.fit().answers).mean() for world in worlds])
    assert ours > np.mean([max(world.halves()) for world in worlds]) + 0.05


def test_more_confident_answers_are_right_more_often_also_on_inputs_it_was_not_fitted_on() -> None:
    """Fitted on 300, judged on 3,000 others: each fifth by confidence is right about as often as it says."""
    world = World.of(0, 300, k=7, skills=(2.0, 1.5), heat=(2.0, 2.0))
    combiner = world.fit().combiner
    fresh = World.of(1, 3000, k=7, skills=(2.0, 1.5), heat=(2.0, 2.0))
    answers = [combiner.combine(h, a) for h, a in zip(fresh.heads, fresh.loras, strict=True)]
    sure, right = np.array([answer.confidence for answer in answers]), fresh.right(answers)
    fifths = np.array_split(np.argsort(sure), 5)
    shares = [right[fifth].mean() for fifth in fifths]
    assert shares == sorted(shares)
    assert max(abs(right[fifth].mean() - sure[fifth].mean()) for fifth in fifths) < 0.08


def test_cross_fitted_answers_promise_no_more_than_they_keep_where_nothing_can_be_learnt() -> None:
    """Two halves of noise and 40 examples: an in-sample fit would claim more than one in seven."""
    claimed = []
    for seed in range(20):
        world = World.of(seed, 40, k=7, skills=(0.0, 0.0), heat=(2.0, 2.0))
        claimed.append(np.mean([answer.confidence for answer in world.fit().answers]))  # type: ignore[union-attr]
    assert np.mean(claimed) < 1 / 7 + 0.1


def test_what_the_engine_does_not_know_of_the_adapters_answer_is_spread_evenly() -> None:
    schema = parse_schema({"label": "v0 | v1 | v2"})
    combined = Combiner(schema, {"label": ("v0", "v1", "v2")}).combine(None, lora({"label": "v1"}, confidence=0.8))
    assert combined.output == {"label": "v1"}
    assert combined.distributions["label"] == pytest.approx({'"v0"': 0.1, '"v1"': 0.8, '"v2"': 0.1})
    assert combined.answered_by == "lora"


def test_fields_of_free_text_are_the_adapters_and_the_others_are_blended() -> None:
    schema = parse_schema({"label": "v0 | v1", "why": "str"})
    combiner = Combiner(schema, {"label": ("v0", "v1")})
    said = lora({"label": "v1", "why": "because"}, confidence=0.6, why=0.7)
    combined = combiner.combine(Head({"label": [0.95, 0.05]}), said)
    assert combined.output == {"label": "v0", "why": "because"}
    assert combined.field_confidence["why"] == 0.7
    assert not combiner.is_finite
    with pytest.raises(SchemaError, match="why"):
        combiner.combine(Head({"label": [0.95, 0.05]}), None)


def test_the_head_answers_alone_where_it_is_sure_and_can() -> None:
    schema = parse_schema({"label": "v0 | v1"})
    fields = {"label": ("v0", "v1")}
    sure, unsure = Head({"label": [0.95, 0.05]}), Head({"label": [0.7, 0.3]})
    said = lora({"label": "v1"}, confidence=0.9)
    combiner = Combiner(schema, fields, sure=0.9)
    assert combiner.answer(sure, said) == combiner.alone(sure) == combiner.combine(sure, None)
    assert combiner.answer(unsure, said) == combiner.combine(unsure, said)
    assert combiner.answer(unsure, None) == combiner.alone(unsure)
    assert combiner.answer(None, said) == combiner.combine(None, said)
    assert combiner.answer(None, None) is None
    always = Combiner(schema, fields)
    assert always.answer(sure, said) == always.combine(sure, said)


def test_a_head_whose_values_break_a_rule_leaves_the_answer_to_the_adapter() -> None:
    both = {"a": {"const": "v0"}, "b": {"const": "v0"}}
    schema = parse_schema(
        {
            "type": "object",
            "properties": {"a": {"enum": ["v0", "v1"]}, "b": {"enum": ["v0", "v1"]}},
            "required": ["a", "b"],
            "additionalProperties": False,
            "not": {"properties": both},
        }
    )
    combiner = Combiner(schema, {"a": ("v0", "v1"), "b": ("v0", "v1")}, sure=0.0)
    head, said = Head({"a": [0.99, 0.01], "b": [0.99, 0.01]}), lora({"a": "v1", "b": "v0"}, confidence=0.6)
    assert combiner.alone(head) is None
    assert combiner.answer(head, None) is None
    combined = combiner.answer(head, said)
    assert combined is not None
    assert combined.output == {"a": "v1", "b": "v0"}
    assert combined.field_confidence["a"] < 0.2  # that of the value it has, not of the likeliest


def test_an_answer_of_several_fields_gets_the_probability_that_all_agree() -> None:
    """The fields are right or wrong together: the product of their probabilities would be far too low."""
    draw = np.random.default_rng(0)
    schema = parse_schema({"a": "v0 | v1", "b": "v0 | v1"})
    fields = {"a": ("v0", "v1"), "b": ("v0", "v1")}
    heads, truths = [], []
    for right in draw.random(400) < 0.7:
        heads.append(Head({"a": [0.7, 0.3], "b": [0.7, 0.3]}, float(draw.random())))
        truths.append({"a": "v0" if right else "v1", "b": "v0" if right else "v1"})
    fit = fit_combiner(schema, fields, heads, [None] * 400, truths)
    combined = fit.combiner.combine(heads[0], None)
    assert combined.confidence == pytest.approx(0.7, abs=0.07)
    assert combined.field_confidence["a"] == pytest.approx(0.7, abs=0.07)
    expected = StructuredMatch().expect(combined.field_confidence)
    assert expected == pytest.approx(0.7, abs=0.07)


def test_the_tasks_own_evaluator_says_what_is_right() -> None:
    """Scores between 0 and 1 are learnt as such; an example that cannot be scored teaches nothing."""
    schema = parse_schema({"text": "str"})
    answers = [lora({"text": f"t{i}"}, confidence=0.95) for i in range(60)]

    def half_right(ours: Any, theirs: Any) -> Evaluation:
        if ours["text"] == "t0":
            raise EvaluatorError("away")
        return Evaluation(0.5, {})

    fit = fit_combiner(schema, {}, [None] * 60, answers, [{"text": "other"}] * 60, evaluator=half_right)
    assert fit.combiner.combine(None, answers[0]).confidence == pytest.approx(0.5, abs=0.1)
    assert fit.sure is None


def test_where_the_head_is_sure_the_adapter_would_hardly_ever_change_the_answer() -> None:
    world = World.of(0, 1000, k=4, skills=(6.0, 2.0))
    fit = world.fit()
    assert fit.sure is not None
    fresh = World.of(1, 4000, k=4, skills=(6.0, 2.0))
    changed = []
    for head, answer in zip(fresh.heads, fresh.loras, strict=True):
        alone = fit.combiner.combine(head, None)
        if alone.confidence >= fit.sure:
            changed.append(alone.output != fit.combiner.combine(head, answer).output)
    assert len(changed) > 400
    assert np.mean(changed) <= 0.01
    by_head = sum(answer.answered_by == "head" for answer in fit.answers if answer is not None)
    assert by_head > 100


@pytest.mark.parametrize(("n", "k"), [(80, 4), (1000, 2)])
def test_the_head_is_never_called_sure_on_too_little_or_of_what_it_does_not_know(n: int, k: int) -> None:
    skills = (6.0, 2.0) if n < 100 else (0.0, 3.0)
    assert World.of(0, n, k=k, skills=skills).fit().sure is None


def test_a_half_that_did_not_answer_leaves_the_other() -> None:
    world = World.of(0, 100, k=3, skills=(2.0, 2.0))
    world.loras[:30] = [None] * 30
    world.heads[20:40] = [None] * 20
    answers = world.fit().answers
    assert [answer and answer.answered_by for answer in answers[:40]] == ["head"] * 20 + [None] * 10 + ["lora"] * 10


def test_what_was_learnt_is_written_and_read_again_to_the_last_digit() -> None:
    world = World.of(0, 100, k=3, skills=(2.0, 1.0))
    combiner = world.fit().combiner
    again = Combiner.of_json(world.schema, world.fields, json.loads(json.dumps(combiner.to_json())))
    for head, answer in zip(world.heads[:5], world.loras[:5], strict=True):
        for halves in ((head, answer), (head, None), (None, answer)):
            assert again.combine(*halves) == combiner.combine(*halves)


def regression(**changed: Any) -> dict[str, Any]:
    """A regression as it is stored, over the features of a head's answers."""
    return {"constant": 0.0, "mean": [0.0] * 3, "scale": [1.0] * 3, "coefficients": [0.0] * 3} | changed


@pytest.mark.parametrize(
    "stored",
    [
        {"neither": {"weights": {}, "right": {}, "whole": None}},
        {"head": {"weights": {"label": [1.0]}, "right": {}, "whole": None}},
        {"head": {"weights": {}, "right": {}}},
        {"both": {"weights": {}, "right": {"label": regression()}, "whole": None}},
        {"head": {"weights": {}, "right": {"label": regression(scale=[1.0, 0.0, 1.0])}, "whole": None}},
        {"head": {"weights": {}, "right": {"label": regression(mean=[0.0])}, "whole": None}},
        {"head": 3},
    ],
)
def test_numbers_that_are_no_combiners_are_refused(stored: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # of_json's own kind
        Combiner.of_json(parse_schema({"label": "v0 | v1"}), {"label": ("v0", "v1")}, stored)


def test_nothing_is_learnt_from_a_handful() -> None:
    assert World.of(0, 6, k=3, skills=(2.0, 1.0)).fit().combiner.to_json() == {}
