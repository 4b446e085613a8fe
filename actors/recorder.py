"""The run's record: into the run directory, and to followers that ask for what they don't know."""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from ray_train_geo.errors import GeoError, StorageError
from ray_train_geo.observe.run_directory import RunDirectory

__all__ = ["Recorder"]

_REMEMBERED_RECORDS = 4096
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # Ray colours its tracebacks for terminals


class Recorder:
    """Writes metrics and events, and remembers the first error that must end the run.

    Safe from several threads.  A record that can't be written does not raise where it happens
    (in a worker's report, say): the run loop finds it in :attr:`fatal`.  It goes ahead of the next
    one, once there is room again: no record has gaps.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.changed = threading.Condition()
        self._fatal: GeoError | None = None
        self._writing = threading.Lock()
        self._unwritten: deque[Callable[[], None]] = deque()
        self._records: deque[dict[str, Any]] = deque(maxlen=_REMEMBERED_RECORDS)
        self._events: list[dict[str, Any]] = []

    def take_up(self) -> None:
        """Go on with the record that a predecessor in the same session has left."""
        with self.changed:
            events = self.run.events()
            begin = max(i for i, e in enumerate(events) if e["event"] == "start")
            self._events = events[begin:]
            first = self.first_step()
            self._records.extend(r for r in self.run.metrics() if r["step"] > first)

    @property
    def fatal(self) -> GeoError | None:
        return self._fatal

    def fail(self, error: GeoError) -> None:
        """The run must end with ``error`` (the first one counts)."""
        with self.changed:
            self._fatal = self._fatal or error
            self.changed.notify_all()

    def metrics(self, record: dict[str, Any]) -> None:
        self._write(lambda: self.run.append_metrics(record))
        with self.changed:
            self._records.append(record)
            self.changed.notify_all()

    def event(self, event: str, **fields: Any) -> None:
        said = {"time": time.time(), "event": event, **fields}
        self._write(lambda: self.run.append_event(**said))
        with self.changed:
            self._events.append(said)

    def _write(self, write: Callable[[], None]) -> None:
        with self._writing:
            self._unwritten.append(write)
            try:
                while self._unwritten:
                    self._unwritten[0]()
                    self._unwritten.popleft()
            except StorageError as e:
                self.fail(e)

    def go_back(self, step: int) -> None:
        """Forget the records of steps after ``step``.

        Raises:
            StorageError: metrics.jsonl can't be rewritten.
        """
        with self.changed:
            self.run.truncate_metrics(step)
            while self._records and self._records[-1]["step"] > step:
                self._records.pop()

    def first_step(self) -> int:
        """After which step the session began."""
        resumed = self.said("resume")
        return 0 if resumed is None else int(resumed["step"])

    def step(self) -> int:
        """The last committed step that is on record."""
        with self.changed:
            return int(self._records[-1]["step"]) if self._records else self.first_step()

    def said(self, event: str) -> dict[str, Any] | None:
        """The last ``event`` of this session."""
        with self.changed:
            return next((e for e in reversed(self._events) if e["event"] == event), None)

    def news(
        self, after_step: int, events_known: int
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Records of steps after ``after_step`` (not all if very many), and the session's events
        but the first ``events_known``."""
        with self.changed:
            new: list[dict[str, Any]] = []
            for record in reversed(self._records):
                if record["step"] <= after_step:
                    break
                new.append(record)
            return new[::-1], self._events[events_known:]

    def wait_for(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until ``condition`` holds; whoever changes what it reads notifies ``changed``.

        Raises:
            GeoError: the run failed meanwhile.
        """
        with self.changed:
            self.changed.wait_for(lambda: self._fatal is not None or condition(), timeout_s)
            if self._fatal is not None:
                raise self._fatal
            return condition()

    def traceback(self, name: str, fields: Mapping[str, str], text: str) -> str:
        """Keep a traceback in a file of its own; returns the path, or why there is none."""
        head = "".join(f"{k}: {v}\n" for k, v in fields.items())
        try:
            return str(self.run.write_error(name, f"{head}\n{_COLOUR.sub('', text)}"))
        except StorageError as e:
            return f"not written ({e})"
