from __future__ import annotations

import pytest

from ray_train_geo.planning.codecs import CODECS, codec_s, wire_bytes


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
