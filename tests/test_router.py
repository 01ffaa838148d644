"""The path of a request, phase by phase and failure by failure (DESIGN section 4)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from apprentice import BudgetExceeded, InputError, OutputError, RemoteRefused, Unavailable, UnknownTask
from apprentice.phases import Phase
from apprentice.store import Store
from apprentice.testing import Fault
from tests.conftest import Workbench

Bench = Callable[..., Workbench]


def wrong(value: Any) -> dict[str, Any]:
    return {"label": "anger"}


def test_in_phase_1_the_remote_answers_and_every_answer_is_an_example(bench: Bench) -> None:
    """No local model: the remote's answer is returned, paid for and kept."""
    at = bench()
    assert at.run("a joy") == {"label": "joy"}
    assert at.run("a fear") == {"label": "fear"}
    examples = list(at.store.examples("mood"))
    assert [e.output for e in examples] == [{"label": "joy"}, {"label": "fear"}]
    assert all(row.cost > 0 for row in at.store.spend())
    assert at.counted() == {"remote": 2}


def test_bad_input_costs_nothing_and_names_the_field(bench: Bench) -> None:
    """Nothing is sent, recorded or spent."""
    at = bench()
    with pytest.raises(InputError, match="text"):
        at.client.run("mood", {"text": 3})
    with pytest.raises(UnknownTask, match="there is no task"):
        at.client.run("moood", {"text": "x"})
    assert at.vendor.asked == 0
    assert at.store.count_examples("mood") == 0


def test_in_phase_2_both_answer_and_the_remotes_answer_is_returned(bench: Bench) -> None:
    """A wrong local model costs the caller nothing, and the comparison remembers it."""
    at = bench()
    at.promote()
    at.local = wrong
    assert at.run("a joy") == {"label": "joy"}
    (comparison,) = at.store.comparisons("mood")
    assert (comparison.score, comparison.local, comparison.probability) == (0.0, {"label": "anger"}, 1.0)
    assert at.counted() == {"shadow": 1}


def test_in_phase_3_confident_requests_stay_local_and_the_others_are_deferred(bench: Bench) -> None:
    """What is above the threshold is answered here, but for spot checks; what is below goes to the remote."""
    at = bench()
    at.promote(held_out=400)
    assert at.store.policy_row("mood").phase == Phase.SERVE
    for _ in range(100):
        at.run()  # every one checked at first; the rate glides down
    asked = at.vendor.asked
    assert asked < 100
    at.confidence = 0.1
    threshold = at.store.policy_row("mood").threshold
    if threshold > 0.1:
        before = at.counted().get("deferred", 0)
        for _ in range(20):
            assert at.run("a fear") == {"label": "fear"}
        assert at.vendor.asked == asked + 20
        assert at.counted()["deferred"] > before
    counts = at.counted()
    assert counts["local"] > 0
    assert counts["local"] + counts["spot_check"] + counts.get("deferred", 0) == sum(counts.values())


def test_spot_checks_carry_the_probability_with_which_they_were_bought(bench: Bench) -> None:
    """Estimates can only be unbiased if each comparison knows its own chance."""
    at = bench()
    at.promote(held_out=400)
    for _ in range(60):
        at.run()
    checks = [c for c in at.store.comparisons("mood", limit=100) if not c.seeded]
    assert checks
    assert all(c.probability == pytest.approx(c.sampling_rate) for c in checks if c.served)
    assert any(c.probability < 1.0 for c in checks)


def test_a_remote_that_is_down_is_stood_in_for_by_the_local_model(bench: Bench) -> None:
    """The local answer comes back, marked degraded in the record, and an operator hears of it."""
    at = bench(faults=[Fault("server_error")] * 20)
    at.promote()
    assert at.run("a joy") == {"label": "joy"}
    assert at.counted() == {"degraded": 1}
    assert "remote_unavailable" in {event.kind for event in at.store.events("mood")}
    assert at.store.count_examples("mood") == 0


def test_a_local_model_that_is_down_is_not_noticed_by_the_caller(bench: Bench) -> None:
    """The remote answers instead."""
    at = bench()
    at.promote(held_out=400)
    at.engine.down = True
    for _ in range(10):
        assert at.run("a joy") == {"label": "joy"}
    assert "local_unavailable" in {event.kind for event in at.store.events("mood")}


def test_with_neither_the_error_names_both_causes(bench: Bench) -> None:
    """Nobody can answer: the caller learns why, of each."""
    at = bench(faults=[Fault("server_error")] * 20)
    at.promote()
    at.engine.down = True
    with pytest.raises(Unavailable) as caught:
        at.run()
    assert "500" in str(caught.value.remote)
    assert caught.value.local is not None


def test_a_refused_request_is_told_as_it_is_without_the_key(bench: Bench) -> None:
    """A wrong key is the user's to mend: provider, status and message, and never the key."""
    at = bench(faults=[Fault("unauthorized")])
    with pytest.raises(RemoteRefused) as caught:
        at.run()
    assert caught.value.status == 401
    assert at.vendor.key not in str(caught.value)
    assert at.vendor.asked == 1


