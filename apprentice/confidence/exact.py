"""One exact test beside the bets: Binomial, at a third of the error, as soon as there are enough comparisons.

Bets may be looked at after every comparison, and pay for it: what is looked at only once may be tested with all of its
error at that moment. While every comparison counts in full and its score is 0 or 1, the number that differ among the n
in a slice is Binomial(n, p), and p > epsilon is refuted with an error of at most alpha if

    P(Binomial(n, epsilon) <= number that differ) <= alpha

(Clopper and Pearson 1934). The slices are tested in a fixed sequence, from one that the confidences themselves promise
up to everything, each with all of alpha, until one is not refuted. To certify any of them wrongly, the first slice
above epsilon must be refuted, which happens with probability at most alpha (fixed-sequence testing; compare
Angelopoulos et al. 2021, Learn then Test). With the bets at the rest of the error, both together are wrong with at most
its whole.

It pays where evidence is short: after 300 comparisons it certifies up to a fifth of the traffic more, after 1,000 about
a hundredth less, for the part of the error that the bets do without.
"""

from __future__ import annotations

import math

__all__ = ["ENTRY", "FEWEST", "SHARE", "p_value"]

SHARE = 1.0 / 3.0
"""The part of the error that the test has."""
FEWEST = 300
"""Comparisons, of the whole traffic, at the first look with so many of which it is made."""
ENTRY = 0.8
"""It begins with a slice of this part of the one that the confidences promise: there most of the error is not lost."""


def p_value(differ: int, n: int, limit: float) -> float:
    """P(Binomial(n, limit) <= differ), for ``limit`` in [0, 1]; 1 if nothing was seen."""
    if differ >= n or limit <= 0.0:
        return 1.0
    if limit >= 1.0:
        return 0.0
    odds = math.log(limit) - math.log1p(-limit)
    term = n * math.log1p(-limit)  # of none that differ
    total = 0.0
    for k in range(differ + 1):
        total += math.exp(term)
        term += math.log((n - k) / (k + 1)) + odds
    return min(1.0, total)
