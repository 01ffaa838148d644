"""Asking: what the caller sees, and what the ledger says, whatever the vendor does."""

from __future__ import annotations

import contextlib
import random
import traceback
from collections import Counter
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import httpx
import pytest

from apprentice.budget import Budget
from apprentice.config import BudgetSettings, RemoteSettings, TaskSettings
from apprentice.errors import (
    ApprenticeError,
    BudgetExceeded,
    ConfigError,
    OutputError,
    RemoteRefused,
    RemoteUnavailable,
)
from apprentice.remote import RemoteAnswer, Teacher
from apprentice.store import Store
from apprentice.testing import FakeVendor, Fault
from apprentice.transport import Request, Response, Sender

TASK = TaskSettings(
    name="tickets",
    description="Classify a ticket.",
    input_schema={"text": "str"},  # type: ignore[arg-type]
    output_schema={"category": ["billing", "shipping"], "note": "str?"},  # type: ignore[arg-type]
)
VALUE = {"text": "Wo ist mein Päckchen?"}
VENDORS = ["anthropic", "openai", "openai_responses", "google", "openai_compatible"]


def right(value: Any) -> dict[str, Any]:
    return {"category": "shipping"}


class Time:
    """Monotonic seconds that only sleeping and time-outs move."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@dataclass
class School:
    """A teacher on a fresh store, which knows no network and no clock."""

    teacher: Teacher
    budget: Budget
    store: Store
    time: Time

    @property
    def slept(self) -> list[float]:
        return self.time.slept

    def ask(self, task: TaskSettings = TASK, request_id: str = "r") -> RemoteAnswer:
        answer = self.teacher.ask(task, VALUE, request_id)
        self.budget.complete_remote(settlements=answer.settlements)
        return answer

    def ledger(self) -> dict[str, int]:
        rows: Counter[str] = Counter()
        for row in self.store.spend():
            rows[row.state] += row.calls
        assert all(cap.reserved == 0 for cap in self.budget.remaining())
        return dict(rows)


@pytest.fixture
def school() -> Generator[Any]:
    """Opens a school with the given vendors, the first one first."""
    stores: list[Store] = []

    def open_school(
        *vendors: FakeVendor, daily: str = "100", interrupt: BaseException | None = None, **remote: Any
    ) -> School:
        sections, environ, senders = [], {}, {}
        for n, vendor in enumerate(vendors):
            host = f"vendor{n}.invalid"
            extra = vendor.more if isinstance(vendor, _Weighted) else {}
            section = vendor.settings(**extra)
            section["base_url"] = section["base_url"].replace("vendor.invalid", host)
            section["api_key_env"] = f"KEY{n}"
            environ[f"KEY{n}"] = vendor.key
            senders[host] = Sender(httpx.Client(transport=vendor.transport()))
            sections.append(section)
        settings = RemoteSettings.model_validate({**sections[0], "additional_providers": sections[1:], **remote})
        store = Store.open("sqlite://")
        stores.append(store)
        budget = Budget(store, BudgetSettings(daily=Decimal(daily)), announce=lambda *_: None)
        time = Time()

        def send(request: Request, deadline_s: float) -> Response:
            if interrupt:
                raise interrupt
            try:
                return senders[request.endpoint.url.host].send(request, deadline_s)
            except httpx.ReadTimeout:
                time.now += deadline_s
                raise

        draw = random.Random(7)
        teacher = Teacher(settings, budget, send, environ, random=draw, monotonic=time, sleep=time.sleep)
        return School(teacher, budget, store, time)

    yield open_school
    for store in stores:
        store.close()


class _Weighted(FakeVendor):
    """A vendor with more keys in its section."""

    def __init__(self, *args: Any, more: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.more = more


# what the caller sees, and how the ledger's calls end: (faults, error or None, ledger)
FAULTS: list[tuple[list[Fault], type[ApprenticeError] | None, dict[str, int]]] = [
    ([], None, {"settled": 1}),
    ([Fault("rate_limited", retry_after_s=2)], None, {"settled": 1}),
    ([Fault("overloaded")], None, {"settled": 1}),
    ([Fault("server_error")], None, {"settled": 1}),
    ([Fault("server_error")] * 4, None, {"settled": 1}),
    ([Fault("server_error")] * 9, RemoteUnavailable, {"released": 1}),
    ([Fault("reset")], None, {"lost": 1, "settled": 1}),
    ([Fault("half_body")], None, {"lost": 1, "settled": 1}),
    ([Fault("slow_body")], RemoteUnavailable, {"lost": 1}),
    ([Fault("not_json")], None, {"lost": 1, "settled": 1}),
    ([Fault("schema_violation")], None, {"settled": 2}),
    ([Fault("schema_violation", content="no JSON at all")], None, {"settled": 2}),
    ([Fault("schema_violation")] * 2, OutputError, {"settled": 2}),
    ([Fault("truncated")], None, {"settled": 2}),
    ([Fault("refusal")], OutputError, {"settled": 1}),
    ([Fault("no_usage")], None, {"lost": 1}),
    ([Fault("unauthorized")], RemoteRefused, {"released": 1}),
]


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize(
    ("faults", "error", "ledger"), FAULTS, ids=lambda v: "-".join(f.kind for f in v) if isinstance(v, list) else ""
)
def test_faults(
    school: Any, vendor: Any, faults: list[Fault], error: type[ApprenticeError] | None, ledger: dict[str, int]
) -> None:
    """Every vendor, every fault: the answer where one can be had, else a typed error, and the money accounted for."""
    room = school(FakeVendor(vendor, right, faults=faults))
    if error is None:
        assert room.ask().output == {"category": "shipping"}
    else:
        with pytest.raises(error):
            room.ask()
    assert room.ledger() == ledger


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_free_form_schema_is_answered(school: Any, vendor: Any) -> None:
    """Fields of any shape pass every vendor's strict reading of the request, and are checked by ourselves."""
    task = TaskSettings(
        name="free",
        description="Extract.",
        input_schema={"text": "str"},  # type: ignore[arg-type]
        output_schema={"data": "dict", "list": "list"},  # type: ignore[arg-type]
    )
    room = school(FakeVendor(vendor, lambda value: {"data": {"text": value["text"]}, "list": [1]}))
    assert room.ask(task).output == {"data": VALUE, "list": [1]}


