"""Learning curve: held-out agreement with the remote after so many examples, and what the training cost.

The remote's recorded answers are what is learnt and what agreement is measured against. A plain loop (every layer,
learning rate 2e-4, three epochs) is printed beside the recipe that this trainer chooses. The held-out rows are the last
of the shuffled file, the same for every size and seed.

Run: python -m benchmarks.learning_curve FILE.jsonl ANSWER CONFIG [sizes] [seeds] [held out]
For example: ../shared/data/isear.jsonl gpt-3.5-turbo-1106 benchmarks/isear.yaml 100,250,500 0,1,2 300
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from apprentice.config import LocalSettings, TaskSettings, TrainingSettings, load_settings
from apprentice.local import build_engine
from apprentice.local.engine import LocalAnswer, Version
from flows.trainers import TrainingJob
from flows.trainers.peft import PeftTrainer


def main(
    file: str, answer: str, config: str, sizes: str = "100,250,500", seeds: str = "0", held_out: str = "300"
) -> None:
    """Print one line for each size and seed, as soon as it is known."""
    settings = load_settings(config)
    task = settings.tasks[0]
    rows = []
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if answer in row["answers"]:
            rows.append({"id": row["id"], "input": row["input"], "output": row["answers"][answer]})
    random.Random(42).shuffle(rows)
    test, pool = rows[-int(held_out) :], rows[: -int(held_out)]
    print(f"{task.name}: {len(pool)} rows to learn from, {len(test)} held out, taught by {answer}")
    print(f"{'examples':>8} {'seed':>4}  {'recipe':<14}{'agreement':>10}{'seconds':>9}")
    for size in map(int, sizes.split(",")):
        for seed in map(int, seeds.split(",")):
            train = random.Random(seed).sample(pool, size)
            plain = TrainingSettings(epochs=3, learning_rate=2e-4, batch_size=8, seed=seed)
            for name, training in (("chosen", TrainingSettings(seed=seed)), ("plain loop", plain)):
                agreement, wall_s = _measure(task, settings.local, train, test, training, every_layer=name != "chosen")
                print(f"{size:>8} {seed:>4}  {name:<14}{agreement:>10.3f}{wall_s:>9.0f}", flush=True)


def _measure(
    task: TaskSettings,
    local: LocalSettings,
    train: list[dict[str, Any]],
    test: list[dict[str, Any]],
    training: TrainingSettings,
    *,
    every_layer: bool,
) -> tuple[float, float]:
    """Agreement of the trained version in the embedded engine, and the seconds that training took."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = folder / "rows.train.jsonl"
        dataset.write_text("\n".join(map(json.dumps, train)) + "\n", encoding="utf-8")
        job = TrainingJob(
            task=task.name,
            dataset=dataset,
            output_schema=task.output_schema,
            base_model=local.base_model,
            root=folder,
            work=folder / "work",
            adapters=folder / "adapters",
            settings=training,
        )
        started = time.monotonic()
        trained = PeftTrainer(every_layer=every_layer).train(job, lambda _: None)
        wall_s = time.monotonic() - started
        engine = build_engine(local, folder)
        engine.load(Version(trained.name, task.name, trained.folder, task.output_schema))
        answers = engine.answer_many(trained.name, [row["input"] for row in test])
        engine.close()
    same = sum(isinstance(a, LocalAnswer) and a.output == row["output"] for a, row in zip(answers, test, strict=True))
    return same / len(test), wall_s


if __name__ == "__main__":
    main(*sys.argv[1:7])
