"""llama.cpp's real server, in processes of its own, on a model small enough to train here."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apprentice.errors import ConfigError, LocalError, OutputError, VersionError
from apprentice.local.engine import LocalAnswer, Version
from apprentice.local.engines.embedded import EmbeddedEngine
from apprentice.local.engines.llama_cpp import LlamaCppEngine
from apprentice.local.gguf_file import read_gguf_header
from apprentice.local.switch import Switch
from tests.local.conftest import EMOTION, EMOTIONS, TICKET, TICKETS, Train


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Iterator[LlamaCppEngine]:
    """An engine that starts its own servers."""
    engine = LlamaCppEngine(str(tiny_folder), Path(), max_new_tokens=60, threads=1)
    yield engine
    engine.close()


def test_it_answers_and_doubts_as_the_embedded_engine_does(
    engine: LlamaCppEngine, train: Train, tiny_folder: Path
) -> None:
    """One adapter, two engines: the same answers and, in the same precision, the same confidence, field by field."""
    embedded = EmbeddedEngine(str(tiny_folder), Path(), max_new_tokens=60)
    unseen = [{"text": "I was afraid"}, {"text": "please help, the card was sad " * 3}, {"text": "é <|im_end|> x"}]
    for version, rows in (
        (train("emotion", EMOTION, EMOTIONS), EMOTIONS),
        (train("ticket", TICKET, TICKETS), TICKETS),
    ):
        engine.load(version)
        embedded.load(version)
        values = [value for value, _ in rows] + (unseen if rows is EMOTIONS else [])
        ours = embedded.answer_many(version.name, values)
        theirs = engine.answer_many(version.name, values)
        for (_, output), answer in zip(rows, theirs, strict=False):
            assert isinstance(answer, LocalAnswer)
            assert answer.output == output
        for a, b in zip(ours, theirs, strict=True):
            assert isinstance(a, LocalAnswer)
            assert isinstance(b, LocalAnswer)
            assert a.output == b.output
            assert a.prompt_tokens == b.prompt_tokens
            assert dict(b.field_confidence) == pytest.approx(dict(a.field_confidence), abs=0.02)
    embedded.close()


def test_versions_change_under_load_without_a_lost_or_mixed_answer(engine: LlamaCppEngine, train: Train) -> None:
    """A new server comes up beside the old one, takes over, and the old one stops; a rollback is the same again."""
    one = train("emotion", EMOTION, EMOTIONS)
    other = train("emotion", EMOTION, [(value, {"emotion": "joy"}) for value, _ in EMOTIONS])
    versions = {v.name: v for v in (one, other)}
    expected = {one.name: [o["emotion"] for _, o in EMOTIONS], other.name: ["joy"] * len(EMOTIONS)}
    alerts: list[str] = []
    switch = Switch(engine, lambda task, name: versions[name], alert=lambda kind, task, evidence: alerts.append(kind))
    switch.follow("emotion", one.name)
    assert switch.wait_until_serving("emotion", one.name, 60)
    stop: list[bool] = []

    def call(start: int) -> int:
        count = start
        while not stop:
            count += 1
            answer = switch.answer("emotion", EMOTIONS[count % 4][0], 30.0)
            assert answer.output["emotion"] == expected[answer.version][count % 4]
        return count - start

    with ThreadPoolExecutor(8) as threads:
        callers = [threads.submit(call, i) for i in range(8)]
        for version in (other, one, other):
            switch.follow("emotion", version.name)
            assert switch.wait_until_serving("emotion", version.name, 60)
        stop.append(True)
        assert sum(caller.result() for caller in callers) > 8
    switch.close()
    assert alerts == []


def test_a_corrupt_gguf_never_reaches_llama_cpp(tiny_folder: Path, tmp_path: Path, train: Train) -> None:
    """A file that would take the process with it is refused before."""
    version = train("emotion", EMOTION, EMOTIONS)
    whole = (tiny_folder / "tiny.gguf").read_bytes()
    for content in (whole[: len(whole) // 2], b"no model at all, just some text", whole[:30]):
        base = tmp_path / "base.gguf"
        base.write_bytes(content)
        engine = LlamaCppEngine(str(base), Path())
        with pytest.raises(VersionError, match="fetch it again"):
            engine.load(version)
        engine.close()


def test_a_server_that_dies_says_so_and_loading_it_again_heals_it(engine: LlamaCppEngine, train: Train) -> None:
    """Its crash is not the application's."""
    version = train("emotion", EMOTION, EMOTIONS)
    engine.load(version)
    value, output = EMOTIONS[0]
    assert engine.answer(version.name, value, deadline_s=30).output == output
    process = process_of(engine, version)
    process.kill()
    process.wait()
    with pytest.raises(VersionError, match="has ended"):
        engine.answer(version.name, value, deadline_s=5)
    assert not engine.health().ok
    engine.load(version)
    assert engine.health().ok
    assert engine.answer(version.name, value, deadline_s=30).output == output


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_dies_or_freezes_is_replaced_by_itself(tiny_folder: Path, train: Train, blow: int) -> None:
    """Nobody loads anything by hand: requests fail for a while, then the same version answers again."""
    version = train("emotion", EMOTION, EMOTIONS)
    engine = LlamaCppEngine(str(tiny_folder), Path(), threads=1)
    alerts: list[str] = []
    switch = Switch(
        engine, lambda task, name: version, alert=lambda kind, task, evidence: alerts.append(kind), recheck_s=0.05
    )
    switch.follow("emotion", version.name)
    assert switch.wait_until_serving("emotion", version.name, 60)
    value, output = EMOTIONS[0]
    assert switch.answer("emotion", value, 30).output == output
    first = process_of(engine, version)
    os.kill(first.pid, blow)
    ends = time.monotonic() + 60
    while switch.healthy("emotion"):
        assert time.monotonic() < ends
        with contextlib.suppress(LocalError):
            switch.answer("emotion", value, 0.3)
    while not switch.healthy("emotion"):
        assert time.monotonic() < ends, "it was not replaced"
        time.sleep(0.05)
    assert switch.answer("emotion", value, 30).output == output
    assert process_of(engine, version).pid != first.pid
    assert first.wait(10) is not None, "the old server is still there"
    assert alerts == ["engine_unavailable", "engine_recovered"]
    switch.close()
    engine.close()


