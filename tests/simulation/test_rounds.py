from __future__ import annotations

import pytest

from ray_train_geo.schedule.gpipe import gpipe
from ray_train_geo.schedule.one_f_one_b import one_f_one_b
from ray_train_geo.schedule.timeline import Hop
from ray_train_geo.simulation.rounds import SharedHop, SharedWire, shared_hops
from ray_train_geo.simulation.work import Flow, PipelineWork


def pair(
    *down_resources,
    microbatches=4,
    rate=4.0,
    size_bytes=8.0,
    up=(),
    schedule=gpipe,
    cold_s=0.0,
    seconds=(1.0, 1.0),
):
    """Two stages; a hop of ``rate`` bytes per second over ``down_resources``, and one back."""
    down = Flow(0.5, size_bytes, 1 / rate, down_resources, cold_s)
    back = Flow(0.5, size_bytes, 1 / rate, up)
    forward_s, backward_s = seconds
    return PipelineWork(
        schedule(2, microbatches), (forward_s,) * 2, (backward_s,) * 2, (down,), (back,)
    )


def alternating(stages, microbatches):
    return one_f_one_b([stages - 1 - s for s in range(stages)], microbatches)


def downs(pipelines, seconds_per_byte):
    return [down[0] for down, _ in shared_hops(pipelines, seconds_per_byte)]


def test_a_round_is_a_message_and_what_others_send_with_it():
    # Of 160 bytes at 1 byte/s there are 4 messages of the first, 16 of the second.
    few, many = pair(0), pair(0, microbatches=16)
    a, b = downs([few, many], [1.0])
    assert a == SharedHop(0.5, (8 + 40) / 2, 40.0, 4, 0.0)
    assert b == SharedHop(0.5, (8 + 10) / 2, 10.0, 16, 0.0)


def test_who_seldom_sends_seldom_waits():
    # A round takes 16 s, and 8 of them are one's own.
    waits_s = []
    for compute_s in (1.0, 16.0, 32.0, 1600.0):
        work, other = pair(0, seconds=(compute_s, 0.0)), pair(0, seconds=(2.0, 2.0))
        waits_s.append(downs([work, other], [1.0])[0].transfer_s - 8.0)
    assert waits_s == pytest.approx([4.0, 4.0, 2.0, 0.04])
    # A stage that alternates is busy with both.
    both = pair(0, seconds=(8.0, 24.0), schedule=alternating)
    assert downs([both, other], [1.0])[0].transfer_s == pytest.approx(8.0 + 2.0)


def test_the_same_hop_of_pipelines_that_compute_alike_sends_at_the_same_time():
    work, other = pair(0, seconds=(1600.0, 0.0)), pair(0, seconds=(1.0, 0.0))
    assert downs([work] * 3, [1.0])[0].transfer_s == 24.0
    with_other = downs([work, work, other], [1.0])[0]
    assert with_other.transfer_s == pytest.approx(16.0 + 4.0 * 24 / 1600)


def test_what_one_flow_alone_uses_is_part_of_its_link():
    assert downs([pair(0, 1)], [1 / 2, 1 / 3]) == [Hop(0.5, 4.0)]


def test_the_busiest_resource_sets_the_pace():
    a, b, c = downs([pair(0, 1), pair(0), pair(1, size_bytes=16.0)], [1.0, 1.0])
    assert [h.every_s for h in (a, b, c)] == [24.0, 16.0, 24.0]


def test_a_wide_resource_costs_nothing():
    assert downs([pair(0), pair(0)], [1 / 8]) == [Hop(0.5, 2.0)] * 2
    assert downs([pair(0), pair(0)], [0.0]) == [Hop(0.5, 2.0)] * 2


def test_empty_messages_share_nothing():
    empty = pair(0, size_bytes=0.0)
    assert downs([empty, empty], [1.0]) == [Hop(0.5, 0.0)] * 2


def test_no_link_limit_is_needed():
    work = PipelineWork(
        gpipe(2, 1), (1.0,) * 2, (1.0,) * 2, (Flow(0.0, 1.0, 0.0, (0,)),), (Flow(0.0, 1.0, 0.0),)
    )
    assert downs([work], [0.0]) == [Hop(0.0, 0.0)]
    assert downs([work], [2.0]) == [Hop(0.0, 2.0)]


def test_under_gpipe_activations_do_not_meet_gradients():
    """Unless nothing that is known keeps two pipelines' phases from meeting."""
    both_ways = pair(0, up=(0,))
    assert downs([both_ways, pair(0)], [1.0])[0].every_s == 16.0
    assert downs([both_ways], [1.0]) == [Hop(0.5, 8.0)]
    only_up = pair(up=(0,))
    assert downs([pair(0), only_up], [1.0])[0].every_s == 16.0
    mixed = pair(0, up=(0,), schedule=alternating)
    assert downs([mixed], [1.0])[0].every_s == 16.0
    assert downs([both_ways, mixed], [1.0])[0].every_s == 24.0
    assert downs([both_ways, mixed], [1.0])[1].every_s == 32.0


def test_messages_go_a_round_apart_and_the_last_with_everything():
    wire = SharedWire(SharedHop(0.5, 3.0, 4.0, 3, 0.0))
    assert [wire.send(ready_s) for ready_s in (1.0, 1.0, 1.0)] == [4.5, 8.5, 13.5]
    assert 13.0 - 1.0 == 3 * 4.0  # what the resource needs for all of it, from the first on
    late = SharedWire(SharedHop(0.5, 3.0, 4.0, 3, 0.0))
    assert [late.send(ready_s) for ready_s in (1.0, 9.0, 40.0)] == [4.5, 12.5, 43.5]


def test_a_cold_connection_holds_its_first_message_and_those_behind_it():
    wire = SharedWire(SharedHop(0.0, 3.0, 4.0, 2, 1.5))
    assert [wire.send(0.0), wire.send(0.0)] == [4.5, 8.5]


@pytest.mark.parametrize("microbatches", [1, 3, 64])
def test_a_resource_carries_no_more_than_it_can(microbatches):
    flows = [pair(0, microbatches=microbatches) for _ in range(3)]
    for hop in downs(flows, [1.0]):
        wire = SharedWire(hop)
        left_s = [wire.send(0.0) - hop.latency_s for _ in range(microbatches)]
        assert left_s[-1] == pytest.approx(3 * microbatches * 8.0)
