"""Telling a change of the remote from a fall of the local model: by asking stored inputs again.

For an input whose answer o is known the remote is asked again: n. Where the two differ it is asked a third time, m, as
the arbiter. While the remote answers as it did, o, n and m are three draws from one and the same distribution,
whatever it is for this input: exchanging o and n changes nothing, and m is as likely to side with the one as with the
other. So of the inputs on which it takes a side, the number that side with the new answer is Binomial(k, 1/2), exactly
(the sign test, Arbuthnot 1710), however noisy the remote is and however the inputs differ. Where the remote changed, m
sides with n.

The local model has no part in it: how well it does, and why the guard raised an alarm, cannot make the test speak. The
inputs must be chosen without a look at their answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["ERROR", "Reasked", "Verdict", "judge_remote", "needs_arbiter", "tail"]

ERROR = 0.01
"""Probability with which a remote that answers as it did is said to have changed, for each time that it is asked."""


class Reasked(NamedTuple):
    """One input that was asked again: the score of the new answer against the old one, and the arbiter's side.

    ``side`` is what the third answer scores against the new one, less what it scores against the old one; None where it
    was not asked.
    """

    score: float
    side: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of it. ``p_value`` is P(at least so many side with the new answer) for a remote that did not change."""

    changed: bool
    p_value: float
    asked: int
    agreement: float
    with_new: int
    with_old: int


def needs_arbiter(score: float) -> bool:
    """Whether an input is asked a third time: the first two answers are not the same."""
    return score < 1.0


def judge_remote(reasked: Iterable[Reasked], error: float = ERROR) -> Verdict:
    """Whether the remote changed, with at most the probability ``error`` of saying so where it did not."""
    seen = list(reasked)
    sides = [one.side for one in seen if one.side]
    new = sum(side > 0.0 for side in sides)
    p_value = tail(new, len(sides))
    agreement = sum(one.score for one in seen) / len(seen) if seen else 1.0
    return Verdict(p_value <= error, p_value, len(seen), agreement, new, len(sides) - new)


def tail(successes: int, trials: int) -> float:
    """P(Binomial(trials, 1/2) >= successes), exactly."""
    return sum(math.comb(trials, k) for k in range(successes, trials + 1)) / float(2**trials)
