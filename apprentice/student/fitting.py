"""Fitting a head: regularised linear discriminant analysis, with exact leave-one-out in closed form.

Each class is a Gaussian around its mean; all share a covariance, the scatter W within classes plus a ridge r I
(Friedman 1989). With Q = W + r I, class c gets the logit t (m_c' Q^-1 x - m_c' Q^-1 m_c / 2) + log prior_c.
Means are shrunk to the overall one as if one more example lay there, so a class seen once is not believed at its word.
On embeddings this learns as fast as logistic regression where classes are few, and much faster where they are many.

What it is like without row i needs no second fit: leaving out a row with weight w of a class with weight n takes
w n / (n - w) (x - m)(x - m)' from W, a change of rank one (Sherman and Morrison 1950), and moves two means. These
predictions choose the ridge and the temperature t by their log-loss, and are given out as ``held_back``: evidence of
what the head says of inputs that it has not seen. Inputs of the same text are one row, and leave together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apprentice.schemas.schema import Schema, compact_json
from apprentice.student.encoder import Encoder
from apprentice.student.features import Plan, whole_text
from apprentice.student.fields import finite_fields
from apprentice.student.head import Head, HeadAnswer, Layer, distances, softmax

__all__ = ["Encodings", "Fitted", "fit_head"]

type Floats = NDArray[np.float64]
type Embeddings = Mapping[str, NDArray[Any]] | NDArray[Any]

_RIDGES = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03)
"""Times the mean eigenvalue of W."""
_SMALLER = 1.0
"""Nats that each smaller one costs: with a handful of rows one of them is best by chance."""
_TEMPERATURES = np.exp(np.linspace(math.log(0.005), math.log(20.0), 24))
"""Times the examples' total weight, by which W is more than a covariance."""
_TOWARDS_MEAN = 1.0
"""Examples that each class is taken to have at the overall mean."""
_PRIOR = 0.5
"""Examples that each class is taken to have for how frequent it is (Jeffreys)."""
_LEAST_WITHIN = 0.1
"""Of all scatter, what is taken for that within classes at least."""
_TEMPERED = 2.0
"""Nats for each square of its logarithm that the temperature costs: it is held to where the Gaussians are believed."""
_KNOWN = 2000
"""Inputs that a head remembers."""
_LEAST = 1e-12


@dataclass(frozen=True)
class Fitted:
    """A head, and for every row what a head says of it that was not fitted on it or on any row of the same text."""

    head: Head
    held_back: list[HeadAnswer]


class Encodings:
    """An encoder that remembers: each text is encoded once. ``given`` are embeddings by text that are there already."""

    def __init__(self, encoder: Encoder, given: Mapping[str, NDArray[Any]] | None = None) -> None:
        self._encoder = encoder
        self._by_text = dict(given or {})

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """As `Encoder.encode`."""
        new = list(dict.fromkeys(text for text in texts if text not in self._by_text))
        if new:
            self._by_text.update(zip(new, self._encoder.encode(new), strict=True))
        return np.array([self._by_text[text] for text in texts], np.float32)


def fit_head(
    schema: Schema,
    inputs: Sequence[Mapping[str, Any]],
    outputs: Sequence[Mapping[str, Any]],
    *,
    encoder: Encoder,
    weights: Sequence[float] | None = None,
    embeddings: Embeddings | None = None,
    seed: int = 0,
) -> Fitted:
    """Fit a head on rows of inputs and the remote's outputs, one row at least.

    ``schema`` is the outputs'. A row whose output has a value that the schema does not list teaches nothing of that
    field. ``weights``, above 0, say how much each row counts. ``embeddings`` spare the encoder: by text, or as
    [rows, dimensions] those of each input as a whole. ``seed`` draws the inputs that are remembered.

    Raises ValueError without rows, for rows of unequal number, for weights not above 0, and for a schema without a
    finite field.
    """
    fields = _checked(schema, inputs, outputs, weights)
    encodings = _encodings(encoder, inputs, embeddings)
    return _fit(fields, inputs, outputs, encoder, encodings, weights, seed)


