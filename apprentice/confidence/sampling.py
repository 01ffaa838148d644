"""How often the served slice is checked: correlation -> sampling rate.

Every curve is 1 at or below the coaching trigger and ``floor`` at a correlation of 1, and never rises in between.
``next_rate`` then makes it a process: it rises at once and falls by at most a factor per comparison, so that a task
that graduates glides down from checking everything.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import lru_cache

from apprentice.errors import ApprenticeError

__all__ = ["CURVES", "Curve", "curve", "exponential", "linear", "next_rate", "step", "tabulate", "target_rate"]

type Curve = Callable[[float, float, float], float]
"""(correlation, trigger, floor) -> rate in [floor, 1]."""

STEPS = 4
POINTS = 1001


def _progress(correlation: float, trigger: float) -> float:
    """Where the correlation stands between the trigger (0) and perfection (1)."""
    if trigger >= 1.0:
        return 0.0 if correlation < 1.0 else 1.0
    return min(1.0, max(0.0, (correlation - trigger) / (1.0 - trigger)))


def linear(correlation: float, trigger: float, floor: float) -> float:
    """A straight line from 1 to ``floor``."""
    return 1.0 - (1.0 - floor) * _progress(correlation, trigger)


def exponential(correlation: float, trigger: float, floor: float) -> float:
    """A straight line in the logarithm: every gain in correlation saves the same share of the checks left."""
    return math.pow(floor, _progress(correlation, trigger))


def step(correlation: float, trigger: float, floor: float) -> float:
    """Four stairs, each as high as the straight line at its left edge; only perfection reaches ``floor``."""
    stair = math.floor(_progress(correlation, trigger) * STEPS) / STEPS
    return 1.0 - (1.0 - floor) * stair


CURVES: dict[str, Curve] = {"linear": linear, "exponential": exponential, "step": step}


@lru_cache(maxsize=64)
def curve(name: str) -> Curve:
    """The curve called ``name``, or the function at ``module:function``.

    Raises ApprenticeError where there is none.
    """
    if name in CURVES:
        return CURVES[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ApprenticeError(
            f"sampling.decay_function is {name!r}; use one of {', '.join(CURVES)}, or module:function "
            "taking (correlation, trigger, floor) and returning a rate"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ApprenticeError(f"sampling.decay_function {name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ApprenticeError(f"sampling.decay_function {name!r} is a {type(found).__name__}, not a function")
    result: Curve = found
    return result


@lru_cache(maxsize=64)
def tabulate(name: str, *, trigger: float, floor: float) -> tuple[float, ...]:
    """A curve of the user's own at `POINTS` correlations from ``trigger`` to 1; nothing for the built-in ones.

    It is called for these alone, and once: a function of somebody else's must not run where the rate is set, inside a
    transaction. Raises ApprenticeError if it raises, or returns something that is not a rate.
    """
    if name in CURVES:
        return ()
    function = curve(name)
    rates = []
    for i in range(POINTS):
        correlation = trigger + (1.0 - trigger) * i / (POINTS - 1)
        try:
            rate = function(correlation, trigger, floor)
        except Exception as error:
            raise ApprenticeError(
                f"sampling.decay_function {name!r} raised {type(error).__name__} for correlation {correlation:.3f}: "
                f"{error}"
            ) from error
        if not isinstance(rate, int | float) or math.isnan(rate):
            raise ApprenticeError(
                f"sampling.decay_function {name!r} returned {rate!r} for correlation {correlation:.3f}; "
                "it must return a rate"
            )
        rates.append(min(1.0, max(floor, float(rate))))
    return tuple(rates)


def target_rate(name: str, correlation: float, *, trigger: float, floor: float, drop: float = 0.0) -> float:
    """The rate that ``correlation`` asks for, were it to fall by ``drop`` once more.

    A curve of the user's own is held to the promises that no curve may break: 1 at or below the trigger, never below
    ``floor``. Between two of its tabulated points the higher rate holds. Raises ApprenticeError; see `tabulate`.
    """
    expected = correlation - max(0.0, drop)
    if expected <= trigger:
        return 1.0
    if name in CURVES:
        return min(1.0, max(floor, CURVES[name](expected, trigger, floor)))
    rates = tabulate(name, trigger=trigger, floor=floor)
    place = _progress(expected, trigger) * (POINTS - 1)
    return max(rates[math.floor(place)], rates[math.ceil(place)])


def next_rate(current: float, target: float, *, max_fall: float) -> float:
    """One comparison later: up at once, down by no more than the share ``max_fall`` of the current rate."""
    return target if target >= current else max(target, current * (1.0 - max_fall))
