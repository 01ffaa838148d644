"""How often a learner that is asked again at every refit is certified wrongly: its error, beside what was allowed.

Made streams of texts whose embeddings are Gaussian around their label. The remote gives another label to a share of
them that lies just above what may differ, whatever the text, so whatever is ever served is served wrongly: no slice of
it keeps the promise. The student is the product's (head, combiner), and so are the decisions (`benchmarks.streams`).

    python -m benchmarks.level --streams 400
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from apprentice.confidence.settings import TrustSettings
from apprentice.student.encoder import DEFAULT, load_encoder
from apprentice.student.fitting import Encodings
from benchmarks.recorded import Stream
from benchmarks.streams import replay
from benchmarks.students import Pupils

__all__ = ["main", "wrongly_served"]

LABELS, DIMENSIONS = 4, 32


def noisy_stream(rng: np.random.Generator, requests: int, noise: float, apart: float) -> tuple[Stream, Encodings]:
    """Requests of which the remote gives the share ``noise`` another label; labels lie ``apart``."""
    means = apart * rng.normal(size=(LABELS, DIMENSIONS))
    kind = rng.integers(LABELS, size=requests)
    x = means[kind] + rng.normal(size=(requests, DIMENSIONS))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    said = np.where(rng.random(requests) < noise, (kind + rng.integers(1, LABELS, size=requests)) % LABELS, kind)
    texts = [f"request {at}" for at in range(requests)]
    stream = Stream("noisy", [{"text": text} for text in texts], [{"label": f"label {one}"} for one in said])
    return stream, Encodings(load_encoder(DEFAULT), dict(zip(texts, x.astype(np.float32), strict=True)))


def wrongly_served(
    streams: int, requests: int, settings: TrustSettings, *, noise: float, apart: float, seed: int = 21
) -> int:
    """Of so many streams, those of which anything was ever served."""
    rng = np.random.default_rng(seed)
    served = 0
    for at in range(streams):
        stream, encodings = noisy_stream(rng, requests, noise, apart)
        outcome = replay(stream, Pupils(stream, encodings, load_encoder(DEFAULT)), settings, seed=at)
        served += not all(outcome.asked)
    return served


def main(argv: Sequence[str] | None = None) -> None:
    """Print the error of both promises on streams that are easy and hard to learn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=400)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--deltas", type=float, nargs="+", default=[0.05, 0.10])
    options = parser.parse_args(argv)
    print(f"{'promise':<14}{'labels':<14}{'delta':>6}{'ever wrongly served':>21}{'standard error':>16}")
    for delta in options.deltas:
        for promise in (0.05, 0.10):
            settings = TrustSettings(max_disagreement=promise, delta=delta)
            for name, apart in (("far apart", 1.0), ("overlapping", 0.35)):
                wrong = (
                    wrongly_served(options.streams, options.requests, settings, noise=1.02 * promise, apart=apart)
                    / options.streams
                )
                error = (wrong * (1.0 - wrong) / options.streams) ** 0.5
                print(f"{promise:<5.2f}served   {name:<14}{delta:>6.2f}{wrong:>21.3f}{error:>16.3f}", flush=True)


if __name__ == "__main__":
    main()
