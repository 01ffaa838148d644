"""How much of the traffic is certified after few comparisons, beside a hybrid of bets and a fixed-sample test.

    python -m benchmarks.certificates [--streams 200]

A model whose confidence g is honest (its answers agree with probability g) is compared n times, every comparison in
full; "at most so many of the served answers differ" is certified with an error of .05. Printed is the mean share of the
traffic in the certified slice: by bets alone, by bets and the exact test (`apprentice.confidence.exact`), and what
another statistician's hybrid of the two certified in the same worlds (400 streams; given as figures, the program is not
at hand). Below that, how often anything is certified if nothing should be.
"""

from __future__ import annotations

import argparse
import random
import statistics
from bisect import bisect_left
from collections.abc import Callable, Sequence

from apprentice.confidence.acceptance import Slices, grid, promising

__all__ = ["HYBRID", "WORLDS", "certified", "coverage", "wrongly_certified"]

DELTA = 0.05
LOOKS = (300, 600, 1000)
Draw = Callable[[random.Random], float]

WORLDS: dict[str, Draw] = {
    "Beta(12,1)": lambda draw: draw.betavariate(12, 1),
    "Beta(30,1)": lambda draw: draw.betavariate(30, 1),
    ".6 Beta(40,1) + .4 Beta(3,2)": lambda draw: draw.betavariate(*((40, 1) if draw.random() < 0.6 else (3, 2))),
    ".3 Beta(60,1) + .7 Beta(4,2)": lambda draw: draw.betavariate(*((60, 1) if draw.random() < 0.3 else (4, 2))),
}
HYBRID: dict[tuple[str, float], tuple[float, float, float]] = {
    ("Beta(12,1)", 0.05): (0.089, 0.152, 0.323),
    ("Beta(12,1)", 0.10): (0.833, 0.909, 0.957),
    ("Beta(30,1)", 0.05): (0.557, 0.762, 0.958),
    (".6 Beta(40,1) + .4 Beta(3,2)", 0.05): (0.239, 0.375, 0.562),
    (".6 Beta(40,1) + .4 Beta(3,2)", 0.10): (0.719, 0.745, 0.760),
    (".3 Beta(60,1) + .7 Beta(4,2)", 0.05): (0.041, 0.138, 0.264),
    (".3 Beta(60,1) + .7 Beta(4,2)", 0.10): (0.371, 0.449, 0.480),
}


def certified(rows: Sequence[tuple[float, float]], limit: float, *, tests: bool, seed: int) -> list[Slices]:
    """The slices after each of `LOOKS` (confidence, score) comparisons, of which the first ``seed`` set the grid."""
    confidences = [g for g, _ in rows[:seed]]
    slices = Slices(
        grid(confidences, 0.1),
        DELTA,
        confidences,
        entry=promising([(g, limit - (1.0 - g), 1.0) for g in confidences]),
        max_disagreement=limit if tests else None,
    )
    slices.replay((g, score, limit - (1.0 - score), 1.0, False) for g, score in rows[:seed])
    found = []
    for n, (g, score) in enumerate(rows, start=1):
        if n > seed:
            slices.add(g, score, limit - (1.0 - score), 1.0)
        if n in LOOKS:
            slices.settle()
            found.append(Slices.load(slices.dump()))
    return found


def coverage(world: Draw, limit: float, streams: int, *, tests: bool, seed: int = 300) -> list[float]:
    """Mean share of the traffic that is certified after each of `LOOKS` comparisons."""
    draw = random.Random(9)
    traffic = sorted(world(draw) for _ in range(20_000))
    shares: list[list[float]] = [[] for _ in LOOKS]
    for stream in range(streams):
        for slices, into in zip(
            certified(_rows(world, lambda g: g, stream), limit, tests=tests, seed=seed), shares, strict=True
        ):
            threshold = slices.threshold
            into.append(0.0 if threshold is None else 1.0 - bisect_left(traffic, threshold) / len(traffic))
    return [statistics.fmean(of_look) for of_look in shares]


def wrongly_certified(limit: float, streams: int, *, tests: bool = True, seed: int = 300) -> float:
    """Share of streams in which anything is certified of a model that just misses its target at every confidence."""
    wrong = 0
    for stream in range(streams):
        rows = _rows(WORLDS["Beta(12,1)"], lambda g: 1.0 - limit, stream)
        wrong += any(one.certified is not None for one in certified(rows, limit, tests=tests, seed=seed))
    return wrong / streams


def _rows(world: Draw, agrees: Callable[[float], float], stream: int) -> list[tuple[float, float]]:
    draw, rows = random.Random(stream), []
    for _ in range(LOOKS[-1]):
        g = world(draw)
        rows.append((g, float(draw.random() < agrees(g))))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200)
    streams = parser.parse_args().streams
    print(f"| world | at most | after | bets | bets and test | hybrid |  ({streams} streams)")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for (name, limit), hybrid in HYBRID.items():
        alone = coverage(WORLDS[name], limit, streams, tests=False)
        both = coverage(WORLDS[name], limit, streams, tests=True)
        for row in zip(LOOKS, alone, both, hybrid, strict=True):
            print("| {} | {:.2f} | {:,} | {:.3f} | {:.3f} | {:.3f} |".format(name, limit, *row), flush=True)
    for limit in (0.05, 0.1):
        for seed in (60, 300):
            wrong = wrongly_certified(limit, streams, seed=seed)
            print(f"just missing {limit:.2f}, grid of the first {seed}: {wrong:.4f} certified, at most {DELTA} may be")


if __name__ == "__main__":
    main()
