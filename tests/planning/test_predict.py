from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_train_geo.cluster.topology import Device, Link, Topology, Uplink
from ray_train_geo.model.catalog import CATALOG, total_parameters
from ray_train_geo.planning.cost import backward_s, forward_s, optimizer_s
from ray_train_geo.planning.memory import stage_parameters
from ray_train_geo.planning.plan import PipelinePlan, StagePlan
from ray_train_geo.planning.predict import predict as predict_parts
from ray_train_geo.planning.problem import PlanOptions, Problem
from ray_train_geo.spec import GradientSyncName, ScheduleName, parse_job

DIMS = CATALOG["gpt-tiny"]
JOB = parse_job(
    {
        "model": {"name": "gpt-tiny"},
        "data": {"path": "python://stdlib"},
        "training": {"steps": 1, "global_batch": 16, "microbatch": 2, "seq_len": 64},
    }
)
TRAINING = JOB.training
DEVICES = tuple(Device(f"n{i}/0", f"n{i}", region="ab"[i // 2]) for i in range(4))
WAN = Link(latency_s=0.1, bandwidth_bytes_per_s=1e6)
TOPOLOGY = Topology(DEVICES, region_links={("a", "b"): WAN, ("b", "a"): WAN})


def pipeline(*stages, microbatches=4, first=0, codec="none"):
    """Stages as (device number, layers, warmup)."""
    plans = tuple(
        StagePlan(DEVICES[d].id, layers, warmup, 0, codec) for d, layers, warmup in stages
    )
    return PipelinePlan(plans, microbatches, first)


def predict(*pipelines, mode="allreduce", topology=TOPOLOGY, dims=DIMS, schedule="1f1b"):
    return predict_parts(Problem(topology, JOB, dims), pipelines, schedule, mode)


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


def test_the_commit_costs_the_way_of_the_last_sums_to_rank_0():
    untied = replace(DIMS, tied_embeddings=False)
    across = pipeline((0, (0, 2), 1), (2, (2, 4), 0))
    prediction = predict(across, dims=untied)
    # Stage 0 ends last, by the 100 ms of the gradient's way up, and is rank 0 itself.
    update_s = optimizer_s(stage_parameters(untied, (0, 2)), DEVICES[0])
    assert prediction.step_s == pytest.approx(prediction.makespan_s[0] + update_s)


def both(a, b, link):
    return {(a, b): link, (b, a): link}


def test_hops_are_of_both_directions():
    untied = replace(DIMS, tied_embeddings=False)
    two = pipeline((0, (0, 2), 1), (1, (2, 4), 0), microbatches=1)
    size = 2 * 64 * 128 * 4
    down, up = Link(0.1, 1e6), Link(0.3, 2e6)
    quick = predict(two, dims=untied, topology=Topology(DEVICES, node_links=both("n0", "n1", FAST)))
    links = {("n0", "n1"): down, ("n1", "n0"): up}
    slow = predict(two, dims=untied, topology=Topology(DEVICES, node_links=links))
    more = down.transfer_s(size) + up.transfer_s(size)
    assert slow.makespan_s[0] - quick.makespan_s[0] == pytest.approx(more)


def test_a_codec_shrinks_messages_and_costs_compute():
    untied = replace(DIMS, tied_embeddings=False)
    link = both("n0", "n1", Link(0.0, 1e5))
    topology = Topology(DEVICES, node_links=link)
    spans = {}
    for codec in ("none", "bf16", "int8", "int4"):
        two = pipeline((0, (0, 2), 1), (1, (2, 4), 0), microbatches=1, codec=codec)
        spans[codec] = predict(two, dims=untied, topology=topology).makespan_s[0]
    elements = 2 * 64 * 128
    assert spans["none"] - spans["bf16"] == pytest.approx(2 * 2 * elements / 1e5, rel=1e-3)
    assert spans["none"] > spans["bf16"] > spans["int8"] > spans["int4"]


def test_pipelines_share_a_nic():
    untied = replace(DIMS, tied_embeddings=False)
    devices = (
        *(replace(DEVICES[i], id=f"x/{i}", node="x") for i in range(2)),
        *DEVICES[2:],
    )
    nic = {"x": Uplink(1e6, 1e6)}
    free = Topology(
        devices, node_uplinks={"x": Uplink(1e12, 1e12)}, region_links=both("a", "b", WAN)
    )
    shared = replace(free, node_uplinks=nic)

    def two(one):
        return [
            PipelinePlan(
                (StagePlan(f"x/{i}", (0, 2), 1), StagePlan(f"n{i + 2}/0", (2, 4), 0)), 4, 4 * i
            )
            for i in range(one)
        ]

    alone = predict(*two(1), dims=untied, topology=shared).makespan_s[0]
    assert alone == pytest.approx(predict(*two(1), dims=untied, topology=free).makespan_s[0])
    both_s = predict(*two(2), dims=untied, topology=shared).makespan_s
    messages = 2 * 4 * 2 * 64 * 128 * 4  # four out of either device, at 1 MB/s together
    assert min(both_s) > alone
    assert max(both_s) > messages / 1e6


FAST = Link(0.0, 1e15)


def test_gpipe_runs_all_forwards_first():
    two = pipeline((0, (0, 2), 4), (1, (2, 4), 4))
    topology = Topology(DEVICES, node_links=both("n0", "n1", FAST))
    run = predict(two, topology=topology, schedule="gpipe").timelines[0]
    assert [a.kind for a in run.actions[0]] == ["F"] * 4 + ["B"] * 4


def test_devices_without_a_link_can_not_talk():
    with pytest.raises(ValueError, match="finite"):
        predict(
            pipeline((0, (0, 2), 1), (2, (2, 4), 0)), topology=Topology(DEVICES, default_link=None)
        )


def test_options_do_not_change_a_prediction():
    two = pipeline((0, (0, 2), 1), (1, (2, 4), 0))
    plain = predict(two).step_s
    problem = Problem(TOPOLOGY, JOB, DIMS, PlanOptions(objective="dollars"))
    assert predict_parts(problem, [two], "1f1b", "allreduce").step_s == plain


BUSY = tuple(
    Device(f"{node}/{i}", node, region=node[0]) for node in ("a0", "b0", "b1") for i in "01"
)
PLACES = ["a", "b"]
times_s = st.sampled_from([0.0, 1e-3, 0.02])
rates = st.sampled_from([1e5, 1e6, 4e6, 1e8])
gains = st.sampled_from([1.0, 1.0, 1.01, 1.5, 100.0])


@settings(max_examples=40)
@given(
    st.permutations(range(6)),
    st.sampled_from(get_args(ScheduleName)),
    st.sampled_from(get_args(GradientSyncName)),
    st.data(),
)
def test_a_better_network_slows_no_plan(order, schedule, mode, data):
    """Gradient sync, the update and the commit included; one thing is better, or all are."""
    pipelines = [
        PipelinePlan(
            tuple(
                StagePlan(BUSY[d].id, layers, 2 - s, 1)
                for s, (d, layers) in enumerate(zip(chain, cut, strict=True))
            ),
            4,
            first,
        )
        for chain, cut, first in (
            (order[:3], ((0, 1), (1, 2), (2, 4)), 0),
            (order[3:], ((0, 2), (2, 3), (3, 4)), 4),
        )
    ]
    pairs = list(product(PLACES, repeat=2))
    links = {pair: Link(data.draw(times_s), data.draw(rates)) for pair in pairs}
    nics = {d.node: Uplink(data.draw(rates), data.draw(rates)) for d in BUSY}
    uplinks = {(a, b): data.draw(rates) for a, b in pairs if a != b}
    before = Topology(BUSY, region_links=links, node_uplinks=nics, region_uplinks=uplinks)
    after = replace(
        before,
        region_links={
            pair: Link(
                link.latency_s / data.draw(gains), link.bandwidth_bytes_per_s * data.draw(gains)
            )
            for pair, link in links.items()
        },
        node_uplinks={
            node: Uplink(nic.out_bytes_per_s * data.draw(gains), nic.in_bytes_per_s)
            for node, nic in nics.items()
        },
        region_uplinks={pair: rate * data.draw(gains) for pair, rate in uplinks.items()},
    )
    slow, fast = (
        predict(*pipelines, mode=mode, schedule=schedule, topology=topology)
        for topology in (before, after)
    )
    assert fast.step_s <= slow.step_s * (1 + 1e-9)


def test_an_action_that_takes_longer_holds_all_that_wait_for_it():
    parts = (pipeline(*[(d, (d, d + 1), 3 - d) for d in range(4)], microbatches=4),) * 2
    problem = Problem(TOPOLOGY, JOB, DIMS)
    usual = predict(*parts).makespan_s

    def makespans(pace):
        return predict_parts(problem, parts, "1f1b", "allreduce", pace).makespan_s

    steady = [((1.0,) * 8,) * 4] * 2
    assert makespans(steady) == usual
    # The second pipeline's first forward takes twice as long: all of its pipeline waits for it.
    slow = ((2.0, *(1.0,) * 7), *((1.0,) * 8,) * 3)
    f = forward_s(DIMS, TRAINING, (0, 1), DEVICES[0])
    assert makespans([steady[0], slow]) == (usual[0], pytest.approx(usual[1] + f))
    with pytest.raises(ValueError, match="pace is needed for every action"):
        makespans([steady[0], ((1.0,) * 7,) * 4])
