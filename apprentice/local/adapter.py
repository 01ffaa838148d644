"""The adapter folder that a trainer writes: PEFT's LoRA files, the frame, and the name that their content gives them.

    adapter_config.json         rank, scaling, which layers           (PEFT)
    adapter_model.safetensors   the matrices                          (PEFT)
    frame.json                  the chat template it was trained in   (`Frame`)
    probe.json                  answers that prove a loaded copy is this one (`Probe`, written when it was validated)

Everything is checked before an engine sees it. A LoRA that does not match its base loads silently in most engines
and then serves the base model's answers; a truncated file may do the same, and other files under a version's name
would serve what nobody validated. Here each is a `VersionError`, and so is every file that is not what it should be.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apprentice.errors import VersionError
from apprentice.local.base_model import BaseModel
from apprentice.local.frame import Frame

__all__ = [
    "Adapter",
    "LoraLayer",
    "adapter_folder",
    "base_shapes",
    "check_adapter",
    "check_files",
    "content_name",
    "read_adapter",
    "stored_path",
]

CONFIG, WEIGHTS, FRAME = "adapter_config.json", "adapter_model.safetensors", "frame.json"
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_AGAIN = "train the version again, or restore the file"


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """One layer's change: ``weight += scale * b @ a``, with a [rank, in] and b [out, rank], float32 NumPy arrays."""

    a: Any
    b: Any
    scale: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """A whole adapter, read. ``layers`` by the name of the base's layer, such as ``model.layers.0.mlp.up_proj``."""

    layers: Mapping[str, LoraLayer]
    frame: Frame
    config: Mapping[str, Any]


def adapter_folder(model_dir: Path, task: str, name: str, stored: str) -> Path:
    """Where a version's adapter lies on this machine; whoever reads the folder finds out whether it is there.

    ``stored`` is what the store remembers: a path relative to ``model_dir``, so that a home can be moved or copied, or
    an absolute one, of another layout. A copy under this ``model_dir`` comes first. This is the place to fetch a folder
    from elsewhere if it is on no disk of this machine.
    """
    here = model_dir / task / name
    elsewhere = model_dir / stored  # an absolute path stays what it is
    return elsewhere if stored and not here.is_dir() and elsewhere.is_dir() else here


def stored_path(model_dir: Path, folder: Path) -> str:
    """What the store is to remember of an adapter's folder."""
    return str(folder.relative_to(model_dir)) if folder.is_relative_to(model_dir) else str(folder)


