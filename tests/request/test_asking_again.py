"""Asking the remote again, over the vendor's real protocol: what it costs, what it finds, and what callers notice."""

from __future__ import annotations

import contextlib
import json
import random
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest

from apprentice import Apprentice, load_settings
from apprentice.confidence.correlation import wilson
from apprentice.errors import BudgetExceeded, ConfigError, StoreError
from apprentice.events.kinds import EventKind
from apprentice.lifecycle.due import due_run
from apprentice.operate.report import cost_report
from apprentice.operate.report_page import as_html
from apprentice.operate.status import status_page
from apprentice.request.asking_again import PAUSE_S, AskingAgain
from apprentice.settings.config import SamplingSettings
from apprentice.store import EventRecord
from apprentice.testing import FakeEngine, FakeVendor, Fault
from tests.conftest import LABELS, Workbench, settings, truth

TWICE = {"asked_twice": 0.5}
AGAIN = {"asked_twice": 0.0, "asked_again": 40}
OFF = {"asked_twice": 0.0, "asked_again": 0}


class Clock:
    def __init__(self) -> None:
        self.now = 1_772_366_400.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Room(Workbench):
    """A workbench whose remote can be made noisy, and other than it was."""

    clock: Clock | None = None

    @property
    def again(self) -> AskingAgain:
        return self.client.parts.asking_again

    def asks(self) -> None:
        """Have asked now what is to be asked."""
        assert self.clock is not None
        self.clock.now += 61
        self.again.look()
        assert self.again.wait(60)

    def rows(self, statement: str) -> list[Any]:
        """What the store's file says, read without the store."""
        with contextlib.closing(sqlite3.connect(self.client.settings.root / "apprentice.db")) as db:
            return db.execute(statement).fetchall()

    def events_of(self, kind: str) -> list[EventRecord]:
        return [event for event in self.store.events() if event.kind == kind]


class Remote:
    """Answers by the text, except a toss on the share ``noise`` of inputs; ``changed``: otherwise on two of three."""

    def __init__(self, noise: float = 0.0) -> None:
        self.noise, self.changed = noise, False
        self.draw = random.Random(1)

    def __call__(self, value: Mapping[str, Any]) -> dict[str, Any]:
        own = random.Random(value["text"])
        at = LABELS.index(truth(value)["label"])
        if own.random() < self.noise and self.draw.random() < 0.5:
            at += 1
        if self.changed and own.random() < 0.67:
            at += 2
        return {"label": LABELS[at % 3]}


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Callable[..., Room]]:
    """Makes rooms over one store; each is closed at the end of the test."""
    opened: list[Room] = []
    clock = Clock()

    def make(
        answers: Callable[[Any], dict[str, Any]] = truth,
        *,
        faults: Any = (),
        client: Callable[[FakeVendor], httpx.Client] | None = None,
        **more: Any,
    ) -> Room:
        vendor = FakeVendor("anthropic", answers, faults=faults)
        engine = FakeEngine(lambda version, value: (at.local(value), at.confidence))
        made = Apprentice.from_config(
            settings(tmp_path, vendor, **more),
            http_client=client(vendor) if client else httpx.Client(transport=vendor.transport()),
            engine=engine,
            environ=vendor.environ,
            clock=clock,
            draw=random.Random(7),
        )
        at = Room(made, vendor, engine, clock=clock)
        opened.append(at)
        return at

    yield make
    for one in opened:
        one.client.close()


def a_task(**more: Any) -> dict[str, Any]:
    """The task of these tests, with some keys of its own."""
    return {
        "name": "mood",
        "description": "Name the mood.",
        "input_schema": {"text": "str"},
        "output_schema": {"label": " | ".join(LABELS)},
        "evaluator": "exact_match",
        "confidence_thresholds": {"phase1_to_phase2": 10},
        **more,
    }


def teach(at: Room, requests: int, *, first: int = 0) -> None:
    """So many answers of the remote, a second apart."""
    assert at.clock is not None
    for i in range(first, first + requests):
        at.clock.now += 1
        at.run(f"{LABELS[i % 3]} {i}")


def alarm(at: Room, kind: EventKind = EventKind.SHIFT) -> EventRecord:
    """An alarm, as the guard raises it, of a change that begins now."""
    assert at.clock is not None
    at.clock.now += 1
    event = EventRecord(f"alarm-{at.clock.now}", "mood", kind, kind.level, {"version": None}, at.clock.now)
    at.store.add_event(event)
    return event


