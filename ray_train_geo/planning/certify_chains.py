"""The cheapest chain of devices that holds the model, for many questions at once.

A chain is a pipeline whose devices are known by class only.  How many layers a device can take
depends on where in the chain it stands: behind ``l`` layers a microbatch arrives later, so less
time is left.  Dynamic programming from the last layer to the first, over the layers above::

    cost[l] = min over classes c, k <= most[l, c] of  price[c] + cost[l + k]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ray_train_geo.planning.cost import embedding_s, head_s, layer_s, optimizer_s
from ray_train_geo.planning.link_table import Floats, Ints
from ray_train_geo.planning.memory import is_cpu
from ray_train_geo.planning.problem import Problem

__all__ = ["Chain", "Chains", "Cheapest", "DeviceClasses"]


@dataclass(frozen=True, slots=True, eq=False)
class DeviceClasses:
    """Devices that are equal in all that a bound looks at.  All arrays are ``[classes, ...]``.

    Args:
        devices: numbers of each class's devices in the problem's link table.
        kind: equal for classes that differ in ``site`` only.
        layer_s, embedding_s, head_s: ``[classes, 2]``; forward and backward of one microbatch.
        optimizer_s: per parameter.
        node_size: devices of each of its nodes, of all classes together.
        nic_seconds_per_byte: ``[classes, 2]``; of a node: the slower direction, and one after the
            other.
    """

    devices: tuple[tuple[int, ...], ...]
    kind: Ints
    site: Ints
    count: Ints
    layer_s: Floats
    embedding_s: Floats
    head_s: Floats
    optimizer_s: Floats
    node_size: Ints
    nic_seconds_per_byte: Floats
    price_per_hour: Floats

    @classmethod
    def of(cls, problem: Problem, largest_node: int | None = None) -> DeviceClasses:
        """The classes of a problem's devices.

        Args:
            largest_node: NICs of nodes of more devices don't count; None: all count.
        """
        table = problem.table
        size = np.bincount(table.node)[table.node]
        out, into = table.out_seconds_per_byte, table.in_seconds_per_byte
        nic = np.stack([np.maximum(out, into), out + into], axis=1)[table.node]
        if largest_node is not None:
            nic[size > largest_node] = 0.0
            size = np.where(size > largest_node, len(size), size)
        kinds: dict[tuple[float, ...], int] = {}
        members: dict[tuple[int, int], list[int]] = {}
        for i, d in enumerate(table.devices):
            key = d.flops_per_s, d.memory_bytes, is_cpu(d), d.price_per_hour, size[i], *nic[i]
            kind = kinds.setdefault(key, len(kinds))
            members.setdefault((kind, int(table.site[i])), []).append(i)
        first = [group[0] for group in members.values()]
        examples = [table.devices[i] for i in first]
        dims, training = problem.dims, problem.job.training
        return cls(
            devices=tuple(tuple(group) for group in members.values()),
            kind=np.array([kind for kind, _ in members]),
            site=np.array([site for _, site in members]),
            count=np.array([len(group) for group in members.values()]),
            layer_s=np.array([layer_s(dims, training, d) for d in examples]),
            embedding_s=np.array([embedding_s(dims, training, d) for d in examples]),
            head_s=np.array([head_s(dims, training, d) for d in examples]),
            optimizer_s=np.array([optimizer_s(1, d) for d in examples]),
            node_size=size[first],
            nic_seconds_per_byte=nic[first],
            price_per_hour=np.array([d.price_per_hour for d in examples]),
        )

    def merged(self, marks: Sequence[object]) -> DeviceClasses:
        """With classes of the same kind and the same mark (``[classes]``) made one."""
        groups: dict[tuple[int, object], list[int]] = {}
        for c, mark in enumerate(marks):
            groups.setdefault((int(self.kind[c]), mark), []).append(c)
        first = [group[0] for group in groups.values()]
        return DeviceClasses(
            devices=tuple(
                tuple(d for c in group for d in self.devices[c]) for group in groups.values()
            ),
            kind=self.kind[first],
            site=self.site[first],
            count=np.array([int(self.count[group].sum()) for group in groups.values()]),
            layer_s=self.layer_s[first],
            embedding_s=self.embedding_s[first],
            head_s=self.head_s[first],
            optimizer_s=self.optimizer_s[first],
            node_size=self.node_size[first],
            nic_seconds_per_byte=self.nic_seconds_per_byte[first],
            price_per_hour=self.price_per_hour[first],
        )

    def most_layers(
        self, problem: Problem, in_flight: int, pipelines: int = 1
    ) -> tuple[Ints, Ints, Ints, Ints]:
        """``[classes]`` each: layers that memory holds of a first, inner, last, and only stage.

        The only stage holds all layers or, here 0, does not fit.

        Args:
            pipelines: that the plan has at least.
        """
        examples = [problem.topology.devices[group[0]] for group in self.devices]
        layers = problem.dims.layers
        first, inner, last = (
            np.array([problem.most_layers(s, n, in_flight, d, pipelines) for d in examples])
            for s, n in ((0, 2), (1, 3), (1, 2))
        )
        whole = [problem.memory((0, layers), in_flight, d, pipelines).total for d in examples]
        fits = [w <= d.memory_bytes for w, d in zip(whole, examples, strict=True)]
        return first, inner, last, np.where(fits, layers, 0)


@dataclass(frozen=True, slots=True)
class Chain:
    """One cheapest chain: class and layers of each stage."""

    classes: tuple[int, ...]
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Chains:
    """How many layers a device can take, in each of ``n`` questions.

    Args:
        first: ``[n, classes]``; on a first stage that is not the last.
        inner, last: ``[n, layers or 1, classes]``; on an inner (the last) stage that stands
            behind that many layers.
        only: ``[n, classes]``; on a pipeline's only stage.
        depth: that many stages; None: any number.
    """

    layers: int
    first: Ints
    inner: Ints
    last: Ints
    only: Ints
    depth: int | None = None

    def cheapest(self, price: Floats) -> Cheapest:
        """The cheapest chain for every question.

        Args:
            price: ``[classes]``; of one device.
        """
        return Cheapest(self, price)


class Cheapest:
    """The dynamic program's tables, and the chains that they stand for.

    Attributes:
        cost: ``[n]``; the lowest price of a chain, infinite where there is none.
        behind: ``[levels][n, layers + 1]``; cost of the stages behind so many layers.  Where the
            depth is open there is one level, else one for each stage.
        options: ``[levels][n, layers, classes]``; what ``behind`` is the smallest of.
        whole: ``[n, classes]``; cost of the chain, by class of the first stage.
    """

    def __init__(self, chains: Chains, price: Floats) -> None:
        self.chains, self.price = chains, price
        layers, depth = chains.layers, chains.depth
        n, classes = chains.first.shape
        self.rows = np.arange(n)[:, None]
        levels = 1 if depth is None else depth
        self.behind = [np.full((n, layers + 1), np.inf) for _ in range(levels)]
        self.options = [np.full((n, layers, classes), np.inf) for _ in range(levels)]
        for level in reversed(range(levels)):
            for above in range(layers - 1, 0, -1):
                best = self.options[level][:, above]
                if depth is None or level < depth - 1:
                    best[:] = price + self._rest(level + 1, above, _row(chains.inner, above))
                if depth is None or level == depth - 1:
                    fits = _row(chains.last, above) >= layers - above
                    best[:] = np.where(fits, price, best)
                self.behind[level][:, above] = best.min(axis=1)
        self.whole: Floats = np.full((n, classes), np.inf)
        if depth != 1:
            self.whole = price + self._rest(1, 0, chains.first)
        if depth in (None, 1):
            self.whole = np.where(chains.only >= layers, price, self.whole)
        self.cost: Floats = self.whole.min(axis=1)

    def _rest(self, stage: int, above: int, most: Ints) -> Floats:
        """``[n, classes]``; best cost behind a stage of up to ``most`` layers, and at least one."""
        behind = self.behind[min(stage, len(self.behind) - 1)]
        best = np.minimum.accumulate(behind[:, above + 1 :], axis=1)
        taken = np.minimum(most, best.shape[1]) - 1  # -1 where it can take none
        found: Floats = np.where(most > 0, best[self.rows, taken], np.inf)
        return found

    def chain(self, question: int) -> Chain:
        """A chain of that cost; there must be one."""
        chains, layers, q = self.chains, self.chains.layers, question
        c = int(self.whole[q].argmin())
        if chains.depth in (None, 1) and chains.only[q, c] >= layers:
            return Chain((c,), (layers,))
        classes, taken, above, most = [c], [], 0, int(chains.first[q, c])
        while True:
            stage = len(classes)
            level = min(stage, len(self.behind) - 1)
            behind = self.behind[level][q, above + 1 : above + most + 1]
            taken.append(1 + int(behind.argmin()))
            above += taken[-1]
            c = int(self.options[level][q, above].argmin())
            classes.append(c)
            ends = chains.depth in (None, stage + 1)
            if ends and _row(chains.last, above)[q, c] >= layers - above:
                return Chain(tuple(classes), (*taken, layers - above))
            most = int(_row(chains.inner, above)[q, c])


def _row(table: Ints, above: int) -> Ints:
    found: Ints = table[:, min(above, table.shape[1] - 1)]
    return found
