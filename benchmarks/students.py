"""The product's students for `benchmarks.streams`: the real head and combiner, and adapters of recorded answers.

Training adapters takes an hour of two cores for each order of a stream, so `record` does it once and for all:

    python -m benchmarks.students --data ../shared/data --stream isear --order 0 --sizes 300 750 1875 --out DIR

It trains the product's adapter on the first so many requests of the stream in that order, and writes its distribution
over the values of every later request. In a replay such an adapter is there once enough answers were bought that a
share of them, as configured, would have been held out from it. It learnt from the *first* requests, where the product
would take those that were bought: the same ones until something is served, and not many fewer after.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from apprentice.local import build_engine
from apprentice.local.engine import LocalAnswer, Version
from apprentice.schemas.schema import Schema, compact_json, parse_schema
from apprentice.settings.config import TrainingSettings, load_settings
from apprentice.student.combiner import Combiner, HeadAnswer
from apprentice.student.combining import fit_combiner
from apprentice.student.encoder import DEFAULT, Encoder, load_encoder
from apprentice.student.fitting import Encodings, fit_head
from apprentice.student.head import Head
from benchmarks.recorded import STREAMS, Stream, read_stream
from flows.trainers import TrainingJob
from flows.trainers.backends.huggingface import PeftTrainer

__all__ = ["Adapter", "Answer", "Fitted", "Pupils", "Student", "read_adapters"]

CONFIG = Path(__file__).parent / "isear_10.yaml"
_JUDGED = 4000  # as flows.assemble
_AHEAD = 200

type Answer = tuple[float, Mapping[str, str]]
"""(confidence, output)"""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter's recorded answers: by field float32 [requests, values], nan where it was taught."""

    learnt: int
    probabilities: Mapping[str, NDArray[np.float32]]


class Student(Protocol):
    """What has learnt."""

    def answer(self, row: int) -> Answer:
        """Its answer to one request of the stream."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A student, and what it says of requests that it did not learn from: ``judged`` by their place in the stream."""

    student: Student
    judged: Mapping[int, Answer]


class Pupils:
    """Fits the product's students on one stream, as `flows.assemble` does."""

    def __init__(self, stream: Stream, encodings: Encodings, encoder: Encoder) -> None:
        self.stream = stream
        self.values = stream.values()
        self.schema = parse_schema({name: list(values) for name, values in self.values.items()})
        self.encodings = encodings
        self._encoder = _Remembering(encoder, encodings)

    def fit(self, rows: Sequence[int], adapter: Adapter | None = None) -> Fitted:
        """A student that has learnt from these requests' answers, beside ``adapter``.

        It is judged by what it says of each without having learnt from it: the head alone of what the adapter learnt.
        """
        inputs = [self.stream.inputs[row] for row in rows]
        outputs = [self.stream.answers[row] for row in rows]
        fitted = fit_head(self.schema, inputs, outputs, encoder=self._encoder)
        first = max(0, len(rows) - _JUDGED)
        loras = [self.adapter_says(adapter, row) for row in rows[first:]]
        fit = fit_combiner(self.schema, fitted.head.fields, fitted.held_back[first:], loras, outputs[first:])
        judged = {
            row: (answer.confidence, answer.output)
            for row, answer in zip(rows[first:], fit.answers, strict=True)
            if answer is not None
        }
        sure = None if adapter is None else fit.sure
        return Fitted(HeadAndAdapter(self, fitted.head, fit.combiner, adapter, sure), judged)

    def head_says(self, head: Head, rows: Sequence[int]) -> list[HeadAnswer]:
        inputs = [self.stream.inputs[row] for row in rows]
        return list(head.predict_vectors(*head.plan.vectors(inputs, self.encodings.encode)))

    def adapter_says(self, adapter: Adapter | None, row: int) -> LocalAnswer | None:
        if adapter is None or row < adapter.learnt:
            return None
        output, confidence, distributions = {}, {}, {}
        for name, values in self.values.items():
            p = adapter.probabilities[name][row]
            output[name], confidence[name] = values[int(p.argmax())], float(p.max())
            distributions[name] = {compact_json(v): float(q) for v, q in zip(values, p, strict=True)}
        return LocalAnswer(output, min(confidence.values()), confidence, "recorded", 0, 0, None, distributions)


