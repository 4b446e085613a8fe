"""Token files made elsewhere: nanoGPT's headerless .bin, and Megatron's .bin with an .idx.

An .idx file, little-endian (Megatron-LM, ``megatron/core/datasets/indexed_dataset.py``)::

    "MMIDIDX\\0\\0" | version u64 = 1 | dtype code u8 | sequences u64 | documents u64
    | size of each sequence, i32, tokens | offset of each, i64, bytes | document bounds, i64 ...
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_train_geo.errors import DataError

__all__ = ["index_path", "open_token_file"]

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\0\0"
# Codes 2, 6 and 7 (int8 and floats) are no token types.
_DTYPES = {1: "u1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def index_path(path: Path) -> Path | None:
    """The .idx file beside the token file ``path``, if there is one."""
    index = path.with_suffix(".idx")
    return index if index.is_file() else None


def open_token_file(path: Path, dtype: str) -> npt.NDArray[np.integer]:
    """All tokens of ``path`` in order, memory-mapped: ``[tokens]``.

    Sequences of an .idx that do not lie one behind the other in the file are joined in memory.

    Args:
        dtype: of one token, where no .idx file says it.

    Raises:
        DataError: the file can't be read or is empty, is no whole number of tokens, or its .idx
            is no Megatron index or points outside of it.
    """
    try:
        index = index_path(path)
        size_bytes = path.stat().st_size
        if size_bytes == 0:
            raise DataError(f"{path} is empty")
        if index is None:
            return _map(path, np.dtype(dtype).newbyteorder("<"), size_bytes)
        return _open_indexed(path, index, size_bytes)
    except OSError as e:
        raise DataError(f"can't read {path}: {e.strerror or e}") from None


def _map(path: Path, dtype: np.dtype[Any], size_bytes: int) -> npt.NDArray[np.integer]:
    if size_bytes % dtype.itemsize:
        raise DataError(
            f"{path} has {size_bytes} bytes, which is no whole number of {dtype.name} tokens; set "
            "data.bin_dtype to the type it was written in, or write the file again"
        )
    return np.memmap(path, dtype=dtype, mode="r")


def _open_indexed(path: Path, index: Path, size_bytes: int) -> npt.NDArray[np.integer]:
    raw = index.read_bytes()
    if len(raw) < _HEADER.size or raw[:9] != _MAGIC:
        raise DataError(
            f"{index} is no Megatron index; if {path.name} is a plain token file, move the .idx "
            "file away"
        )
    _, version, code, sequences, _ = _HEADER.unpack_from(raw)
    if version != 1:
        raise DataError(f"{index} is a Megatron index of version {version}; only 1 is known")
    if code not in _DTYPES:
        raise DataError(
            f"{index}: dtype code {code} is no type of tokens (known: {sorted(_DTYPES)})"
        )
    if len(raw) < _HEADER.size + 12 * sequences:
        raise DataError(f"{index} is cut short: no room for {sequences} sequences; copy it again")
    dtype = np.dtype(_DTYPES[code])
    sizes = np.frombuffer(raw, "<i4", sequences, _HEADER.size).astype(np.int64)
    offsets = np.frombuffer(raw, "<i8", sequences, _HEADER.size + 4 * sequences)
    ends = offsets + sizes * dtype.itemsize
    if np.any(sizes < 0) or np.any(offsets < 0) or np.any(ends > size_bytes):
        raise DataError(
            f"{index} points outside {path.name} ({size_bytes} bytes): the two don't belong "
            "together, or one was not copied whole"
        )
    if np.any(offsets % dtype.itemsize):
        raise DataError(f"{index}: a sequence begins in the middle of a {dtype.name} token")
    if not sizes.sum():
        raise DataError(f"{index} lists no tokens")
    used_bytes = int(ends[-1])
    tokens: npt.NDArray[np.integer] = np.memmap(
        path, dtype=dtype, mode="r", shape=(size_bytes // dtype.itemsize,)
    )
    if offsets[0] == 0 and np.array_equal(offsets[1:], ends[:-1]):
        return tokens[: used_bytes // dtype.itemsize]
    begins = offsets // dtype.itemsize
    return np.concatenate([tokens[b : b + n] for b, n in zip(begins, sizes, strict=True)])
