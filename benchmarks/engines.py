"""The local engines on one task, side by side: same answers? how fast? is the confidence worth something?

    python -m benchmarks.engines [--data ../shared/data/isear.jsonl] [--adapter FOLDER] [--rows 300] [--threads 2]

The task is ISEAR: a sentence to one of seven emotions, taught by the answers of a frontier model. Without ``--adapter``
one is trained first on the first 300 rows, which takes some minutes. Rows after those are held out. Every speed is
measured in rounds that take turns, so that a busy machine is busy for all of them; the medians are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from apprentice.local.adapter import content_name
from apprentice.local.base_model import SMOLLM2, load_model_and_tokenizer, resolve_base_model
from apprentice.local.engine import Engine, LocalAnswer, Version
from apprentice.local.engines.embedded import EmbeddedEngine
from apprentice.local.engines.llama_cpp import LlamaCppEngine
from apprentice.local.frame import Frame
from apprentice.local.skeleton import Skeleton
from apprentice.prompts import compact_prompt
from apprentice.schemas.schema import parse_schema
from apprentice.settings.config import TrainingSettings

EMOTIONS = "joy | fear | anger | sadness | disgust | shame | guilt"
REMOTE = "gpt-3.5-turbo-1106"
TRAINED_ON = 300
SCHEMA = parse_schema({"emotion": EMOTIONS})

type Row = tuple[dict[str, Any], str]


def main() -> None:
    """Run every part and print it."""
    options = _options()
    import torch

    torch.set_num_threads(options.threads)
    rows = isear_rows(options.data)
    folder = options.adapter or train_on(rows[:TRAINED_ON], options.work, TrainingSettings())
    version = Version(content_name(folder), "emotion", folder, SCHEMA)
    held_out = rows[TRAINED_ON : TRAINED_ON + options.rows]
    print(f"adapter {version.name}, {len(held_out)} held-out rows, {options.threads} threads\n")

    plain = Plain(folder)
    embedded = EmbeddedEngine(SMOLLM2, Path())
    llama_cpp = LlamaCppEngine(SMOLLM2, Path(), threads=options.threads)
    engines: dict[str, Engine] = {"embedded": embedded, "llama_cpp": llama_cpp}
    try:
        for engine in engines.values():
            engine.load(version)
        answers = _agreement(plain, engines, version, held_out)
        _worth(answers["embedded"], held_out, options.picture)
        _speed(plain, engines, version, rows[TRAINED_ON + options.rows :], options.timed, options.rounds)
    finally:
        for engine in engines.values():
            engine.close()


class Plain:
    """What one writes first: transformers and PEFT, `model.generate`, one request at a time."""

    def __init__(self, folder: Path) -> None:
        from peft import PeftModel

        self.model, self.tokenizer = load_model_and_tokenizer(resolve_base_model(SMOLLM2, Path()))
        self.model = PeftModel.from_pretrained(self.model, str(folder)).eval()
        self.frame = Frame.load(folder)
        self.opening = Skeleton.of(SCHEMA).opening
        # What may end the value, and what may end the whole.
        known = self.tokenizer.get_vocab()
        self.ends = [known['"'], known['"}'], known["}"]]
        self._lock = threading.Lock()

    def generate(self, value: Mapping[str, Any], *, prefilled: bool) -> str:
        """The answer's text, token by token. ``prefilled``: the JSON up to the value is given."""
        import torch

        text = self.frame.render(compact_prompt(value)) + (self.opening if prefilled else "")
        with self._lock, torch.inference_mode():
            ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)
            out = self.model.generate(
                **ids,
                max_new_tokens=4 if prefilled else 10,
                do_sample=False,
                eos_token_id=self.ends if prefilled else self.ends[-2:],
                pad_token_id=self.tokenizer.pad_token_id,
            )
        return str(self.tokenizer.decode(out[0, ids["input_ids"].shape[1] :]))

    def decide(self, values: Sequence[Mapping[str, Any]]) -> list[str]:
        """The trainer's own evaluation: the likeliest first token among the enum's, one row at a time, no cache."""
        import torch

        names = SCHEMA.json_schema["properties"]["emotion"]["enum"]
        first = [self.tokenizer(f'{name}"', add_special_tokens=False).input_ids[0] for name in names]
        assert len(set(first)) == len(first)
        opening = self.tokenizer(self.opening, add_special_tokens=False).input_ids
        answers = []
        with torch.inference_mode():
            for value in values:
                ids = self.frame.encode(self.tokenizer, compact_prompt(value)) + opening
                logits = self.model(torch.tensor([ids])).logits[0, -1]
                answers.append(str(names[int(logits[first].argmax())]))
        return answers


