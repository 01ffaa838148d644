"""Whom to ask: every row of the failure table, and the draws."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.confidence.decision import Headroom, Plan, Policy, Reason, accepts, decide
from apprentice.confidence.phases import Phase

SERVING = Policy(Phase.SERVE, "v1", threshold=0.8, sampling_rate=0.1)
FINE = Headroom()
BROKE, DOWN = Headroom(remote_affordable=False), Headroom(remote_healthy=False)
NO_LOCAL = Headroom(local_healthy=False)


@pytest.mark.parametrize(
    ("policy", "headroom", "local", "remote", "reason"),
    [
        (Policy(), FINE, False, True, Reason.COLLECTING),
        (Policy(Phase.SHADOW, None), FINE, False, True, Reason.COLLECTING),
        (Policy(Phase.SHADOW, "v1"), FINE, True, True, Reason.SHADOWING),
        (Policy(Phase.SERVE, "v1", None), FINE, True, True, Reason.NOTHING_CERTIFIED),
        (SERVING, FINE, True, False, Reason.TRUSTED),
        (SERVING, NO_LOCAL, False, True, Reason.LOCAL_DOWN),
        (SERVING, DOWN, True, False, Reason.REMOTE_DOWN),
        (SERVING, BROKE, True, False, Reason.BUDGET_EXHAUSTED),
        (Policy(Phase.SHADOW, "v1"), BROKE, True, False, Reason.BUDGET_EXHAUSTED),
        (Policy(), BROKE, False, False, Reason.NO_BUDGET_NO_LOCAL),
        (Policy(), DOWN, False, False, Reason.NOBODY),
        (SERVING, Headroom(False, True, False), False, False, Reason.NO_BUDGET_NO_LOCAL),
        (SERVING, Headroom(True, False, False), False, False, Reason.NOBODY),
    ],
)
def test_the_table(policy: Policy, headroom: Headroom, local: bool, remote: bool, reason: Reason):
    """Who is asked in each phase and under each failure, and the reason given."""
    plan = decide(policy, headroom, 0.5)
    assert (plan.local, plan.remote, plan.reason) == (local, remote, reason)


def test_a_spot_check_asks_both_at_once():
    """A draw below the rate asks both; the plan keeps the probability with which it did."""
    assert decide(SERVING, FINE, 0.05) == Plan(True, True, Reason.SPOT_CHECK, 0.1)
    assert decide(SERVING, FINE, 0.1) == Plan(True, False, Reason.TRUSTED, 0.1, defer=True)


def test_without_a_remote_nothing_is_deferred():
    """Budget used up or remote down: the local answer stands, however unsure, and spot checks pause."""
    for headroom in (BROKE, DOWN):
        assert decide(SERVING, headroom, 0.0) == Plan(
            True, False, Reason.BUDGET_EXHAUSTED if headroom is BROKE else Reason.REMOTE_DOWN, 0.0
        )


def test_the_share_of_spot_checks_is_the_rate():
    """Over 10,000 draws the share of spot checks is the rate, to within five standard errors."""
    draw = random.Random(1)
    checks = sum(decide(SERVING, FINE, draw.random()).remote for _ in range(10_000))
    assert abs(checks - 1000) <= 5 * 30


@given(
    st.builds(
        Policy,
        st.sampled_from(Phase),
        st.sampled_from([None, "v1"]),
        st.sampled_from([None, 0.0, 0.7]),
        st.floats(0.0, 1.0),
    ),
    st.builds(Headroom, st.booleans(), st.booleans(), st.booleans()),
    st.floats(0.0, 1.0, exclude_max=True),
)
def test_what_no_plan_may_do(policy: Policy, headroom: Headroom, draw: float):
    """No plan asks what is not there; somebody is asked whenever anybody is; without trust the remote is asked."""
    plan = decide(policy, headroom, draw)
    remote = headroom.remote_affordable and headroom.remote_healthy
    local = headroom.local_healthy and policy.version is not None and policy.phase is not Phase.COLLECT
    assert plan.remote <= remote
    assert plan.local <= local
    assert (plan.remote or plan.local) == (remote or local)
    assert 0.0 <= plan.probability <= 1.0
    if remote and (policy.phase is not Phase.SERVE or policy.threshold is None):
        assert plan.remote
    if plan.defer:
        assert remote


@pytest.mark.parametrize(
    ("policy", "confidence", "accepted"),
    [
        (SERVING, 0.8, True),
        (SERVING, 0.7999, False),
        (Policy(Phase.SERVE, "v1", 0.0), 0.0, True),
        (Policy(Phase.SERVE, "v1", None), 1.0, False),
        (Policy(Phase.SHADOW, "v1", 0.5), 1.0, False),
    ],
)
def test_what_is_accepted(policy: Policy, confidence: float, accepted: bool):
    """At least the threshold, in phase 3 only; nothing where nothing is certified."""
    assert accepts(policy, confidence) is accepted
