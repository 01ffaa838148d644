"""Merging an adapter into its base: the GGUF that Ollama serves, in llama.cpp's real server."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from apprentice.errors import VersionError
from apprentice.local.adapter import Adapter, LoraLayer, read_adapter
from apprentice.local.base_model import SMOLLM2, resolve_base_model
from apprentice.local.engine import LocalAnswer
from apprentice.local.engines.embedded import EmbeddedEngine
from apprentice.local.engines.llama_cpp import LlamaCppEngine, _stop
from apprentice.local.frame import Frame
from apprentice.local.gguf_file import read_gguf_header, special_tokens, write_merged
from apprentice.local.served import answer_by
from flows.trainers.backends.huggingface import save_adapter
from tests.local.conftest import EMOTION, EMOTIONS, TICKET, TICKETS, Train


def test_the_merged_model_answers_as_base_and_adapter_do(tiny_folder: Path, train: Train, tmp_path: Path) -> None:
    """The same answers to what was trained and to what was not, and the same confidence, field by field."""
    embedded = EmbeddedEngine(str(tiny_folder), Path(), max_new_tokens=60)
    unseen = [{"text": "I was afraid"}, {"text": "please help, the card was sad " * 3}]
    for version, rows in (
        (train("emotion", EMOTION, EMOTIONS), EMOTIONS),
        (train("ticket", TICKET, TICKETS), TICKETS),
    ):
        assert version.adapter is not None
        merged = tmp_path / f"{version.task}.gguf"
        write_merged(read_adapter(version.adapter), tiny_folder / "tiny.gguf", merged, version.name)
        embedded.load(version)
        values = [value for value, _ in rows] + (unseen if rows is EMOTIONS else [])
        ours = embedded.answer_many(version.name, values)
        engine = LlamaCppEngine(str(merged), Path(), threads=1)
        served = engine._bring_up(version, Frame.load(version.adapter), engine._base(), None)
        try:
            for value, answer in zip(values, ours, strict=True):
                theirs = answer_by(served.completer, served.framed, value, 60, time.monotonic() + 30)
                assert isinstance(answer, LocalAnswer)
                assert theirs.output == answer.output
                assert dict(theirs.field_confidence) == pytest.approx(dict(answer.field_confidence), abs=0.02)
        finally:
            _stop(served)
    embedded.close()


def test_a_quantised_base_keeps_what_the_adapter_learnt(tmp_path: Path) -> None:
    """SmolLM2 in four bits: what an adapter changes is written in eight, everything else stays as it is, bit by bit."""
    import gguf

    base = resolve_base_model(SMOLLM2, Path(), dequantise=False).gguf
    assert base is not None
    draw = np.random.default_rng(0)
    a, b = (draw.normal(0, 0.1, shape).astype(np.float32) for shape in ((8, 576), (1536, 8)))
    adapter = Adapter({"model.layers.3.mlp.up_proj": LoraLayer(a, b, 0.5)}, Frame("", "", ""), {})
    merged = tmp_path / "merged.gguf"
    write_merged(adapter, base, merged, "v1")
    before = {tensor.name: tensor for tensor in gguf.GGUFReader(base).tensors}
    after = {tensor.name: tensor for tensor in gguf.GGUFReader(merged).tensors}
    assert list(before) == list(after)
    changed = "blk.3.ffn_up.weight"
    for name, tensor in after.items():
        if name != changed:
            assert tensor.tensor_type == before[name].tensor_type
            assert np.array_equal(tensor.data, before[name].data)
    was, now = (gguf.dequantize(one[changed].data, one[changed].tensor_type) for one in (before, after))
    change = 0.5 * b @ a
    assert np.abs(now - was - change).max() < 0.02 * np.abs(was + change).max()
    assert np.corrcoef((now - was).ravel(), change.ravel())[0, 1] > 0.99
    fields = gguf.GGUFReader(merged).fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert (
        fields["tokenizer.ggml.tokens"].contents() == gguf.GGUFReader(base).fields["tokenizer.ggml.tokens"].contents()
    )


def test_an_adapter_of_another_base_is_not_merged(tiny_folder: Path, tmp_path: Path) -> None:
    """Nothing is left behind."""
    a, b = np.zeros((8, 32), np.float32), np.zeros((32, 8), np.float32)
    adapter = Adapter({"model.layers.0.self_attn.q_proj": LoraLayer(a, b, 1.0)}, Frame("", "", ""), {})
    with pytest.raises(VersionError, match="another base"):
        write_merged(adapter, tiny_folder / "tiny.gguf", tmp_path / "merged.gguf", "v1")
    assert list(tmp_path.iterdir()) == []


def test_the_special_tokens_are_those_of_the_vocabulary(tiny_folder: Path) -> None:
    """Control tokens, however they are spelt."""
    assert special_tokens(tiny_folder / "tiny.gguf") == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert read_gguf_header(tiny_folder / "tiny.gguf").metadata["llama.context_length"] == 512


@pytest.mark.parametrize(("alpha", "written"), [(32.0, "32"), (16, "16"), (0.5, "0.5")])
def test_a_whole_alpha_is_written_as_a_whole_number(tmp_path: Path, alpha: float, written: str) -> None:
    """Other readers of PEFT's file take 32.0 for no whole number."""

    class Saved:
        def save_pretrained(self, folder: Path, **_: object) -> None:
            (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))

    save_adapter(Saved(), tmp_path, "a base")
    assert f'"lora_alpha": {written}\n' in (tmp_path / "adapter_config.json").read_text()
