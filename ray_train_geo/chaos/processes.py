"""The processes of a chaos run: whose they are, how they fare, and what is left of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import psutil

__all__ = ["Usage", "adopting_orphans", "end_session", "in_session", "reap", "signal_to", "usage"]

_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True)
class Usage:
    """What one process holds at a moment."""

    threads: int
    descriptors: int
    resident_bytes: int


def usage(pid: int) -> Usage | None:
    """What process ``pid`` holds; None if it is gone."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            return Usage(process.num_threads(), process.num_fds(), process.memory_info().rss)
    except psutil.Error:
        return None


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """Processes whose parent dies become this one's children, not init's.

    So nothing that a chaos run starts can get out of sight, and whatever is left shows.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def in_session(leader: int) -> list[int]:
    """Processes of the session that ``leader`` leads; Ray gives them groups of their own."""
    return [pid for pid in psutil.pids() if _session(pid) == leader]


def end_session(leader: int) -> None:
    """Kill all processes of a session at once, as when a machine loses power."""
    pids = in_session(leader)
    for number in (signal.SIGSTOP, signal.SIGKILL):  # none is to see another's end
        for pid in pids:
            signal_to(pid, number)
    for pid in in_session(leader):  # who was started meanwhile
        signal_to(pid, signal.SIGKILL)


def signal_to(pid: int, number: int) -> bool:
    """Send a signal; whether the process was there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def reap(spared: Iterable[int]) -> None:
    """Collect the children that have ended, but for ``spared``, which others wait for."""
    kept = set(spared)
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error, ChildProcessError):
            if child.pid not in kept and child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return -1
