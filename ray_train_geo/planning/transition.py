"""From one plan to the next: which state moves from where to where, and how long that takes.

State comes in pieces: each layer (the embedding goes with layer 0, the head with the last), and a
tied token matrix, which the first and the last stage of every pipeline hold.  What a device needs
and does not hold streams to it, all streams at once::

    old   a: 0-3   b: 3-6       a -> new device: layer 2        a shrinks: nothing to do
    new   a: 0-2   c: 2-4       b -> new device: layer 3
                   b: 4-6

A piece comes from a live holder on the same node, or else from the one that it arrives from first,
behind what that holder sends already; with no live holder, from the newest checkpoint.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ray_train_geo.cluster.topology import Topology
from ray_train_geo.errors import PlanError
from ray_train_geo.model.catalog import (
    ModelDims,
    embedding_parameters,
    head_parameters,
    layer_parameters,
)
from ray_train_geo.planning.link_table import LinkTable
from ray_train_geo.planning.memory import STATE_BYTES_PER_PARAMETER
from ray_train_geo.planning.plan import Plan

__all__ = ["Holdings", "Layers", "Move", "Transition", "transition"]

_NEAREST = 32
"""Of thousands of holders, so many near ones are enough to share the sending."""

Layers = tuple[int, int]
"""``(first, last_exclusive)``"""


@dataclass(frozen=True, slots=True)
class Move:
    """One stream of state.

    Args:
        source: device id; None is the checkpoint.
        target: device id.
        layers: ``(first, last_exclusive)``; None is the tied token matrix.
    """

    source: str | None
    target: str
    layers: Layers | None
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Transition:
    """All that moves between two plans.

    Args:
        out_bytes, in_bytes: by node, what its NIC carries for all moves together.
        between_bytes: by (from region, to region), what crosses from one to another.
        seconds: until the last byte is there, with all streams at once and nothing else on the
            links.  A stream takes its latency, TCP's ramp-up, and the longest of: its bytes on its
            link, and all bytes on each NIC and uplink that it uses.
    """

    moves: tuple[Move, ...]
    out_bytes: Mapping[str, int]
    in_bytes: Mapping[str, int]
    between_bytes: Mapping[tuple[str, str], int]
    seconds: float

    @property
    def size_bytes(self) -> int:
        return sum(move.size_bytes for move in self.moves)

    @property
    def layers_moved(self) -> int:
        """Copies of layers that travel: one layer to two devices counts twice."""
        return sum(m.layers[1] - m.layers[0] for m in self.moves if m.layers is not None)

    @property
    def layers_restored(self) -> tuple[int, ...]:
        """Layers that no live device holds: they come from the checkpoint, and steps are lost."""
        runs = [m.layers for m in self.moves if m.source is None and m.layers is not None]
        return tuple(sorted({layer for a, b in runs for layer in range(a, b)}))

    @property
    def devices_touched(self) -> tuple[str, ...]:
        """Devices that receive anything."""
        return tuple(sorted({move.target for move in self.moves}))


def transition(
    old: Plan, new: Plan, topology: Topology, dims: ModelDims, lost: Collection[str] = ()
) -> Transition:
    """What must move before ``new`` can run.

    Args:
        topology: as it is now; a device that is about to leave can still give its state away.
        lost: devices of the topology whose state is gone, such as restarted ones.

    Raises:
        PlanError: the new plan uses a device that is not in the topology.
    """
    stages = {s.device: s.layers for p in new.pipelines for s in p.stages}
    return Holdings.of(old, topology, dims, lost).moves_to(stages)


class Holdings:
    """Who holds which state now; asked what a plan would have to move, often and fast.

    Args:
        held: by device id, the layers of those that still have their state.
    """

    def __init__(self, held: Mapping[str, Layers], topology: Topology, dims: ModelDims) -> None:
        # In an order of its own: sources must not depend on how a topology is listed.
        devices = sorted(topology.devices, key=lambda d: (d.region, d.node, d.id))
        self._topology = topology.with_devices(devices)
        self._table = LinkTable.of(self._topology)
        self._layers, self._tied = dims.layers, dims.tied_embeddings
        self._piece_bytes = _piece_bytes(dims)
        index = self._table.index
        self._held = {index[d]: run for d, run in held.items()}
        self._node: list[int] = self._table.node.tolist()
        self._region: list[int] = self._table.region.tolist()
        self._site: list[int] = self._table.site.tolist()
        self._out: list[float] = self._table.out_seconds_per_byte.tolist()
        self._into: list[float] = self._table.in_seconds_per_byte.tolist()
        self._uplink: list[list[float]] = self._table.uplink_seconds_per_byte.tolist()
        self._holders: list[list[int]] = [[] for _ in range(dims.layers + 1)]
        self._on_node: dict[tuple[int, int], list[int]] = defaultdict(list)
        for device, run in sorted(self._held.items()):
            for piece in self._pieces(run):
                self._holders[piece].append(device)
                self._on_node[piece, self._node[device]].append(device)
        self._near: dict[tuple[int, int, bool], list[tuple[int, float, float]]] = {}

    @classmethod
    def of(
        cls, plan: Plan, topology: Topology, dims: ModelDims, lost: Collection[str] = ()
    ) -> Holdings:
        """What the devices of ``plan`` hold that are in ``topology`` and not in ``lost``."""
        there = {d.id for d in topology.devices} - set(lost)
        stages = (s for p in plan.pipelines for s in p.stages)
        return cls({s.device: s.layers for s in stages if s.device in there}, topology, dims)

    def layers(self, device: str) -> Layers | None:
        """What ``device`` holds, if anything."""
        return self._held.get(self._table.index.get(device, -1))

    def moves_to(self, stages: Mapping[str, Layers]) -> Transition:
        """The moves after which every device holds its run of ``stages`` (by device id).

        Raises:
            PlanError: a device is not in the topology.
        """
        index = self._table.index
        if unknown := sorted(stages.keys() - index.keys()):
            raise PlanError(f"the new plan uses devices that are not there: {unknown}; plan again")
        load = _Load()
        chosen: list[tuple[int | None, int, int]] = []
        for target, run in sorted((index[d], run) for d, run in stages.items()):
            held = self._held.get(target)
            if held == run:
                continue
            here = set() if held is None else set(self._pieces(held))
            for piece in self._pieces(run):
                if piece not in here:
                    source = self._source(target, piece, load)
                    self._add(source, target, self._piece_bytes[piece], load)
                    chosen.append((source, target, piece))
        return self._transition(chosen, load)

    def _pieces(self, run: Layers) -> Iterator[int]:
        """Layers, and one more number for the tied token matrix."""
        yield from range(*run)
        if self._tied and (run[0] == 0 or run[1] == self._layers):
            yield self._layers

    def _source(self, target: int, piece: int, load: _Load) -> int | None:
        """The holder that the piece arrives from first; None if no live device holds it."""
        size = self._piece_bytes[piece]
        best: tuple[float, int] | None = None
        region = self._region[target]
        for source, latency_s, per_byte in self._nearest(target, piece):
            busy_s = (load.flow[source, target] + size) * per_byte
            if self._node[source] != self._node[target]:
                sent = load.out[self._node[source]] + size
                busy_s = max(busy_s, sent * self._out[self._node[source]])
                origin = self._region[source]
                if origin != region:
                    crossed = load.between[origin, region] + size
                    busy_s = max(busy_s, crossed * self._uplink[origin][region])
            # Nine digits: the order of sums must not decide between equals.
            arrival = float(f"{latency_s + busy_s:.9g}"), source
            if best is None or arrival < best:
                best = arrival
        return None if best is None else best[1]

    def _nearest(self, target: int, piece: int) -> list[tuple[int, float, float]]:
        """``(source, latency_s, seconds_per_byte)``: on the same node, or else the nearest few."""
        node = self._node[target]
        local = self._on_node.get((piece, node))
        key = (node, piece, True) if local else (self._site[target], piece, False)
        if key not in self._near:
            size = self._piece_bytes[piece]
            hops = ((h, *self._table.hop(h, target)) for h in local or self._holders[piece])
            reached = [h for h in hops if h[2] < float("inf")]
            self._near[key] = heapq.nsmallest(
                _NEAREST, reached, key=lambda h: (float(f"{h[1] + size * h[2]:.9g}"), h[0])
            )
        return self._near[key]

    def _add(self, source: int | None, target: int, size: int, load: _Load) -> None:
        load.flow[source, target] += size
        node = self._node[target]
        if source is None:
            load.into[node] += size
        elif self._node[source] != node:
            load.out[self._node[source]] += size
            load.into[node] += size
            if self._region[source] != self._region[target]:
                load.between[self._region[source], self._region[target]] += size

    def _transition(self, chosen: Sequence[tuple[int | None, int, int]], load: _Load) -> Transition:
        nodes, regions = self._table.nodes, self._table.regions
        return Transition(
            moves=tuple(self._merged(chosen)),
            out_bytes={nodes[n]: size for n, size in sorted(load.out.items())},
            in_bytes={nodes[n]: size for n, size in sorted(load.into.items())},
            between_bytes={
                (regions[a], regions[b]): size for (a, b), size in sorted(load.between.items())
            },
            seconds=max(
                (self._flow_s(s, t, n, load) for (s, t), n in load.flow.items()), default=0
            ),
        )

    def _flow_s(self, source: int | None, target: int, size: int, load: _Load) -> float:
        node = self._node[target]
        if source is None:  # storage is taken to send as fast as a node can receive
            return load.into[node] * self._into[node]
        devices = self._table.devices
        link = self._topology.link(devices[source], devices[target])
        busy_s = size / link.flow_bytes_per_s
        origin = self._node[source]
        if origin != node:
            busy_s = max(
                busy_s, load.out[origin] * self._out[origin], load.into[node] * self._into[node]
            )
            a, b = self._region[source], self._region[target]
            if a != b:
                busy_s = max(busy_s, load.between[a, b] * self._uplink[a][b])
        return link.latency_s + link.ramp_s(size) + busy_s

    def _merged(self, chosen: Sequence[tuple[int | None, int, int]]) -> Iterator[Move]:
        """One move for each run of layers between the same two devices."""
        devices = self._table.devices
        runs: list[tuple[int | None, int, int, int]] = []
        for source, target, piece in sorted(chosen, key=_order):
            follows = runs and runs[-1][:2] == (source, target) and runs[-1][3] == piece
            if follows and piece < self._layers:
                runs[-1] = source, target, runs[-1][2], piece + 1
            else:
                runs.append((source, target, piece, piece + 1))
        for source, target, first, end in runs:
            yield Move(
                None if source is None else devices[source].id,
                devices[target].id,
                None if first == self._layers else (first, end),
                sum(self._piece_bytes[first:end]),
            )


class _Load:
    """Bytes so far: by (source, target) device, by node out and in, by (from, to) region."""

    def __init__(self) -> None:
        self.flow: Counter[tuple[int | None, int]] = Counter()
        self.out: Counter[int] = Counter()
        self.into: Counter[int] = Counter()
        self.between: Counter[tuple[int, int]] = Counter()


def _order(chosen: tuple[int | None, int, int]) -> tuple[int, int, int]:
    source, target, piece = chosen
    return target, -1 if source is None else source, piece


def _piece_bytes(dims: ModelDims) -> list[int]:
    """``[layers]``, and one more for a tied token matrix."""
    tokens = dims.vocab_size * dims.dim if dims.tied_embeddings else 0
    parameters = [layer_parameters(dims)] * dims.layers
    parameters[0] += embedding_parameters(dims) - tokens
    parameters[-1] += head_parameters(dims)
    return [STATE_BYTES_PER_PARAMETER * p for p in (*parameters, tokens)]
