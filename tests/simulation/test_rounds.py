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


def three_stages(schedule, microbatches, uplink=(), nic=(0,)):
    """The middle stage's messages, both ways, go out by one NIC: activations and gradients."""
    free, out = Flow(0.0, 8.0, 0.0, uplink), Flow(0.0, 8.0, 1 / 4.0, nic)
    return PipelineWork(schedule(3, microbatches), (1.0,) * 3, (1.0,) * 3, (free, out), (out, free))


def test_under_1f1b_a_stage_warms_up_and_cools_down_without_the_other_way():
    work = three_stages(alternating, 6)
    ((_, down), (up, _)) = shared_hops([work], [1.0])[0]
    # Its first two of six forwards come before any backward; its last two backwards after them.
    assert (down.lone, up.lone) == (2, 2)
    for hop in (down, up):
        assert (hop.every_s, hop.lone_every_s, hop.lone_transfer_s) == (16.0, 8.0, 8.0)
    assert down.behind is None
    assert up.behind == ((1, 6 * 16.0),)
    # GPipe's activations never meet gradients, so that its rounds have no such phases.
    assert shared_hops([three_stages(gpipe, 6)], [1.0])[0] == (
        (Hop(0.0, 0.0), Hop(0.0, 8.0)),
        (Hop(0.0, 8.0), Hop(0.0, 0.0)),
    )


def test_others_are_met_in_the_warmup_too():
    work = three_stages(alternating, 6)
    other = pair(0, microbatches=6, schedule=alternating)
    ((_, down), (up, _)) = shared_hops([work, other], [1.0])[0]
    for hop in (down, up):
        assert (hop.every_s, hop.lone_every_s) == (24.0, 16.0)
    # Of a pipeline that computes alike, a message of each way goes with every round.
    ((_, down), _) = shared_hops([work] * 2, [1.0])[0]
    assert (down.every_s, down.lone_every_s) == (32.0, 16.0)


def test_lone_messages_go_in_short_rounds_and_gradients_end_with_everything():
    down = SharedWire(SharedHop(0.0, 16.0, 16.0, 4, 0.0, 2, 8.0, 8.0))
    assert [down.send(0.0) for _ in range(4)] == [8.0, 16.0, 32.0, 48.0]
    up = SharedHop(0.0, 16.0, 16.0, 4, 0.0, 2, 8.0, 8.0, ((0, 64.0),))
    wire = SharedWire(up, [(down, 64.0)])
    assert [wire.send(1.0) for _ in range(4)] == [17.0, 33.0, 41.0, 64.0]
    # Before the first activation nothing is known of them.
    unsent = SharedWire(SharedHop(0.0, 16.0, 16.0, 4, 0.0))
    wire = SharedWire(up, [(unsent, 64.0)])
    assert [wire.send(1.0) for _ in range(4)] == [17.0, 33.0, 41.0, 49.0]


@pytest.mark.parametrize("microbatches", [2, 3, 8])
def test_a_nic_that_both_ways_leave_by_carries_no_more_than_it_can(microbatches):
    work = three_stages(alternating, microbatches)
    ((_, down), (up, _)) = shared_hops([work], [1.0])[0]
    forth = SharedWire(down)
    back = SharedWire(up, [(forth, s) for _, s in up.behind])
    for _ in range(microbatches):
        forth.send(0.0)
    left_s = [back.send(0.0) for _ in range(microbatches)]
    assert left_s[-1] >= 2 * microbatches * 8.0
