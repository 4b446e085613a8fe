"""Files that a command writes besides what it prints (level 3)."""

from __future__ import annotations

import os
from pathlib import Path

from ray_train_geo.errors import SpecError, StorageError

__all__ = ["PICTURES", "require_writable", "write_output"]

PICTURES = (".png", ".svg")


def require_writable(option: str, path: Path, suffixes: tuple[str, ...] = ()) -> None:
    """Refuse, before anything is computed, a file that could not be written afterwards.

    Args:
        option: that names the file, such as ``--out``.
        suffixes: of which its name must have one; none: any.

    Raises:
        SpecError: the name ends otherwise.
        StorageError: nothing can be written there.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        raise SpecError(f"{option} {path}: the name must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise StorageError(f"{option} {path}: this is a folder; name a file")
    if not path.parent.is_dir():
        raise StorageError(f"{option} {path}: there is no folder {path.parent}")
    try:
        # Rights alone don't tell: root has all of them, also where nothing can be written.
        if path.exists():
            os.close(os.open(path, os.O_WRONLY))
        else:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            path.unlink()
    except OSError as e:
        raise _refusal(option, path, e) from None


def write_output(option: str, path: Path, content: bytes) -> None:
    """Write ``content``.

    Raises:
        StorageError: it can't be written.
    """
    try:
        path.write_bytes(content)
    except OSError as e:
        raise _refusal(option, path, e) from None


def _refusal(option: str, path: Path, error: OSError) -> StorageError:
    return StorageError(f"{option} {path}: can't be written: {error.strerror or error}")
