"""A plan's own devices and links, imitated on whatever machine this is.

What is computed stays what it is; when it is done does not.  A stage's computations take as long
as its device needs by its FLOP/s (``planning.cost``), for the most part asleep, so that many
workers fit on a few cores; messages take as long as the topology's links need
(``transport.shaping``).  Figures measured so are *simulated*: of the runtime, not of any hardware.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import count, permutations

import torch
from torch import nn

from ray_train_geo.cluster.topology import Topology
from ray_train_geo.errors import PlanError
from ray_train_geo.model.catalog import ModelDims
from ray_train_geo.model.stage import StageModule
from ray_train_geo.planning.cost import backward_s, forward_s, weight_s
from ray_train_geo.planning.plan import Plan
from ray_train_geo.planning.slow_links import Traffic
from ray_train_geo.schedule.actions import Kind
from ray_train_geo.spec_local_sgd import LocalSGDSpec
from ray_train_geo.training.assignment import Assignment
from ray_train_geo.training.executor import at_full_speed
from ray_train_geo.training.groups import Group, group_name, groups_of
from ray_train_geo.transport.base import Transport
from ray_train_geo.transport.shaping import Shaper

__all__ = ["Emulation", "Pace"]


class Pace:
    """Makes the computations of one stage last as long as they should.

    In a backward the gradients of the layers become final one after the other, each in the middle
    of its layer's part of the time::

        backward_s   |   L7    |   L6    |   L5    |
        gradients         ▲         ▲         ▲

    In a W so do those of its matrices.

    Args:
        layers: in the order of the forward.
        forward_s, backward_s: of one microbatch, in seconds.
        weight_s: likewise, where gradients of matrices are computed apart.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        forward_s: float,
        backward_s: float,
        weight_s: float | None = None,
    ) -> None:
        self._seconds: dict[Kind, float] = {"F": forward_s, "B": backward_s}
        self._layers = len(layers)
        self._start_s = 0.0
        self._turns: Iterator[int] = count()
        for layer in layers:
            layer.register_full_backward_pre_hook(self._before_layer)
        if weight_s is not None:
            self._seconds["W"] = weight_s
            matrices = [p for layer in layers for p in layer.parameters() if p.dim() == 2]
            self._matrices = len(matrices)
            for matrix in matrices:
                matrix.register_hook(self._before_matrix)

    @contextmanager
    def __call__(self, kind: Kind) -> Iterator[None]:
        self._start_s, self._turns = time.monotonic(), count()
        yield
        self._sleep_until(self._start_s + self._seconds[kind])

    def _before_layer(self, layer: nn.Module, gradients: object) -> None:
        part = (next(self._turns) + 0.5) / self._layers
        self._sleep_until(self._start_s + part * self._seconds["B"])

    def _before_matrix(self, gradient: torch.Tensor) -> None:
        part = (next(self._turns) + 0.5) / self._matrices
        self._sleep_until(self._start_s + part * self._seconds["W"])

    @staticmethod
    def _sleep_until(when_s: float) -> None:
        # To a point in time: what is computed, and a wake-up that came late, are part of it.
        time.sleep(max(0.0, when_s - time.monotonic()))


class Emulation:
    """One for all workers of a process, which so share what their devices share.

    Args:
        topology: has all devices of the plan.
        compute: also emulate devices; else they take the time that they take.
        links: also emulate links; else messages take the time that they take.
    """

    def __init__(self, topology: Topology, compute: bool = True, links: bool = True) -> None:
        self._topology = topology
        self._compute = compute
        self._links = links
        self._shaper = Shaper(topology)
        self._before: dict[str, dict[str, Traffic]] = {}

    def check(
        self,
        plan: Plan,
        dims: ModelDims,
        device: torch.device,
        local_sgd: LocalSGDSpec | None = None,
    ) -> None:
        """Refuse what can't be emulated, before anything starts.

        Args:
            device: what really computes.

        Raises:
            PlanError: that is not a CPU, a device of the plan is not in the topology, or two that
                talk have no link.
        """
        if device.type != "cpu":
            raise PlanError(f"an emulation computes on a CPU, not on {device}")
        for group in groups_of(plan, dims, local_sgd):
            for a, b in permutations(group.members, 2):
                self._shaper.path(plan.devices[a].id, plan.devices[b].id)

    def shape(
        self, connect: Callable[[str], Transport], group: Group, assignment: Assignment
    ) -> Transport:
        """The group's transport, as slow as the links between its members' devices.

        Args:
            connect: joins all members under a name.
        """
        transport = connect(group.name)
        if not self._links:
            return transport
        rings = group.name == group_name("sync", group.members)
        second = connect(f"{group.name}/second") if rings else None
        devices = [assignment.plan.devices[member].id for member in group.members]
        return self._shaper.wrap(transport, devices, assignment.deadline_s, second)

    def change(self, topology: Topology) -> None:
        """Links are those of ``topology`` from now on.

        Raises:
            PlanError: as :meth:`Shaper.change`.
        """
        devices = self._topology.devices
        self._shaper.change(topology.with_devices(devices))

    def carried(self, device: str) -> dict[str, Traffic]:
        """What has left ``device`` since the last call, by the node that it went to."""
        total = self._shaper.traffic(device)
        before = self._before.get(device, {})
        self._before[device] = total
        return {node: traffic - before.get(node, Traffic()) for node, traffic in total.items()}

    def pace(
        self, module: StageModule, assignment: Assignment
    ) -> Callable[[Kind], AbstractContextManager[None]]:
        """The pace of a worker's stage."""
        if not self._compute:
            return at_full_speed
        a, training = assignment, assignment.job.training
        stage = a.plan.stage(a.role)
        device = self._topology.device(stage.device).at_precision(training.precision)
        of = a.dims, training, stage.layers, device
        later_s = weight_s(*of) if a.plan.schedule == "zero-bubble" else None
        return Pace(
            list(module.layers.values()),
            forward_s(*of),
            backward_s(*of) - (later_s or 0.0),
            later_s,
        )