# --- twice at once ---


def test_the_caller_notices_nothing_and_the_share_is_kept(room: Callable[..., Room]) -> None:
    """First answers are returned and are the examples; second ones are kept beside them, a half of them at most."""
    given: list[str] = []

    def remote(value: Mapping[str, Any]) -> dict[str, Any]:
        given.append(LABELS[len(given) % 3])
        return {"label": given[-1]}

    at = room(remote, sampling=TWICE)
    returned = []
    for i in range(40):
        returned.append(at.run(f"text {i}")["label"])
        at.asks()
        twice, answers = at.rows("SELECT (SELECT count(*) FROM second_answers), (SELECT count(*) FROM examples)")[0]
        assert twice <= answers / 2
    assert at.vendor.asked == 60
    kept = at.rows("SELECT id, output, provider FROM examples ORDER BY seq")
    assert [json.loads(output)["label"] for _, output, _ in kept] == returned
    again = at.rows("SELECT request_id, first, output, cause, turn FROM second_answers ORDER BY seq")
    by_id = {name: output for name, output, _ in kept}
    assert len(again) == 20
    assert all(first == by_id[name] and first != output for name, first, output, _, _ in again)
    assert {(cause, turn) for *_, cause, turn in again} == {("", 2)}


def test_it_is_paid_for_like_any_call_and_told_apart(room: Callable[..., Room], tmp_path: Path) -> None:
    """Reserved and settled under a name of its own: spent has it, what a remote answer costs has it not."""
    at = room(sampling=TWICE)
    for i in range(30):
        at.run(f"joy {i}")
        at.asks()
    calls = at.rows("SELECT provider, state, cost, request_id FROM calls")
    again = [call for call in calls if call[0] == "anthropic asked again"]
    assert len(again) == 15
    assert {state for _, state, _, _ in calls} == {"settled"}
    assert {name for *_, name in again} == {name for (name,) in at.rows("SELECT id FROM second_answers")}
    at.client.parts.tally.flush()
    report = cost_report(at.store, at.client.settings, clock=at.clock or time.time)
    cost = sum(Decimal(call[2]) for call in again) / 10**9
    whole = sum(Decimal(call[2]) for call in calls) / 10**9
    assert (report.asked_again, report.spent) == (cost, whole)
    assert report.tasks[0].price == (whole - cost) / 30
    assert "asked the remote again, to learn how steady it is" in as_html(report)
    assert {model.provider for model in report.models} == {"anthropic", "anthropic asked again"}


def test_nothing_is_asked_where_nothing_is_wanted(room: Callable[..., Room]) -> None:
    """0 is never; and by default, nothing before a hundred answers."""
    at = room(sampling=OFF)
    teach(at, 30)
    at.asks()
    alarm(at)
    at.asks()
    assert at.vendor.asked == 30
    assert SamplingSettings().asked_twice == 0.01


def test_the_default_asks_one_in_a_hundred(room: Callable[..., Room]) -> None:
    """However often it is looked: with 250 answers, two."""
    at = room(sampling={"asked_twice": SamplingSettings().asked_twice})
    for i in range(250):
        at.run(f"joy {i}")
        at.asks()
    assert at.vendor.asked == 252


@pytest.mark.parametrize("cap", [{"daily": "0.06"}, {"total": "0.06"}])
def test_a_cap_that_gets_tight_is_left_to_callers(room: Callable[..., Room], cap: dict[str, str]) -> None:
    """Nothing is asked twice from 80 % on, though callers are answered until the cap is used up."""
    at = room(sampling=TWICE, budget=cap, tasks=[a_task(max_output_tokens=16)])
    late = 0
    for i in range(170):
        spent = at.rows("SELECT max(committed) FROM cap_windows")[0][0] or 0
        before = len(at.rows("SELECT 1 FROM calls WHERE provider LIKE '% asked again'"))
        with contextlib.suppress(Exception):
            at.run(f"joy {i}")
        at.asks()
        after = len(at.rows("SELECT 1 FROM calls WHERE provider LIKE '% asked again'"))
        if spent >= 0.8 * 0.06e9:
            late += 1
            assert after == before
    assert late > 10
    assert at.rows("SELECT count(*) FROM second_answers")[0][0] > 5
    assert at.rows("SELECT max(spent) FROM cap_windows")[0][0] <= 0.06e9


