"""Apprentice."""
