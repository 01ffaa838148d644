"""Learning to combine the halves: cross-fitted answers are those of a combiner that saw the other examples, no less."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("numpy")

import numpy as np

from apprentice.evaluators import Evaluation, Evaluator, StructuredMatch
from apprentice.local.engine import LocalAnswer
from apprentice.schemas.schema import SchemaError, parse_schema
from apprentice.student.combiner import Combined, Combiner
from apprentice.student.combining import Fit, fit_combiner
from apprentice.student.pooling import Logistic, Seen, logit
from apprentice.student.shrinkage import fit_logistic, fit_weights


@dataclass(frozen=True)
class Head:
    """A head's answer."""

    probabilities: dict[str, Any]
    distance: float


def guess(draw: np.random.Generator, truth: int, k: int) -> Any:
    """A distribution over k values that knows something of ``truth``, and is too sure of it."""
    logits = 2.0 * draw.normal(size=k)
    logits[truth] += 5.0
    p = np.exp(logits - logits.max())
    return p / p.sum()


class Case:
    """Examples of a task with these ``sizes`` of finite fields, and a free text if there is ``text``.

    A ``rule`` forbids the first values of the first two fields together; what the halves choose may break it. ``lost``
    is the share of either half's answers that is missing.
    """

    def __init__(
        self,
        sizes: tuple[int, ...],
        *,
        n: int,
        heads: bool = True,
        loras: bool = True,
        text: bool = False,
        rule: bool = False,
        lost: float = 0.0,
        evaluator: Evaluator | None = None,
    ) -> None:
        draw = np.random.default_rng(7)
        self.fields = {f"f{at}": tuple(f"v{value}" for value in range(k)) for at, k in enumerate(sizes)}
        properties: dict[str, Any] = {name: {"enum": list(values)} for name, values in self.fields.items()}
        if text:
            properties["text"] = {"type": "string"}
        document = {
            "type": "object",
            "properties": properties,
            "required": [*properties],
            "additionalProperties": False,
        }
        if rule:
            document["not"] = {"properties": {"f0": {"const": "v0"}, "f1": {"const": "v0"}}}
        self.schema = parse_schema(document)
        self.evaluator = evaluator
        self.heads: list[Head | None] = []
        self.loras: list[LocalAnswer | None] = []
        self.outputs: list[dict[str, Any]] = []
        for _ in range(n):
            truth = self._allowed(draw, rule)
            head = Head({f: guess(draw, at, len(self.fields[f])) for f, at in truth.items()}, float(draw.random()))
            own = truth if draw.random() < 0.7 else self._allowed(draw, rule)
            self.heads.append(head if heads and draw.random() >= lost else None)
            self.loras.append(self._lora(draw, own, text) if loras and draw.random() >= lost else None)
            self.outputs.append(self._output(truth) | ({"text": f"t{draw.integers(3)}"} if text else {}))

    def _allowed(self, draw: np.random.Generator, rule: bool) -> dict[str, int]:
        chosen = {name: int(draw.integers(len(values))) for name, values in self.fields.items()}
        return chosen | ({"f1": 1} if rule and chosen["f0"] == 0 else {})

    def _output(self, chosen: Mapping[str, int]) -> dict[str, Any]:
        return {name: self.fields[name][at] for name, at in chosen.items()}

    def _lora(self, draw: np.random.Generator, own: Mapping[str, int], text: bool) -> LocalAnswer:
        """Its text is sometimes without a confidence, its distributions are sometimes unknown or in parts."""
        output = self._output(own) | ({"text": f"t{draw.integers(3)}"} if text else {})
        confidence = {name: float(draw.uniform(0.3, 1.0)) for name in output if name != "text" or draw.random() < 0.8}
        told = {
            name: {
                json.dumps(value): float(p)
                for value, p in zip(self.fields[name], guess(draw, at, len(self.fields[name])), strict=True)
                if draw.random() < 0.9
            }
            for name, at in own.items()
            if draw.random() < 0.9
        }
        return LocalAnswer(output, 0.5, confidence, "v", 1, 1, distributions=told if draw.random() < 0.9 else None)

    def fit(self, rows: Any = None, outputs: list[dict[str, Any]] | None = None, **more: Any) -> Fit:
        """Of these rows; of all where none are named."""
        outputs = self.outputs if outputs is None else outputs
        chosen = range(len(outputs)) if rows is None else rows
        columns = ([column[at] for at in chosen] for column in (self.heads, self.loras, outputs))
        return fit_combiner(self.schema, self.fields, *columns, evaluator=self.evaluator, **more)


