"""The baseline is the bar that the product is measured by: its thresholds are exact, and it knows no answer early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from benchmarks import baseline
from benchmarks.baseline import Outcome, _threshold, features, replay
from benchmarks.recorded import Stream, read_stream


def world(rows: int, *, noise: float, seed: int = 0) -> tuple[Stream, np.ndarray[Any, np.dtype[np.float64]]]:
    """Two classes that lie apart; of ``noise`` of the requests the answer is the other one."""
    draw = np.random.default_rng(seed)
    kind = draw.integers(2, size=rows)
    x = draw.normal(size=(rows, 4)) + 4.0 * kind[:, None]
    kind = np.where(draw.random(rows) < noise, 1 - kind, kind)
    inputs = [{"text": f"request {i}"} for i in range(rows)]
    return Stream("made", inputs, [{"label": "ab"[k]} for k in kind]), x


@pytest.mark.parametrize("overall", [False, True])
@pytest.mark.parametrize(("rows", "promise"), [(60, 0.05), (200, 0.05), (80, 0.10), (300, 0.10)])
def test_a_slice_passes_with_probability_delta_at_most_and_no_stricter_rule_is_needed(
    rows: int, promise: float, overall: bool
) -> None:
    """Enumerated: every number of errors, weighed by how likely it is at a disagreement of just the promise."""
    delta = 0.10
    passed = [
        _threshold(np.full(rows, 0.5), np.arange(rows) >= errors, promise, overall, delta) is not None
        for errors in range(rows + 1)
    ]
    most = passed.index(False) - 1
    assert passed == [errors <= most for errors in range(rows + 1)]
    assert binom.cdf(most, rows, promise) <= delta < binom.cdf(most + 1, rows, promise)


@pytest.mark.parametrize("overall", [False, True])
def test_a_slice_that_misses_its_target_is_seldom_chosen(overall: bool) -> None:
    """Disagreement grows as confidence falls; the whole sequence of tests errs with probability delta, not each."""
    draw = np.random.default_rng(1)
    promise, delta, wrong, streams = 0.10, 0.10, 0, 1000
    for _ in range(streams):
        confidence = draw.random(250)
        right = draw.random(250) >= 0.4 * (1.0 - confidence)
        threshold = _threshold(confidence, right, promise, overall, delta)
        if threshold is not None:
            # Errors of a uniform confidence above t: the integral of 0.4 (1 - g) from t to 1.
            errors = 0.2 * (1.0 - threshold) ** 2
            wrong += errors > promise if overall else errors / (1.0 - threshold) > promise
    assert 0 < wrong <= binom.ppf(0.9999, streams, delta)


def test_too_few_comparisons_to_pass_are_no_failure() -> None:
    """At 5 % and an error rate of 10 % no slice passes with fewer than 45, and every one with 45 flawless ones."""
    none = _threshold(np.linspace(0, 1, 44), np.ones(44, bool), 0.05, False, 0.10)
    some = _threshold(np.linspace(0, 1, 45), np.ones(45, bool), 0.05, False, 0.10)
    assert none is None
    assert some == 0.0


def test_asks_the_remote_until_a_slice_is_certified_and_then_seldom() -> None:
    stream, x = world(600, noise=0.0)
    outcome = replay(stream, x, promise=0.10, overall=False, delta=0.10, seed=0)
    figures = outcome.figures()
    assert all(outcome.asked[:60])
    assert figures["first"] == 60
    assert figures["tail"] < 0.15
    assert figures["overall_wrong"] == 0.0
    assert outcome.keeps(0.0, overall=True)


def test_never_serves_what_it_cannot_predict() -> None:
    stream, x = world(500, noise=0.5)
    outcome = replay(stream, x, promise=0.10, overall=False, delta=0.10, seed=0)
    assert outcome.figures() == {"remote": 1.0, "tail": 1.0, "first": None, "served_wrong": None, "overall_wrong": 0.0}


def test_no_answer_is_known_before_its_request() -> None:
    """Other answers from request 20 on change no decision up to it; a longer stream changes none of a shorter."""
    stream, x = world(400, noise=0.0)
    other = Stream("made", stream.inputs, [*stream.answers[:20], *({"label": "ab"[i % 2]} for i in range(380))])
    one, two = (replay(s, x, promise=0.10, overall=False, delta=0.10, seed=3) for s in (stream, other))
    assert one.asked[:21] == two.asked[:21]
    assert one.asked != two.asked
    short = Stream("made", stream.inputs[:200], stream.answers[:200])
    assert replay(short, x[:200], promise=0.10, overall=False, delta=0.10, seed=3).asked == one.asked[:200]


def test_an_answer_of_two_fields_is_wrong_if_either_is() -> None:
    stream, x = world(400, noise=0.0)
    draw = np.random.default_rng(5)
    coin = [str(c) for c in draw.integers(2, size=400)]
    two = Stream("made", stream.inputs, [a | {"coin": c} for a, c in zip(stream.answers, coin, strict=True)])
    outcome = replay(two, x, promise=0.10, overall=False, delta=0.10, seed=0)
    assert outcome.figures()["first"] is None


def test_figures_count_what_was_served() -> None:
    outcome = Outcome(asked=[True, True, False, False, True, False], wrong=[False, False, True, False, False, False])
    figures = outcome.figures()
    assert figures["remote"] == 0.5
    assert figures["tail"] == 0.5
    assert figures["first"] == 2
    assert figures["served_wrong"] == pytest.approx(1 / 3)
    assert figures["overall_wrong"] == pytest.approx(1 / 6)
    assert not outcome.keeps(0.3, overall=False)
    assert outcome.keeps(0.2, overall=True)


def encode(texts: list[str]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([[len(text), text.count("a"), text.count("b")] for text in texts], np.float64)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of recorded answers, in the form of each stream's source."""
    gpt, llama = "gpt-3.5-turbo-1106", "llama-2-70b-chat"
    emotions = [("a good day", "joy", "joy"), ("a bad day", "sadness", "anger"), ("bbb", "anger", None)] * 40
    isear = [
        {
            "input": {"text": text},
            "answers": {gpt: {"emotion": one}} | ({} if two is None else {llama: {"emotion": two}}),
        }
        for text, one, two in emotions
    ]
    offers = [
        {"input": {"left": {"title": "a", "price": "1"}, "right": {"title": "b"}}, "answers": {"gpt-5.2": {"match": m}}}
        for m in ("yes", "no")
    ]
    mined = [
        {
            "input": {"title": "green tea bags", "category": "Tea"},
            "answers": {"gpt-4-0613": {"Flavor": "green", "Brand": "n/a", "Form": "bags"}},
        }
    ]
    for name, rows in (("isear", isear), ("em_abt_buy", offers), ("oa_mine", mined)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return tmp_path


def test_reads_every_stream(data: Path) -> None:
    assert len(read_stream(data, "isear")) == 120
    two = read_stream(data, "isear_two")
    assert len(two) == 80
    assert two.values() == {"emotion": ("joy", "sadness"), "reading": ("anger", "joy")}
    pairs = read_stream(data, "em_abt_buy")
    assert pairs.texts()[0] == ("title: a, price: 1", "title: b")
    assert features(pairs, encode).shape == (2, 12)
    nodes = read_stream(data, "oa_nodes")
    assert nodes.inputs[1] == {"phrase": "bags", "title": "green tea bags"}
    assert [a["node"] for a in nodes.answers] == ["Tea/Flavor", "Tea/Form"]
    with pytest.raises(ValueError, match="there is no stream 'other'"):
        read_stream(data, "other")


def test_an_order_shuffles_requests_with_their_answers(data: Path) -> None:
    whole = read_stream(data, "isear")
    stream, places = whole.shuffled(7)
    assert sorted(places) == list(range(120))
    assert places != list(range(120))
    assert [(stream.inputs[k], stream.answers[k]) for k in range(120)] == [
        (whole.inputs[i], whole.answers[i]) for i in places
    ]
    assert whole.shuffled(7)[1] == places


def test_prints_a_line_for_every_run(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(baseline, "encoder", lambda: encode)
    baseline.main(["--data", str(data), "--streams", "isear", "--promises", "0.1", "--orders", "0", "1"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:5] == ["stream", "promise", "order", "by", "remote"]
    assert [row.split()[:5] for row in rows] == [
        ["isear", "0.10", kind, order, "baseline"] for kind in ("served", "overall") for order in ("0", "1")
    ]
    assert all(row.split()[-1] == "yes" and int(row.split()[7]) == 60 for row in rows)
