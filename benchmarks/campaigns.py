"""What campaigns spare: the share of requests that the remote answers, with them and without, on the same requests.

    python -m benchmarks.campaigns            about ten minutes on one core
    python -m benchmarks.campaigns --runs 2 --requests 3000

Students whose confidences are honest, in the worlds of `benchmarks.certificates`: an answer of confidence g agrees with
probability g. Each begins with 150 held-out answers; the student does not learn. Everything is drawn from seeded
generators, and the two are given the same requests.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence

from apprentice.confidence.phases import Phase
from apprentice.confidence.settings import TrustSettings
from apprentice.confidence.trust import Trust
from apprentice.confidence.watch import LocalObservation
from apprentice.confidence.weighing import Comparison
from benchmarks.certificates import WORLDS
from benchmarks.trust import same

HELD_OUT = 150
LABELS = 7
MOMENTS = (1_000, 3_000, 10_000)
PROMISES = ((0.05, False), (0.10, False), (0.05, True))


def settings(limit: float, *, overall: bool, campaigns: bool) -> TrustSettings:
    """A promise about what is served, or about all answers."""
    if overall:
        return TrustSettings(max_disagreement_overall=limit, campaigns=campaigns)
    return TrustSettings(max_disagreement=limit, campaigns=campaigns)


def remote_shares(world: str, promise: TrustSettings, requests: int, seed: int) -> list[float]:
    """The share of the requests so far that the remote answered, at each of `MOMENTS` up to ``requests``."""
    traffic, checks = random.Random(seed), random.Random(seed + 1_000_000)
    trust = Trust.fresh(promise)
    seen = [_compared(traffic, WORLDS[world](traffic)) for _ in range(HELD_OUT)]
    trust.promoted(seen, same, checks)
    remote, shares = 0, []
    for n in range(1, requests + 1):
        g = WORLDS[world](traffic)
        phase, threshold, rate = trust.policy_numbers
        served = phase is Phase.SERVE and threshold is not None and g >= threshold
        comparison = _compared(traffic, g, probability=rate if served else 1.0, rate=rate, served=served)
        trust.watch([LocalObservation(g, served=served)])
        if not served or checks.random() < rate:
            remote += 1
            trust.observe(comparison, same, checks)
        if n in MOMENTS:
            shares.append(remote / n)
    return shares


def _compared(
    draw: random.Random, g: float, *, probability: float = 1.0, rate: float = 1.0, served: bool = False
) -> Comparison:
    remote = draw.randrange(LABELS)
    local = remote if draw.random() < g else (remote + 1) % LABELS
    return Comparison("", float(local == remote), {}, g, local, remote, probability, rate, served)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table: each world and promise, the share without campaigns and with them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--requests", type=int, default=MOMENTS[-1])
    options = parser.parse_args(argv)
    moments = [moment for moment in MOMENTS if moment <= options.requests]
    print("| world | promise | " + " | ".join(f"after {moment:,}" for moment in moments) + " |")
    print("| --- | --- |" + " ---: |" * len(moments))
    means: list[list[list[float]]] = []
    for world in WORLDS:
        for limit, overall in PROMISES:
            pair = []
            for campaigns in (False, True):
                promise = settings(limit, overall=overall, campaigns=campaigns)
                runs = [remote_shares(world, promise, options.requests, seed) for seed in range(options.runs)]
                pair.append([statistics.fmean(column) for column in zip(*runs, strict=True)])
            means.append(pair)
            print(f"| {world} | {'overall' if overall else 'served'} {limit:.2f} | {_cells(pair)} |", flush=True)
    whole = [[statistics.fmean(column) for column in zip(*rows, strict=True)] for rows in zip(*means, strict=True)]
    print(f"| mean | | {_cells(whole)} |")


def _cells(pair: Sequence[Sequence[float]]) -> str:
    return " | ".join(f"{without:.3f} / {with_:.3f}" for without, with_ in zip(*pair, strict=True))


if __name__ == "__main__":
    main()