def test_an_answer_outside_the_schema_is_repaired_once_and_never_kept(bench: Bench) -> None:
    """One repair; a second failure is an error, and no example."""
    at = bench(faults=[Fault("schema_violation"), None, Fault("schema_violation"), Fault("schema_violation")])
    assert at.run("a joy") == {"label": "joy"}
    with pytest.raises(OutputError, match="label"):
        at.run()
    assert at.store.count_examples("mood") == 1


def test_what_is_held_for_a_next_request_is_given_back(bench: Bench) -> None:
    """A client that has nothing more to do holds no money: within seconds while it lives, at once when it closes."""
    at = bench(budget={"daily": 10})
    budget = at.client.parts.budget
    at.run("a joy")
    assert len(budget.held_ahead()) == 1
    ends = time.monotonic() + 30
    while budget.remaining()[0].reserved and time.monotonic() < ends:
        time.sleep(0.05)
    assert budget.remaining()[0].reserved == 0
    assert budget.held_ahead() == []
    at.run("a fear")
    at.client.close()
    with Store.open(at.client.settings.store_url) as store:
        (row,) = store.spend()
        assert (row.state, row.calls) == ("settled", 2)
        assert (
            sum(w.committed for w in store.window_states([w.key for w in budget.windows("mood")]).values()) == row.cost
        )


def test_an_exhausted_budget_stops_the_remote_but_not_the_local_model(bench: Bench) -> None:
    """Without a local model the caller learns which cap and until when; with one, it answers alone."""
    at = bench(budget={"daily": "0.000001"})
    with pytest.raises(BudgetExceeded, match="daily") as caught:
        at.run()
    assert caught.value.resets_at.tzinfo is not None
    at.promote()
    assert at.run("a joy") == {"label": "joy"}
    assert at.vendor.asked == 0
    assert at.counted()["budget"] == 1
    assert "budget_exhausted" in {event.kind for event in at.store.events()}


def test_a_promotion_is_followed_without_a_restart(bench: Bench) -> None:
    """The router moves to the new champion, and what it compares afterwards is the new one's."""
    at = bench()
    at.promote("mood-v1")
    at.run()
    at.promote("mood-v2")
    at.run()
    assert [c.version for c in at.store.comparisons("mood")] == ["mood-v2", "mood-v1"]
    assert at.engine.loads == ["mood-v1", "mood-v2"]


def test_an_evaluator_that_fails_costs_the_caller_nothing(bench: Bench) -> None:
    """The answer is returned, the comparison is kept unscored, and the evaluator is named."""
    task = {
        "name": "mood",
        "description": "Name the mood.",
        "input_schema": {"text": "str"},
        "output_schema": {"label": "joy | fear | anger"},
        "evaluator": "custom",
        "evaluator_function": "tests.test_router:broken_evaluator",
    }
    at = bench(tasks=[task])
    at.promote()
    assert at.run("a joy") == {"label": "joy"}
    (comparison,) = at.store.comparisons("mood")
    assert comparison.score is None
    (event,) = [e for e in at.store.events("mood") if e.kind == "comparison_failed"]
    assert "broken_evaluator" in str(event.evidence)


def broken_evaluator(local: dict[str, Any], remote: dict[str, Any]) -> float:
    raise ValueError("never works")


def test_status_shows_where_a_task_stands(bench: Bench) -> None:
    """Phase, examples, comparisons and money in one place."""
    at = bench()
    at.run()
    at.promote(held_out=400)
    at.run()
    status = at.client.status()["mood"]
    assert (status.phase, status.champion, status.examples) == (3, "mood-v1", 2)
    assert status.comparisons == 401
    assert status.correlation == pytest.approx(1.0)
    assert status.spent > 0


def test_the_second_watch_sees_unknown_words_and_answers_outside_the_schema(bench: Bench) -> None:
    """Traffic of another kind, or a local model that breaks, forces spot checks without any remote answer to tell."""
    at = bench()
    for i in range(120):
        at.run(f"a joy of kind {i}")
    at.promote(held_out=400)
    for i in range(300):
        at.run(f"a joy of kind {i}")
    before = at.vendor.asked
    for _ in range(200):
        at.run("ein Kummer ohne Namen")
    at.client.parts.judge.flush("mood")
    signs = [event.evidence["signs"] for event in at.store.events("mood") if event.kind == "unusual"]
    assert any("novelty" in found for found in signs)
    assert at.vendor.asked - before >= 50


def test_answers_outside_the_schema_are_watched(bench: Bench) -> None:
    """A local model whose answers begin to break the schema is unusual, also where nobody compares."""
    at = bench()
    at.promote(held_out=400)
    for _ in range(300):
        at.run("a joy")
    at.local = lambda value: {"label": 3}
    for _ in range(120):
        at.run("a joy")
    at.client.parts.judge.flush("mood")
    signs = [event.evidence["signs"] for event in at.store.events("mood") if event.kind == "unusual"]
    assert any("invalid" in found for found in signs)
