"""Sampling: how often a task of a given correlation is checked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.confidence.sampling import CURVES, curve, next_rate, target_rate
from apprentice.errors import ApprenticeError

RHO, TRIGGER, FLOOR = st.floats(-1.0, 1.0), st.floats(0.0, 1.0), st.floats(0.001, 0.5)


@given(st.sampled_from(sorted(CURVES)), RHO, RHO, TRIGGER, FLOOR)
def test_more_correlation_never_means_more_checks(name: str, one: float, two: float, trigger: float, floor: float):
    """Every curve falls, stays between the floor and 1, and is 1 at or below the trigger."""
    low, high = sorted((one, two))
    rates = [target_rate(name, rho, trigger=trigger, floor=floor) for rho in (low, high)]
    assert rates[1] <= rates[0] + 1e-12
    assert all(floor - 1e-12 <= rate <= 1.0 for rate in rates)
    assert target_rate(name, trigger, trigger=trigger, floor=floor) == 1.0


@pytest.mark.parametrize("name", sorted(CURVES))
def test_perfection_is_checked_at_the_floor(name: str):
    """At a correlation of 1 every curve reaches the floor, and never less."""
    assert target_rate(name, 1.0, trigger=0.7, floor=0.02) == pytest.approx(0.02)


@pytest.mark.parametrize(("name", "rate"), [("linear", 0.51), ("exponential", 0.02**0.5), ("step", 0.51)])
def test_half_way(name: str, rate: float):
    """Half way between trigger and perfection."""
    assert target_rate(name, 0.85, trigger=0.7, floor=0.02) == pytest.approx(rate)


def test_a_falling_trend_is_checked_as_if_it_went_on():
    """A drop counts once more: .94 after a drop of .09 is checked like .85."""
    falling = target_rate("linear", 0.94, trigger=0.7, floor=0.02, drop=0.09)
    assert falling == pytest.approx(target_rate("linear", 0.85, trigger=0.7, floor=0.02))
    assert target_rate("linear", 0.94, trigger=0.7, floor=0.02, drop=-1.0) < falling


@given(st.floats(0.001, 1.0), st.floats(0.001, 1.0), st.floats(0.5, 0.99))
def test_up_at_once_down_slowly(current: float, target: float, fall: float):
    """A higher target is taken at once; a lower one is approached by the factor and not overshot."""
    rate = next_rate(current, target, max_fall=fall)
    if target >= current:
        assert rate == target
    else:
        assert rate == max(target, current * (1.0 - fall))


def low(correlation: float, trigger: float, floor: float) -> float:
    """A curve of a user's own that asks for less than the floor."""
    return 0.0


def broken(correlation: float, trigger: float, floor: float) -> float:
    """A curve of a user's own that is not one."""
    return float("nan")


def test_a_curve_of_the_users_own(monkeypatch: pytest.MonkeyPatch):
    """module:function is called, and held to the floor and the trigger."""
    import statistics

    monkeypatch.setattr(statistics, "apprentice_low", low, raising=False)
    monkeypatch.setattr(statistics, "apprentice_broken", broken, raising=False)
    assert target_rate("statistics:apprentice_low", 0.9, trigger=0.7, floor=0.03) == 0.03
    assert target_rate("statistics:apprentice_low", 0.6, trigger=0.7, floor=0.03) == 1.0
    with pytest.raises(ApprenticeError, match="returned nan"):
        target_rate("statistics:apprentice_broken", 0.9, trigger=0.7, floor=0.03)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lineer", "Did you mean 'linear'.*Known: exponential, linear, step"),
        ("no_such_module:f", "cannot be imported"),
        ("math:no_such_function", "cannot be imported"),
        ("math:pi", "is a float, not a function"),
    ],
)
def test_a_curve_that_is_none(name: str, message: str):
    """Each way of naming no curve has its own message."""
    with pytest.raises(ApprenticeError, match=message):
        curve(name)
