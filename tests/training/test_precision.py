"""The dynamic loss scale is a value; its next one depends on the step's outcome only."""

from __future__ import annotations

import pytest
import torch

from ray_train_geo.spec import LossScaleSpec, Precision
from ray_train_geo.training.precision import DTYPES, LossScale

SPEC = LossScaleSpec(initial=1024.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=3)


def test_types() -> None:
    assert dict(DTYPES) == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("overflow", [False, True])
def test_only_fp16_scales(precision: Precision, overflow: bool) -> None:
    scale = LossScale.start(precision, SPEC)
    assert scale == LossScale(1.0, 0)
    assert scale.after(overflow, precision, SPEC) == scale


def test_grows_after_an_interval_of_good_steps_and_halves_once_an_overflow() -> None:
    scale, seen = LossScale.start("fp16", SPEC), []
    for overflow in [False, False, False, False, True, True, False, False, False]:
        scale = scale.after(overflow, "fp16", SPEC)
        seen.append((scale.factor, scale.good_steps))
    assert seen == [
        (1024, 1),
        (1024, 2),
        (2048, 0),  # three in a row
        (2048, 1),
        (1024, 0),
        (512, 0),
        (512, 1),
        (512, 2),
        (1024, 0),
    ]


def test_an_overflow_starts_the_count_anew() -> None:
    scale = LossScale(1024.0, good_steps=2).after(True, "fp16", SPEC)
    assert scale == LossScale(512.0, good_steps=0)