def _agreement(
    plain: Plain, engines: Mapping[str, Engine], version: Version, rows: Sequence[Row]
) -> dict[str, list[LocalAnswer]]:
    trainer = plain.decide([value for value, _ in rows])
    answers = {name: answers_of(engine, version, [value for value, _ in rows]) for name, engine in engines.items()}
    said = {name: [a.output["emotion"] for a in some] for name, some in answers.items()}
    print("Served = validated: share of equal answers")
    print(f"  embedded  = trainer    {_same(said['embedded'], trainer):.3f}   (at least 0.99)")
    print(f"  llama_cpp = trainer    {_same(said['llama_cpp'], trainer):.3f}")
    print(f"  embedded  = llama_cpp  {_same(said['embedded'], said['llama_cpp']):.3f}   (at least 0.97)")
    remote = [label for _, label in rows]
    for name, some in said.items():
        print(f"  {name:9} = remote     {_same(some, remote):.3f}")
    again = [engines["llama_cpp"].answer(version.name, value, deadline_s=600) for value, _ in rows[:100]]
    one_by_one = [a.output["emotion"] for a in again]
    print(f"  llama_cpp = llama_cpp asked one at a time (100 rows) {_same(one_by_one, said['llama_cpp'][:100]):.3f}")
    g = [abs(a.confidence - b.confidence) for a, b in zip(answers["embedded"], answers["llama_cpp"], strict=True)]
    print(f"  mean difference of g between the two engines {statistics.mean(g):.4f}\n")
    return answers


def _worth(answers: Sequence[LocalAnswer], rows: Sequence[Row], picture: Path | None) -> None:
    right = [a.output["emotion"] == label for a, (_, label) in zip(answers, rows, strict=True)]
    g = [a.confidence for a in answers]
    print("Confidence: embedded, against agreement with the remote")
    print(f"  AUROC {auroc(g, right):.3f}   (at least 0.75)")
    order = sorted(range(len(g)), key=lambda i: -g[i])
    for share in (0.25, 0.5, 0.75, 1.0):
        top = order[: max(1, round(share * len(order)))]
        print(f"  most confident {share:4.0%}: agreement {statistics.mean(right[i] for i in top):.3f}")
    bins: list[tuple[float, float, int]] = []
    for low in range(10):
        some = [i for i, x in enumerate(g) if low / 10 <= x < (low + 1) / 10 or (low == 9 and x == 1)]
        if some:
            bins.append((statistics.mean(g[i] for i in some), statistics.mean(right[i] for i in some), len(some)))
    error = sum(n * abs(mean - share) for mean, share, n in bins) / len(g)
    print(f"  expected calibration error {error:.3f}\n")
    if picture is not None:
        _draw(bins, picture)


def _draw(bins: Sequence[tuple[float, float, int]], picture: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(4.5, 4.5))
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1)
    axes.plot([b[0] for b in bins], [b[1] for b in bins], color="#1f5f8b", linewidth=1)
    axes.scatter([b[0] for b in bins], [b[1] for b in bins], s=[20 + 2 * b[2] for b in bins], color="#1f5f8b")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence g", ylabel="agreement with the remote")
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    print(f"  picture: {picture}\n")


