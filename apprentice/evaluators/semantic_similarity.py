"""`evaluator: semantic_similarity`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ConfigDict

from apprentice.errors import ConfigError, EvaluatorError, MissingExtra
from apprentice.evaluators.protocol import Answer, Evaluation, Evaluator
from apprentice.evaluators.values import MISSING, at, canonical

__all__ = ["SemanticSimilarity"]

# Sentence encoders read some 256 tokens; what comes after these characters they would not see anyway.
_READ = 2000
_EMBEDDINGS = 1024


class SemanticSimilarity(Evaluator):
    """The cosine of two sentence embeddings, negative ones counting 0; parts are the cosines of the single fields.

    With ``match_fields`` the score is the mean over these fields, else the whole answer is compared as text. The model
    (a hub name or a folder, for sentence-transformers) loads on the first call. Raises MissingExtra at once where the
    library is not there: found at the first comparison, it would cost the task every comparison.
    """

    has_ceiling = True

    class Options(BaseModel):
        """Keys of the task."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        evaluator_model: str = "sentence-transformers/all-MiniLM-L6-v2"
        match_fields: tuple[str, ...] = ()

    @classmethod
    def configured(cls, options: Any) -> SemanticSimilarity:
        return cls(options.evaluator_model, options.match_fields)

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
            parts[name] = self._cosine(_text(at(local, path)), _text(at(remote, path)))
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


def _is_installed(module: str) -> bool:
    """Without importing it, which may take seconds."""
    if module in sys.modules:
        return sys.modules[module] is not None
    return importlib.util.find_spec(module) is not None


def _clip(value: Any) -> Any:
    if isinstance(value, str):
        return value[:_READ]
    if isinstance(value, Mapping):
        return {key: _clip(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_clip(inner) for inner in value]
    return value


def _text(value: Any) -> str:
    if value is MISSING or value is None:
        return ""
    return value if isinstance(value, str) else canonical(value)


REGISTERED = SemanticSimilarity
