"""The head: a linear classifier on a sentence encoder, for every output field with a finite set of values.

It is fitted in `apprentice.student.fitting`. Its one file, head.safetensors, holds for each field a matrix and a bias
(the logits are x W + b), what the features are, and a sample of the inputs it was fitted on, for the distance.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apprentice.errors import VersionError
from apprentice.schemas.schema import compact_json
from apprentice.student.encoder import Encoder, load_encoder
from apprentice.student.features import Plan

__all__ = ["Head", "HeadAnswer", "Layer", "distances", "softmax"]

type Floats = NDArray[np.float64]

FILE = "head.safetensors"
FORMAT = 1
_AGAIN = "fit the head again, or restore the file"


@dataclass(frozen=True)
class HeadAnswer:
    """What a head says of one input.

    ``probabilities`` are by field, float64 [values] in the order of the head's values, and calibrated. ``distance`` is
    1 less the cosine to the nearest input that the head was fitted on (of a sample), in [0, 1].
    """

    probabilities: Mapping[str, Floats]
    distance: float


@dataclass(frozen=True, slots=True)
class Layer:
    """One field's: logits = features @ weights + bias. float32 [features, values] and [values]."""

    weights: NDArray[np.float32]
    bias: NDArray[np.float32]


class Head:
    """A fitted head. ``fields``: every finite output field with its values. Safe to use from many threads.

    ``plan`` is what it sees of an input. ``known`` is the sample of inputs that it was fitted on, where they lie among
    texts: float16 [inputs, place].
    """

    def __init__(
        self,
        fields: Mapping[str, tuple[Any, ...]],
        encoder: Encoder,
        plan: Plan,
        layers: Mapping[str, Layer],
        known: NDArray[np.float16],
    ) -> None:
        self.fields = dict(fields)
        self._encoder = encoder
        self.plan = plan
        self._layers = dict(layers)
        self._known = known
        self._known_wide = known.astype(np.float32)
        self._texts = {name: tuple(map(compact_json, values)) for name, values in fields.items()}

    @property
    def encoder(self) -> str:
        """The name of its sentence encoder."""
        return self._encoder.name

    @property
    def nbytes(self) -> int:
        """How much memory its matrices take, in bytes; the encoder, which heads share, is not counted."""
        layers = sum(layer.weights.nbytes + layer.bias.nbytes for layer in self._layers.values())
        return layers + self._known.nbytes + self._known_wide.nbytes

    def value(self, field: str, index: int) -> Any:
        """The value with this place in a field's distribution."""
        return self.fields[field][index]

    def text(self, field: str, index: int) -> str:
        """The same as the JSON text that names it in a `LocalAnswer`'s distributions."""
        return self._texts[field][index]

    def predict(self, inputs: Sequence[Mapping[str, Any]]) -> list[HeadAnswer]:
        """Answer inputs, of any shape. Raises MissingExtra, ConfigError as the encoder does."""
        if not inputs:
            return []
        x, place = self.plan.vectors(inputs, self._encoder.encode)
        return self.predict_vectors(x, place)

    def predict_vectors(self, x: Floats, place: Floats) -> list[HeadAnswer]:
        """Answer inputs given as `Plan.vectors` gives them."""
        by_field = {
            name: softmax(x @ layer.weights.astype(np.float64) + layer.bias) for name, layer in self._layers.items()
        }
        far = distances(place, self._known_wide)
        return [HeadAnswer({name: p[row] for name, p in by_field.items()}, float(far[row])) for row in range(len(x))]

    def save(self, folder: Path) -> None:
        """Write head.safetensors. Heads that are equal are equal byte by byte."""
        from safetensors.numpy import save

        tensors: dict[str, NDArray[Any]] = {"known": np.ascontiguousarray(self._known)}
        for at, layer in enumerate(self._layers.values()):
            tensors[f"weights.{at}"] = np.ascontiguousarray(layer.weights)
            tensors[f"bias.{at}"] = np.ascontiguousarray(layer.bias)
        document = {
            "format": FORMAT,
            "encoder": self._encoder.name,
            "fingerprint": self._encoder.fingerprint,
            "fields": {name: list(values) for name, values in self.fields.items()},
            "plan": self.plan.to_json(),
        }
        # One entry alone: the library does not keep the order of several.
        (folder / FILE).write_bytes(save(tensors, {"head": compact_json(document)}))

    @classmethod
    def load(cls, folder: Path, root: Path | None = None) -> Head:
        """Read `save`; a relative folder of an encoder starts at ``root``. Raises VersionError, and MissingExtra."""
        path = folder / FILE
        document, tensors = _read(path)
        if document.get("format") != FORMAT:
            raise VersionError(
                f"{path} has format {document.get('format')!r}, and this Apprentice reads {FORMAT}; upgrade it or fit "
                "the head again"
            )
        try:
            fields = {str(name): tuple(values) for name, values in document["fields"].items()}
            plan = Plan.of_json(document["plan"])
            name, fingerprint = str(document["encoder"]), str(document["fingerprint"])
            layers = {one: _layer(tensors, at, len(values)) for at, (one, values) in enumerate(fields.items())}
            known = tensors["known"]
            if known.ndim != 2 or known.dtype != np.float16 or not np.isfinite(known).all() or not fields:
                raise ValueError("the known inputs are no float16 matrix")
            if len({layer.weights.shape[0] for layer in layers.values()}) > 1:
                raise ValueError("the fields differ in their features")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise VersionError(f"{path} is no head ({type(error).__name__}: {error}); {_AGAIN}") from None
        encoder = load_encoder(name, root)
        if encoder.fingerprint != fingerprint:
            raise VersionError(
                f"{path} was fitted on an encoder {name!r} with the fingerprint {fingerprint}, and the one here has "
                f"{encoder.fingerprint}: other weights mean other embeddings; install the same, or fit the head again"
            )
        return cls(fields, encoder, plan, layers, known)


def softmax(logits: Floats) -> Floats:
    """Probabilities over the last axis."""
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True), np.float64)


def distances(place: Floats, known: NDArray[np.floating[Any]]) -> Floats:
    """1 less the largest cosine to any of ``known``, within [0, 1]; both unit vectors [inputs, place]."""
    if not len(known):
        return np.ones(len(place))
    return np.asarray(np.clip(1.0 - (place.astype(known.dtype) @ known.T).max(axis=1), 0.0, 1.0), np.float64)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            document = json.loads((file.metadata() or {})["head"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise VersionError(f"{path} cannot be read ({error}); {_AGAIN}") from None
    if not isinstance(document, dict):
        raise VersionError(f"{path} describes the head as {type(document).__name__}; {_AGAIN}")
    return document, tensors


def _layer(tensors: Mapping[str, NDArray[Any]], at: int, values: int) -> Layer:
    weights, bias = tensors[f"weights.{at}"], tensors[f"bias.{at}"]
    for tensor in (weights, bias):
        if tensor.dtype != np.float32 or not np.isfinite(tensor).all():
            raise ValueError("a matrix is not made of finite float32 numbers")
    if weights.ndim != 2 or weights.shape[1] != values or bias.shape != (values,):
        raise ValueError(f"a matrix of {weights.shape} and a bias of {bias.shape} for {values} values")
    return Layer(weights, bias)
