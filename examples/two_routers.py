"""Two routers, one PostgreSQL: they share examples, trust and a cap that no number of processes overspends.

    python examples/two_routers.py postgresql://user@host/database

The two clients stand for two machines. A stand-in for the vendor answers, so nothing is paid.
"""

import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from apprentice import Apprentice, BudgetExceeded
from apprentice.testing import FakeVendor

CAP = 0.005
TASK = {"name": "echo", "description": "Say it again.", "input_schema": {"n": "int"}, "output_schema": {"n": "int"}}


def ask(router: Apprentice, n: int) -> bool:
    """Whether the cap had room for one more request."""
    try:
        return router.run("echo", {"n": n}).output == {"n": n}
    except BudgetExceeded:
        return False


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, FakeVendor("openai", lambda value: value) as vendor:
        document = {"tasks": [TASK], "budget": {"daily": CAP}, "store": sys.argv[1], "remote": vendor.settings()}
        Path(folder, "apprentice.yaml").write_text(yaml.safe_dump(document))
        routers = [Apprentice.from_config(f"{folder}/apprentice.yaml", environ=vendor.environ) for _ in range(2)]
        with routers[0], routers[1], ThreadPoolExecutor(8) as callers:
            answered = sum(callers.map(lambda n: ask(routers[n % 2], n), range(500)))
            first, second = (router.status()["echo"] for router in routers)
        print(f"{answered} answered, {vendor.asked} asked; each router counts {first.examples} and {second.examples}")
        print(f"${first.spent} spent of ${CAP}, seen by both: {first.spent == second.spent}")
