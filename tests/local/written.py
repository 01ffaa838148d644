"""Adapters and bases written by hand, for tests that look at files and never compute with them: no torch needed."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

from apprentice.local.adapter import content_name
from apprentice.local.engine import Version
from apprentice.local.frame import Frame
from apprentice.schemas.schema import Schema

FRAME = Frame("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>")
RANK = 8


def shapes(hidden: int = 64) -> dict[str, tuple[int, int]]:
    """The linear layers of a Llama of one layer, [out, in]."""
    half, inner = hidden // 2, 2 * hidden
    attention = {"q_proj": (hidden, hidden), "k_proj": (half, hidden), "v_proj": (half, hidden)}
    return {f"model.layers.0.self_attn.{name}": shape for name, shape in attention.items()} | {
        "model.layers.0.mlp.down_proj": (hidden, inner)
    }


def write_base(folder: Path, hidden: int = 64) -> Path:
    """A folder that passes for a base model as long as nobody computes with it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    _safetensors(folder / "model.safetensors", {f"{name}.weight": shape for name, shape in shapes(hidden).items()})
    return folder


def write_adapter(folder: Path, task: str, schema: Schema, *, hidden: int = 64, alpha: int = 2 * RANK) -> Version:
    """A LoRA of such a base, as PEFT writes it; another ``alpha`` makes it another version."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": alpha, "base_model_name_or_path": "a base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    matrices: dict[str, tuple[int, int]] = {}
    for name, (rows, columns) in shapes(hidden).items():
        matrices[f"base_model.model.{name}.lora_A.weight"] = (RANK, columns)
        matrices[f"base_model.model.{name}.lora_B.weight"] = (rows, RANK)
    _safetensors(folder / "adapter_model.safetensors", matrices)
    FRAME.save(folder)
    return Version(content_name(folder), task, folder, schema)


def _safetensors(path: Path, tensors: Mapping[str, tuple[int, int]]) -> None:
    header, body = {}, b""
    for name, (rows, columns) in tensors.items():
        content = struct.pack("<f", 0.5) * (rows * columns)
        header[name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [len(body), len(body) + len(content)]}
        body += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def write_base_with_gguf(folder: Path, hidden: int = 64) -> Path:
    """Such a folder with the same as GGUF beside it, and a vocabulary of special tokens."""
    import gguf
    import numpy as np

    write_base(folder, hidden)
    writer = gguf.GGUFWriter(str(folder / "base.gguf"), "llama")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_token_list(["a", "<|im_start|>", "<|im_end|>"])
    writer.add_token_types([1, 3, 3])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, shape in shapes(hidden).items():
        writer.add_tensor(f"{names.get_name(name)}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def write_tokenizer(path: Path) -> None:
    """A tokenizer whose tokens are characters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.save(str(path))


def write_gguf_header(path: Path) -> None:
    """A GGUF with one number, one text, one list and one tensor of four bytes."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    fields = text("n.block_count") + struct.pack("<II", 4, 2)
    fields += text("general.architecture") + struct.pack("<I", 8) + text("llama")
    fields += text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    tensor = text("blk.0.attn_q.weight") + struct.pack("<I2QIQ", 2, 1, 1, 0, 0)
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 1, 3) + fields + tensor + bytes(64))
