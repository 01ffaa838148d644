"""The phase machine: only the moves that are drawn."""

import itertools

import pytest

from apprentice.confidence.phases import Phase, Signal, advance

DRAWN = {
    (Phase.COLLECT, Signal.PROMOTED, Phase.SHADOW),
    (Phase.SERVE, Signal.PROMOTED, Phase.SHADOW),
    (Phase.SHADOW, Signal.CERTIFIED, Phase.SERVE),
    (Phase.SERVE, Signal.EMERGENCY, Phase.SHADOW),
    (Phase.SERVE, Signal.REFUSED, Phase.SHADOW),
}


@pytest.mark.parametrize(("phase", "signal"), list(itertools.product(Phase, Signal)))
def test_every_signal_in_every_phase(phase: Phase, signal: Signal):
    """A signal moves the task exactly where the picture has an arrow, and carries its evidence along."""
    move = advance(phase, signal, {"why": 1})
    after = next((c for a, b, c in DRAWN if (a, b) == (phase, signal)), None)
    assert (move and move.after) == after
    if move is not None:
        assert (move.before, move.signal, move.evidence) == (phase, signal, {"why": 1})


def test_nothing_serves_without_a_certificate():
    """The only way into phase 3 is a certificate, and only from shadow."""
    into = [(p, s) for p, s in itertools.product(Phase, Signal) if (m := advance(p, s)) and m.after is Phase.SERVE]
    assert into == [(Phase.SHADOW, Signal.CERTIFIED)]
