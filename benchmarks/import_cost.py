"""What `import apprentice` costs: seconds and memory, beside a bare interpreter and the libraries it stands on."""

from __future__ import annotations

import subprocess
import sys

PROBE = """
import resource, sys, time
start = time.perf_counter()
{statement}
seconds = time.perf_counter() - start
rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
heavy = [m for m in ("torch", "transformers", "prefect", "mlflow", "fastapi", "numpy") if m in sys.modules]
print(seconds, rss, ",".join(heavy) or "-")
"""
STATEMENTS = {
    "a bare interpreter": "pass",
    "httpx, pydantic, sqlalchemy": "import httpx, pydantic, sqlalchemy",
    "apprentice": "import apprentice",
}
ROUNDS = 5


def main() -> None:
    """Print the table; the smallest of several fresh processes each, interleaved."""
    best: dict[str, tuple[float, float, str]] = {}
    for _ in range(ROUNDS):
        for name, statement in STATEMENTS.items():
            code = PROBE.format(statement=statement)
            out = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout.split()
            measured = (float(out[0]), float(out[1]), out[2])
            best[name] = min(best.get(name, measured), measured)
    print(f"{'import':<30}{'seconds':>9}{'MB RSS':>9}   heavy modules      (limits: 0.5 s, 60 MB)")
    for name, (seconds, rss, heavy) in best.items():
        print(f"{name:<30}{seconds:>9.3f}{rss:>9.1f}   {heavy}")


if __name__ == "__main__":
    main()
