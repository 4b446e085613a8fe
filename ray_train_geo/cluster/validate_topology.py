"""What a topology must be before anything is planned on it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, permutations

from ray_train_geo.cluster.topology import Device, Link, Topology
from ray_train_geo.errors import SpecError

__all__ = ["validate_network", "validate_topology"]

_MOST_FAULTS = 10
"""So many lines are enough to see what is wrong with ten thousand devices."""

_NO_BANDWIDTH = "it must be a finite number above 0; leave out what does not exist"


def validate_topology(topology: Topology) -> None:
    """Check devices and links.

    Raises:
        SpecError: there are no devices, two with one id or a node in two regions; a figure is not a
            number that it can be; a link leads one way only; regions that no link joins.  One line
            for each fault, of which the first ten are shown.
    """
    _refuse(_all_faults(topology))


def validate_network(topology: Topology) -> None:
    """Check the links alone, of a topology whose devices are not known yet.

    Raises:
        SpecError: as :func:`validate_topology`.
    """
    _refuse(_network_faults(topology))


def _refuse(faults: Iterator[str]) -> None:
    shown = list(islice(faults, _MOST_FAULTS))
    if shown:
        more = sum(1 for _ in faults)
        raise SpecError("\n".join([*shown, f"and {more} more"] if more else shown))


def _all_faults(topology: Topology) -> Iterator[str]:
    if not topology.devices:
        yield "the topology has no devices; name at least one"
        return
    yield from _device_faults(topology.devices)
    yield from _network_faults(topology)
    yield from _gaps(topology)


def _network_faults(topology: Topology) -> Iterator[str]:
    yield from _figure_faults(topology)
    yield from _one_way_faults(topology)


def _positive(value: float) -> bool:
    return 0 < value < math.inf  # false for NaN; an integer may be too large for a float


def _device_faults(devices: Sequence[Device]) -> Iterator[str]:
    for device_id, count in Counter(d.id for d in devices).items():
        if count > 1:
            yield f"device {device_id!r} is given {count} times; ids must be unique"
    regions: dict[str, str] = {}
    for d in devices:
        region = regions.setdefault(d.node, d.region)
        if region != d.region:
            yield (
                f"device {d.id!r}: node {d.node!r} is in {region!r} already, so not in "
                f"{d.region!r}; a node is in one region"
            )
        rates = {"flops_per_s": d.flops_per_s, "memory_bytes": d.memory_bytes}
        rates |= {f"FLOP/s at {p}": rate for p, rate in d.flops_by_precision}
        for name, rate in rates.items():
            if not _positive(rate):
                yield f"device {d.id!r}: {name} is {rate}; it must be a finite number above 0"
        if not (math.isfinite(d.price_per_hour) and d.price_per_hour >= 0):
            yield f"device {d.id!r}: price_per_hour is {d.price_per_hour}; it must be 0 or more"


def _figure_faults(topology: Topology) -> Iterator[str]:
    """Links and uplinks with figures that nothing can have."""
    yield from _link_faults("link of nodes", topology.node_links)
    yield from _link_faults("link", topology.region_links)
    if topology.default_link is not None:
        yield from _figures("default_link", topology.default_link)
    for node, nic in topology.node_uplinks.items():
        for way, rate in (("out of", nic.out_bytes_per_s), ("into", nic.in_bytes_per_s)):
            if not _positive(rate):
                yield f"uplink {way} node {node!r}: {rate} bytes per second; {_NO_BANDWIDTH}"
    for (source, target), rate in topology.region_uplinks.items():
        if not _positive(rate):
            yield f"uplink {source} -> {target}: {rate} bytes per second; {_NO_BANDWIDTH}"


def _link_faults(kind: str, links: Mapping[tuple[str, str], Link]) -> Iterator[str]:
    for (source, target), link in links.items():
        yield from _figures(f"{kind} {source} -> {target}", link)


def _figures(where: str, link: Link) -> Iterator[str]:
    if not (math.isfinite(link.latency_s) and link.latency_s >= 0):
        yield f"{where}: latency is {link.latency_s} s; it must be a finite number, 0 or more"
    rate = link.bandwidth_bytes_per_s
    if not _positive(rate):
        yield f"{where}: bandwidth is {rate} bytes per second; {_NO_BANDWIDTH}"
    if not link.window_bytes > 0:
        yield f"{where}: window is {link.window_bytes} bytes; it must be above 0, or left out"


def _one_way_faults(topology: Topology) -> Iterator[str]:
    """Links without a way back: training sends gradients where activations came from."""
    region_of = {d.node: d.region for d in topology.devices}
    back = "name the other direction too (symmetric: true where both are alike)"
    joined = _joined_regions(topology)
    for source, target in topology.region_links:
        if (target, source) not in joined:
            yield f"link {source} -> {target} is one-way: {back}"
    for source, target in topology.node_links:
        if (target, source) in topology.node_links or not {source, target} <= region_of.keys():
            continue
        if (region_of[target], region_of[source]) not in topology.region_links:
            yield f"link of nodes {source} -> {target} is one-way: {back}"


def _links_of_nodes(topology: Topology) -> Counter[tuple[str, str]]:
    """How many links of two nodes lead from a region to a region."""
    region_of = {d.node: d.region for d in topology.devices}
    return Counter(
        (region_of[a], region_of[b])
        for a, b in topology.node_links
        if a in region_of and b in region_of
    )


def _joined_regions(topology: Topology) -> set[tuple[str, str]]:
    """Pairs of regions with a link from every node of one to every node of the other."""
    nodes = Counter({d.node: d.region for d in topology.devices}.values())
    links = _links_of_nodes(topology)
    complete = {(a, b) for (a, b), count in links.items() if count == nodes[a] * nodes[b]}
    return complete | set(topology.region_links)


def _gaps(topology: Topology) -> Iterator[str]:
    """Pairs of regions without a link, where there is no default."""
    if topology.default_link is not None:
        return
    regions = tuple(dict.fromkeys(d.region for d in topology.devices))
    islands = _islands(regions, {*topology.region_links, *_links_of_nodes(topology)})
    if len(islands) > 1:
        named = "; ".join("{" + ", ".join(island) + "}" for island in islands)
        yield f"no link joins the islands {named}: add links between them, or a default_link"
        return
    joined = _joined_regions(topology)
    for source, target in permutations(regions, 2):
        if (source, target) not in joined and (target, source) not in topology.region_links:
            yield f"no link {source} -> {target}: name one, or a default_link"


def _islands(regions: Sequence[str], links: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Regions that links join, however many links it takes."""
    neighbours: dict[str, list[str]] = {region: [] for region in regions}
    for a, b in links:
        if a in neighbours and b in neighbours:
            neighbours[a].append(b)
            neighbours[b].append(a)
    islands: list[list[str]] = []
    seen: set[str] = set()
    for region in regions:
        if region in seen:
            continue
        reached, found = [region], {region}
        for here in reached:  # grows while it is walked
            new = set(neighbours[here]) - found
            found |= new
            reached += sorted(new)
        seen |= found
        islands.append([r for r in regions if r in found])
    return islands
