"""`evaluator: custom`: a function of the user's own."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from apprentice.errors import EvaluatorError
from apprentice.evaluators.protocol import Answer, Evaluation, Evaluator

__all__ = ["CustomEvaluator"]


class CustomEvaluator(Evaluator):
    """A function of the user's: (local, remote) -> number in [0, 1], or (number, parts), or Evaluation.

    Whatever goes wrong inside becomes an EvaluatorError that names the function; the comparison is then kept unscored.
    """

    class Options(BaseModel):
        """Keys of the task."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        evaluator_function: str | Callable[..., Any] | None = Field(None, validate_default=True)

        @field_validator("evaluator_function")
        @classmethod
        def _named(cls, value: Any) -> Any:
            if value is None:
                raise ValueError("evaluator: custom needs a function: set evaluator_function to module:function")
            return value

    @classmethod
    def configured(cls, options: Any) -> CustomEvaluator:
        return cls(options.evaluator_function)

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


REGISTERED = CustomEvaluator
