"""Tokenizers: what is encoded decodes, and bad files are refused with advice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_train_geo.data.tokenizer import ByteTokenizer, JsonTokenizer, load_tokenizer
from ray_train_geo.errors import DataError


def bpe(eot: str = "<|endoftext|>", vocab_size: int = 300) -> tokenizers.Tokenizer:
    """A small byte-level BPE."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eot],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat and the hat " * 20], trainer)
    return tokenizer


@pytest.fixture
def bpe_path(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    bpe().save(str(path))
    return path


@given(st.binary())
def test_bytes_are_their_values(raw: bytes) -> None:
    ids = ByteTokenizer().encode(raw)
    assert ids.tolist() == list(raw)
    assert ids.dtype == np.uint16


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_without_text_decode_to_nothing(bpe_path: Path) -> None:
    assert ByteTokenizer().decode([104, 256, 105, 9999, -1]) == "hi"
    tokenizer = JsonTokenizer(bpe_path)
    ids = [*tokenizer.encode("the hat"), tokenizer.eot, 10**6, -1]
    assert tokenizer.decode(ids) == "the hat"


@given(text=st.text())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_json_round_trip(bpe_path: Path, text: str) -> None:
    tokenizer = JsonTokenizer(bpe_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_json_attributes(bpe_path: Path) -> None:
    tokenizer = load_tokenizer(str(bpe_path))
    assert isinstance(tokenizer, JsonTokenizer)
    assert tokenizer.eot == 0
    assert tokenizer.vocab_size == bpe().get_vocab_size()
    ids = tokenizer.encode(b"the cat \xff")
    assert ids.max() < tokenizer.vocab_size
    assert len(ids) < len("the cat ") + 3  # "the" and " cat" were merged
    assert tokenizer.decode(ids) == "the cat \ufffd"
    batch = tokenizer.encode_batch([b"the", b"", b"hat"])
    assert [tokenizer.decode(b) for b in batch] == ["the", "", "hat"]


@pytest.mark.parametrize("eot", ["</s>", "<|end_of_text|>", "[SEP]", "[EOS]"])
def test_eot_goes_by_many_names(tmp_path: Path, eot: str) -> None:
    path = tmp_path / "t.json"
    bpe(eot).save(str(path))
    tokenizer = JsonTokenizer(path)
    assert tokenizer.encode(eot).tolist() == [tokenizer.eot]


def test_vocab_size_covers_gaps_and_picks_the_dtype(tmp_path: Path) -> None:
    model = tokenizers.models.WordLevel({"a": 0, "</s>": 70_000}, unk_token="a")
    tokenizers.Tokenizer(model).save(str(tmp_path / "t.json"))
    tokenizer = JsonTokenizer(tmp_path / "t.json")
    assert tokenizer.vocab_size == 70_001
    assert tokenizer.encode("a").dtype == np.uint32


def test_limits_for_inference_are_ignored(tmp_path: Path) -> None:
    limited = bpe()
    text = "the cat and the hat and the cat"
    expected = limited.encode(text).ids
    limited.enable_truncation(2)
    limited.enable_padding(length=50)
    limited.save(str(tmp_path / "t.json"))
    assert JsonTokenizer(tmp_path / "t.json").encode(text).tolist() == expected


def test_fingerprint_goes_by_content(tmp_path: Path, bpe_path: Path) -> None:
    copy, other = tmp_path / "copy.json", tmp_path / "other.json"
    copy.write_bytes(bpe_path.read_bytes())
    bpe(vocab_size=260).save(str(other))
    fingerprints = {JsonTokenizer(p).fingerprint for p in (bpe_path, copy)}
    assert len(fingerprints) == 1
    assert JsonTokenizer(other).fingerprint not in fingerprints
    assert ByteTokenizer().fingerprint == load_tokenizer("byte").fingerprint


def test_a_model_folder_will_do(bpe_path: Path) -> None:
    assert load_tokenizer(str(bpe_path.parent)).eot == 0


def test_unknown_names_are_refused() -> None:
    with pytest.raises(DataError, match=r"unknown tokenizer 'bytes'.*'byte' or the path"):
        load_tokenizer("bytes")


@pytest.mark.parametrize("content", [b"{}", b"not json", b"\xff\xfe", b""])
def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"t\.json is no tokenizer"):
        load_tokenizer(str(path))


def test_a_file_that_goes_away_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't read the tokenizer"):
        JsonTokenizer(tmp_path / "gone.json")


def test_a_tokenizer_without_eot_is_refused(bpe_path: Path) -> None:
    raw = json.loads(bpe_path.read_text().replace("<|endoftext|>", "<|other|>"))
    bpe_path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match=r"no end-of-document token.*<\|endoftext\|>"):
        load_tokenizer(str(bpe_path))
