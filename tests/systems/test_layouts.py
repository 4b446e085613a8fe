"""Which rank is where."""

from __future__ import annotations

from ray_train_geo.cluster.scenarios import scenario
from ray_train_geo.systems.layouts import dtfm_grid, megatron_grid, shuffled, shuffled_nodes


def test_megatron_puts_tensor_ranks_then_replicas_then_stages_next_to_each_other():
    assert megatron_grid(list(range(8)), 2, 2) == (
        ((0, 1), (4, 5)),
        ((2, 3), (6, 7)),
    )


def test_shuffles_are_orders_and_depend_on_their_seed_alone():
    assert sorted(shuffled(64, 1)) == list(range(64))
    assert shuffled(64, 1) == shuffled(64, 1) != shuffled(64, 2)
    cluster = scenario("fluidstack-2")
    order = shuffled_nodes(cluster, 1)
    assert sorted(order) == list(range(32))
    nodes = [cluster.devices[d].node for d in order]
    assert all(a == b for a, b in zip(nodes[::2], nodes[1::2], strict=True))


def test_dtfm_keeps_pipelines_inside_regions_where_that_is_cheapest():
    cluster = scenario("universities")
    grid = dtfm_grid("universities", cluster, 8, 8)
    assert sorted(d for chain in grid for (d,) in chain) == list(range(64))
    for chain in grid:
        assert len({cluster.devices[d].region for (d,) in chain}) == 1
