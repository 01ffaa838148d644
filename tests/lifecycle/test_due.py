"""When training is due."""

from __future__ import annotations

import pytest

from apprentice.lifecycle.due import LastRun, training_due

RULES = {"first_at": 50, "batch": 100, "growth": 0.5}


@pytest.mark.parametrize(("examples", "due"), [(0, False), (49, False), (50, True), (500, True)])
def test_the_first_run_waits_for_its_examples(examples: int, due: bool) -> None:
    """Nothing is trained before phase1_to_phase2 examples are there."""
    assert (training_due(examples, None, **RULES) is not None) is due


@pytest.mark.parametrize(
    ("examples", "last", "due"),
    [(150, 50, True), (149, 50, False), (300, 200, True), (1100, 1000, False), (1499, 1000, False), (1500, 1000, True)],
)
def test_later_runs_wait_for_a_batch_and_for_growth(examples: int, last: int, due: bool) -> None:
    """Both fine_tune_batch_size new examples and fine_tune_growth are needed."""
    assert (training_due(examples, LastRun(last), **RULES) is not None) is due


def test_the_bill_of_a_growing_corpus_is_linear() -> None:
    """However long the stream, all runs together train on at most (1 + growth) / growth times the last corpus."""
    total, last = 0, None
    for examples in range(1, 20_000):
        if training_due(examples, last, **RULES):
            total, last = total + examples, LastRun(examples)
    assert last is not None
    assert total <= 3 * last.corpus_size


def test_an_escalation_goes_at_once_if_there_is_something_new() -> None:
    """One new example is enough for an escalated task, none is not."""
    assert training_due(1001, LastRun(1000), escalated="escalated", **RULES) == "escalated"
    assert training_due(1000, LastRun(1000), escalated="escalated", **RULES) is None


def test_without_a_champion_less_growth_is_enough() -> None:
    """A task whose first candidate was refused tries again sooner."""
    assert training_due(625, LastRun(500), has_champion=False, **RULES) is not None
    assert training_due(625, LastRun(500), **RULES) is None
