"""A circuit breaker: leaves a provider alone that is down, and tries it again now and then.

It opens when attempts have done nothing but fail for a while (`_FAILURES` of them, over `_FOR_S` seconds: a burst of
concurrent failures within one bad second is no outage), lets one attempt through when its time is over, and closes at
the first success.
"""

from __future__ import annotations

import threading

__all__ = ["Breaker"]

_FAILURES = 5
_FOR_S = 5.0
_REST_S = 2.0
_LONGEST_REST_S = 60.0


class Breaker:
    """State of one provider in one process. ``now`` is a monotonic clock's reading, in seconds. Thread-safe."""

    def __init__(self) -> None:
        self._failures = 0
        self._failing_since = 0.0
        self._rest_s = 0.0
        self._closed_again_at = 0.0
        self._lock = threading.Lock()

    def wait_s(self, now: float) -> float:
        """0 where an attempt may be made, else how long the provider is still left alone.

        While it is open, the one who gets 0 makes the trial; others go on waiting for its outcome.
        """
        if not self._rest_s:
            return 0.0
        with self._lock:
            wait = self._closed_again_at - now
            if self._rest_s and wait <= 0:
                self._closed_again_at = now + self._rest_s
                return 0.0
            return max(wait, 0.0) if self._rest_s else 0.0

    def rest_s(self, now: float) -> float:
        """As `wait_s`; asking takes nothing."""
        return max(self._closed_again_at - now, 0.0) if self._rest_s else 0.0

    def allows(self, now: float) -> bool:
        """Whether `wait_s` would be 0; asking takes nothing."""
        return self.rest_s(now) <= 0

    def succeeded(self) -> None:
        if self._failures:
            with self._lock:
                self._failures = 0
                self._rest_s = 0.0

    def failed(self, now: float) -> bool:
        """Count a failure; True where it opened the breaker."""
        with self._lock:
            if not self._failures:
                self._failing_since = now
            self._failures += 1
            if self._rest_s:
                self._rest_s = min(self._rest_s * 2, _LONGEST_REST_S)
                self._closed_again_at = now + self._rest_s
                return False
            if self._failures < _FAILURES or now - self._failing_since < _FOR_S:
                return False
            self._rest_s = _REST_S
            self._closed_again_at = now + self._rest_s
            return True