@pytest.mark.parametrize("own", [True, False])
def test_over_a_real_connection(own: bool) -> None:
    """The same on sockets: resets, half bodies and dripping bodies as a network makes them."""
    kinds = ["rate_limited", "overloaded", "reset", "half_body", "not_json", "schema_violation"]
    faults = [Fault(kind, retry_after_s=0.01) for kind in kinds]  # type: ignore[arg-type]
    with (
        FakeVendor("anthropic", right, faults=faults) as vendor,
        Store.open("sqlite://") as store,
        httpx.Client() as client,
        contextlib.closing(Sender(client if own else None)) as sender,
    ):
        settings = RemoteSettings.model_validate(vendor.settings(max_retries=8))
        quick = random.Random(1)
        quick.random = lambda: 0.01  # type: ignore[method-assign]
        teacher = Teacher(settings, Budget(store, BudgetSettings()), sender.send, vendor.environ, random=quick)
        answer = teacher.ask(TASK, VALUE, "r1")
        assert (answer.output, answer.attempts) == ({"category": "shipping"}, 7)
        assert answer.usage.output > 0


def test_a_dripping_answer_meets_the_deadline() -> None:
    """A body that arrives byte by byte is given up at the deadline, and counts as spent."""
    with (
        FakeVendor("anthropic", right, faults=[Fault("slow_body", seconds_between=0.02)] * 9) as vendor,
        Store.open("sqlite://") as store,
        httpx.Client() as client,
    ):
        settings = RemoteSettings.model_validate(vendor.settings(deadline_s=0.3))
        teacher = Teacher(settings, Budget(store, BudgetSettings()), Sender(client).send, vendor.environ)
        with pytest.raises(RemoteUnavailable, match="still arriving"):
            teacher.ask(TASK, VALUE, "r")
        assert [row.state for row in store.spend()] == ["lost"]


def test_the_repair_shows_the_error(school: Any) -> None:
    """The second request holds the first answer and what was wrong with it; both calls are paid."""
    vendor = FakeVendor("anthropic", right, faults=[Fault("schema_violation", content='{"category": "other"}')])
    room = school(vendor)
    answer = room.ask()
    first, repair = vendor.questions
    assert repair.turns == (first.user, '{"category": "other"}')
    assert "category" in repair.user
    assert answer.attempts == 2
    assert len(answer.settlements) == 2
    assert answer.cost == sum(row.cost for row in room.store.spend())


