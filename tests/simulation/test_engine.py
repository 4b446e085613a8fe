from __future__ import annotations

import dataclasses
import time

import pytest
from hypothesis import given
from plain_engine import plain_makespans
from random_work import RESOURCES, capacities, pipeline_work, plans

from ray_train_geo.schedule.actions import Action
from ray_train_geo.schedule.gpipe import gpipe
from ray_train_geo.schedule.one_f_one_b import one_f_one_b
from ray_train_geo.schedule.timeline import timeline
from ray_train_geo.simulation.engine import simulate
from ray_train_geo.simulation.work import Flow, PipelineWork

NO_LIMITS = [0.0] * RESOURCES


def pair(microbatches, down, up, forward_s=1.0, backward_s=1.0):
    """A pipeline of two stages."""
    actions = gpipe(2, microbatches)
    return PipelineWork(actions, (forward_s,) * 2, (backward_s,) * 2, (down,), (up,))


def starts(t, stage):
    return {str(a): start for a, start in zip(t.actions[stage], t.starts_s[stage], strict=True)}


FREE = Flow(0.0, 0.0, 0.0)


def test_two_pipelines_share_an_uplink():
    # 10 bytes each from 1 on, over 10 B/s: 5 each, both there at 3 and the latency of 0.5.
    work = pair(1, Flow(0.5, 10.0, 0.1, (0,)), FREE)
    for t in simulate([work, work], [0.1]):
        assert starts(t, 1) == pytest.approx({"F0": 3.5, "B0": 4.5})
        assert t.makespan_s == pytest.approx(6.5)
    [alone] = simulate([work], [0.1])
    assert starts(alone, 1) == pytest.approx({"F0": 2.5, "B0": 3.5})


def test_a_slow_link_leaves_the_rest_of_the_nic():
    # 2 B/s and 8 B/s of a NIC of 10: 20 bytes need 10 s, 40 bytes 5 s.
    slow, fast = Flow(0.0, 20.0, 0.5, (0,)), Flow(0.0, 40.0, 0.1, (0,))
    a, b = simulate([pair(1, slow, FREE), pair(1, fast, FREE)], [0.1])
    assert starts(a, 1)["F0"] == pytest.approx(11.0)
    assert starts(b, 1)["F0"] == pytest.approx(6.0)


def test_who_is_done_leaves_the_nic_to_the_others():
    # From 1 on 5 B/s each; at 5 the short one is done, the other has 20 left at 10 B/s.
    short, long = Flow(0.0, 20.0, 0.1, (0,)), Flow(0.0, 40.0, 0.1, (0,))
    a, b = simulate([pair(1, short, FREE), pair(1, long, FREE)], [0.1])
    assert starts(a, 1)["F0"] == pytest.approx(5.0)
    assert starts(b, 1)["F0"] == pytest.approx(7.0)


def test_messages_of_a_hop_go_one_behind_the_other():
    # Alone 10 B/s (1-2, 2-3); the other's single message halves it: 1-3, 3-4.
    twice, once = Flow(1.0, 10.0, 0.1, (0,)), Flow(0.0, 10.0, 0.1, (0,))
    a, b = simulate([pair(2, twice, FREE), pair(1, once, FREE)], [0.1])
    assert starts(a, 1)["F0"] == pytest.approx(4.0)
    assert starts(a, 1)["F1"] == pytest.approx(5.0)
    assert starts(b, 1)["F0"] == pytest.approx(3.0)


def test_nics_are_full_duplex():
    actions = one_f_one_b([2, 0], 6)
    out, into = 0, 1
    hop = Flow(0.0, 15.0, 0.1, (out,))

    def makespan_s(back):
        work = PipelineWork(actions, (1.0,) * 2, (1.0,) * 2, (hop,), (back,))
        return simulate([work], [0.1, 0.1])[0].makespan_s

    alone = timeline(actions, (1.0,) * 2, (1.0,) * 2, [hop.hop], [hop.hop])
    assert makespan_s(Flow(0.0, 15.0, 0.1, (into,))) == alone.makespan_s
    assert makespan_s(hop) > alone.makespan_s  # half duplex: both ways over one resource


