"""Checkpoints: torch's DCP format, written by the workers' own hands, complete or invisible.

DCP's ``save`` is collective, so one death in the middle would hang the others.  Here every
worker writes its part alone (``write_part``) and the coordinator, once it has all parts, writes
DCP's metadata and publishes (``CheckpointStore.publish``).  The result is an ordinary DCP
checkpoint whose keys are global weight names, so any plan reads any other's.

    STORAGE/step-00000040.incomplete/   __0_0.distcp  __1_0.distcp ...      parts, written aside
    STORAGE/step-00000040/              ... .metadata  manifest.json        published by a rename

On object stores, which have no rename, parts go to their final place and ``manifest.json``, which
is written last, makes them visible.  No manifest, no checkpoint, on either kind of storage.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import fsspec
import torch

from ray_train_geo.errors import CheckpointError, StorageError
from ray_train_geo.training.manifest import Manifest

if TYPE_CHECKING:
    from ray_train_geo.training.dcp import Written

__all__ = [
    "CheckpointPart",
    "CheckpointStore",
    "get_ready",
    "read_manifest",
    "read_tensors",
    "write_part",
]

_MANIFEST = "manifest.json"
_METADATA = ".metadata"
_INCOMPLETE = ".incomplete"
_STEP = re.compile(r"^step-(\d{8,})$")


@dataclass(frozen=True, slots=True)
class CheckpointPart:
    """What one worker wrote: metadata only, small enough to send to the coordinator."""

    rank: int
    written: Written
    checksums: dict[str, int]
    size_bytes: int


def get_ready() -> None:
    """Load torch's DCP: a long import, which else comes in the midst of the first checkpoint."""
    importlib.import_module("ray_train_geo.training.dcp")


def write_part(location: str, rank: int, tensors: Mapping[str, torch.Tensor]) -> CheckpointPart:
    """Write ``tensors`` (on the CPU) as ``rank``'s part of the checkpoint at ``location``.

    Raises:
        StorageError: it can't be written; the message names the reason.
    """
    from ray_train_geo.training import dcp

    with _storage_errors("can't write the checkpoint", location):
        written = dcp.write(location, rank, tensors)
    return CheckpointPart(
        rank=rank,
        written=written,
        checksums={name: _checksum(tensor) for name, tensor in tensors.items()},
        size_bytes=sum(t.nbytes for t in tensors.values()),
    )


def read_manifest(location: str) -> Manifest:
    """The manifest of the checkpoint at ``location``; all its files have their full size.

    Raises:
        CheckpointError: there is no complete checkpoint at ``location``.
    """
    with _storage_errors("can't open", location):
        fs, path = fsspec.core.url_to_fs(location)
    try:
        manifest = Manifest.from_json(fs.cat_file(f"{path}/{_MANIFEST}").decode())
    except FileNotFoundError:
        what = "it was never completed" if fs.exists(path) else "nothing is there"
        raise CheckpointError(f"no complete checkpoint at {location}: {what}") from None
    except (ValueError, TypeError) as e:
        raise CheckpointError(f"checkpoint {location} is corrupt: {_MANIFEST}: {e}") from None
    except OSError as e:
        raise CheckpointError(f"checkpoint {location} can't be read: {e.strerror or e}") from None
    for name, size in manifest.files.items():
        try:
            found = fs.size(f"{path}/{name}")
        except FileNotFoundError:
            raise CheckpointError(f"checkpoint {location} is corrupt: {name} is missing") from None
        if found != size:
            raise CheckpointError(
                f"checkpoint {location} is corrupt: {name} has {found} bytes instead of {size}"
            )
    if zlib.crc32(fs.cat_file(f"{path}/{_METADATA}")) != manifest.metadata_checksum:
        raise CheckpointError(
            f"checkpoint {location} is corrupt: {_METADATA} is not what was written"
        )
    return manifest


