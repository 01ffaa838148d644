"""The pure mathematics of trust: from comparisons to a phase, a threshold and a sampling rate.

``trust`` is what the rest of Apprentice talks to; the other modules hold one idea each.
"""
