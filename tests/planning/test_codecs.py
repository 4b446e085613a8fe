from __future__ import annotations

import pytest

from ray_train_geo.model.catalog import CATALOG
from ray_train_geo.planning.codecs import CODECS, codec_s, gradient_bytes, wire_bytes
from ray_train_geo.spec import CodecSpec


@pytest.mark.parametrize(
    ("codec", "precision", "size"),
    [
        ("none", "fp32", 4096),
        ("none", "fp16", 2048),
        ("bf16", "fp32", 2048),
        ("int8", "fp16", 1024 + 8 * 2),
        ("int4", "bf16", 512 + 8 * 2),
    ],
)
def test_bytes_on_the_wire(codec, precision, size):
    assert wire_bytes(codec, 1024, precision) == size


def test_smaller_messages_are_no_free_lunch():
    seconds = {c: codec_s(c, 1024, "fp32", 1e6) for c in CODECS}
    assert seconds["none"] == 0
    assert seconds["bf16"] == pytest.approx((4096 + 2048) / 1e6)
    assert seconds["int8"] == pytest.approx((2 * 4096 + 1040) / 1e6)


def test_an_unknown_codec():
    with pytest.raises(KeyError):
        wire_bytes("zip", 1, "fp32")


@pytest.mark.parametrize(
    ("codec", "size"),
    [("none", 4), ("bf16", 2), ("int8", 1 + 2 / 128), ("topk", (2 + 52 * 1.5) / 1024)],
)
def test_bytes_of_a_gradient(codec, size):
    assert gradient_bytes(CodecSpec(gradients=codec), CATALOG["gpt3-small"]) == size


def test_thin_matrices_are_small():
    codecs = [CodecSpec(gradients="powersgd", powersgd_rank=rank) for rank in (1, 4, 10**6)]
    one, four, all_of_it = (gradient_bytes(c, CATALOG["gpt3-small"]) for c in codecs)
    assert 0 < one < four < 0.03
    assert all_of_it == 4
