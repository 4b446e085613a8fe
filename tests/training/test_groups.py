"""How many flows carry a plan's groups."""

from __future__ import annotations

from ray_train_geo.cluster.topology import Device, Link, Topology
from ray_train_geo.model.catalog import ModelDims
from ray_train_geo.planning.plan import PipelinePlan, Plan, StagePlan
from ray_train_geo.training.groups import flows_of

DIMS = ModelDims("gpt", layers=4, dim=8, heads=2, kv_heads=2, ffn_dim=32, vocab_size=16,
                 max_seq_len=8, tied_embeddings=False)  # fmt: skip


def test_only_groups_with_a_window_bound_link_get_several_flows() -> None:
    devices = tuple(Device(f"{n}/0", n, region=n[0]) for n in ("a1", "a2", "b1", "b2"))
    far = Link(0.1, 1e8, window_bytes=5e6)
    topology = Topology(devices, region_links={("a", "b"): far, ("b", "a"): far})
    pipelines = tuple(
        PipelinePlan((StagePlan(x, (0, 2), 1), StagePlan(y, (2, 4), 0)), 2, first)
        for x, y, first in (("a1/0", "a2/0", 0), ("b1/0", "b2/0", 2))
    )
    plan = Plan(4, pipelines, "1f1b", "sharded_ps", devices, predicted_step_s=1.0)
    assert flows_of(plan, DIMS, topology) == {}
    flows = flows_of(plan, DIMS, topology.striped(8))
    assert set(flows.values()) == {4}, "20 MB fill the path, a flow has 5"
    assert set(flows) == {"sync/0-2", "sync/1-3"}, "edges stay in a region, votes are small"
    assert set(flows_of(plan, DIMS, topology.striped(3)).values()) == {3}
