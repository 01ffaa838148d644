"""What status and report say of promises, halves and reasons, recomputed from the raw tables."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from apprentice.confidence.phases import Phase
from apprentice.confidence.settings import TrustSettings
from apprentice.confidence.trust import Trust
from apprentice.confidence.watch import LocalObservation
from apprentice.confidence.window import Seen
from apprentice.operate.report import CostReport, HalfShare, cost_report
from apprentice.operate.report_page import as_html, as_json_text, as_table
from apprentice.operate.status import forecast_words, status_page
from apprentice.request.judge import trust_settings
from apprentice.result import TaskStatus
from apprentice.store import Count
from tests.conftest import LABELS, Workbench, truth
from tests.operate.test_status import rows

TASK = {
    "name": "mood",
    "description": "Name the mood.",
    "input_schema": {"text": "str"},
    "output_schema": {"label": " | ".join(LABELS)},
    "evaluator": "exact_match",
    "confidence_thresholds": {
        "phase1_to_phase2": 10,
        "max_disagreement": 0.1,
        "max_disagreement_overall": 0.08,
    },
}
HALVES = ("head", "both", "lora")
Z95 = 1.959964


def words_of(value: Mapping[str, Any]) -> tuple[int, str]:
    """A request of these tests is "LABEL NUMBER HALF"."""
    _, number, half = value["text"].split()
    return int(number), half


@pytest.fixture
def student(bench: Callable[..., Workbench]) -> Workbench:
    """A student of two halves that serves four requests in five, and is wrong in one of twenty, the adapter oftener.

    Its answers are checked at a rate that falls, so that checks weigh differently.
    """
    at = bench(tasks=[TASK], sampling={"min_floor": 0.1, "window_size": 50})

    def answer(_version: Any, value: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
        number, half = words_of(value)
        right = truth(value)["label"]
        wrong = number % (10 if half == "lora" else 29) == 3
        label = LABELS[(LABELS.index(right) + 1) % 3] if wrong else right
        return {"label": label}, 0.1 if number % 5 == 0 else 0.9

    at.engine.answerer = answer
    real = at.engine.answer

    def by_halves(version: str, value: Mapping[str, Any], *, deadline_s: float) -> Any:
        said = real(version, value, deadline_s=deadline_s)
        return replace(said, answered_by=words_of(value)[1])

    at.engine.answer = by_halves  # type: ignore[method-assign]
    return at


def ask(at: Workbench, count: int, *, first: int = 0, halves: tuple[str, ...] = HALVES) -> None:
    for i in range(first, first + count):
        at.run(f"{LABELS[i % 3]} {i} {halves[i // 3 % len(halves)]}")


def standing(at: Workbench) -> tuple[TaskStatus, CostReport]:
    """Both pages, once everything is written."""
    at.client.parts.tally.flush()
    at.client.parts.judge.flush("mood")
    return at.client.status()["mood"], cost_report(at.store, at.client.settings)


def wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson (1927), written out again."""
    z = Z95
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    wide = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - wide), min(1.0, middle + wide)


def shown(page: Any) -> str:
    """What a terminal prints, in one line."""
    console = Console(width=100, highlight=False)
    with console.capture() as captured:
        console.print(page)
    return " ".join(captured.get().split())


