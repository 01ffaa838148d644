"""Learning curve: held-out agreement with the remote after so many examples, and what the training cost.

The remote's recorded answers are what is learnt and what agreement is measured against. A plain loop (every layer,
learning rate 2e-4, three epochs, batches of 8) stands beside the recipe that this trainer chooses. The held-out rows
are the last of the shuffled file, the same for every size and seed.

    python -m benchmarks.learning_curve ../shared/data/isear.jsonl gpt-3.5-turbo-1106 benchmarks/isear.yaml \\
        --sizes 100 250 500 1000 2000 --seeds 0 1 2 --held-out 1000 --out benchmarks/results/learning_curve.jsonl
    python -m benchmarks.learning_curve --draw docs/learning-curve.png --out benchmarks/results/learning_curve.jsonl

What ``--out`` holds already is not measured again, so a run of hours can be broken off and taken up.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from apprentice.local import build_engine
from apprentice.local.engine import LocalAnswer, Version
from apprentice.settings.config import LocalSettings, TaskSettings, TrainingSettings, load_settings
from flows.trainers import TrainingJob
from flows.trainers.backends.huggingface import PeftTrainer

_PLAIN = {"epochs": 3, "learning_rate": 2e-4, "batch_size": 8}


def main() -> None:
    """Measure what is missing in ``--out``, print it line by line, and draw it where that is asked for."""
    options = _options()
    known = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.is_file() else []
    if options.file:
        _measure_all(options, known)
    if options.draw:
        _draw(known, options.draw)


def _measure_all(options: argparse.Namespace, known: list[dict[str, Any]]) -> None:
    settings = load_settings(options.config)
    task = settings.tasks[0]
    rows = []
    for line in Path(options.file).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if options.answer in row["answers"]:
            rows.append({"id": row["id"], "input": row["input"], "output": row["answers"][options.answer]})
    random.Random(42).shuffle(rows)
    test, pool = rows[-options.held_out :], rows[: -options.held_out]
    print(f"{task.name}: {len(pool)} rows to learn from, {len(test)} held out, taught by {options.answer}")
    print(f"{'examples':>8} {'seed':>4}  {'recipe':<8}{'agreement':>10}{'seconds':>9}")
    done = {(one["recipe"], one["examples"], one["seed"]) for one in known}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for size, seed, recipe in itertools.product(options.sizes, options.seeds, options.recipes):
        if (recipe, size, seed) in done:
            continue
        training = TrainingSettings(seed=seed, **(_PLAIN if recipe == "plain" else {}))
        train = random.Random(seed).sample(pool, size)
        agreement, wall_s = _measure(task, settings.local, train, test, training, every_layer=recipe == "plain")
        one = {"recipe": recipe, "examples": size, "seed": seed, "agreement": agreement, "wall_s": wall_s}
        known.append(one)
        with options.out.open("a") as file:
            file.write(json.dumps(one) + "\n")
        print(f"{size:>8} {seed:>4}  {recipe:<8}{agreement:>10.3f}{wall_s:>9.0f}", flush=True)


def _draw(known: list[dict[str, Any]], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.8), dpi=120)
    names = {"plain": "plain loop: every layer, 2e-4", "chosen": "the trainer's own recipe"}
    for recipe, colour in (("plain", "tab:gray"), ("chosen", "tab:blue")):
        mine = [one for one in known if one["recipe"] == recipe]
        axes.plot([o["examples"] for o in mine], [o["agreement"] for o in mine], "o", color=colour, alpha=0.35)
        sizes = sorted({one["examples"] for one in mine})
        means = [statistics.mean(o["agreement"] for o in mine if o["examples"] == size) for size in sizes]
        axes.plot(sizes, means, "-", color=colour, label=names[recipe])
    axes.set_xscale("log")
    sizes = sorted({one["examples"] for one in known})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("examples learnt from")
    axes.set_ylabel("held-out agreement with the remote")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(picture)


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


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?")
    parser.add_argument("answer", nargs="?")
    parser.add_argument("config", nargs="?")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 250, 500])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--recipes", nargs="+", choices=["chosen", "plain"], default=["chosen", "plain"])
    parser.add_argument("--held-out", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path(".bench/learning_curve.jsonl"))
    parser.add_argument("--draw", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
