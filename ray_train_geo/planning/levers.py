"""What would help a plan most: the same plan, predicted again on a better network or devices.

Levers come in groups: first all links between regions get twice the bandwidth, say, and only if
that makes the step shorter is each pair of regions tried alone::

    links between regions  x  bandwidth, latency, TCP window  ->  each pair of regions
    links within regions   x  bandwidth, latency, TCP window  ->  each region
    links within nodes     x  bandwidth, latency
    NICs  ->  each region's nodes          uplinks  ->  each pair of regions
    devices  ->  each type                 codecs, gradient-sync modes, no sync at all
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import get_args

from ray_train_geo.cluster.topology import (
    DEFAULT_LINK,
    LOCAL_LINK,
    Device,
    Link,
    Topology,
    Uplink,
)
from ray_train_geo.planning.budget import Budget
from ray_train_geo.planning.codecs import CODECS
from ray_train_geo.planning.plan import PipelinePlan, Plan
from ray_train_geo.planning.predict import Prediction, predict
from ray_train_geo.planning.problem import Problem
from ray_train_geo.spec import GradientSyncName

__all__ = ["Gain", "gains"]

_FASTER = 1.25
_TWICE = 2.0

_NOTICEABLE = 0.002
"""Shares of the step: a smaller gain is none."""

_ALMOST_ALL = 0.9
"""A part that brings this much of what its whole group brings is named instead of the group."""

_MOST_PARTS, _FEWEST_PARTS = 16, 4
"""Pairs of regions (or regions, or types) that are tried alone, of each kind: the busiest ones."""

_MANY_STAGES = 16_384
"""In all predictions of one kind: large plans try fewer parts."""

_MODES: tuple[GradientSyncName, ...] = get_args(GradientSyncName)

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Gain:
    """What one change would bring.

    Args:
        change: what is changed, in words.
        step_s: the step that is predicted then, with the plan as it is, in seconds.
        saved: part of the step that it saves, 0 to 1.
    """

    change: str
    step_s: float
    saved: float


@dataclass(frozen=True, slots=True)
class _Lever:
    """One change, and the smaller changes that it is made of."""

    change: str
    apply: Callable[[Topology], Topology]
    parts: tuple[_Lever, ...] = ()


def gains(
    problem: Problem,
    plan: Plan,
    step_s: float,
    unsynced_s: float,
    most: int = 5,
    budget: Budget | None = None,
) -> tuple[Gain, ...]:
    """The changes that would help ``plan`` most, best first.

    The plan stays as it is; made for the changed devices it could be better still.

    Args:
        problem: of the topology as it is.
        step_s: of the plan as it is.
        unsynced_s: of the plan if gradient sync took no time.
        most: how many to return; fewer if fewer help.
        budget: when it is spent, no further changes are tried.
    """
    budget = budget or Budget()
    found = [_gain("gradient sync wholly hidden behind compute", unsynced_s, step_s)]
    for gain in chain(_by_lever(problem, plan, step_s, budget), _by_message(problem, plan, step_s)):
        found.append(gain)
        if budget.spent():
            break
    helpful = [g for g in found if g.saved >= _NOTICEABLE]
    # Stable: equal gains stand in the order in which they were tried.
    return tuple(sorted(helpful, key=lambda g: -float(f"{g.saved:.6g}"))[:most])


def _gain(change: str, changed_s: float, step_s: float) -> Gain:
    return Gain(change, changed_s, 1 - changed_s / step_s)


def _by_lever(problem: Problem, plan: Plan, step_s: float, budget: Budget) -> Iterator[Gain]:
    few = max(_FEWEST_PARTS, min(_MOST_PARTS, _MANY_STAGES // plan.world_size))
    for group in _levers(problem, plan):
        if budget.spent():
            return
        whole = _gain(group.change, _stepped(problem, plan, group), step_s)
        if whole.saved < _NOTICEABLE:
            continue
        parts = [_gain(p.change, _stepped(problem, plan, p), step_s) for p in group.parts[:few]]
        if not any(p.saved >= _ALMOST_ALL * whole.saved for p in parts):
            yield whole
        yield from parts


def _by_message(problem: Problem, plan: Plan, step_s: float) -> Iterator[Gain]:
    """What codecs on the hops between nodes, and other ways to sync gradients, would bring."""
    node = {d.id: d.node for d in problem.topology.devices}
    for codec in CODECS:
        pipelines = [_with_codec(p, codec, node.__getitem__) for p in plan.pipelines]
        if tuple(pipelines) != plan.pipelines:
            changed = _predict(problem, pipelines, plan, plan.gradient_sync)
            what = "no codec" if codec == "none" else f"the {codec} codec"
            yield _gain(f"{what} on every hop between nodes", changed.step_s, step_s)
    for mode in _MODES:
        if mode != plan.gradient_sync:
            changed = _predict(problem, plan.pipelines, plan, mode)
            yield _gain(f"gradient sync by {mode}", changed.step_s, step_s)


def _with_codec(pipeline: PipelinePlan, codec: str, node_of: Callable[[str], str]) -> PipelinePlan:
    stages = list(pipeline.stages)
    for s, (a, b) in enumerate(pairwise(pipeline.stages)):
        if node_of(a.device) != node_of(b.device):
            stages[s] = replace(a, codec=codec)
    return replace(pipeline, stages=tuple(stages))


def _stepped(problem: Problem, plan: Plan, lever: _Lever) -> float:
    changed = replace(problem, topology=lever.apply(problem.topology))
    return _predict(changed, plan.pipelines, plan, plan.gradient_sync).step_s


def _predict(
    problem: Problem, pipelines: Sequence[PipelinePlan], plan: Plan, mode: GradientSyncName
) -> Prediction:
    return predict(problem, pipelines, plan.schedule, mode)


def _levers(problem: Problem, plan: Plan) -> Iterator[_Lever]:
    topology = problem.topology
    used = [problem.devices[s.device] for p in plan.pipelines for s in p.stages]
    regions = sorted({d.region for d in used})
    between = _busiest_pairs(plan, problem, regions)
    yield from _link_levers(topology, "between regions", "between {0} and {1}", between)
    several_nodes = [(r, r) for r in regions if len({d.node for d in used if d.region == r}) > 1]
    yield from _link_levers(topology, "within regions", "within {0}", several_nodes)
    if len({d.node for d in used}) < len(used):
        for change, better in _link_changes(topology):
            yield _Lever(f"{change} within nodes", _local(better))
    nodes = {r: {d.node for d in used if d.region == r} for r in regions}
    yield from _group(
        "twice the NICs' bandwidth",
        [
            (f" of the nodes in {r}", _nics(nodes[r]))
            for r in regions
            if nodes[r] & topology.node_uplinks.keys()
        ],
        _nics({d.node for d in used}),
    )
    shared = [p for p in between if {p, p[::-1]} & topology.region_uplinks.keys()]
    yield from _group(
        "twice the shared uplinks",
        [(f" between {a} and {b}", _uplinks([(a, b)])) for a, b in shared],
        _uplinks(shared),
    )
    types = sorted({d.type for d in used})
    yield from _group(
        f"{_FASTER - 1:.0%} faster devices",
        [(f" of type {t}", _faster({t})) for t in types],
        _faster(set(types)),
    )


def _group(
    change: str,
    parts: Sequence[tuple[str, Callable[[Topology], Topology]]],
    whole: Callable[[Topology], Topology],
) -> Iterator[_Lever]:
    """One lever for all parts; none where there are no parts."""
    if parts:
        yield _Lever(change, whole, tuple(_Lever(change + name, one) for name, one in parts))


def _link_changes(topology: Topology) -> Iterator[tuple[str, Callable[[Link], Link]]]:
    yield (
        "twice the bandwidth",
        lambda k: replace(k, bandwidth_bytes_per_s=_TWICE * k.bandwidth_bytes_per_s),
    )
    yield "half the latency", lambda k: replace(k, latency_s=k.latency_s / _TWICE)
    links = (*topology.region_links.values(), *topology.node_links.values())
    if any(math.isfinite(k.window_bytes) for k in links):
        yield "twice the TCP window", lambda k: replace(k, window_bytes=_TWICE * k.window_bytes)


def _link_levers(
    topology: Topology, where: str, name: str, pairs: Sequence[Pair]
) -> Iterator[_Lever]:
    for change, better in _link_changes(topology):
        parts = [(" " + name.format(*pair), _relinked({pair}, better)) for pair in pairs]
        for lever in _group(change, parts, _relinked(set(pairs), better)):
            yield replace(lever, change=f"{change} {where}")


def _busiest_pairs(plan: Plan, problem: Problem, regions: Sequence[str]) -> list[Pair]:
    """Pairs of the plan's regions: most messages first, then those of the slowest links."""
    messages: dict[Pair, int] = {}
    for p in plan.pipelines:
        for a, b in pairwise(problem.devices[s.device].region for s in p.stages):
            pair = min(a, b), max(a, b)
            messages[pair] = messages.get(pair, 0) + p.microbatches

    first = {d.region: d for d in reversed(problem.topology.devices)}

    def order(pair: Pair) -> tuple[float, float, Pair]:
        hop = problem.hop(*(problem.table.index[first[r].id] for r in pair))
        return -messages.get(pair, 0), -problem.message_bytes * hop[1] - hop[0], pair

    return sorted(((a, b) for a in regions for b in regions if a < b), key=order)


