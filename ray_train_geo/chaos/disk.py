"""A file system of its own for a run, which can be full for a while.

It is full because others have taken the rest: what the run deletes itself is free again.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ray_train_geo.errors import InputError

__all__ = ["Disk", "mounted_disk"]

_TRIES = 100
"""The run may write while its file system is measured, and then that size is too small."""


class Disk:
    """Made by :func:`mounted_disk`.

    Args:
        path: where it is mounted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.full = False

    def fill(self) -> None:
        """Nothing more fits.

        Raises:
            OSError: it can't be made so small.
        """
        for _ in range(_TRIES):
            state = os.statvfs(self.path)
            size_bytes = (state.f_blocks - state.f_bfree) * state.f_frsize
            said = _run("mount", "-o", f"remount,size={size_bytes}", str(self.path))
            if said is None:
                self.full = True
                return
        raise OSError(f"can't fill {self.path}: {said}")

    def free(self) -> None:
        """There is space again."""
        _run("mount", "-o", "remount,size=50%", str(self.path))
        self.full = False


@contextlib.contextmanager
def mounted_disk() -> Iterator[Disk]:
    """A new one, in memory.

    Raises:
        InputError: this machine does not let one be mounted.
    """
    with tempfile.TemporaryDirectory(prefix="rtgd", dir="/tmp") as folder:
        said = _run("mount", "-t", "tmpfs", "-o", "size=50%", "tmpfs", folder)
        if said is not None:
            raise InputError(
                f"can't make a disk that fills up: mount -t tmpfs: {said}; fill-disk takes Linux "
                "and root"
            )
        try:
            yield Disk(Path(folder))
        finally:
            _run("umount", "-l", folder)


def _run(*command: str) -> str | None:
    """None if it works; or else why not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as e:
        return e.strerror or str(e)
    said = done.stderr.strip().splitlines()
    return (said[0] if said else "it failed") if done.returncode else None
