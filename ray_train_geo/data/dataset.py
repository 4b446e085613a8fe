"""The training data: one long run of tokens, cut into samples of ``seq_len`` (level 1: no ray)."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ray_train_geo.data.remote import fetch
from ray_train_geo.data.sources import Piece, find_files, read_pieces, stdlib_files
from ray_train_geo.data.token_cache import Tokens, cached_stats, cached_tokens, default_cache_dir
from ray_train_geo.data.token_file import index_path, open_token_file
from ray_train_geo.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from ray_train_geo.errors import DataError
from ray_train_geo.spec import DataSpec

__all__ = ["TokenDataset", "open_dataset"]

_CACHE_VERSION = 1  # raise it whenever the same files would give other tokens
_BATCH_BYTES = 2 * 2**20
_BATCH_PIECES = 4096
_STDLIB = "python://stdlib"


@dataclass(frozen=True, slots=True, eq=False)
class TokenDataset:
    """Tokens, and samples of them.

        tokens    t0 t1 t2 t3 t4 t5 t6 ...
        sample 0  [inputs ]            seq_len = 3
                     [targets]
        sample 1           [inputs ]

    Args:
        tokens: ``[number of tokens]``, integers, memory-mapped where possible.
        seq_len: tokens of one sample's inputs.
        vocab_size: ids that may occur: the tokenizer's; for a .bin file without a tokenizer
            (``byte``), one more than the largest id in it.
        bytes_per_token: of the original text; None where that isn't known (.bin).
        fingerprint: hash of the ids: equal on all nodes that hold the same tokens.
        max_token: the largest id that does occur.
        source: what the user named, for messages.
    """

    tokens: npt.NDArray[np.integer]
    seq_len: int
    vocab_size: int
    bytes_per_token: float | None
    fingerprint: str
    max_token: int
    source: str

    @property
    def samples(self) -> int:
        """Number of samples: one epoch."""
        return (len(self.tokens) - 1) // self.seq_len

    def batch(self, indices: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Inputs and targets of samples ``indices``: two arrays ``[len(indices), seq_len]``.

        Raises:
            IndexError: an index outside ``0..samples-1``.
        """
        wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.samples):
            raise IndexError(f"sample indices must lie in 0..{self.samples - 1}, not {wanted}")
        inputs = np.empty((wanted.size, self.seq_len), dtype=np.int64)
        targets = np.empty_like(inputs)
        for row, index in enumerate(wanted):
            begin = int(index) * self.seq_len
            inputs[row] = self.tokens[begin : begin + self.seq_len]
            targets[row] = self.tokens[begin + 1 : begin + self.seq_len + 1]
        return inputs, targets

    def require_vocab(self, model_vocab: int) -> None:
        """Check that a model with ``model_vocab`` token ids can read this data.

        Raises:
            DataError: it has too few.
        """
        if self.vocab_size > model_vocab:
            raise DataError(
                f"the data {self.source} needs a vocabulary of {self.vocab_size} tokens, but the "
                f"model has {model_vocab}: set model.vocab_size to at least {self.vocab_size}, or "
                + (
                    "data.tokenizer to one with fewer tokens"
                    if self.bytes_per_token is not None
                    else "data.bin_dtype to the type that the file was written in"
                )
            )


def open_dataset(spec: DataSpec, seq_len: int, cache_dir: Path | None = None) -> TokenDataset:
    """Open the data that ``spec`` names, tokenising it first if this node hasn't yet.

    Every document of a text source ends with the tokenizer's ``eot``; token files are taken as
    they are.

    Args:
        seq_len: tokens of one sample's inputs.
        cache_dir: where tokens and downloads are kept.  Default: ``$RAY_TRAIN_GEO_CACHE`` or
            ``~/.cache/ray_train_geo/tokens``.

    Raises:
        DataError: the data or the tokenizer can't be read, there is less than one sample, or a
            token file does not fit the tokenizer.
    """
    if seq_len < 1:
        raise DataError(f"training.seq_len must be at least 1, not {seq_len}")
    tokenizer = load_tokenizer(spec.tokenizer)
    cache_dir = cache_dir or default_cache_dir()
    with contextlib.ExitStack() as cleanup:
        try:
            root = _local_root(spec, cache_dir, cleanup)
            if spec.format == "bin" or (spec.format == "auto" and root.suffix == ".bin"):
                dataset = _open_bin(root, spec, seq_len, tokenizer, cache_dir)
            else:
                dataset = _open_text(root, spec, seq_len, tokenizer, cache_dir)
        except OSError as e:
            raise DataError(f"can't read data.path {spec.path}: {e}") from None
    if len(dataset.tokens) < seq_len + 1:
        raise DataError(
            f"{spec.path} has only {len(dataset.tokens)} tokens, but one sample needs "
            f"{seq_len + 1} (training.seq_len {seq_len}, and one more for the last target): "
            + (
                f"lower training.seq_len to at most {len(dataset.tokens) - 1}, or use more text"
                if len(dataset.tokens) > 1
                else "use more text"
            )
        )
    return dataset


