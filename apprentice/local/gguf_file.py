"""GGUF: reading a base model's header, writing a PEFT adapter as a LoRA, and merging one into its base.

llama.cpp aborts on a file that it cannot digest, and says little; so a file is checked here first. Format: the page
gguf.md of ggml's documentation.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from apprentice.errors import MissingExtra, VersionError
from apprentice.local.adapter import Adapter

__all__ = ["GgufHeader", "read_gguf_header", "special_tokens", "write_lora", "write_merged"]

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
    gguf = _package("converting an adapter for llama.cpp")
    with _whole(target) as work:
        writer = gguf.GGUFWriter(work, _architecture(base))
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        # The scale is in the matrices: it may differ between layers. Zero tells llama.cpp to apply none.
        writer.add_float32("adapter.lora.alpha", 0.0)
        for name, (a, b) in _changes(adapter, base, where).items():
            writer.add_tensor(f"{name}.lora_a", a.copy())
            writer.add_tensor(f"{name}.lora_b", b.copy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def write_merged(adapter: Adapter, base: Path, target: Path, where: str) -> None:
    """Write the base with the adapter added to its weights, a GGUF of its own. Raises `VersionError`, `MissingExtra`.

    A tensor keeps its precision, save that a quantised one that the adapter changes is written in eight bits: most of
    a LoRA would be lost in four. No token is put before or after the text: the adapter's frame has them all.
    """
    gguf = _package("merging an adapter into its base model")
    header = read_gguf_header(base)
    changes = _changes(adapter, header, where)
    reader = gguf.GGUFReader(base)
    kinds = {tensor.name: _kind(tensor) if tensor.name in changes else tensor.tensor_type for tensor in reader.tensors}
    with _whole(target) as work:
        writer = gguf.GGUFWriter(work, _architecture(header))
        for name, field in reader.fields.items():
            # The reader makes up the first; the writer writes the others itself.
            if not name.startswith("GGUF.") and name not in _OWN_FIELDS:
                array = field.types[0] == gguf.GGUFValueType.ARRAY
                writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if array else None)
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(False)
        for tensor in reader.tensors:
            kind, shape, dtype = kinds[tensor.name], tensor.data.shape, tensor.data.dtype
            if kind != tensor.tensor_type:  # quantised before: either way its rows are bytes now
                shape = gguf.quant_shape_to_byte_shape([int(n) for n in reversed(tensor.shape)], kind)
            size = math.prod(shape) * dtype.itemsize
            writer.add_tensor_info(tensor.name, shape, dtype, size, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:  # one at a time: the model may be larger than the memory
            data = tensor.data
            if tensor.name in changes:
                a, b = changes[tensor.name]
                data = gguf.quantize(gguf.dequantize(data, tensor.tensor_type) + b @ a, kinds[tensor.name])
            writer.write_tensor_data(data)
        writer.close()


_OWN_FIELDS = {
    "general.architecture",
    "general.alignment",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_eos_token",
}


def special_tokens(base: Path) -> list[str]:
    """The texts that a model's tokenizer takes for single tokens wherever they stand. Raises as `write_merged`."""
    gguf = _package("reading a model's vocabulary")
    read_gguf_header(base)
    fields = gguf.GGUFReader(base).fields
    tokens, types = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.token_type")
    if tokens is None or types is None:
        return []
    special = (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
    return [text for text, kind in zip(tokens.contents(), types.contents(), strict=True) if kind in special and text]


def _package(what: str) -> Any:
    try:
        import gguf
    except ImportError:
        raise MissingExtra(what, "llama_cpp") from None
    return gguf


def _architecture(base: GgufHeader) -> str:
    return str(base.metadata.get("general.architecture"))


def _kind(tensor: Any) -> Any:
    from gguf import GGMLQuantizationType as Kind

    if tensor.tensor_type in (Kind.F32, Kind.F16, Kind.BF16):
        return tensor.tensor_type
    return Kind.Q8_0 if tensor.shape[0] % 32 == 0 else tensor.tensor_type


@contextlib.contextmanager
def _whole(target: Path) -> Iterator[str]:
    """A file to write that becomes ``target`` when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, work = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    try:
        yield work
        os.replace(work, target)
    finally:
        Path(work).unlink(missing_ok=True)


def _changes(adapter: Adapter, base: GgufHeader, where: str) -> dict[str, tuple[Any, Any]]:
    """By the base's tensor: the matrices a and b, scaled, whose product b @ a is added to it. Raises `VersionError`."""
    gguf = _package("converting an adapter")
    arch = _architecture(base)
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    if arch not in known:
        raise VersionError(f"the base model's architecture {arch!r} is not known to the package gguf; update it")
    names = gguf.get_tensor_name_map(known[arch], int(base.metadata[f"{arch}.block_count"]))
    heads = int(base.metadata.get(f"{arch}.attention.head_count", 1))
    heads_of = {"attn_q": heads, "attn_k": int(base.metadata.get(f"{arch}.attention.head_count_kv", heads))}
    changes = {}
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
        changes[f"{name}.weight"] = (lora.a, b)
    return changes


def _interleave(rows: Any, heads: int) -> Any:
    """Reorder a projection's rows as llama.cpp's conversion does: its rotary embedding pairs neighbours, not halves."""
    size = rows.shape[0] // heads
    assert math.prod((heads, size)) == rows.shape[0]
    return rows.reshape(heads, 2, size // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
