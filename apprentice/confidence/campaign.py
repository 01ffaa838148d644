"""When it pays to check more for a while than agreement asks for.

The rate falls as a slice proves itself, and with it the pace at which a wider one is decided: comparisons of served
answers become few, and those of deferred ones, which are bought anyway, bet only as much as the rate (see `certify`).
Whatever is deferred meanwhile is paid for. So a higher rate is worth its checks where the forecast says that the wider
slice then comes so much sooner that it saves more than they cost: a campaign. What is saved is counted within as many
requests again as were answered so far; what lies farther off is not believed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from apprentice.confidence.forecast import Widening, saved

__all__ = ["EVERY", "campaign_rate"]

RATES = (0.1, 0.25, 0.5, 1.0)
"""What a campaign may check of the served answers."""
EVERY = 25
"""Comparisons after which it is looked at anew: its price, and whether the evidence still supports it."""
MARGIN, LEAST = 1.05, 5.0
"""A campaign must save this many times what goes on without it, and this many remote answers more."""


def campaign_rate(
    expected: Callable[[float], Sequence[Widening]], *, coverage: float, horizon: float, rate: float
) -> float:
    """The sampling rate in (``rate``, 1] at which most is saved within ``horizon`` requests; 0.0 where none pays.

    ``expected`` says which widenings are to be expected at a rate (`forecast.widenings`); ``coverage`` is the share
    that is served now.
    """
    best, found = MARGIN * _most(expected(rate), coverage, horizon) + LEAST, 0.0
    for higher in RATES:
        if higher > rate:
            worth = _most(expected(higher), coverage, horizon)
            if worth > best:
                best, found = worth, higher
    return found


def _most(widenings: Sequence[Widening], coverage: float, horizon: float) -> float:
    return max([0.0, *(saved(one, coverage, horizon) for one in widenings)])
