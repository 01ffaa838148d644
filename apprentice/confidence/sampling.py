"""How often the served slice is checked: correlation -> sampling rate.

Every curve is 1 at or below the coaching trigger and ``floor`` at a correlation of 1, and never rises in between.
``next_rate`` then makes it a process: it rises at once and falls by at most a factor per comparison, so that a task
that graduates glides down from checking everything.
"""

from __future__ import annotations

import importlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from apprentice.errors import ApprenticeError
from apprentice.registry import DECAY, Plugin, RegistryError

__all__ = [
    "CURVES",
    "Curve",
    "Decay",
    "as_text",
    "curve",
    "exponential",
    "linear",
    "next_rate",
    "step",
    "tabulate",
    "target_rate",
]

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


class Decay(Plugin, ABC):
    """The base class of a decay function that has options; without any, a function does."""

    @classmethod
    @abstractmethod
    def configured(cls, options: Any) -> Curve:
        """Made from an instance of ``Options``, None without one."""


CURVES: dict[str, Curve] = {"linear": linear, "exponential": exponential, "step": step}
"""Those that `sampling.decay_function` names."""


def as_text(options: Mapping[str, Any]) -> str:
    """A decay function's options as `curve` takes them."""
    return json.dumps(options, sort_keys=True, default=str) if options else ""


@lru_cache(maxsize=64)
def curve(name: str, options: str = "") -> Curve:
    """The curve called ``name``, ours or an installed package's, or the function at ``module:function``.

    Raises ApprenticeError where there is none.
    """
    module, _, attribute = name.partition(":")
    if not attribute:
        return _registered(name, options)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ApprenticeError(f"sampling.decay_function {name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ApprenticeError(f"sampling.decay_function {name!r} is a {type(found).__name__}, not a function")
    result: Curve = found
    return result


def _registered(name: str, options: str) -> Curve:
    try:
        found = DECAY.find(name)
        chosen = DECAY.options(found, json.loads(options) if options else {}, "decay_options")
    except RegistryError as error:
        raise ApprenticeError(
            f"sampling.decay_function {error} Or write module:function, taking (correlation, trigger, floor) and "
            "returning a rate."
        ) from error
    result: Curve = found.made.configured(chosen) if found.is_class else found.made
    return result


@lru_cache(maxsize=64)
def tabulate(name: str, *, trigger: float, floor: float, options: str = "") -> tuple[float, ...]:
    """A curve of somebody else's at `POINTS` correlations from ``trigger`` to 1; nothing for the built-in ones.

    It is called for these alone, and once: a function of somebody else's must not run where the rate is set, inside a
    transaction. Raises ApprenticeError if it raises, or returns something that is not a rate.
    """
    if name in CURVES:
        return ()
    function = curve(name, options)
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


def target_rate(
    name: str, correlation: float, *, trigger: float, floor: float, drop: float = 0.0, options: str = ""
) -> float:
    """The rate that ``correlation`` asks for, were it to fall by ``drop`` once more.

    A curve of the user's own is held to the promises that no curve may break: 1 at or below the trigger, never below
    ``floor``. Between two of its tabulated points the higher rate holds. Raises ApprenticeError; see `tabulate`.
    """
    expected = correlation - max(0.0, drop)
    if expected <= trigger:
        return 1.0
    if name in CURVES:
        return min(1.0, max(floor, CURVES[name](expected, trigger, floor)))
    rates = tabulate(name, trigger=trigger, floor=floor, options=options)
    place = _progress(expected, trigger) * (POINTS - 1)
    return max(rates[math.floor(place)], rates[math.ceil(place)])


def next_rate(current: float, target: float, *, max_fall: float) -> float:
    """One comparison later: up at once, down by no more than the share ``max_fall`` of the current rate."""
    return target if target >= current else max(target, current * (1.0 - max_fall))