def test_more_capacity_can_slow_a_step():
    """Fair sharing is not monotone: who comes sooner can come in the way of who is urgent.

    0's second stage passes its message on to the third over the uplink, where 1's only message
    is under way; with a slower first hop that message would be through before.
    """
    urgent = pair(1, Flow(0.0, 40.0, 0.1, (1,)), FREE, forward_s=3.0, backward_s=9.0)

    def makespans_s(first_rate):
        first, second = Flow(0.0, 40.0, 0.1, (0,)), Flow(0.0, 40.0, 0.1, (1,))
        chain = PipelineWork(
            gpipe(3, 1), (1.0, 0.0, 0.0), (0.0, 0.0, 0.0), (first, second), (FREE, FREE)
        )
        return [t.makespan_s for t in simulate([chain, urgent], [1 / first_rate, 0.1])]

    # On the uplink 3-7 (urgent) and 11-15; then 3-9, half of it at half the rate, and 5-11.
    assert makespans_s(4.0) == pytest.approx([15.0, 28.0])
    assert makespans_s(10.0) == pytest.approx([11.0, 30.0])


@given(plans)
def test_equals_the_timeline_where_nothing_is_shared(pipelines):
    for work, t in zip(pipelines, simulate(pipelines, NO_LIMITS), strict=True):
        down, up = [f.hop for f in work.down], [f.hop for f in work.up]
        how = {
            "weight_s": work.weight_s,
            "pace": work.pace,
            "blocking_sends": work.blocking_sends,
        }
        assert t == timeline(work.actions, work.forward_s, work.backward_s, down, up, **how)


def test_a_message_waits_for_the_cold_one_before_it():
    """Also if it comes when that one has had its turn on what is shared, but has not left.

    B0 is sent from 2 to 3 and, as its link is cold, has left at 6 only; B1 is ready at 4.
    """
    hop = Flow(0.0, 10.0, 0.1, (0,))
    cold = Flow(0.0, 10.0, 0.1, (1,), cold_s=3.0)
    work = PipelineWork(
        one_f_one_b([1, 0], 2), (1.0, 0.0), (0.0, 0.0), (hop,), (cold,), ((1, 2, 1, 1),) * 2
    )
    late = pair(1, hop, dataclasses.replace(cold, cold_s=0.0), forward_s=20.0)
    t, _ = simulate([work, late], [0.1, 0.1])
    assert starts(t, 1) == pytest.approx({"F0": 2.0, "B0": 2.0, "F1": 4.0, "B1": 4.0})
    assert starts(t, 0)["B0"] == pytest.approx(6.0)
    assert starts(t, 0)["B1"] == pytest.approx(7.0)


@given(plans, capacities)
def test_agrees_with_the_plain_engine(pipelines, seconds_per_byte):
    makespans_s = [t.makespan_s for t in simulate(pipelines, seconds_per_byte)]
    assert makespans_s == pytest.approx(plain_makespans(pipelines, seconds_per_byte))


def over(pipelines, change):
    return [
        dataclasses.replace(p, down=tuple(map(change, p.down)), up=tuple(map(change, p.up)))
        for p in pipelines
    ]


@given(plans, capacities)
def test_lies_between_no_sharing_and_fixed_shares(pipelines, seconds_per_byte):
    """Nobody is faster than alone, nor slower than with an equal part for each flow."""
    flows = [f for p in pipelines for f in (*p.down, *p.up)]
    users = [sum(r in f.resources for f in flows) for r in range(RESOURCES)]

    def alone(flow):
        slowest = max((seconds_per_byte[r] for r in flow.resources), default=0.0)
        return dataclasses.replace(
            flow, resources=(), seconds_per_byte=max(flow.seconds_per_byte, slowest)
        )

    def part(flow):
        slowest = max((seconds_per_byte[r] * users[r] for r in flow.resources), default=0.0)
        return dataclasses.replace(
            flow, resources=(), seconds_per_byte=max(flow.seconds_per_byte, slowest)
        )

    best = simulate(over(pipelines, alone), NO_LIMITS)
    shared = simulate(pipelines, seconds_per_byte)
    worst = simulate(over(pipelines, part), NO_LIMITS)
    for a, b, c in zip(best, shared, worst, strict=True):
        for lower, times, upper in zip(a.starts_s, b.starts_s, c.starts_s, strict=True):
            for low, at, high in zip(lower, times, upper, strict=True):
                assert low - 1e-6 <= at <= high + 1e-6


