"""Who copies what to whom, and how often."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from ray_train_geo.cluster.topology import Device, Link, Topology
from ray_train_geo.errors import AbortedError, TransportError
from ray_train_geo.model.catalog import ModelDims, parameter_shapes
from ray_train_geo.planning.plan import PipelinePlan, Plan, StagePlan
from ray_train_geo.training.copies import (
    Copier,
    CopyDuty,
    copy_duties,
    copy_interval,
    spare_keepers,
)
from ray_train_geo.training.memory import Memory, Snapshot
from ray_train_geo.training.precision import LossScale
from ray_train_geo.transport.state_stream import StateServer, Streams

DIMS = ModelDims("gpt", 4, 8, 2, 2, 32, 11, 16, tied_embeddings=False)


def topology(*places: str) -> Topology:
    """Devices ``d0``, ``d1`` ... on ``region/node``."""
    return Topology(
        tuple(
            Device(f"d{i}", node=place, region=place.partition("/")[0])
            for i, place in enumerate(places)
        )
    )


def plan(where: Topology, *pipelines: tuple[int, ...]) -> Plan:
    """A plan with these numbers of layers a stage."""
    rank, made = 0, []
    for counts in pipelines:
        stages, first = [], 0
        for count in counts:
            stages.append(StagePlan(where.devices[rank].id, (first, first + count), 1))
            first, rank = first + count, rank + 1
        made.append(PipelinePlan(tuple(stages), 1, len(made)))
    return Plan(4, tuple(made), "1f1b", "allreduce", where.devices[:rank], 1.0)


def test_one_pipeline_copies_everything_to_another_node_of_another_region() -> None:
    where = topology("ohio/a", "ohio/b", "oregon/c")
    duties = copy_duties(plan(where, (1, 2, 1)), DIMS, where)
    assert {rank: duty.peer for rank, duty in duties.items()} == {0: 2, 1: 2, 2: 0}
    copied = [name for duty in duties.values() for name in duty.names]
    assert sorted(copied) == sorted(parameter_shapes(DIMS))


def test_where_all_is_on_two_nodes_nothing_is_copied() -> None:
    where = topology("x/a", "x/a", "x/b", "x/b")
    assert copy_duties(plan(where, (2, 2), (2, 2)), DIMS, where) == {}


def test_replicas_on_one_node_are_copied_once_and_all_keep_their_own() -> None:
    where = topology("x/a", "x/b", "x/a", "x/c")
    duties = copy_duties(plan(where, (2, 2), (2, 2)), DIMS, where)
    assert duties[0].names
    assert duties[0].peer in (1, 3)
    assert duties[1] == duties[2] == duties[3] == CopyDuty(1)


def test_on_one_node_there_is_nowhere_to_copy_to() -> None:
    where = topology("x/a", "x/a")
    assert copy_duties(plan(where, (2, 2)), DIMS, where) == {}


@pytest.mark.parametrize(("bandwidth", "interval"), [(1e9, 1), (1e4, 24)])
def test_the_interval_bounds_what_waiting_costs(bandwidth: float, interval: int) -> None:
    where = replace(topology("x/a", "y/b"), default_link=Link(0.0, bandwidth))
    one = plan(where, (2, 2))
    duties = copy_duties(one, DIMS, where)
    found = copy_interval(duties, one, DIMS, where)
    shapes = parameter_shapes(DIMS)
    sizes = [
        12 * sum(torch.Size(shapes[n]).numel() for n in duty.names) for duty in duties.values()
    ]
    waited_s = max(0.0, max(sizes) / bandwidth - one.predicted_step_s)
    assert waited_s <= 0.03 * found * one.predicted_step_s
    assert (found == 1) == (interval == 1)


def test_residuals_are_copied_to_the_nearest_other_node_where_links_have_room() -> None:
    where = topology("x/a", "y/b", "x/c", "y/d")
    parameters = sum(math.prod(shape) for shape in parameter_shapes(DIMS).values())
    near, far = Link(0.0, 4 * parameters / 0.09), Link(0.0, 4 * parameters / 0.2)
    near_links = {("x", "x"): near, ("y", "y"): near}
    four = plan(where, (4,), (4,), (4,), (4,))
    regions = replace(where, default_link=far, region_links=near_links)
    assert spare_keepers(four, DIMS, regions) == {0: 2, 1: 3, 2: 0, 3: 1}
    assert spare_keepers(four, DIMS, replace(where, default_link=far)) == {}
    one = topology("x/a", "x/a")
    assert spare_keepers(plan(one, (4,), (4,)), DIMS, one) == {}
    two = topology("x/a", "x/b")
    assert spare_keepers(plan(two, (2, 2)), DIMS, two) == {}, "sums with nobody"


def snapshot(step: int) -> Snapshot:
    tensors = {f"{kind}.w": torch.full((2,), float(step)) for kind in ("model", "exp_avg")}
    return Snapshot(step, step, LossScale(), tensors | {"exp_avg_sq.w": torch.zeros(2)})


def test_a_copy_is_at_the_peer_before_the_next_commit_and_old_ones_go() -> None:
    mine, peers, now = Memory(), Memory(), [0]
    peers.enter(4)
    server = StateServer("127.0.0.1", peers)
    copier = Copier(
        CopyDuty(2, ("w",), 1), server.address, Streams(4, 5.0), mine, lambda: snapshot(now[0]), 5.0
    )
    copier.begin()
    for step in range(1, 6):
        copier.finish()
        newest = max(h.step for h in peers.holdings())
        assert newest == (step - 1) // 2 * 2
        now[0] = step
        copier.committed(step)
    copier.finish()
    assert [h.step for h in mine.holdings()] == [4], "nobody will go back further"
    assert torch.equal(peers.copies_at(4)["model.w"], torch.full((2,), 4.0))
    copier.close()
    server.close()


class Slow(Memory):
    """Takes its time."""

    def check(self, generation: int, step: int) -> None:
        time.sleep(0.5)


def test_an_abort_releases_who_waits_for_a_copy_and_a_lost_peer_is_an_error() -> None:
    memory, server = Memory(), StateServer("127.0.0.1", Slow())
    duty, address = CopyDuty(1, ("w",), 1), server.address
    copier = Copier(duty, address, Streams(1, 5.0), memory, lambda: snapshot(1), 5.0)
    copier.begin()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(copier.finish)
        copier.abort()
        with pytest.raises(AbortedError):
            waiting.result(2.0)
    copier.close()
    server.close()
    gone = Copier(duty, address, Streams(1, 5.0), memory, lambda: snapshot(1), 5.0)
    gone.begin()
    with pytest.raises(TransportError):
        gone.finish()
    gone.close()