@pytest.mark.parametrize("fault", ["rate_limited", "server_error", "reset", "schema_violation"])
def test_a_vendor_that_fails_is_asked_no_second_time(room: Callable[..., Room], fault: Any) -> None:
    """One try and no alert: nobody waited for it. What a lost call may cost is counted."""
    at = room(sampling=TWICE, faults=[None, None, Fault(fault), Fault(fault), None, None])
    for i in range(2):
        at.run(f"joy {i}")
        at.asks()
    retried = 2 if fault == "schema_violation" else 1  # an answer that does not fit is repaired once, as ever
    assert at.vendor.asked == 2 + retried
    assert at.told() == set()
    assert at.rows("SELECT count(*) FROM second_answers") == [(0,)]
    states = [state for (state,) in at.rows("SELECT state FROM calls WHERE provider LIKE '% asked again'")]
    expected = {"reset": "lost", "schema_violation": "settled"}.get(fault, "released")
    assert states == [expected] * retried


def test_a_limit_in_use_is_left_to_callers(room: Callable[..., Room]) -> None:
    """A request a minute was just taken by a caller: the next one is a caller's, too."""
    at = room(sampling=TWICE, remote=FakeVendor("anthropic").settings(requests_per_minute=60, deadline_s=5.0))
    for i in range(2):
        at.run(f"joy {i}")
    at.asks()
    assert at.vendor.asked == 2


def test_a_gateway_that_keeps_answers_does_not_make_a_remote_steady(room: Callable[..., Room]) -> None:
    """Second questions say that a kept answer will not do; callers' requests say nothing of the kind."""
    kept: dict[bytes, httpx.Response] = {}
    asked: list[str | None] = []

    def behind_a_gateway(vendor: FakeVendor) -> httpx.Client:
        upstream = vendor.transport()

        def gateway(request: httpx.Request) -> httpx.Response:
            asked.append(request.headers.get("cache-control"))
            if request.headers.get("cache-control") == "no-cache" or request.content not in kept:
                kept[request.content] = upstream.handle_request(request)
            answer = kept[request.content]
            return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

        return httpx.Client(transport=httpx.MockTransport(gateway))

    at = room(Remote(noise=1.0), sampling=TWICE, client=behind_a_gateway)
    for i in range(60):
        at.run(f"joy {i}")
        at.asks()
    scores = [score for (score,) in at.rows("SELECT score FROM second_answers")]
    assert 5 < sum(scores) < 25
    assert len(scores) == 30
    assert (asked.count(None), asked.count("no-cache")) == (60, 30)


# --- figures ---


def test_figures_are_recomputed_from_the_raw_answers(room: Callable[..., Room]) -> None:
    """What status and report say, from the answers in the table alone: scores, chance, weights and interval."""
    remote = Remote(noise=0.5)
    at = room(remote, sampling={**TWICE, "max_fall": 0.3})
    at.promote(held_out=400, unsure=80)
    at.local = lambda value: truth(value) if value["text"].endswith(("1", "4", "7")) else {"label": "joy"}
    for i in range(240):
        at.confidence = 0.9 if i % 2 else 0.1
        with contextlib.suppress(Exception):
            at.run(f"{LABELS[i % 3]} {i}")
        at.asks()
    raw = at.rows("SELECT first, output, local, probability, sampling_rate FROM second_answers ORDER BY seq")
    raw = [(json.loads(f), json.loads(o), json.loads(loc) if loc else None, p, r) for f, o, loc, p, r in raw]
    assert len(raw) > 50
    assert len({rate / p for *_, p, rate in raw}) > 1  # some were bought more readily than others
    weights, same, chances, local = [], [], [], []
    for i, (first, output, said, p, rate) in enumerate(raw):
        others = (raw[max(0, i - 8) : i][::-1] or raw[1:2])[:8]
        weights.append(min(1.0, rate / p))
        same.append(float(first == output))
        alike = [float(output == other[0]) + float(other[1] == first) for other in others]
        chances.append(sum(alike) / (2 * len(others)))
        if said is not None:
            local.append((weights[-1], float(said == first)))
    total = sum(weights)
    agreement = sum(w * s for w, s in zip(weights, same, strict=True)) / total
    size = total**2 / sum(w * w for w in weights)
    ceiling = at.client.status()["mood"].ceiling
    assert ceiling is not None
    assert ceiling.pairs == len(raw)
    assert ceiling.agreement.value == pytest.approx(agreement)
    assert (ceiling.agreement.low, ceiling.agreement.high) == pytest.approx(wilson(agreement, size))
    assert ceiling.best == pytest.approx((1 + agreement) / 2)
    by_chance = sum(w * c for w, c in zip(weights, chances, strict=True)) / total
    assert ceiling.correlation.value == pytest.approx(1 - (1 - agreement) / (1 - by_chance))
    assert ceiling.local is not None
    assert ceiling.local.value == pytest.approx(sum(w * s for w, s in local) / sum(w for w, _ in local))
    line = cost_report(at.store, at.client.settings, clock=at.clock or time.time).ceilings[0]
    assert f"{len(raw)} requests" in line or f"{len(raw)} asked twice" in line


