"""`python -m benchmarks`: every benchmark in its quick form, one after the other."""

from __future__ import annotations

import subprocess
import sys

# Each in a process of its own, so that what one imports or leaves in memory is not measured by the next.
QUICK = (
    ("what importing costs", ("benchmarks.import_cost",)),
    ("a request against bare httpx", ("benchmarks.overhead",)),
    ("trust against its references", ("benchmarks.trust",)),
)


def main() -> int:
    """Run them all; 0 only where every one ended well."""
    failed = 0
    for title, module in QUICK:
        print(f"\n== {title} (python -m {' '.join(module)})\n", flush=True)
        failed += subprocess.run([sys.executable, "-m", *module], check=False).returncode != 0
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
