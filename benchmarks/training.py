"""Training speed: this trainer against TRL's SFTTrainer with PEFT at its defaults, in one run.

Same data (the shipped support tickets), base model, LoRA rank and target layers, batch size, epochs and hardware. A
token is a token of a row, padding excluded, counted once an epoch; loading models is not counted, the lower half's
one pass is.

Ours is measured twice: training all layers, as TRL does, and with the recipe it chooses by itself. Last figure of a
line: how many times TRL's. On a GPU the same command measures there (both in bfloat16).

Run: python -m benchmarks.training [rows] [epochs]
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from apprentice.local.base_model import load_model_and_tokenizer, resolve_base_model
from apprentice.local.frame import Frame
from apprentice.local.skeleton import Skeleton
from apprentice.prompts import compact_prompt
from apprentice.schemas.schema import Schema
from apprentice.settings.config import TrainingSettings, load_settings
from flows.trainers import Progress, TrainingRow
from flows.trainers.encoding import TokenRow, encode
from flows.trainers.recipe import Recipe, choose

ROOT = Path(__file__).parents[1]


def main(rows: int = 64, epochs: int = 2) -> None:
    """Print tokens per second of each."""
    settings = load_settings(ROOT / "apprentice.yaml")
    task = settings.task("classify_ticket")
    base = resolve_base_model(settings.local.base_model, ROOT)
    lines = (ROOT / "examples/support_tickets/tickets.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
    examples = [TrainingRow(row["id"], row["input"], row["answer"]) for row in map(json.loads, lines)]
    model, tokenizer = load_model_and_tokenizer(base)
    on_gpu = model.device.type == "cuda"
    skeleton = Skeleton.of(task.output_schema)
    encoded, _ = encode(examples, tokenizer, Frame.of_tokenizer(tokenizer), skeleton, 2048)
    layers = model.config.num_hidden_layers
    options = TrainingSettings(epochs=epochs)
    chosen = replace(choose(options, rows=rows, layers=layers, on_gpu=on_gpu), validation=0)
    every = replace(chosen, trained_layers=layers)
    del model
    print(f"{rows} rows, {epochs} epochs, {base.name}, LoRA r={chosen.lora_rank} on all linear layers, {_device()}")
    reference = _trl(examples, base.path, every, tokenizer)
    print(f"{'TRL SFTTrainer + PEFT':<34}{reference:8.0f} tokens/s", flush=True)
    for name, recipe in (("every layer", every), (f"its recipe ({chosen.trained_layers} of {layers})", chosen)):
        ours = _ours(encoded, base, recipe)
        print(f"{'Apprentice, ' + name:<34}{ours:8.0f} tokens/s  {ours / reference:.2f} x", flush=True)


def _ours(rows: list[TokenRow], base: Any, recipe: Recipe) -> float:
    from flows.trainers.backends.huggingface import with_lora
    from flows.trainers.crew import Alone
    from flows.trainers.loop import Checkpoint, Loop

    model, _ = load_model_and_tokenizer(base)
    lora = with_lora(model, recipe, base.name)
    heard: list[Progress] = []
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        loop = Loop(recipe, rows, [], lora, model, heard.append, time.monotonic, Alone())
        outcome = loop.run(Checkpoint(Path(folder) / "checkpoint.pt", "benchmark", recipe))
        return outcome.tokens / (time.perf_counter() - started)


def _trl(examples: list[TrainingRow], base: str, recipe: Recipe, tokenizer: Any) -> float:
    """The same rows as prompt and completion, which makes SFTTrainer put the loss on the answer alone."""
    import torch
    from datasets import Dataset  # type: ignore[import-untyped]  # it has no stubs
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, Trainer
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]  # exported lazily

    frame = Frame.of_tokenizer(tokenizer)
    pairs = [
        {"prompt": frame.render(compact_prompt(row.input)), "completion": Schema.dumps(row.output)} for row in examples
    ]
    tokens = sum(len(tokenizer(p["prompt"] + p["completion"], add_special_tokens=False).input_ids) for p in pairs)
    on_gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16 if on_gpu else torch.float32)

    class OnCpu(SFTTrainer):
        """TRL 1.15 computes its loss with Triton kernels only; on a CPU the model's own loss stands in for it."""

        compute_loss = Trainer.compute_loss

    kind = SFTTrainer if on_gpu else OnCpu
    with tempfile.TemporaryDirectory() as folder:
        trainer = kind(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                num_train_epochs=recipe.epochs,
                per_device_train_batch_size=recipe.batch_size,
                learning_rate=recipe.learning_rate,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=not on_gpu,
                bf16=on_gpu,
            ),
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=recipe.lora_rank,
                lora_alpha=int(recipe.lora_alpha),
                target_modules=list(recipe.target_modules),
                task_type="CAUSAL_LM",
            ),
        )
        started = time.perf_counter()
        trainer.train()
        return tokens * recipe.epochs / (time.perf_counter() - started)


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