def test_status_report_and_an_alert_say_that_a_target_is_out_of_reach(room: Callable[..., Room]) -> None:
    """In one sentence, the same everywhere; the alert once."""
    task = a_task(confidence_thresholds={"max_disagreement": 0.02})
    at = room(Remote(noise=1.0), sampling=TWICE, tasks=[task])
    for i in range(120):
        at.run(f"{LABELS[i % 3]} {i}")
        at.asks()
    status = at.client.status()["mood"]
    assert status.out_of_reach is not None
    assert "at most 2.0% disagreement cannot be reached" in status.out_of_reach
    page = " ".join(str(part) for part in status_page({"mood": status}).renderables[1:])
    assert status.out_of_reach in page
    report = cost_report(at.store, at.client.settings, clock=at.clock or time.time)
    assert report.ceilings == (f"mood: {status.out_of_reach}",)
    (event,) = at.events_of("out_of_reach")
    assert "cannot be reached" in event.evidence["sentence"]
    assert event.level == "warning"


def test_a_steady_remote_is_shown_beside_the_local_model(room: Callable[..., Room]) -> None:
    """One line, without an alarm."""
    at = room(sampling=TWICE)
    at.promote(held_out=40, right=0.5)
    teach(at, 20)
    for i in range(20):
        at.run(f"joy {i}")
        at.asks()
    status = at.client.status()["mood"]
    assert status.out_of_reach is None
    page = " ".join(str(part) for part in status_page({"mood": status}).renderables[1:])
    assert "asked twice, the remote agrees with itself in 100.0%" in page
    assert "the local model with it in 100.0%" in page


# --- after an alarm ---


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("changed", [False, True])
def test_a_changed_remote_is_told_from_a_steady_one(room: Callable[..., Room], *, changed: bool, noise: float) -> None:
    """The same alarm in both worlds: stored inputs say which it was, with their figures in the event."""
    remote = Remote(noise)
    at = room(remote, sampling=AGAIN)
    teach(at, 200)
    raised = alarm(at)
    remote.changed = changed
    at.asks()
    asked = at.rows(f"SELECT request_id, turn, score, side FROM second_answers WHERE cause = '{raised.id}'")
    second = {name: score for name, turn, score, _ in asked if turn == 2}
    assert len(second) == 40
    assert {name for name, turn, *_ in asked if turn == 3} == {name for name, score in second.items() if score < 1}
    (event,) = at.events_of("remote_changed" if changed else "remote_steady")
    assert at.events_of("remote_steady" if changed else "remote_changed") == []
    evidence = event.evidence
    assert evidence["asked"] == 40
    assert evidence["agreement"] == sum(second.values()) / 40
    assert evidence["with_new_answer"] == sum((side or 0) > 0 for *_, side in asked)
    assert evidence["with_old_answer"] == sum((side or 0) < 0 for *_, side in asked)
    assert (evidence["p_value"] <= 0.01) is changed
    assert f"{sum(second.values()):.0f} of 40 re-asked inputs agree" in evidence["sentence"]
    assert evidence["since"] == raised.at
    at.asks()  # no second time
    assert len(at.rows("SELECT 1 FROM second_answers")) == len(asked)


