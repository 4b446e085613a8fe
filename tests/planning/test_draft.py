"""The gradient sync of a finished plan: what the search does not look at is tried in the end."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest

from ray_train_geo.cluster.topology import Device, Link, Topology, Uplink
from ray_train_geo.planning.plan import Plan
from ray_train_geo.planning.planner import plan
from ray_train_geo.planning.predict import predict_plan
from ray_train_geo.spec import parse_job

REGIONS = "aaabbb"
DEVICES = tuple(
    Device(f"n{i}/0", f"n{i}", region=r, flops_per_s=1e12) for i, r in enumerate(REGIONS)
)


def job(mode="auto", codec="none"):
    return parse_job(
        {
            "model": {"layers": 4, "dim": 64, "heads": 4},
            "data": {"path": "python://stdlib"},
            "training": {"steps": 1, "global_batch": 12, "seq_len": 64},
            "parallelism": {
                "pipelines": 6,
                "stages": 1,
                "gradient_sync": mode,
                "bucket_bytes": 20_000,
            },
            "codecs": {"gradients": codec},
        }
    )


def shared_uplink():
    near, far = Link(1e-4, 1e8), Link(0.02, 1e7)
    links = {(a, b): near if a == b else far for a in "ab" for b in "ab"}
    uplinks = dict.fromkeys(permutations("ab", 2), 1e6)
    return Topology(DEVICES, region_links=links, region_uplinks=uplinks)


def fixed_modes(topology, made: Plan) -> dict[str, float]:
    modes = ("allreduce", "sharded_ps", "central_ps", "hierarchical", "tree")
    return {
        mode: predict_plan(replace(made, gradient_sync=mode), topology, job()).step_s
        for mode in modes
    }


@pytest.mark.parametrize("codec", ["none", "int8"])
def test_regions_first_where_they_share_an_uplink(codec):
    made = plan(shared_uplink(), job(codec=codec))
    assert made.gradient_sync in ("hierarchical", "tree")
    if codec == "none":
        steps = fixed_modes(shared_uplink(), made)
        assert made.predicted_step_s == pytest.approx(min(steps.values()))
        assert steps["hierarchical"] < 0.8 * steps["sharded_ps"]
    assert made.certificate is not None
    assert made.certificate.lower_bound <= made.predicted_step_s


def test_powersgd_has_routes_of_its_own():
    assert plan(shared_uplink(), job(codec="powersgd")).gradient_sync in (
        "sharded_ps",
        "central_ps",
    )


def test_shards_by_speed_where_nics_are_unequal():
    nics = {d.node: Uplink(*[2e6 if d.node == "n0" else 1e7] * 2) for d in DEVICES}
    topology = Topology(DEVICES, region_links={}, default_link=Link(1e-4, 1e8), node_uplinks=nics)
    made = plan(topology, job())
    shards = {p.stages[0].device: p.stages[0].shard for p in made.pipelines}
    assert made.gradient_sync == "sharded_ps"
    assert shards["n0/0"] < 0.5 * min(s for d, s in shards.items() if d != "n0/0")
    stages = [replace(p.stages[0], shard=1.0) for p in made.pipelines]
    even = tuple(
        replace(p, stages=(stage,)) for p, stage in zip(made.pipelines, stages, strict=True)
    )
    alike = predict_plan(replace(made, pipelines=even), topology, job())
    assert made.predicted_step_s < 0.95 * alike.step_s
    assert any(note.startswith("shards of gradient sums") for note in made.notes)
    assert Plan.from_json(made.to_json()).pipelines == made.pipelines


def test_no_other_shards_where_nics_are_alike():
    made = plan(Topology(DEVICES, default_link=Link(1e-4, 1e8)), job("sharded_ps"))
    assert {s.shard for p in made.pipelines for s in p.stages} == {1.0}
