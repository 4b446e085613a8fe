"""Data behind URLs: copied once, again when it changes, and never half."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fsspec
import pytest

from ray_train_geo.data.remote import fetch
from ray_train_geo.errors import DataError


@pytest.fixture
def store() -> Iterator[Any]:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/bucket/a.txt": b"A", "/bucket/sub/b.txt": b"B", "/bucket/.c.txt": b"C"})
    yield memory
    memory.rm("/bucket", recursive=True)


def get(url: str, cache_dir: Path, glob: str = "*") -> Path:
    with ExitStack() as cleanup:
        return fetch(url, glob, cache_dir, cleanup)


def test_a_file_is_copied_once(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = get("memory://bucket/a.txt", tmp_path)
    assert first.name == "a.txt"
    assert first.read_bytes() == b"A"
    monkeypatch.setattr(type(store), "get_file", None)  # a second copy would raise
    assert get("memory://bucket/a.txt", tmp_path) == first


def test_a_changed_file_is_copied_again(store: Any, tmp_path: Path) -> None:
    first = get("memory://bucket/a.txt", tmp_path)
    store.pipe({"/bucket/a.txt": b"new"})
    second = get("memory://bucket/a.txt", tmp_path)
    assert first != second
    assert second.read_bytes() == b"new"


def test_a_folder_is_copied_without_what_does_not_count(store: Any, tmp_path: Path) -> None:
    store.pipe({"/bucket/d.md": b"D"})
    root = get("memory://bucket", tmp_path, "*.txt")
    files = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    assert files == ["a.txt", "sub/b.txt"]
    with pytest.raises(DataError, match=r"holds no file that matches data\.glob '\*\.csv'"):
        get("memory://bucket", tmp_path, "*.csv")


def test_an_index_comes_along(store: Any, tmp_path: Path) -> None:
    store.pipe({"/bucket/t.bin": b"12", "/bucket/t.idx": b"I"})
    path = get("memory://bucket/t.bin", tmp_path)
    assert path.name == "t.bin"
    assert path.with_suffix(".idx").read_bytes() == b"I"


def test_local_urls_are_used_in_place(tmp_path: Path) -> None:
    assert get(f"file://{tmp_path}/x.txt", tmp_path / "cache") == tmp_path / "x.txt"
    assert not (tmp_path / "cache").exists()


def test_without_a_cache_the_copy_is_temporary(store: Any, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()  # a file, where a folder is needed
    with ExitStack() as cleanup:
        path = fetch("memory://bucket/a.txt", "*", tmp_path / "cache", cleanup)
        assert path.read_bytes() == b"A"
    assert not path.exists()


def test_a_copy_that_breaks_off_leaves_nothing(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, remote: str, local: str) -> None:
        Path(local).write_bytes(b"half")
        raise ConnectionResetError("gone")

    monkeypatch.setattr(type(store), "get_file", broken)
    with pytest.raises(DataError, match=r"can't read data.path memory://bucket/a\.txt: Conn.*gone"):
        get("memory://bucket/a.txt", tmp_path)
    assert not list((tmp_path / "downloads").iterdir())


def test_another_process_may_be_first(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner: list[Path] = []
    original = type(store).get_file

    def slow(self: Any, *args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(type(store), "get_file", original)
        inner.append(get("memory://bucket/a.txt", tmp_path))
        original(self, *args, **kwargs)

    monkeypatch.setattr(type(store), "get_file", slow)
    assert get("memory://bucket/a.txt", tmp_path) == inner[0]
    assert len(list((tmp_path / "downloads").iterdir())) == 1


@pytest.mark.parametrize("url", ["memory://bucket/gone.txt", "nosuch://x/y"])
def test_urls_that_cant_be_read_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        get(url, tmp_path)
