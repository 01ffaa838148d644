"""Asking: what the caller sees, and what the ledger says, whatever the vendor does."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import threading
import traceback
from collections import Counter
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import httpx
import hypothesis
import hypothesis.strategies as st
import pytest

from apprentice.errors import (
    ApprenticeError,
    BudgetExceeded,
    ConfigError,
    OutputError,
    RemoteRefused,
    RemoteUnavailable,
)
from apprentice.money.budget import Budget
from apprentice.remote import RemoteAnswer, Teacher
from apprentice.remote.transport import Request, Response, Sender
from apprentice.settings.config import BudgetSettings, RemoteSettings, TaskSettings
from apprentice.store import Store
from apprentice.testing import FakeVendor, Fault
from apprentice.testing.vendors import PROTOCOLS, Question

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
        with self.budget.account(task.name, request_id) as account:
            answer = self.teacher.ask(task, VALUE, account)
            account.complete()
        return answer

    def ledger(self) -> dict[str, int]:
        """How the calls ended. Attempts that cost nothing are left out, or count once where there were no others."""
        rows: Counter[str] = Counter()
        for row in self.store.spend():
            rows[row.state] += row.calls
        assert self.store.held() == []
        assert all(cap.reserved == 0 for cap in self.budget.remaining())
        return {state: n for state, n in rows.items() if state != "released"} or dict.fromkeys(rows, 1)


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
        budget = Budget(store, BudgetSettings(daily=Decimal(daily)))
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
        teacher = Teacher(settings, send, environ, random=draw, monotonic=time, sleep=time.sleep)
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
    ([Fault("error_inside")], None, {"settled": 1}),
    ([Fault("error_inside", retry_after_s=500)], RemoteUnavailable, {"released": 1}),
    ([Fault("in_parts")], None, {"settled": 1}),
    ([Fault("thinking")], None, {"settled": 1}),
    ([Fault("fenced")], None, {"settled": 1}),
    ([Fault("empty")], None, {"settled": 2}),
    ([Fault("empty")] * 2, OutputError, {"settled": 2}),
    ([Fault("filtered")], OutputError, {"settled": 1}),
    ([Fault("schema_violation", content='{"category": ' + "[" * 5_000)], None, {"settled": 2}),
    ([Fault("verbatim", content="[" * 5_000)], None, {"lost": 1, "settled": 1}),
    (
        [Fault("verbatim", content='{"choices": 5, "content": 5, "candidates": 5, "output": 5, "type": "message"}')],
        None,
        {"lost": 1, "settled": 1},
    ),
    ([Fault("verbatim", status=502, content="<html>Bad gateway")], None, {"lost": 1, "settled": 1}),
    ([Fault("verbatim", status=504, content="")] * 9, RemoteUnavailable, {"lost": 5}),
    ([Fault("verbatim", status=429, content="[" * 100_000)], None, {"settled": 1}),
    ([Fault("verbatim", status=429, content='{"error": {"details": 5}}')], None, {"settled": 1}),
    ([Fault("verbatim", status=429, content="{}", headers=(("retry-after", "nan"),))], None, {"settled": 1}),
    ([Fault("verbatim", status=400, content="[" * 100_000)], RemoteRefused, {"released": 1}),
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


# what a first provider may do for as long as it is asked, so that it never brings an answer
NO_ANSWER = {
    "refusal": Fault("refusal"),
    "filtered": Fault("filtered"),
    "prose": Fault("schema_violation", content="I would say: shipping."),
    "deep": Fault("schema_violation", content="[" * 100_000),
    "empty": Fault("empty"),
    "truncated": Fault("truncated"),
    "unauthorized": Fault("unauthorized"),
    "server_error": Fault("server_error"),
    "throttled": Fault("rate_limited", retry_after_s=float("inf")),
    "error_inside": Fault("error_inside", retry_after_s=86_400),
    "not_json": Fault("not_json"),
    "reset": Fault("reset"),
    "brackets": Fault("verbatim", content="[" * 5_000),
    "null": Fault("verbatim", content="null"),
    "bad_request": Fault("verbatim", status=400, content='{"error": {"details": 5}}'),
    "gateway": Fault("verbatim", status=524, content="<html>"),
}


@pytest.mark.parametrize("second", ["anthropic", "google"])
@pytest.mark.parametrize("first", VENDORS)
@pytest.mark.parametrize("fault", NO_ANSWER)
def test_the_next_provider_is_asked(school: Any, first: Any, second: Any, fault: str) -> None:
    """Whatever keeps the first provider from bringing an answer, the second one is asked, and all calls are ended."""
    other = FakeVendor(second, right)
    room = school(FakeVendor(first, right, faults=itertools.repeat(NO_ANSWER[fault])), other)
    answer = room.ask()
    assert (answer.provider, answer.output, other.asked) == (second, {"category": "shipping"}, 1)
    room.ledger()


def test_all_causes_are_told(school: Any) -> None:
    """Where no provider brings an answer the error names each of them with its cause, finish reasons included."""
    room = school(
        FakeVendor("google", faults=[Fault("filtered")] * 9),
        FakeVendor(
            "openai", faults=[Fault("verbatim", status=400, content='{"error": {"message": "no such model"}}')] * 9
        ),
        FakeVendor("openai_compatible", lambda value: "I would say: shipping."),
    )
    with pytest.raises(
        OutputError, match=r"google.*RECITATION.*openai answered 400: no such model.*not JSON"
    ) as caught:
        room.ask()
    assert [problem.path for problem in caught.value.problems] == ["google", "openai", "openai_compatible"]
    away = school(
        FakeVendor("google", faults=[Fault("filtered")]), FakeVendor("openai", faults=[Fault("server_error")] * 9)
    )
    with pytest.raises(RemoteUnavailable, match=r"RECITATION.*openai answered 500: server_error"):
        away.ask()
    refused = school(*(FakeVendor(v, faults=[Fault("unauthorized")]) for v in ("openai", "anthropic")))
    with pytest.raises(RemoteRefused, match=r"openai answered 401.*anthropic answered 401"):
        refused.ask()


def test_two_models_of_one_vendor_are_told_apart(school: Any) -> None:
    """In errors the model's name stands beside the vendor's where that alone says nothing."""
    vendors = [_Weighted("openai", faults=[Fault("refusal")], more={"model": m}) for m in ("gpt-4o-mini", "gpt-4o")]
    with pytest.raises(OutputError, match=r"openai \(gpt-4o-mini\).*openai \(gpt-4o\)"):
        school(*vendors).ask()


def test_a_cheaper_provider_is_asked_where_the_first_does_not_fit_the_budget(school: Any) -> None:
    """A cap that has no room for one provider's worst case may have room for another's."""
    dear, cheap = FakeVendor("anthropic", right), FakeVendor("openai", right)
    assert school(dear, cheap, daily="0.01").ask().provider == "openai"
    assert dear.asked == 0


def test_a_first_answer_is_repaired_before_the_next_provider_is_asked(school: Any) -> None:
    """The repair shows the model a turn of its own that is not empty, as strict servers want it."""
    for vendor in VENDORS:
        first = FakeVendor(vendor, right, faults=[Fault("empty")])
        second = FakeVendor("anthropic", right)
        assert school(first, second).ask().attempts == 2
        assert (first.asked, second.asked) == (2, 0)
        assert "(no answer)" in first.questions[1].turns
        assert "is empty" in first.questions[1].user


def test_an_old_models_tool_may_be_called_with_text(school: Any) -> None:
    """A proxy that hands the tool's input on as JSON text is understood at the first attempt."""
    old = {"model": "claude-3-5-haiku-20241022"}
    room = school(_Weighted("anthropic", right, faults=[Fault("tool_input_text")], more=old))
    assert room.ask().attempts == 1


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("takes", ["json_object", "none"])
def test_servers_without_json_schema(school: Any, vendor: Any, takes: Any, caplog: pytest.LogCaptureFixture) -> None:
    """They are asked in a weaker way, which is remembered; what they refused is free."""
    server = FakeVendor(vendor, right, structured_output=takes)
    room = school(server)
    refused = ["json_object", "none"].index(takes) + 1
    assert room.ask().output == {"category": "shipping"}
    assert server.asked == refused + 1
    assert room.ask().attempts == 1
    assert caplog.text.count("refuses structured_output: json_schema") == 1
    assert "category" in server.questions[-1].system or server.questions[-1].by_tool
    assert room.ledger()["settled"] == 2
    assert room.ledger().get("lost") is None


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("configured", ["json_object", "none"])
def test_a_configured_format_is_asked_for_at_once(school: Any, vendor: Any, configured: Any) -> None:
    """Where apprentice.yaml says what a server takes nothing is tried first."""
    server = _Weighted(vendor, right, structured_output=configured, more={"structured_output": configured})
    assert school(server).ask().attempts == 1
    assert server.questions[0].format == configured


