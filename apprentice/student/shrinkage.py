"""The two fits behind a combiner, both shrunk: a blend's weights, and a logistic regression with an offset.

Their matrices are long and thin: einsum takes them as they are, where a BLAS with threads would lose more time to
waking these than there is to compute.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from apprentice.student.pooling import Floats, Logistic, Seen

__all__ = ["Booleans", "Integers", "fit_logistic", "fit_weights"]

type Integers = NDArray[np.int64]
type Booleans = NDArray[np.bool_]

_WEIGHT_PENALTY = 4.0
"""Of a blend's weights: as much as four examples that each carry unit information on a weight."""
_PENALTY = 6.0
"""Of a regression's coefficients, on features scaled to a standard deviation of 1."""
_CONSTANT_PENALTY = 1.0
_SAFE = 0.69
"""Just less than log 2."""


def fit_weights(seen: Seen, said: Integers, learn: Booleans) -> tuple[float, float]:
    """The blend's weights, at least 0, by penalised maximum likelihood. ``said``: which value, -1 for none of them."""
    known = np.flatnonzero(learn & (said >= 0))
    if not len(known):
        return seen.even
    z = np.stack([logs[known] for logs in seen.logs])
    y = said[known]
    start = np.array(seen.there(seen.even))
    weights = _newton_weights(z, y, start)
    while (weights < 0).any():
        kept = weights > 0
        weights = np.zeros(len(start))
        if kept.any():
            weights[kept] = _newton_weights(z[kept], y, start[kept])
    return 0.0 if seen.head is None else float(weights[0]), 0.0 if seen.lora is None else float(weights[-1])


def _newton_weights(z: Floats, y: Integers, prior: Floats) -> Floats:
    """Maximise sum_i log softmax(w . z_i)[y_i] - penalty / 2 |w - prior|^2. z: [halves, examples, values].

    It is concave: Newton's steps, halved where they go too far.
    """
    w = prior.copy()
    rows = np.arange(len(y))
    picked = z[:, rows, y]

    def objective(w: Floats) -> tuple[float, Floats]:
        logits = np.einsum("h,hnv->nv", w, z)
        logits -= logits.max(axis=-1, keepdims=True)
        likely = logits[rows, y]
        p = np.exp(logits, out=logits)
        norm = p.sum(axis=-1, keepdims=True)
        penalty = _WEIGHT_PENALTY / 2 * ((w - prior) ** 2).sum()
        p /= norm
        return float((likely - np.log(norm[:, 0])).sum() - penalty), p

    value, p = objective(w)
    for _ in range(50):
        weighed = z * p
        mean = weighed.sum(axis=-1)
        gradient = (picked - mean).sum(axis=-1) - _WEIGHT_PENALTY * (w - prior)
        second = np.einsum("hnv,knv->hk", weighed, z) - np.einsum("hn,kn->hk", mean, mean)
        step = np.linalg.solve(second + _WEIGHT_PENALTY * np.eye(len(w)), gradient)
        size = 1.0
        better, q = objective(w + step)
        while better < value and size > 1e-4:
            size /= 2
            better, q = objective(w + size * step)
        if better <= value + 1e-6:
            break
        w, value, p = w + size * step, better, q
    return w


def fit_logistic(x: Floats, offset: Floats, target: Floats) -> Logistic:
    """Penalised logistic regression with an offset; targets may lie between 0 and 1. x: [examples, features]."""
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    z = np.vstack([np.ones(len(x)), ((x - mean) / scale).T])
    penalty = np.array([_CONSTANT_PENALTY, *[_PENALTY] * x.shape[1]])
    least = np.diag(penalty)
    b, logits = np.zeros(len(z)), offset

    def objective(b: Floats, logits: Floats) -> float:
        return float((target * logits - np.logaddexp(0.0, logits)).sum() - (penalty * b * b).sum() / 2)

    for _ in range(50):
        p = 1.0 / (1.0 + np.exp(-np.minimum(np.maximum(logits, -30.0), 30.0)))
        gradient = np.einsum("kn,n->k", z, target - p) - penalty * b
        # At least a little curvature: a step from where all is certain would fly off.
        curvature = np.maximum(p * (1.0 - p), 0.01)
        step = np.linalg.solve(np.einsum("jn,kn->jk", z * curvature, z) + least, gradient)
        change = np.einsum("k,kn->n", step, z)
        # Where no logit changes by more than log 2, no curvature more than doubles, and the step cannot go too far.
        while np.abs(change).max() > _SAFE and objective(b + step, logits + change) < objective(b, logits):
            step, change = step / 2, change / 2
        b, logits = b + step, logits + change
        if np.abs(step).max() < 1e-6:
            break
    return Logistic(float(b[0]), mean.tolist(), scale.tolist(), b[1:].tolist())
