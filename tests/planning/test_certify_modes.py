"""Bounds hold for the gradient-sync modes that `certify` itself does not know."""

from __future__ import annotations

from dataclasses import replace

import pytest
from certify_cases import CODECS, machines, plans, problem, topologies
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_train_geo.cluster.topology import Topology, Uplink
from ray_train_geo.planning.certify import dollars_bound, step_time_bound
from ray_train_geo.planning.certify_modes import least_bound, stand_ins
from ray_train_geo.planning.evaluate import objective_value
from ray_train_geo.planning.predict import predict
from ray_train_geo.planning.problem import PlanOptions

DOLLARS = PlanOptions(objective="dollars")


def seconds(p):
    return least_bound(p, lambda q, modes: step_time_bound(q, modes, CODECS)).value


def dollars(p):
    return least_bound(p, lambda q, modes: dollars_bound(q, modes, CODECS)).value


@st.composite
def with_shards(draw, pipelines):
    weights = st.sampled_from([0.0, 0.2, 1.0, 3.0])
    return [
        replace(p, stages=tuple(replace(s, shard=1e-6 + draw(weights)) for s in p.stages))
        for p in pipelines
    ]


@given(st.data())
@settings(max_examples=2)
def test_no_plan_of_these_modes_beats_its_bound(data):
    """As the job names the mode, and as the planner may choose it."""
    topology, tied = data.draw(topologies()), data.draw(st.booleans())
    anyhow = problem(topology, tied=tied)
    of_any = seconds(anyhow), dollars(anyhow)
    for mode in ("tree", "hierarchical", "sharded_ps"):
        p = problem(topology, parallelism={"gradient_sync": mode}, tied=tied)
        bounds = [(seconds(p), dollars(p))]
        if mode in (*anyhow.modes, *anyhow.late_modes):
            bounds.append(of_any)
        for _ in range(3):
            plan = data.draw(plans(p))
            if mode == "sharded_ps" and p.shards_by_speed:
                plan = data.draw(with_shards(plan))
            step_s = predict(p, plan, "1f1b", mode).step_s
            used = [p.table.index[s.device] for one in plan for s in one.stages]
            price = objective_value(replace(p, options=DOLLARS), step_s, used)
            for least_s, least_price in bounds:
                assert step_s >= least_s * (1 - 1e-9)
                assert price >= least_price * (1 - 1e-9)


def test_where_nothing_is_shared_or_unequal_all_gradients_count():
    devices = machines(8, per_node=2, regions=2)
    assert stand_ins(problem(Topology(devices))) == {1.0: ["allreduce", "sharded_ps", "central_ps"]}
    uplinks = Topology(devices, region_uplinks={("r0", "r1"): 1e6, ("r1", "r0"): 1e6})
    assert stand_ins(problem(uplinks))[0.25] == ["sharded_ps"]
    unequal = Topology(devices, node_uplinks={"n0": Uplink(1e6, 1e6)})
    assert stand_ins(problem(unequal))[0.5] == ["sharded_ps"]


@pytest.mark.parametrize("mode", ["allreduce", "tree"])
def test_a_mode_that_the_job_names_is_bounded_alone(mode):
    (modes,) = stand_ins(
        problem(Topology(machines(4)), parallelism={"gradient_sync": mode})
    ).values()
    assert modes == ["allreduce" if mode == "allreduce" else "central_ps"]