@pytest.mark.parametrize("vendor", VENDORS)
def test_an_enum_too_long_for_the_vendor(school: Any, vendor: Any) -> None:
    """Our own check decides alone where the vendor refuses the schema; other tasks stay enforced."""
    names = [f"product-{n}" for n in range(1_200)]
    long = TaskSettings(
        name="products",
        description="Which product?",
        input_schema={"text": "str"},  # type: ignore[arg-type]
        output_schema={"product": names},  # type: ignore[arg-type]
    )
    answers = iter([{"product": names[7]}, {"product": "product-x"}, {"product": names[8]}, right(None)])
    server = FakeVendor(vendor, lambda value: next(answers))
    room = school(server)
    assert room.ask(long).output == {"product": names[7]}
    assert room.ask(long).output == {"product": names[8]}
    assert room.ask().output == {"category": "shipping"}
    enforced = vendor in ("anthropic",)  # which names no limit
    assert server.questions[0].format == ("json_schema" if enforced else "json_object")
    assert server.questions[-1].format == "json_schema"


def test_a_format_that_is_not_the_reason_is_not_remembered(school: Any) -> None:
    """A refusal that only sounds like it is tried in the weaker formats, told in its own words, and forgotten."""
    sounds = Fault("verbatim", status=400, content='{"error": {"message": "the text holds a schema that is too long"}}')
    server = FakeVendor("openai", right, faults=[sounds] * 3)
    room = school(server)
    with pytest.raises(RemoteRefused, match="holds a schema that is too long"):
        room.ask()
    room.ask()
    assert [question.format for question in server.questions][-1] == "json_schema"


