"""Apprentice: one call, `run(task, input)`, that needs the remote model less and less."""

from typing import Any

from apprentice.client import Apprentice, AsyncApprentice
from apprentice.errors import (
    ApprenticeError,
    BudgetExceeded,
    ClientClosed,
    ConfigError,
    EngineRefused,
    EngineUnavailable,
    EvaluatorError,
    InputError,
    LocalError,
    MissingExtra,
    OutputError,
    Problem,
    RemoteError,
    RemoteRefused,
    RemoteUnavailable,
    StoreError,
    TrainingError,
    Unavailable,
    UnknownTask,
    VersionError,
)
from apprentice.result import Result, TaskStatus
from apprentice.settings.config import Settings, load_settings

__all__ = [
    "Apprentice",
    "ApprenticeError",
    "AsyncApprentice",
    "BudgetExceeded",
    "ClientClosed",
    "ConfigError",
    "EngineRefused",
    "EngineUnavailable",
    "EvaluatorError",
    "InputError",
    "LocalError",
    "MissingExtra",
    "OutputError",
    "Problem",
    "RemoteError",
    "RemoteRefused",
    "RemoteUnavailable",
    "Result",
    "Settings",
    "StoreError",
    "TaskStatus",
    "TrainingError",
    "Unavailable",
    "UnknownTask",
    "VersionError",
    "load_settings",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":  # looked up when it is asked for: reading it from the installation takes its time
        from importlib.metadata import version

        return version("apprentice-llm")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
