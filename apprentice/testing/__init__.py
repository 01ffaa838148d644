"""Doubles for tests and trials: real little things with behaviour, part of the public API."""

from apprentice.testing.remote import FakeVendor, Fault

__all__ = ["FakeVendor", "Fault"]
