"""Data behind an fsspec URL, brought to this node's disk once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ray_train_geo.data.sources import is_wanted
from ray_train_geo.errors import DataError

__all__ = ["fetch"]


def fetch(url: str, glob: str, cache_dir: Path, cleanup: contextlib.ExitStack) -> Path:
    """A local copy of the file or folder at ``url``; of a folder, the files that ``glob`` fits.

    The copy is kept in ``cache_dir`` under a name made from the URL and from what the store says
    of each file (size, time, checksum).  Several processes may fetch at once.  If ``cache_dir``
    can't be written, the copy is a temporary one that ``cleanup`` removes.

    Raises:
        DataError: the URL can't be read, or holds no matching file.
    """
    try:
        filesystem, path = fsspec.url_to_fs(url)
        if isinstance(filesystem, LocalFileSystem):
            return Path(path)
        is_folder = filesystem.isdir(path)
        wanted = (_folder if is_folder else _file)(filesystem, path, glob)
        described = sorted((name, _identity(filesystem, remote)) for name, remote in wanted.items())
        key = hashlib.blake2b(repr((url, described)).encode(), digest_size=16).hexdigest()
        copy = cache_dir / "downloads" / key
        if not copy.is_dir():
            copy = _download(filesystem, wanted, copy, cleanup)
    except DataError:
        raise
    except Exception as e:  # every fsspec filesystem has errors of its own
        raise DataError(
            f"can't read data.path {url}: {type(e).__name__}: {e}; check the URL, the credentials "
            "of this node, and that the fsspec package for this kind of URL is installed"
        ) from e
    return copy if is_folder else copy / PurePosixPath(path).name


def _file(filesystem: Any, path: str, glob: str) -> dict[str, str]:
    """Local relative name -> remote path: the file, and a token file's index."""
    wanted = {PurePosixPath(path).name: path}
    if path.endswith(".bin") and filesystem.exists(index := path.removesuffix(".bin") + ".idx"):
        wanted[PurePosixPath(index).name] = index
    return wanted


def _folder(filesystem: Any, path: str, glob: str) -> dict[str, str]:
    """Local relative name -> remote path: the files below a folder that count."""
    prefix = path.rstrip("/") + "/"
    wanted = {
        name: remote
        for remote in filesystem.find(path)
        if is_wanted(name := remote.removeprefix(prefix), glob)
    }
    if not wanted:
        raise DataError(f"{path} holds no file that matches data.glob {glob!r}")
    return wanted


def _identity(filesystem: Any, remote: str) -> tuple[str, ...]:
    info = filesystem.info(remote)
    fields = ("size", "mtime", "created", "LastModified", "last_modified", "ETag", "etag", "md5")
    return tuple(f"{field}={info[field]}" for field in fields if field in info)


def _download(
    filesystem: Any, wanted: dict[str, str], final: Path, cleanup: contextlib.ExitStack
) -> Path:
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=final.parent))
    except OSError:
        aside = final = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
    try:
        for name, remote in wanted.items():
            local = aside / name
            local.parent.mkdir(parents=True, exist_ok=True)
            filesystem.get_file(remote, str(local))
        if aside != final:
            try:
                os.rename(aside, final)
            except OSError:
                if not final.is_dir():  # else another process was first: take its copy
                    raise
    finally:
        if aside != final:
            shutil.rmtree(aside, ignore_errors=True)
    return final