def half_of_it(ours: Any, theirs: Any) -> Evaluation:
    """An evaluator whose parts lie deeper than the fields."""
    return Evaluation(0.3 + 0.6 * (ours == theirs), {"f0.one": 0.2, "f0.other": 0.6, "f1": 0.9})


CASES: dict[str, dict[str, Any]] = {
    "a head alone": {"sizes": (7,), "n": 200, "loras": False},
    "a head alone with 77 values": {"sizes": (77,), "n": 300, "loras": False},
    "an adapter alone": {"sizes": (5,), "n": 150, "heads": False},
    "both": {"sizes": (106,), "n": 200},
    "both, some halves missing": {"sizes": (4,), "n": 200, "lost": 0.3},
    "several fields and a rule": {"sizes": (2, 3, 4), "n": 200, "rule": True},
    "several fields, a rule and no adapter": {"sizes": (2, 2), "n": 200, "rule": True, "loras": False},
    "free text beside them": {"sizes": (3, 1), "n": 200, "text": True, "lost": 0.2},
    "free text only": {"sizes": (), "n": 120, "text": True, "heads": False},
    "scores": {"sizes": (2, 3), "n": 200, "lost": 0.2, "rule": True, "evaluator": StructuredMatch()},
    "scores of parts": {"sizes": (3, 3), "n": 120, "text": True, "evaluator": half_of_it},
    "too few for some folds": {"sizes": (3,), "n": 8, "lost": 0.1},
}


def live(combiner: Combiner, head: Head | None, lora: LocalAnswer | None) -> Combined | None:
    """One answer as a router asks for it, None where there is none."""
    try:
        return combiner.combine(head, lora)
    except SchemaError:
        return None


@pytest.mark.parametrize("name", CASES)
def test_each_cross_fitted_answer_is_that_of_a_combiner_fitted_on_the_other_folds(name: str) -> None:
    """To the last digit, though that one answers one by one: what is judged is what is served."""
    case = Case(**CASES[name])
    n = len(case.outputs)
    fit = case.fit(seed=3)
    fold = np.random.default_rng(3).permutation(n) % 10
    for held in range(10):
        others = case.fit(np.flatnonzero(fold != held)).combiner
        for row in np.flatnonzero(fold == held):
            answer, head, lora = fit.answers[row], case.heads[row], case.loras[row]
            if head is None and lora is None:
                assert answer is None
                continue
            by_head = answer is not None and answer.answered_by == "head"
            assert answer == live(others, head, None if by_head else lora)


def test_where_a_heads_values_break_a_rule_there_is_no_answer_by_it() -> None:
    """And the rows that have one obey the rule."""
    answers = Case(**CASES["several fields, a rule and no adapter"]).fit().answers
    outputs = [answer.output for answer in answers if answer is not None]
    assert 0 < answers.count(None) < 100
    assert {"f0": "v0", "f1": "v0"} not in outputs


@pytest.mark.parametrize("name", ["a head alone", "both, some halves missing", "scores"])
def test_no_answer_depends_on_what_the_remote_said_of_its_own_example(name: str) -> None:
    """And what is learnt from all examples does."""
    case = Case(**CASES[name])
    before = case.fit()
    for row in range(0, len(case.outputs), 40):
        outputs = list(case.outputs)
        outputs[row] = next(one for one in case.outputs if one != case.outputs[row])
        after = case.fit(outputs=outputs)
        assert after.answers[row] == before.answers[row]
        assert after.combiner.to_json() != before.combiner.to_json()


