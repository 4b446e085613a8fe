"""A bound that some plan beats is worse than none: random plans try to beat them here."""

from __future__ import annotations

from itertools import combinations, pairwise, permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_train_geo.cluster.topology import Device, Link, Topology, Uplink
from ray_train_geo.errors import PlanError
from ray_train_geo.planning.certify import dollars_bound, step_time_bound
from ray_train_geo.planning.certify_sync import components
from ray_train_geo.planning.plan import PipelinePlan, StagePlan
from ray_train_geo.planning.predict import predict
from ray_train_geo.planning.problem import Problem
from ray_train_geo.spec import parse_job

MODES = ("allreduce", "sharded_ps", "central_ps")
CODECS = ("none", "bf16", "int8", "int4")


def problem(topology, *, layers=4, parallelism=None, scaling=None, tied=True, **training):
    job = parse_job(
        {
            "model": {"layers": layers, "dim": 64, "heads": 4, "tied_embeddings": tied},
            "data": {"path": "python://stdlib"},
            "training": {"steps": 1, "global_batch": 8, "seq_len": 64} | training,
            "parallelism": parallelism or {},
            "scaling": scaling or {},
        }
    )
    return Problem.of(topology, job, 257)


def machines(count, *, per_node=1, regions=1, **changes):
    return tuple(
        Device(
            f"n{i // per_node}/{i % per_node}",
            f"n{i // per_node}",
            region=f"r{i // per_node % regions}",
            **({"price_per_hour": 1.0} | changes),
        )
        for i in range(count)
    )


def pipelines_of(chains, cuts, microbatches, warmups, codecs):
    plans, first = [], 0
    for chain, cut, count, warmup, names in zip(
        chains, cuts, microbatches, warmups, codecs, strict=True
    ):
        stages = tuple(
            StagePlan(d.id, (cut[s], cut[s + 1]), warmup[s], codec=names[s])
            for s, d in enumerate(chain)
        )
        plans.append(PipelinePlan(stages, count, first))
        first += count
    return plans


def dollars(p, plans, step_s):
    used = [p.devices[s.device] for plan in plans for s in plan.stages]
    tokens = p.job.training.tokens_per_step
    return sum(d.price_per_hour for d in used) / 3600 * step_s / (tokens / 1e6)


@st.composite
def topologies(draw):
    regions = draw(st.integers(1, 3))
    devices, nodes = [], draw(st.integers(1, 4))
    for n in range(nodes):
        for i in range(draw(st.integers(1, 3))):
            flops, price = draw(st.sampled_from([(2e10, 1.0), (5e10, 3.0), (8e9, 0.2)]))
            region = f"r{n % regions}"
            devices.append(
                Device(f"n{n}/{i}", f"n{n}", region, flops_per_s=flops, price_per_hour=price)
            )
    links = st.builds(
        Link,
        latency_s=st.sampled_from([0.0, 1e-3, 2e-2]),
        bandwidth_bytes_per_s=st.sampled_from([1e6, 2e7, 1e9]),
        window_bytes=st.sampled_from([1e5, float("inf")]),
    )
    names = [f"r{r}" for r in range(regions)]
    by_node = {}
    if draw(st.booleans()) and nodes > 1:
        by_node = {("n0", "n1"): draw(links), ("n1", "n0"): draw(links)}
    nic = {"n0": Uplink(draw(st.sampled_from([1e6, 1e8])), 2e7)} if draw(st.booleans()) else {}
    return Topology(
        tuple(devices),
        node_links=by_node,
        region_links={pair: draw(links) for pair in product(names, names)},
        node_uplinks=nic,
    )


@st.composite
def plans(draw, p):
    layers, total = p.dims.layers, p.job.training.total_microbatches
    left = draw(st.permutations(p.topology.devices))
    chains = []
    while left and len(chains) < total and (not chains or draw(st.booleans())):
        depth = draw(st.integers(1, min(layers, len(left))))
        chains.append(left[:depth])
        left = left[depth:]
    cuts = []
    for chain in chains:
        inner = draw(st.permutations(range(1, layers)))[: len(chain) - 1]
        cuts.append((0, *sorted(inner), layers))
    more = draw(st.permutations(range(1, total)))[: len(chains) - 1]
    counts = np.diff([0, *sorted(more), total]).tolist()
    warmups = [
        sorted((draw(st.integers(0, m - 1)) for _ in chain), reverse=True)
        for chain, m in zip(chains, counts, strict=True)
    ]
    codecs = [[draw(st.sampled_from(CODECS)) for _ in chain] for chain in chains]
    return pipelines_of(chains, cuts, counts, warmups, codecs)


@settings(max_examples=20, deadline=None)
@given(st.data(), st.sampled_from(["1f1b", "gpipe"]), st.booleans())
def test_no_random_plan_beats_the_bounds(data, schedule, tied):
    p = problem(data.draw(topologies()), tied=tied, parallelism={"schedule": schedule})
    time_s = step_time_bound(p, MODES, CODECS).value
    price = dollars_bound(p, MODES, CODECS).value
    assert time_s > 0
    for _ in range(3):
        plan = data.draw(plans(p))
        for mode in MODES:
            step_s = predict(p, plan, schedule, mode).step_s
            assert step_s >= time_s * (1 - 1e-9)
            assert dollars(p, plan, step_s) >= price * (1 - 1e-9)


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


def test_far_away_regions_cost_sync_or_time():
    near, far = Link(1e-4, 1e9), Link(0.1, 1e6)
    devices = machines(4, regions=2)
    links = {("r0", "r0"): near, ("r1", "r1"): near, ("r0", "r1"): near, ("r1", "r0"): near}
    apart = links | {("r0", "r1"): far, ("r1", "r0"): far}

    def bound(region_links):
        p = problem(Topology(devices, region_links=region_links), global_batch=64)
        return step_time_bound(p, MODES, ["none"]).value

    assert bound(apart) > 1.1 * bound(links)


def test_too_little_memory_is_refused():
    with pytest.raises(PlanError, match="memory for the model"):
        step_time_bound(problem(Topology(machines(2, memory_bytes=1000))), MODES, ["none"])


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
