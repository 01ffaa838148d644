"""A change of the remote told from a fall of the local model, in worlds in which the truth is known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.confidence.arbiter import ERROR, Reasked, judge_remote, needs_arbiter, tail
from apprentice.confidence.drift import Guard

LABELS = 5
ASKED = 40


@dataclass
class Remote:
    """A remote whose answer to an input is steady on most of them and a toss of two labels on the share ``noise``.

    Since ``changed`` it answers the share ``change`` of the inputs differently.
    """

    noise: float
    change: float = 0.0
    changed: bool = False

    def answer(self, value: int, draw: random.Random) -> int:
        own = random.Random(value)
        said, tossed, moved = own.randrange(LABELS), own.random() < self.noise, own.random() < self.change
        if tossed and draw.random() < 0.5:
            said = (said + 1) % LABELS
        return (said + 2) % LABELS if moved and self.changed else said


def ask_again(remote: Remote, stored: Sequence[tuple[int, int]], draw: random.Random) -> list[Reasked]:
    """What `judge_remote` is given: each input asked again, and a third time where the answers differ."""
    seen = []
    for value, old in stored:
        new = remote.answer(value, draw)
        score = float(new == old)
        side = None
        if needs_arbiter(score):
            third = remote.answer(value, draw)
            side = float(third == new) - float(third == old)
        seen.append(Reasked(score, side))
    return seen


def share_of(worlds: int, world: Callable[[random.Random], bool]) -> float:
    return sum(world(random.Random(seed)) for seed in range(worlds)) / worlds


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3, 0.8, 1.0])
def test_a_noisy_remote_is_not_a_changed_one(noise: float) -> None:
    """However noisy it is: at most the stated error says so, over 2,000 worlds (3 errors)."""

    def world(draw: random.Random) -> bool:
        remote = Remote(noise)
        values = [draw.randrange(10**9) for _ in range(ASKED)]
        stored = [(value, remote.answer(value, draw)) for value in values]
        return judge_remote(ask_again(remote, stored, draw)).changed

    assert share_of(2000, world) <= ERROR + 3 * math.sqrt(ERROR * (1 - ERROR) / 2000)


@pytest.mark.parametrize(("noise", "change", "least"), [(0.0, 0.3, 0.95), (0.1, 0.4, 0.9), (0.3, 0.5, 0.9)])
def test_a_changed_remote_is_found(noise: float, change: float, least: float) -> None:
    """Forty inputs tell of a change of a third, also where a tenth or more of the answers are tosses."""

    def world(draw: random.Random) -> bool:
        remote = Remote(noise, change)
        values = [draw.randrange(10**9) for _ in range(ASKED)]
        stored = [(value, remote.answer(value, draw)) for value in values]
        remote.changed = True
        return judge_remote(ask_again(remote, stored, draw)).changed

    assert share_of(300, world) >= least


def alarmed(
    remote: Remote, local_falls: bool, draw: random.Random, *, level: float, requests: int = 4000
) -> tuple[list[tuple[int, int]], int] | None:
    """A stream until the guard's alarm: what was bought before the change that it dates, and when it came.

    The local model answers what the remote answers most often, until its agreement falls by a third at request 600.
    """
    guard = Guard(level, 300.0)
    bought: list[tuple[int, int]] = []
    for at in range(requests):
        remote.changed = at >= 600
        value = draw.randrange(10**9)
        local = Remote(0.0).answer(value, draw)
        if local_falls and at >= 600 and draw.random() < 0.35:
            local = (local + 3) % LABELS
        said = remote.answer(value, draw)
        change = guard.add(float(local == said))
        if change is not None:
            return bought[: len(bought) + 1 - change.began], at
        bought.append((value, said))
    return None


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("cause", ["the local model", "the remote", "nothing: a false alarm"])
def test_neither_is_taken_for_the_other(cause: str, noise: float) -> None:
    """With the real guard, and a sample from before the change as it dates it.

    A fall of the local model, and a false alarm of a guard that is held to more than the task can do, are called a
    change of the remote with the stated error; a change of half of the remote's answers is found in nine of ten worlds.
    """
    false_alarm = cause.startswith("nothing")

    def world(draw: random.Random) -> bool | None:
        remote = Remote(noise, 0.5 if cause == "the remote" else 0.0)
        level = 1.0 - noise / 2 - (0.0 if false_alarm else 0.03)
        found = alarmed(remote, cause == "the local model", draw, level=min(0.97, level))
        if found is None or len(found[0]) < ASKED or (found[1] < 600 and not false_alarm):
            return None  # no alarm, or one from before anything happened
        before = found[0][-10 * ASKED :]
        return judge_remote(ask_again(remote, draw.sample(before, ASKED), draw)).changed

    verdicts = [verdict for seed in range(250) if (verdict := world(random.Random(seed))) is not None]
    if noise or not false_alarm:  # a steady remote and a local model that is always right raise no alarm
        assert len(verdicts) >= 100
    changed = sum(verdicts) / max(len(verdicts), 1)
    if cause == "the remote":
        assert changed >= 0.9
    else:
        assert changed <= ERROR + 3 * math.sqrt(ERROR * (1 - ERROR) / max(len(verdicts), 100))


@given(n=st.integers(0, 60), k=st.integers(0, 60))
def test_the_tail_is_the_binomials(n: int, k: int) -> None:
    """Summed here by its recurrence: P(S >= k) over n tosses is half of that over n - 1 for k - 1, and half for k."""
    row = [1.0] + [0.0] * 61  # P(S >= j) of no tosses
    for _ in range(n):
        row = [1.0, *(0.5 * row[j - 1] + 0.5 * row[j] for j in range(1, 62))]
    assert tail(k, n) == pytest.approx(row[k], abs=1e-12)


def test_the_arbiter_decides_and_ties_do_not() -> None:
    """Seven sides of seven are enough for an error of .01, six are not; where it takes none there is no evidence."""
    agree = [Reasked(1.0)] * 33
    assert judge_remote([*agree, *[Reasked(0.0, 1.0)] * 7]).changed
    assert not judge_remote([*agree, *[Reasked(0.0, 1.0)] * 6]).changed
    undecided = judge_remote([*agree, *[Reasked(0.0, 0.0)] * 7])
    assert (undecided.changed, undecided.p_value, undecided.with_new, undecided.with_old) == (False, 1.0, 0, 0)
    both = judge_remote([*agree, *[Reasked(0.0, 1.0)] * 4, *[Reasked(0.2, -0.5)] * 5])
    assert (both.with_new, both.with_old, both.asked) == (4, 5, 42)
    assert both.agreement == pytest.approx(34 / 42)
