"""Devices that are equal in all that a bound looks at: speed, memory, price, place, and node.

How much of a node's NIC a device needs depends on how many pipelines the node serves.  A node of
eight devices may serve eight pipelines (all messages between stages leave it, but a layer's eight
holders sum gradients inside), or one (the other way round)::

    eight pipelines, a stage each       one pipeline, eight stages
    p0: ->[a0]->   ... p7: ->[a7]->     p0: ->[a0 a1 a2 a3 a4 a5 a6 a7]->

So each class counts once for each range of pipelines that its nodes may serve.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ray_train_geo.planning.cost import embedding_s, head_s, layer_s, optimizer_s
from ray_train_geo.planning.link_table import Floats, Ints
from ray_train_geo.planning.memory import is_cpu
from ray_train_geo.planning.problem import Problem

__all__ = ["DeviceClasses"]

_MOST_CLASSES = 0
"""With more classes, how many pipelines a node serves is left open."""


@dataclass(frozen=True, slots=True, eq=False)
class DeviceClasses:
    """All arrays are ``[classes, ...]``.

    Args:
        devices: numbers of each class's devices in the problem's link table.
        kind: equal for classes that differ in ``site`` only.
        nodes: equal for classes of equal nodes, wherever they are.
        pool: equal for classes whose devices share nodes, so that a node has devices of each.
        count, on_node: the class's devices in all, and on each of its nodes.
        node_size: devices of a node, of all classes together.
        serves: ``[classes, 2]``; fewest and most pipelines that a node of the class serves.
        layer_s, embedding_s, head_s: ``[classes, 2]``; forward and backward of one microbatch.
        optimizer_s: per parameter.
        nic_seconds_per_byte: ``[classes, 2]``; the slower direction, and one after the other.
    """

    devices: tuple[tuple[int, ...], ...]
    kind: Ints
    nodes: Ints
    site: Ints
    pool: Ints
    count: Ints
    on_node: Ints
    node_size: Ints
    serves: Ints
    layer_s: Floats
    embedding_s: Floats
    head_s: Floats
    optimizer_s: Floats
    nic_seconds_per_byte: Floats
    price_per_hour: Floats

    @classmethod
    def of(cls, problem: Problem, *, nodes: bool = True) -> DeviceClasses:
        """The classes of a problem's devices; without ``nodes``, each is as if on its own."""
        table = problem.table
        out, into = table.out_seconds_per_byte, table.in_seconds_per_byte
        nic = np.stack([np.maximum(out, into), out + into], axis=1)[table.node]
        alike = [
            (d.flops_per_s, d.memory_bytes, is_cpu(d), d.price_per_hour) for d in table.devices
        ]
        on_node = [Counter[object]() for _ in table.nodes]
        for i, node in enumerate(table.node):
            on_node[node][alike[i]] += 1
        kinds: dict[object, int] = {}
        pools: dict[object, int] = {}
        members: dict[tuple[int, int], list[int]] = {}
        compositions: dict[object, int] = {}
        nodes_of: list[int] = []
        pool_of: list[int] = []
        for i, node in enumerate(table.node):
            about: object = alike[i]
            if nodes:
                about = *nic[i].tolist(), frozenset(on_node[node].items())
            nodes_of.append(compositions.setdefault(about, len(compositions)))
            kind = kinds.setdefault((alike[i], nodes_of[-1]), len(kinds))
            members.setdefault((kind, int(table.site[i])), []).append(i)
            pool_of.append(pools.setdefault((nodes_of[-1], int(table.site[i])), len(pools)))
        first = [group[0] for group in members.values()]
        examples = [table.devices[i] for i in first]
        dims, training = problem.dims, problem.job.training
        share = [on_node[table.node[i]][alike[i]] if nodes else 1 for i in first]
        size = np.bincount(table.node)[table.node[first]] if nodes else np.ones_like(first)
        return cls(
            devices=tuple(tuple(group) for group in members.values()),
            kind=np.array([kind for kind, _ in members]),
            nodes=np.array([nodes_of[i] for i in first]),
            site=np.array([site for _, site in members]),
            pool=np.array([pool_of[i] for i in first]),
            count=np.array([len(group) for group in members.values()]),
            on_node=np.array(share),
            node_size=size,
            serves=np.stack([np.ones_like(size), size], axis=1),
            layer_s=np.array([layer_s(dims, training, d) for d in examples]),
            embedding_s=np.array([embedding_s(dims, training, d) for d in examples]),
            head_s=np.array([head_s(dims, training, d) for d in examples]),
            optimizer_s=np.array([optimizer_s(1, d) for d in examples]),
            nic_seconds_per_byte=nic[first],
            price_per_hour=np.array([d.price_per_hour for d in examples]),
        )

    def _picked(self, chosen: Sequence[int]) -> DeviceClasses:
        """Classes ``chosen``, in that order."""
        rows = list(chosen)
        return DeviceClasses(
            tuple(self.devices[c] for c in rows),
            *(getattr(self, name)[rows] for name in self.__slots__[1:]),
        )

    def merged(self, marks: Sequence[object]) -> DeviceClasses:
        """With classes of the same kind and the same mark (``[classes]``) made one.

        Classes that share nodes must have the same mark.
        """
        groups: dict[tuple[int, object], list[int]] = {}
        for c, mark in enumerate(marks):
            groups.setdefault((int(self.kind[c]), mark), []).append(c)
        first = [group[0] for group in groups.values()]
        pools: dict[object, int] = {}
        return replace(
            self._picked(first),
            devices=tuple(
                tuple(d for c in group for d in self.devices[c]) for group in groups.values()
            ),
            pool=np.array(
                [pools.setdefault((int(self.nodes[c]), marks[c]), len(pools)) for c in first]
            ),
            count=np.array([int(self.count[group].sum()) for group in groups.values()]),
        )

    def by_use(self, pipelines: int) -> DeviceClasses:
        """Each class once for each range of pipelines that its nodes may serve, of so many."""
        rows: list[int] = []
        serves: list[tuple[int, int]] = []
        for c, size in enumerate(self.node_size.tolist()):
            ranges = _doubling(min(size, pipelines))
            rows += [c] * len(ranges)
            serves += ranges
        if len(rows) > _MOST_CLASSES:
            return self
        return replace(self._picked(rows), serves=np.array(serves))

    def most_layers(self, problem: Problem, in_flight: int) -> tuple[Ints, Ints, Ints, Ints]:
        """``[classes]`` each: layers that memory holds of a first, inner, last, and only stage.

        The only stage holds all layers or, here 0, does not fit.
        """
        examples = [problem.topology.devices[group[0]] for group in self.devices]
        layers = problem.dims.layers
        first, inner, last = (
            np.array([problem.most_layers(s, n, in_flight, d, 1) for d in examples])
            for s, n in ((0, 2), (1, 3), (1, 2))
        )
        whole = [problem.memory((0, layers), in_flight, d, 1).total for d in examples]
        fits = [w <= d.memory_bytes for w, d in zip(whole, examples, strict=True)]
        return first, inner, last, np.where(fits, layers, 0)


def _doubling(most: int) -> list[tuple[int, int]]:
    """Ranges 1, 2, 3-4, 5-8, ... up to ``most``."""
    ranges, start = [], 1
    while start <= most:
        end = 1 << (start - 1).bit_length()
        ranges.append((start, min(end, most)))
        start = end + 1
    return ranges
