"""The store: tables, migrations, and the few transactions that need to be atomic."""

from apprentice.store.records import (
    CapWindow,
    ComparisonRecord,
    Count,
    EventRecord,
    ExampleRecord,
    Lease,
    NextCall,
    PolicyRow,
    Reservation,
    RunRecord,
    Settlement,
    SpendRow,
    StateChange,
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
    "Lease",
    "NextCall",
    "PolicyRow",
    "Reservation",
    "RunRecord",
    "Settlement",
    "SpendRow",
    "StateChange",
    "Store",
    "TaskState",
    "Usage",
    "VersionRecord",
    "WindowState",
]