def read_tensors(location: str, manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill ``tensors`` (on the CPU, by name) from the checkpoint at ``location``.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or not what was written.
    """
    from ray_train_geo.training import dcp

    missing = sorted(set(tensors) - set(manifest.checksums))
    if missing:
        raise CheckpointError(f"checkpoint {location} has no {missing[0]!r} (of another model?)")
    try:
        dcp.read(location, tensors)
    except Exception as e:  # of DCP, torch, zip, pickle or the file system
        culprit = next((n for n, t in tensors.items() if not _loads(location, n, t)), "")
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise CheckpointError(f"checkpoint {location} can't be read: {culprit}: {reason}") from e
    for name, tensor in tensors.items():
        if _checksum(tensor) != manifest.checksums[name]:
            raise CheckpointError(
                f"checkpoint {location} is corrupt: {name} is not what was written"
            )


def _loads(location: str, name: str, tensor: torch.Tensor) -> bool:
    from ray_train_geo.training import dcp

    try:
        dcp.read(location, {name: tensor})
    except Exception:
        return False
    return True


class CheckpointStore:
    """All checkpoints of a run, in a local folder or at an fsspec URL.

    Args:
        root: folder or URL that holds one folder a checkpoint.
    """

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self._remote = _is_url(root)
        with _storage_errors("can't open checkpoint storage", root):
            self._fs, self._path = fsspec.core.url_to_fs(self.root)

    def writing(self, step: int, generation: int) -> str:
        """Where the parts of ``step`` go until it is published."""
        return self.location(step) + ("" if self._remote else f"{_INCOMPLETE}-g{generation}")

    def location(self, step: int) -> str:
        return f"{self.root}/step-{step:08d}"

    def probe(self) -> str:
        """Write a small file and return its name: other nodes :meth:`sees` it, or storage is
        not shared.

        Raises:
            StorageError: it can't be written.
        """
        name = f".probe-{uuid.uuid4().hex}"
        with _storage_errors("can't use checkpoint storage", self.root):
            self._fs.makedirs(self._path, exist_ok=True)
            self._fs.pipe_file(f"{self._path}/{name}", b"probe")
        return name

    def sees(self, probe: str) -> bool:
        with _storage_errors("can't read checkpoint storage", self.root):
            self._fs.invalidate_cache()
            return bool(self._fs.exists(f"{self._path}/{probe}"))

    def remove_probe(self, probe: str) -> None:
        with contextlib.suppress(OSError):
            self._fs.rm_file(f"{self._path}/{probe}")

    def free_bytes(self) -> int | None:
        """Free space, or None where storage can't say."""
        if self._remote:
            return None
        with contextlib.suppress(OSError):
            stat = os.statvfs(self._path)
            return stat.f_bavail * stat.f_frsize
        return None

    def clean(self) -> None:
        """Delete what interrupted runs left unfinished."""
        if self._remote:
            return  # parts there are overwritten by the next checkpoint of their step
        with _storage_errors("can't clean up", self.root):
            for entry in self._fs.ls(self._path, detail=False):
                if _INCOMPLETE in os.path.basename(entry):
                    self._fs.rm(entry, recursive=True)

    def publish(
        self,
        step: int,
        generation: int,
        parts: Sequence[CheckpointPart],
        manifest: Mapping[str, Any],
    ) -> Manifest:
        """Complete the checkpoint of ``step``: from now on it is found and can be resumed from.

        Args:
            manifest: the fields of :class:`Manifest` that are not known here.

        Raises:
            StorageError: a part is not visible here (storage not shared), or a write failed.
        """
        from ray_train_geo.training import dcp

        location = self.writing(step, generation)
        checksums = {n: c for part in parts for n, c in part.checksums.items()}
        with _storage_errors("can't complete the checkpoint", location):
            written = dcp.complete(location, [part.written for part in parts])
            _, path = fsspec.core.url_to_fs(location)
            self._fs.invalidate_cache()
            files = {
                name: int(entry["size"])
                for entry in self._fs.ls(path, detail=True)
                if (name := os.path.basename(entry["name"])) in written | {_METADATA}
            }
            unseen = sorted(written - set(files))
            if unseen:
                raise StorageError(
                    f"checkpoint storage {self.root} is not shared by all nodes: {unseen[0]} was "
                    "written by a worker but is not visible on the head node; set "
                    "checkpoint.storage_path to a shared folder or an fsspec URL"
                )
            complete = Manifest(
                step=step,
                checksums=checksums,
                files=files,
                metadata_checksum=zlib.crc32(self._fs.cat_file(f"{path}/{_METADATA}")),
                time=time.time(),
                **manifest,
            )
            self._fs.pipe_file(f"{path}/{_MANIFEST}", complete.to_json().encode())
            if not self._remote:
                self._publish_by_rename(path, step)
        return complete

    def _publish_by_rename(self, path: str, step: int) -> None:
        final = f"{self._path}/step-{step:08d}"
        _sync_folder(path)
        if os.path.exists(final):  # of a history that was left by resuming before it
            os.rename(final, f"{final}.replaced")
        os.rename(path, final)
        _sync_folder(self._path)
        if os.path.exists(f"{final}.replaced"):
            self._fs.rm(f"{final}.replaced", recursive=True)

    def complete(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        with _storage_errors("can't list checkpoints", self.root):
            self._fs.invalidate_cache()
            try:
                names = [os.path.basename(p.rstrip("/")) for p in self._fs.ls(self._path, False)]
            except FileNotFoundError:
                return []
            steps = [int(m.group(1)) for name in names if (m := _STEP.match(name))]
            return sorted(
                s for s in steps if self._fs.exists(f"{self._path}/step-{s:08d}/{_MANIFEST}")
            )

    def newest(self) -> str | None:
        """Where the newest complete checkpoint is, if there is one."""
        steps = self.complete()
        return self.location(steps[-1]) if steps else None

    def prune(self, keep: int) -> None:
        """Delete all complete checkpoints but the ``keep`` newest."""
        with _storage_errors("can't delete an old checkpoint in", self.root):
            for step in self.complete()[:-keep]:
                path = f"{self._path}/step-{step:08d}"
                # The manifest goes first: a half-deleted checkpoint is no checkpoint.
                self._fs.rm_file(f"{path}/{_MANIFEST}")
                self._fs.rm(path, recursive=True)

    def set_aside_after(self, step: int) -> list[int]:
        """Rename complete checkpoints newer than ``step``: another history begins there."""
        later = [s for s in self.complete() if s > step]
        with _storage_errors("can't set a checkpoint aside in", self.root):
            for s in later:
                path = f"{self._path}/step-{s:08d}"
                self._fs.mv(path, f"{path}.superseded-{int(time.time())}", recursive=True)
        return later


def _checksum(tensor: torch.Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return zlib.crc32(flat.numpy().data)


def _is_url(path: str) -> bool:
    return "://" in path


def _sync_folder(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _storage_errors(what: str, where: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except (OSError, ImportError, ValueError, RuntimeError) as e:
        cause: BaseException = e
        while isinstance(cause.__cause__ or cause.__context__, OSError):
            cause = cause.__cause__ or cause.__context__ or cause
        reason = getattr(cause, "strerror", None) or str(cause).strip() or type(cause).__name__
        reason = reason.splitlines()[0].lower()
        raise StorageError(
            f"{what} {where}: {reason}; free some space or choose another checkpoint.storage_path"
        ) from e
