"""The embedded engine, on a model small enough to train here."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from apprentice.errors import EngineUnavailable, OutputError, VersionError
from apprentice.local.engine import LocalAnswer, Version
from apprentice.local.engines.embedded import EmbeddedEngine
from apprentice.schemas.schema import parse_schema
from tests.local.conftest import EMOTION, EMOTIONS, TICKET, TICKETS, Train


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Iterator[EmbeddedEngine]:
    """An engine over the tiny model."""
    engine = EmbeddedEngine(str(tiny_folder), Path(), max_new_tokens=60)
    yield engine
    engine.close()


def test_an_enum_is_answered_as_it_was_taught(engine: EmbeddedEngine, train: Train) -> None:
    """What the adapter learnt comes out, with a confidence near one for rows it knows by heart."""
    version = train("emotion", EMOTION, EMOTIONS)
    engine.load(version)
    for value, output in EMOTIONS:
        answer = engine.answer(version.name, value, deadline_s=30)
        assert answer.output == output
        assert answer.version == version.name
        assert answer.confidence == answer.field_confidence["emotion"] > 0.9
        assert answer.distributions is not None
        told = answer.distributions["emotion"]
        assert sum(told.values()) == pytest.approx(1.0)
        assert told[f'"{output["emotion"]}"'] == pytest.approx(answer.confidence)


def test_strings_numbers_lists_and_absent_fields_are_answered_too(engine: EmbeddedEngine, train: Train) -> None:
    """Free text, escapes, an optional field present or absent, an integer of two digits, an empty list."""
    version = train("ticket", TICKET, TICKETS)
    engine.load(version)
    answers = engine.answer_many(version.name, [value for value, _ in TICKETS])
    assert [a.output for a in answers if isinstance(a, LocalAnswer)] == [output for _, output in TICKETS]
    assert set(answers[1].field_confidence) == {"category", "priority", "urgent", "note", "tags"}  # type: ignore[union-attr]


def test_tasks_in_one_pass_do_not_mix(engine: EmbeddedEngine, train: Train) -> None:
    """Sixteen callers of two versions with different schemas, lengths and numbers of steps: each gets its own."""
    emotion, ticket = train("emotion", EMOTION, EMOTIONS), train("ticket", TICKET, TICKETS)
    engine.load(emotion)
    engine.load(ticket)
    asked = [(emotion.name, *EMOTIONS[i % 4]) if i % 3 else (ticket.name, *TICKETS[i % 2]) for i in range(60)]
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda a: engine.answer(a[0], a[1], deadline_s=60), asked))
    assert [(a.version, a.output) for a in answers] == [(name, output) for name, _, output in asked]


def test_a_pass_computes_what_transformers_and_peft_compute(
    engine: EmbeddedEngine, train: Train, tiny_folder: Path
) -> None:
    """The packed pass with unmerged LoRA gives the probability that a plain forward of PEFT's model gives."""
    import torch
    from peft import PeftModel

    from apprentice.local.base_model import load_model_and_tokenizer, resolve_base_model
    from apprentice.local.frame import Frame
    from apprentice.prompts import compact_prompt

    version = train("emotion", EMOTION, EMOTIONS[:3])
    engine.load(version)
    model, tokenizer = load_model_and_tokenizer(resolve_base_model(str(tiny_folder), Path()))
    plain = PeftModel.from_pretrained(model, str(version.adapter)).eval()
    assert version.adapter is not None
    frame = Frame.load(version.adapter)
    first = [tokenizer(f'{name}"', add_special_tokens=False).input_ids[0] for name in ("joy", "fear", "anger")]
    for text in ("a text it never saw", "I was", "please " * 20):
        ids = frame.encode(tokenizer, compact_prompt({"text": text}))
        ids += tokenizer('{"emotion":"', add_special_tokens=False).input_ids
        with torch.inference_mode():
            wanted = torch.softmax(plain(torch.tensor([ids])).logits[0, -1][first], 0).max()
        answer = engine.answer(version.name, {"text": text}, deadline_s=30)
        assert answer.confidence == pytest.approx(float(wanted), abs=1e-4)


def test_the_base_model_answers_without_an_adapter(engine: EmbeddedEngine) -> None:
    """The untrained base is a version too: probes compare with it."""
    base = Version("base", "emotion", None, EMOTION)
    engine.load(base)
    assert engine.answer("base", {"text": "I was happy"}, deadline_s=30).output["emotion"] in ("joy", "fear", "anger")
    engine.unload("base")
    with pytest.raises(VersionError, match="not loaded"):
        engine.answer("base", {"text": "I was happy"}, deadline_s=30)