def fall(at: Room, remote: Remote, *, of_the_remote: bool) -> None:
    """Serve, until the real guard raises an alarm: the remote's doing, or the local model's."""
    teach(at, 150)
    at.promote(held_out=400)
    teach(at, 100, first=150)
    remote.changed = of_the_remote
    if not of_the_remote:
        at.local = lambda value: {"label": "joy"}
    for i in range(250, 900):
        teach(at, 1, first=i)
        if at.store.latest_event("mood", "shift") or at.store.latest_event("mood", "drift"):
            return
    raise AssertionError("the guard raised no alarm")


@pytest.mark.parametrize("of_the_remote", [False, True])
def test_the_guards_own_alarm_is_explained(room: Callable[..., Room], *, of_the_remote: bool) -> None:
    """The whole way: requests, spot checks, alarm, stored inputs, verdict; neither is taken for the other."""
    remote = Remote(0.05)
    at = room(remote, sampling=AGAIN)
    fall(at, remote, of_the_remote=of_the_remote)
    at.asks()
    assert len(at.events_of("remote_changed")) == of_the_remote
    assert len(at.events_of("remote_steady")) == (not of_the_remote)


def test_after_a_change_training_waits_for_new_answers(room: Callable[..., Room]) -> None:
    """Due when there are phase1_to_phase2 answers since the change, because of it, and only until a run began."""
    remote = Remote()
    at = room(remote, sampling=AGAIN, local={"student": {"head": False}})
    teach(at, 120)
    store, settings_ = at.store, at.client.settings
    run = store.start_run("mood", 10**6, "first", corpus_size=120)
    store.update_run(run.id, state="completed")
    alarm(at)
    remote.changed = True
    at.asks()
    assert at.events_of("remote_changed")
    for i in range(9):
        teach(at, 1, first=200 + i)
        assert due_run(settings_, store, "mood", at.clock.now if at.clock else 0.0) is None
    teach(at, 1, first=300)
    due = due_run(settings_, store, "mood", at.clock.now if at.clock else 0.0)
    assert due is not None
    assert due.reason == "escalated: the remote answers differently than it did"
    run = store.start_run("mood", 10**6, due.reason, corpus_size=130)
    store.update_run(run.id, state="completed")
    assert due_run(settings_, store, "mood", at.clock.now if at.clock else 0.0) is None


def test_what_came_before_a_change_is_no_evidence_of_steadiness(room: Callable[..., Room]) -> None:
    """Pairs first answered before the change are of another remote: the figures begin anew."""
    remote = Remote()
    at = room(remote, sampling={"asked_twice": 0.5, "asked_again": 40})
    for i in range(160):
        teach(at, 1, first=i)
        at.asks()
    before = at.client.status()["mood"].ceiling
    assert before is not None
    assert before.pairs == 80
    alarm(at)
    remote.changed = True
    at.asks()
    assert at.events_of("remote_changed")
    assert at.client.status()["mood"].ceiling is None


def test_one_alarm_a_day_is_looked_into(room: Callable[..., Room]) -> None:
    """A guard that alarms again and again does not buy forty answers each time."""
    at = room(sampling=AGAIN)
    teach(at, 200)
    alarm(at)
    at.asks()
    asked = at.vendor.asked
    alarm(at, EventKind.EMERGENCY)
    at.asks()
    assert at.vendor.asked == asked
    assert at.clock is not None
    at.clock.now += PAUSE_S
    alarm(at, EventKind.DRIFT)
    at.asks()
    assert at.vendor.asked == asked + 40


def test_too_little_to_go_by_is_left_alone(room: Callable[..., Room]) -> None:
    """Fewer than twenty in a quarter of what was paid for: no question, and no verdict."""
    at = room(sampling=AGAIN)
    teach(at, 70)
    alarm(at)
    at.asks()
    assert at.vendor.asked == 70
    assert at.events_of("remote_steady") == []


def test_stored_inputs_wait_for_money(room: Callable[..., Room]) -> None:
    """Where a cap is tight nothing is asked, nothing is told, and it goes on when there is room again."""
    at = room(sampling=AGAIN, budget={"daily": "0.06"}, tasks=[a_task(max_output_tokens=16)])
    with contextlib.suppress(BudgetExceeded):
        teach(at, 400)
    assert at.rows("SELECT count(*) FROM examples")[0][0] > 100
    alarm(at)
    asked = at.vendor.asked
    at.asks()
    assert at.vendor.asked == asked
    assert at.events_of("remote_steady") == []
    assert at.clock is not None
    at.clock.now += 86_400
    teach(at, 1, first=1000)
    at.asks()
    assert len(at.events_of("remote_steady")) == 1


