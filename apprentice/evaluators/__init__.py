"""Comparing two answers to one request: a score in [0, 1] and what it is made of.

One evaluator a file, called as in a task's ``evaluator``; ``REGISTERED`` is its class. `protocol` says what one is.
"""

from __future__ import annotations

from apprentice.evaluators.build import build_evaluator, made_evaluator
from apprentice.evaluators.custom import CustomEvaluator
from apprentice.evaluators.exact_match import ExactMatch
from apprentice.evaluators.protocol import Answer, Evaluation, Evaluator, evaluator
from apprentice.evaluators.semantic_similarity import SemanticSimilarity
from apprentice.evaluators.structured_match import StructuredMatch

__all__ = [
    "Answer",
    "CustomEvaluator",
    "Evaluation",
    "Evaluator",
    "ExactMatch",
    "SemanticSimilarity",
    "StructuredMatch",
    "build_evaluator",
    "evaluator",
    "made_evaluator",
]
