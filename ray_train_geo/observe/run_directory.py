"""The run directory: what a run leaves behind, and the only code that writes it (level 0).

    NAME/
      job.yaml  plan.json  metrics.jsonl  events.jsonl  trace.json  report.html
      errors/   checkpoints/

``*.jsonl`` files hold one strict JSON object a line.  A line counts once its newline is there:
readers skip a torn last line, and the next append cuts it off.  All other files are replaced
whole, so a reader sees the old or the new one, never half of one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_train_geo.errors import StorageError

__all__ = ["RunDirectory"]

_PROBE_BYTES = 4096
_LOCK = ".lock"


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """One run's directory.  Appends are safe from several threads of one process.

    Args:
        path: the directory.
        moved_aside: where :meth:`create` put an earlier run of the same name, if there was one.
    """

    path: Path
    moved_aside: Path | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def create(cls, path: Path) -> RunDirectory:
        """Make the directory, and prove by writing to it that it can be used.

        An earlier run at ``path`` is renamed to ``NAME.1`` (or the next free number).

        Raises:
            StorageError: it can't be made or written: a file in the way, permission, no space;
                or a run is going on there.
        """
        path = Path(path).expanduser().absolute()
        try:
            if (path / _LOCK).exists():
                os.close(cls(path).hold())
            moved_aside = _move_aside(path)
            path.mkdir(parents=True, exist_ok=True)
            for folder in ("errors", "checkpoints"):
                (path / folder).mkdir(exist_ok=True)
            # Permission bits say little (root, read-only mounts, quotas): only a write tells.
            _write_aside(path / ".probe", b"\0" * _PROBE_BYTES).unlink()
        except OSError as e:
            raise _storage_error("can't use the run directory", path, e) from e
        return cls(path, moved_aside)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """The directory of a run that exists.

        Raises:
            StorageError: there is no run at ``path``.
        """
        path = Path(path).expanduser().absolute()
        run = cls(path)
        try:
            if any(p.is_file() for p in (run.job_path, run.metrics_path, run.events_path)):
                return run
        except OSError as e:
            raise _storage_error("can't read the run directory", path, e) from e
        what = "it has none of job.yaml, metrics.jsonl, events.jsonl"
        if not path.is_dir():
            what = "it is a file" if path.exists() else "it does not exist"
        raise StorageError(
            f"no run at {path}: {what}; give the run directory itself (STORAGE/NAME)"
        )

    def hold(self) -> int:
        """Take the directory for one run, until the returned file descriptor is closed.

        The lock ends with the process that holds it, however that ends.

        Raises:
            StorageError: another run has it.
        """
        try:
            fd = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise StorageError(
                    f"a run is going on in {self.path}; stop it first, or choose another run.name"
                ) from None
        except OSError as e:
            raise _storage_error("can't use the run directory", self.path, e) from e
        return fd

    @property
    def job_path(self) -> Path:
        return self.path / "job.yaml"

    @property
    def plan_path(self) -> Path:
        return self.path / "plan.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events_path(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def trace_path(self) -> Path:
        return self.path / "trace.json"

    @property
    def report_path(self) -> Path:
        return self.path / "report.html"

    @property
    def errors_path(self) -> Path:
        return self.path / "errors"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Append one step's record; NaN and infinities become null.

        Raises:
            StorageError: the line could not be written; the file is as it was before.
        """
        self._append(self.metrics_path, record)

    def append_event(self, event: str, **fields: Any) -> None:
        """Append ``{"time": unix seconds, "event": event, **fields}``.

        Raises:
            StorageError: as :meth:`append_metrics`.
        """
        self._append(self.events_path, {"time": time.time(), "event": event, **fields})

    def metrics(self) -> list[dict[str, Any]]:
        """All metrics records, oldest first; empty if there are none.

        Raises:
            StorageError: the file is there but can't be read.
        """
        return _read_lines(self.metrics_path)

    def events(self) -> list[dict[str, Any]]:
        """All events, oldest first; otherwise as :meth:`metrics`."""
        return _read_lines(self.events_path)

    def truncate_metrics(self, after_step: int) -> None:
        """Drop the records of steps after ``after_step``: a resumed run writes them anew.

        Raises:
            StorageError: the file can't be read or replaced.
        """
        with self._lock:
            records = _read_lines(self.metrics_path)
            kept = [r for r in records if (r.get("step") or 0) <= after_step]
            if len(kept) < len(records):
                self._replace(self.metrics_path, b"".join(_line(r) for r in kept))

    def read_json(self, name: str) -> Any:
        """The content of the JSON file ``name``, or None if there is no such file.

        Raises:
            StorageError: the file can't be read, or is not JSON.
        """
        data = self.read_bytes(name)
        try:
            return None if data is None else json.loads(data)
        except ValueError as e:
            raise StorageError(f"{self.path / name} is damaged: {e}; delete it") from e

    def write_json(self, name: str, obj: Any, indent: int | None = 2) -> Path:
        """Write ``obj`` as strict JSON to the file ``name``, atomically, and return its path.

        Raises:
            StorageError: it can't be written; an older file of that name is untouched.
        """
        return self.write_text(name, json.dumps(_strict(obj), indent=indent, allow_nan=False))

    def write_text(self, name: str, text: str) -> Path:
        """Write ``text`` to the file ``name``; otherwise as :meth:`write_json`."""
        return self.write_bytes(name, text.encode("utf-8", "backslashreplace"))

    def write_bytes(self, name: str, data: bytes) -> Path:
        """Write ``data`` to the file ``name``; otherwise as :meth:`write_json`."""
        path = self.path / name
        self._replace(path, data)
        return path

    def read_bytes(self, name: str) -> bytes | None:
        """The content of the file ``name``, or None if there is no such file.

        Raises:
            StorageError: it can't be read.
        """
        path = self.path / name
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as e:
            raise _storage_error("can't read", path, e) from e

    def write_error(self, name: str, text: str) -> Path:
        """Keep ``text`` (a traceback) in ``errors/``; never replaces an earlier one.

        Raises:
            StorageError: it can't be written.
        """
        stem = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._").removesuffix(".txt") or "error"
        stem = stem[:100]
        path, n = self.errors_path / f"{stem}.txt", 1
        while path.exists():
            n += 1
            path = self.errors_path / f"{stem}-{n}.txt"
        self._replace(path, text.encode("utf-8", "backslashreplace"))
        return path

    def _append(self, path: Path, record: Mapping[str, Any]) -> None:
        line = _line(record)
        with self._lock:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
                try:
                    end = _committed_size(fd)
                    os.ftruncate(fd, end)
                    os.lseek(fd, end, os.SEEK_SET)
                    try:
                        _write_all(fd, line)
                    except OSError:
                        os.ftruncate(fd, end)
                        raise
                finally:
                    os.close(fd)
            except OSError as e:
                raise _storage_error("can't append to", path, e) from e

    def _replace(self, path: Path, data: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = _write_aside(path, data)
            try:
                os.replace(aside, path)
            except OSError:
                aside.unlink(missing_ok=True)
                raise
        except OSError as e:
            raise _storage_error("can't write", path, e) from e


def _move_aside(path: Path) -> Path | None:
    """Rename the run at ``path``, if there is one, to the first free ``NAME.n``."""
    if not ((path / "metrics.jsonl").exists() or (path / "events.jsonl").exists()):
        return None
    n = 1
    while (aside := path.with_name(f"{path.name}.{n}")).exists():
        n += 1
    path.rename(aside)
    return aside


def _strict(value: Any) -> Any:
    """``value`` in the types of strict JSON: no NaN, no infinity, no numpy, no paths."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return _strict(value.tolist())
    raise TypeError(f"a run record can't hold {type(value).__name__} {value!r}")


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(_strict(record), allow_nan=False).encode() + b"\n"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as e:
        raise _storage_error("can't read", path, e) from e
    records = []
    for line in data.split(b"\n")[:-1]:  # what follows the last newline is torn, or nothing
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def _committed_size(fd: int) -> int:
    """Offset behind the last newline of ``fd``, in bytes: a process killed mid-line tears it."""
    end = os.lseek(fd, 0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 4096)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _write_aside(path: Path, data: bytes) -> Path:
    """Write ``data`` to a new file beside ``path``, down to the disk, and return its path."""
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        try:
            _write_all(fd, data)
            os.fchmod(fd, 0o644)  # mkstemp's 0600 would hide the report from other users
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError:
        os.unlink(name)
        raise
    return Path(name)


def _storage_error(what: str, path: Path, e: OSError) -> StorageError:
    reason = (e.strerror or str(e)).lower()
    if e.filename is not None and Path(os.fsdecode(e.filename)) != path:
        reason += f" ({os.fsdecode(e.filename)})"
    advice = {
        errno.ENOSPC: "free some space on that disk, or set run.storage_path to another",
        errno.EDQUOT: "your quota is used up: free some space, or set run.storage_path elsewhere",
        errno.EFBIG: "the file size limit (ulimit -f) or the disk is used up",
        errno.ENOTDIR: "a file is in the way of a folder: move it, or change run.storage_path",
        errno.EEXIST: "a file is in the way of a folder: move it, or change run.name",
    }.get(e.errno or 0, "set run.storage_path to a folder that you can write")
    return StorageError(f"{what} {path}: {reason}; {advice}")
