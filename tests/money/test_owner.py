"""Whether the process that holds a reservation still lives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from apprentice.money.owner import is_dead, this_process


def test_this_process_lives() -> None:
    """Its own name says so, and holds its number and the moment of its start."""
    assert is_dead(this_process()) is False
    host, _, process = this_process().rpartition("/")
    assert (host, process.partition("@")[0]) == (socket.gethostname(), str(os.getpid()))


def test_a_process_that_has_ended_is_dead() -> None:
    """Told by its number, and by its start where the number is another's by now."""
    code = "from apprentice.money.owner import this_process; print(this_process())"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert is_dead(ended) is True
    assert is_dead(f"{socket.gethostname()}/{os.getpid()}@1") is True


def test_elsewhere_and_without_a_start_nobody_can_tell() -> None:
    """Another host's processes, names of old without a moment, and names that are none."""
    for owner in (f"elsewhere/{os.getpid()}@1", f"{socket.gethostname()}/{os.getpid()}", "coach", ""):
        assert is_dead(owner) is None


def test_a_forked_child_is_another_process() -> None:
    """What a child holds is its own."""
    mine = this_process()
    child = os.fork()
    if child == 0:
        os._exit(0 if this_process() != mine and is_dead(this_process()) is False else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
