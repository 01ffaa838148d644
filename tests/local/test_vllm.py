"""vLLM, against a double of the endpoints that the engine uses; the real server is tried by hand (docs/engines.md)."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from apprentice.errors import ConfigError, EngineUnavailable, OutputError, VersionError
from apprentice.local.engine import Version
from apprentice.local.engines.vllm import VllmEngine
from apprentice.schemas.schema import parse_schema
from apprentice.testing.vllm import FakeVllm
from tests.local.written import write_adapter, write_base

EMOTION = parse_schema({"emotion": "joy | fear | anger"})


@pytest.fixture
def version(tmp_path: Path) -> Version:
    return write_adapter(tmp_path / "adapter", "emotion", EMOTION)


@pytest.fixture
def server() -> FakeVllm:
    return FakeVllm()


@pytest.fixture
def engine(server: FakeVllm, tmp_path: Path) -> Iterator[VllmEngine]:
    engine = VllmEngine(
        str(write_base(tmp_path / "base")), Path(), url="http://gpu:8000/v1", transport=server.transport()
    )
    yield engine
    engine.close()


def test_an_adapter_is_loaded_asked_and_unloaded_by_its_name(
    engine: VllmEngine, server: FakeVllm, version: Version
) -> None:
    """The request is the frame's text and the opening; the enum is decided by its first tokens alone."""
    engine.load(version)
    assert server.adapters == {version.name: str(version.adapter)}
    answer = engine.answer(version.name, {"text": "hello"}, deadline_s=5)
    assert answer.output == {"emotion": "joy"}
    assert answer.confidence == pytest.approx(1 / (1 + math.exp(-1) + math.exp(-2)))
    assert server.prompts == ['<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n{"emotion":"']
    engine.unload(version.name)
    assert server.adapters == {}


def test_a_value_that_is_not_among_the_likeliest_counts_as_their_least(
    engine: VllmEngine, server: FakeVllm, version: Version
) -> None:
    """The server lists twenty tokens; what it does not list is rarer than all of them."""
    engine.load(version)
    server.preferred = "xfy"
    answer = engine.answer(version.name, {"text": "hello"}, deadline_s=5)
    assert answer.output == {"emotion": "fear"}
    assert answer.confidence == pytest.approx(1 / (1 + 2 * math.exp(-1)))


def test_free_text_is_written_under_the_grammar(engine: VllmEngine, server: FakeVllm, version: Version) -> None:
    """Its probability is that of its tokens, the end of the turn left out."""
    noted = replace(version, output_schema=parse_schema({"note": "str"}))
    engine.load(noted)
    server.text = 'x"'
    answer = engine.answer(noted.name, {"text": "hello"}, deadline_s=5)
    assert answer.output == {"note": "x"}
    assert answer.confidence == pytest.approx(0.81)
    server.text = "never closed"
    with pytest.raises(OutputError, match="not finished"):
        engine.answer(noted.name, {"text": "hello"}, deadline_s=5)


def test_a_server_that_was_restarted_is_given_its_adapters_again(
    engine: VllmEngine, server: FakeVllm, version: Version
) -> None:
    """Loading asks the server, not a memory of it."""
    engine.load(version)
    server.adapters.clear()
    engine.load(version)
    assert version.name in server.adapters


def test_a_server_without_run_time_adapters_is_a_config_error(
    engine: VllmEngine, server: FakeVllm, version: Version
) -> None:
    """The remedy is in the message."""
    server.runtime_lora = False
    with pytest.raises(ConfigError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        engine.load(version)


def test_down_is_unavailable_and_a_damaged_adapter_never_reaches_the_server(
    engine: VllmEngine, server: FakeVllm, tmp_path: Path, version: Version
) -> None:
    """Two different errors, for the breaker and for the version."""
    assert version.adapter is not None
    folder = shutil.copytree(version.adapter, tmp_path / "damaged")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(VersionError, match="cannot be read"):
        engine.load(replace(version, adapter=folder))
    assert server.adapters == {}
    engine.load(version)
    server.down = True
    with pytest.raises(EngineUnavailable, match="is it running"):
        engine.answer(version.name, {"text": "x"}, deadline_s=5)
    assert not engine.health().ok
    server.down = False