def _checked(
    schema: Schema,
    inputs: Sequence[Mapping[str, Any]],
    outputs: Sequence[Mapping[str, Any]],
    weights: Sequence[float] | None,
) -> dict[str, tuple[Any, ...]]:
    fields = finite_fields(schema)
    if not fields:
        raise ValueError("the output schema has no field with a finite set of values, so a head has nothing to answer")
    if not len(inputs) == len(outputs) == (len(inputs) if weights is None else len(weights)) or not inputs:
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs; a head needs as many of each, 1 at least")
    if weights is not None and not all(0.0 < weight < math.inf for weight in weights):
        raise ValueError("a row's weight is to be a number above 0")
    return fields


def _encodings(encoder: Encoder, inputs: Sequence[Mapping[str, Any]], given: Embeddings | None) -> Encodings:
    if isinstance(given, np.ndarray):
        if given.ndim != 2 or len(given) != len(inputs):
            raise ValueError(
                f"embeddings are {given.shape}; [{len(inputs)}, dimensions] is meant, or a mapping by text"
            )
        given = dict(zip(map(whole_text, inputs), given, strict=True))
    return Encodings(encoder, given)


def _fit(
    fields: Mapping[str, tuple[Any, ...]],
    inputs: Sequence[Mapping[str, Any]],
    outputs: Sequence[Mapping[str, Any]],
    encoder: Encoder,
    encodings: Encodings,
    weights: Sequence[float] | None,
    seed: int,
) -> Fitted:
    keys: dict[str, int] = {}
    group = np.array([keys.setdefault(_key(one), len(keys)) for one in inputs])
    firsts = np.unique(group, return_index=True)[1]
    plan = Plan.of(inputs)
    x, place = plan.vectors([inputs[at] for at in firsts], encodings.encode)
    weight = np.ones(len(inputs)) if weights is None else np.asarray(weights, np.float64)
    layers, left_out = {}, {}
    for name, values in fields.items():
        where = {compact_json(value): at for at, value in enumerate(values)}
        said = np.array([where.get(compact_json(output.get(name)), -1) for output in outputs])
        mass = np.zeros((len(firsts), len(values)))
        np.add.at(mass, (group[said >= 0], said[said >= 0]), weight[said >= 0])
        layers[name], left_out[name] = _fit_field(x, mass)
    draw = np.random.default_rng(seed)
    kept = np.sort(draw.permutation(len(firsts))[:_KNOWN])
    known = place[kept].astype(np.float16)
    head = Head(fields, encoder, plan, layers, known)
    far = _distances_to_others(place, kept, known)
    answers = [HeadAnswer({name: p[at] for name, p in left_out.items()}, float(far[at])) for at in range(len(firsts))]
    return Fitted(head, [answers[at] for at in group])


def _key(value: Mapping[str, Any]) -> str:
    return " ".join(whole_text(value).casefold().split())


def _distances_to_others(place: Floats, kept: NDArray[np.intp], known: NDArray[np.float16]) -> Floats:
    wide = known.astype(np.float32)
    far = distances(place, wide)
    cosines = place[kept].astype(np.float32) @ wide.T
    np.fill_diagonal(cosines, -1.0)
    far[kept] = np.clip(1.0 - cosines.max(axis=1), 0.0, 1.0) if len(kept) > 1 else 1.0
    return far