@pytest.mark.parametrize("after", ["86400", "inf", "1e400", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_vendors_pause_is_bounded_and_named(school: Any, after: str) -> None:
    """Later calls of the process say whose wish it is and until when; after ten minutes it is asked again."""
    throttled = Fault(
        "verbatim", status=429, content='{"error": {"message": "out of quota"}}', headers=(("retry-after", after),)
    )
    server = FakeVendor("openai", right, faults=[throttled])
    room = school(server)
    with pytest.raises(RemoteUnavailable, match="429: out of quota"):
        room.ask()
    pause = r"an earlier request was told to wait until 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC \(out of quota\)"
    with pytest.raises(RemoteUnavailable, match=rf"answered 429: {pause}, so this one was not sent$") as caught:
        room.ask()
    assert (caught.value.status, server.asked) == (429, 1)
    assert caught.value.retry_after_s == pytest.approx(600, abs=5)
    room.time.now += 601
    room.ask()
    assert room.ledger() == {"settled": 1}


def test_a_busy_provider_is_named_so(school: Any) -> None:
    """Where all calls at once are under way until the deadline, that is what the error says."""
    release, entered = threading.Event(), threading.Event()

    def slowly(value: Any) -> dict[str, Any]:
        entered.set()
        release.wait(60)
        return right(value)

    room = school(_Weighted("openai", slowly, more={"max_concurrency": 1}), deadline_s=0.2)

    def ask_first() -> None:
        with contextlib.suppress(RemoteUnavailable):  # it may be over its deadline too
            room.ask()

    first = threading.Thread(target=ask_first)
    first.start()
    entered.wait(60)
    with pytest.raises(RemoteUnavailable, match="max_concurrency"):
        room.ask(request_id="second")
    release.set()
    first.join()
    assert sum(room.ledger().values()) == 1


@pytest.mark.parametrize(
    "error",
    [
        httpx.LocalProtocolError("Illegal header value b'Bearer sk-test-0123456789abcdef\\n'"),
        httpx.UnsupportedProtocol("Request URL is missing an 'http://' or 'https://' protocol."),
        httpx.InvalidURL("Invalid port: 'x'"),
        UnicodeEncodeError("ascii", "x", 0, 1, "ordinal not in range(128)"),
    ],
)
def test_what_cannot_be_sent_is_free_and_not_tried_again(school: Any, error: Exception) -> None:
    """A header or an address that is wrong here reaches nobody: no money, one attempt, and no key in the error."""
    server = FakeVendor("openai", right)
    room = school(server, interrupt=error)
    with pytest.raises(RemoteRefused, match=type(error).__name__) as caught:
        room.ask()
    assert "0123456789" not in str(caught.value)
    assert room.slept == []
    assert room.ledger() == {"released": 1}


def _json_values() -> st.SearchStrategy[Any]:
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_NAMES, inner, max_size=5))


