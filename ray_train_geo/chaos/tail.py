"""A run's record as it grows: read by whoever looks on from outside (level 0)."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["RunTail"]


class _Lines:
    """The JSON lines of a file that grows, and may be replaced by a shorter one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._inode = -1
        self._earlier = path.stat().st_ino if path.exists() else -1
        self.records: list[dict[str, Any]] = []

    def poll(self) -> None:
        """Read what is new; a line counts once its newline is there."""
        with suppress(FileNotFoundError), self._path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino == self._earlier:
                return
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._inode, self._offset, self.records = status.st_ino, 0, []
            if status.st_size == self._offset:
                return
            file.seek(self._offset)
            data = file.read()
            whole = data.rfind(b"\n") + 1
            self._offset += whole
            for line in data[:whole].splitlines():
                with suppress(ValueError):
                    self.records.append(json.loads(line))


class RunTail:
    """What ``metrics.jsonl`` and ``events.jsonl`` of a run say by now.

    Args:
        directory: the run's, which is about to start; what an earlier one has left there is none
            of its business.
    """

    def __init__(self, directory: Path) -> None:
        self._metrics = _Lines(directory / "metrics.jsonl")
        self._events = _Lines(directory / "events.jsonl")

    def poll(self) -> None:
        """Read what is new."""
        # Events first: a generation is told before its steps.
        self._events.poll()
        self._metrics.poll()

    @property
    def records(self) -> list[dict[str, Any]]:
        return self._metrics.records

    @property
    def events(self) -> list[dict[str, Any]]:
        return self._events.records

    @property
    def step(self) -> int:
        """The newest committed step."""
        return int(self.records[-1]["step"]) if self.records else 0

    def of_kind(self, *kinds: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e.get("event") in kinds]

    @property
    def generation(self) -> dict[str, Any] | None:
        """The newest ``generation`` event, if there is one."""
        return next((e for e in reversed(self.events) if e.get("event") == "generation"), None)

    @property
    def workers(self) -> list[dict[str, Any]]:
        """Of the newest generation: rank, pid, node_id, pipeline, stage ..."""
        generation = self.generation
        return [] if generation is None else list(generation["workers"])

    @property
    def training(self) -> bool:
        """Whether the newest generation has committed a step."""
        generation = self.generation
        if generation is None or not self.records:
            return False
        return bool(self.records[-1].get("generation") == generation["generation"])

    @property
    def coordinator_pid(self) -> int | None:
        """Of the newest coordinator that has said so."""
        pids = [e["pid"] for e in self.of_kind("start", "coordinator") if "pid" in e]
        return int(pids[-1]) if pids else None
