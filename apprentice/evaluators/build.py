"""From an evaluator's name to the evaluator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apprentice.errors import EvaluatorError
from apprentice.evaluators.custom import CustomEvaluator
from apprentice.evaluators.protocol import Evaluator
from apprentice.registry import EVALUATORS, Found, RegistryError

__all__ = ["build_evaluator", "made_evaluator"]

# What the options of ours were called before each evaluator had a section of its own.
_SHORT = {"ordered": "ordered_lists", "model": "evaluator_model", "function": "evaluator_function"}


def build_evaluator(name: str, **options: Any) -> Evaluator:
    """The evaluator called ``name``, ours or an installed package's, with its options.

    ``structured_match`` takes ``match_fields``, ``field_weights``, ``numeric_tolerance`` and ``ordered``;
    ``semantic_similarity`` takes ``model`` and ``match_fields``; ``custom`` takes ``function``.

    Raises EvaluatorError for an unknown name, options that do not fit or a function that cannot be used, MissingExtra
    where semantic_similarity lacks its library.
    """
    given = {_SHORT.get(key, key): value for key, value in options.items()}
    try:
        return made_evaluator(EVALUATORS.find(name), given)
    except RegistryError as error:
        raise EvaluatorError(f"evaluator {error}") from error


def made_evaluator(found: Found, options: Mapping[str, Any]) -> Evaluator:
    """What a registry found, with its options. Raises `RegistryError`, `EvaluatorError`, `MissingExtra`."""
    chosen = EVALUATORS.options(found, options, "evaluator_options")
    if not found.is_class:
        return CustomEvaluator(found.made)
    made: Evaluator = found.made.configured(chosen)
    return made
