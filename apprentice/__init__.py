"""Apprentice: one call, `run(task, input)`, that needs the remote model less and less."""

from apprentice.client import Apprentice, AsyncApprentice
from apprentice.config import Settings, load_settings
from apprentice.errors import (
    ApprenticeError,
    BudgetExceeded,
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

__all__ = [
    "Apprentice",
    "ApprenticeError",
    "AsyncApprentice",
    "BudgetExceeded",
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
