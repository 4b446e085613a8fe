"""Small file systems of their own, for tests of full and read-only disks."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs at ``folder``.

    A full or read-only disk can't be had without mounting one, which an unprivileged container may
    not do: there the test is skipped, unless ``GEO_REQUIRE=1`` says that this machine must do it.
    """
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        done = False
    if not done:
        end = pytest.fail if os.environ.get("GEO_REQUIRE") == "1" else pytest.skip
        end("mounting a tmpfs takes privileges that this machine does not give")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
