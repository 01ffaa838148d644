"""The versions that an engine in front of a server holds: found by name, let go once their answers are out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from apprentice.errors import EngineUnavailable, VersionError

__all__ = ["Drained"]


@dataclass(eq=False)
class _Entry[T]:
    held: T
    in_flight: int = 0
    leaving: bool = False


class Drained[T]:
    """A registry whose entries leave only after everyone who uses them is done. Thread-safe."""

    def __init__(self, who: str) -> None:
        self._who = who
        self._entries: dict[str, _Entry[T]] = {}
        self._changed = threading.Condition()
        self._closed = False

    def put(self, name: str, held: T) -> T | None:
        """Hold it under that name; gives back what was there before, whose users finish with what they have."""
        with self._changed:
            if self._closed:
                raise EngineUnavailable(f"the {self._who} engine is closed")
            before = self._entries.get(name)
            self._entries[name] = _Entry(held)
            return before.held if before is not None else None

    def get(self, name: str) -> T | None:
        """What is held under that name and not leaving."""
        with self._changed:
            entry = self._entries.get(name)
            return None if entry is None or entry.leaving else entry.held

    @contextmanager
    def using(self, name: str) -> Iterator[T]:
        """Use it; it does not leave meanwhile. Raises `VersionError` where it is not held."""
        with self._changed:
            if self._closed:
                raise EngineUnavailable(f"the {self._who} engine is closed")
            entry = self._entries.get(name)
            if entry is None or entry.leaving:
                raise VersionError(f"version {name} is not loaded; load it first")
            entry.in_flight += 1
        try:
            yield entry.held
        finally:
            with self._changed:
                entry.in_flight -= 1
                self._changed.notify_all()

    def drop(self, name: str, release: Callable[[T], None]) -> None:
        """Refuse new users, wait for those there are, and release it. Idempotent."""
        with self._changed:
            entry = self._entries.get(name)
            if entry is None or entry.leaving:
                return
            entry.leaving = True
            self._changed.wait_for(lambda: entry.in_flight == 0 or self._closed)
            if self._entries.get(name) is entry:
                del self._entries[name]
        release(entry.held)

    def all(self) -> dict[str, T]:
        """Everything held."""
        with self._changed:
            return {name: entry.held for name, entry in self._entries.items()}

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> list[T]:
        """Refuse everything from now on; gives back what was held."""
        with self._changed:
            self._closed = True
            held = [entry.held for entry in self._entries.values()]
            self._entries.clear()
            self._changed.notify_all()
            return held
