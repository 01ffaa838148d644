"""An evaluator of your own: how alike two answers are, where equal or different says too little.

Its score is what the local model is trusted by, so try it on pairs that you can judge before it decides anything.
In apprentice.yaml: `evaluator: custom` and `evaluator_function: custom_evaluator:delivery_score`, imported from the
folder in which Apprentice runs; `apprentice check` says whether that works.
"""

from collections.abc import Mapping
from datetime import date
from typing import Any

from apprentice.evaluators import build_evaluator

Answer = Mapping[str, Any]


def delivery_score(local: Answer, remote: Answer) -> float:
    """1 for the same day by the same carrier; a day less by a seventh each; half of that by another carrier."""
    days = abs((date.fromisoformat(local["day"]) - date.fromisoformat(remote["day"])).days)
    return max(0.0, 1 - days / 7) * (1.0 if local["carrier"] == remote["carrier"] else 0.5)


PAIRS = [
    ({"day": "2026-03-02", "carrier": "north"}, {"day": "2026-03-02", "carrier": "north"}),
    ({"day": "2026-03-03", "carrier": "north"}, {"day": "2026-03-02", "carrier": "north"}),
    ({"day": "2026-03-02", "carrier": "south"}, {"day": "2026-03-02", "carrier": "north"}),
    ({"day": "2026-04-02", "carrier": "north"}, {"day": "2026-03-02", "carrier": "north"}),
]

if __name__ == "__main__":
    evaluate = build_evaluator("custom", function="custom_evaluator:delivery_score")
    for local, remote in PAIRS:
        print(f"{evaluate(local, remote).score:.2f}  {local} against {remote}")
