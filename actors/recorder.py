"""The run's record: into the run directory, and to the driver that asks for news."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray_train_geo.errors import GeoError, StorageError
from ray_train_geo.observe.run_directory import RunDirectory

__all__ = ["Recorder"]

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # Ray colours its tracebacks for terminals


class Recorder:
    """Writes metrics and events, and remembers the first error that must end the run.

    Safe from several threads.  A record that can't be written does not raise where it happens
    (in a worker's report, say): the run loop finds it in :attr:`fatal`.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.changed = threading.Condition()
        self._fatal: GeoError | None = None
        self._records: list[dict[str, Any]] = []
        self._events: list[dict[str, Any]] = []

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
        self._write(lambda: self.run.append_event(event, **fields))
        with self.changed:
            self._events.append({"time": time.time(), "event": event, **fields})

    def _write(self, write: Callable[[], None]) -> None:
        try:
            write()
        except StorageError as e:
            self.fail(e)

    def news(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Records and events since the last call."""
        with self.changed:
            records, self._records = self._records, []
            events, self._events = self._events, []
            return records, events

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
