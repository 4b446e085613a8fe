from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.simulation.network import Network
from ray_train_geo.simulation.work import Flow


def run(flows, seconds_per_byte, starts):
    """Start each flow's one message at its time; returns when each is done."""
    network = Network(flows, seconds_per_byte)
    pending = sorted((time_s, i) for i, time_s in enumerate(starts))
    done_s = [math.nan] * len(flows)
    while True:
        now_s = min(network.next_s(), pending[0][0] if pending else math.inf)
        if now_s == math.inf:
            return done_s
        for i in network.finish(now_s):
            done_s[i] = now_s
        while pending and pending[0][0] <= now_s:
            network.start(pending.pop(0)[1], now_s)
        network.share(now_s)


def flow(size_bytes, *resources, rate=100.0):
    return Flow(0.0, size_bytes, 1 / rate, resources)


def test_two_flows_share_one_nic():
    # 10 B/s: both at 5 until the short one is done at 4; the other has 20 left, at 10.
    done_s = run([flow(20.0, 0), flow(40.0, 0)], [0.1], [0.0, 0.0])
    assert done_s == pytest.approx([4.0, 6.0])


def test_a_later_flow_halves_what_the_first_has():
    # 20 alone in 2 s, 10 more at 5 B/s until 4, when the second has 10 of 30; then 5 B/s each.
    done_s = run([flow(30.0, 0), flow(30.0, 0)], [0.1], [0.0, 2.0])
    assert done_s == pytest.approx([4.0, 6.0])


def test_a_flow_limited_by_its_own_link_leaves_the_rest():
    done_s = run([flow(20.0, 0, rate=2.0), flow(80.0, 0)], [0.1], [0.0, 0.0])
    assert done_s == pytest.approx([10.0, 10.0])


def test_a_change_reaches_flows_that_share_nothing_with_its_cause():
    # 0 and 1 share a, 1 and 2 share b (10 B/s each). While 0 is there, 1 has 5 and 2 has 5; when
    # 0 (10 bytes) is done at 2, nothing changes for 1 and 2: b is full. But when 2 is done ...
    flows = [flow(100.0, 0), flow(20.0, 0, 1), flow(10.0, 1)]
    # ... at 2, 1 is still held at 5 by a: it ends at 4, and 0 has 10 B/s from there.
    assert run(flows, [0.1, 0.1], [0.0] * 3) == pytest.approx([12.0, 4.0, 2.0])
    # With b at 4 B/s, 1 and 2 have 2 each and 0 has 8; 2 ends at 5, 1 then has 4 and 0 has 6.
    assert run(flows, [0.1, 0.25], [0.0] * 3) == pytest.approx([12.0, 7.5, 5.0])


@st.composite
def traffic(draw):
    seconds_per_byte = draw(st.lists(st.floats(0.01, 2), min_size=1, max_size=4))
    flows = draw(
        st.lists(
            st.builds(
                Flow,
                st.just(0.0),
                st.floats(0.1, 50),
                st.floats(0.01, 2),
                st.sets(st.integers(0, len(seconds_per_byte) - 1), min_size=1).map(
                    lambda used: tuple(sorted(used))
                ),
            ),
            min_size=1,
            max_size=8,
        )
    )
    # Messages of a flow: gaps between the end of one and the start of the next.
    gaps = st.lists(st.sampled_from([0.0, 0.5, 3.0]), min_size=1, max_size=4)
    return flows, seconds_per_byte, [draw(gaps) for _ in flows]


@given(traffic())
def test_all_bytes_arrive_and_nothing_carries_more_than_it_can(case):
    flows, seconds_per_byte, gaps = case
    network = Network(flows, seconds_per_byte)
    pending = sorted((own[0], i) for i, own in enumerate(gaps))
    gaps = [own[1:] for own in gaps]
    carried = [0.0] * len(flows)
    under_way: set[int] = set()
    now_s = 0.0
    while True:
        after_s = min(network.next_s(), pending[0][0] if pending else math.inf)
        if after_s == math.inf:
            break
        assert after_s >= now_s
        for i in under_way:
            carried[i] += network.rate(i) * (after_s - now_s)
        now_s = after_s
        for i in network.finish(now_s):
            under_way.remove(i)
            assert carried[i] == pytest.approx(flows[i].size_bytes)
            carried[i] = 0.0
            if gaps[i]:
                pending.append((now_s + gaps[i].pop(0), i))
        pending.sort()
        while pending and pending[0][0] <= now_s:
            i = pending.pop(0)[1]
            network.start(i, now_s)
            under_way.add(i)
        network.share(now_s)

        rates = {i: network.rate(i) for i in under_way}
        loads = [sum(rates[i] for i in rates if r in flows[i].resources) for r in range(4)]
        for r, per_byte in enumerate(seconds_per_byte):
            assert loads[r] * per_byte <= 1 + 1e-8
        for i, rate in rates.items():
            assert rate * flows[i].seconds_per_byte <= 1 + 1e-9
            # Max-min: at its limit, or a largest one of something that is full.
            assert rate * flows[i].seconds_per_byte >= 1 - 1e-8 or any(
                loads[r] * seconds_per_byte[r] >= 1 - 1e-8
                and all(rate >= rates[j] * (1 - 1e-8) for j in rates if r in flows[j].resources)
                for r in flows[i].resources
            )
    assert not under_way
    assert not any(gaps)
