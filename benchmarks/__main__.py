"""`python -m benchmarks`: the quick benchmarks, one after the other; ``--data`` adds what needs recorded answers."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Run them all; 0 only where every one ended well."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--data", type=Path, help="a folder of recorded answers, isear.jsonl among them")
    data = parser.parse_args().data
    benchmarks = [
        ("what importing costs", ["benchmarks.import_cost"]),
        ("a request against bare httpx", ["benchmarks.overhead"]),
        ("trust against its references", ["benchmarks.trust"]),
        ("training against TRL", ["benchmarks.training"]),
    ]
    if data is not None:
        engines = ["benchmarks.engines", "--data", str(data / "isear.jsonl")]
        benchmarks.append(("the baseline to beat", ["benchmarks.baseline", "--data", str(data), "--orders", "0"]))
        benchmarks.append(("the head beside logistic regression", ["benchmarks.head", "--data", str(data)]))
        benchmarks.append(("the engines against generate and llama.cpp", engines))
    failed = 0
    # Each in a process of its own, so that what one imports or leaves in memory is not measured by the next.
    for title, module in benchmarks:
        print(f"\n== {title} (python -m {' '.join(module)})\n", flush=True)
        failed += subprocess.run([sys.executable, "-m", *module], check=False).returncode != 0
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
