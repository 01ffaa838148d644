"""Certifying a mean by betting on it.

``rho >= tau`` holds exactly when X = (1 - tau)(1 - c) - (1 - s) has mean >= 0, and ``disagreement <= epsilon`` when
X = epsilon - (1 - s) has. X is at least -1. Bet the fraction lambda of the capital on every comparison:

    W = sum over lambda of prior(lambda) * prod (1 + lambda * w_i * X_i)

While the mean is at most 0 each factor has mean at most 1, so W is a test supermartingale, and by Ville's inequality
it ever reaches 1/delta with probability at most delta, however often it is looked at (Waudby-Smith and Ramdas 2024).

**Weights.** Comparisons are bought with different probabilities: a deferred request always, a served one only when a
spot check falls on it. A comparison bought with probability p while the sampling rate was r therefore bets
w_i * X_i with w_i = r / p in [0, 1]: whatever the request is like, it then contributes r * E[X] on average, so the
supermartingale above holds for the traffic and not for whatever happened to be bought. This beats using only the
comparisons that the draw would have bought anyway, because log is concave: log(1 + lambda r X) >= r log(1 + lambda X).
Weighting by 1 / p instead would need lambda <= p and is the same bet written differently.

**Exactness.** For disagreement the statement is exact. For correlation c is measured against recent answers, so it is
exact for these and asymptotic for the correlation itself; ``benchmarks/trust.py`` simulates it.

**The prior** over lambda is not uniform: what decides how long a good model waits is how quickly the sizes of bet
that suit it dominate, and a model barely better than its target (which the small sizes suit) waits long anyway.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

__all__ = ["LAMBDAS", "LOG_PRIOR", "PRIOR", "discounted", "excess", "log_stakes", "wealth"]

LAMBDAS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
PRIOR = (0.02, 0.03, 0.06, 0.12, 0.18, 0.22, 0.22, 0.15)
LOG_PRIOR = tuple(math.log(share) for share in PRIOR)


def excess(score: float, chance: float, *, correlation: float, max_disagreement: float | None) -> float:
    """X, whose mean is at least 0 exactly where the target is met.

    The target is ``max_disagreement`` where one is given, else ``correlation``.
    """
    if max_disagreement is not None:
        return max_disagreement - (1.0 - score)
    return (1.0 - correlation) * (1.0 - chance) - (1.0 - score)


# Scores and chance scores of labels take few values, so the logarithms repeat.
@lru_cache(maxsize=8192)
def log_stakes(x: float, weight: float = 1.0) -> tuple[float, ...]:
    """log(1 + lambda * weight * x) for each size of bet; ``x`` >= -1 and ``weight`` in [0, 1]."""
    wx = weight * x
    return tuple(math.log1p(size * wx) for size in LAMBDAS)


def wealth(log_capital: Sequence[float]) -> float:
    """What the capital behind all sizes of bet is worth together; 1.0 for LOG_PRIOR. Infinity where it overflows."""
    try:
        return sum(map(math.exp, log_capital))
    except OverflowError:
        return math.inf


def discounted(wealth: float, design_effect: float) -> float:
    """What ``wealth`` is worth where ``design_effect`` comparisons say as much as one: its root of that order.

    Log wealth grows with the number of comparisons, so it is as if there were that many fewer. Below 1 it stays.
    """
    return wealth ** (1.0 / design_effect) if wealth > 1.0 else wealth