def test_no_repair_where_it_is_off(school: Any) -> None:
    """With repair: false the first answer outside the schema is the last."""
    vendor = FakeVendor("anthropic", right, faults=[Fault("schema_violation")])
    with pytest.raises(OutputError):
        school(vendor, repair=False).ask()
    assert vendor.asked == 1


def test_a_thousand_requests_survive_a_failing_provider(school: Any) -> None:
    """The first of two providers fails every other attempt, in every way there is: all requests succeed."""
    draw = random.Random(3)
    kinds = ["rate_limited", "overloaded", "server_error", "reset", "half_body", "not_json", "unauthorized"]
    faults: Iterable[Fault | None] = (Fault(draw.choice(kinds)) if draw.random() < 0.5 else None for _ in range(10**6))  # type: ignore[arg-type]
    bad = FakeVendor("anthropic", right, faults=faults)
    good = FakeVendor("openai", right)
    room = school(bad, good)
    answers = []
    for n in range(1000):
        room.time.now += 1
        answers.append(room.ask(request_id=f"r{n}"))
    assert all(a.output == {"category": "shipping"} for a in answers)
    by = Counter(a.provider for a in answers)
    assert by["anthropic"] > 500
    assert by["openai"] > 0
    states = room.ledger()
    assert states["settled"] == 1000


def test_retry_after_is_honoured_up_to_the_deadline(school: Any) -> None:
    """The wait is at least what the vendor asks; one beyond the deadline goes to the next provider at once."""
    room = school(FakeVendor("anthropic", right, faults=[Fault("rate_limited", retry_after_s=7)]))
    room.ask()
    assert sum(room.slept) >= 7
    patient = school(FakeVendor("anthropic", right, faults=[Fault("rate_limited", retry_after_s=500)] * 9))
    with pytest.raises(RemoteUnavailable, match="429"):
        patient.ask()
    assert patient.slept == []
    second = school(
        FakeVendor("anthropic", right, faults=[Fault("rate_limited", retry_after_s=500)] * 9),
        FakeVendor("google", right),
    )
    assert second.ask().provider == "google"


def test_back_off_grows_and_varies(school: Any) -> None:
    """Pauses are drawn below 0.5, 1, 2 and 4 seconds."""
    room = school(FakeVendor("anthropic", right, faults=[Fault("server_error")] * 4))
    room.ask()
    assert len(room.slept) == 4
    assert all(pause <= most for pause, most in zip(room.slept, (0.5, 1, 2, 4), strict=True))
    assert len(set(room.slept)) == 4


def test_a_hanging_provider_leaves_time_for_the_next(school: Any) -> None:
    """With two providers the first one gets half the deadline."""
    room = school(FakeVendor("anthropic", right, faults=[Fault("slow_body")] * 9), FakeVendor("google", right))
    began = room.time.now
    answer = room.ask()
    assert answer.provider == "google"
    assert room.time.now - began <= 31
    assert [s.state for s in answer.settlements] == ["lost", "settled"]


def test_the_breaker_leaves_a_dead_provider_alone(school: Any) -> None:
    """After an outage has been noticed the vendor is not asked, then asked once, then again as before."""
    vendor = FakeVendor("anthropic", right, faults=[Fault("server_error")] * 30)
    room = school(vendor)
    while room.teacher.healthy():
        with pytest.raises(RemoteUnavailable):
            room.ask()
    asked = vendor.asked
    with pytest.raises(RemoteUnavailable, match="left alone"):
        room.ask()
    assert vendor.asked == asked
    for _ in range(20):
        room.time.now += 61
        try:
            room.ask()
        except RemoteUnavailable:
            continue
        break
    assert room.teacher.healthy()
    assert room.ask().attempts == 1


def test_traffic_is_shared_by_weight(school: Any) -> None:
    """use: share spreads requests by weight, and every answer says who gave it."""
    heavy = _Weighted("anthropic", right, more={"weight": 3.0})
    light = _Weighted("google", right, more={"weight": 1.0})
    room = school(heavy, light, use="share")
    by = Counter(room.ask().provider for _ in range(400))
    assert 250 < by["anthropic"] < 350
    assert by["anthropic"] + by["google"] == 400


