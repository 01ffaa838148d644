"""The trainer for those who run Axolotl: its own command line, from a YAML that is generated here.

Axolotl pins torch and transformers, so it lives in an environment of its own; all that is needed here is its command
(`axolotl`, or what AXOLOTL_COMMAND says). It gets tokens and labels, so its chat templates are not involved.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from apprentice.errors import MissingExtra, TrainingError
from apprentice.local.base_model import load_tokenizer, resolve_base_model
from apprentice.local.frame import Frame
from apprentice.local.skeleton import Skeleton
from apprentice.secrets import HUB_TOKENS, child_environment
from flows.process_group import stop_group
from flows.trainers import Progress, TrainedAdapter, TrainerPlugin, TrainingJob, read_rows
from flows.trainers.backends.huggingface import adopt, toolchain
from flows.trainers.labelled import write_labelled
from flows.trainers.preflight import check_local
from flows.trainers.recipe import Recipe, choose

__all__ = ["AxolotlTrainer", "axolotl_config"]

_TAIL = 4000  # characters of its output that an error quotes
_LOOK_S = 1.0


def axolotl_config(recipe: Recipe, *, base: str, data: Path, output: Path, max_length: int) -> dict[str, Any]:
    """Axolotl's YAML for a recipe over pre-tokenised rows."""
    return {
        "base_model": base,
        "datasets": [{"path": str(data), "ds_type": "json", "type": None}],
        "dataset_prepared_path": str(data.parent / "prepared"),
        "output_dir": str(output),
        "adapter": "lora",
        "lora_r": recipe.lora_rank,
        "lora_alpha": round(recipe.lora_alpha),
        "lora_dropout": 0.0,
        "lora_target_modules": list(recipe.target_modules),
        "sequence_len": max_length,
        "sample_packing": False,
        "group_by_length": True,
        "micro_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": 1,
        "num_epochs": recipe.epochs,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler": "linear",
        "warmup_ratio": recipe.warm_up,
        "optimizer": "adamw_torch",
        "weight_decay": 0.0,
        "bf16": "auto",
        "tf32": True,
        "gradient_checkpointing": False,
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "auto_resume_from_checkpoints": True,
        "logging_steps": 5,
        "seed": recipe.seed,
    }


class AxolotlTrainer(TrainerPlugin):
    """``local.fine_tune_backend: axolotl``."""

    packages = ("axolotl",)
    extra = "axolotl"

    def __init__(self, command: str | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._command = shlex.split(command or os.environ.get("AXOLOTL_COMMAND", "axolotl"))
        self._clock = clock

    def preflight(self, job: TrainingJob) -> None:
        """The command, the base model, rows, disk, memory. Raises `MissingExtra`, `ConfigError`, `TrainingError`."""
        if shutil.which(self._command[0]) is None:
            raise MissingExtra(f"training with Axolotl (the command {self._command[0]!r})", "axolotl")
        check_local(job, packages=("transformers",), what="training with Axolotl", extra="embedded")

    def worst_case(self, job: TrainingJob) -> Decimal:
        """Nothing: it is one's own machine."""
        return Decimal(0)

    def train(self, job: TrainingJob, progress: Callable[[Progress], None]) -> TrainedAdapter:
        """Run Axolotl to its end; called again after a kill, it goes on at its own last checkpoint."""
        started = self._clock()
        base = resolve_base_model(job.base_model, job.root)
        tokenizer = load_tokenizer(base)
        for folder in (job.work, job.adapters):
            folder.mkdir(parents=True, exist_ok=True)
        rows = list(read_rows(job.dataset))
        data, output = job.work / "axolotl.jsonl", job.work / "axolotl"
        skeleton = Skeleton.of(job.output_schema)
        count, left_out = write_labelled(rows, data, tokenizer, skeleton, job.settings.max_length, job.input_schema)
        # Axolotl trains every layer: what makes the upper ones enough on a CPU is not in it.
        recipe = choose(job.settings, rows=count, layers=1, on_gpu=True)
        settings = axolotl_config(recipe, base=base.path, data=data, output=output, max_length=job.settings.max_length)
        config = job.work / "axolotl.yaml"
        config.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        steps = recipe.steps(count)
        progress(Progress(0, steps, None, 0, 0.0))
        self._run(config, lambda: progress(Progress(0, steps, None, 0, self._clock() - started)))
        elapsed_s = self._clock() - started
        Frame.of_tokenizer(tokenizer).save(output)
        _keep_only_the_adapter(output)
        adapter = adopt(output, job.adapters)
        progress(Progress(steps, steps, None, 0, elapsed_s))
        return TrainedAdapter(
            name=adapter.name,
            folder=adapter,
            base_model=base.name,
            trained_on=len(rows) - left_out,
            left_out=left_out,
            steps=steps,
            tokens=0,
            wall_s=elapsed_s,
            loss=None,
            recipe=recipe.as_dict(),
            toolchain=toolchain("axolotl", "torch", "transformers", "peft"),
        )

    def _run(self, config: Path, still_at_it: Callable[[], None]) -> None:
        """Axolotl to its end. Where ``still_at_it`` raises, as it does when the run is cancelled, it is stopped."""
        log = config.parent / "axolotl.log"
        with log.open("wb") as out:
            # A group of its own, so that the processes it starts on each GPU end with it.
            process = subprocess.Popen(
                [*self._command, "train", str(config)],
                env=child_environment(os.environ, keep=HUB_TOKENS),
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                while process.poll() is None:
                    still_at_it()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(_LOOK_S)
            finally:
                if process.poll() is None:
                    stop_group(process)
        if process.returncode != 0:
            said = log.read_text(encoding="utf-8", errors="replace")[-_TAIL:]
            raise TrainingError(f"axolotl ended with {process.returncode}; its last words: {said}")


def _keep_only_the_adapter(output: Path) -> None:
    for path in output.iterdir():
        if path.name not in ("adapter_config.json", "adapter_model.safetensors", "frame.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


REGISTERED = AxolotlTrainer
