"""Figures beside what they are compared with, measured in the same run."""