def _fit_field(x: Floats, mass: Floats) -> tuple[Layer, Floats]:
    """A layer and, [rows, values], what it would be without each row says of it.

    x: [rows, features]. mass: [rows, values], how much a row counts for each value, which may be nothing.
    """
    taught = mass.sum(axis=1) > 0.0
    values = mass.shape[1]
    total = mass.sum(axis=0)
    bias = np.log((total + _PRIOR) / (total.sum() + _PRIOR * values))
    if taught.sum() < 2 or values < 2:
        layer = Layer(np.zeros((x.shape[1], values), np.float32), bias.astype(np.float32))
        others = total - mass
        left = (others + _PRIOR) / (others.sum(axis=1, keepdims=True) + _PRIOR * values)
        return layer, left
    analysis = _Analysis(x[taught], mass[taught])
    best = None
    for at, ridge in enumerate(analysis.ridges()):
        logits, priors = analysis.left_out(ridge)
        loss, temperature = _temperature(logits, priors, mass[taught])
        loss += _SMALLER * at / analysis.total
        if best is None or loss < best[0]:
            best = loss, ridge, temperature, logits, priors
    assert best is not None
    _, ridge, temperature, logits, priors = best
    weights, constant = analysis.linear(ridge)
    layer = Layer((temperature * weights).astype(np.float32), (temperature * constant + bias).astype(np.float32))
    left = softmax(x @ layer.weights.astype(np.float64) + layer.bias)  # of rows that taught nothing
    left[taught] = softmax(temperature * logits + priors)
    return layer, left


