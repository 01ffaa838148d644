"""The store: tables, migrations, and the few transactions that need to be atomic."""

from apprentice.store.database import within
from apprentice.store.records import (
    CapWindow,
    ComparisonRecord,
    Count,
    EventRecord,
    ExampleRecord,
    ExampleTotals,
    Held,
    Lease,
    Reservation,
    RunRecord,
    SecondAnswer,
    Settlement,
    SpendRow,
    StateChange,
    TaskPolicy,
    TaskState,
    Usage,
    VersionRecord,
    WindowState,
)
from apprentice.store.store import Store

__all__ = [
    "CapWindow",
    "ComparisonRecord",
    "Count",
    "EventRecord",
    "ExampleRecord",
    "ExampleTotals",
    "Held",
    "Lease",
    "Reservation",
    "RunRecord",
    "SecondAnswer",
    "Settlement",
    "SpendRow",
    "StateChange",
    "Store",
    "TaskPolicy",
    "TaskState",
    "Usage",
    "VersionRecord",
    "WindowState",
    "within",
]
