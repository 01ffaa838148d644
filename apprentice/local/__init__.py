"""The local model: what it decides, how it is framed, and the engines that run it."""

from __future__ import annotations
