"""The local model: what it decides, how it is framed, and the engines that run it."""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path

from apprentice.errors import ConfigError, Problem
from apprentice.local.engine import Engine, EngineSetup
from apprentice.local.leases import HoldStore, SharedLeases
from apprentice.money.budget import Budget
from apprentice.registry import ENGINES
from apprentice.settings.config import LocalSettings

__all__ = ["build_engine"]


def build_engine(
    settings: LocalSettings, root: Path, *, leases: HoldStore | None = None, budget: Budget | None = None
) -> Engine:
    """The engine that serves students, around the one that ``local.backend`` names; relative paths start at ``root``.

    The latter is made, and what it needs imported, when the first adapter is loaded. ``leases``: the store in which
    processes agree on what they use on a server that they share; None: nobody shares it. ``budget`` pays for an engine
    whose answers cost money. Raises `ConfigError` where that is missing.
    """
    if budget is None and ENGINES.find(settings.backend).made.is_paid:
        message = f"is {settings.backend}, whose answers cost money, and no budget is given."
        raise ConfigError("local.backend", [Problem("local.backend", message)])
    from apprentice.student.engine import StudentEngine, load_head  # which stands on this package

    return StudentEngine(lambda: _adapters(settings, root, leases, budget), lambda folder: load_head(folder, root))


def _adapters(settings: LocalSettings, root: Path, leases: HoldStore | None, budget: Budget | None) -> Engine:
    """The engine that runs adapters."""
    shared = SharedLeases(leases, _owner()) if leases is not None else None
    kind = ENGINES.find(settings.backend)
    options = ENGINES.options(kind, settings.backend_options, "backend_options")
    engine: Engine = kind.made.configured(EngineSetup(settings, root, shared, budget), options)
    return engine


def _owner() -> str:
    """Names one engine of one process."""
    return f"{socket.gethostname()}/{os.getpid()}/{uuid.uuid4().hex[:8]}"
