"""Requests that repeat an earlier one bet once, and count in everything else."""

import json
import random
from collections.abc import Sequence

import pytest

from apprentice.confidence.groups import WINDOW, Groups, group_of
from apprentice.confidence.phases import Phase
from apprentice.confidence.settings import TrustSettings
from apprentice.confidence.trust import Trust
from apprentice.confidence.weighing import Comparison
from benchmarks.trust import same
from benchmarks.worlds import OFF, World, batches, measure_certified

SETTINGS = TrustSettings(max_disagreement=0.1)


def after(answers: Sequence[tuple[bool, str]], settings: TrustSettings = SETTINGS, seed: int = 1) -> Trust:
    """A version's trust after live comparisons (agrees, group)."""
    draw = random.Random(seed)
    trust = Trust.fresh(settings)
    trust.promoted([], same, draw)
    for i, (agrees, group) in enumerate(answers):
        remote = draw.randrange(7)
        local = remote if agrees else (remote + 1) % 7
        comparison = Comparison(str(i), float(agrees), {}, draw.random(), local, remote, group=group)
        trust.observe(comparison, same, draw)
    return trust


def test_alike_are_inputs_that_differ_in_case_and_white_space() -> None:
    """Words, numbers and signs tell inputs apart; the key is a short text, and any text has one."""
    assert group_of("Where is  my order?\n") == group_of("where is my ORDER?")
    others = ["where is my order!", "where is my order 7?", "where is my order 8?", "", "\ud800"]
    assert len({group_of(text) for text in others}) == len(others)
    assert all(len(group_of(text)) == 16 for text in others)


def test_a_group_bets_once_in_a_window() -> None:
    """The first of a group bets; it bets again a window after it did, however often it came meanwhile."""
    groups = Groups(window=10)
    assert [groups.first("a") for _ in range(21)] == [i % 10 == 0 for i in range(21)]
    assert groups.first("")
    assert groups.first("")


@pytest.mark.parametrize("window", [1, 3, WINDOW])
def test_memory_is_bounded_and_survives(window: int) -> None:
    """No more groups are kept than the window has comparisons; what is dumped and loaded goes on alike."""
    groups = Groups(window)
    for i in range(3 * WINDOW):
        groups.first(str(i))
        assert len(groups.dump()["bet"]) <= window
    other, one = Groups.load(json.loads(json.dumps(groups.dump()))), Groups.load(groups.dump())
    names = [str(random.Random(2).randrange(3 * WINDOW)) for _ in range(100)]
    assert [one.first(name) for name in names] == [other.first(name) for name in names]


@pytest.mark.parametrize("size", [5, 20])
def test_batches_of_one_kind_certify_nothing_wrongly(size: int) -> None:
    """.102 differ where .10 may, a batch at a time. Without groups a third and nine in ten of these are certified."""
    assert measure_certified(World("batches", batches(OFF, size), size), 20) <= 0.1


def test_an_input_that_is_much_of_the_traffic_is_not_forgotten() -> None:
    """A quarter of the traffic is one input, and the model gets it wrong: what else it gets right earns nothing."""
    draw = random.Random(3)
    heavy = [draw.random() < 0.25 for _ in range(1500)]
    assert after([(not one, "heavy" if one else f"{i}") for i, one in enumerate(heavy)]).phase is Phase.SHADOW
    assert after([(True, "heavy" if one else f"{i}") for i, one in enumerate(heavy)]).phase is Phase.SERVE


def test_repeats_count_but_do_not_bet() -> None:
    """A hundred right answers to one input are no certificate; to a hundred inputs they are."""
    repeated = after([(True, "one")] * 150)
    assert repeated.phase is Phase.SHADOW
    figures = repeated.figures()
    assert figures.comparisons == 150
    assert figures.window_all.agreement is not None
    assert figures.window_all.agreement.value == 1.0
    assert not any(one.certified for one in figures.slices)
    assert max(one.wealth for one in figures.slices) < 2.0
    assert after([(True, f"{i}") for i in range(150)]).phase is Phase.SERVE


@pytest.mark.parametrize("overall", [None, 0.05])
def test_where_nothing_repeats_nothing_changes(overall: float | None) -> None:
    """The state is the same as without groups, to the last digit."""
    settings = TrustSettings(max_disagreement=0.1, max_disagreement_overall=overall)
    draw = random.Random(4)
    right = [draw.random() < 0.95 for _ in range(400)]
    grouped, plain = (
        json.loads(after([(one, name and f"{i}") for i, one in enumerate(right)], settings).dumps())
        for name in ("group", "")
    )
    assert grouped.pop("groups") != plain.pop("groups")
    assert grouped == plain


def test_both_tests_survive_and_older_states_load() -> None:
    """A state with repeats goes on as it would have; one from before there were groups begins to remember them."""
    draw = random.Random(5)
    answers = [(draw.random() < 0.95, f"{draw.randrange(60)}") for _ in range(400)]
    trust = after(answers)
    again = Trust.loads(trust.dumps(), SETTINGS)
    assert again.dumps() == trust.dumps()
    assert trust.firsts is not None
    assert trust.slices is not None
    assert sum(trust.firsts.weights) < sum(trust.slices.weights)
    older = {name: value for name, value in json.loads(trust.dumps()).items() if name not in ("firsts", "groups")}
    assert Trust.loads(json.dumps(older), SETTINGS).firsts is None
