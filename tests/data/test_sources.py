"""Text sources: which files count, and how documents are cut into pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_train_geo.data import sources
from ray_train_geo.data.sources import find_files, is_wanted, read_pieces, stdlib_files
from ray_train_geo.errors import DataError
from ray_train_geo.spec import DataSpec


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def documents(root: Path, **spec: str) -> list[bytes]:
    """The documents of a file or folder, their pieces joined."""
    data = DataSpec.model_validate({"path": str(root), **spec})
    files = find_files(root, data.glob) if root.is_dir() else [root]
    done, parts = [], []
    for piece in read_pieces(files, data, root):
        parts.append(piece.text)
        if piece.ends_document:
            done.append(b"".join(parts))
            parts = []
    assert not parts
    return done


def names(root: Path, glob: str = "*") -> list[str]:
    return [p.relative_to(root).as_posix() for p in find_files(root, glob)]


def test_folders_are_searched_in_order(tmp_path: Path) -> None:
    write(tmp_path, {n: n for n in ("b.txt", "a/z.txt", "a/b/c.md", "a.txt")})
    write(tmp_path, {".git/x.txt": "no", "__pycache__/x.txt": "no", "a/.hidden": "no"})
    assert names(tmp_path) == ["a.txt", "a/b/c.md", "a/z.txt", "b.txt"]
    assert names(tmp_path, "*.md") == ["a/b/c.md"]
    assert names(tmp_path, "**/*.txt") == ["a.txt", "a/z.txt", "b.txt"]
    assert names(tmp_path, "a/*.txt") == ["a/z.txt"]


def test_a_folder_in_a_hidden_folder_counts(tmp_path: Path) -> None:
    root = write(tmp_path / ".cache" / "data", {"a.txt": "x"})
    assert names(root) == ["a.txt"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", {"f.txt": "x"})
    root = write(tmp_path / "root", {"a/g.txt": "y"})
    (root / "link").symlink_to(outside)
    (root / "a" / "loop").symlink_to(root)
    (root / "dangling.txt").symlink_to(root / "nowhere")
    assert names(root) == ["a/g.txt", "link/f.txt"]


@pytest.mark.parametrize(
    ("relative", "glob", "wanted"),
    [
        ("a/b.txt", "*.txt", True),
        ("a/b.TXT", "*.txt", False),
        ("a/../b.txt", "*", False),
        ("x/.a/b.txt", "*", False),
        ("x/y/b.txt", "x/*", True),
    ],
)
def test_is_wanted(relative: str, glob: str, wanted: bool) -> None:
    assert is_wanted(relative, glob) is wanted


def test_a_folder_without_a_match_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "x"})
    with pytest.raises(DataError, match=r"no file that matches data\.glob '\*\.md'"):
        find_files(tmp_path, "*.md")


def test_a_folder_that_cant_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't read the folder"):
        find_files(tmp_path / "gone", "*")


def test_binary_and_empty_files_of_a_folder_are_skipped(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "text", "b.png": b"\x89PNG\0\0", "c.txt": "", "d.txt": b"\xff raw"})
    assert documents(tmp_path) == [b"text", b"\xff raw"]


def test_a_binary_file_alone_is_refused_unless_called_text(tmp_path: Path) -> None:
    write(tmp_path, {"x.dat": b"a\0b"})
    with pytest.raises(DataError, match=r"looks binary.*format to bin.*text"):
        documents(tmp_path / "x.dat")
    assert documents(tmp_path / "x.dat", format="text") == [b"a\0b"]


def test_jsonl(tmp_path: Path) -> None:
    lines = '{"text": "one"}\n\n{"text": ""}\n{"text": "z\\u00e9ro \\ud800", "n": 1}'
    write(tmp_path, {"a.jsonl": lines, "b.txt": lines})
    expected = [b"one", "zéro ?".encode()]
    assert documents(tmp_path / "a.jsonl") == expected
    assert documents(tmp_path / "b.txt", format="jsonl") == expected
    assert documents(tmp_path / "a.jsonl", format="text") == [lines.encode()]
    assert documents(tmp_path) == [*expected, lines.encode()]  # each file by its own ending


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', r"a\.jsonl:2: not valid JSON"),
        (b"\xff\xfe", r"a\.jsonl:2: not valid JSON"),
        (b"[" * 100_000, r"a\.jsonl:2: not valid JSON"),
        (b'["text"]', r"a\.jsonl:2: a JSON object was expected, but here is a list"),
        (b'{"body": "x"}', r"a\.jsonl:2: no field 'text' \(there are: 'body'\); set data\.text_f"),
        (b'{"text": 3}', r"a\.jsonl:2: field 'text' must be a string, but is a int"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    write(tmp_path, {"a.jsonl": b'{"text": "fine"}\n' + line + b"\n"})
    with pytest.raises(DataError, match=message):
        documents(tmp_path / "a.jsonl")


def test_a_file_that_cant_be_read_is_refused() -> None:
    with pytest.raises(DataError, match="can't read /proc/self/mem: "):
        documents(Path("/proc/self/mem"), format="text")


@given(
    raw=st.one_of(
        st.binary(max_size=200),
        st.text(max_size=100).map(str.encode),
        st.text("aé漢\n", max_size=100).map(str.encode),
    ),
    piece_bytes=st.integers(4, 40),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_pieces_join_to_the_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: bytes, piece_bytes: int
) -> None:
    monkeypatch.setattr(sources, "_PIECE_BYTES", piece_bytes)
    path = tmp_path / "x.txt"
    path.write_bytes(raw)
    pieces = list(read_pieces([path], DataSpec(path=str(path), format="text"), path))
    assert b"".join(p.text for p in pieces) == raw
    assert [p.ends_document for p in pieces] == [False] * (len(pieces) - 1) + [True] * bool(raw)
    assert all(len(p.text) < 2 * piece_bytes for p in pieces)
    # Cut between characters: decoding piece by piece gives what decoding all at once gives.
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return
    assert "".join(p.text.decode() for p in pieces) == text


def test_pieces_end_after_a_line_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_PIECE_BYTES", 10)
    path = tmp_path / "x.txt"
    path.write_text("one two\nthree four\nfive")
    pieces = list(read_pieces([path], DataSpec(path=str(path)), path))
    assert [p.text for p in pieces] == [b"one two\n", b"three four\n", b"five"]


def test_the_standard_library_is_text_of_bounded_size() -> None:
    files = stdlib_files()
    assert files == stdlib_files()
    total_bytes = sum(f.stat().st_size for f in files)
    assert 2_000_000 < total_bytes <= 8_000_000
    parts = {part for f in files for part in f.parts}
    assert "asyncio" in parts
    assert not parts & {"test", "tests", "site-packages", "__pycache__", "lib2to3", "idlelib"}
    assert not any(f.name.startswith("_sysconfigdata") for f in files)
