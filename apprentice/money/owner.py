"""Who holds a reservation, and whether that process still lives.

A process is named ``host/pid@start``: numbers of processes are used again, their moments of start are not. Whether it
lives can be told on its own host alone; elsewhere the answer is None, and only age speaks.
"""

from __future__ import annotations

import os
import socket
from functools import lru_cache
from pathlib import Path

__all__ = ["is_dead", "this_process"]


def this_process() -> str:
    """The name of the process that asks, also after a fork."""
    return _named(os.getpid())


def is_dead(owner: str) -> bool | None:
    """Whether the process that ``owner`` names is gone for certain; None where nobody here can tell."""
    host, _, process = owner.rpartition("/")
    number, _, started = process.partition("@")
    if host != socket.gethostname() or not number.isdigit():
        return None
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # it lives, and is another user's
    now = _started(int(number))
    if not started or not now:
        return None  # somebody has that number; whether it is the same process, nobody knows
    return now != started


@lru_cache(maxsize=1)
def _named(pid: int) -> str:
    started = _started(pid)
    return f"{socket.gethostname()}/{pid}" + (f"@{started}" if started else "")


def _started(pid: int) -> str:
    """Ticks from the machine's start to the process's, as Linux counts them; "" where it cannot be read."""
    try:
        # The name, in brackets, may hold anything; what follows it does not.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
