"""The flows between devices of a link table, and what they share, for the event engine."""

from __future__ import annotations

from ray_train_geo.planning.link_table import LinkTable
from ray_train_geo.simulation.work import Flow

__all__ = ["SharedFlows"]


class SharedFlows:
    """Numbers for what flows share: each node's NIC, out and in, and each pair of regions.

    Attributes:
        seconds_per_byte: ``[resources]``; what the numbers stand for; 0 is no limit.
    """

    def __init__(self, table: LinkTable) -> None:
        self._table = table
        self._nodes = len(table.nodes)
        self._regions = len(table.regions)
        self.seconds_per_byte = [
            *table.out_seconds_per_byte.tolist(),
            *table.in_seconds_per_byte.tolist(),
            *table.uplink_seconds_per_byte.ravel().tolist(),
        ]

    def flow(self, source: int, target: int, size_bytes: float) -> Flow:
        """The flow of messages from one device to another."""
        table = self._table
        latency, per_byte = table.hop(source, target)
        a, b = int(table.node[source]), int(table.node[target])
        if a == b:
            return Flow(latency, size_bytes, per_byte)
        used = [a, self._nodes + b]
        r, q = int(table.region[source]), int(table.region[target])
        if r != q:
            used.append(2 * self._nodes + r * self._regions + q)
        return Flow(
            latency, size_bytes, per_byte, tuple(u for u in used if self.seconds_per_byte[u] > 0)
        )
