"""Rate limits of one provider in one process: requests and tokens a minute, and calls at once.

Token buckets, as pure state: time comes in, a wait goes out, so that a test needs neither a clock nor a sleep. The
vendor's own verdict, a 429 with a time to wait, pauses every call of the process to that provider.
"""

from __future__ import annotations

import threading

__all__ = ["Bucket", "Limits"]


class Bucket:
    """``per_minute`` tokens a minute, of which up to ``burst`` may be saved up. Goes into debt, never waits."""

    def __init__(self, per_minute: float, *, burst: float | None = None) -> None:
        self._rate = per_minute / 60
        self._full = per_minute / 60 if burst is None else burst
        self._level = self._full
        self._at: float | None = None

    def wait_s(self, amount: float, now: float) -> float:
        """How long until ``amount`` is there; an amount larger than the bucket is there when the bucket is full."""
        self._refill(now)
        missing = min(amount, self._full) - self._level
        return max(missing / self._rate, 0.0)

    def is_full(self, now: float) -> bool:
        """Whether nothing was taken lately."""
        self._refill(now)
        return self._level >= self._full

    def take(self, amount: float, now: float) -> None:
        self._refill(now)
        self._level -= amount

    def _refill(self, now: float) -> None:
        if self._at is not None and now > self._at:
            self._level = min(self._full, self._level + (now - self._at) * self._rate)
        self._at = now if self._at is None else max(now, self._at)


class Limits:
    """What one process may ask of one provider. ``now`` is a monotonic clock's reading, in seconds. Thread-safe.

    A call `enter`s, `take`s until that returns 0, is made, and `leave`s.
    """

    def __init__(self, *, requests_per_minute: int | None, tokens_per_minute: int | None, max_concurrency: int) -> None:
        # A second's worth may be saved up; a burst of a whole minute would trip the vendors' own, finer buckets.
        self._requests = None
        if requests_per_minute:
            self._requests = Bucket(requests_per_minute, burst=max(requests_per_minute / 60, 1.0))
        self._tokens = None
        if tokens_per_minute:
            self._tokens = Bucket(tokens_per_minute, burst=tokens_per_minute / 6)
        self._places = threading.BoundedSemaphore(max_concurrency)
        self._paused_until = float("-inf")
        self._why_paused = ""
        self._lock = threading.Lock()

    def enter(self, within_s: float) -> bool:
        """Wait for a place among the calls at once, at most ``within_s`` real seconds. If True, `leave` must follow."""
        return self._places.acquire(timeout=max(within_s, 0.0))

    def leave(self) -> None:
        """The call is over, or is not made."""
        self._places.release()

    def take(self, tokens: float, now: float) -> float:
        """Take one call of about ``tokens`` tokens, and return 0; or how long to wait before asking again."""
        with self._lock:
            wait = max(self._paused_until - now, 0.0)
            if self._requests is not None:
                wait = max(wait, self._requests.wait_s(1, now))
            if self._tokens is not None:
                wait = max(wait, self._tokens.wait_s(tokens, now))
            if wait > 0:
                return wait
            if self._requests is not None:
                self._requests.take(1, now)
            if self._tokens is not None:
                self._tokens.take(tokens, now)
            return 0.0

    def take_spare(self, tokens: float, now: float) -> bool:
        """Take a call that nobody waits for: only where nothing else is being asked. Never waits."""
        with self._lock:
            buckets = [bucket for bucket in (self._requests, self._tokens) if bucket is not None]
            if now < self._paused_until or not all(bucket.is_full(now) for bucket in buckets):
                return False
            if self._requests is not None:
                self._requests.take(1, now)
            if self._tokens is not None:
                self._tokens.take(tokens, now)
            return True

    def pause(self, until: float, why: str) -> None:
        """The vendor asked for silence until then, and said why."""
        with self._lock:
            if until > self._paused_until:
                self._paused_until, self._why_paused = until, why

    def paused(self, now: float) -> tuple[float, str] | None:
        """For how many more seconds the vendor asked for silence, and why; None where it did not."""
        with self._lock:
            rest = self._paused_until - now
            return (rest, self._why_paused) if rest > 0 else None
