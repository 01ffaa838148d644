"""A time limit on code that is not ours and cannot be stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

__all__ = ["TimeLimit", "TookTooLong"]


class TookTooLong(Exception):
    """The code did not come back in time, or was not asked because earlier calls of it have not come back yet."""


class TimeLimit:
    """Runs calls of somebody else's function, each in a thread of its own, and waits at most ``seconds`` for one.

    A thread cannot be stopped: a call that hangs keeps its thread. While ``most`` of them hang no further one is made.
    """

    def __init__(self, what: str, seconds: float, *, most: int = 4) -> None:
        self._what = what
        self._seconds = seconds
        self._most = most
        self._lock = threading.Lock()
        self._late = 0

    def run[T](self, call: Callable[[], T], *, times: int = 1) -> T:
        """What ``call`` returns or raises; it may take ``times`` the limit. Raises `TookTooLong`."""
        with self._lock:
            if self._late >= self._most:
                raise TookTooLong(f"{self._what} is not asked: {self._late} earlier calls of it have not come back yet")
        future: Future[T] = Future()
        threading.Thread(target=_work, args=(call, future), name="apprentice-time-limit", daemon=True).start()
        try:
            return future.result(self._seconds * times)
        except TimeoutError:
            if future.done():
                raise  # its own
        with self._lock:
            self._late += 1
        future.add_done_callback(self._came_back)
        raise TookTooLong(f"{self._what} did not come back within {self._seconds * times:g} s")

    def _came_back(self, _: object) -> None:
        with self._lock:
            self._late -= 1


def _work[T](call: Callable[[], T], future: Future[T]) -> None:
    try:
        future.set_result(call())
    except BaseException as error:  # noqa: BLE001  # raised again where the result is waited for
        future.set_exception(error)
