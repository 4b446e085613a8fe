"""Text to token ids and back: bytes, or a Hugging Face ``tokenizers`` JSON file (level 1)."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers

from ray_train_geo.errors import DataError

__all__ = ["ByteTokenizer", "JsonTokenizer", "Tokenizer", "load_tokenizer"]

_EOT_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "[SEP]", "[EOS]")


class Tokenizer(ABC):
    """What the data code needs to know of a tokenizer.

    Attributes:
        vocab_size: number of token ids; all ids are below it.
        eot: the id that ends a document.
        fingerprint: equal for tokenizers that give equal ids.
    """

    vocab_size: int
    eot: int
    fingerprint: str

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The smallest of uint16 and uint32 that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def encode(self, text: str | bytes) -> npt.NDArray[np.unsignedinteger]:
        """Ids of ``text`` (bytes are UTF-8), ``[tokens]`` of :attr:`dtype`, without ``eot``."""
        return self.encode_batch([text.encode() if isinstance(text, str) else text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[bytes]) -> list[npt.NDArray[np.unsignedinteger]]:
        """:meth:`encode` for many texts at once, which is faster."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; ids that stand for no text (``eot``, unknown ones) give nothing."""


class ByteTokenizer(Tokenizer):
    """One token per byte, and 256 for the end of a document.  Any bytes go, UTF-8 or not."""

    def __init__(self) -> None:
        self.vocab_size = 257
        self.eot = 256
        self.fingerprint = "byte"

    def encode_batch(self, texts: Sequence[bytes]) -> list[npt.NDArray[np.unsignedinteger]]:
        return [np.frombuffer(text, dtype=np.uint8).astype(self.dtype) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if 0 <= i < 256).decode("utf-8", errors="replace")


class JsonTokenizer(Tokenizer):
    """A Hugging Face ``tokenizers`` JSON file (``tokenizer.json`` of a model).

    Bytes that are no UTF-8 become U+FFFD.  No special tokens are added; one that stands literally
    in a text (``<|endoftext|>`` between stories, say) becomes its id.

    Raises:
        DataError: the file can't be read, is no tokenizer, or has no end-of-document token.
    """

    def __init__(self, path: Path) -> None:
        try:
            raw = path.read_bytes()
        except OSError as e:
            raise DataError(f"can't read the tokenizer {path}: {e.strerror or e}") from None
        try:
            tokenizer = tokenizers.Tokenizer.from_str(raw.decode())
        except Exception as e:  # the library raises bare Exception
            raise DataError(
                f"{path} is no tokenizer: {e}; data.tokenizer takes the tokenizer.json that the "
                "Hugging Face `tokenizers` library saves"
            ) from None
        # Limits meant for inference would silently cut or fill up documents.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        eot = next((vocab[token] for token in _EOT_TOKENS if token in vocab), None)
        if eot is None:
            raise DataError(
                f"the tokenizer {path} has no end-of-document token; add one of "
                f"{', '.join(_EOT_TOKENS)} to it"
            )
        self.vocab_size = max(vocab.values()) + 1  # ids may have gaps
        self.eot = eot
        self.fingerprint = "json-" + hashlib.blake2b(raw, digest_size=16).hexdigest()
        self._tokenizer = tokenizer

    def encode_batch(self, texts: Sequence[bytes]) -> list[npt.NDArray[np.unsignedinteger]]:
        decoded = [text.decode("utf-8", errors="replace") for text in texts]
        encodings = self._tokenizer.encode_batch_fast(decoded, add_special_tokens=False)
        return [np.array(e.ids, dtype=self.dtype) for e in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        known = [i for i in map(int, ids) if 0 <= i < self.vocab_size]
        text: str = self._tokenizer.decode(known, skip_special_tokens=True)
        return text


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """The tokenizer that ``data.tokenizer`` names: ``byte``, or the path of a JSON file.

    Raises:
        DataError: there is no such tokenizer, or its file can't be used.
    """
    if name_or_path == "byte":
        return ByteTokenizer()
    path = Path(name_or_path).expanduser()
    if path.is_dir() and (path / "tokenizer.json").is_file():
        path = path / "tokenizer.json"  # the folder of a downloaded model
    if not path.is_file():
        raise DataError(
            f"unknown tokenizer {name_or_path!r}: data.tokenizer is 'byte' or the path of a "
            f"Hugging Face `tokenizers` JSON file, and there is no file {path.absolute()}"
        )
    return JsonTokenizer(path)