def test_both_promises_are_those_of_the_tables(student: Workbench) -> None:
    """Served and overall: estimate, interval and number of checks come from comparisons and counts, and are shown."""
    at = student
    at.promote(held_out=300, right=0.97, unsure=60)
    ask(at, 700)
    status, report = standing(at)
    assert status.phase == Phase.SERVE

    checks = rows(at, "SELECT score, probability FROM comparisons WHERE served = 1 AND seeded = 0")
    count = dict(rows(at, "SELECT outcome, sum(n) FROM counts WHERE version = 'mood-v1' GROUP BY outcome"))
    (level,) = [json.loads(trust)["checked_level"] for (trust,) in rows(at, "SELECT trust FROM version_states")]
    weights = [1 / p for _, p in checks]
    assert len(set(weights)) > 5, "the rate fell, so the checks weigh differently"
    served = count["local"] + len(checks)
    differs = 1 - (level + sum((score - level) / p for score, p in checks) / served)
    low, high = wilson(differs, sum(weights) ** 2 / sum(w * w for w in weights))
    share = served / (count["local"] + count["spot_check"] + count["deferred"])

    of_served, of_all = status.promises
    assert (of_served.at_most, of_all.at_most) == (0.1, 0.08)
    assert (of_served.checks, of_all.checks) == (len(checks), len(checks))
    assert (of_served.realised, of_served.low, of_served.high) == pytest.approx((differs, low, high), abs=1e-6)
    assert (of_all.realised, of_all.low, of_all.high) == pytest.approx((share * differs, share * low, share * high))
    # The plain ratio of weighted sums estimates the same; what really differed is known here, and inside.
    plain = sum((1 - score) / p for score, p in checks) / sum(weights)
    assert low < plain < high
    assert [one.promise for one in report.promises] == list(status.promises)
    line = f"at most 10.0% promised, {differs:.1%} so far ({low:.1%} to {high:.1%}, from {len(checks)} weighted spot "
    for page in (shown(status_page({"mood": status})), shown(as_table(report)), as_html(report)):
        assert f"mood: served answers that differ: {line}" in page
        assert f"mood: all answers that differ: at most 8.0% promised, {share * differs:.1%} so far" in page
    assert json.loads(as_json_text(report))["promises"][0]["promise"]["checks"] == len(checks)


def test_a_state_of_before_keeps_its_estimate_without_an_interval(student: Workbench) -> None:
    """Nothing is made up for checks that nobody counted; those that follow are."""
    at = student
    at.promote(held_out=300, right=0.95)
    ask(at, 60)
    standing(at)
    ((text,),) = rows(at, "SELECT trust FROM version_states")
    old = json.loads(text)
    for name in ("checks", "check_weights", "check_squares", "answered"):
        del old[name]
    settings = trust_settings(at.client.settings, at.client.settings.task("mood"))
    now, before = Trust.loads(text, settings).figures(), Trust.loads(json.dumps(old), settings).figures()
    assert before.promises[0].realised == now.promises[0].realised is not None
    assert before.promises[1].realised == pytest.approx(before.coverage * before.promises[0].realised)
    assert {(p.low, p.high, p.checks) for p in before.promises} == {(None, None, 0)}


def test_the_interval_covers_what_is_so() -> None:
    """Of 300 streams whose rate falls from 1 to .1, the 95 % interval holds the true share in at least 92 %."""
    draw = random.Random(3)
    inside = 0
    for _ in range(300):
        trust = Trust(TrustSettings(max_disagreement=0.1))
        trust.phase, trust.threshold, trust.checked_level = Phase.SERVE, 0.5, 0.92
        for i in range(1500):
            rate = max(0.1, 0.99**i)
            trust.watch([LocalObservation(confidence=0.9, valid=True, served=True, input_length=1, novelty=None)])
            if draw.random() < rate:
                score = float(draw.random() >= 0.06)
                trust._check(Seen(0.9, score, 0.3, 1.0, [], []), rate)
        (promise,) = trust.figures().promises
        assert promise.low is not None
        assert promise.high is not None
        inside += promise.low <= 0.06 <= promise.high
    assert inside >= 276, inside


