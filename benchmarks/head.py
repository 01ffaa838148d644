"""What a head knows after so many answers, beside logistic regression on the same encoder; and what it costs.

Of every stream, in each order, a head and scikit-learn's logistic regression (C = 10, on the features of
`benchmarks.baseline`) learn from the first answers and are asked for 1,000 later ones, the same at every size. Coverage
is in hindsight: the largest share of the most confident answers of which at most 5 or 10 % differ. ``held`` is the
agreement of the head's held-back answers, which is to be that of the new ones. Correlation is that of yes and no.

    python -m benchmarks.head --data ../shared/data
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from apprentice.schemas.schema import Schema, parse_schema
from apprentice.student.combining import fit_combiner
from apprentice.student.encoder import DEFAULT, load_encoder
from apprentice.student.features import Plan
from apprentice.student.fitting import Encodings, fit_head
from apprentice.student.head import HeadAnswer, softmax
from benchmarks.baseline import features
from benchmarks.recorded import Stream, read_stream

STREAMS = ("isear", "oa_nodes", "em_abt_buy")
SIZES = (100, 300, 1000, 2000)
LATER = 1000
FEWEST_LATER = 400

type Floats = NDArray[np.float64]


def coverage(p: Floats, y: NDArray[np.int64], most: float) -> float:
    """The largest share of the most confident answers of which at most ``most`` differ. p: [answers, values]."""
    wrong = p.argmax(axis=1) != y
    order = np.argsort(-p.max(axis=1), kind="stable")
    kept = np.flatnonzero(np.cumsum(wrong[order]) <= most * np.arange(1, len(y) + 1))
    return float(kept[-1] + 1) / len(y) if len(kept) else 0.0


def figures(p: Floats, y: NDArray[np.int64]) -> dict[str, float]:
    """Agreement, coverage at 5 and 10 %, log-loss, and the correlation of the answers where there are two values."""
    said = p.argmax(axis=1)
    spread = p.shape[1] == 2 and len(set(said.tolist())) == 2
    return {
        "agree": float((said == y).mean()),
        "5 %": coverage(p, y, 0.05),
        "10 %": coverage(p, y, 0.10),
        "log-loss": float(-np.log(np.maximum(p[np.arange(len(y)), y], 1e-6)).mean()),
        "corr": float(np.corrcoef(said, y)[0, 1]) if spread else float("nan") if p.shape[1] > 2 else 0.0,
    }


def compare(stream: Stream, encodings: Encodings, x: Floats, sizes: Sequence[int], order: int) -> dict[Any, Any]:
    """By (size, who): the figures on later rows of the stream as shuffled with ``order``."""
    shuffled, places = stream.shuffled(order)
    field, values = next(iter(stream.values().items()))
    schema = parse_schema({field: list(values)})
    y = np.array([values.index(answer[field]) for answer in shuffled.answers])
    outputs = [{field: answer[field]} for answer in shuffled.answers]
    x = x[places]
    encoder = load_encoder(DEFAULT)
    found: dict[Any, Any] = {}
    for n in sizes:
        later = slice(max(n, len(y) - LATER), len(y))
        if later.stop - later.start < FEWEST_LATER:
            continue
        plan = Plan.of(shuffled.inputs[:n])
        texts = [text for one in shuffled.inputs[:n] for text in plan.texts(one)]
        given = dict(zip(texts, encodings.encode(texts), strict=True))
        started = time.perf_counter()
        fitted = fit_head(schema, shuffled.inputs[:n], outputs[:n], encoder=encoder, embeddings=given)
        fit_s = time.perf_counter() - started
        said = fitted.head.predict_vectors(*fitted.head.plan.vectors(shuffled.inputs[later], encodings.encode))
        held = np.array([one.probabilities[field] for one in fitted.held_back])
        mine = figures(np.array([one.probabilities[field] for one in said]), y[later])
        found[n, "head"] = mine | {"held": float((held.argmax(axis=1) == y[:n]).mean()), "fit s": fit_s}
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a class for every second row
            other = LogisticRegression(C=10.0, max_iter=300).fit(x[:n], y[:n])
        fit_s = time.perf_counter() - started
        p = np.zeros((later.stop - later.start, len(values)))
        p[:, other.classes_] = other.predict_proba(x[later])
        found[n, "regression"] = figures(p, y[later]) | {"held": float("nan"), "fit s": fit_s}
    return found


def _wide(encodings: Encodings, texts: Sequence[str]) -> Floats:
    return encodings.encode(texts).astype(np.float64)


def combined_rows(n: int, k: int) -> tuple[Schema, tuple[Any, ...]]:
    """A schema of ``k`` values, and what else `fit_combiner` takes: a head's answers, and no adapter's."""
    draw = np.random.default_rng(0)
    labels = draw.integers(k, size=n)
    logits = draw.normal(size=(n, k))
    logits[np.arange(n), labels] += 3.0
    heads = [HeadAnswer({"intent": p}, float(draw.random())) for p in softmax(logits)]
    values = [f"intent {at}" for at in range(k)]
    outputs = [{"intent": values[at]} for at in labels]
    return parse_schema({"intent": values}), ({"intent": tuple(values)}, heads, [None] * n, outputs)


def costs() -> None:
    """Print what the two fits of a refit on 2,000 answers take, and an answer, in and out of the encoder."""
    draw = np.random.default_rng(0)
    labels = draw.integers(77, size=2000)
    x = (draw.normal(size=(77, 384))[labels] + 2.0 * draw.normal(size=(2000, 384))).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    inputs = [{"text": f"Request number {n} says something about this or that."} for n in range(2000)]
    schema = parse_schema({"intent": [f"intent {n}" for n in range(77)]})
    outputs = [{"intent": f"intent {n}"} for n in labels]
    encoder = load_encoder(DEFAULT)
    started = time.perf_counter()
    head = fit_head(schema, inputs, outputs, encoder=encoder, embeddings=x).head
    print(f"\nfit of 2,000 answers, 77 values, embeddings given: {time.perf_counter() - started:.2f} s")
    for values in (7, 77):
        schema, rows = combined_rows(2000, values)
        started = time.perf_counter()
        fit_combiner(schema, *rows)
        print(
            f"a combiner's fit on 2,000 answers of {values} values, head alone: {time.perf_counter() - started:.2f} s"
        )
    encoder.encode(["warm"])
    whole, without = [], []
    for one in inputs[:200]:
        started = time.perf_counter()
        head.predict([one])
        whole.append(time.perf_counter() - started)
        known = Encodings(encoder, dict(zip([one["text"]], encoder.encode([one["text"]]), strict=True)))
        started = time.perf_counter()
        head.predict_vectors(*head.plan.vectors([one], known.encode))
        without.append(time.perf_counter() - started)
    print(
        f"an answer, p50: {statistics.median(whole) * 1e3:.1f} ms, {statistics.median(without) * 1e3:.2f} ms of it ours"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the figures of every stream, means over the orders, and what a fit and an answer take."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of recorded answers")
    parser.add_argument("--streams", nargs="+", choices=STREAMS, default=STREAMS)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--orders", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(argv)
    columns = ("agree", "5 %", "10 %", "log-loss", "corr", "held", "fit s")
    print(f"{'stream':<12}{'answers':>8}  {'who':<12}" + "".join(f"{name:>9}" for name in columns))
    for name in options.streams:
        stream = read_stream(options.data, name)
        encodings = Encodings(load_encoder(DEFAULT))
        x = features(stream, partial(_wide, encodings))
        runs = [compare(stream, encodings, x, options.sizes, order) for order in options.orders]
        for n, who in runs[0]:
            means = [float(np.mean([run[n, who][column] for run in runs])) for column in columns]
            shown = "".join(f"{'-' if np.isnan(mean) else f'{mean:.3f}':>9}" for mean in means)
            print(f"{name:<12}{n:>8}  {who:<12}{shown}", flush=True)
    costs()


if __name__ == "__main__":
    main()
