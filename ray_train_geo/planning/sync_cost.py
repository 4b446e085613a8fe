"""What summing gradients costs: which groups there are, and how long each takes by mode.

Every layer is held once by every pipeline.  Where all pipelines are cut alike, a stage's holders
are one group; where they are not, each run of layers that no pipeline cuts is one::

    pipeline 0   [0 1 2|3 4 5]        groups: layers 0-1, layer 2, layers 3-5,
    pipeline 1   [0 1|2 3 4 5]        each with one member of every pipeline

A tied token matrix has a group of its own: the first and the last stage of every pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ray_train_geo.model.catalog import (
    ModelDims,
    embedding_parameters,
    head_parameters,
    layer_parameters,
)
from ray_train_geo.planning.link_table import Floats, Ints, LinkTable
from ray_train_geo.planning.route_cost import route_loads
from ray_train_geo.planning.sync_routes import ROUTED
from ray_train_geo.spec import GradientSyncName

__all__ = ["SyncGroups", "sync_groups", "synced_s"]

_RINGS_AT_ONCE = 2
"""Collectives that gloo has under way on a group (measured)."""
_ALL_PAIRS = 48
"""Groups up to this size look at all their pairs, larger ones at a few members of each site."""


@dataclass(frozen=True, slots=True, eq=False)
class SyncGroups:
    """Groups of equal size.

    Args:
        size_bytes: ``[groups]``; the gradients that each group sums.
        members: ``[groups, n]``; numbers of the stages, counted pipeline by pipeline.
    """

    size_bytes: Floats
    members: Ints


def sync_groups(
    dims: ModelDims, cuts: Sequence[Sequence[int]], gradient_bytes: float = 4.0
) -> list[SyncGroups]:
    """All groups of two or more members.

    Args:
        cuts: ``[pipelines][stages + 1]``; stage boundaries, in layers.
        gradient_bytes: of one gradient in a message; without a codec fp32, at every precision.
    """
    tokens = dims.vocab_size * dims.dim if dims.tied_embeddings else 0
    offsets = np.cumsum([0, *(len(c) - 1 for c in cuts)])
    found = []
    if len(cuts) > 1:
        bounds = np.array(sorted({layer for cut in set(map(tuple, cuts)) for layer in cut}))
        parameters = np.diff(bounds) * layer_parameters(dims)
        parameters[0] += embedding_parameters(dims) - tokens
        parameters[-1] += head_parameters(dims)
        stages = {tuple(c): np.searchsorted(c, bounds[:-1], side="right") - 1 for c in cuts}
        members = np.stack([stages[tuple(c)] + o for c, o in zip(cuts, offsets, strict=False)], 1)
        found.append(SyncGroups(gradient_bytes * parameters.astype(float), members))
    if tokens:
        firsts, lasts = offsets[:-1], offsets[1:] - 1
        # All first stages, then the last ones that are none: a ring passes between them twice.
        ends = np.concatenate([firsts, lasts[lasts != firsts]])
        if len(ends) > 1:
            found.append(SyncGroups(np.array([gradient_bytes * float(tokens)]), ends[None, :]))
    return found


def synced_s(
    groups: Sequence[SyncGroups],
    mode: GradientSyncName,
    devices: Ints,
    last_start_s: Floats,
    end_s: Floats,
    table: LinkTable,
    bucket_bytes: float = math.inf,
    weights: Floats | None = None,
) -> Floats:
    """When each stage has all its summed gradients, in seconds from the start of the step.

    A group starts when its slowest member begins its last backward (its gradients become final
    from there) and is not done before that backward has ended.  A worker runs its groups one
    behind the other; all groups share NICs and uplinks.

    Args:
        devices: ``[stages]``; each stage's device number in ``table``.
        last_start_s, end_s: ``[stages]``; begin and end of each stage's last backward.
        bucket_bytes: what one collective sums at most.
        weights: ``[stages]``; of their shards in a sharded PS; by default all alike.

    Returns:
        ``[stages]``
    """
    start, done, load = last_start_s.copy(), end_s.copy(), np.zeros(len(devices))
    crossing: list[_Crossing] = []
    for g in groups:
        group_start = last_start_s[g.members].max(axis=1)
        group_end = end_s[g.members].max(axis=1)
        rows, parts = devices[g.members], None
        if mode in ROUTED or (mode == "sharded_ps" and weights is not None):
            shares = None if weights is None else weights[g.members]
            own, parts = route_loads(mode, g.size_bytes, rows, table, bucket_bytes, shares)
        else:
            own = _own_s(mode, g.size_bytes, rows, table, bucket_bytes)
        np.maximum.at(start, g.members, group_start[:, None])
        np.maximum.at(done, g.members, group_end[:, None])
        np.add.at(load, g.members, own[:, None])
        crossing.append(_Crossing(g.size_bytes, rows, group_start, parts))
    done = np.maximum(done, start + load)
    return np.maximum(done, _shared_s(mode, crossing, table)[table.node[devices]])


def _own_s(
    mode: GradientSyncName, size: Floats, members: Ints, table: LinkTable, bucket_bytes: float
) -> Floats:
    """``[groups]``; each group's time if it had the network to itself (Thakur et al., 2005)."""
    n = members.shape[1]
    if mode == "allreduce":  # a ring: n - 1 steps to sum a shard each, n - 1 to spread the sums
        latency, per_byte = table.hops(members, np.roll(members, -1, axis=1))
        # Every bucket is a ring of its own, whose latencies hide behind one other's.
        rings = np.maximum(1.0, np.ceil(size / bucket_bytes) / _RINGS_AT_ONCE)[:, None]
        each = rings * latency + (size / n)[:, None] * per_byte
        steps: Floats = 2.0 * (n - 1) * each.max(axis=1)
        return steps
    if mode == "central_ps":  # everything to the first member, and the sum back
        root, others = members[:, :1], members[:, 1:]
        into, out = table.hops(others, root), table.hops(root, others)
        both: Floats = (into[0] + size[:, None] * into[1]).max(axis=1)
        both += (out[0] + size[:, None] * out[1]).max(axis=1)
        return both
    # Sharded PS: a shard from each to each, all at once, and the sums back.
    if n <= _ALL_PAIRS:
        worst = _worst_pair(size / n, members, table)
    else:
        few = (_representatives(row, table)[None, :] for row in members)
        worst = np.array(
            [_worst_pair(size[i : i + 1] / n, row, table)[0] for i, row in enumerate(few)]
        )
    return 2 * worst


