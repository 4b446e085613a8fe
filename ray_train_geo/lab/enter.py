"""``python -m ray_train_geo.lab.enter PID COMMAND...``: run a command on an emulated host.

It stands for the command outside: it passes signals on, ends as the command ends, and the command
is killed if it is.  Only SIGINT is not passed on: the terminal sends it to both of them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from ray_train_geo.lab import kernel

__all__ = ["enter_command"]

_PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def enter_command(pid: int, command: Sequence[str]) -> list[str]:
    """The command that runs ``command`` on the host whose process 1 is ``pid``."""
    return [sys.executable, "-m", "ray_train_geo.lab.enter", str(pid), *command]


def _main(pid: int, command: Sequence[str]) -> None:
    folder = os.getcwd()
    try:
        kernel.enter(pid)
    except OSError as e:
        sys.exit(f"can't enter the host: {e.strerror or e}")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = os.fork()
    if child == 0:
        try:
            kernel.die_with_parent()
            for number in (signal.SIGINT, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL)
            os.chdir(folder)
            os.execvp(command[0], list(command))
        except OSError as e:
            os.write(2, f"{command[0]}: {e.strerror}\n".encode())
            os._exit(127)

    def pass_on(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(child, number)

    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
