"""What would fail after minutes or hours, found within seconds: rows, room on the disk, memory."""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Sequence

from apprentice.errors import MissingExtra, TrainingError
from apprentice.local.adapter import base_shapes
from apprentice.local.base_model import BaseModel, resolve_base_model
from flows.trainers import TrainingJob, read_rows

__all__ = ["check_local"]

_FEWEST_ROWS = 2
_DISK = 1 << 30
# Beside the weights: torch itself, a batch's activations, what the frozen layers put out for a small corpus.
_BESIDE_WEIGHTS = 1 << 30
# A GGUF's weights of some 4.5 bits become 32 bits when they are dequantised.
_DEQUANTISED = 7.2


def check_local(job: TrainingJob, *, packages: Sequence[str], what: str, extra: str) -> None:
    """Whether a trainer on this machine can begin.

    Looks for ``packages`` (those of the extra named), the base model, enough rows, 1 GiB of disk and memory for the
    weights. Raises `MissingExtra`, `ConfigError`, `TrainingError`, each with the remedy.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(f"{what} ({package})", extra)
    base = resolve_base_model(job.base_model, job.root, dequantise=False)
    rows = sum(1 for _ in read_rows(job.dataset))
    if rows < _FEWEST_ROWS:
        raise TrainingError(f"task {job.task!r} has {rows} rows to train on; collect at least {_FEWEST_ROWS} first")
    for folder in (job.adapters, job.work):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < _DISK:
            raise TrainingError(f"{folder} has {free >> 20} MB free; a training run needs {_DISK >> 20}: make room")
    needed, available = _weight_bytes(base) + _BESIDE_WEIGHTS, _free_memory()
    if available is not None and needed > available:
        raise TrainingError(
            f"training {job.base_model} needs about {needed >> 20} MB of memory and {available >> 20} MB are free; "
            "stop what else runs, or name a smaller local.base_model"
        )


def _weight_bytes(base: BaseModel) -> int:
    """How much memory a base model's weights take in float32; 0 where they are not here yet."""
    shapes = base_shapes(base)
    if shapes is not None:
        return 4 * sum(math.prod(shape) for shape in shapes.values())
    return round(base.gguf.stat().st_size * _DEQUANTISED) if base.gguf is not None else 0


def _free_memory() -> int | None:
    """The memory that a training run here would use, in bytes: a GPU's where there is one. None where unknown."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    try:
        import psutil  # type: ignore[import-untyped]
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)
