"""Codecs of messages between stages: what comes back is near what went in, whatever it was."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ray_train_geo.codecs.make import make_codec
from ray_train_geo.codecs.workspace import Workspace, noise_key
from ray_train_geo.planning.codecs import GROUP, wire_bytes

WORKSPACE = Workspace(torch.device("cpu"))
LEVELS = {"int8": 127, "int4": 7}
QUARTER = {"int8": 0.27, "int4": 0.15}
SMALLEST = 2.0**-126

sizes = st.one_of(st.integers(1, 700), st.sampled_from([128, 256, WORKSPACE.part + 129]))
floats = st.floats(-(2.0**100), 2.0**100, width=32)  # zeros and denormals too


def coded(name: str, values: torch.Tensor, key: int = 3, rotated: bool = False) -> torch.Tensor:
    codec = make_codec(name, values.numel(), WORKSPACE, rotated)
    wire = torch.full((codec.wire_bytes,), 255, dtype=torch.uint8)
    before = values.clone()
    codec.encode(values, wire, key)
    assert torch.equal(values.nan_to_num(), before.nan_to_num()), "encode changed its input"
    found = torch.full_like(values, 7.0)
    codec.decode(wire, found, key)
    return found


def group_bounds(values: torch.Tensor, levels: int) -> torch.Tensor:
    """Each value's scale: of its group's largest magnitude, rounded up to bf16."""
    flat = values.float().view(-1)
    padded = torch.cat([flat, flat.new_zeros(-flat.numel() % GROUP)]).view(-1, GROUP)
    scale = (padded.abs().amax(1) / levels).clamp_min(SMALLEST) * (1 + 2.0**-6)
    return scale.repeat_interleave(GROUP)[: flat.numel()].view(values.shape)


@given(arrays.arrays(np.float32, sizes.filter(lambda n: n < 2000), elements=floats), st.integers(0))
def test_an_error_is_below_the_groups_scale(array: np.ndarray, key: int) -> None:
    values = torch.from_numpy(array)
    for name, levels in LEVELS.items():
        error = (coded(name, values, key).double() - values.double()).abs()
        assert (error <= group_bounds(values, levels).double()).all(), name


@given(arrays.arrays(np.float32, st.integers(1, 3 * GROUP), elements=floats), st.integers(0))
def test_rotated_groups_are_near_in_their_norm(array: np.ndarray, key: int) -> None:
    values = torch.from_numpy(array).double()
    for name, levels in LEVELS.items():
        found = coded(name, values.float(), key, rotated=True).double()
        for group, near in zip(values.split(GROUP), found.split(GROUP), strict=True):
            # No rotated value is larger than the group's norm.
            scale = max(float(group.norm()) / levels * (1 + 2.0**-6), SMALLEST)
            assert float((group - near).norm()) <= math.sqrt(GROUP) * scale * (1 + 1e-4)


@given(arrays.arrays(np.float32, sizes.filter(lambda n: n < 2000), elements=floats))
def test_bf16_has_eight_bits(array: np.ndarray) -> None:
    values = torch.from_numpy(array)
    error = (coded("bf16", values).double() - values.double()).abs()
    assert (error <= values.double().abs() * 2.0**-8 + 2.0**-133).all()


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
@given(at=st.integers(0, 300))
@settings(max_examples=20)
def test_what_is_not_finite_stays_so_and_in_its_group(
    name: str, rotated: bool, bad: float, at: int
) -> None:
    values = torch.linspace(-1, 1, 301)
    values[at] = bad
    found = coded(name, values, rotated=rotated)
    if name == "bf16":
        assert not found[at].isfinite()
        assert found.isfinite().sum() == 300
    else:
        groups = zip(values.split(GROUP), found.split(GROUP), strict=True)
        for group, near in groups:
            assert near.isfinite().all() == group.isfinite().all()
            assert near.isfinite().any() == group.isfinite().all(), "all of a group, or none"


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
def test_zeros_are_exact(name: str, rotated: bool) -> None:
    assert torch.equal(coded(name, torch.zeros(3, 130), rotated=rotated), torch.zeros(3, 130))


def test_zeros_beside_large_values_are_exact() -> None:
    values = torch.zeros(256)
    values[::3] = 1e3
    for name in LEVELS:
        assert (coded(name, values)[values == 0] == 0).all()


@given(sizes, st.sampled_from(["fp32", "bf16", "fp16"]))
@settings(max_examples=50)
def test_a_message_is_as_small_as_planned(elements: int, precision: str) -> None:
    for name in ("bf16", "int8", "int4"):
        codec = make_codec(name, elements, WORKSPACE)
        assert codec.wire_bytes == wire_bytes(name, elements, precision)
        if name in QUARTER and elements >= 32:
            assert codec.wire_bytes <= QUARTER[name] * 4 * elements


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("elements", [129, 1024])
def test_low_precision_goes_in_and_comes_out(
    dtype: torch.dtype, rotated: bool, elements: int
) -> None:
    values = torch.linspace(-3, 3, elements).to(dtype)
    for name, levels in LEVELS.items():
        found = coded(name, values, rotated=rotated)
        assert found.dtype == dtype
        bound = 3 / levels * (math.sqrt(GROUP) if rotated else 1.1)
        assert float((found.float() - values.float()).abs().max()) < bound


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_rounding_is_right_on_average(name: str) -> None:
    values = torch.linspace(-1, 1, 200)
    runs = 400
    mean = sum(coded(name, values, noise_key(0, k)) for k in range(runs)) / runs
    scale = 1 / LEVELS[name]
    assert float((mean - values).abs().max()) < 5 * scale * 0.5 / math.sqrt(runs)
    assert abs(float((mean - values).mean())) < scale * 0.5 / math.sqrt(runs)


def test_the_key_fixes_the_rounding_and_nothing_else_does() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    other = Workspace(torch.device("cpu"))
    codec = make_codec("int8", 1000, other)
    wires = [torch.empty(codec.wire_bytes, dtype=torch.uint8) for _ in range(3)]
    for wire, key in zip(wires, (5, 5, noise_key(1, 2)), strict=True):
        codec.encode(values, wire, key)
    again = torch.empty_like(wires[0])
    make_codec("int8", 1000, WORKSPACE).encode(values.view(10, 100), again, 5)
    assert torch.equal(wires[0], wires[1])
    assert torch.equal(wires[0], again)
    assert not torch.equal(wires[0], wires[2])
    assert noise_key(1, 23) != noise_key(12, 3)


def test_a_rotation_spreads_outliers() -> None:
    values = torch.randn(64 * GROUP, generator=torch.Generator().manual_seed(2))
    values[::GROUP] = 60.0
    plain, rotated = (
        float((coded("int4", values, rotated=r) - values).norm()) for r in (False, True)
    )
    assert rotated < 0.7 * plain


def test_parts_follow_each_other() -> None:
    values = torch.randn(2 * WORKSPACE.part + 5 * GROUP + 17)
    for name, levels in LEVELS.items():
        error = (coded(name, values) - values).abs()
        assert (error <= group_bounds(values, levels)).all()


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="no codec is called 'none'"):
        make_codec("none", 1, WORKSPACE)
