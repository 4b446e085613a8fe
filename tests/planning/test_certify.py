"""A bound that some plan beats is worse than none: random plans try to beat them here."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise, permutations, product

import numpy as np
import pytest
from certify_cases import (
    CODECS,
    MODES,
    SCHEDULES,
    machines,
    pipelines_of,
    plans,
    problem,
    topologies,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_train_geo.cluster.topology import Device, Link, Topology
from ray_train_geo.errors import PlanError
from ray_train_geo.planning.certify import dollars_bound, step_time_bound
from ray_train_geo.planning.certify_chains import Chains, DeviceClasses
from ray_train_geo.planning.certify_cuts import layer_sync_s, least_s, region_cuts
from ray_train_geo.planning.certify_nics import busiest_nic_s, node_share
from ray_train_geo.planning.certify_packing import Limits, can_reach, pack
from ray_train_geo.planning.certify_sync import components
from ray_train_geo.planning.predict import predict
from ray_train_geo.planning.problem import PlanOptions, Problem
from ray_train_geo.planning.sync_cost import _nic_bytes


def dollars(p, plans, step_s):
    used = [p.devices[s.device] for plan in plans for s in plan.stages]
    tokens = p.job.training.tokens_per_step
    return sum(d.price_per_hour for d in used) / 3600 * step_s / (tokens / 1e6)


@settings(max_examples=6, deadline=None)
@given(st.data(), st.sampled_from([*SCHEDULES, "auto"]), st.booleans())
def test_no_random_plan_beats_the_bounds(data, schedule, tied):
    p = problem(data.draw(topologies()), tied=tied, parallelism={"schedule": schedule})
    time_s = step_time_bound(p, MODES, CODECS).value
    price = dollars_bound(p, MODES, CODECS).value
    assert time_s > 0
    for _ in range(3):
        plan = data.draw(plans(p))
        for mode, used in product(MODES, p.schedules):
            step_s = predict(p, plan, used, mode).step_s
            assert step_s >= time_s * (1 - 1e-9)
            assert dollars(p, plan, step_s) >= price * (1 - 1e-9)


def only_as_much_memory_as(p, plan, schedule):
    """``p`` on devices that hold what ``plan`` gives them, and not a byte more."""
    needed = {}
    for pipeline in plan:
        for stage in pipeline.stages:
            held = pipeline.microbatches if schedule == "gpipe" else stage.warmup + 1
            later = stage.deferred + 1 if schedule == "zero-bubble" else 0
            device = p.devices[stage.device]
            found = p.memory(stage.layers, held, device, len(plan), later)
            needed[stage.device] = found.total
    devices = [replace(d, memory_bytes=needed.get(d.id, 1)) for d in p.topology.devices]
    return Problem.of(p.topology.with_devices(devices), p.job, 257)


@settings(max_examples=8, deadline=None)
@given(st.data(), st.sampled_from(SCHEDULES))
def test_a_plan_that_fills_all_memory_does_not_beat_the_bound(data, schedule):
    ample = problem(data.draw(topologies()), parallelism={"schedule": schedule})
    plan = data.draw(plans(ample))
    scarce = only_as_much_memory_as(ample, plan, schedule)
    mode = data.draw(st.sampled_from(MODES))
    step_s = predict(ample, plan, schedule, mode).step_s
    assert step_s >= step_time_bound(scarce, [mode], CODECS).value * (1 - 1e-9)


def all_plans(p):
    """Every plan, with as much warmup as there are microbatches."""
    layers, total = p.dims.layers, p.job.training.total_microbatches
    devices = p.topology.devices
    for used in range(1, len(devices) + 1):
        for line, count in product(permutations(devices, used), range(1, used + 1)):
            for ends in combinations(range(1, used), count - 1):
                chains = [line[a:b] for a, b in pairwise((0, *ends, used))]
                if max(map(len, chains)) > layers:
                    continue
                options = [
                    [(0, *c, layers) for c in combinations(range(1, layers), len(chain) - 1)]
                    for chain in chains
                ]
                splits = combinations(range(1, total), count - 1)
                for cuts, split in product(list(product(*options)), splits):
                    many = np.diff([0, *split, total]).tolist()
                    warmups = [[m - 1] * len(c) for c, m in zip(chains, many, strict=True)]
                    codecs = [["none"] * len(c) for c in chains]
                    yield pipelines_of(chains, cuts, many, warmups, codecs)


@pytest.mark.parametrize("flops", [(2e10, 2e10, 2e10), (2e10, 5e10, 2e10)])
def test_bounds_are_close_to_the_best_of_all_plans(flops):
    devices = tuple(
        Device(d.id, d.node, flops_per_s=f, price_per_hour=f / 1e10)
        for d, f in zip(machines(3), flops, strict=True)
    )
    p = problem(Topology(devices), layers=3, global_batch=6)
    steps = [(plan, predict(p, plan, "1f1b", "sharded_ps").step_s) for plan in all_plans(p)]
    best_s = min(step_s for _, step_s in steps)
    cheapest = min(dollars(p, plan, step_s) for plan, step_s in steps)
    time_s = step_time_bound(p, ["sharded_ps"], ["none"]).value
    price = dollars_bound(p, ["sharded_ps"], ["none"]).value
    assert 0.85 * best_s <= time_s <= best_s
    assert 0.97 * cheapest <= price <= cheapest


def test_one_device_is_certified_exactly():
    p = problem(Topology(machines(1)))
    (plan,) = all_plans(p)
    step_s = predict(p, plan, "1f1b", "allreduce").step_s
    assert step_time_bound(p, MODES, ["none"]).value == pytest.approx(step_s, rel=3e-3)
    price = dollars_bound(p, MODES, ["none"]).value
    assert price == pytest.approx(dollars(p, plan, step_s), rel=2e-2)


def test_what_the_job_fixes_makes_the_bound_larger():
    topology = Topology(machines(6))

    def bound(parallelism=None, scaling=None):
        p = problem(topology, parallelism=parallelism, scaling=scaling, global_batch=24)
        return step_time_bound(p, MODES, ["none"]).value

    free = bound()
    assert bound({"stages": 3}) > free
    assert bound({"layers": [1]}) > bound({"stages": 2}) > free
    assert bound({"pipelines": 1}) > free
    assert bound({"pipelines": 2, "microbatches": [1, 23]}) > bound({"pipelines": 2})
    assert bound(scaling={"max_devices": 3}) > 1.9 * free


@pytest.mark.parametrize(("least", "worth"), [(0, 20), (2, 20), (3, 12), (4, 4), (5, 0)])
def test_no_fewer_pipelines_than_there_must_be(least, worth):
    """On four devices: a pipeline of one is worth 1, and one of two is worth 10."""
    classes = DeviceClasses.of(problem(Topology(machines(4))))
    one = np.array([[1], [0]])
    chains = Chains(2, first=one, inner=0 * one[:, None], last=one[:, None], only=2 - 2 * one)
    limits = Limits(pipelines=8, least_pipelines=least)
    values = np.array([10.0, 1.0])
    assert not can_reach(worth + 0.1, values, chains, classes, limits)
    assert max(0.0, pack(values, chains, classes, limits).bound) == pytest.approx(worth)
    assert not worth or can_reach(worth, values, chains, classes, limits)


def test_few_pipelines_on_many_devices():
    """Where pipelines are what is short, devices cost nothing at the margin."""
    classes = DeviceClasses.of(problem(Topology(machines(40))))
    one = np.array([[1], [0]])
    chains = Chains(2, first=one, inner=0 * one[:, None], last=one[:, None], only=2 - 2 * one)
    found = pack(np.array([10.0, 1.0]), chains, classes, Limits(pipelines=3))
    assert found.bound == pytest.approx(30.0)


def test_far_away_regions_cost_sync_or_time():
    near, far = Link(1e-4, 1e9), Link(0.1, 1e6)
    devices = machines(4, regions=2)
    links = {("r0", "r0"): near, ("r1", "r1"): near, ("r0", "r1"): near, ("r1", "r0"): near}
    apart = links | {("r0", "r1"): far, ("r1", "r0"): far}

    def bound(region_links):
        p = problem(Topology(devices, region_links=region_links), global_batch=64)
        return step_time_bound(p, MODES, ["none"]).value

    assert bound(apart) > 1.1 * bound(links)


def two_regions(uplink_bytes_per_s):
    fast = Link(1e-4, 1e9)
    names = ["r0", "r1"]
    uplinks = dict.fromkeys(permutations(names, 2), uplink_bytes_per_s)
    return Topology(
        machines(6, regions=2),
        region_links=dict.fromkeys(product(names, names), fast),
        region_uplinks=uplinks,
    )


def test_a_slow_uplink_leaves_one_side_at_most_its_own_work():
    def bound(rate):
        return step_time_bound(problem(two_regions(rate), global_batch=64), MODES, ["none"]).value

    both = bound(1e9)
    assert 1.9 * both < bound(1e3)
    assert both < bound(3e5) < bound(1e5) < bound(1e3)


def test_of_a_cut_all_messages_or_one_side_or_something_between():
    p = problem(two_regions(1e6), global_batch=64)
    classes = DeviceClasses.of(p)
    cut, other = region_cuts(p.table, classes)
    assert cut == other  # two equal regions
    assert cut.seconds_per_byte == pytest.approx(1e-6)
    everything_s = 64 * p.message_bytes * cut.seconds_per_byte
    head = classes.head_s[0].sum() / classes.layer_s[0].sum()
    one_side_s = 64 * (4 + head) / cut.inside
    # Free sync and cheap messages: nothing but the messages counts, or the devices.
    free = least_s(p, cut, classes, p.message_bytes, 0.0)
    assert free <= min(everything_s, one_side_s)
    assert least_s(p, cut, classes, 1e6 * p.message_bytes, 1e6) == pytest.approx(one_side_s, 1e-3)
    assert free <= least_s(p, cut, classes, p.message_bytes, one_side_s / 10) <= one_side_s
    assert layer_sync_s(p, cut, "allreduce", 1) == 0.0
    ring, central = (layer_sync_s(p, cut, mode, 4) for mode in ("allreduce", "central_ps"))
    assert ring == pytest.approx(1.5 * central)


def carried(mode, size, nodes):
    """Seconds at a byte a second that planning.sync_cost gives each node; central: both ways."""
    node = np.array([nodes])
    out, into = (load[0] * size for load in _nic_bytes(mode, np.ones(1), node))
    parts = (out + into) / 2 if mode == "central_ps" else np.maximum(out, into)
    return np.bincount(nodes, parts, minlength=4)


@pytest.mark.parametrize("mode", MODES)
def test_no_nic_carries_less_than_its_share(mode):
    """Of every placement of two first and two last stages on four nodes of three."""
    table = problem(Topology(machines(12, per_node=3))).table
    nic = table.out_seconds_per_byte[0] * (2 if mode == "central_ps" else 1)
    share = float(node_share(mode, 4, np.array(3)))
    busiest = []
    for nodes in product(range(4), repeat=4):
        if max(map(nodes.count, nodes)) > 3:
            continue
        tokens, first = carried(mode, 1.0, nodes), carried(mode, 0.3, nodes[:2])
        assert tokens[list(nodes)].min() >= share - 1e-9
        busiest.append((tokens + first).max() * nic)
    least_s = busiest_nic_s(table, mode, 2, 4, 1.0, 0.3)
    tight = 0.99 if mode == "sharded_ps" else 0.8
    assert tight * min(busiest) <= least_s <= min(busiest) * (1 + 1e-9)
    assert busiest_nic_s(table, mode, 2, 3, 1.0, 0.3) == 0.0


def test_a_stage_with_memory_for_one_microbatch_waits_for_its_way_back():
    """Two stages, of which the first holds one microbatch: none of their computing overlaps."""
    ample = problem(Topology(machines(2)), global_batch=64, parallelism={"stages": 2})
    needed = ample.memory((0, 2), 1, ample.topology.devices[0], 1).total
    scarce = problem(
        Topology(machines(2, memory_bytes=needed)), global_batch=64, parallelism={"stages": 2}
    )
    (first, last) = scarce.topology.devices
    assert scarce.most_in_flight((0, 2), first, 9, 1) == 1
    plan = pipelines_of([(first, last)], [(0, 2, 4)], [64], [(0, 0)], [("none", "none")])
    step_s = predict(scarce, plan, "1f1b", "sharded_ps").step_s
    bounds = [step_time_bound(p, ["sharded_ps"], ["none"]).value for p in (ample, scarce)]
    assert 1.5 * bounds[0] < bounds[1] <= step_s
    assert step_s < 1.05 * bounds[1]


def test_too_little_memory_is_refused():
    with pytest.raises(PlanError, match="memory for the model"):
        step_time_bound(problem(Topology(machines(2, memory_bytes=1000))), MODES, ["none"])


def test_limits_that_allow_no_plan_are_refused():
    p = problem(Topology(machines(1)))
    poor = replace(p, options=PlanOptions(max_dollars_per_hour=0.5))
    with pytest.raises(PlanError, match="dollars per hour"):
        step_time_bound(poor, MODES, ["none"])


def test_the_argument_names_what_is_weak():
    shared = step_time_bound(problem(Topology(machines(4, per_node=2))), MODES, ["none"])
    assert "share no NIC" in shared.argument
    free = dollars_bound(problem(Topology(machines(2, price_per_hour=0.0))), MODES, ["none"])
    assert free.value == 0.0
    assert "free" in free.argument


def test_components_grow_together():
    inf = np.inf
    cost = np.array([[5.0, 2.0, 9.0], [2.0, 1.0, 3.0], [9.0, 3.0, inf]])
    grown = [(value, labels.tolist()) for value, labels in components(cost)]
    assert grown == [(1.0, [0, 1, 2]), (2.0, [0, 0, 2]), (3.0, [0, 0, 0])]
