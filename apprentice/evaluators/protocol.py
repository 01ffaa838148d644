"""What an evaluator is: a score of the local answer against the remote's, and what else is asked of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from apprentice.registry import Plugin

__all__ = ["Answer", "Evaluation", "Evaluator", "PlainEvaluator", "evaluator"]

type Answer = Mapping[str, Any]


class Evaluation(NamedTuple):
    """A score in [0, 1] and the scores of its parts, by field."""

    score: float
    parts: Mapping[str, float]


class Evaluator(Plugin, ABC):
    """Scores a local answer against the remote's. Calling it is all that one must define; the rest has defaults."""

    is_quick: bool = False
    """Whether it calls nobody and its time is bounded by the answers' size; any other gets a time limit."""
    has_ceiling: bool = False
    """Whether the bound of docs/trust.md about the teacher's own ceiling holds for its scores."""

    @classmethod
    def configured(cls, options: Any) -> Evaluator:
        """Made from an instance of ``Options``, None without one. Raises `EvaluatorError`, `MissingExtra`."""
        return cls()

    @abstractmethod
    def __call__(self, local: Answer, remote: Answer) -> Evaluation:
        """The score. Raises `EvaluatorError` where there is none; whatever else it raises counts as that."""

    def project(self, answer: Answer) -> Answer:
        """The part of an answer that is looked at, short: what the trust state remembers of it.

        For any a and b, ``self(self.project(a), self.project(b)) == self(a, b)``.
        """
        return answer

    def expect(self, confidences: Mapping[str, float]) -> float | None:
        """The score to expect of an answer whose fields are right with these probabilities; None: their least."""
        return None


class PlainEvaluator(Evaluator):
    """See `evaluator`."""

    def __init__(self, score: Callable[[Any, Any], Evaluation]) -> None:
        self._score = score

    def __call__(self, local: Any, remote: Any) -> Evaluation:
        return self._score(local, remote)


def evaluator(score: Callable[[Any, Any], Evaluation]) -> PlainEvaluator:
    """The evaluator that calls a function of (local, remote), with every default. It trusts what that returns."""
    return PlainEvaluator(score)
