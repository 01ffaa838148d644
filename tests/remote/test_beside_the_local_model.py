"""What a vendor sends never costs the caller the local answer that is at hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from apprentice.testing import Fault
from tests.conftest import Workbench

NO_ANSWER = {
    "server_error": Fault("server_error"),
    "refusal": Fault("refusal"),
    "filtered": Fault("filtered"),
    "prose": Fault("schema_violation", content="I would say: joy."),
    "deep": Fault("schema_violation", content='{"label": ' + "[" * 100_000),
    "empty": Fault("empty"),
    "brackets": Fault("verbatim", content="[" * 5_000),
    "list": Fault(
        "verbatim", content='{"type": "message", "content": [5], "stop_reason": ["x"], "usage": {"x": 1e999}}'
    ),
    "null": Fault("verbatim", content="null"),
    "error_inside": Fault("error_inside", retry_after_s=float("inf")),
    "bad_request": Fault("verbatim", status=400, content='{"error": {"details": 5}}'),
    "nan": Fault("verbatim", status=429, content="{}", headers=(("retry-after", "nan"),)),
}


@pytest.mark.parametrize("fault", NO_ANSWER)
def test_the_local_answer_is_given(bench: Callable[..., Workbench], fault: str) -> None:
    """In phase 3 every request is answered, whatever the remote does; nothing of it is an example."""
    at = bench(faults=itertools.repeat(NO_ANSWER[fault]))
    at.promote(held_out=400)
    for _ in range(3):
        assert at.run("a joy") == {"label": "joy"}
    assert at.vendor.asked
    assert at.store.count_examples("mood") == 0
