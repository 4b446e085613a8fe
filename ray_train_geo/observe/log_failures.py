"""How a training run ended, by what its log says after the last iteration (level 0).

    iteration 7 ... | iteration 8 ... | Traceback ... ValueError | NCCL error ... | exit code 1
                                        `- the first is the cause; the rest follows from it

What stands before a later iteration was survived, and is no failure.  Memory that ran out is the
cause wherever it stands: other ranks may complain before the one that ran out.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from typing import Literal

__all__ = ["Ending", "EndingReader"]

_LONGEST = 160

_OUT_OF_MEMORY = re.compile(
    r"(?:\b(?:CUDA|HIP|XPU|NPU) out of memory|\bOutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED"
    r"|can't allocate memory|\boom[-_]kill|\bOOM Killed|Out of memory: Killed process).*"
)
_NCCL = re.compile(
    r"(?:\bNCCL error\b|\bnccl(?:System|Internal|UnhandledCuda|Remote|InvalidUsage)Error\b"
    r"|Watchdog caught collective operation timeout|NCCL watchdog thread terminated).*"
)
_SLURM = re.compile(r"slurmstepd: error: \*{3} .*?CANCELLED(?: AT \S+)?(?: (DUE TO .+?))? \*{3}")

_SHELL_WORDS = {
    "Killed": "SIGKILL",
    "Terminated": "SIGTERM",
    "Segmentation fault": "SIGSEGV",
    "Bus error": "SIGBUS",
    "Aborted": "SIGABRT",
}
_WORD = f"({'|'.join(_SHELL_WORDS)})"
_SIGNAL = re.compile(
    r"Signal \d+ \((SIG\w+)\) received|process received (SIG\w+)|terminated with signal (SIG\w+)"
    r"|died with <Signals\.(SIG\w+)|exitcode *: -(\d+)\b|return code = -(\d+)\b"
    rf"|: tasks? [\d,-]+: {_WORD}|line \d+: +\d+ {_WORD}|^{_WORD}(?: \(core dumped\))?$"
)
_EXIT_CODE = re.compile(
    r"(?:exitcode *: |return code = |exit code |non-zero exit status )([1-9]\d*)\b"
)
_TRACEBACK = "Traceback (most recent call last)"
_EXCEPTION = re.compile(
    # Only at the start, but for what launchers put before a line: a traceback's code is indented.
    r"^(?:\[[^\]]*\]:? ?|\d+: ?|> ?)*((?:\w+\.)*[A-Z]\w*(?:Error|Exception|Interrupt)(?::\s.*|:)?)$"
)


_HINTS = (
    "ut of memory", "allocate memory", "oom-kill", "oom_kill", "OOM Kill", "CUBLAS", "CANCELLED",
    "NCCL error", "NCCL watchdog", "Watchdog", "SIG", "exitcode", "return code", "exit code",
    "exit status", "Traceback", "Error", "Exception", "Interrupt", *_SHELL_WORDS,
)  # fmt: skip
"""Nearly all lines have none of these, and need no closer look."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a run went no further.

    Args:
        status: ``stopped`` by the cluster's scheduler, or ``failed`` of itself.
    """

    status: Literal["failed", "stopped"]
    reason: str


_TERMINATED = Ending("failed", "killed by SIGTERM")
"""Explains nothing: whoever sent it may say later why."""


class EndingReader:
    """Takes a log line by line, and knows at any time how it would have ended there."""

    def __init__(self) -> None:
        self._out_of_memory: Ending | None = None
        self._first: Ending | None = None
        self._in_traceback = False

    @property
    def ending(self) -> Ending | None:
        """None where the log just stops: the run was done, or goes on."""
        cause = self._out_of_memory or self._first
        if cause is None and self._in_traceback:
            return Ending("failed", "a traceback without its end")
        return cause

    def iteration(self) -> None:
        """An iteration was logged: whatever went wrong before did not end the run."""
        self._out_of_memory = self._first = None
        self._in_traceback = False

    def line(self, text: str) -> None:
        """A line that logs no iteration."""
        if not any(hint in text for hint in _HINTS):
            return
        self._in_traceback |= _TRACEBACK in text
        if self._out_of_memory is None and (found := _OUT_OF_MEMORY.search(text)):
            self._out_of_memory = Ending("failed", f"out of memory: {_short(found[0])}")
        if self._first is None or self._first == _TERMINATED:
            self._first = self._cause(text) or self._first

    def _cause(self, text: str) -> Ending | None:
        if found := _SLURM.search(text):
            return Ending("stopped", f"cancelled by Slurm {(found[1] or '').lower()}".rstrip())
        if found := _NCCL.search(text):
            return Ending("failed", f"communication: {_short(found[0])}")
        if found := _SIGNAL.search(text):
            return Ending("failed", f"killed by {_signal(next(filter(None, found.groups())))}")
        if found := _EXIT_CODE.search(text):
            code = int(found[1])
            # A shell reports a signal as 128 and its number.
            how = f"killed by {_signal(code - 128)}" if code > 128 else f"exit code {code}"
            return Ending("failed", how)
        found = _EXCEPTION.match(text) if self._in_traceback else None
        # torchrun's own error says nothing: which rank failed, and how, follows it.
        if found and "ChildFailedError" not in found[1]:
            return Ending("failed", _short(found[1]))
        return None


def _signal(name: str | int) -> str:
    if isinstance(name, str) and not name.isdigit():
        return _SHELL_WORDS.get(name, name)
    try:
        return signal.Signals(int(name)).name
    except ValueError:
        return f"signal {name}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
