"""Flows that are there at the same time, each with an equal share of what it uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ray_train_geo.planning.link_table import LinkTable

__all__ = ["Rate", "equal_shares"]


@dataclass(frozen=True, slots=True)
class Rate:
    """What a flow gets.

    Args:
        latency_s: one way.
        link: seconds per byte of its own link.
        shared: seconds per byte of its part of what it shares; 0 is no limit.
    """

    latency_s: float
    link: float
    shared: float

    @property
    def per_byte(self) -> float:
        """Seconds; of the slower of both."""
        return max(self.link, self.shared)


def equal_shares(
    table: LinkTable, flows: Sequence[tuple[int, int]], nic_factor: float = 1.0
) -> list[Rate]:
    """What each of ``flows`` (from, to) gets if all are busy.

    Args:
        nic_factor: by which NICs that several flows share are faster than the table says.
    """
    out: Counter[int] = Counter()
    into: Counter[int] = Counter()
    across: Counter[tuple[int, int]] = Counter()
    for a, b in flows:
        if table.node[a] != table.node[b]:
            out[int(table.node[a])] += 1
            into[int(table.node[b])] += 1
            across[int(table.region[a]), int(table.region[b])] += 1
    rates = []
    for a, b in flows:
        latency_s, link = table.hop(a, b)
        n, m = int(table.node[a]), int(table.node[b])
        shared = 0.0
        if n != m:
            regions = int(table.region[a]), int(table.region[b])
            shared = max(
                out[n] * float(table.out_seconds_per_byte[n]) / (nic_factor if out[n] > 1 else 1),
                into[m] * float(table.in_seconds_per_byte[m]) / (nic_factor if into[m] > 1 else 1),
                across[regions] * float(table.uplink_seconds_per_byte[regions]),
            )
        rates.append(Rate(latency_s, link, shared))
    return rates
