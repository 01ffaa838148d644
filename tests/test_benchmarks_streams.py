"""The replay of recorded streams asks and learns as the product does, and never knows an answer before it is bought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from apprentice.confidence.settings import TrustSettings
from apprentice.student.encoder import DEFAULT, load_encoder
from apprentice.student.fitting import Encodings
from benchmarks.level import noisy_stream, wrongly_served
from benchmarks.recorded import Stream
from benchmarks.streams import Schedule, replay, settings_for
from benchmarks.students import Adapter, Answer, Fitted, Pupils

SETTINGS = TrustSettings(max_disagreement=0.10, delta=0.10)


def stream_of(answers: Sequence[str]) -> Stream:
    return Stream("made", [{"text": str(i)} for i in range(len(answers))], [{"label": a} for a in answers])


class Knowing:
    """Teaches students that answer "a", with every confidence there is; remembers what they were taught."""

    def __init__(self) -> None:
        self.taught: list[tuple[int, ...]] = []
        self.adapters: list[Adapter | None] = []

    def fit(self, rows: Sequence[int], adapter: Adapter | None = None) -> Fitted:
        self.taught.append(tuple(rows))
        self.adapters.append(adapter)
        return Fitted(self, {row: self.answer(row) for row in rows})

    def answer(self, row: int) -> Answer:
        return 0.9 + 0.09 * ((row * 37) % 100) / 100, {"label": "a"}


def pupils(stream: Stream, encodings: Encodings) -> Pupils:
    return Pupils(stream, encodings, load_encoder(DEFAULT))


def test_serves_a_good_student_and_checks_some_of_what_it_serves() -> None:
    teach = Knowing()
    outcome = replay(stream_of(["a"] * 1500), teach, SETTINGS, seed=1)
    figures = outcome.figures()
    assert all(outcome.asked[:60])
    assert figures["first"] < 300
    assert 0.01 < figures["tail"] < 0.3
    assert figures["overall_wrong"] == 0.0
    assert max(len(rows) for rows in teach.taught) <= sum(outcome.asked)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_serves_no_student_that_is_wrong_too_often(seed: int) -> None:
    draw = np.random.default_rng(seed)
    answers = np.where(draw.random(1200) < 0.25, "b", "a").tolist()
    outcome = replay(stream_of(answers), Knowing(), SETTINGS, seed=seed)
    assert outcome.figures()["first"] is None
    assert outcome.keeps(0.0, overall=True)


def test_refits_when_due_on_everything_bought() -> None:
    teach = Knowing()
    replay(stream_of(["a", "b"] * 100), teach, SETTINGS, seed=1, schedule=Schedule(first=40, least=20, growth=0.5))
    assert [len(rows) for rows in teach.taught] == [40, 60, 90, 135]
    assert all(rows == tuple(range(len(rows))) for rows in teach.taught)


def test_an_adapter_joins_when_enough_was_bought_to_hold_some_out_from_it() -> None:
    teach, known = Knowing(), Adapter(60, {})
    schedule = Schedule(first=40, least=20, growth=0.5, held_out=0.5)
    replay(stream_of(["a", "b"] * 100), teach, SETTINGS, seed=1, adapters=[known], schedule=schedule)
    joined = dict(zip(map(len, teach.taught), teach.adapters, strict=True))
    assert joined == {40: None, 60: None, 90: None, 135: known}


def test_no_answer_is_known_before_its_request() -> None:
    """The same to the letter until an answer differs; then what was learnt from it."""
    one, encodings = noisy_stream(np.random.default_rng(4), 500, 0.0, 1.0)
    two = Stream("made", one.inputs, [*one.answers[:150], *[one.answers[0]] * 350])
    first, second = (replay(s, pupils(s, encodings), SETTINGS, seed=5) for s in (one, two))
    assert first.asked[:151] == second.asked[:151]
    assert first.asked != second.asked
    assert not all(first.asked)


def test_no_student_is_judged_by_what_it_learnt() -> None:
    """Labels that nothing foretells: who had learnt them would be right, and of a fair coin nobody is."""
    rng = np.random.default_rng(6)
    stream, encodings = noisy_stream(rng, 240, 0.0, 1.0)
    coins: list[Mapping[str, str]] = [{"label": "ab"[c]} for c in rng.integers(2, size=240)]
    tossed = Stream("coin", stream.inputs, coins)
    judged = pupils(tossed, encodings).fit(range(240)).judged
    assert len(judged) == 240
    assert np.mean([output == coins[row] for row, (_, output) in judged.items()]) < 0.6
    assert np.mean([confidence for confidence, _ in judged.values()]) < 0.65


def test_an_adapter_speaks_of_what_it_was_not_taught() -> None:
    """It knows what the head cannot; of the rows that it was taught the head speaks alone."""
    rng = np.random.default_rng(7)
    stream, encodings = noisy_stream(rng, 300, 0.0, 1.0)
    coins: list[Mapping[str, str]] = [{"label": "ab"[c]} for c in rng.integers(2, size=300)]
    tossed = Stream("coin", stream.inputs, coins)
    sure = np.array([[0.98, 0.02] if one["label"] == "a" else [0.02, 0.98] for one in coins], np.float32)
    fitted = pupils(tossed, encodings).fit(range(300), Adapter(100, {"label": sure}))
    right = {row: output == coins[row] for row, (_, output) in fitted.judged.items()}
    assert np.mean([right[row] for row in range(100)]) < 0.65
    assert np.mean([right[row] for row in range(100, 300)]) > 0.95


def test_the_settings_are_those_of_the_example() -> None:
    settings = settings_for(0.05, overall=False, delta=0.2)
    assert (settings.max_disagreement, settings.max_disagreement_overall) == (0.05, None)
    whole = settings_for(0.05, overall=True, delta=0.2)
    assert (whole.max_disagreement, whole.max_disagreement_overall) == (None, 0.05)
    assert settings.delta == 0.2
    assert settings.coaching_trigger == 0.60


def test_a_learner_that_is_asked_again_and_again_is_rarely_certified_wrongly() -> None:
    """At a noise just above what may differ, nothing may be served; a little below, much of it is."""
    assert wrongly_served(12, 400, SETTINGS, noise=0.102, apart=1.0) <= 4  # P(Binomial(12, .1) > 4) = .004
    assert wrongly_served(3, 400, SETTINGS, noise=0.02, apart=1.0) == 3
