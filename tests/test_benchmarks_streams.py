"""The replay of recorded streams asks and learns as the product does, and never knows an answer before it is bought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pytest

from apprentice.confidence.settings import TrustSettings
from benchmarks.recorded import Stream
from benchmarks.streams import Answer, Logistic, Schedule, progressive, replay, settings_for

SETTINGS = TrustSettings(max_disagreement=0.10, delta=0.10)


def stream_of(answers: Sequence[str]) -> Stream:
    return Stream("made", [{"text": str(i)} for i in range(len(answers))], [{"label": a} for a in answers])


class Knowing:
    """Answers "a", or "b" where its confidence is low: right as often as the stream makes it."""

    def __init__(self, taught: list[tuple[int, ...]], rows: Sequence[int]) -> None:
        taught.append(tuple(rows))

    def answer(self, rows: Sequence[int]) -> list[Answer]:
        return [(0.5 + 0.49 * ((row * 37) % 100) / 100, {"label": "a"}) for row in rows]


class Guessing:
    """Answers by the first half of what it was taught, and remembers whatever it was asked."""

    def __init__(self, stream: Stream, rows: Sequence[int]) -> None:
        self.last = max(rows)
        self.label = stream.answers[rows[0]]["label"]

    def answer(self, rows: Sequence[int]) -> list[Answer]:
        assert min(rows) > self.last or len(rows) > 1, "it was asked for what it was taught"
        return [(0.9, {"label": self.label}) for _ in rows]


def test_serves_a_good_student_and_checks_some_of_what_it_serves() -> None:
    taught: list[tuple[int, ...]] = []
    outcome = replay(stream_of(["a"] * 1500), partial(Knowing, taught), SETTINGS, seed=1)
    figures = outcome.figures()
    assert all(outcome.asked[:60])
    assert figures["first"] < 300
    assert 0.01 < figures["tail"] < 0.3
    assert figures["overall_wrong"] == 0.0
    assert max(len(rows) for rows in taught) <= sum(outcome.asked)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_serves_no_student_that_is_wrong_too_often(seed: int) -> None:
    draw = np.random.default_rng(seed)
    answers = np.where(draw.random(1200) < 0.25, "b", "a").tolist()
    outcome = replay(stream_of(answers), partial(Knowing, []), SETTINGS, seed=seed)
    assert outcome.figures()["first"] is None
    assert outcome.keeps(0.0, overall=True)


def test_refits_when_due_on_everything_bought() -> None:
    taught: list[tuple[int, ...]] = []
    schedule = Schedule(first=40, practice=20, least=20, growth=0.5)
    replay(stream_of(["a", "b"] * 100), partial(Knowing, taught), SETTINGS, seed=1, schedule=schedule)
    assert [len(rows) for rows in taught if len(rows) >= 40] == [40, 60, 90, 135]
    assert all(rows == tuple(range(len(rows))) for rows in taught)


def test_progressive_answers_come_from_rows_before_alone() -> None:
    """No answer of row 30 on changes what is said of rows up to it."""

    class Counting:
        def __init__(self, stream: Stream, rows: Sequence[int]) -> None:
            self.share = sum(stream.answers[row]["label"] == "a" for row in rows) / len(rows)

        def answer(self, rows: Sequence[int]) -> list[Answer]:
            return [(self.share, {"label": "a"}) for _ in rows]

    one = stream_of(["a", "b"] * 30)
    two = stream_of(["a", "b"] * 15 + ["a"] * 30)
    schedule = Schedule(practice=10, growth=0.1)
    first, second = (progressive(range(60), partial(Counting, s), schedule) for s in (one, two))
    assert first[:10] == [None] * 10
    assert all(answer is not None for answer in first[10:])
    assert first[:31] == second[:31]
    assert first != second


def test_no_answer_is_known_before_its_request() -> None:
    draw = np.random.default_rng(4)
    kind = draw.integers(2, size=500)
    x = draw.normal(size=(500, 3)) + 4.0 * kind[:, None]
    one = stream_of(["ab"[k] for k in kind])
    two = stream_of(["ab"[k] for k in kind[:150]] + ["a"] * 350)
    first, second = (replay(s, partial(Logistic, s, x), SETTINGS, seed=5) for s in (one, two))
    assert first.asked[:151] == second.asked[:151]
    assert first.asked != second.asked


def test_the_student_is_asked_only_for_what_it_has_not_learnt() -> None:
    stream = stream_of(["a"] * 300)
    teach = partial(Guessing, stream)
    assert not all(replay(stream, teach, SETTINGS, seed=1).asked)


def test_the_settings_are_those_of_the_example() -> None:
    settings = settings_for(0.05, overall=False, delta=0.2)
    assert (settings.max_disagreement, settings.max_disagreement_overall) == (0.05, None)
    whole = settings_for(0.05, overall=True, delta=0.2)
    assert (whole.max_disagreement, whole.max_disagreement_overall) == (None, 0.05)
    assert settings.delta == 0.2
    assert settings.coaching_trigger == 0.60


def test_logistic_says_how_sure_it_is_that_every_field_is_right() -> None:
    draw = np.random.default_rng(6)
    kind = draw.integers(2, size=200)
    x = draw.normal(size=(200, 3)) + 4.0 * kind[:, None]
    answers: list[Mapping[str, str]] = [
        {"easy": "ab"[k], "coin": str(c)} for k, c in zip(kind, draw.integers(2, size=200), strict=True)
    ]
    stream = Stream("made", [{"text": str(i)} for i in range(200)], [dict(a) for a in answers])
    given = Logistic(stream, x, range(100)).answer(range(100, 200))
    assert np.mean([output["easy"] == answers[i + 100]["easy"] for i, (_, output) in enumerate(given)]) > 0.95
    assert np.mean([confidence for confidence, _ in given]) < 0.8