class _Analysis:
    """A linear discriminant analysis of rows with each of several ridges.

    In the basis of the eigenvectors of W (or, of fewer rows than features, of their span) Q^-1 is diagonal.
    """

    def __init__(self, x: Floats, mass: Floats) -> None:
        self.mass = mass
        self.by_value = mass.sum(axis=0)
        self.total = float(self.by_value.sum())
        self.row = mass.sum(axis=1)
        self.mean = self.row @ x / self.total
        self.x = x - self.mean
        self.sums = mass.T @ self.x
        means = self.sums / np.maximum(self.by_value, _LEAST)[:, None]
        rows, values = np.nonzero(mass)
        within = (self.x[rows] - means[values]) * np.sqrt(mass[rows, values])[:, None]
        if len(within) < x.shape[1]:
            found, vectors = np.linalg.eigh(within @ within.T)
            there = found > 1e-10 * max(float(found[-1]), _LEAST)
            self.eigenvalues = found[there]
            self.basis = within.T @ (vectors[:, there] / np.sqrt(self.eigenvalues))
        else:
            found, self.basis = np.linalg.eigh(within.T @ within)
            self.eigenvalues = np.maximum(found, 0.0)
        # Of values seen once each W knows nothing; then the scatter around the overall mean has to do.
        around = float(np.einsum("n,nd->", self.row, self.x * self.x))
        self.spread = max(float(self.eigenvalues.sum()), _LEAST_WITHIN * around, _LEAST) / x.shape[1]
        # Inner products in Q^-1 of rows and sums, as a part in the span and one outside it that the ridge alone scales.
        self.inside = self.x @ self.basis
        self.sums_inside = self.sums @ self.basis
        self.is_whole = self.basis.shape[1] == x.shape[1]
        self.outside = None if self.is_whole else self.x - self.inside @ self.basis.T
        self.sums_outside = None if self.is_whole else self.sums - self.sums_inside @ self.basis.T
        self.mixed = np.flatnonzero((mass > 0.0).sum(axis=1) > 1)

    def ridges(self) -> list[float]:
        return [ridge * self.spread for ridge in _RIDGES]

    def left_out(self, ridge: float) -> tuple[Floats, Floats]:
        """Of every row, with all of it left out: -1/2 of the squared distance to each mean, and the log priors."""
        z, sums = self._scaled(ridge)
        own, rest = self.mass, np.maximum(self.total - self.row, _LEAST)
        counts = self.by_value - own + _TOWARDS_MEAN
        # Without the row the mean of a value is (S - own z + mean' ) / counts, and the overall mean' = -row z / rest;
        # x lies p z - q S off it.
        p = 1.0 + (own + _TOWARDS_MEAN * (self.row / rest)[:, None]) / counts
        q = 1.0 / counts
        cross, square, sums_square = z @ sums.T, np.einsum("nd,nd->n", z, z), np.einsum("vd,vd->v", sums, sums)
        off = p * p * square[:, None] - 2.0 * p * q * cross + q * q * sums_square
        value = own.argmax(axis=1)
        rows = np.arange(len(z))
        means = sums / np.maximum(self.by_value, _LEAST)[:, None]
        # r = z - mean of its own value, and how it lies to what x lies off each mean.
        r_z = square - np.einsum("nd,nd->n", z, means[value])
        r_sums = cross - (means @ sums.T)[value]
        r_r = r_z - r_sums[rows, value] / np.maximum(self.by_value, _LEAST)[value]
        n, w = self.by_value[value], own[rows, value]
        taken = np.where(n - w > 1e-9 * n, w * n / np.maximum(n - w, _LEAST), 0.0)
        along = p * r_z[:, None] - q * r_sums
        off += (taken / np.maximum(1.0 - taken * r_r, _LEAST))[:, None] * along * along
        for row in self.mixed:
            off[row] = self._mixed(int(row), z[row], sums, means, p[row], q[row])
        priors = np.log((self.by_value - own + _PRIOR) / (rest + _PRIOR * own.shape[1])[:, None])
        return -0.5 * off, priors

    def _mixed(self, row: int, z: Floats, sums: Floats, means: Floats, p: Floats, q: Floats) -> Floats:
        """The squared distances of a row that counts for several values: a change of that rank (Woodbury 1950)."""
        off = p[:, None] * z - q[:, None] * sums
        values = np.flatnonzero(self.mass[row])
        n, w = self.by_value[values], self.mass[row, values]
        taken = np.where(n - w > 1e-9 * n, w * n / np.maximum(n - w, _LEAST), 0.0)
        r = np.sqrt(taken)[:, None] * (z - means[values])
        along = off @ r.T
        inner = np.linalg.solve(np.eye(len(values)) - r @ r.T, along.T)
        return np.asarray(np.einsum("vd,vd->v", off, off) + np.einsum("vk,kv->v", along, inner))

    def linear(self, ridge: float) -> tuple[Floats, Floats]:
        """Weights [features, values] and constants [values] of the logits of a row as it comes."""
        means = self.sums / (self.by_value + _TOWARDS_MEAN)[:, None]
        inside = means @ self.basis
        weights = (inside / (self.eigenvalues + ridge)) @ self.basis.T
        if not self.is_whole:
            weights += (means - inside @ self.basis.T) / ridge
        constant = -0.5 * np.einsum("vd,vd->v", weights, means) - weights @ self.mean
        return weights.T, constant

    def _scaled(self, ridge: float) -> tuple[Floats, Floats]:
        """Rows and sums, scaled so that plain inner products are those in Q^-1."""
        scale = 1.0 / np.sqrt(self.eigenvalues + ridge)
        z, sums = self.inside * scale, self.sums_inside * scale
        if self.outside is not None and self.sums_outside is not None:
            z = np.hstack([z, self.outside / math.sqrt(ridge)])
            sums = np.hstack([sums, self.sums_outside / math.sqrt(ridge)])
        return z, sums


def _temperature(logits: Floats, priors: Floats, mass: Floats) -> tuple[float, float]:
    """The least penalised mean log-loss of softmax(t logits + priors), and its t."""
    rows, values = np.nonzero(mass)
    weight = mass[rows, values]
    total = float(weight.sum())
    logits = logits - logits.max(axis=1, keepdims=True)

    def loss(log_t: float) -> float:
        z = (total * math.exp(log_t)) * logits + priors
        z -= z.max(axis=1, keepdims=True)
        norm = np.log(np.exp(z).sum(axis=1))
        return (float((weight * (norm[rows] - z[rows, values])).sum()) + _TEMPERED * log_t**2) / total

    places = np.log(_TEMPERATURES)
    at = int(np.argmin([loss(place) for place in places]))
    low, high = float(places[max(at - 1, 0)]), float(places[min(at + 1, len(places) - 1)])
    golden = (math.sqrt(5.0) - 1.0) / 2.0
    for _ in range(10):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    log_t = (low + high) / 2.0
    return loss(log_t), total * math.exp(log_t)
