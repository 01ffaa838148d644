"""Whether a person has cancelled a training run in Prefect.

A worker stops a cancelled run with a signal; a coach that runs its flows itself is told by nobody, so it asks.
"""

from __future__ import annotations

import time
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext

from apprentice import secrets
from apprentice.errors import TrainingError

__all__ = ["Cancellation", "RunCancelled"]

_ASK_EVERY_S = 5.0
_log = secrets.logger("apprentice.coach")


class RunCancelled(TrainingError):
    """A person has cancelled the run in Prefect."""


class Cancellation:
    """Remembers the flow runs that a training run is made of, and asks Prefect whether one of them is cancelled."""

    def __init__(self) -> None:
        self._flow_runs: set[UUID] = set()
        self._asked_at = time.monotonic()
        self._remember()

    def check(self) -> None:
        """Ask every few seconds. Raises `RunCancelled`."""
        self._remember()
        if time.monotonic() - self._asked_at >= _ASK_EVERY_S and self.is_asked_for():
            raise RunCancelled("a person has cancelled the run in Prefect")

    def is_asked_for(self) -> bool:
        """Ask now. A server that does not answer has cancelled nothing."""
        self._asked_at = time.monotonic()
        if not self._flow_runs:
            return False  # to ask would start a server
        try:
            with get_client(sync_client=True) as client:
                states = [client.read_flow_run(run).state for run in self._flow_runs]
        except Exception:  # noqa: BLE001  # whatever a server that is down raises
            _log.warning("Prefect could not be asked whether the run is cancelled", exc_info=True)
            return False
        return any(state is not None and (state.is_cancelling() or state.is_cancelled()) for state in states)

    def _remember(self) -> None:
        context = FlowRunContext.get()
        if context is not None and context.flow_run is not None:
            self._flow_runs.add(context.flow_run.id)
