"""Rings and chains, against the formulas by hand."""

from __future__ import annotations

import pytest

from ray_train_geo.cluster.topology import Device, Link, Topology, Uplink
from ray_train_geo.planning.link_table import LinkTable
from ray_train_geo.systems.collectives import (
    all_reduce_s,
    reduce_and_broadcast_s,
    ring,
    ring_of_all,
)

FAST, SLOW = 100.0, 10.0  # bytes per second


def table(nodes: int, gpus: int = 1, nic: float | None = None) -> LinkTable:
    """Two regions, the second half of the nodes in the second; 1 s between them."""
    devices = tuple(
        Device(id=f"{n}/{g}", node=str(n), region="a" if n < (nodes + 1) // 2 else "b")
        for n in range(nodes)
        for g in range(gpus)
    )
    inside, across = Link(0.0, FAST), Link(1.0, SLOW)
    links = {
        ("a", "a"): inside,
        ("b", "b"): inside,
        ("a", "b"): across,
        ("b", "a"): across,
    }
    uplinks = {str(n): Uplink(nic or 1e9, nic or 1e9) for n in range(nodes)}
    return LinkTable.of(Topology(devices, region_links=links, node_uplinks=uplinks))


def test_a_ring_goes_around():
    assert ring([3, 1, 2]) == [(3, 1), (1, 2), (2, 3)]
    assert ring([3]) == []


def test_all_reduce_is_as_slow_as_its_slowest_link():
    # 2 (n - 1) / n of 40 bytes at 10 B/s, and twice around with two hops of 1 s.
    assert all_reduce_s(table(4), [[0, 1, 2, 3]], [40.0]) == pytest.approx(60 / 10 + 4)
    assert all_reduce_s(table(4), [[0, 1]], [40.0]) == pytest.approx(40 / 100)
    assert all_reduce_s(table(4), [[0]], [40.0]) == 0.0


def test_reduce_and_broadcast_passes_all_bytes_twice():
    # There and back along 0 - 1 - 2 - 3, whose middle link is slow.
    assert reduce_and_broadcast_s(table(4), [[0, 1, 2, 3]], [40.0]) == pytest.approx(2 * (4 + 1))


def test_groups_share_a_nic():
    two = table(2, gpus=2, nic=8.0)
    alone = reduce_and_broadcast_s(two, [[0, 2]], [40.0])
    both = reduce_and_broadcast_s(two, [[0, 2], [1, 3]], [40.0, 40.0])
    assert alone == pytest.approx(2 * (40 / 10 + 1))  # the link is slower than 40 / 8
    assert both == pytest.approx(2 * 80 / 8)


def test_the_ring_of_all_devices():
    assert ring_of_all(table(4)) == (1 / SLOW, 2.0)
    assert ring_of_all(table(4, nic=5.0)) == (1 / 5.0, 2.0)
