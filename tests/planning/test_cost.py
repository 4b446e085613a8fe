from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from ray_train_geo.cluster.topology import Device, Link, Topology
from ray_train_geo.model.catalog import CATALOG, head_flops, layer_flops, step_flops
from ray_train_geo.planning.cost import (
    backward_s,
    committed_s,
    forward_s,
    lower_bound_s,
    optimizer_s,
)
from ray_train_geo.planning.link_table import LinkTable
from ray_train_geo.spec import TrainingSpec

DIMS = CATALOG["gpt-tiny"]
TRAINING = TrainingSpec(steps=1, global_batch=8, microbatch=2, seq_len=64)
DEVICES = tuple(Device(f"n{i}/0", f"n{i}", region="ab"[i // 2]) for i in range(4))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cut", [(0, 4), (0, 1, 4), (0, 2, 3, 4)])
def test_stage_times_add_up_to_the_step_flops(cut, recompute):
    training = TRAINING.model_copy(update={"recompute": recompute})
    device = replace(DEVICES[0], type="gpu")
    seconds = sum(
        forward_s(DIMS, training, run, device) + backward_s(DIMS, training, run, device)
        for run in pairwise(cut)
    )
    flops = step_flops(DIMS, 64, 8, recompute)
    # 4 microbatches; what is over is the embedding, which moves bytes and computes nothing.
    assert 4 * seconds == pytest.approx(flops / device.flops_per_s, rel=1e-3)
    assert 4 * seconds > flops / device.flops_per_s


def test_forward_and_backward_of_inner_and_last_stages():
    device = DEVICES[0]
    layer, head = layer_flops(DIMS, 64, 2), head_flops(DIMS, 64, 2)
    again = TRAINING.model_copy(update={"recompute": True})
    inner = 2 * layer / device.flops_per_s
    assert forward_s(DIMS, TRAINING, (1, 3), device) == pytest.approx(inner)
    assert backward_s(DIMS, TRAINING, (1, 3), device) == pytest.approx(2 * inner)
    assert backward_s(DIMS, again, (1, 3), device) == pytest.approx(3 * inner)
    last = (layer + head) / device.flops_per_s
    assert forward_s(DIMS, TRAINING, (3, 4), device) == pytest.approx(last)
    assert backward_s(DIMS, again, (3, 4), device) == pytest.approx(
        2 * last + layer / device.flops_per_s
    )


def test_an_update_is_bound_by_memory():
    assert optimizer_s(10**9, DEVICES[0]) == pytest.approx(2.8)
    assert optimizer_s(10**9, replace(DEVICES[0], type="A100")) == pytest.approx(0.028)


def test_a_step_is_committed_when_the_last_sums_are_at_rank_0():
    links = {("a", "b"): Link(0.1, 1e6), ("b", "a"): Link(0.3, 1e6)}
    table = LinkTable.of(Topology(DEVICES, region_links=links))

    def committed(updated_s, workers, firsts):
        return committed_s(np.array(updated_s), np.array(workers), np.array(firsts), table)

    # One pipeline of devices 0, 1 in region a and 2 in b: only the sums' way back counts.
    assert committed([5.0, 5.0, 5.0], [0, 1, 2], [0, 0, 0]) == pytest.approx(5.3)
    assert committed([6.0, 5.0, 5.0], [0, 1, 2], [0, 0, 0]) == pytest.approx(6.0)
    # A pipeline that starts in b begins when rank 0's word is there.
    assert committed([5.0, 5.0], [0, 2], [0, 2]) == pytest.approx(0.1 + 5.0 + 0.3)
    assert committed([5.0], [2], [2]) == 5.0


def test_lower_bound():
    flops = step_flops(DIMS, 64, 8, False)
    assert lower_bound_s(DIMS, TRAINING, DEVICES) == pytest.approx(flops / (4 * 2e10))