def content_name(folder: Path) -> str:
    """The version's name: the first 16 hex digits of the SHA-256 over the files that decide its answers."""
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS, FRAME):
        content = _bytes(folder / name)
        digest.update(f"{name}:{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def check_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Check that the files are whole. Gives each layer's shape, (out, in). Raises `VersionError`."""
    _config(folder)
    Frame.load(folder)
    header, _ = _header(folder / WEIGHTS)
    layers = {}
    for layer, (a, b) in _pairs(folder, header).items():
        rank, fan_in = header[a]["shape"]
        fan_out, rank_b = header[b]["shape"]
        if rank != rank_b:
            raise VersionError(f"{folder / WEIGHTS}: {layer} has ranks {rank} and {rank_b}; {_AGAIN}")
        layers[layer] = (fan_out, fan_in)
    return layers


def check_adapter(folder: Path, base: BaseModel, name: str) -> None:
    """Check that the files are whole, made for this base, and those of the version ``name``. Raises `VersionError`.

    Neither is loaded. Hashing costs about a second per gigabyte, once a load.
    """
    layers = check_files(folder)
    found_name = content_name(folder)
    if found_name != name:
        raise VersionError(
            f"{folder} holds other files than version {name} was made of (their name would be {found_name}); "
            "restore the folder, or train again"
        )
    shapes = base_shapes(base)
    for layer, (fan_out, fan_in) in layers.items() if shapes is not None else ():
        assert shapes is not None
        expected = shapes.get(f"{layer}.weight")
        if expected != (fan_out, fan_in):
            trained_on = _config(folder).get("base_model_name_or_path")
            found = "has no such layer" if expected is None else f"has {expected[0]} x {expected[1]} there"
            raise VersionError(
                f"{folder} changes {layer}, {fan_out} x {fan_in}, but the base model {base.name} {found}: "
                f"it was trained on another base ({trained_on}); train it on this one"
            )


def read_adapter(folder: Path) -> Adapter:
    """Read the matrices into memory. Raises `VersionError` where a file is missing, truncated, or not finite."""
    import numpy as np

    config = _config(folder)
    frame = Frame.load(folder)
    header, body = _header(folder / WEIGHTS)
    content = memoryview(_bytes(folder / WEIGHTS))[body:]

    def tensor(name: str) -> Any:
        entry = header[name]
        start, end = entry["data_offsets"]
        raw = content[start:end]
        if entry["dtype"] == "BF16":
            flat = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            flat = np.frombuffer(raw, np.float32 if entry["dtype"] == "F32" else np.float16).astype(np.float32)
        if not np.isfinite(flat).all():
            raise VersionError(f"{folder / WEIGHTS}: {name} holds numbers that are not finite; {_AGAIN}")
        return flat.reshape(entry["shape"])

    layers = {
        layer: LoraLayer(tensor(a), tensor(b), _scale(config, layer, header[a]["shape"][0]))
        for layer, (a, b) in _pairs(folder, header).items()
    }
    return Adapter(layers, frame, config)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(_bytes(path))
    except (ValueError, RecursionError) as error:
        raise VersionError(f"{path} is not JSON ({error}); {_AGAIN}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise VersionError(f"{path} describes no LoRA adapter; {_AGAIN}")
    for key in ("use_dora", "modules_to_save", "layer_replication", "lora_bias", "fan_in_fan_out"):
        if config.get(key):
            raise VersionError(f"{path} sets {key}, which the engines cannot serve; train without it")
    if config.get("bias", "none") != "none":
        raise VersionError(f"{path} trains biases, which the engines cannot serve; train with bias: none")
    return config


def _scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """LoRA's scaling of one layer: alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023)."""
    alpha = config.get("lora_alpha", rank)
    patterns = config.get("alpha_pattern") or {}
    try:
        for pattern, value in patterns.items():
            if layer == pattern or layer.endswith(f".{pattern}"):
                alpha = value
        scale = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (TypeError, ValueError, AttributeError, ArithmeticError):
        scale = math.nan
    if not math.isfinite(scale):
        raise VersionError(f"{CONFIG} scales {layer} by {alpha!r} over rank {rank}, which is not a number; {_AGAIN}")
    return scale


def _pairs(folder: Path, header: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The layers an adapter changes, each with the names of its two matrices."""
    pairs: dict[str, tuple[str, str]] = {}
    for name in header:
        layer, found, rest = name.partition(".lora_A.")
        if found:
            b = f"{layer}.lora_B.{rest}"
            if b not in header:
                raise VersionError(f"{folder / WEIGHTS} lacks {b}; {_AGAIN}")
            pairs[layer.removeprefix("base_model.model.")] = (name, b)
        elif ".lora_B." not in name:
            raise VersionError(f"{folder / WEIGHTS} holds {name}, which is no LoRA matrix; train plain LoRA")
    if not pairs:
        raise VersionError(f"{folder / WEIGHTS} holds no LoRA matrices; {_AGAIN}")
    return pairs


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, checked against the file's size, and where its body starts."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        ends = 0
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            if entry["dtype"] not in _ITEM_BYTES:
                raise ValueError(f"{name} is {entry['dtype']}; this reads {', '.join(_ITEM_BYTES)}")
            # bool and float would pass for whole numbers below.
            if {type(number) for number in (start, end, *entry["shape"])} != {int} or min(entry["shape"]) < 1:
                raise ValueError(f"{name} has shape {entry['shape']} at {entry['data_offsets']}")
            if len(entry["shape"]) != 2 or end - start != math.prod(entry["shape"]) * _ITEM_BYTES[entry["dtype"]]:
                raise ValueError(f"{name} has shape {entry['shape']} in {end - start} bytes")
            if start < 0:
                raise ValueError(f"{name} begins at byte {start}")
            ends = max(ends, end)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise VersionError(f"{path} cannot be read ({error}); {_AGAIN}") from None
    if size != 8 + length + ends:
        raise VersionError(f"{path} is {size} bytes and should be {8 + length + ends}: it is truncated; {_AGAIN}")
    return header, 8 + length


def base_shapes(base: BaseModel) -> dict[str, tuple[int, ...]] | None:
    """The shapes of a base model's weights, from its safetensors headers; None where it lies elsewhere (a hub id)."""
    if base.kind == "hub":
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    for path in Path(base.path).glob("*.safetensors"):
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > path.stat().st_size:
                    raise ValueError("its header is longer than the file")
                header = json.loads(file.read(length))
            shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
            raise VersionError(f"the base model's {path} cannot be read ({error}); fetch it again") from None
    return shapes or None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise VersionError(f"{path} cannot be read ({error.strerror}); {_AGAIN}") from None
