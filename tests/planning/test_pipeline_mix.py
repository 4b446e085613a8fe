from __future__ import annotations

from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_train_geo.cluster.topology import Device, Topology
from ray_train_geo.errors import PlanError
from ray_train_geo.planning.cost import backward_s, forward_s
from ray_train_geo.planning.pipeline_mix import best_mix
from ray_train_geo.planning.problem import Problem
from ray_train_geo.spec import parse_job


def problem(flops, *, layers=4, memory_bytes=4 * 2**30, parallelism=None, scaling=None):
    devices = tuple(
        Device(f"n{i}/0", f"n{i}", flops_per_s=f, memory_bytes=memory_bytes)
        for i, f in enumerate(flops)
    )
    job = parse_job(
        {
            "model": {"layers": layers, "dim": 64, "heads": 4},
            "data": {"path": "python://stdlib"},
            "training": {"steps": 1, "global_batch": 64, "seq_len": 64},
            "parallelism": parallelism or {},
            "scaling": scaling or {},
        }
    )
    return Problem.of(Topology(devices), job, 257)


def period_s(p, chain, cut):
    dims, training = p.dims, p.job.training
    runs = pairwise(cut)
    return max(
        forward_s(dims, training, run, d) + backward_s(dims, training, run, d)
        for run, d in zip(runs, chain, strict=True)
    )


def best_throughput(p, devices):
    """Of all mixes of pipelines on ``devices``, by trying all."""
    layers, best = p.dims.layers, 0.0
    for used in range(1, min(layers, len(devices)) + 1):
        for chosen in combinations(devices[1:], used - 1):
            left = [d for d in devices[1:] if d not in chosen]
            period = min(
                period_s(p, chain, (0, *cut, layers))
                for chain in permutations((devices[0], *chosen))
                for cut in combinations(range(1, layers), used - 1)
            )
            best = max(best, 1 / period + (best_throughput(p, left) if left else 0.0))
    return max(best, best_throughput(p, devices[1:]) if len(devices) > 1 else 0.0)


def check(p, mix):
    used = np.zeros(len(mix.classes), dtype=int)
    for kind in mix.pipelines:
        assert sum(kind.layers) == p.dims.layers
        assert min(kind.layers) >= 1
        chain = [p.topology.devices[mix.classes[c][0]] for c in kind.devices]
        cut = np.cumsum([0, *kind.layers]).tolist()
        assert kind.period_s == pytest.approx(period_s(p, chain, cut))
        for c in kind.devices:
            used[c] += kind.multiplicity
    assert all(used <= [len(c) for c in mix.classes])
    assert mix.throughput <= mix.throughput_bound * (1 + 1e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([1e10, 2e10, 5e10]), min_size=1, max_size=4))
def test_no_mix_is_better_than_the_bound(flops):
    p = problem(flops)
    mix = best_mix(p)
    check(p, mix)
    assert best_throughput(p, p.topology.devices) <= mix.throughput_bound * (1 + 1e-6)


def test_equal_devices_are_replicas():
    p = problem([2e10] * 6)
    mix = best_mix(p)
    (kind,) = mix.pipelines
    assert (kind.devices, kind.layers, kind.multiplicity) == ((0,), (4,), 6)
    assert mix.throughput == pytest.approx(mix.throughput_bound, rel=2e-3)


def test_what_the_job_fixes_is_obeyed():
    deep = best_mix(problem([2e10] * 6, parallelism={"stages": 3}))
    assert {len(k.devices) for k in deep.pipelines} == {3}
    few = best_mix(problem([2e10] * 6, parallelism={"pipelines": 2}))
    assert sum(k.multiplicity for k in few.pipelines) <= 2
    least = best_mix(problem([2e10] * 6, scaling={"max_devices": 4}))
    assert sum(len(k.devices) * k.multiplicity for k in least.pipelines) <= 4


def test_memory_makes_pipelines_deeper():
    p = problem([2e10] * 4)
    device = p.topology.devices[0]
    half = p.memory((0, 2), 1, device, 1).total
    tight = problem([2e10] * 4, memory_bytes=half)
    mix = best_mix(tight)
    check(tight, mix)
    assert min(len(k.devices) for k in mix.pipelines) > 1
    with pytest.raises(PlanError, match="memory"):
        best_mix(problem([2e10], memory_bytes=1000))


def test_thousands_of_devices_in_many_classes():
    p = problem([1e10 * (1 + i % 12) for i in range(3000)], layers=24)
    mix = best_mix(p)
    check(p, mix)
    assert mix.throughput >= 0.98 * mix.throughput_bound
