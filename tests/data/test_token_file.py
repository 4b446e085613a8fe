"""Token files: nanoGPT's and Megatron's, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from ray_train_geo.data.token_file import open_token_file
from ray_train_geo.errors import DataError

CODES = {"uint8": 1, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def megatron(
    folder: Path,
    documents: list[list[int]],
    dtype: str = "uint16",
    order: list[int] | None = None,
    header: bytes | None = None,
) -> Path:
    """NAME.bin and NAME.idx as Megatron's IndexedDatasetBuilder writes them.

    Args:
        order: how the documents lie in the .bin; the .idx lists them in their own order.
    """
    item = np.dtype(dtype).itemsize
    sizes = [len(d) for d in documents]
    offsets = [0] * len(documents)
    raw = b""
    for i in order or range(len(documents)):
        offsets[i] = len(raw)
        raw += np.array(documents[i], dtype).tobytes()
    assert len(raw) == item * sum(sizes)
    index = header or b"MMIDIDX\0\0" + struct.pack(
        "<QBQQ", 1, CODES[dtype], len(sizes), len(sizes) + 1
    )
    index += np.array(sizes, "<i4").tobytes() + np.array(offsets, "<i8").tobytes()
    index += np.arange(len(sizes) + 1, dtype="<i8").tobytes()
    path = folder / "corpus_text_document.bin"
    path.write_bytes(raw)
    path.with_suffix(".idx").write_bytes(index)
    return path


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32"])
def test_headerless(tmp_path: Path, dtype: str) -> None:
    tokens = np.array([1, 500, 65535, 0], dtype)
    tokens.tofile(tmp_path / "train.bin")
    got = open_token_file(tmp_path / "train.bin", dtype)
    assert isinstance(got, np.memmap)
    assert got.dtype == dtype
    assert got.tolist() == tokens.tolist()


@pytest.mark.parametrize("dtype", CODES)
def test_megatron(tmp_path: Path, dtype: str) -> None:
    path = megatron(tmp_path, [[1, 2, 3], [], [4], [5, 100]], dtype)
    got = open_token_file(path, "uint32")  # the index knows better
    assert got.dtype == dtype
    assert got.tolist() == [1, 2, 3, 4, 5, 100]
    assert isinstance(got, np.memmap)


def test_megatron_documents_are_joined_in_the_order_of_the_index(tmp_path: Path) -> None:
    path = megatron(tmp_path, [[1, 2, 3], [4], [5, 6]], order=[2, 0, 1])
    assert open_token_file(path, "uint16").tolist() == [1, 2, 3, 4, 5, 6]


def test_what_the_index_does_not_list_does_not_count(tmp_path: Path) -> None:
    path = megatron(tmp_path, [[1, 2], [3]])
    path.write_bytes(path.read_bytes() + b"\1\1\1")
    assert open_token_file(path, "uint16").tolist() == [1, 2, 3]


def header(version: int = 1, code: int = 8, sequences: int = 2) -> bytes:
    return b"MMIDIDX\0\0" + struct.pack("<QBQQ", version, code, sequences, 3)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"TNTIDX\0\0" + bytes(40), "is no Megatron index"),
        (header(version=2), "version 2"),
        (header(code=6), "dtype code 6"),
        (header(sequences=10**6), "cut short"),
        (header(code=5), "points outside"),
        (header(sequences=0), "lists no tokens"),
    ],
)
def test_bad_indexes_are_refused(tmp_path: Path, bad: bytes, message: str) -> None:
    path = megatron(tmp_path, [[1, 2], [3]], header=bad)
    with pytest.raises(DataError, match=message):
        open_token_file(path, "uint16")


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = megatron(tmp_path, [[1, 2], [3]])
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"points outside corpus_text_document\.bin"):
        open_token_file(path, "uint16")


def test_half_a_token_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"12345")
    with pytest.raises(DataError, match=r"no whole number of uint16 tokens; set data\.bin_dtype"):
        open_token_file(path, "uint16")


def test_no_file_and_no_bytes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't read"):
        open_token_file(tmp_path / "gone.bin", "uint16")
    (tmp_path / "x.bin").touch()
    with pytest.raises(DataError, match="is empty"):
        open_token_file(tmp_path / "x.bin", "uint16")
