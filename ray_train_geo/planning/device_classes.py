"""Which devices are interchangeable, because their links to all others are the same.

Two devices are *twins* if each third device is reached from both, and reaches both, over equal
links, and the link between the two is equal both ways.  Being twins is an equivalence::

    node a: a/0 a/1      {a/0, a/1} is a class: they share a node
    node b: b/0          {b/0, c/0} is one: single-device nodes of one region, where
    node c: c/0                     no link sets the nodes apart

So a search may count the devices of a class instead of telling them apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ray_train_geo.planning.link_table import LinkTable

__all__ = ["DeviceClasses", "device_classes"]

Rate = tuple[float, float]
"""``(latency_s, seconds_per_byte)``"""


@dataclass(frozen=True, slots=True, eq=False)
class DeviceClasses:
    """The classes, in the order of their first devices.

    Args:
        members: ``[classes]``; the devices of each, ascending, as numbered by the link table.
        label: ``[devices]``; each device's class.
    """

    members: tuple[tuple[int, ...], ...]
    label: NDArray[np.int64]


def device_classes(table: LinkTable) -> DeviceClasses:
    """The classes of twins among ``table.devices``.

    Takes O(devices + sites^2) where few sites are alike.
    """
    site_count = len(table.latency_s)
    node_site = np.zeros(len(table.nodes), dtype=np.int64)
    node_site[table.node] = table.site
    node_sizes = np.bincount(table.node, minlength=len(table.nodes))
    nodes_of_site = np.bincount(node_site, minlength=site_count)

    local = [
        (float(a), float(b))
        for a, b in zip(table.local_latency_s, table.local_seconds_per_byte, strict=True)
    ]
    inner: list[Rate | None] = [
        (float(table.latency_s[s, s]), float(table.seconds_per_byte[s, s]))
        for s in range(site_count)
    ]
    for node, site in enumerate(node_site):
        if nodes_of_site[site] == 1:
            inner[site] = local[node] if node_sizes[node] > 1 else None
    merged = _merge_sites(table, inner)

    # A node whose own devices are closer (or farther) than the site's nodes is a class by itself.
    apart = [
        node_sizes[node] > 1 and local[node] != inner[site] for node, site in enumerate(node_site)
    ]
    numbers: dict[tuple[bool, int], int] = {}
    members: list[list[int]] = []
    label = np.zeros(len(table.devices), dtype=np.int64)
    for device, (node, site) in enumerate(zip(table.node, table.site, strict=True)):
        key = (True, int(node)) if apart[node] else (False, merged[site])
        number = numbers.setdefault(key, len(members))
        if number == len(members):
            members.append([])
        members[number].append(device)
        label[device] = number
    return DeviceClasses(tuple(map(tuple, members)), label)


def _merge_sites(table: LinkTable, inner: list[Rate | None]) -> list[int]:
    """For each site, the first site whose devices are twins of its devices (itself if none)."""
    sites = len(inner)
    # Twin sites have the same links, in another order: only sites with equal sorted links meet.
    off_diagonal = ~np.eye(sites, dtype=bool)
    buckets: dict[bytes, list[int]] = {}
    merged = list(range(sites))
    for s in range(sites):
        keep = off_diagonal[s]
        links = np.stack(
            [
                table.latency_s[s, keep],
                table.seconds_per_byte[s, keep],
                table.latency_s[keep, s],
                table.seconds_per_byte[keep, s],
            ]
        )
        if inner[s] is not None:  # a site's own link counts as one of its links
            links = np.column_stack([links, np.tile(np.array(inner[s]), 2)])
        bucket = buckets.setdefault(_extremes(links), [])
        twin = next((t for t in bucket if _twin_sites(table, inner, s, t)), None)
        if twin is None:
            bucket.append(s)
        else:
            merged[s] = twin
    return merged


def _extremes(links: NDArray[np.float64]) -> bytes:
    """The same for the same links in any order."""
    return np.append(links.min(axis=1, initial=np.inf), links.max(axis=1, initial=0.0)).tobytes()


def _twin_sites(table: LinkTable, inner: list[Rate | None], s: int, t: int) -> bool:
    latency, per_byte = table.latency_s, table.seconds_per_byte
    there = float(latency[s, t]), float(per_byte[s, t])
    back = float(latency[t, s]), float(per_byte[t, s])
    if there != back or any(own not in (None, there) for own in (inner[s], inner[t])):
        return False
    others = np.ones(len(inner), dtype=bool)
    others[[s, t]] = False
    return all(
        np.array_equal(links[s, others], links[t, others])
        and np.array_equal(links[others, s], links[others, t])
        for links in (latency, per_byte)
    )