def _speed(
    plain: Plain, engines: Mapping[str, Engine], version: Version, rows: Sequence[Row], count: int, rounds: int
) -> None:
    """Every round asks rows that nobody was asked before: servers remember prompts."""
    fresh = iter([value for value, _ in rows])

    def engine_asks(engine: Engine) -> Callable[[Mapping[str, Any]], object]:
        return lambda value: engine.answer(version.name, value, deadline_s=600)

    ways: dict[str, Callable[[Mapping[str, Any]], object]] = {
        "generate, whole answer": lambda value: plain.generate(value, prefilled=False),
        "generate, value only": lambda value: plain.generate(value, prefilled=True),
        **{name: engine_asks(engine) for name, engine in engines.items()},
    }
    print(f"Speed: requests per second, {count} requests a round, median of {rounds} rounds")
    print(f"  {'':24} {'1 caller':>10} {'16 callers':>11}")
    rates: dict[tuple[str, int], list[float]] = {}
    for turn in range(rounds):
        for callers in (1, 16):
            values = [next(fresh) for _ in range(count)]
            for name, ask in ways.items():
                rate = _rate(ask, values, callers)
                rates.setdefault((name, callers), []).append(rate)
                print(f"    round {turn + 1}, {callers:2} callers, {name}: {rate:.2f}", file=sys.stderr, flush=True)
    median = {key: statistics.median(some) for key, some in rates.items()}
    for name in ways:
        print(f"  {name:24} {median[name, 1]:10.2f} {median[name, 16]:11.2f}")
    for base, aims in (("generate, whole answer", "(aims: 2, 4)"), ("generate, value only", ""), ("llama_cpp", "")):
        ratios = [median["embedded", callers] / median[base, callers] for callers in (1, 16)]
        print(f"  embedded / {base}: {ratios[0]:.2f} at 1 caller, {ratios[1]:.2f} at 16 {aims}")


def _rate(ask: Callable[[Mapping[str, Any]], object], values: Sequence[Mapping[str, Any]], callers: int) -> float:
    started = time.perf_counter()
    with ThreadPoolExecutor(callers) as threads:
        list(threads.map(ask, values))
    return len(values) / (time.perf_counter() - started)


def auroc(scores: Sequence[float], right: Sequence[bool]) -> float:
    """The chance that a right answer has a higher score than a wrong one, ties counting half (Mann-Whitney)."""
    good = [s for s, r in zip(scores, right, strict=True) if r]
    bad = [s for s, r in zip(scores, right, strict=True) if not r]
    wins = sum((g > b) + 0.5 * (g == b) for g in good for b in bad)
    return wins / (len(good) * len(bad))


def _same(a: Sequence[object], b: Sequence[object]) -> float:
    return statistics.mean(x == y for x, y in zip(a, b, strict=True))


def answers_of(engine: Engine, version: Version, values: Sequence[Mapping[str, Any]]) -> list[LocalAnswer]:
    """A version's answers to all of these; the first that fails is raised."""
    answers = []
    for answer in engine.answer_many(version.name, values):
        if isinstance(answer, Exception):
            raise answer
        answers.append(answer)
    return answers


def isear_rows(path: Path) -> list[Row]:
    """The recorded inputs in the file's order, each with the remote's answer."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(row["input"], row["answers"][REMOTE]["emotion"]) for row in rows if REMOTE in row["answers"]]


def train_on(rows: Sequence[Row], work: Path, settings: TrainingSettings) -> Path:
    """An adapter folder, trained with the product's own trainer."""
    from flows.trainers import TrainingJob
    from flows.trainers.backends.huggingface import PeftTrainer

    work.mkdir(parents=True, exist_ok=True)
    dataset = work / f"isear-{len(rows)}.train.jsonl"
    with dataset.open("w", encoding="utf-8") as file:
        for i, (value, label) in enumerate(rows):
            file.write(json.dumps({"id": str(i), "input": value, "output": {"emotion": label}}) + "\n")
    job = TrainingJob("emotion", dataset, SCHEMA, SMOLLM2, Path(), work / "work", work / "adapters", settings)
    return PeftTrainer().train(job, lambda p: print(f"\r  training {p.fraction:4.0%}", end="", flush=True)).folder


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/isear.jsonl"))
    parser.add_argument("--adapter", type=Path, help="a trained adapter folder")
    parser.add_argument("--work", type=Path, default=Path(".bench/engines"))
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--timed", type=int, default=48, help="requests in one round of the speed part")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--picture", type=Path, help="where to draw the reliability picture")
    return parser.parse_args()


if __name__ == "__main__":
    main()
