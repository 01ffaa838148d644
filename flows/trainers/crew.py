"""The processes that share a training run: each computes its part of every batch, and their gradients are summed.

On one GPU, or a CPU, a run is one process. With more GPUs it is one for each, launched here and joined by Hugging Face
accelerate. Only the adapters' gradients travel, a few megabytes a step, and what comes out is what one process would
have computed, up to rounding: the batch, its order and its loss stay the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol

from apprentice.errors import TrainingError
from apprentice.schemas.schema import schema_of_document
from apprentice.secrets import HUB_TOKENS, child_environment
from apprentice.settings.config import TrainingSettings
from flows.trainers import Progress, TrainedAdapter, TrainingJob

__all__ = ["Alone", "Crew", "Together", "read_job", "report", "train_together"]

_TAIL = 2000  # characters of a process's last words that an error quotes


class Crew(Protocol):
    """Who computes. ``rank`` counts from 0; ``device`` is torch's name of this process's own, None for the default."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def device(self) -> str | None: ...

    def sum_gradients(self, weights: Sequence[Any]) -> None:
        """Replace each weight's gradient by the sum over all processes; one that has none counts as zero."""

    def sum(self, value: float) -> float:
        """The sum of everybody's value."""


class Alone:
    """One process."""

    rank, size, device = 0, 1, None

    def sum_gradients(self, weights: Sequence[Any]) -> None:
        """They are the sum already."""

    def sum(self, value: float) -> float:
        """The value."""
        return value


class Together:
    """One of several processes that `train_together` started."""

    def __init__(self) -> None:
        import torch
        from accelerate import Accelerator  # type: ignore[import-untyped]

        self._accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.rank = self._accelerator.process_index
        self.size = self._accelerator.num_processes
        self.device = str(self._accelerator.device)

    def sum_gradients(self, weights: Sequence[Any]) -> None:
        """In one message: many small ones would wait for each other."""
        import torch

        parts = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        whole = self._accelerator.reduce(torch.cat([part.flatten() for part in parts]), "sum")
        for weight, part in zip(weights, whole.split([part.numel() for part in parts]), strict=True):
            weight.grad = part.view_as(weight)

    def sum(self, value: float) -> float:
        """The sum of everybody's value."""
        import torch

        return float(self._accelerator.reduce(torch.tensor(value, device=self.device), "sum"))


def train_together(
    job: TrainingJob, processes: int, progress: Callable[[Progress], None], *, every_layer: bool
) -> TrainedAdapter:
    """Train in ``processes`` processes on this machine. Raises `TrainingError` with the last words of one that fails.

    The first process reports in lines of JSON, and each of them what it fails of. When this process dies, they find
    nobody to report to and end.
    """
    job.work.mkdir(parents=True, exist_ok=True)
    order = job.work / "job.json"
    order.write_text(json.dumps(_plain(job) | {"every_layer": every_layer}), encoding="utf-8")
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, "-m", *launch, "-m", "flows.trainers.worker", str(order)]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as last_words,
        subprocess.Popen(
            command,
            env=child_environment(os.environ, keep=HUB_TOKENS),
            stdout=subprocess.PIPE,
            stderr=last_words,
            text=True,
        ) as process,
    ):
        try:
            trained = _follow(process, progress)
            code = process.wait()
        finally:
            process.kill()
        if trained is not None:
            return trained
        last_words.seek(0)
        said = last_words.read()[-_TAIL:]
    raise TrainingError(f"training in {processes} processes ended with {code}; their last words: {said}")


def _follow(process: subprocess.Popen[str], progress: Callable[[Progress], None]) -> TrainedAdapter | None:
    """Hear the processes out. Raises `TrainingError` where one reports an error."""
    trained: TrainedAdapter | None = None
    assert process.stdout is not None
    for line in process.stdout:
        kind, said = _read(line)
        if kind == "progress":
            progress(Progress(**said))
        elif kind == "trained":
            trained = TrainedAdapter(**{**said, "folder": Path(said["folder"]), "cost": Decimal(said["cost"])})
        elif kind == "error":
            raise TrainingError(str(said))
    return trained


def read_job(path: Path) -> tuple[TrainingJob, bool]:
    """The job that `train_together` left for its processes, and whether every layer is to be trained."""
    order = json.loads(path.read_text(encoding="utf-8"))
    every_layer = order.pop("every_layer")
    for name in ("dataset", "root", "work", "adapters"):
        order[name] = Path(order[name])
    order["settings"] = TrainingSettings.model_validate(order["settings"])
    order["output_schema"] = schema_of_document(order["output_schema"])
    if order["input_schema"] is not None:
        order["input_schema"] = schema_of_document(order["input_schema"])
    return TrainingJob(**order), every_layer


def _plain(job: TrainingJob) -> dict[str, Any]:
    paths = {name: str(getattr(job, name).resolve()) for name in ("dataset", "root", "work", "adapters")}
    return {
        "task": job.task,
        "output_schema": job.output_schema.json_schema,
        "input_schema": job.input_schema.json_schema if job.input_schema else None,
        "base_model": job.base_model,
        "settings": job.settings.model_dump(mode="json"),
        "instructions": job.instructions,
        **paths,
    }


def report(kind: str, said: Any) -> str:
    """A line for `train_together`."""
    return json.dumps({"kind": kind, "said": said if isinstance(said, str) else asdict(said)}, default=str)


def _read(line: str) -> tuple[str, Any]:
    """What a line reports; anything else that libraries print is passed over."""
    try:
        told = json.loads(line)
        return told["kind"], told["said"]
    except (ValueError, TypeError, KeyError):
        return "", None
