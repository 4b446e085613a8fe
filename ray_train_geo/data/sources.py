"""Where text comes from: a file, a folder, JSONL, the standard library, in pieces of bounded size.

Everything here is in bytes: what they mean is the tokenizer's business.
"""

from __future__ import annotations

import fnmatch
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ray_train_geo.errors import DataError
from ray_train_geo.spec import DataSpec

__all__ = ["Piece", "find_files", "is_wanted", "read_pieces", "stdlib_files"]

_PIECE_BYTES = 256 * 2**10
_SNIFF_BYTES = 8192
_JSONL_SUFFIXES = (".jsonl", ".ndjson")
_HIDDEN = (".*", "__pycache__")
_STDLIB_BYTES = 8_000_000
# Tests and demos, what is not of the library itself, and files written when it was built (they
# hold the build machine's paths).
_STDLIB_SKIPPED_FOLDERS = (
    "config-*",
    "dist-packages",
    "idlelib",
    "lib-dynload",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
)
_STDLIB_SKIPPED_FILES = ("_sysconfigdata*", "sitecustomize.py", "usercustomize.py")


class Piece(NamedTuple):
    """A part of a document, and whether the document ends with it."""

    text: bytes
    ends_document: bool


def is_wanted(relative: str, glob: str) -> bool:
    """Whether a file of a folder counts: ``glob`` fits, and neither it nor a parent is hidden.

    Args:
        relative: POSIX path below the folder.
        glob: matched with the file's name, or with ``relative`` if it has a slash.
    """
    path = PurePosixPath(relative)
    if any(fnmatch.fnmatchcase(part, p) for part in path.parts for p in _HIDDEN):
        return False
    pattern = glob.removeprefix("**/")
    return fnmatch.fnmatchcase(relative if "/" in pattern else path.name, pattern)


def find_files(root: Path, glob: str) -> list[Path]:
    """Files below ``root`` that :func:`is_wanted` says count, sorted by relative name.

    Folders that are links are entered, each real folder once.

    Raises:
        DataError: no file fits, or a folder can't be read.
    """
    found = {name: path for name, path in _walk(root) if is_wanted(name, glob) and path.is_file()}
    if not found:
        raise DataError(
            f"the folder {root} holds no file that matches data.glob {glob!r} (hidden files and "
            "folders don't count)"
        )
    return [found[name] for name in sorted(found)]


def stdlib_files() -> list[Path]:
    """Source files of the running interpreter's standard library, by name, up to about 8 MB.

    Raises:
        DataError: this interpreter has no library in source form.
    """
    root = Path(sysconfig.get_path("stdlib"))
    named = [
        (name, path)
        for name, path in _walk(root, _STDLIB_SKIPPED_FOLDERS)
        if is_wanted(name, "*.py")
        and not any(fnmatch.fnmatchcase(path.name, p) for p in _STDLIB_SKIPPED_FILES)
    ]
    files: list[Path] = []
    total_bytes = 0
    for _, path in sorted(named):
        total_bytes += path.stat().st_size
        if total_bytes > _STDLIB_BYTES:
            break
        files.append(path)
    if not files:
        raise DataError(
            f"python://stdlib: no source files below {root}; set data.path to a text file"
        )
    return files


def read_pieces(files: Sequence[Path], spec: DataSpec, root: Path) -> Iterator[Piece]:
    """The text of ``files``, document by document; documents without text are left out.

    A plain file is one document; a line of a JSONL file is one.  Large documents come in pieces
    that end after a line break (else, between two UTF-8 characters), so memory stays bounded.

    Args:
        root: what the user named.  Below a folder, binary files (with a NUL byte) are skipped.

    Raises:
        DataError: a file can't be read, is binary, or has a bad JSONL line.
    """
    for path in files:
        by_name = spec.format == "auto" and path.suffix.lower() in _JSONL_SUFFIXES
        try:
            if spec.format == "jsonl" or by_name:
                yield from _jsonl_pieces(path, spec.text_field)
            elif not _is_binary(path) or (path == root and spec.format == "text"):
                yield from _text_pieces(path)
            elif path == root:
                raise DataError(
                    f"{path} looks binary (it holds a NUL byte), not UTF-8 text; for a file of "
                    "tokens set data.format to bin, to train on its bytes set it to text"
                )
        except OSError as e:
            raise DataError(f"can't read {path}: {e.strerror or e}") from None


def _walk(root: Path, skipped: Sequence[str] = ()) -> Iterator[tuple[str, Path]]:
    """Relative POSIX names and paths of the files below ``root``, in no particular order.

    Hidden folders are not entered, nor are those whose name fits a pattern in ``skipped``.
    """

    def fail(e: OSError) -> None:
        raise DataError(f"can't read the folder {e.filename}: {e.strerror or e}") from None

    entered: set[str] = set()
    for folder, subfolders, names in os.walk(root, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:
            subfolders.clear()
            continue
        entered.add(real)
        subfolders[:] = sorted(  # which of two links to one folder counts is fixed by their names
            name
            for name in subfolders
            if not any(fnmatch.fnmatchcase(name, p) for p in (*_HIDDEN, *skipped))
        )
        for name in names:
            path = Path(folder, name)
            yield path.relative_to(root).as_posix(), path


def _is_binary(path: Path) -> bool:
    with path.open("rb") as f:
        return b"\0" in f.read(_SNIFF_BYTES)


def _text_pieces(path: Path) -> Iterator[Piece]:
    with path.open("rb") as f:
        begun = False
        carry = b""
        while True:
            block = f.read(_PIECE_BYTES)
            text = carry + block
            if len(block) < _PIECE_BYTES:
                if text or begun:
                    yield Piece(text, True)
                return
            cut = _last_boundary(text)
            yield Piece(text[:cut], False)
            begun, carry = True, text[cut:]


def _last_boundary(text: bytes) -> int:
    """Where to cut: after the last line break, else before the last UTF-8 character."""
    after_line = text.rfind(b"\n") + 1
    if after_line:
        return after_line
    for back in range(1, 5):
        if text[-back] & 0xC0 != 0x80:  # no continuation byte: a character begins here
            return len(text) - back
    return len(text)  # not UTF-8: anywhere will do


def _jsonl_pieces(path: Path, field: str) -> Iterator[Piece]:
    with path.open("rb") as f:
        for number, line in enumerate(f, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise DataError(f"{path}:{number}: not valid JSON: {e}") from None
            text = record.get(field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise DataError(f"{path}:{number}: {_what_is_there(record, field)}")
            if text:
                # JSON may spell half a surrogate pair, which has no UTF-8 form.
                yield Piece(text.encode("utf-8", errors="replace"), True)


def _what_is_there(record: object, field: str) -> str:
    if not isinstance(record, dict):
        return f"a JSON object was expected, but here is a {type(record).__name__}"
    if field in record:
        return f"field {field!r} must be a string, but is a {type(record[field]).__name__}"
    known = ", ".join(map(repr, record)) or "none"
    return f"no field {field!r} (there are: {known}); set data.text_field"