def test_the_halves_are_those_of_the_tables(student: Workbench) -> None:
    """Answers by half, and the agreement of what was checked and of all that was compared, weighted, with intervals."""
    at = student
    at.promote(held_out=300, right=0.97, unsure=60)
    ask(at, 700)
    _, report = standing(at)
    found = {one.half: one for one in report.halves}
    assert list(found) == ["head", "lora", "both"]
    counted = dict(rows(at, "SELECT answered_by, sum(n) FROM local_answers GROUP BY answered_by"))
    assert {half: one.answers for half, one in found.items()} == counted
    assert sum(counted.values()) == sum(t.local_answers for t in report.tasks) > 100
    statement = "SELECT score, probability, served FROM comparisons WHERE seeded = 0 AND answered_by = '{}'"
    for half, one in found.items():
        compared = rows(at, statement.format(half))
        checks = [(score, 1 / p) for score, p, served in compared if served]
        weight = sum(w for _, w in checks)
        agreement = sum(score * w for score, w in checks) / weight
        low, high = wilson(agreement, weight**2 / sum(w * w for _, w in checks))
        overall = sum(score / p for score, p, _ in compared) / sum(1 / p for _, p, _ in compared)
        assert (one.checks, one.compared) == (len(checks), len(compared))
        assert (one.agreement, one.low, one.high) == pytest.approx((agreement, low, high))
        assert one.compared_agreement == pytest.approx(overall)
        for page in (shown(as_table(report)), as_html(report).replace("</td><td>", " ")):
            assert f"{one.answers:,} {one.answers / sum(counted.values()):.0%} {one.checks} {agreement:.1%}" in page
    assert found["lora"].agreement < min(found["head"].agreement, found["both"].agreement)
    names = [one["half"] for one in json.loads(as_json_text(report))["halves"]]
    assert names == ["head", "lora", "both"]


def test_answers_from_before_are_not_given_to_a_half(student: Workbench) -> None:
    """An older process counts no halves: its answers are told as such, and sum up with the others."""
    at = student
    at.promote(held_out=300, right=0.95)
    ask(at, 60, halves=("head",))
    at.client.parts.tally.flush()
    day = rows(at, "SELECT max(day) FROM counts")[0][0]
    at.store.add_counts([Count("mood", day, "mood-v1", "local", 7)])
    _, report = standing(at)
    (own, unknown) = report.halves
    assert (own.half, unknown) == ("head", HalfShare("mood", "", 7, 0, None, None, None, 0, None))
    assert "mood unknown 7 " in shown(as_table(report))


def choose(at: Workbench, version: str, how: Any, reason: str) -> None:
    at.client.parts.judge.promote("mood", version, [], reason=reason, how=how, by="mo@desk")
    assert at.client.wait_until_serving("mood", timeout_s=10)


def test_a_version_chosen_by_hand_says_by_whom_and_why(student: Workbench) -> None:
    """Chosen and rolled back: status and JSON have the person and the reason; the gate's own choice is no news."""
    at = student
    at.promote("v1", held_out=300, right=0.95)
    status, _ = standing(at)
    assert (status.chosen, status.why) == (None, None)
    at.add_version("v2")
    choose(at, "v2", "person", "cheaper [/red], [try] it")
    status, _ = standing(at)
    ((when,),) = rows(at, "SELECT at FROM promotions WHERE version = 'v2'")
    day = f"{datetime.fromtimestamp(when, UTC):%Y-%m-%d %H:%M} UTC"
    assert status.chosen == f"mo@desk chose v2 on {day}: cheaper [/red], [try] it"
    assert (status.phase, status.why) == (Phase.SHADOW, status.chosen)
    page = shown(status_page({"mood": status}))
    assert f"mood: nothing is served yet, since mo@desk chose v2 on {day}: cheaper [/red], [try] it; " in page
    choose(at, "v1", "rollback", "v2 is worse on refunds")
    status, _ = standing(at)
    assert status.phase == Phase.SERVE, "it goes on from what it had earned"
    assert status.why is None
    page = shown(status_page({"mood": replace(status, campaign=0.5)}))
    assert "a campaign checks 50% of what is served, so that more of it can be served sooner" in page
    assert "mood: mo@desk went back to v1 from v2 on " in page
    assert "UTC: v2 is worse on refunds" in page


def test_why_the_rest_is_not_served_is_what_was_seen_of_it(student: Workbench) -> None:
    """What all its answers would come to is recomputed from every comparison, each as often as the traffic has it."""
    at = student
    at.promote(held_out=300, right=0.97, unsure=60)
    ask(at, 200)
    status, _ = standing(at)
    compared = rows(at, "SELECT score, min(1, sampling_rate / probability) FROM comparisons WHERE version = 'mood-v1'")
    differs = sum((1 - score) * weight for score, weight in compared) / sum(weight for _, weight in compared)
    assert differs > 0.1
    assert status.why == f"of all that it answers {differs:.1%} differ, and at most 10.0% may"
    assert f"{status.coverage:.0%} served, since of all that it answers " in shown(status_page({"mood": status}))


def test_a_version_that_is_nowhere_good_enough_says_so(student: Workbench) -> None:
    """Nothing is served while even the surest answers differ too often."""
    at = student
    at.promote(held_out=100, right=0.7)
    ask(at, 1)
    status, _ = standing(at)
    assert status.phase == Phase.SHADOW
    assert status.why is not None
    assert re.fullmatch(
        r"(even of its surest \d+%|of all that it answers) [\d.]+% differ, and at most 10.0% may", status.why
    )


def shadow_badly(at: Workbench) -> None:
    """120 comparisons with a version that is wrong in two of five, mixed."""
    at.promote()
    at.engine.answerer = lambda _version, value: (
        {"label": LABELS[(LABELS.index(truth(value)["label"]) + (words_of(value)[0] % 5 in (1, 3))) % 3]},
        0.9,
    )
    ask(at, 120)


def test_a_correlation_that_falls_short_is_named(bench: Callable[..., Workbench]) -> None:
    """Where a correlation is promised, the line has the one that the table shows, and the one that is asked for."""
    at = bench()
    shadow_badly(at)
    status = at.client.status()["mood"]
    assert status.phase == Phase.SHADOW
    asked = at.client.settings.task("mood").confidence_thresholds.phase2_to_phase3
    assert status.correlation is not None
    assert status.correlation < asked
    assert status.why == (
        f"of all that it answers the correlation is {status.correlation:.2f}, and {asked:.2f} is asked for"
    )


def test_a_share_of_all_answers_that_falls_short_is_named(bench: Callable[..., Workbench]) -> None:
    """Where all answers have a target, what would differ is held against that."""
    task = {**TASK, "confidence_thresholds": {"phase1_to_phase2": 10, "max_disagreement_overall": 0.08}}
    at = bench(tasks=[{**task, "deferral": False}])
    shadow_badly(at)
    status = at.client.status()["mood"]
    ((differs,),) = rows(at, "SELECT 1 - avg(score) FROM comparisons")
    assert status.phase == Phase.SHADOW
    assert status.why == f"of all that it answers {differs:.1%} differ, and at most 8.0% of all answers may"


def test_every_standing_has_one_line_that_says_why(student: Workbench) -> None:
    """From the first request to an emergency: what keeps the task from serving more is one line, and the right one."""
    at = student
    status, _ = standing(at)
    assert forecast_words(status) == "nothing is served yet, since its first training needs 10 examples and there are 0"
    ask(at, 12)
    status, _ = standing(at)
    assert forecast_words(status) == "nothing is served yet, since its first training is due: there are 12 examples"
    at.store.start_run("mood", 12, "first", corpus_size=12, run_id="r")
    status, _ = standing(at)
    assert forecast_words(status) == "nothing is served yet, since its first version is being trained"
    at.store.update_run("r", state="failed", error="out of memory\nat step 3")
    status, _ = standing(at)
    assert forecast_words(status) == "nothing is served yet, since its last training failed (out of memory at step 3)"
    at.promote("v1", held_out=300, right=0.95)
    at.engine.answerer = lambda _version, value: (truth(value), 0.9)
    ask(at, 30, first=100)
    status, _ = standing(at)
    assert status.why is None
    wrong = {"joy": "fear", "fear": "anger", "anger": "joy"}
    at.engine.answerer = lambda _version, value: ({"label": wrong[truth(value)["label"]]}, 0.9)
    ask(at, 300, first=200)
    status, _ = standing(at)
    assert status.phase == Phase.SHADOW
    told = forecast_words(status)
    assert told is not None
    assert told.startswith("nothing is served yet, since it answered too badly on ")
    at.add_version("v2", 0)
    at.client.parts.judge.promote("mood", "v2", [], reason="passed")
    status, _ = standing(at)
    assert status.why is None, "an emergency of the version before is none of this one's"
