"""Curation at size: seconds and peak memory for many examples, streamed as the store would stream them.

One example in twenty repeats an earlier input, one in fifty repeats one almost word for word, one in two hundred
contradicts an earlier answer; what curation finds of each is printed beside what was put in.

Run: python -m benchmarks.curation [examples], a million by default.
"""

from __future__ import annotations

import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from apprentice.settings.config import Settings
from apprentice.store.records import ExampleRecord
from flows.curation import curate_examples

_LABELS = ("billing", "delivery", "returns", "account")
_LIMIT_GB = 2.0


def main(count: int = 1_000_000) -> None:
    task = Settings.model_validate(
        {
            "tasks": [
                {
                    "name": "tickets",
                    "description": "Classify a ticket.",
                    "input_schema": {"text": "str"},
                    "output_schema": {"category": " | ".join(_LABELS)},
                }
            ],
            "remote": {"provider": "anthropic", "model": "claude-sonnet-4-5", "api_key_env": "NONE"},
        }
    ).tasks[0]
    before = _peak_mb()
    started = time.monotonic()

    def tell(done: float) -> None:
        print(
            f"  {done:4.0%} after {time.monotonic() - started:.0f} s, {_peak_mb():.0f} MB", file=sys.stderr, flush=True
        )

    with tempfile.TemporaryDirectory() as folder:
        card = curate_examples(
            lambda: traffic(count), task, Path(folder), held_out=0.2, max_held_out=5000, progress=tell
        ).card
        wall_s, peak = time.monotonic() - started, _peak_mb()
    print(f"{count} examples curated in {wall_s:.0f} s ({count / wall_s:.0f} a second)")
    print(f"peak memory {peak:.0f} MB, {before:.0f} MB before it began; at most {_LIMIT_GB:g} GB for a million")
    print(f"exact duplicates {card.exact_duplicates} (put in about {count // 20 + count // 200})")
    print(f"near duplicates {card.near_duplicates} (put in about {count // 50})")
    print(
        f"conflicts {card.conflicts} (put in about {count // 200}); "
        f"held out {card.held_out}, trained on {card.trained_on}"
    )


def traffic(count: int) -> Iterator[ExampleRecord]:
    """The same stream every time: sentences of twelve to forty words out of 20,000."""
    draw = random.Random(7)
    recent: list[tuple[str, str]] = [("the very first ticket", _LABELS[0])]
    for n in range(count):
        kind = draw.random()
        text, label = recent[draw.randrange(len(recent))]
        if kind < 0.05:
            pass
        elif kind < 0.055:
            label = _LABELS[(_LABELS.index(label) + 1) % len(_LABELS)]
        elif kind < 0.075:
            text += " thanks"
        else:
            text = " ".join(f"w{int(20_000 * draw.random() ** 2)}" for _ in range(draw.randrange(12, 40)))
            label = _LABELS[len(text) % len(_LABELS)]
            if len(recent) < 5000:
                recent.append((text, label))
            else:
                recent[draw.randrange(5000)] = (text, label)
        yield ExampleRecord(f"{n:032x}", "tickets", {"text": text}, {"category": label}, "anthropic", "m", 0.0, n + 1)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main(*(int(n) for n in sys.argv[1:2]))