def _local_root(spec: DataSpec, cache_dir: Path, cleanup: contextlib.ExitStack) -> Path:
    """The file or folder on this node that ``data.path`` stands for."""
    if spec.path == _STDLIB:
        return Path(sysconfig.get_path("stdlib"))
    if spec.path.startswith("python://"):
        raise DataError(f"unknown data.path {spec.path}: of python:// there is only {_STDLIB}")
    if "://" in spec.path:
        root = fetch(spec.path, spec.glob, cache_dir, cleanup)
    else:
        root = Path(spec.path).expanduser().absolute()
    if not root.exists():
        tokens = root.with_name(f"{root.name}.bin")
        hint = f"did you mean {tokens}?" if tokens.exists() else "every node needs it there"
        raise DataError(f"data.path {root} does not exist on node {socket.gethostname()}; {hint}")
    return root


def _open_bin(
    path: Path, spec: DataSpec, seq_len: int, tokenizer: Tokenizer, cache_dir: Path
) -> TokenDataset:
    if path.is_dir():
        raise DataError(f"data.format is bin, but {path} is a folder; name one .bin file")
    tokens = open_token_file(path, spec.bin_dtype)
    files = [path] if (index := index_path(path)) is None else [path, index]
    stats = cached_stats(cache_dir, _key(files, "bin", spec.bin_dtype), tokens)
    if stats.min_token < 0:
        raise DataError(
            f"{path} holds the negative token {stats.min_token}: it was not written as "
            f"{tokens.dtype.name}; set data.bin_dtype"
        )
    # The byte tokenizer is the default, so beside a .bin file it says nothing.
    named = not isinstance(tokenizer, ByteTokenizer)
    if named and stats.max_token >= tokenizer.vocab_size:
        raise DataError(
            f"{path} holds token {stats.max_token}, but {spec.tokenizer} has only "
            f"{tokenizer.vocab_size}: set data.tokenizer to the one the file was made with, or "
            f"data.bin_dtype (now {tokens.dtype.name}) to the type it was written in"
        )
    return TokenDataset(
        tokens=tokens,
        seq_len=seq_len,
        vocab_size=tokenizer.vocab_size if named else stats.max_token + 1,
        bytes_per_token=None,
        fingerprint=stats.fingerprint,
        max_token=stats.max_token,
        source=spec.path,
    )


def _open_text(
    root: Path, spec: DataSpec, seq_len: int, tokenizer: Tokenizer, cache_dir: Path
) -> TokenDataset:
    if spec.path == _STDLIB:
        files = stdlib_files()
    else:
        files = find_files(root, spec.glob) if root.is_dir() else [root]
    tokens, stats = cached_tokens(
        cache_dir,
        _key(files, "text", tokenizer.fingerprint, spec.format, spec.text_field, root.is_dir()),
        tokenizer.dtype,
        lambda: _encode(read_pieces(files, spec, root), tokenizer),
    )
    if not stats.tokens:
        raise DataError(
            f"{spec.path} holds no text: its {len(files)} matching files are empty or binary"
            if root.is_dir()
            else f"{spec.path} is empty"
        )
    return TokenDataset(
        tokens=tokens,
        seq_len=seq_len,
        vocab_size=tokenizer.vocab_size,
        bytes_per_token=stats.text_bytes / stats.tokens,
        fingerprint=stats.fingerprint,
        max_token=stats.max_token,
        source=spec.path,
    )


def _key(files: Sequence[Path], *options: object) -> str:
    """Names what the cache holds: the files as they are now, and how they are read."""
    stats = [(str(path), s.st_size, s.st_mtime_ns) for path in files for s in [path.stat()]]
    described = repr((_CACHE_VERSION, options, stats))
    return hashlib.blake2b(described.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _encode(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[tuple[Tokens, int]]:
    """Tokens batch by batch, ``eot`` after each document, with the bytes they stand for."""
    batch: list[Piece] = []
    size_bytes = 0
    for piece in pieces:
        batch.append(piece)
        size_bytes += len(piece.text)
        if size_bytes >= _BATCH_BYTES or len(batch) >= _BATCH_PIECES:
            yield _encode_batch(batch, tokenizer), size_bytes
            batch, size_bytes = [], 0
    if batch:
        yield _encode_batch(batch, tokenizer), size_bytes


def _encode_batch(batch: Sequence[Piece], tokenizer: Tokenizer) -> Tokens:
    eot = np.array([tokenizer.eot], dtype=tokenizer.dtype)
    parts: list[Tokens] = []
    for piece, ids in zip(batch, tokenizer.encode_batch([p.text for p in batch]), strict=True):
        parts.append(ids)
        if piece.ends_document:
            parts.append(eot)
    return np.concatenate(parts)