def _worst_pair(size: Floats, members: Ints, table: LinkTable) -> Floats:
    latency, per_byte = table.hops(members[:, :, None], members[:, None, :])
    time = latency + size[:, None, None] * per_byte
    same = members[:, :, None] == members[:, None, :]
    worst: Floats = np.where(same, 0.0, time).max(axis=(1, 2))
    return worst


def _representatives(members: Ints, table: LinkTable) -> Ints:
    """Up to two devices of each of up to two nodes of each site: pairs of all kinds there are."""
    order = members[np.lexsort((members, table.node[members], table.site[members]))]
    node, site = table.node[order], table.site[order]
    positions = np.arange(len(order))
    new_node = np.r_[True, node[1:] != node[:-1]]
    new_site = np.r_[True, site[1:] != site[:-1]]
    in_node = positions - np.maximum.accumulate(np.where(new_node, positions, 0))
    nodes_so_far = np.cumsum(new_node)
    in_site = nodes_so_far - np.maximum.accumulate(np.where(new_site, nodes_so_far, 0))
    chosen: Ints = order[(in_node < 2) & (in_site < 2)]
    return chosen


class _Crossing(NamedTuple):
    """Groups of equal size, and what they put on the network.

    Args:
        size: ``[groups]``
        members: ``[groups, n]``; device numbers.
        start: ``[groups]``
        parts: ``[groups, n, n]``; where there is a route, what one member sends another.
    """

    size: Floats
    members: Ints
    start: Floats
    parts: Floats | None


