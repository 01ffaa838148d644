"""Ollama, by its published API, against a double that is strict about it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from apprentice.errors import EngineUnavailable, OutputError, VersionError
from apprentice.local.engine import LocalAnswer, Version
from apprentice.local.ollama import OllamaEngine
from apprentice.local.whole import UNKNOWN
from apprentice.schema import parse_schema
from apprentice.testing.ollama import FakeOllama
from tests.local.written import write_adapter

EMOTION = parse_schema({"emotion": "joy | fear | anger"})

type Tokens = list[tuple[str, float]]


def joyful(model: str, prompt: str) -> Tokens:
    """Says joy to everything, with spaces as a server may put them, half sure of the value."""
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    return [('{ "', -0.1), ("emotion", 0.0), ('": "', 0.0), ("joy", math.log(0.5)), ('"', math.log(0.9)), (" }", -0.2)]


@pytest.fixture
def version(tmp_path: Path) -> Version:
    return write_adapter(tmp_path / "adapter", "emotion", EMOTION)


@pytest.fixture
def server() -> FakeOllama:
    return FakeOllama(joyful)


@pytest.fixture
def engine(server: FakeOllama) -> Iterator[OllamaEngine]:
    engine = OllamaEngine("base", transport=server.transport())
    yield engine
    engine.close()


def test_a_version_becomes_a_model_of_base_and_adapter(
    engine: OllamaEngine, server: FakeOllama, version: Version
) -> None:
    """The adapter's files are pushed once, the model is created once, and it is deleted when the version goes."""
    engine.load(version)
    engine.load(version)
    model = f"apprentice-emotion:{version.name}"
    assert set(server.models) == {"base:latest", model}
    assert server.models[model]["template"] == "{{ .Prompt }}"
    assert len(server.blobs) == 2
    engine.unload(version.name)
    assert set(server.models) == {"base:latest"}


def test_the_confidence_is_that_of_the_values_tokens(engine: OllamaEngine, version: Version) -> None:
    """Braces, names and spaces count for nothing; the value and its closing quote do."""
    engine.load(version)
    answer = engine.answer(version.name, {"text": "I was happy"}, deadline_s=5)
    assert answer.output == {"emotion": "joy"}
    assert answer.confidence == pytest.approx(0.45)


def test_a_server_without_log_probabilities_tells_nothing_apart(version: Version) -> None:
    """Every answer of an older server has the same confidence."""
    server = FakeOllama(joyful, with_logprobs=False)
    engine = OllamaEngine("base", transport=server.transport())
    engine.load(version)
    answers = engine.answer_many(version.name, [{"text": "a"}, {"text": "b"}])
    assert {a.confidence for a in answers if isinstance(a, LocalAnswer)} == {UNKNOWN}
    engine.close()


def test_a_model_that_is_gone_or_refused_is_a_version_error(
    engine: OllamaEngine, server: FakeOllama, version: Version
) -> None:
    """A base that was never pulled and an adapter of another architecture are named."""
    with pytest.raises(VersionError, match="ollama pull other"):
        OllamaEngine("other", transport=server.transport()).load(Version("base", "t", None, EMOTION))
    server.refuses_adapters = True
    with pytest.raises(VersionError, match="unsupported architecture"):
        engine.load(version)


def test_a_server_that_is_down_is_unavailable(engine: OllamaEngine, server: FakeOllama, version: Version) -> None:
    """Loading, answering and health all say so."""
    engine.load(version)
    server.down = True
    with pytest.raises(EngineUnavailable, match="is it running"):
        engine.answer(version.name, {"text": "x"}, deadline_s=5)
    with pytest.raises(EngineUnavailable, match="ollama serve"):
        engine.load(version)
    assert not engine.health().ok


def test_an_answer_outside_the_schema_is_an_output_error(
    engine: OllamaEngine, server: FakeOllama, version: Version
) -> None:
    """Also when the server promised to keep to it."""
    engine.load(version)
    server.writer = lambda model, prompt: [('{"emotion":', 0.0)]
    with pytest.raises(OutputError, match="is not JSON"):
        engine.answer(version.name, {"text": "x"}, deadline_s=5)
