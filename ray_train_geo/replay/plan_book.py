"""Plans, remembered by what is there: nodes of a kind can stand for each other.

A trace comes back to the same numbers of nodes again and again, each time with other names.  So a
plan is made once for each multiset of kinds, on stand-ins, and handed out with the names changed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace

from ray_train_geo.cluster.topology import Device, Topology
from ray_train_geo.errors import PlanError
from ray_train_geo.model.catalog import ModelDims
from ray_train_geo.planning import planner
from ray_train_geo.planning.plan import Plan
from ray_train_geo.planning.problem import PlanOptions
from ray_train_geo.planning.request import PlanRequest
from ray_train_geo.replay.fleet import Fleet
from ray_train_geo.spec import JobSpec

__all__ = ["PlanBook"]


class PlanBook:
    """The planner's answers for one job.

    Args:
        asked: the job, and how to plan it; its topology is the fleet's.
    """

    def __init__(self, asked: PlanRequest) -> None:
        self.asked = asked
        self._kind = _kinds(asked.topology)
        self._stand_ins: dict[Hashable, list[str]] = defaultdict(list)
        for node in sorted(self._kind):
            self._stand_ins[self._kind[node]].append(node)
        self._devices = Fleet(asked.topology, (), 0.0).devices_of
        self._plans: dict[Hashable, Plan | PlanError] = {}

    @property
    def dims(self) -> ModelDims:
        """The job's model."""
        return self.asked.job.dims(self.asked.vocab_size)

    def devices(self, nodes: Iterable[str]) -> tuple[Device, ...]:
        """All devices of ``nodes``, near ones next to each other."""
        found = (device for node in nodes for device in self._devices[node])
        return tuple(sorted(found, key=lambda d: (d.region, d.node, d.id)))

    def topology(self, nodes: Iterable[str]) -> Topology:
        """``nodes``, and the links between them."""
        return self.asked.topology.with_devices(self.devices(nodes))

    def best(self, nodes: Iterable[str]) -> Plan | None:
        """The best plan on ``nodes``, made from scratch; None if none fits."""
        found = self._plan(nodes, self.asked.job, self.asked.options, ())
        return None if isinstance(found, PlanError) else found

    def check(self, nodes: Iterable[str]) -> None:
        """Check that there is a plan on ``nodes``.

        Raises:
            PlanError: none fits.
        """
        found = self._plan(nodes, self.asked.job, self.asked.options, ())
        if isinstance(found, PlanError):
            raise found

    def shaped(self, nodes: Iterable[str], stages: int, pipelines: int) -> Plan | None:
        """A plan of so many pipelines of equal depth; None if none fits."""
        job = self.asked.job
        shape = {"stages": stages, "pipelines": pipelines, "layers": None, "microbatches": None}
        fixed = job.parallelism.model_copy(update=shape)
        shaped = job.model_copy(update={"parallelism": fixed})
        options = replace(self.asked.options, moves=0)
        enough = self._enough(nodes, stages * pipelines)
        found = self._plan(enough, shaped, options, (stages, pipelines))
        return None if isinstance(found, PlanError) else found

    def _plan(
        self, nodes: Iterable[str], job: JobSpec, options: PlanOptions, shape: tuple[int, ...]
    ) -> Plan | PlanError:
        there = sorted(nodes)
        kinds = Counter(self._kind[node] for node in there)
        key = frozenset(kinds.items()), shape
        if key not in self._plans:
            chosen = [n for kind, count in kinds.items() for n in self._stand_ins[kind][:count]]
            self._plans[key] = self._search(chosen, job, options)
        found = self._plans[key]
        return found if isinstance(found, PlanError) else self._renamed(found, there)

    def _enough(self, nodes: Iterable[str], devices: int) -> Sequence[str]:
        """``nodes``, or if they are all alike so many of them as hold ``devices``."""
        there = sorted(nodes)
        if len({self._kind[node] for node in there}) != 1:
            return there
        return there[: -(-devices // len(self._devices[there[0]]))]

    def _search(self, nodes: Sequence[str], job: JobSpec, options: PlanOptions) -> Plan | PlanError:
        if not nodes:
            return PlanError("there are no devices; wait until a node joins")
        asked = self.asked
        try:
            return planner.plan(self.topology(nodes), job, asked.vocab_size, options, prove=False)
        except PlanError as e:
            return e

    def _renamed(self, plan: Plan, nodes: Sequence[str]) -> Plan:
        """``plan`` with its stand-ins' places taken by ``nodes``."""
        waiting = {kind: iter(names) for kind, names in self._stand_ins.items()}
        name = {node: next(waiting[self._kind[node]]) for node in nodes}
        precision = self.asked.job.training.precision
        device: dict[str, Device] = {
            stand_in.id: actual.at_precision(precision)
            for node in nodes
            for stand_in, actual in zip(self._devices[name[node]], self._devices[node], strict=True)
        }
        return replace(
            plan,
            devices=tuple(device[d.id] for d in plan.devices),
            pipelines=tuple(
                replace(p, stages=tuple(replace(s, device=device[s.device].id) for s in p.stages))
                for p in plan.pipelines
            ),
        )


def _kinds(topology: Topology) -> Mapping[str, Hashable]:
    """By node, what it is: equal for two that hold the same and are linked alike to all others."""
    devices: dict[str, list[Device]] = defaultdict(list)
    for device in topology.devices:
        devices[device.node].append(device)
    own = {node for a, b in topology.node_links if a != b for node in (a, b)}
    return {
        node: (
            node if node in own else "",
            tuple(
                replace(d, id=d.id.removeprefix(node), node="", zone="", market_type="spot")
                for d in held
            ),
            topology.node_uplinks.get(node),
            topology.node_links.get((node, node)),
        )
        for node, held in devices.items()
    }
