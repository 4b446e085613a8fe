from __future__ import annotations

import dataclasses
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
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
    # 10 bytes each from 1 on, over 10 B/s: both there at 3 and the latency of 0.5.
    work = pair(1, Flow(0.5, 10.0, 0.1, (0,)), FREE)
    for t in simulate([work, work], [0.1]):
        assert starts(t, 1) == pytest.approx({"F0": 3.5, "B0": 4.5})
        assert t.makespan_s == pytest.approx(6.5)
    [alone] = simulate([work], [0.1])
    assert starts(alone, 1) == pytest.approx({"F0": 2.5, "B0": 3.5})


def test_in_the_long_run_flows_share_by_their_bytes():
    # 300 messages of 10 bytes at 10 B/s; 100 of them are 1.5 s, and 3 s, apart.
    hop = Flow(0.0, 10.0, 0.1, (0,))
    many, few = simulate([pair(200, hop, FREE, 0.1, 0.1), pair(100, hop, FREE, 0.1, 0.1)], [0.1])
    assert starts(many, 1)["F150"] - starts(many, 1)["F50"] == pytest.approx(150.0)
    assert starts(few, 1)["F75"] - starts(few, 1)["F25"] == pytest.approx(150.0)


def test_who_seldom_sends_waits_seldom():
    # Both send 10 bytes every 10 s, over 10 B/s: a round takes 2 s, of which one is one's own.
    hop = Flow(0.0, 10.0, 0.1, (0,))
    a, _ = simulate([pair(9, hop, FREE, 10.0, 1.0), pair(9, hop, FREE, 10.0, 2.0)], [0.1])
    assert starts(a, 1)["F4"] == pytest.approx(50.0 + 1.0 + 0.5 * 2 / 10)


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


def test_messages_can_take_part_of_who_computes():
    # A message is 2 s on the wire, and costs either end a quarter of that.
    hop = Flow(1.0, 20.0, 0.1)
    work = dataclasses.replace(pair(1, hop, hop, 1.0, 3.0), traffic_slowdown=0.25)
    [t] = simulate([work], [])
    assert t.starts_s == ((0.0, 12.5), (4.5, 6.0))
    assert t.ends_s == ((1.5, 16.0), (6.0, 9.5))
    chain = PipelineWork(gpipe(3, 1), (1.0,) * 3, (1.0,) * 3, (hop, FREE), (FREE, FREE))
    [slow] = simulate([dataclasses.replace(chain, traffic_slowdown=1.0)], [])
    assert [ends[0] for ends in slow.ends_s] == [3.0, 3.0 + 2.0 + 1.0 + 3.0, 9.0 + 1.0]
    with pytest.raises(ValueError, match="traffic_slowdown is 0 or more"):
        dataclasses.replace(work, traffic_slowdown=-0.1)


def test_more_capacity_slows_nobody():
    """A message that comes sooner does not come in the way of one that is urgent.

    0's second stage passes its message on to the third over the uplink, where 1's only message
    is under way.  By max-min fair sharing 1 would be done at 28, and at 30 with the faster hop.
    """
    urgent = pair(1, Flow(0.0, 40.0, 0.1, (1,)), FREE, forward_s=3.0, backward_s=9.0)

    def makespans_s(first_rate):
        first, second = Flow(0.0, 40.0, 0.1, (0,)), Flow(0.0, 40.0, 0.1, (1,))
        chain = PipelineWork(
            gpipe(3, 1), (1.0, 0.0, 0.0), (0.0, 0.0, 0.0), (first, second), (FREE, FREE)
        )
        return [t.makespan_s for t in simulate([chain, urgent], [1 / first_rate, 0.1])]

    # On the uplink 80 bytes need 8 s, whoever comes first.
    assert makespans_s(4.0) == pytest.approx([11.0 + 8.0, 3.0 + 8.0 + 21.0])
    assert makespans_s(10.0) == pytest.approx([5.0 + 8.0, 3.0 + 8.0 + 21.0])


@given(plans)
def test_equals_the_timeline_where_nothing_is_shared(pipelines):
    pipelines = [dataclasses.replace(p, traffic_slowdown=0.0) for p in pipelines]
    for work, t in zip(pipelines, simulate(pipelines, NO_LIMITS), strict=True):
        down, up = [f.hop for f in work.down], [f.hop for f in work.up]
        how = {
            "weight_s": work.weight_s,
            "pace": work.pace,
            "blocking_sends": work.blocking_sends,
        }
        assert t == timeline(work.actions, work.forward_s, work.backward_s, down, up, **how)


faster = st.sampled_from([1.0, 1.0, 1.0, 1.001, 1.3, 2.0, 1e6])


@given(plans, capacities, st.data())
def test_more_bandwidth_or_less_latency_makes_no_action_later(pipelines, seconds_per_byte, data):
    """Of any links, of any NICs and uplinks, all at once or one."""

    def quicker(flow):
        return dataclasses.replace(
            flow,
            latency_s=flow.latency_s / data.draw(faster),
            seconds_per_byte=flow.seconds_per_byte / data.draw(faster),
            cold_s=flow.cold_s / data.draw(faster),
        )

    quick = over(pipelines, quicker)
    wide = [s / data.draw(faster) for s in seconds_per_byte]
    before, after = simulate(pipelines, seconds_per_byte), simulate(quick, wide)
    for old, new in zip(before, after, strict=True):
        for slow, fast in zip(old.ends_s, new.ends_s, strict=True):
            assert all(b <= a * (1 + 1e-12) for a, b in zip(slow, fast, strict=True))


def over(pipelines, change):
    return [
        dataclasses.replace(p, down=tuple(map(change, p.down)), up=tuple(map(change, p.up)))
        for p in pipelines
    ]


@given(plans, capacities)
def test_lies_between_no_sharing_and_shares_by_bytes(pipelines, seconds_per_byte):
    """Nobody is faster than alone, nor slower than if all bytes of a round were in the way."""
    messages = [p.microbatches for p in pipelines]
    load = [
        sum(
            m * f.size_bytes
            for p, m in zip(pipelines, messages, strict=True)
            for f in (*p.down, *p.up)
            if r in f.resources
        )
        for r in range(RESOURCES)
    ]

    def alone(flow):
        slowest = max((seconds_per_byte[r] for r in flow.resources), default=0.0)
        return dataclasses.replace(
            flow, resources=(), seconds_per_byte=max(flow.seconds_per_byte, slowest)
        )

    def part(flow, count):
        slowest = max(
            (seconds_per_byte[r] * load[r] / flow.size_bytes / count for r in flow.resources),
            default=0.0,
        )
        return dataclasses.replace(
            flow, resources=(), seconds_per_byte=max(flow.seconds_per_byte, slowest)
        )

    best = simulate(over(pipelines, alone), NO_LIMITS)
    shared = simulate(pipelines, seconds_per_byte)
    parts = [
        over([p], lambda flow, count=count: part(flow, count))[0]
        for p, count in zip(pipelines, messages, strict=True)
    ]
    worst = simulate(parts, NO_LIMITS)
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
def test_equal_pipelines_are_simulated_once(work, seconds_per_byte):
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
