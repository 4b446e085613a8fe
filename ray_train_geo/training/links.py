"""A worker's links in one generation: the groups that its plan needs, and how to be rid of them.

They depend on the plan, not on any state.  So they can be made ahead, while an earlier generation
trains on: joining a group takes round trips, and between two generations everybody waits.
"""

from __future__ import annotations

import torch
from torch.distributed import PrefixStore, Store

from ray_train_geo.training.assignment import Assignment
from ray_train_geo.training.emulation import Emulation
from ray_train_geo.training.groups import Group, join_groups, on_hosts
from ray_train_geo.transport.base import Transport
from ray_train_geo.transport.gloo import GlooEndpoint
from ray_train_geo.transport.nccl import NcclTransport
from ray_train_geo.transport.striped import StripedTransport

__all__ = ["Links"]


class Links:
    """The groups of one worker; ``abort`` may be called from any thread.

    Args:
        assignment: whose plan, rank and generation count; not its state.
        store: rendezvous for all workers of the run.
        device: what the stage computes on.
        emulation: of links, to be as slow as they are.
    """

    def __init__(
        self,
        assignment: Assignment,
        store: Store,
        device: torch.device,
        emulation: Emulation | None = None,
    ) -> None:
        self.generation = assignment.generation
        self.emulation = emulation
        self.transports: dict[str, Transport] = {}
        self._assignment = assignment
        self._device = device
        self._store = PrefixStore(f"generation{assignment.generation}", store)
        self._endpoint = GlooEndpoint(self._store, assignment.hostname, assignment.deadline_s)

    def join(self) -> None:
        """Join all groups, unless that was done ahead; returns when all members have.

        Raises:
            TransportError: a peer did not come, or the generation was aborted.
        """
        a = self._assignment
        if not self.transports:
            self.transports = join_groups(a.plan, a.dims, a.rank, self._connect, a.job.local_sgd)

    def _connect(self, group: Group, rank: int) -> Transport:
        a, size = self._assignment, len(group.members)
        if a.transport == "nccl" and not on_hosts(group.name):
            return NcclTransport.connect(
                self._store, group.name, rank, size, self._device, a.deadline_s
            )
        count = a.flows.get(group.name, 1)

        def connect(name: str) -> Transport:
            names = [name, *(f"{name}/flow{i}" for i in range(1, count))]
            flows: list[Transport] = [self._endpoint.connect(name, rank, size) for name in names]
            return flows[0] if count == 1 else StripedTransport(flows)

        if self.emulation is not None:
            return self.emulation.shape(connect, group, a)
        return connect(group.name)

    @property
    def peers(self) -> set[str]:
        """Addresses of the workers at the other ends."""
        return self._endpoint.peers - {self._assignment.hostname}

    def synchronize(self, timeout_s: float) -> None:
        """Wait for what stages have under way, with a deadline.

        What is under way in the world is the commit, which nobody has sent yet.
        """
        for name, transport in self.transports.items():
            if not on_hosts(name):
                transport.synchronize(timeout_s)

    def abort(self) -> None:
        """Break them for all their members at once; those that are being made, too."""
        self._endpoint.abort()
        for transport in list(self.transports.values()):
            transport.abort()

    def close(self) -> None:
        """Give everything back."""
        for transport in self.transports.values():
            transport.close()
        self.transports = {}
