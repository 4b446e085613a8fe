"""What a worker is doing at this moment, for a process that looks on (level 0).

A worker that is started with ``RAY_TRAIN_GEO_PHASES=FOLDER`` shares a page of memory through the
file ``FOLDER/PID``: two bytes that say which part of a step it is in.  Writing one is one store;
without the variable there is no page and nothing is written.  The chaos tool reads the page to kill
a worker in the midst of, say, its backward.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

__all__ = ["FOLDER_VARIABLE", "Phase", "PhasePage", "phase_page", "read_phase"]

FOLDER_VARIABLE = "RAY_TRAIN_GEO_PHASES"

Phase = Literal["forward", "backward", "sync", "optimizer", "recovery"]

_NAMES: Mapping[int, Phase] = dict(enumerate(get_args(Phase), start=1))
_CODES: Mapping[str, int] = {name: code for code, name in _NAMES.items()}
_SIZE = 2
_SAVING = 1
"""The offset of the byte that is 1 while a checkpoint is being written, beside whatever else."""


class PhasePage:
    """The writer's end.  Each byte has one writer at a time."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(_SIZE))
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), _SIZE)

    def enter(self, phase: str) -> None:
        """From now on, until the next one is entered; what is no phase (a message) is no news."""
        if phase in _CODES:
            self._page[0] = _CODES[phase]

    def saving(self, going_on: bool) -> None:
        """A checkpoint is being written, or no longer."""
        self._page[_SAVING] = going_on


def phase_page() -> PhasePage | None:
    """This process's page, if the environment asks for one.

    Raises:
        OSError: the folder that it names can't be written.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    return PhasePage(Path(folder) / str(os.getpid())) if folder else None


def read_phase(folder: Path, pid: int) -> tuple[Phase | None, bool]:
    """The phase of process ``pid`` (None: not known), and whether it is writing a checkpoint."""
    try:
        page = (folder / str(pid)).read_bytes()
    except FileNotFoundError:
        return None, False
    if len(page) < _SIZE:
        return None, False
    return _NAMES.get(page[0]), bool(page[_SAVING])
