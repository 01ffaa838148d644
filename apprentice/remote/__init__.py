"""The remote that teaches: vendors' protocols, resilience and prices."""

from apprentice.remote.teacher import RemoteAnswer, Teacher

__all__ = ["RemoteAnswer", "Teacher"]