_WORDS = (
    "error message code type status details choices content text usage output input candidates parts finishReason "
    "finish_reason stop_reason usageMetadata promptTokenCount refusal prompt_tokens completion_tokens input_tokens "
    "output_tokens incomplete_details reason thought x"
)
_NAMES = st.sampled_from(_WORDS.split())


@st.composite
def _bodies(draw: st.DrawFn, vendor: str) -> bytes:
    """Any bytes, any JSON, or a right answer in which any one node is another value."""
    match draw(st.integers(0, 4)):
        case 0:
            return draw(st.binary(max_size=60))
        case 1:
            return b"[" * draw(st.integers(1, 20_000))
        case 2:
            return json.dumps(draw(_json_values())).encode()
    question = Question("m", "s", "u", (), 64)
    text = draw(st.sampled_from(['{"category":"shipping"}', '{"category":"no"}', "", "prose", '{"category":NaN}']))
    stop = draw(st.sampled_from(["end", "length", "refusal", "filtered"]))
    body = PROTOCOLS[vendor].answer(question, text, stop, 20, in_parts=draw(st.booleans()))
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            places.append((node, key))
            walk(child)

    walk(body)
    node, key = draw(st.sampled_from(places))
    node[key] = draw(_json_values())
    return json.dumps(body).encode()


_HEADER_NAMES = (
    b"retry-after retry-after-ms x-ratelimit-remaining-tokens x-ratelimit-reset-tokens "
    b"anthropic-ratelimit-requests-remaining anthropic-ratelimit-requests-reset"
).split()
_HEADER_VALUES = [
    *(b"0", b"nan", b"inf", b"-5", b"1e400", b"1" * 400 + b"h"),
    *(b"Fri, 31 Dec 9999 23:59:59 GMT", b"9999-12-31T23:59:59+23:59", b"0001-01-01T00:00:00Z"),
]
_HEADERS = st.lists(
    st.tuples(st.sampled_from(_HEADER_NAMES), st.sampled_from(_HEADER_VALUES) | st.binary(max_size=20)), max_size=4
)


@pytest.fixture(scope="module")
def ledger() -> Generator[Store]:
    with Store.open("sqlite://") as store:
        yield store


@pytest.mark.parametrize("helped", [False, True])
@pytest.mark.parametrize("vendor", VENDORS)
@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(data=st.data())
def test_nothing_that_a_vendor_sends_gets_past(vendor: Any, helped: bool, ledger: Store, data: st.DataObject) -> None:
    """Any bodies, statuses, headers: an answer that fits or a documented error, all calls ended, the next one asked."""
    mad, sane = FakeVendor(vendor), FakeVendor("google", right)
    statuses = st.sampled_from([200, 200, 200, 400, 401, 408, 422, 429, 500, 502, 529]) | st.integers(100, 599)
    by_sane = Sender(httpx.Client(transport=sane.transport()))

    def send(request: Request, deadline_s: float) -> Response:
        if request.endpoint.url.host == "sane.invalid":
            return by_sane.send(request, deadline_s)
        return Response(data.draw(statuses), data.draw(_bodies(vendor)), data.draw(_HEADERS))

    other = {**sane.settings(), "base_url": "http://sane.invalid/v1beta", "api_key_env": "SANE"}
    settings = RemoteSettings.model_validate({**mad.settings(), "additional_providers": [other] if helped else []})
    budget = Budget(ledger, BudgetSettings(daily=Decimal(1_000_000)))
    time = Time()
    environ = {**mad.environ, "SANE": sane.key}
    teacher = Teacher(settings, send, environ, random=random.Random(7), monotonic=time, sleep=time.sleep)
    try:
        with budget.account(TASK.name, "r") as account:
            answer = teacher.ask(TASK, VALUE, account)
            account.complete()
    except (OutputError, RemoteRefused, RemoteUnavailable):
        assert not helped
    else:
        assert TASK.output_schema.check(answer.output) == answer.output
        assert answer.cost >= 0
    assert all(cap.reserved == 0 for cap in budget.remaining())
    assert time.now < 1_000 + settings.deadline_s + 1


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
        teacher = Teacher(settings, sender.send, vendor.environ, random=quick)
        with Budget(store, BudgetSettings()).account(TASK.name, "r1") as account:
            answer = teacher.ask(TASK, VALUE, account)
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
        teacher = Teacher(settings, Sender(client).send, vendor.environ)
        budget = Budget(store, BudgetSettings())
        with pytest.raises(RemoteUnavailable, match="still arriving"), budget.account(TASK.name, "r") as account:
            teacher.ask(TASK, VALUE, account)
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
    assert sum(row.calls for row in room.store.spend()) == 2
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
    assert room.ledger() == {"lost": 1, "settled": 1}


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