class HeadAndAdapter:
    """Answers as the product's engine of students does: the head alone if it is sure, else both."""

    def __init__(
        self, pupils: Pupils, head: Head, combiner: Combiner, adapter: Adapter | None, sure: float | None
    ) -> None:
        self.adapter = adapter
        self._pupils, self._head, self._combiner, self._sure = pupils, head, combiner, sure
        self._ahead: dict[int, HeadAnswer] = {}

    def answer(self, row: int) -> Answer:
        """Its answer to one request."""
        if row not in self._ahead:
            rows = range(row, min(row + _AHEAD, len(self._pupils.stream)))
            self._ahead = dict(zip(rows, self._pupils.head_says(self._head, rows), strict=True))
        head = self._ahead[row]
        if self.adapter is None or self._sure is not None:
            alone = self._combiner.combine(head, None)
            if self.adapter is None or (self._sure is not None and alone.confidence >= self._sure):
                return alone.confidence, alone.output
        both = self._combiner.combine(head, self._pupils.adapter_says(self.adapter, row))
        return both.confidence, both.output


class _Remembering(Encoder):
    def __init__(self, encoder: Encoder, encodings: Encodings) -> None:
        super().__init__(encoder.name, encoder._place)
        self._encodings = encodings

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._encodings.encode(texts)


def read_adapters(folder: Path, name: str, order: int, *, most: int = 100_000) -> list[Adapter]:
    """The recorded adapters of a stream in an order, smallest first."""
    found = []
    for file in folder.glob(f"{name}.{order}.*.npz"):
        learnt = int(file.name.split(".")[2])
        if learnt <= most:
            with np.load(file) as kept:
                found.append(Adapter(learnt, {n: kept[n] for n in kept.files if not n.startswith("values_")}))
    return sorted(found, key=lambda adapter: adapter.learnt)


def record(data: Path, name: str, order: int, sizes: Sequence[int], out: Path) -> None:
    """Train adapters and write their answers; what is there already is not done again."""
    settings = load_settings(CONFIG)
    stream, _ = read_stream(data, name).shuffled(order)
    values = stream.values()
    schema = parse_schema({field: list(of_field) for field, of_field in values.items()})
    out.mkdir(parents=True, exist_ok=True)
    for size in sizes:
        file = out / f"{name}.{order}.{size}.npz"
        if file.exists():
            continue
        with tempfile.TemporaryDirectory() as there:
            started = time.monotonic()
            folder, adapter = _trained(stream, schema, size, Path(there), settings.local.base_model)
            trained = time.monotonic()
            found = {
                field: np.full((len(stream), len(of_field)), np.nan, np.float32) for field, of_field in values.items()
            }
            engine = build_engine(settings.local, folder)
            engine.load(Version(adapter.name, name, adapter, schema))
            for row in range(size, len(stream), 64):
                for at, one in enumerate(engine.answer_many(adapter.name, stream.inputs[row : row + 64]), row):
                    assert isinstance(one, LocalAnswer)
                    assert one.distributions is not None
                    for field, of_field in values.items():
                        told = one.distributions[field]
                        found[field][at] = [told.get(compact_json(v), 0.0) for v in of_field]
            engine.close()
        np.savez_compressed(file, **{field: p.astype(np.float32) for field, p in found.items()})  # type: ignore[arg-type]
        print(f"{file.name}: trained in {trained - started:.0f} s, answered in {time.monotonic() - trained:.0f} s")


def _trained(stream: Stream, schema: Schema, size: int, folder: Path, base_model: str) -> tuple[Path, Path]:
    dataset = folder / "rows.train.jsonl"
    rows = [{"id": str(i), "input": stream.inputs[i], "output": stream.answers[i]} for i in range(size)]
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    job = TrainingJob(
        task=stream.name,
        dataset=dataset,
        output_schema=schema,
        base_model=base_model,
        root=folder,
        work=folder / "work",
        adapters=folder / "adapters",
        settings=TrainingSettings(seed=0),
    )
    return folder, PeftTrainer().train(job, lambda _: None).folder


def encoder() -> Encoder:
    """The default encoder."""
    return load_encoder(DEFAULT)


def main(argv: Sequence[str] | None = None) -> None:
    """Record adapters' answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--stream", choices=STREAMS, required=True)
    parser.add_argument("--order", type=int, default=0)
    parser.add_argument("--sizes", type=int, nargs="+", default=[300, 750, 1875])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    record(options.data, options.stream, options.order, options.sizes, options.out)


if __name__ == "__main__":
    main()
