from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.cluster.topology import Device, Link, Topology
from ray_train_geo.model.catalog import (
    CATALOG,
    head_flops,
    layer_flops,
    step_flops,
    total_parameters,
)
from ray_train_geo.planning.cost import (
    PipelineTimes,
    SyncGroup,
    backward_s,
    forward_s,
    lower_bound_s,
    optimizer_s,
    pipeline_timeline,
    pipeline_times,
    predict_step,
    sync_groups,
    sync_s,
)
from ray_train_geo.planning.memory import stage_parameters
from ray_train_geo.planning.plan import PipelinePlan, StagePlan
from ray_train_geo.schedule.timeline import Hop
from ray_train_geo.spec import TrainingSpec

DIMS = CATALOG["gpt-tiny"]
TRAINING = TrainingSpec(steps=1, global_batch=8, microbatch=2, seq_len=64)
DEVICES = tuple(Device(f"n{i}/0", f"n{i}", region="ab"[i // 2]) for i in range(4))
BY_ID = {d.id: d for d in DEVICES}
WAN = Link(latency_s=0.1, bandwidth_bytes_per_s=1e6)
TOPOLOGY = Topology(DEVICES, region_links={("a", "b"): WAN, ("b", "a"): WAN})


def pipeline(*stages, microbatches=4, first=0):
    """Stages as (device number, layers, warmup)."""
    plans = tuple(StagePlan(DEVICES[d].id, layers, warmup) for d, layers, warmup in stages)
    return PipelinePlan(plans, microbatches, first)


def predict(*pipelines, mode="allreduce", topology=TOPOLOGY, dims=DIMS, **more):
    return predict_step(dims, TRAINING, pipelines, "1f1b", mode, topology, BY_ID, **more)


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


@pytest.mark.parametrize(
    ("mode", "seconds"),
    [
        ("allreduce", 2 * 3 * 0.1 + 2 * 3 / 4 * 2.0),
        ("sharded_ps", 2 * 0.1 + 2 * 3 / 4 * 2.0),
        ("central_ps", 2 * 0.1 + 2 * 3 * 2.0),
    ],
)
def test_sync_formulas(mode, seconds):
    # The slow link is on the way in each mode: 2 MB at 1 MB/s, 100 ms.
    assert sync_s(mode, 2e6, DEVICES, TOPOLOGY) == pytest.approx(seconds)
    assert sync_s(mode, 2e6, DEVICES[:1], TOPOLOGY) == 0.0


def test_sync_goes_by_the_worst_link_that_is_used():
    slow_back = Link(0.3, 1e5)
    t = Topology(DEVICES, node_links={("n1", "n0"): slow_back})
    assert sync_s("central_ps", 1e5, DEVICES[:2], t) == pytest.approx(2 * 0.3 + 2.0)
    # A ring uses only neighbours: 0>1>2>3>0 does not use 1>0.
    assert sync_s("allreduce", 1e5, DEVICES, t) < 0.01
    assert sync_s("sharded_ps", 1e5, DEVICES, t) > 0.6


def test_groups_of_different_cuts():
    # The picture in training/buckets.py: layers 0 1 | 2 | 3.
    pipelines = [
        pipeline((0, (0, 3), 1), (1, (3, 4), 0)),
        pipeline((2, (0, 2), 1), (3, (2, 4), 0)),
    ]
    untied = replace(DIMS, tied_embeddings=False)
    groups = sync_groups(untied, pipelines)
    assert [g.members for g in groups] == [((0, 0), (1, 0)), ((0, 0), (1, 1)), ((0, 1), (1, 1))]
    assert sum(g.parameters for g in groups) == total_parameters(untied)

    tied = sync_groups(DIMS, pipelines)
    assert tied[:-1] == [
        SyncGroup(g.members, g.parameters - minus * DIMS.vocab_size * DIMS.dim)
        for g, minus in zip(groups, (1, 0, 1), strict=True)
    ]
    everyone = ((0, 0), (0, 1), (1, 0), (1, 1))
    assert tied[-1] == SyncGroup(everyone, DIMS.vocab_size * DIMS.dim)
    assert sum(g.parameters for g in tied) == total_parameters(DIMS)


def test_one_pipeline_syncs_only_a_tied_matrix():
    two = [pipeline((0, (0, 2), 1), (1, (2, 4), 0))]
    assert sync_groups(DIMS, two) == [SyncGroup(((0, 0), (0, 1)), DIMS.vocab_size * DIMS.dim)]
    assert sync_groups(replace(DIMS, tied_embeddings=False), two) == []
    assert sync_groups(DIMS, [pipeline((0, (0, 4), 0))]) == []


def test_one_device_is_compute_and_optimizer():
    whole = pipeline((0, (0, 4), 0))
    f = forward_s(DIMS, TRAINING, (0, 4), DEVICES[0])
    step = optimizer_s(total_parameters(DIMS), DEVICES[0])
    prediction = predict(whole)
    assert prediction.makespan_s == (pytest.approx(4 * 3 * f),)
    assert prediction.sync_s == 0.0
    assert prediction.step_s == pytest.approx(4 * 3 * f + step)


def test_sync_hides_behind_the_last_backward():
    replicas = pipeline((0, (0, 4), 0)), pipeline((1, (0, 4), 0), first=4)
    b = backward_s(DIMS, TRAINING, (0, 4), DEVICES[0])
    size = 4 * total_parameters(DIMS)
    fast = Topology(DEVICES, node_links=both("n0", "n1", Link(0.0, size / (0.5 * b))))
    slow = Topology(DEVICES, node_links=both("n0", "n1", Link(0.0, size / (3 * b))))
    # Two members: each link carries the size once.
    assert predict(*replicas, topology=fast).sync_s == 0.0
    assert predict(*replicas, topology=slow).sync_s == pytest.approx(2 * b)


def test_a_slow_pipeline_holds_up_the_others():
    quick = pipeline((0, (0, 4), 0), microbatches=2)
    slow = pipeline((1, (0, 4), 0), microbatches=6, first=2)
    fast = Topology(DEVICES, node_links=both("n0", "n1", Link(0.0, 1e15)))
    prediction = predict(quick, slow, topology=fast)
    assert prediction.makespan_s[1] == pytest.approx(3 * prediction.makespan_s[0])
    assert prediction.step_s > prediction.makespan_s[1]


def test_the_commit_round_costs_the_longest_round_trip():
    untied = replace(DIMS, tied_embeddings=False)
    across = pipeline((0, (0, 2), 1), (2, (2, 4), 0))
    prediction = predict(across, dims=untied)
    # Stage 0 ends last, by the 100 ms of the gradient's way up; then its update, then the round.
    update_s = optimizer_s(stage_parameters(untied, (0, 2)), DEVICES[0])
    assert prediction.step_s == pytest.approx(prediction.makespan_s[0] + update_s + 0.1 + 0.1)


def both(a, b, link):
    return {(a, b): link, (b, a): link}


def test_hops_are_of_both_directions():
    t = Topology(DEVICES, node_links={("n0", "n1"): Link(0.1, 1e6), ("n1", "n0"): Link(0.3, 2e6)})
    times = pipeline_times(DIMS, TRAINING, [(0, 2), (2, 4)], DEVICES[:2], t)
    size = 2 * 64 * 128 * 4
    assert times.forward_hop == (Hop(0.1, size / 1e6),)
    assert times.backward_hop == (Hop(0.3, size / 2e6),)
    assert times.hop_s() == (pytest.approx((0.1 + size / 1e6 + 0.3 + size / 2e6) / 2),)


@given(st.data())
def test_bounds_are_never_above_the_simulated_time(data):
    stages, microbatches = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    seconds = st.lists(st.floats(0.1, 3), min_size=stages, max_size=stages).map(tuple)
    hops = st.lists(
        st.builds(Hop, st.floats(0, 2), st.floats(0, 2)), min_size=stages - 1, max_size=stages - 1
    ).map(tuple)
    times = PipelineTimes(data.draw(seconds), data.draw(seconds), data.draw(hops), data.draw(hops))
    warmup = sorted(
        data.draw(st.lists(st.integers(0, 4), min_size=stages, max_size=stages)), reverse=True
    )
    run = pipeline_timeline(times, "1f1b", warmup, microbatches)
    for s, bound_s in enumerate(times.bounds_s(microbatches)):
        assert bound_s <= run.last_start_s(s) + 1e-9


@pytest.mark.parametrize("mode", ["allreduce", "sharded_ps", "central_ps"])
def test_a_cutoff_drops_only_slower_steps(mode):
    replicas = pipeline((0, (0, 4), 0)), pipeline((2, (0, 4), 0), first=4)
    step_s = predict(*replicas, mode=mode).step_s
    assert predict(*replicas, mode=mode, cutoff_s=step_s).step_s == step_s
    assert predict(*replicas, mode=mode, cutoff_s=step_s / 2) is None


def test_lower_bound():
    flops = step_flops(DIMS, 64, 8, False)
    assert lower_bound_s(DIMS, TRAINING, DEVICES) == pytest.approx(flops / (4 * 2e10))