def test_a_provider_that_refuses_is_there(school: Any) -> None:
    """The trial after an outage may meet a request that the vendor refuses; the next one is asked at once."""
    refused = Fault("verbatim", status=400, content='{"error": {"message": "too long"}}')
    vendor = FakeVendor("anthropic", right)
    room = school(vendor)
    vendor._faults = itertools.repeat(Fault("server_error"))
    while room.teacher.healthy():
        with pytest.raises(RemoteUnavailable):
            room.ask()
    vendor._faults = iter([refused])
    room.time.now += 61
    with pytest.raises(RemoteRefused, match="too long"):
        room.ask()
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


def test_a_queue_for_the_vendor_holds_no_money(school: Any) -> None:
    """Whoever waits for the rate limit has reserved nothing yet: what he waits for can be spent by others."""
    room = school(_Weighted("anthropic", right, more={"requests_per_minute": 60}))
    held: list[Any] = []
    sleep = room.time.sleep
    room.teacher._sleep = lambda seconds: (held.extend(room.store.open_calls()), sleep(seconds))
    for _ in range(3):
        room.ask()
    assert room.slept
    assert held == []


@pytest.mark.parametrize(
    ("status", "state"),
    [
        *((status, "released") for status in (500, 503, 529, 429, 401)),
        *((status, "lost") for status in (502, 504, 408, 524)),
    ],
)
def test_a_gateway_that_gave_up_may_have_been_billed(school: Any, status: int, state: str) -> None:
    """It had asked the vendor and got no answer in time; the vendor's own errors are free."""
    vendor = FakeVendor("anthropic", right)
    room = school(vendor, max_retries=0)
    room.teacher._send = lambda request, deadline_s: Response(status, b'{"error": {"message": "no"}}')
    with pytest.raises((RemoteUnavailable, RemoteRefused)):
        room.ask()
    assert room.ledger() == {state: 1}


def test_an_answer_that_is_said_to_have_cost_nothing_costs_its_worst_case(school: Any) -> None:
    """A gateway that reports zeros for everything it answers does not make a hundred calls free."""
    vendor = FakeVendor("openai", right)
    room = school(vendor)
    send = room.teacher._send

    def nothing_reported(request: Request, deadline_s: float) -> Response:
        response = send(request, deadline_s)
        body = json.loads(response.content)
        body["usage"] = {"prompt_tokens": 150, "completion_tokens": 0}
        return Response(response.status, json.dumps(body).encode())

    room.teacher._send = nothing_reported
    assert room.ask().output == {"category": "shipping"}
    assert room.ledger() == {"lost": 1}
    assert room.budget.remaining()[0].spent > 0


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
    vendor = FakeVendor("anthropic")
    settings = RemoteSettings.model_validate(vendor.settings(model="claude-unknown"))
    with pytest.raises(ConfigError, match="FAKE_ANTHROPIC_KEY"):
        Teacher(settings, Sender().send, {})
    with pytest.raises(ConfigError, match=r"remote\.model.*not known"):
        Teacher(settings, Sender().send, vendor.environ).price_check()
    shipped = RemoteSettings.model_validate(vendor.settings())
    Teacher(shipped, Sender().send, vendor.environ).price_check()


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
