"""GGUF: reading a base model's header, and writing a PEFT adapter as a LoRA that llama.cpp loads.

llama.cpp aborts on a file that it cannot digest, and says little; so a file is checked here first. Format: ggml's
docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from apprentice.errors import MissingExtra, VersionError
from apprentice.local.adapter import Adapter

__all__ = ["GgufHeader", "read_gguf_header", "write_lora"]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEEPEST = 4
"""Arrays in arrays that are read. No model has any; only a hostile file has thousands."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """A GGUF's scalar metadata, and the shape of every tensor, the last dimension first."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check a header. Raises `VersionError` where the file is no GGUF or ends before its tensors do."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            magic, version, tensors, fields = struct.unpack("<4sIQQ", file.read(24))
            if magic != b"GGUF" or version < 2:
                raise ValueError(f"it begins with {magic!r}, version {version}")
            metadata: dict[str, Any] = {}
            for _ in range(fields):
                key = _string(file)
                value = _value(file, _number(file, "I"))
                if value is not None:
                    metadata[key] = value
            shapes: dict[str, tuple[int, ...]] = {}
            last = 0
            for _ in range(tensors):
                name = _string(file)
                shape = tuple(_number(file, "Q") for _ in range(_number(file, "I")))
                _number(file, "I")
                last = max(last, _number(file, "Q"))
                shapes[name] = shape
            body = file.tell()
    except (OSError, ValueError, struct.error, MemoryError, OverflowError) as error:
        raise VersionError(f"{path} cannot be read as GGUF ({error}); fetch it again") from None
    if size <= body + last:
        raise VersionError(f"{path} is {size} bytes and ends before its last tensor: it is truncated; fetch it again")
    return GgufHeader(metadata, shapes)


def _number(file: BinaryIO, kind: str) -> Any:
    return struct.unpack("<" + kind, file.read(struct.calcsize("<" + kind)))[0]


def _string(file: BinaryIO) -> str:
    length = _number(file, "Q")
    if length > 1 << 24:
        raise ValueError(f"it holds a string of {length} bytes")
    return file.read(length).decode("utf-8", "replace")


def _value(file: BinaryIO, kind: int, depth: int = 0) -> Any:
    """One metadata value; arrays (the vocabulary) are skipped and give None."""
    if kind == _STRING:
        return _string(file)
    if kind in _SCALARS:
        return _number(file, _SCALARS[kind])
    if kind != _ARRAY:
        raise ValueError(f"it holds a value of unknown type {kind}")
    if depth > _DEEPEST:
        raise ValueError(f"it holds arrays nested more than {_DEEPEST} deep")
    item, count = _number(file, "I"), _number(file, "Q")
    if item in _SCALARS:
        file.seek(count * struct.calcsize("<" + _SCALARS[item]), os.SEEK_CUR)
    else:
        for _ in range(count):
            _value(file, item, depth + 1)
    return None


def write_lora(adapter: Adapter, base: GgufHeader, target: Path, where: str) -> None:
    """Write an adapter as a GGUF LoRA for this base; it appears whole. Raises `VersionError`, `MissingExtra`."""
    try:
        import gguf
    except ImportError:
        raise MissingExtra("converting an adapter for llama.cpp", "llama_cpp") from None
    arch = str(base.metadata.get("general.architecture"))
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    if arch not in known:
        raise VersionError(f"the base model's architecture {arch!r} is not known to the package gguf; update it")
    names = gguf.get_tensor_name_map(known[arch], int(base.metadata[f"{arch}.block_count"]))
    heads = int(base.metadata.get(f"{arch}.attention.head_count", 1))
    heads_of = {"attn_q": heads, "attn_k": int(base.metadata.get(f"{arch}.attention.head_count_kv", heads))}
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, work = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    try:
        writer = gguf.GGUFWriter(work, arch)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        # The scale is in the matrices: it may differ between layers. Zero tells llama.cpp to apply none.
        writer.add_float32("adapter.lora.alpha", 0.0)
        for layer, lora in adapter.layers.items():
            name = names.get_name(layer)
            shape = None if name is None else base.tensors.get(f"{name}.weight")
            if shape != (lora.a.shape[1], lora.b.shape[0]):
                here = "no such layer" if shape is None else f"{shape[1]} x {shape[0]} there"
                raise VersionError(
                    f"{where} changes {layer}, {lora.b.shape[0]} x {lora.a.shape[1]}, and the base model has {here}: "
                    "it was trained on another base"
                )
            b = lora.scale * lora.b
            kind = str(name).rpartition(".")[2]
            if arch == "llama" and kind in heads_of:
                b = _interleave(b, heads_of[kind])
            writer.add_tensor(f"{name}.weight.lora_a", lora.a.copy())
            writer.add_tensor(f"{name}.weight.lora_b", b.copy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(work, target)
    finally:
        Path(work).unlink(missing_ok=True)


def _interleave(rows: Any, heads: int) -> Any:
    """Reorder a projection's rows as llama.cpp's conversion does: its rotary embedding pairs neighbours, not halves."""
    size = rows.shape[0] // heads
    assert math.prod((heads, size)) == rows.shape[0]
    return rows.reshape(heads, 2, size // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