# --- processes that end in between ---


def test_another_process_goes_on(room: Callable[..., Room]) -> None:
    """The one that began ends after some answers; the next asks for the rest, and for no input a second time."""
    remote = Remote()
    at = room(remote, sampling=AGAIN)
    teach(at, 200)
    raised = alarm(at)
    answered = at.vendor.asked
    real = at.again._ask

    def ask(*arguments: Any) -> None:
        if at.vendor.asked - answered >= 13:
            at.again._closed = True  # as `close` does, in the middle
            return
        real(*arguments)

    at.again._ask = ask  # type: ignore[method-assign]
    at.asks()
    assert at.events_of("remote_steady") == []
    at.client.close()
    other = room(remote, sampling=AGAIN)
    teach(other, 1, first=500)
    other.asks()
    assert len(other.events_of("remote_steady")) == 1
    asked = other.rows(f"SELECT request_id, turn FROM second_answers WHERE cause = '{raised.id}'")
    assert len(asked) == len(set(asked)) == 40
    assert other.vendor.asked == 1 + 40 - 13


def test_an_answer_is_there_raw_before_it_is_scored(room: Callable[..., Room], monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies between leaves the row; whoever asks next scores it from what is in it."""
    at = room(sampling=TWICE)
    teach(at, 2)
    with monkeypatch.context() as patch:
        patch.setattr(AskingAgain, "_score", lambda *_: None)
        at.asks()
    assert at.rows("SELECT first, output, score FROM second_answers") == [
        ('{"label":"fear"}', '{"label":"fear"}', None)
    ]
    for i in range(4):
        teach(at, 1, first=10 + i)
        at.asks()
    assert at.rows("SELECT count(*), count(score), count(chance) FROM second_answers") == [(3, 3, 3)]


def test_a_store_that_is_away_loses_no_answer(room: Callable[..., Room], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was paid for is kept in memory, and recorded with its cost when the store is back."""
    at = room(sampling=TWICE)
    teach(at, 2)
    budget = at.client.parts.budget
    real = budget.complete_remote
    with monkeypatch.context() as patch:

        def away(**_: Any) -> None:
            raise StoreError("away")

        patch.setattr(budget, "complete_remote", away)
        at.again.look()
        assert at.again.wait(30)
    assert budget.complete_remote == real
    assert at.rows("SELECT count(*) FROM second_answers") == [(0,)]
    assert not at.client.parts.backlog.write()
    assert at.rows("SELECT count(*) FROM second_answers") == [(1,)]
    states = at.rows("SELECT DISTINCT state FROM calls")
    assert states == [("settled",)]


def test_closing_asks_no_more(room: Callable[..., Room]) -> None:
    """The call under way is seen to its end, with its record; those that wait are not made."""
    at = room(sampling=AGAIN)
    teach(at, 200)
    alarm(at)
    assert at.clock is not None
    at.clock.now += 61
    at.again.look()
    at.client.close()
    assert at.rows("SELECT count(*) FROM calls WHERE state = 'reserved'") == [(0,)]
    paid = at.rows("SELECT count(*) FROM calls WHERE provider LIKE '% asked again' AND state = 'settled'")
    assert paid == at.rows("SELECT count(*) FROM second_answers")
    assert paid[0][0] < 40


# --- the keys ---


@pytest.mark.parametrize("bad", ["asked_twice: 0.7", "asked_twice: -0.1", "asked_again: 5", "asked_again: 501"])
def test_a_key_out_of_range_is_named(tmp_path: Path, bad: str) -> None:
    """With its value, and what it may be."""
    file = tmp_path / "apprentice.yaml"
    file.write_text(
        "tasks:\n  - name: mood\n    description: d\n    input_schema: {text: str}\n    output_schema: {label: str}\n"
        "remote: {provider: anthropic, model: claude-sonnet-4-5, api_key_env: KEY}\n"
        f"sampling:\n  {bad}\n"
    )
    key, value = bad.split(": ")
    with pytest.raises(ConfigError) as raised:
        load_settings(file)
    (problem,) = raised.value.problems
    assert problem.path == f"sampling.{key}"
    assert value in str(problem)
    assert problem.line == 8