def process_of(engine: LlamaCppEngine, version: Version) -> Any:
    served = engine._versions.get(version.name)
    assert served is not None
    assert served.process is not None
    return served.process


@pytest.mark.parametrize("damage", [b"no adapter", b"", None])
def test_a_damaged_conversion_is_made_again(
    engine: LlamaCppEngine, train: Train, tmp_path: Path, damage: bytes | None
) -> None:
    """Cut, replaced, or (None) with another number in the middle, which would load and answer otherwise."""
    trained = train("emotion", EMOTION, EMOTIONS)
    assert trained.adapter is not None
    version = replace(trained, adapter=shutil.copytree(trained.adapter, tmp_path / "adapter"))
    engine.unload(version.name)
    engine.load(version)
    converted = tmp_path / "adapter" / f"{version.name}.gguf"
    whole = converted.read_bytes()
    if damage is None:
        changed = bytearray(whole)
        changed[-100:] = bytes(100)
        damage = bytes(changed)
    converted.write_bytes(damage)
    engine.unload(version.name)
    engine.load(version)
    assert converted.read_bytes() == whole
    assert engine.answer(version.name, EMOTIONS[0][0], deadline_s=30).output == EMOTIONS[0][1]
    engine.unload(version.name)


def test_what_llama_cpp_refuses_is_a_version_error(
    engine: LlamaCppEngine, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the server's process says or dies of: the error names the version, and nothing is left behind."""
    version = train("emotion", EMOTION, [(value, {"emotion": "fear"}) for value, _ in EMOTIONS])
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no adapter")
    held = engine.loaded()
    monkeypatch.setattr(engine, "_lora", lambda *_: broken)
    with pytest.raises(VersionError, match=f"cannot start with version {version.name}"):
        engine.load(version)
    assert engine.loaded() == held


def test_a_base_without_a_gguf_is_a_config_error(tiny_folder: Path, tmp_path: Path) -> None:
    """llama.cpp reads nothing else, and the remedy says so."""
    folder = shutil.copytree(tiny_folder, tmp_path / "hf")
    (folder / "tiny.gguf").unlink()
    with pytest.raises(ConfigError, match="comes with no GGUF"):
        LlamaCppEngine(str(folder), Path()).load(Version("base", "t", None, EMOTION))


def test_the_header_tells_shapes_and_metadata(tiny_folder: Path) -> None:
    """What the conversion of adapters relies on."""
    header = read_gguf_header(tiny_folder / "tiny.gguf")
    assert header.metadata["general.architecture"] == "llama"
    assert header.tensors["blk.0.attn_k.weight"] == (64, 32)


def test_text_that_does_not_end_and_input_that_is_too_long_are_output_errors(
    engine: LlamaCppEngine, train: Train, tiny_folder: Path
) -> None:
    """Both are about this one request, and the server goes on."""
    version = train("ticket", TICKET, TICKETS)
    short = LlamaCppEngine(str(tiny_folder), Path(), max_new_tokens=2, threads=1)
    short.load(version)
    answers = short.answer_many(version.name, [TICKETS[0][0], {"text": "word " * 9000}])
    short.close()
    assert [type(answer) for answer in answers] == [OutputError, OutputError]


def test_the_servers_process_gets_no_secrets(tiny_folder: Path, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """It opens files and answers on a port: a vendor's key has no business there; what it computes with stays."""
    monkeypatch.setenv("SOME_VENDORS_API_KEY", "sk-of-nobody-0123456789")
    monkeypatch.setenv("GGML_SETTING", "kept")
    engine = LlamaCppEngine(str(tiny_folder), Path(), threads=1)
    version = train("emotion", EMOTION, EMOTIONS)
    engine.load(version)
    environment = Path(f"/proc/{process_of(engine, version).pid}/environ").read_bytes()
    engine.close()
    assert b"sk-of-nobody" not in environment
    assert b"GGML_SETTING=kept" in environment
