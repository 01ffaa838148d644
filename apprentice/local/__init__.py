"""The local model: what it decides, how it is framed, and the engines that run it."""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path

from apprentice.errors import ConfigError, Problem
from apprentice.local.engine import Engine
from apprentice.local.leases import HoldStore, SharedLeases
from apprentice.money.budget import Budget
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
    if settings.backend == "hosted" and budget is None:
        problem = Problem("local.backend", "is hosted, whose answers cost money, and no budget is given.")
        raise ConfigError("local.backend", [problem])
    from apprentice.student.engine import StudentEngine, load_head  # which stands on this package

    return StudentEngine(lambda: _adapters(settings, root, leases, budget), lambda folder: load_head(folder, root))


def _adapters(settings: LocalSettings, root: Path, leases: HoldStore | None, budget: Budget | None) -> Engine:
    """The engine that runs adapters."""
    shared = SharedLeases(leases, _owner()) if leases is not None else None
    match settings.backend:
        case "embedded":
            from apprentice.local.embedded import EmbeddedEngine

            return EmbeddedEngine(
                settings.base_model,
                root,
                max_new_tokens=settings.max_new_tokens,
                max_memory_mb=settings.max_memory_mb,
            )
        case "llama_cpp":
            from apprentice.local.llama_cpp import LlamaCppEngine

            return LlamaCppEngine(settings.base_model, root, url=settings.url, max_new_tokens=settings.max_new_tokens)
        case "vllm":
            from apprentice.local.vllm import VllmEngine

            url = settings.url or "http://127.0.0.1:8000"
            return VllmEngine(settings.base_model, root, url=url, max_new_tokens=settings.max_new_tokens, leases=shared)
        case "ollama":
            from apprentice.local.ollama import OllamaEngine

            url = settings.url or "http://127.0.0.1:11434"
            return OllamaEngine(
                settings.base_model,
                root,
                training_model=settings.training_model,
                url=url,
                max_new_tokens=settings.max_new_tokens,
                leases=shared,
            )
        case "hosted":
            from apprentice.local.hosted import HostedEngine

            assert budget is not None
            url = settings.url or "https://api.openai.com/v1"
            key = settings.api_key_env
            return HostedEngine(budget, url=url, key_env=key, max_new_tokens=settings.max_new_tokens)


def _owner() -> str:
    """Names one engine of one process."""
    return f"{socket.gethostname()}/{os.getpid()}/{uuid.uuid4().hex[:8]}"