def _shared_s(mode: GradientSyncName, groups: Sequence[_Crossing], table: LinkTable) -> Floats:
    """``[nodes]``; when a node's NICs, and the uplinks that are used, have carried everything.

    What shares a resource is not done before any moment plus all bytes of groups that start then
    or later, at the resource's rate.
    """
    nodes = len(table.nodes)
    starts: list[Floats] = []
    loads: list[Floats] = []
    users: list[Ints] = []
    uplinks: list[tuple[float, Floats]] = []
    for size, members, start, parts in groups:
        node, region = table.node[members], table.region[members]
        if parts is None:
            out, into = _nic_bytes(mode, size, node)
        else:
            leaves = node[:, :, None] != node[:, None, :]
            out = into = size[:, None] * (parts * leaves).sum(axis=2)
        busy_out = out * table.out_seconds_per_byte[node]
        busy_in = into * table.in_seconds_per_byte[node]
        # A central server, and a tree's root, get everything before they send the sums.
        in_turn = mode in ("central_ps", "tree")
        busy = busy_out + busy_in if in_turn else np.maximum(busy_out, busy_in)
        starts.append(np.broadcast_to(start[:, None], node.shape).ravel())
        loads.append(busy.ravel())
        users.append(node.ravel())
        if table.uplink_seconds_per_byte.any():
            crossing = (
                _region_bytes(mode, size, region, len(table.regions))
                if parts is None
                else _routed_region_bytes(size, parts, region, len(table.regions))
            )
            seconds = (crossing * table.uplink_seconds_per_byte).reshape(len(size), -1)
            uplinks += zip(start.tolist(), seconds, strict=True)
    done = np.zeros(nodes)
    if not starts:
        return done
    begins, load, user = np.concatenate(starts), np.concatenate(loads), np.concatenate(users)
    order = np.lexsort((-begins, user))
    begins, load, user = begins[order], load[order], user[order]
    carried = np.cumsum(load)
    first = np.r_[True, user[1:] != user[:-1]]
    before = np.maximum.accumulate(np.where(first, carried - load, 0.0))
    np.maximum.at(done, user, np.where(load > 0, begins + carried - before, 0.0))
    if uplinks:
        uplinks.sort(key=lambda item: -item[0])
        so_far = np.cumsum([seconds for _, seconds in uplinks], axis=0)
        when = np.array([begin for begin, _ in uplinks])[:, None] + so_far
        done = np.maximum(done, float(np.where(so_far > 0, when, 0.0).max()))
    return done


def _nic_bytes(mode: GradientSyncName, size: Floats, node: Ints) -> tuple[Floats, Floats]:
    """``[groups, n]`` each; bytes that a member sends to, and gets from, other nodes."""
    n = node.shape[1]
    if mode == "sharded_ps":
        ordered = np.sort(node, axis=1)
        together = np.stack(
            [
                np.searchsorted(row, wanted, side="right") - np.searchsorted(row, wanted)
                for row, wanted in zip(ordered, node, strict=True)
            ]
        )
        sent: Floats = (2 * size / n)[:, None] * (n - together)
        return sent, sent
    if mode == "allreduce":
        edge = np.broadcast_to((2 * (n - 1) / n * size)[:, None], node.shape)
        leaves = node != np.roll(node, -1, axis=1)
        return np.where(leaves, edge, 0.0), np.where(np.roll(leaves, 1, axis=1), edge, 0.0)
    away = np.where(node != node[:, :1], size[:, None], 0.0)
    away[:, 0] = away[:, 1:].sum(axis=1)  # the root: in, then out again
    return away, away


def _region_bytes(mode: GradientSyncName, size: Floats, region: Ints, regions: int) -> Floats:
    """``[groups, regions, regions]``; bytes between each two regions."""
    groups, n = region.shape
    between = np.zeros((groups, regions, regions))
    group = np.arange(groups)[:, None]
    if mode == "sharded_ps":
        count = np.zeros((groups, regions))
        np.add.at(count, (group, region), 1.0)
        between = (2 * size / n)[:, None, None] * count[:, :, None] * count[:, None, :]
    elif mode == "allreduce":
        edge = np.broadcast_to((2 * (n - 1) / n * size)[:, None], region.shape)
        np.add.at(between, (group, region, np.roll(region, -1, axis=1)), edge)
    else:
        whole = np.broadcast_to(size[:, None], (groups, n - 1))
        for a, b in ((region[:, 1:], region[:, :1]), (region[:, :1], region[:, 1:])):
            np.add.at(between, (group, *np.broadcast_arrays(a, b)), whole)
    between[:, range(regions), range(regions)] = 0.0
    return between


def _routed_region_bytes(size: Floats, parts: Floats, region: Ints, regions: int) -> Floats:
    """``[groups, regions, regions]``; bytes between each two regions of groups with a route."""
    between = np.zeros((len(size), regions, regions))
    group = np.arange(len(size))[:, None, None]
    carried = size[:, None, None] * parts
    np.add.at(between, (group, region[:, :, None], region[:, None, :]), carried)
    between[:, range(regions), range(regions)] = 0.0
    return between