@given(plans, capacities)
def test_keeps_the_lower_bounds(pipelines, seconds_per_byte):
    pipelines = [dataclasses.replace(p, pace=None) for p in pipelines]
    timelines = simulate(pipelines, seconds_per_byte)
    loads = [0.0] * RESOURCES
    for p, t in zip(pipelines, timelines, strict=True):
        microbatches = sum(a.kind == "F" for a in p.actions[0])
        weight_s = p.weight_s or [0.0] * len(p.actions)
        down = [f.latency_s + f.hop.transfer_s for f in p.down]
        up = [f.latency_s + f.hop.transfer_s for f in p.up]
        for s in range(len(p.actions)):
            above_s = sum(p.forward_s[:s]) + sum(p.backward_s[:s]) + sum(down[:s]) + sum(up[:s])
            busy_s = microbatches * (p.forward_s[s] + p.backward_s[s])
            assert t.makespan_s >= above_s + busy_s - 1e-6
            first_s = sum(p.forward_s[:s]) + sum(down[:s])
            assert t.end_s(s) >= first_s + busy_s + microbatches * weight_s[s] - 1e-6
        whole_s = sum(p.forward_s) + sum(p.backward_s) + sum(down) + sum(up)
        for flow in (*p.down, *p.up):
            assert t.makespan_s >= whole_s + (microbatches - 1) * flow.hop.transfer_s - 1e-6
            for r in flow.resources:
                loads[r] += microbatches * flow.size_bytes
    makespan_s = max(t.makespan_s for t in timelines)
    for load, per_byte in zip(loads, seconds_per_byte, strict=True):
        assert makespan_s >= load * per_byte - 1e-6


@given(plans, capacities)
def test_no_stage_computes_while_its_message_leaves(pipelines, seconds_per_byte):
    blocked = [dataclasses.replace(p, blocking_sends=True) for p in pipelines]
    for p, t in zip(blocked, simulate(blocked, seconds_per_byte), strict=True):
        for s, todo in enumerate(p.actions):
            for i in range(len(todo) - 1):
                out = p.up[s - 1 : s] if todo[i].kind == "B" and s else ()
                if todo[i].kind == "F":
                    out = p.down[s : s + 1]
                for flow in out:
                    gap_s = t.starts_s[s][i + 1] - t.ends_s[s][i]
                    assert gap_s >= flow.hop.transfer_s - 1e-9


@given(plans, capacities)
def test_same_input_same_floats(pipelines, seconds_per_byte):
    assert simulate(pipelines, seconds_per_byte) == simulate(pipelines, seconds_per_byte)


@given(pipeline_work(), capacities)
def test_equal_groups_get_equal_times(work, seconds_per_byte):
    """The same pipeline twice, over resources of its own each time."""
    shift = len(seconds_per_byte)
    [elsewhere] = over(
        [work],
        lambda f: dataclasses.replace(f, resources=tuple(r + shift for r in f.resources)),
    )
    one, other = simulate([work, elsewhere], seconds_per_byte * 2)
    assert one is other
    assert simulate([work], seconds_per_byte) == (one,)


def test_equal_times_with_other_schedules_are_not_mixed_up():
    hops = (Flow(1.0, 1.0, 1.0, (0,)),), (Flow(1.0, 1.0, 1.0, (0,)),)
    works = [
        PipelineWork(actions, (1.0,) * 2, (1.0,) * 2, *hops)
        for actions in (gpipe(2, 4), one_f_one_b([1, 0], 4))
    ]
    a, b = simulate(works, [0.0])
    assert a != b


def test_deadlock_names_the_stuck_stages():
    f, b = Action("F", 0), Action("B", 0)
    hop = Flow(0.0, 1.0, 1.0, (0,))
    work = PipelineWork([[f], [b, f], [f, b]], (1.0,) * 3, (1.0,) * 3, (hop, hop), (hop, hop))
    with pytest.raises(ValueError, match=r"stage 1 waits at B0, stage 2 waits at F0"):
        simulate([work], [1.0])


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ((-1.0, 1.0, 1.0, ()), "none below 0"),
        ((0.0, float("nan"), 1.0, ()), "finite"),
        ((0.0, 1.0, float("inf"), ()), "finite"),
        ((0.0, 1.0, 1.0, (3, 3)), "names a resource twice"),
    ],
)
def test_refuses_flows_that_make_no_sense(figures, message):
    with pytest.raises(ValueError, match=message):
        Flow(*figures)


def test_speed():
    """64 devices, a batch of 1024, all hops through the busy NICs of nodes of 8 devices."""
    hop = Flow(0.01, 2e7, 4e-10)
    actions = one_f_one_b([3 * (7 - s) for s in range(8)], 128)
    works = [
        PipelineWork(
            actions,
            tuple(0.05 + 0.001 * ((p + s) % 5) for s in range(8)),
            (0.1,) * 8,
            tuple(dataclasses.replace(hop, resources=(s, 9 + s)) for s in range(7)),
            tuple(dataclasses.replace(hop, resources=(s + 1, 8 + s)) for s in range(7)),
        )
        for p in range(8)
    ]
    started = time.process_time()
    timelines = simulate(works, [8e-10] * 16)
    print(f"{time.process_time() - started:.2f} s for {max(t.makespan_s for t in timelines):.1f} s")
    assert min(t.makespan_s for t in timelines) > 128 * 0.15
