"""Doubles for tests and trials: real little things with behaviour, part of the public API."""

from apprentice.testing.engine import FakeEngine
from apprentice.testing.remote import FakeVendor, Fault

__all__ = ["FakeEngine", "FakeVendor", "Fault"]