def _relinked(
    pairs: Collection[Pair], better: Callable[[Link], Link]
) -> Callable[[Topology], Topology]:
    """Change the links between different nodes of these (pairs of) regions, both ways."""
    both = {*pairs, *(pair[::-1] for pair in pairs)}

    def apply(topology: Topology) -> Topology:
        region = {d.node: d.region for d in topology.devices}
        by_region, by_node = dict(topology.region_links), dict(topology.node_links)
        for a, b in both:
            fallback = topology.default_link or (DEFAULT_LINK if a == b else None)
            link = by_region.get((a, b), fallback)
            if link is not None:
                by_region[a, b] = better(link)
        for (m, n), link in topology.node_links.items():
            if m != n and (region.get(m), region.get(n)) in both:
                by_node[m, n] = better(link)
        return replace(topology, region_links=by_region, node_links=by_node)

    return apply


def _local(better: Callable[[Link], Link]) -> Callable[[Topology], Topology]:
    """Change the links between devices of one node."""

    def apply(topology: Topology) -> Topology:
        links = {
            (n, n): better(topology.node_links.get((n, n), LOCAL_LINK))
            for n in dict.fromkeys(d.node for d in topology.devices)
        }
        return replace(topology, node_links={**topology.node_links, **links})

    return apply


def _nics(nodes: Collection[str]) -> Callable[[Topology], Topology]:
    def apply(topology: Topology) -> Topology:
        faster = {
            n: Uplink(_TWICE * nic.out_bytes_per_s, _TWICE * nic.in_bytes_per_s)
            for n, nic in topology.node_uplinks.items()
            if n in nodes
        }
        return replace(topology, node_uplinks={**topology.node_uplinks, **faster})

    return apply


def _uplinks(pairs: Collection[Pair]) -> Callable[[Topology], Topology]:
    both = {*pairs, *(pair[::-1] for pair in pairs)}

    def apply(topology: Topology) -> Topology:
        uplinks = {
            pair: _TWICE * rate if pair in both else rate
            for pair, rate in topology.region_uplinks.items()
        }
        return replace(topology, region_uplinks=uplinks)

    return apply


def _faster(types: Collection[str]) -> Callable[[Topology], Topology]:
    def faster(device: Device) -> Device:
        if device.type not in types:
            return device
        return replace(device, flops_per_s=_FASTER * device.flops_per_s)

    return lambda topology: topology.with_devices(map(faster, topology.devices))
