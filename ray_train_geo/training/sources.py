"""Where the workers of a new generation get the state that they lack (pure).

synchronous   all holders of a layer have the same: what a worker has it keeps, what it lacks
              comes from the nearest holder
local SGD     islands differ: on each, the first who has the layer gives it to the others there;
              where nobody has it, it restarts from the global parameters of the nearest holder
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from ray_train_geo.cluster.topology import Topology
from ray_train_geo.model.catalog import ModelDims, parameter_shapes
from ray_train_geo.planning.islands import islands
from ray_train_geo.planning.plan import Plan
from ray_train_geo.spec_local_sgd import LocalSGDSpec
from ray_train_geo.training.buckets import holders_of

__all__ = ["Sources", "sources_of"]


@dataclass(frozen=True, slots=True)
class Sources:
    """Of one device.

    Args:
        devices: by weight, whom it comes from; what the device keeps is not in here.
        restarts: those of them that begin at the global parameters.
    """

    devices: dict[str, str] = field(default_factory=dict)
    restarts: set[str] = field(default_factory=set)


def sources_of(
    plan: Plan,
    dims: ModelDims,
    topology: Topology,
    holders: Mapping[str, tuple[str, ...]],
    local_sgd: LocalSGDSpec | None = None,
) -> dict[str, Sources]:
    """For each device of ``plan``, what it needs from whom.

    Of several holders the nearest by latency; of equally near ones the one that has least to send.

    Args:
        topology: also of devices without a role, which may have state to give.
        holders: of each weight, the devices that have it.
    """
    devices = {d.id: d for d in topology.devices}
    shapes = parameter_shapes(dims)
    sending: Counter[str] = Counter()
    found = {d.id: Sources() for d in plan.devices}
    among = [tuple(range(plan.world_size))]
    if local_sgd is not None:
        among = [island.ranks for island in islands(plan, local_sgd.across)]
    for name, shape in shapes.items():
        everywhere = holders_of(name, plan, dims)
        for island in among:
            targets = [plan.devices[rank].id for rank in everywhere if rank in island]
            keepers = [target for target in targets if target in holders[name]]
            givers = holders[name]
            if local_sgd is not None and keepers:
                givers = (keepers[0],)
                keepers = keepers[:1]
            for target in targets:
                if target in keepers:
                    continue
                if local_sgd is not None and not keepers:
                    found[target].restarts.add(name)

                def distance(peer: str, target: str = target) -> tuple[float, int, str]:
                    latency_s = topology.link(devices[peer], devices[target]).latency_s
                    return latency_s, sending[peer], peer

                source = min(givers, key=distance)
                sending[source] += math.prod(shape)
                found[target].devices[name] = source
    return found
