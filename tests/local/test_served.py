"""What engines behind a server share: bulk work that steps back for callers."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from apprentice.errors import EngineUnavailable
from apprentice.local.engine import LocalAnswer
from apprentice.local.served import Courtesy


def test_bulk_work_steps_back_while_somebody_waits() -> None:
    """Alone it sends as many as the server takes; beside callers a sixteenth; and it ends either way."""
    courtesy, counting = Courtesy(32), threading.Lock()
    now, most = 0, 0

    def ask(value: Mapping[str, Any]) -> LocalAnswer:
        nonlocal now, most
        with counting:
            now += 1
            most = max(most, now)
        time.sleep(0.01)
        with counting:
            now -= 1
        if value["n"] == 7:
            raise EngineUnavailable("down")
        return LocalAnswer({"n": value["n"]}, 1.0, {}, "v", 1, 1)

    values = [{"n": n} for n in range(64)]
    answers = courtesy.ask_all(ask, values)
    assert most > 8
    assert [a.output["n"] for a in answers if isinstance(a, LocalAnswer)] == [n for n in range(64) if n != 7]
    assert isinstance(answers[7], EngineUnavailable)
    most = 0
    with courtesy.caller():
        assert len(courtesy.ask_all(ask, values)) == 64
    assert most == 2
