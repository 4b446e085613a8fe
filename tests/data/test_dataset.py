"""Datasets: tokens, samples, the cache, and clear refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import tokenizers

from ray_train_geo.data import dataset as dataset_module
from ray_train_geo.data import token_cache
from ray_train_geo.data.dataset import TokenDataset, open_dataset
from ray_train_geo.data.token_cache import default_cache_dir
from ray_train_geo.errors import DataError
from ray_train_geo.spec import DataSpec


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A tokenizer of whole words: w0..w9 are 1..10, </s> is 0."""
    model = tokenizers.models.WordLevel(
        {"</s>": 0, **{f"w{i}": i + 1 for i in range(10)}, "?": 11}, unk_token="?"
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    path = tmp_path / "words.json"
    tokenizer.save(str(path))
    return path


def text_file(folder: Path, text: str | bytes, name: str = "a.txt") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def open_at(path: Path | str, cache: Path, seq_len: int = 2, **spec: Any) -> TokenDataset:
    return open_dataset(DataSpec(path=str(path), **spec), seq_len, cache)


def test_samples_overlap_by_the_last_target(tmp_path: Path, cache: Path) -> None:
    data = open_at(text_file(tmp_path, "abcdefg"), cache, seq_len=3)  # 7 bytes and eot
    assert data.tokens.tolist() == [*b"abcdefg", 256]
    assert data.samples == 2
    inputs, targets = data.batch([1, 0, 1])
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.tolist() == [list(b"def"), list(b"abc"), list(b"def")]
    assert targets.tolist() == [list(b"efg"), list(b"bcd"), list(b"efg")]
    assert data.batch([])[0].shape == (0, 3)
    for bad in (-1, 2):
        with pytest.raises(IndexError, match=r"0\.\.1"):
            data.batch([0, bad])


def test_exactly_one_sample_will_do(tmp_path: Path, cache: Path) -> None:
    path = text_file(tmp_path, "abc")
    assert open_at(path, cache, seq_len=3).samples == 1
    with pytest.raises(DataError, match=r"only 4 tokens.* needs 5 .*at most 3"):
        open_at(path, cache, seq_len=4)
    with pytest.raises(DataError, match="at least 1"):
        open_at(path, cache, seq_len=0)


def test_documents_end_with_eot(tmp_path: Path, cache: Path, words: Path) -> None:
    root = tmp_path / "docs"
    text_file(root, "w1 w2", "b.txt")
    text_file(root, "w3\nw4 \xff", "a.txt")
    text_file(root, '{"text": "w5"}\n{"text": "w6 w7"}', "c.jsonl")
    data = open_at(root, cache, tokenizer=str(words))
    assert data.tokens.tolist() == [4, 5, 11, 0, 2, 3, 0, 6, 0, 7, 8, 0]
    assert data.vocab_size == 12
    assert data.max_token == 11
    assert data.bytes_per_token == pytest.approx((8 + 5 + 2 + 5) / 12)


def test_batches_do_not_show(
    tmp_path: Path, cache: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "docs"
    for i in range(20):
        text_file(root, f"w{i % 10} w3", f"{i:02}.txt")
    whole = open_at(root, cache / "1", tokenizer=str(words))
    monkeypatch.setattr(dataset_module, "_BATCH_PIECES", 3)
    pieces = open_at(root, cache / "2", tokenizer=str(words))
    assert whole.tokens.tolist() == pieces.tokens.tolist()
    assert whole.fingerprint == pieces.fingerprint
    assert whole.bytes_per_token == pieces.bytes_per_token


def test_bytes_stay_raw_for_the_byte_tokenizer(tmp_path: Path, cache: Path) -> None:
    data = open_at(text_file(tmp_path, b"\xff\r\n\xfe"), cache)
    assert data.tokens.tolist() == [255, 13, 10, 254, 256]
    assert data.bytes_per_token == pytest.approx(4 / 5)


def test_tokens_are_made_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = text_file(tmp_path, "some text")
    first = open_at(path, cache)
    assert isinstance(first.tokens, np.memmap)
    assert sorted(p.suffix for p in cache.iterdir()) == [".json", ".tokens"]
    with monkeypatch.context() as patch:
        patch.setattr(dataset_module, "read_pieces", None)  # making them again would raise
        again = open_at(path, cache, seq_len=5)
    assert again.tokens.tolist() == first.tokens.tolist()
    assert again.fingerprint == first.fingerprint
    assert again.bytes_per_token == first.bytes_per_token


def test_changed_text_is_tokenised_again(tmp_path: Path, cache: Path, words: Path) -> None:
    path = text_file(tmp_path, "w1 w2")
    before = open_at(path, cache)
    assert open_at(path, cache, tokenizer=str(words)).tokens.tolist() == [2, 3, 0]
    path.write_text("w1 w3")
    assert open_at(path, cache).tokens.tolist() == [*b"w1 w3", 256]
    assert before.tokens.tolist() == [*b"w1 w2", 256]  # an open dataset never changes


def test_fingerprint_is_of_the_content_alone(tmp_path: Path, cache: Path) -> None:
    one = open_at(text_file(tmp_path / "x", "same text"), cache)
    two = open_at(text_file(tmp_path / "y", "same text", "other.txt"), tmp_path / "cache2")
    other = open_at(text_file(tmp_path / "z", "Same text"), cache)
    assert one.fingerprint == two.fingerprint
    assert one.fingerprint != other.fingerprint
    # ... and neither of the type they are stored in, nor of where they came from.
    for dtype in ("uint16", "uint32", "int32"):
        path = tmp_path / f"{dtype}.bin"
        np.array([*b"same text", 256], dtype).tofile(path)
        assert open_at(path, cache, bin_dtype=dtype).fingerprint == one.fingerprint


@pytest.mark.parametrize("damage", ["tokens", "json", "json is a list"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, cache: Path, damage: str) -> None:
    path = text_file(tmp_path, "some text")
    expected = open_at(path, cache).tokens.tolist()
    (file,) = cache.glob(f"*.{damage.split()[0]}")
    file.write_bytes(b"[]" if "list" in damage else file.read_bytes()[:-2])
    assert open_at(path, cache).tokens.tolist() == expected
    assert isinstance(open_at(path, cache).tokens, np.memmap)


def test_a_cache_that_cant_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = text_file(tmp_path, "some text")
    good = open_at(path, tmp_path / "good")
    no_folder = text_file(tmp_path, "a file, not a folder", "nofolder")
    in_memory = open_at(path, no_folder)
    assert not isinstance(in_memory.tokens, np.memmap)
    assert in_memory.tokens.tolist() == good.tokens.tolist()
    assert in_memory.fingerprint == good.fingerprint
    assert in_memory.bytes_per_token == good.bytes_per_token

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache.os, "replace", full)
    assert open_at(path, tmp_path / "full").tokens.tolist() == good.tokens.tolist()
    assert not list((tmp_path / "full").iterdir())
    tokens = tmp_path / "t.bin"
    np.arange(10, dtype=np.uint16).tofile(tokens)
    assert open_at(tokens, tmp_path / "full").max_token == 9


def test_several_processes_at_once(tmp_path: Path, cache: Path) -> None:
    path = text_file(tmp_path, "a longer text\n" * 100_000)
    code = (
        "import sys, pathlib\n"
        "from ray_train_geo.data.dataset import open_dataset\n"
        "from ray_train_geo.spec import DataSpec\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "d = open_dataset(DataSpec(path=sys.argv[1]), 64, pathlib.Path(sys.argv[2]))\n"
        "print(type(d.tokens).__name__, d.samples, d.fingerprint, int(d.tokens.sum()))\n"
    )
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path), str(cache)],
            stdin=pipe,
            stdout=pipe,
            text=True,
        )
        for _ in range(4)
    ]
    try:
        for p in processes:
            assert p.stdout is not None
            assert p.stdout.readline() == "ready\n"
        for p in processes:  # all wait at the same line: let them go at once
            assert p.stdin is not None
            p.stdin.write("\n")
            p.stdin.flush()
        answers = [p.communicate(timeout=60)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    here = open_at(path, cache, seq_len=64)
    expected = f"memmap {here.samples} {here.fingerprint} {here.tokens.sum()}\n"
    assert answers == [expected] * 4
    assert len(list(cache.iterdir())) == 2  # nothing was left aside


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_TRAIN_GEO_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_cache_dir() == Path("/home/someone/.cache/ray_train_geo/tokens")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_cache_dir() == Path("/xdg/ray_train_geo/tokens")
    monkeypatch.setenv("RAY_TRAIN_GEO_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"
    open_dataset(DataSpec(path=str(text_file(tmp_path, "text"))), 2)
    assert len(list((tmp_path / "own").iterdir())) == 2


def test_standard_library(cache: Path) -> None:
    data = open_at("python://stdlib", cache, seq_len=128)
    assert data.samples > 10_000
    assert data.max_token == 256
    assert data.bytes_per_token == pytest.approx(1, abs=0.01)
    with pytest.raises(DataError, match="only python://stdlib"):
        open_at("python://stdlob", cache)


@pytest.fixture
def bucket() -> Iterator[Any]:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/data/a.txt": b"AA", "/data/b.txt": b"B", "/data/t.bin": b"\1\0\2\0\3\0"})
    yield memory
    memory.rm("/data", recursive=True)


@pytest.mark.usefixtures("bucket")
def test_urls(tmp_path: Path, cache: Path) -> None:
    unwritable = text_file(tmp_path, "", "file")
    for where in (cache, unwritable):
        assert open_at("memory://data/a.txt", where).tokens.tolist() == [65, 65, 256]
        assert open_at("memory://data", where, glob="*.txt").tokens.tolist() == [
            *[65, 65, 256],
            *[66, 256],
        ]
        assert open_at("memory://data/t.bin", where).tokens.tolist() == [1, 2, 3]
    local = text_file(tmp_path, "xyz")
    assert open_at(f"file://{local}", cache).tokens.tolist() == [*b"xyz", 256]


class TestTokenFiles:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "train.bin"
        np.array([3, 1, 4, 1, 5, 9, 11], np.uint16).tofile(path)
        return path

    def test_without_a_tokenizer_the_file_says_its_vocabulary(
        self, path: Path, cache: Path
    ) -> None:
        data = open_at(path, cache)
        assert data.tokens.tolist() == [3, 1, 4, 1, 5, 9, 11]
        assert (data.vocab_size, data.max_token, data.bytes_per_token) == (12, 11, None)
        data.require_vocab(12)
        with pytest.raises(DataError, match=r"needs a vocabulary of 12 .*model has 11.*bin_dtype"):
            data.require_vocab(11)

    def test_a_named_tokenizer_must_hold_every_token(
        self, path: Path, cache: Path, words: Path
    ) -> None:
        assert open_at(path, cache, tokenizer=str(words)).vocab_size == 12
        np.array([3, 12, 4], np.uint16).tofile(path)
        with pytest.raises(DataError, match=r"holds token 12, but .*words\.json has only 12"):
            open_at(path, cache, tokenizer=str(words))

    def test_the_scan_is_remembered(
        self, path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = open_at(path, cache)
        monkeypatch.setattr(token_cache, "_Scan", None)  # another would raise
        assert open_at(path, cache).fingerprint == first.fingerprint

    def test_the_scan_goes_chunk_by_chunk(
        self, path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = open_at(path, cache)
        monkeypatch.setattr(token_cache, "_CHUNK_TOKENS", 2)
        parts = open_at(path, cache / "other")
        assert parts.fingerprint == whole.fingerprint
        assert parts.max_token == whole.max_token

    def test_negative_tokens_are_refused(self, path: Path, cache: Path) -> None:
        np.array([1, -2, 3], np.int32).tofile(path)
        with pytest.raises(DataError, match=r"negative token -2.*int32; set data\.bin_dtype"):
            open_at(path, cache, bin_dtype="int32")

    def test_any_name_will_do_when_called_bin(self, path: Path, cache: Path) -> None:
        renamed = path.rename(path.with_name("train.tokens"))
        assert open_at(renamed, cache, format="bin").max_token == 11

    def test_a_folder_is_no_token_file(self, path: Path, cache: Path) -> None:
        with pytest.raises(DataError, match=r"is a folder; name one \.bin file"):
            open_at(path.parent, cache, format="bin")

    def test_the_ending_may_not_be_left_out(self, path: Path, cache: Path) -> None:
        with pytest.raises(DataError, match=r"did you mean .*train\.bin\?"):
            open_at(path.with_suffix(""), cache)


def test_require_vocab_of_text(tmp_path: Path, cache: Path) -> None:
    data = open_at(text_file(tmp_path, "text"), cache)
    data.require_vocab(257)
    with pytest.raises(DataError, match=r"257 tokens.*has 256.*model\.vocab_size to at least 257"):
        data.require_vocab(256)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "does not exist on node"),
        ("empty.txt", "", "is empty"),
        ("empty.jsonl", "\n\n", "is empty"),
        ("empty.bin", "", "is empty"),
        ("one.bin", b"\1\0", "only 1 tokens.*use more text"),
        ("bad.jsonl", '{"text": "x"}\n{', r"bad\.jsonl:2: not valid JSON"),
        ("a.txt/below", None, "does not exist"),
    ],
)
def test_what_cant_be_trained_on_is_refused(
    tmp_path: Path, cache: Path, name: str, content: str | bytes | None, message: str
) -> None:
    text_file(tmp_path, "a file")
    if content is not None:
        text_file(tmp_path, content, name)
    with pytest.raises(DataError, match=message):
        open_at(tmp_path / name, cache)


def test_folders_without_text_are_refused(tmp_path: Path, cache: Path) -> None:
    text_file(tmp_path, b"\0", "data/a.png")
    text_file(tmp_path, "", "data/b.txt")
    with pytest.raises(DataError, match="holds no text: its 2 matching files are empty or binary"):
        open_at(tmp_path / "data", cache)
    with pytest.raises(DataError, match=r"no file that matches data\.glob"):
        open_at(tmp_path / "data", cache, glob="*.md")


def test_failures_leave_no_cache(tmp_path: Path, cache: Path) -> None:
    path = text_file(tmp_path, json.dumps({"text": "x"}) + "\nbad", "a.jsonl")
    for _ in range(2):
        with pytest.raises(DataError, match="not valid JSON"):
            open_at(path, cache)
    assert not list(cache.iterdir())