def test_the_evaluator_is_asked_once_for_each_pair_of_answers() -> None:
    """A judge costs money, and eleven fits ask for the same pairs."""
    asked: list[tuple[str, str]] = []

    def judge(ours: Any, theirs: Any) -> Evaluation:
        asked.append((json.dumps(ours), json.dumps(theirs)))
        return Evaluation(float(ours == theirs), {})

    case = Case((3, 2), n=150, lost=0.2, evaluator=judge)
    case.fit()
    assert len(asked) == len(set(asked)) > 5


def test_cross_fitted_answers_share_no_output() -> None:
    answers = [answer for answer in Case((2,), n=30).fit().answers if answer is not None]
    assert len({id(answer.output) for answer in answers}) == 30


def test_columns_of_different_lengths_are_refused() -> None:
    case = Case((2,), n=10)
    with pytest.raises(ValueError, match="10 answers of a head, 9 of an adapter and 10 of the remote"):
        fit_combiner(case.schema, case.fields, case.heads, case.loras[1:], case.outputs)


@pytest.mark.parametrize("seed", range(5))
def test_the_blends_weights_are_where_the_penalised_likelihood_is_highest(seed: int) -> None:
    """No point around them is better; of those that are not below 0."""
    draw = np.random.default_rng(seed)
    truth = draw.integers(4, size=120)
    halves = [
        np.array([guess(draw, int(at) if draw.random() < skill else 0, 4) for at in truth]) for skill in (0.9, 0.4)
    ]
    seen = Seen.of(halves[0], halves[1], np.zeros(120))
    learn = draw.random(120) < 0.8

    def objective(weights: tuple[float, float]) -> float:
        likely = np.log(seen.blend(weights)[np.arange(120), truth])[learn].sum()
        return float(likely - 2.0 * sum((w - 0.5) ** 2 for w in weights))

    a, b = fit_weights(seen, truth, learn)
    best = objective((a, b))
    around = [(a + x, b + y) for x in (-0.01, 0.0, 0.01) for y in (-0.01, 0.0, 0.01)]
    assert all(objective(point) <= best + 1e-6 for point in around if min(point) >= 0.0)


@pytest.mark.parametrize("seed", range(5))
def test_a_regression_is_where_its_penalised_likelihood_is_level(seed: int) -> None:
    draw = np.random.default_rng(seed)
    x, offset = draw.normal(size=(300, 3)) * [1.0, 10.0, 0.1] + 4.0, 2.0 * draw.normal(size=300)
    target = draw.random(300) ** 2
    found = fit_logistic(x, offset, target)
    level(found, x, offset, target)


@pytest.mark.parametrize("seed", range(5))
def test_a_regression_gets_there_also_from_a_half_that_is_wrong_and_sure_of_it(seed: int) -> None:
    """Newton's full steps go to and fro between two ends here, further each time."""
    draw = np.random.default_rng(seed)
    offset = draw.uniform(3.0, 13.0, size=200) * draw.choice([-1.0, 1.0], size=200)
    x, target = np.column_stack([offset, draw.normal(size=200)]), draw.choice([0.2, 0.3, 0.8], size=200)
    level(fit_logistic(x, offset, target), x, offset, target)


def level(found: Logistic, x: Any, offset: Any, target: Any) -> None:
    """The derivative of the penalised log-likelihood is 0 in every coefficient."""
    p = np.asarray(found(offset, list(x.T)))
    scaled = (x - np.array(found.mean)) / np.array(found.scale)
    assert (target - p).sum() - 1.0 * found.constant == pytest.approx(0.0, abs=1e-3)
    assert (target - p) @ scaled - 6.0 * np.array(found.coefficients) == pytest.approx(np.zeros(x.shape[1]), abs=1e-3)


def test_one_half_alone_is_blended_to_itself() -> None:
    p = np.array([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0]])
    assert Seen.of(p, None, np.zeros(2)).blend() == pytest.approx(p, abs=1e-5)
    assert Seen.of(None, p, 0.0).blend() == pytest.approx(p, abs=1e-5)
    assert logit(0.5) == 0.0
