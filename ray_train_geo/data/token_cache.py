"""Tokenised text on disk, made once per node, and what is known of a run of tokens.

    KEY.tokens   flat uint16 or uint32, memory-mapped by all who use it
    KEY.json     its dtype, length, text size, content fingerprint, largest token

Both are written aside and renamed, the .json last: a reader sees all of it or nothing, and
processes that make the same key at once replace each other's files with equal ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

__all__ = ["TokenStats", "Tokens", "cached_stats", "cached_tokens", "default_cache_dir"]

_CHUNK_TOKENS = 2**22

Tokens = npt.NDArray[np.integer]
Chunks = Iterable[tuple[Tokens, int]]
"""Tokens in order, each chunk with the bytes of text that it stands for."""


@dataclass(frozen=True, slots=True)
class TokenStats:
    """What is known of a run of tokens.

    Args:
        dtype: numpy name of their type.
        tokens: how many there are.
        text_bytes: size of the text they were made from; 0 where it isn't known.
        fingerprint: of the ids alone: the same for any dtype, path and time.
        min_token, max_token: smallest and largest id; 0 where there are no tokens.
    """

    dtype: str
    tokens: int
    text_bytes: int
    fingerprint: str
    min_token: int
    max_token: int


def default_cache_dir() -> Path:
    """``$RAY_TRAIN_GEO_CACHE``, else ``ray_train_geo/tokens`` in the user's cache folder."""
    if own := os.environ.get("RAY_TRAIN_GEO_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "ray_train_geo" / "tokens"


def cached_tokens(
    cache_dir: Path, key: str, dtype: np.dtype[Any], make: Callable[[], Chunks]
) -> tuple[Tokens, TokenStats]:
    """The tokens stored under ``key``, made by ``make`` if they aren't there yet.

    If the cache can't be written (read-only, full), the tokens are made in memory.  ``make`` may
    be called twice, and must raise no OSError of its own.
    """
    stats = _read_stats(cache_dir, key)
    if stats is not None and stats.dtype == dtype.name:
        tokens = _open(cache_dir, key, stats)
        if tokens is not None:
            return tokens, stats
    try:
        stats = _write_tokens(cache_dir, key, dtype, make)
        tokens = _open(cache_dir, key, stats)
        if tokens is not None:
            return tokens, stats
    except OSError:
        pass
    scan = _Scan()
    chunks = [np.empty(0, dtype), *scan.over(make())]
    return np.concatenate(chunks), scan.stats(dtype)


def cached_stats(cache_dir: Path, key: str, tokens: Tokens) -> TokenStats:
    """Statistics of ``tokens``, from the cache if they are stored there under ``key``.

    The first time all of them are read: about a second per GB.
    """
    stats = _read_stats(cache_dir, key)
    if stats is not None and stats.tokens == len(tokens):
        return stats
    scan = _Scan()
    chunks = (tokens[i : i + _CHUNK_TOKENS] for i in range(0, len(tokens), _CHUNK_TOKENS))
    for _ in scan.over((chunk, 0) for chunk in chunks):
        pass
    stats = scan.stats(tokens.dtype)
    with contextlib.suppress(OSError):
        _write_stats(cache_dir, key, stats)
    return stats


class _Scan:
    """Gathers statistics while chunks pass by."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._tokens = self._text_bytes = 0
        self._min: int | None = None
        self._max = 0

    def over(self, chunks: Chunks) -> Iterator[Tokens]:
        for tokens, text_bytes in chunks:
            self._text_bytes += text_bytes
            if len(tokens):
                self._tokens += len(tokens)
                low, high = int(tokens.min()), int(tokens.max())
                self._min = low if self._min is None else min(low, self._min)
                self._max = max(high, self._max)
                self._hash.update(np.ascontiguousarray(tokens, dtype="<u4").tobytes())
            yield tokens

    def stats(self, dtype: np.dtype[Any]) -> TokenStats:
        return TokenStats(
            dtype=dtype.name,
            tokens=self._tokens,
            text_bytes=self._text_bytes,
            fingerprint=self._hash.hexdigest(),
            min_token=self._min or 0,
            max_token=self._max,
        )


def _write_tokens(
    cache_dir: Path, key: str, dtype: np.dtype[Any], make: Callable[[], Chunks]
) -> TokenStats:
    scan = _Scan()
    with _replacing(cache_dir / f"{key}.tokens") as f:
        for tokens in scan.over(make()):
            f.write(tokens.astype(dtype, copy=False).tobytes())
    stats = scan.stats(dtype)
    _write_stats(cache_dir, key, stats)
    return stats


def _write_stats(cache_dir: Path, key: str, stats: TokenStats) -> None:
    with _replacing(cache_dir / f"{key}.json") as f:
        f.write(json.dumps(dataclasses.asdict(stats)).encode())


def _read_stats(cache_dir: Path, key: str) -> TokenStats | None:
    try:
        return TokenStats(**json.loads((cache_dir / f"{key}.json").read_bytes()))
    except (OSError, ValueError, TypeError):  # not there, or not ours: make it anew
        return None


def _open(cache_dir: Path, key: str, stats: TokenStats) -> Tokens | None:
    dtype = np.dtype(stats.dtype)
    path = cache_dir / f"{key}.tokens"
    try:
        if path.stat().st_size != stats.tokens * dtype.itemsize:
            return None  # cut short from outside
        if not stats.tokens:
            return np.empty(0, dtype)
        return np.memmap(path, dtype=dtype, mode="r")
    except OSError:
        return None


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of ``path`` when the block ends well, and goes away if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as f:
            yield f
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise
