"""What plans cost under local SGD: no sums across islands, merges once a round."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from ray_train_geo.cluster.topology import Device, Link, Topology
from ray_train_geo.planning.islands import islands, together
from ray_train_geo.planning.planner import plan
from ray_train_geo.planning.predict import predict_plan
from ray_train_geo.planning.problem import PlanOptions
from ray_train_geo.spec import JobSpec, parse_job

RAW = {
    "model": {"layers": 4, "dim": 256, "heads": 4, "tied_embeddings": False},
    "data": {"path": "x"},
    "training": {"steps": 9, "global_batch": 16, "microbatch": 2, "seq_len": 128},
    "parallelism": {"pipelines": 4, "stages": 1},
}


def world(bandwidth_bytes_per_s: float, latency_s: float = 0.1) -> Topology:
    """Two devices in each of two regions."""
    devices = tuple(
        Device(f"{r}{i}", f"{r}{i}", r, flops_per_s=1e12) for r in ("ohio", "seoul") for i in "01"
    )
    far, near = Link(latency_s, bandwidth_bytes_per_s), Link(0.0001, 1e10)
    links = {(a, b): near if a == b else far for a in ("ohio", "seoul") for b in ("ohio", "seoul")}
    return Topology(devices, region_links=links)


def job(**local_sgd: object) -> JobSpec:
    return parse_job({**RAW, "local_sgd": local_sgd} if local_sgd else RAW)


def step_s(where: Topology, **local_sgd: object) -> float:
    return plan(where, job(**local_sgd)).predicted_step_s


def test_islands_of_a_plan() -> None:
    found = plan(world(1e9), job())
    assert [i.pipelines for i in islands(found, "pipelines")] == [(0,), (1,), (2,), (3,)]
    regions = islands(found, "regions")
    assert sorted(r for i in regions for r in i.ranks) == [0, 1, 2, 3]
    for island in regions:
        assert len({found.devices[rank].region for rank in island.ranks}) == 1
    assert sum(i.microbatches for i in regions) == 8
    assert together(["a", "ab", "a"], "regions") == [[0, 2], [1]]


def test_slow_links_cost_once_a_round() -> None:
    slow, fast = world(1e6), world(1e10)
    every_step = step_s(slow) - step_s(fast)
    rounds = {h: step_s(slow, inner_steps=h) - step_s(fast, inner_steps=h) for h in (10, 100)}
    assert rounds[10] == pytest.approx(10 * rounds[100], rel=0.05)
    assert rounds[10] < every_step / 5
    # A codec takes its share of the bytes; a delay hides what it can.
    coded = step_s(slow, inner_steps=10, codec="int4") - step_s(fast, inner_steps=10, codec="int4")
    assert coded < rounds[10] / 6
    delayed = step_s(world(1e8), inner_steps=100, delay_steps=50)
    assert delayed == pytest.approx(step_s(fast, inner_steps=100, delay_steps=50), rel=1e-6)


def test_the_commit_costs_only_what_is_longer_than_a_step() -> None:
    with_latency, without = world(1e10, 0.008), world(1e10, 0.0)
    assert step_s(with_latency) > step_s(without) + 0.015
    assert step_s(with_latency, inner_steps=1000) < step_s(without, inner_steps=1000) + 0.001
    assert step_s(world(1e10, 5.0), inner_steps=10_000) >= 10.0, "the next vote needs the last"


def test_regions_sum_inside_and_the_bound_stays_a_bound() -> None:
    where = world(1e6)
    inside = step_s(where, across="regions", inner_steps=100)
    assert step_s(where, inner_steps=100) <= inside < step_s(where) / 5
    for options in (PlanOptions(), PlanOptions(objective="dollars")):
        priced = where.with_devices([replace(d, price_per_hour=1.0) for d in where.devices])
        found = plan(priced, job(inner_steps=100), options=options)
        assert found.certificate is not None
        assert 0 < found.certificate.lower_bound <= found.certificate.value
        assert math.isclose(
            predict_plan(found, priced, job(inner_steps=100)).step_s,
            found.predicted_step_s,
            rel_tol=1e-9,
        )
