r"""DT-FM's cost of a placement, exactly as published (Yuan et al., NeurIPS 2022, section 3).

Devices are split into one group per pipeline stage, of as many devices as there are replicas::

             stage 0   stage 1   stage 2
            +-------+ +-------+ +-------+
    replica | a   . | | b     | | c     |    data parallel: all devices of a stage exchange its
            |    \  | |   .---|-|-.     |    gradients; the slowest device of all counts
    replica | d   '-|-|-' e   | | f     |    pipeline: a device sends to one in the next stage;
            +-------+ +-------+ +-------+    the slowest pair of a hop counts, hops add up

Of groups :math:`C_k` of ``D`` devices, with one-way latency a and bandwidth b, the cost is

    max_k max_{i in C_k} sum_{j in C_k, j != i} 2 (a_ij + G / (D b_ij))
      + 2 min_{paths over groups} sum_{hops} min_{matchings} max_{pairs i, j} (a_ij + A / b_ij)

G is a stage's gradients and A all activations of a batch, both in GB.  A link that differs by
direction enters both ways, in place of twice one way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ray_train_geo.cluster.topology import Link, Topology
from ray_train_geo.errors import PlanError
from ray_train_geo.planning.dtfm_matching import bottleneck_matching
from ray_train_geo.planning.dtfm_order import path_length, shortest_path
from ray_train_geo.planning.link_table import LinkTable

__all__ = ["DtfmCost", "DtfmWorkload", "PairCosts", "dtfm_cost", "group_cost"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_PUBLISHED_GRADIENT_GB = 1.3 * 4 * 3 / 24  # fp32, 3 of GPT3-XL's 24 layers
_PUBLISHED_ACTIVATION_GB = 2024 * 2048 * 2 * (125000 / 2048) / 2**30  # 2024 is the authors' own
_BYTES_PER_GB = 1e9


@dataclass(frozen=True, slots=True)
class DtfmWorkload:
    """What is exchanged in a step, in GB of 1e9 bytes.

    Args:
        gradient_gb: of one stage.
        activation_gb: of one replica's batch, over one hop.
    """

    gradient_gb: float = _PUBLISHED_GRADIENT_GB
    activation_gb: float = _PUBLISHED_ACTIVATION_GB


@dataclass(frozen=True, slots=True)
class DtfmCost:
    """The cost of groups, in DT-FM's seconds.

    Args:
        order: the cheapest path over the groups, as their indices.
    """

    total_s: float
    data_parallel_s: float
    pipeline_s: float
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class PairCosts:
    """Both kinds of cost between two devices, in seconds, there and back."""

    table: LinkTable
    gradient_bytes: float
    activation_bytes: float

    @classmethod
    def of(cls, topology: Topology, replicas: int, workload: DtfmWorkload) -> PairCosts:
        """The costs where each stage has ``replicas`` devices."""
        return cls(
            LinkTable.of(_without_windows(topology)),
            workload.gradient_gb * _BYTES_PER_GB / replicas,
            workload.activation_gb * _BYTES_PER_GB,
        )

    def sync_s(self, a: Ints, b: Ints) -> Floats:
        """Gradients exchanged in one group, between devices ``a`` and ``b`` (broadcast)."""
        return self._both_ways(a, b, self.gradient_bytes)

    def hop_s(self, a: Ints, b: Ints) -> Floats:
        """Activations and their gradients, between devices ``a`` and ``b`` (broadcast)."""
        return self._both_ways(a, b, self.activation_bytes)

    def _both_ways(self, a: Ints, b: Ints, size_bytes: float) -> Floats:
        there_s, there_per_byte = self.table.hops(a, b)
        back_s, back_per_byte = self.table.hops(b, a)
        return there_s + back_s + size_bytes * (there_per_byte + back_per_byte)


def dtfm_cost(
    topology: Topology,
    groups: Sequence[Sequence[str]],
    workload: DtfmWorkload | None = None,
) -> DtfmCost:
    """The cost of ``groups`` of device ids, in the best order.

    The order is the best up to 16 groups, and good where there are more.

    Raises:
        PlanError: no groups, groups of unequal sizes, an unknown device, or one that is used twice.
    """
    sizes = {len(group) for group in groups}
    if len(sizes) != 1 or 0 in sizes:
        raise PlanError(
            f"DT-FM's cost needs groups of one size, but these have {[len(g) for g in groups]} "
            "devices; give every stage the same number of replicas"
        )
    costs = PairCosts.of(topology, sizes.pop(), workload or DtfmWorkload())
    index = costs.table.index
    named = [device for group in groups for device in group]
    if unknown := [device for device in named if device not in index]:
        raise PlanError(f"groups name devices that the topology does not have: {unknown}")
    if len(set(named)) < len(named):
        twice = sorted({device for device in named if named.count(device) > 1})
        raise PlanError(f"devices stand in more than one group: {twice}; use each once")
    return group_cost(costs, [np.array([index[d] for d in group]) for group in groups])


def group_cost(costs: PairCosts, groups: Sequence[Ints]) -> DtfmCost:
    """As :func:`dtfm_cost`, of device numbers."""
    data_parallel_s = 0.0
    for group in groups:
        pairs = costs.sync_s(group[:, None], group[None, :])
        np.fill_diagonal(pairs, 0.0)
        data_parallel_s = max(data_parallel_s, float(pairs.sum(axis=1).max()))
    hops = np.zeros((len(groups), len(groups)))
    for i, a in enumerate(groups):
        for j in range(i):
            hops[i, j] = hops[j, i] = bottleneck_matching(
                costs.hop_s(a[:, None], groups[j][None, :])
            )[0]
    order = shortest_path(hops)
    pipeline_s = path_length(hops, order)
    return DtfmCost(data_parallel_s + pipeline_s, data_parallel_s, pipeline_s, order)


def _without_windows(topology: Topology) -> Topology:
    """DT-FM knows no TCP window: a link gives all of its bandwidth to one flow."""

    def bare(link: Link) -> Link:
        return Link(link.latency_s, link.bandwidth_bytes_per_s)

    return replace(
        topology,
        node_links={pair: bare(link) for pair, link in topology.node_links.items()},
        region_links={pair: bare(link) for pair, link in topology.region_links.items()},
        default_link=bare(topology.default_link) if topology.default_link else None,
    )
