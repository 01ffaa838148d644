"""The trainer of the default installation: PEFT's LoRA, in process, on a CPU or a GPU.

A plain loop, made quick where a small model on a small machine spends its time: rows of like length share a batch,
only the tokens that the model decides are projected onto the vocabulary, and the frozen lower layers run once instead
of once an epoch (`Halves`). What it computes is otherwise what PEFT computes, and what it saves is what PEFT saves.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from apprentice.errors import TrainingError
from apprentice.local.adapter import content_name
from apprentice.local.base_model import load_model_and_tokenizer, resolve_base_model, share_processors
from apprentice.local.frame import Frame
from apprentice.local.skeleton import Skeleton
from flows.trainers import Progress, TrainedAdapter, TrainerPlugin, TrainingJob, read_rows
from flows.trainers.crew import Alone, Crew, train_together
from flows.trainers.encoding import encode
from flows.trainers.preflight import check_local
from flows.trainers.recipe import Recipe, choose

__all__ = ["PeftTrainer", "adopt", "save_adapter", "toolchain", "with_lora"]


class PeftTrainer(TrainerPlugin):
    """``local.fine_tune_backend: huggingface``. ``every_layer`` trains all layers on a CPU too: slower, not better."""

    packages = ("torch", "transformers", "peft", "accelerate")
    extra = "embedded"

    def __init__(self, *, every_layer: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_layer = every_layer
        self._clock = clock

    def preflight(self, job: TrainingJob) -> None:
        """Packages, base model, rows, disk, memory. Raises `MissingExtra`, `ConfigError`, `TrainingError`."""
        packages = ("torch", "transformers", "peft", "safetensors", "accelerate")
        check_local(job, packages=packages, what="training with PEFT", extra="embedded")

    def worst_case(self, job: TrainingJob) -> Decimal:
        """Nothing: it is one's own machine."""
        return Decimal(0)

    def train(self, job: TrainingJob, progress: Callable[[Progress], None]) -> TrainedAdapter:
        """Train, or go on at the last checkpoint. Raises `TrainingError` where there is nothing to learn from."""
        share_processors()
        import torch

        processes = job.settings.processes or max(1, torch.cuda.device_count())
        if processes > 1:
            return train_together(job, processes, progress, every_layer=self._every_layer)
        trained = self.train_part(job, progress, Alone())
        assert trained is not None
        return trained

    def train_part(self, job: TrainingJob, progress: Callable[[Progress], None], crew: Crew) -> TrainedAdapter | None:
        """What one process of a crew does; None from all but the first, which keeps checkpoints and the adapter."""
        import torch

        # These two need torch, which is imported when something trains.
        from flows.trainers.loop import Checkpoint, Loop

        started = self._clock()
        base = resolve_base_model(job.base_model, job.root)
        model, tokenizer = load_model_and_tokenizer(base, device=crew.device)
        frame = Frame.of_tokenizer(tokenizer)
        rows = list(read_rows(job.dataset))
        skeleton = Skeleton.of(job.output_schema)
        on_gpu = model.device.type == "cuda"
        recipe = choose(job.settings, rows=len(rows), layers=model.config.num_hidden_layers, on_gpu=on_gpu)
        if self._every_layer:
            recipe = replace(recipe, trained_layers=model.config.num_hidden_layers)
        spared = set(random.Random(recipe.seed).sample(range(len(rows)), recipe.validation))
        encoded, left_out = encode(
            (row for i, row in enumerate(rows) if i not in spared),
            tokenizer,
            frame,
            skeleton,
            job.settings.max_length,
            job.input_schema,
        )
        validation, too_long = encode(
            (replace(rows[i], repeat=1) for i in sorted(spared)),
            tokenizer,
            frame,
            skeleton,
            job.settings.max_length,
            job.input_schema,
        )
        left_out += too_long
        if not encoded:
            raise TrainingError(
                f"task {job.task!r} has no row to train on: {len(rows)} rows, {left_out} left out as outside the "
                f"schema or longer than local.training.max_length ({job.settings.max_length} tokens); raise it"
            )
        torch.manual_seed(recipe.seed)
        lora = with_lora(model, recipe, base.name)
        loop = Loop(recipe, encoded, validation, lora, model, progress, self._clock, crew)
        outcome = loop.run(Checkpoint(_made(job.work) / "checkpoint.pt", job.dataset.name, recipe))
        if crew.rank > 0:
            return None
        with tempfile.TemporaryDirectory(prefix=".adapter-", dir=_made(job.adapters)) as folder:
            save_adapter(lora, Path(folder), base.name)
            frame.save(Path(folder))
            adapter = adopt(Path(folder), job.adapters)
        return TrainedAdapter(
            name=adapter.name,
            folder=adapter,
            base_model=base.name,
            trained_on=len(rows) - left_out,
            left_out=left_out,
            steps=outcome.steps,
            tokens=outcome.tokens,
            wall_s=self._clock() - started,
            loss=outcome.loss,
            recipe={
                **recipe.as_dict(),
                "padding": round(outcome.padding, 4),
                "stopped_early": outcome.stopped_early,
                "processes": crew.size,
            },
            toolchain=toolchain("torch", "transformers", "peft", "safetensors", "accelerate"),
        )


def with_lora(model: Any, recipe: Recipe, base_name: str) -> Any:
    """A base model wrapped with untrained adapters where the recipe wants them. Raises `TrainingError`."""
    from peft import LoraConfig, get_peft_model

    layers = model.config.num_hidden_layers
    partial = recipe.trained_layers < layers
    lora = get_peft_model(
        model,
        LoraConfig(
            r=recipe.lora_rank,
            lora_alpha=recipe.lora_alpha,  # type: ignore[arg-type]  # PEFT computes with any number
            target_modules=list(recipe.target_modules),
            layers_to_transform=list(range(layers - recipe.trained_layers, layers)) if partial else None,
            task_type="CAUSAL_LM",
        ),
    )
    if not any(p.requires_grad for p in lora.parameters()):
        raise TrainingError(
            f"{base_name} has none of the layers {', '.join(recipe.target_modules)}; set local.training.target_modules"
        )
    return lora


def save_adapter(lora: Any, folder: Path, base_name: str) -> None:
    """What PEFT saves, less its blank model card, and with the base model's name: its path means nothing elsewhere."""
    # The embeddings are never trained; left to find that out, PEFT asks the hub.
    lora.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": base_name}
    # Readers in stricter languages take 32.0 for no whole number, and refuse it.
    config["lora_alpha"] = (
        int(config["lora_alpha"]) if float(config["lora_alpha"]).is_integer() else config["lora_alpha"]
    )
    path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def adopt(folder: Path, adapters: Path) -> Path:
    """Copy a finished adapter folder to ``adapters/<content name>``, which appears whole or not at all."""
    target = adapters / content_name(folder)
    if not target.is_dir():
        beside = Path(tempfile.mkdtemp(prefix=".adopt-", dir=adapters))
        try:
            shutil.copytree(folder, beside, dirs_exist_ok=True)
            beside.chmod(0o755)
            beside.rename(target)
        except OSError:
            if not target.is_dir():  # else another worker was quicker: the same name is the same content
                raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return target


def toolchain(*packages: str) -> dict[str, str]:
    """The exact versions that a run was made with."""
    versions = {"python": platform.python_version(), "machine": platform.machine()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


REGISTERED = PeftTrainer
