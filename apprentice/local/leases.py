"""Leases on versions in a server that several processes share: routers, a coach.

An engine holds a lease on every version it uses there, and whoever lets go last has the version unloaded, if Apprentice
brought it there. So a coach that ends does not take a champion from under a router, and a process that dies leaves
nothing for ever: its lease runs out, and the next engine that loads something tidies up.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from apprentice.errors import ApprenticeError, EngineUnavailable
from apprentice.secrets import logger

__all__ = ["Alone", "HoldStore", "Leases", "SharedLeases"]

_log = logger(__name__)
_TTL_S = 300.0
_CHANGE_S = 120.0
"""How long one process may take to load or unload a version before another may step in."""


class Leases(Protocol):
    """What an engine needs to know of the others that use its server. ``server`` is its address."""

    def changing(self, server: str, version: str) -> AbstractContextManager[None]:
        """While nobody else loads or unloads this version there. Raises `EngineUnavailable` if it takes too long."""

    def hold(self, server: str, version: str, *, loaded: bool) -> None:
        """Use a version from now on; ``loaded``: this engine brought it there. Idempotent."""

    def release(self, server: str, version: str) -> bool:
        """Use it no longer. True if it is to be unloaded: Apprentice loaded it, and nobody else uses it."""

    def abandon(self, server: str, version: str) -> None:
        """Leave it to whoever tidies up next: it should be unloaded and could not be."""

    def abandoned(self, server: str) -> list[str]:
        """What Apprentice loaded there and nobody uses any more."""

    def close(self) -> None:
        """Stop renewing. What is still held runs out by itself."""


class Alone:
    """Leases of an engine that shares its server with nobody."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, str], bool] = {}
        self._left: set[tuple[str, str]] = set()

    def changing(self, server: str, version: str) -> AbstractContextManager[None]:
        """Nobody else is there."""
        return contextlib.nullcontext()

    def hold(self, server: str, version: str, *, loaded: bool) -> None:
        """Remember who loaded it."""
        self._left.discard((server, version))
        self._loaded[server, version] = loaded or self._loaded.get((server, version), False)

    def release(self, server: str, version: str) -> bool:
        """Whether it was loaded here."""
        self._left.discard((server, version))
        return self._loaded.pop((server, version), False)

    def abandon(self, server: str, version: str) -> None:
        """Remember it until this process ends."""
        self._left.add((server, version))
        self._loaded[server, version] = True

    def abandoned(self, server: str) -> list[str]:
        """What could not be unloaded."""
        return [version for at, version in sorted(self._left) if at == server]

    def close(self) -> None:
        """Nothing to stop."""


class HoldStore(Protocol):
    """The part of the store that remembers leases."""

    def hold_version(self, server: str, version: str, owner: str, ttl_s: float, *, loaded: bool) -> None: ...
    def release_version(self, server: str, version: str, owner: str) -> bool: ...
    def abandoned_versions(self, server: str) -> list[str]: ...
    def acquire_lease(self, name: str, owner: str, ttl_s: float) -> Any: ...
    def release_lease(self, lease: Any) -> None: ...


class SharedLeases:
    """Leases in the store that all processes share, renewed by a thread of their own. ``owner`` is one engine."""

    def __init__(self, store: HoldStore, owner: str, *, ttl_s: float = _TTL_S) -> None:
        self._store = store
        self._owner = owner
        self._ttl_s = ttl_s
        self._held: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._renewing: threading.Thread | None = None

    @contextlib.contextmanager
    def changing(self, server: str, version: str) -> Iterator[None]:
        """Hold the store's lease of that name, waiting for whoever has it."""
        name, ends = f"version:{server}:{version}", time.monotonic() + _CHANGE_S
        while (lease := self._store.acquire_lease(name, self._owner, _CHANGE_S)) is None:
            if time.monotonic() > ends:
                raise EngineUnavailable(f"another process has been loading version {version} for {_CHANGE_S:.0f} s")
            time.sleep(0.1)
        try:
            yield
        finally:
            with contextlib.suppress(ApprenticeError):  # it runs out by itself
                self._store.release_lease(lease)

    def hold(self, server: str, version: str, *, loaded: bool) -> None:
        """Write it down, and renew it from now on."""
        self._store.hold_version(server, version, self._owner, self._ttl_s, loaded=loaded)
        with self._lock:
            self._held.add((server, version))
            if self._renewing is None and not self._closed.is_set():
                self._renewing = threading.Thread(target=self._renew, name="apprentice-version-leases", daemon=True)
                self._renewing.start()

    def release(self, server: str, version: str) -> bool:
        """If the store cannot be asked, the lease runs out, and somebody else tidies up."""
        with self._lock:
            self._held.discard((server, version))
            try:
                return self._store.release_version(server, version, self._owner)
            except ApprenticeError as error:
                _log.warning("version %s stays in the server at %s for now: %s", version, server, error)
                return False

    def abandon(self, server: str, version: str) -> None:
        """As if this owner had died with it."""
        with contextlib.suppress(ApprenticeError):
            self._store.hold_version(server, version, self._owner, -1.0, loaded=True)

    def abandoned(self, server: str) -> list[str]:
        """What dead owners left."""
        return self._store.abandoned_versions(server)

    def renew(self) -> None:
        """Hold what is held for another while."""
        with self._lock:
            for server, version in sorted(self._held):
                try:
                    self._store.hold_version(server, version, self._owner, self._ttl_s, loaded=False)
                except ApprenticeError as error:  # the next round comes before it runs out
                    _log.warning("the lease on version %s could not be renewed: %s", version, error)

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()
        if self._renewing is not None:
            self._renewing.join()

    def _renew(self) -> None:
        while not self._closed.wait(self._ttl_s / 5):
            self.renew()
