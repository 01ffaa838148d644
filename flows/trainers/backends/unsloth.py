"""The trainer for those who have Unsloth and a GPU: its kernels, our tokens and labels.

Unsloth patches transformers when it is imported, so it is imported on first use. It can be installed beside the flows
that call it (`uv sync --extra all --extra unsloth`).
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

from apprentice.errors import MissingExtra, TrainingError
from apprentice.local.base_model import resolve_base_model
from apprentice.local.frame import Frame
from apprentice.local.skeleton import Skeleton
from flows.trainers import Progress, TrainedAdapter, TrainerPlugin, TrainingJob, read_rows
from flows.trainers.backends.huggingface import adopt, save_adapter, toolchain
from flows.trainers.preflight import check_local
from flows.trainers.recipe import choose

__all__ = ["UnslothTrainer"]


class UnslothTrainer(TrainerPlugin):
    """``local.fine_tune_backend: unsloth``."""

    packages = ("unsloth",)
    extra = "unsloth"

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock

    def preflight(self, job: TrainingJob) -> None:
        """The package, a GPU, the base model, rows, disk, memory.

        Raises `MissingExtra`, `TrainingError`, `ConfigError`.
        """
        if importlib.util.find_spec("unsloth") is None:
            raise MissingExtra("training with Unsloth", "unsloth")
        import torch

        if not torch.cuda.is_available():
            raise TrainingError("Unsloth needs a GPU and found none; set local.fine_tune_backend to huggingface")
        check_local(job, packages=("transformers", "peft"), what="training with Unsloth", extra="unsloth")

    def worst_case(self, job: TrainingJob) -> Decimal:
        """Nothing: it is one's own machine."""
        return Decimal(0)

    def train(self, job: TrainingJob, progress: Callable[[Progress], None]) -> TrainedAdapter:
        """Train, resuming at the last checkpoint in ``job.work``."""
        FastLanguageModel = importlib.import_module("unsloth").FastLanguageModel  # noqa: N806  # first: it patches the rest

        import torch
        from transformers import Trainer, TrainerCallback, TrainingArguments

        from flows.trainers.encoding import encode
        from flows.trainers.labelled import IGNORED, labelled

        started = self._clock()
        base = resolve_base_model(job.base_model, job.root)
        model, tokenizer = FastLanguageModel.from_pretrained(
            base.path, max_seq_length=job.settings.max_length, load_in_4bit=False
        )
        frame = Frame.of_tokenizer(tokenizer)
        rows = list(read_rows(job.dataset))
        encoded, left_out = encode(
            rows, tokenizer, frame, Skeleton.of(job.output_schema), job.settings.max_length, job.input_schema
        )
        recipe = choose(job.settings, rows=len(encoded), layers=1, on_gpu=True)
        model = FastLanguageModel.get_peft_model(
            model,
            r=recipe.lora_rank,
            lora_alpha=recipe.lora_alpha,
            lora_dropout=0.0,
            target_modules=list(recipe.target_modules),
            bias="none",
            random_state=recipe.seed,
        )

        def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
            longest = max(len(row["input_ids"]) for row in batch)
            fill = {"input_ids": tokenizer.pad_token_id or 0, "attention_mask": 0, "labels": IGNORED}
            return {
                key: torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in batch])
                for key, value in fill.items()
            }

        class Tell(TrainerCallback):
            def on_log(self, args: Any, state: Any, control: Any, **told: Any) -> None:
                loss = (told.get("logs") or {}).get("loss")
                seen = state.num_input_tokens_seen
                progress(Progress(state.global_step, state.max_steps, loss, seen, time.monotonic() - started))

        arguments = TrainingArguments(
            output_dir=str(job.work / "unsloth"),
            per_device_train_batch_size=recipe.batch_size,
            num_train_epochs=recipe.epochs,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=max(1, round(recipe.warm_up * recipe.steps(len(encoded)))),
            weight_decay=0.0,
            bf16=torch.cuda.is_bf16_supported(),
            fp16=not torch.cuda.is_bf16_supported(),
            logging_steps=5,
            save_strategy="epoch",
            save_total_limit=1,
            include_num_input_tokens_seen=True,
            report_to=[],
            seed=recipe.seed,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=[labelled(r) for r in encoded],
            data_collator=collate,
            callbacks=[Tell()],
        )
        resumable = any((job.work / "unsloth").glob("checkpoint-*"))
        outcome = trainer.train(resume_from_checkpoint=resumable)
        folder = job.work / "finished"
        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(model, folder, base.name)
        frame.save(folder)
        job.adapters.mkdir(parents=True, exist_ok=True)
        adapter: Path = adopt(folder, job.adapters)
        return TrainedAdapter(
            name=adapter.name,
            folder=adapter,
            base_model=base.name,
            trained_on=len(rows) - left_out,
            left_out=left_out,
            steps=outcome.global_step,
            tokens=trainer.state.num_input_tokens_seen,
            wall_s=self._clock() - started,
            loss=outcome.training_loss,
            recipe=recipe.as_dict(),
            toolchain=toolchain("unsloth", "torch", "transformers", "peft"),
        )


REGISTERED = UnslothTrainer