def test_rate_limits_space_the_calls(school: Any) -> None:
    """Sixty requests a minute are a second apart after the first."""
    room = school(_Weighted("anthropic", right, more={"requests_per_minute": 60}))
    for _ in range(5):
        room.ask()
    assert sum(room.slept) == pytest.approx(4, abs=0.2)


def test_the_cap_is_met_before_the_call(school: Any) -> None:
    """A call whose worst case does not fit is not made."""
    vendor = FakeVendor("anthropic", right)
    room = school(vendor, daily="0.01")
    with pytest.raises(BudgetExceeded, match="daily"):
        room.ask()
    assert vendor.asked == 0


def test_an_interrupted_request_counts_as_spent(school: Any) -> None:
    """Ctrl-C while a call is out: it was sent and may be billed, so it is settled as lost."""
    room = school(FakeVendor("anthropic", right), interrupt=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        room.ask()
    assert room.ledger() == {"lost": 1}


def test_the_key_is_nowhere(school: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Not in errors and their traces, not in reprs, logs or the store."""
    vendor = FakeVendor("anthropic", right, key="sk-secret-0123456789", faults=[Fault("unauthorized"), Fault("reset")])
    room = school(vendor, FakeVendor("openai", right, key="sk-secret-0123456789", faults=[Fault("unauthorized")]))
    with caplog.at_level(0), pytest.raises(RemoteRefused) as caught:
        room.ask()
    room.ask()
    frames = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    seen = "".join(frames.format()) + repr(room.teacher) + caplog.text + str(room.store.spend())
    assert "secret" not in seen


def test_keys_and_prices_are_checked_at_the_start(school: Any) -> None:
    """A missing key names its variable; unknown prices of all providers are reported together."""
    with Store.open("sqlite://") as store:
        budget = Budget(store, BudgetSettings())
        vendor = FakeVendor("anthropic")
        settings = RemoteSettings.model_validate(vendor.settings(model="claude-unknown"))
        with pytest.raises(ConfigError, match="FAKE_ANTHROPIC_KEY"):
            Teacher(settings, budget, Sender().send, {})
        with pytest.raises(ConfigError, match=r"remote\.model.*not known"):
            Teacher(settings, budget, Sender().send, vendor.environ).price_check()
        shipped = RemoteSettings.model_validate(vendor.settings())
        Teacher(shipped, budget, Sender().send, vendor.environ).price_check()


def test_estimates_follow_the_price_list(school: Any) -> None:
    """The expected price grows with the input, and a known answer's length counts."""
    room = school(FakeVendor("anthropic", right))
    short = room.teacher.estimate(TASK, {"text": "x"}, {"category": "billing"})
    long = room.teacher.estimate(TASK, {"text": "x" * 3600}, {"category": "billing"})
    assert long - short == pytest.approx(Decimal("0.003"), rel=Decimal("0.05"))
    assert room.teacher.estimate(TASK, VALUE, {"note": "y" * 3600}) > room.teacher.estimate(TASK, VALUE, {})
    assert room.teacher.estimate(TASK, VALUE) > 0


@pytest.mark.parametrize("vendor", VENDORS)
def test_the_vendor_is_strict(vendor: Any) -> None:
    """The double refuses what the vendor would: wrong keys, unknown fields, missing limits, other paths."""
    fake = FakeVendor(vendor, right)
    headers = {
        "x-api-key": "wrong",
        "anthropic-version": "2023-06-01",
        "authorization": "Bearer no",
        "x-goog-api-key": "n",
    }
    path = {
        "anthropic": "/v1/messages",
        "google": "/v1beta/models/m:generateContent",
        "openai_responses": "/v1/responses",
    }
    target = path.get(vendor, "/v1/chat/completions")
    assert fake.reply(target, headers, b"{}").status in (400, 401)
    assert fake.reply("/elsewhere", headers, b"{}").status == 404
    right_key = dict.fromkeys(["x-api-key", "x-goog-api-key"], fake.key)
    good = {**headers, **right_key, "authorization": f"Bearer {fake.key}"}
    assert fake.reply(target, good, b'{"surprise": 1}').status == 400
    assert fake.reply(target, good, b"not json").status == 400