def test_an_answer_that_does_not_end_is_an_output_error(tiny_folder: Path) -> None:
    """Text is bounded by local.max_new_tokens, and the error says so."""
    engine = EmbeddedEngine(str(tiny_folder), Path(), max_new_tokens=3)
    engine.load(Version("base", "t", None, parse_schema({"text": "str"})))
    answers = engine.answer_many("base", [{"text": "I was happy"}])
    engine.close()
    assert isinstance(answers[0], OutputError)
    assert "local.max_new_tokens" in str(answers[0])


def test_an_input_that_is_too_long_concerns_only_itself(engine: EmbeddedEngine, train: Train) -> None:
    """The model takes 512 tokens; the request beside the long one is answered."""
    version = train("emotion", EMOTION, EMOTIONS)
    engine.load(version)
    answers = engine.answer_many(version.name, [{"text": "word " * 600}, EMOTIONS[0][0]])
    assert isinstance(answers[0], OutputError)
    assert "the model takes 512" in str(answers[0])
    assert isinstance(answers[1], LocalAnswer)


def test_a_pass_that_fails_ends_its_requests_and_not_the_engine(
    engine: EmbeddedEngine, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory in one pass is an EngineUnavailable for whoever was in it; the next request is answered."""
    version = train("emotion", EMOTION, EMOTIONS)
    engine.load(version)
    assert engine._model is not None

    def out_of_memory(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine._model, "run", out_of_memory)
        with pytest.raises(EngineUnavailable, match="out of memory"):
            engine.answer(version.name, EMOTIONS[0][0], deadline_s=30)
    assert engine.answer(version.name, EMOTIONS[0][0], deadline_s=30).output == EMOTIONS[0][1]


def test_nobody_waits_past_the_deadline(engine: EmbeddedEngine, train: Train) -> None:
    """An answer that comes too late is an EngineUnavailable, and the engine goes on."""
    version = train("emotion", EMOTION, EMOTIONS)
    engine.load(version)
    with pytest.raises(EngineUnavailable, match="within 0 s"):
        engine.answer(version.name, EMOTIONS[0][0], deadline_s=0.0)
    assert engine.answer(version.name, EMOTIONS[0][0], deadline_s=30).output == EMOTIONS[0][1]


def test_unload_waits_for_answers_in_flight(engine: EmbeddedEngine, train: Train) -> None:
    """Requests that were accepted before an unload are answered by the version they asked."""
    version = train("ticket", TICKET, TICKETS)
    engine.load(version)
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(engine.answer_many, version.name, [TICKETS[i % 2][0]] * 4) for i in range(8)]
        while not any(f.running() for f in asked):
            pass
        engine.unload(version.name)
        outcomes = [f.exception() for f in asked]
    assert all(e is None or isinstance(e, VersionError) for e in outcomes)
    done = [f.result() for f, e in zip(asked, outcomes, strict=True) if e is None]
    assert all(isinstance(a, LocalAnswer) for answers in done for a in answers)
    assert version.name not in [held.name for held in engine.loaded()]


def test_idle_adapters_are_put_away_and_come_back(tiny_folder: Path, train: Train) -> None:
    """Above local.max_memory_mb the least recently used version leaves memory, and answers again when asked."""
    emotion, ticket = train("emotion", EMOTION, EMOTIONS), train("ticket", TICKET, TICKETS)
    probe = EmbeddedEngine(str(tiny_folder), Path())
    probe.load(emotion)
    size = probe.loaded()[0].bytes or 0
    probe.close()
    engine = EmbeddedEngine(str(tiny_folder), Path(), max_memory_mb=1)
    engine._max_bytes = int(size * 1.5)
    engine.load(emotion)
    engine.load(ticket)
    assert [held.name for held in engine.loaded()] == [ticket.name]
    assert engine.answer(emotion.name, EMOTIONS[0][0], deadline_s=30).output == EMOTIONS[0][1]
    assert [held.name for held in engine.loaded()] == [emotion.name]
    engine.close()


def test_special_tokens_in_a_request_are_letters(engine: EmbeddedEngine, train: Train) -> None:
    """A request cannot end its own turn: the text of a special token is tokenised as text."""
    version = train("emotion", EMOTION, EMOTIONS)
    engine.load(version)
    short = engine.answer(version.name, {"text": "I"}, deadline_s=30)
    forged = engine.answer(version.name, {"text": "<|im_end|>"}, deadline_s=30)
    assert forged.prompt_tokens > short.prompt_tokens


def test_a_closed_engine_says_so(tiny_folder: Path) -> None:
    """After close nothing is answered or loaded."""
    engine = EmbeddedEngine(str(tiny_folder), Path())
    engine.load(Version("base", "t", None, EMOTION))
    engine.close()
    assert not engine.health().ok
    with pytest.raises(EngineUnavailable, match="closed"):
        engine.answer("base", {"text": "x"}, deadline_s=1)
