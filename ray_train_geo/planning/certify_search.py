"""Which step times no plan reaches: case by case, by bisection (see `certify`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ray_train_geo.errors import PlanError
from ray_train_geo.model.catalog import embedding_parameters, layer_parameters
from ray_train_geo.planning.certify_chains import DeviceClasses
from ray_train_geo.planning.certify_cuts import layer_sync_s, least_s, region_cuts
from ray_train_geo.planning.certify_nics import busiest_nic_s
from ray_train_geo.planning.certify_numbers import Numbers, OutOfTimeError
from ray_train_geo.planning.certify_packing import Limits, can_reach
from ray_train_geo.planning.certify_ranges import microbatch_ranges
from ray_train_geo.planning.certify_reach import Reach
from ray_train_geo.planning.certify_sync import (
    GroupFloor,
    SyncCase,
    between_nodes,
    components,
    group_floor,
    sync_cases,
    within_nodes,
)
from ray_train_geo.planning.certify_time import Tail, chains_in_time
from ray_train_geo.planning.codecs import wire_bytes
from ray_train_geo.planning.cost import lower_bound_s
from ray_train_geo.planning.link_table import Floats, Ints, LinkTable
from ray_train_geo.planning.problem import Problem
from ray_train_geo.spec import GradientSyncName

__all__ = ["FOR_EVER_S", "TOLERANCE", "CaseSearch"]

TOLERANCE = 1e-3
"""Relative, of the bisection."""
_FIRST_LAYERS = (1, 1), (2, 2), (3, 4), (5, 1 << 20)
"""Ranges that a first stage's layers are looked at in: what they sync comes after all else."""
_MOST_DEVICES_IN_DETAIL = 256
"""With more, first stages are not told apart by their layers: it would take too long."""
_MOST_CLASSES = 8
"""With more, what devices of a node share is not counted: it would take too long."""
FOR_EVER_S = 1e30
"""A step time that every plan reaches, if it is one."""


@dataclass(frozen=True, slots=True)
class Case:
    """Plans of so many pipelines (fewest, most), whose gradients are summed as ``sync`` says.

    Args:
        at_least_s: none of them steps in less.
    """

    pipelines: tuple[int, int]
    sync: SyncCase
    tail: Tail
    at_least_s: float

    def anywhere(self) -> Case:
        """Wherever the pipelines are."""
        sync = self.sync.anywhere()
        return replace(self, sync=sync, tail=replace(self.tail, beyond=sync.beyond))


class CaseSearch:
    """One problem's constants, and the answers to "may a plan step in T?"."""

    def __init__(
        self,
        problem: Problem,
        codecs: Sequence[str],
        expired: Callable[[], bool] = lambda: False,
    ) -> None:
        self.problem = problem
        self.expired = expired
        self.table: LinkTable = problem.table
        self.classes = DeviceClasses.of(problem)
        if len(self.classes.count) > _MOST_CLASSES:
            self.classes = DeviceClasses.of(problem, largest_node=1)
        training = problem.job.training
        self.total = training.total_microbatches
        usable = problem.topology.devices
        self.compute_s = lower_bound_s(problem.dims, training, usable)
        elements, precision = problem.message_elements, training.precision
        self.message_bytes = min(wire_bytes(c, elements, precision) for c in codecs)
        latency, per_byte = between_nodes(self.table)
        transfer = self.message_bytes * per_byte
        self.hops_s = np.maximum(transfer, transfer.T)
        self.hop_merges = components(self.hops_s)
        self.hop_s = self._cheapest_hop_s(latency + transfer)
        fewest, most = microbatch_ranges(self.total, problem.job.parallelism.microbatches)
        first = [r for r in _FIRST_LAYERS if r[0] <= problem.dims.layers]
        if len(self.table.devices) > _MOST_DEVICES_IN_DETAIL:
            first = [(1, problem.dims.layers)]
        self.fewest, self.most = np.tile(fewest, len(first)), np.tile(most, len(first))
        lowest, highest = np.repeat(np.array(first), len(fewest), axis=0).T
        self.first_layers = lowest, highest
        self.layer_s = float(self.classes.layer_s.sum(axis=1).min())  # on the fastest device
        self.shallowest = self._shallowest()
        self._makeup = _makeup(self.classes, len(self.table.latency_s))
        self._reaches: dict[tuple[tuple[bool, ...], bool], Reach] = {}

    def _cheapest_hop_s(self, across_s: Floats) -> tuple[float, float]:
        """Of all pairs of devices: (the faster direction, both directions)."""
        latency, per_byte = within_nodes(self.table)
        local = float((latency + self.message_bytes * per_byte).min(initial=np.inf))
        down, both = float(across_s.min()), float((across_s + across_s.T).min())
        found = min(local, down), min(2 * local, both)
        return found if np.isfinite(found[1]) else (0.0, 0.0)

    def _shallowest(self) -> int:
        """Fewest stages that memory allows."""
        tail = self.tail(None, (1, 1))
        for_ever = np.array([FOR_EVER_S])
        chains = chains_in_time(self.problem, self.classes, for_ever, np.array([1]), tail)
        depth = float(chains.cheapest(np.ones(len(self.classes.count))).cost[0])
        if not np.isfinite(depth):
            raise PlanError(
                "no chain of these devices has memory for the model: add devices with more "
                "memory, or use a smaller microbatch or recomputation"
            )
        return int(depth)

    def most_microbatches(self) -> int:
        """Of any one pipeline."""
        given = self.problem.job.parallelism.microbatches
        return max(given) if given else self.total - self.pipelines()[0] + 1

    def pipelines(self) -> tuple[int, int]:
        """Fewest and most pipelines of a plan."""
        job = self.problem.job
        fixed = job.fixed_pipelines()
        if fixed is not None:
            return fixed, fixed
        devices = min(len(self.table.devices), job.scaling.max_devices or len(self.table.devices))
        return 1, max(1, min(self.total, devices // self.shallowest))

    def tail(self, mode: GradientSyncName | None, pipelines: tuple[int, int]) -> Tail:
        """What follows the backwards of plans of so many pipelines, layers' groups aside."""
        dims, fewest, most = self.problem.dims, *pipelines
        deep = mode is not None and self.shallowest > 1
        tied_s, tied_nic_s = 0.0, 0.0
        # Of the tied matrix: first and last stages; a pipeline of one stage counts once.
        members = 2 * fewest if deep else fewest + 1, 2 * most
        if dims.tied_embeddings and mode is not None and len(self.table.devices) > 1:
            size = self.problem.gradient_bytes * float(dims.vocab_size * dims.dim)
            tied_s = group_floor(self.table, mode, members, size)
            others = embedding_parameters(dims) - dims.vocab_size * dims.dim
            first = (
                self.problem.gradient_bytes * float(layer_parameters(dims) + others) * (fewest > 1)
            )
            tied_nic_s = busiest_nic_s(self.table, mode, fewest, members[0], size, first)
        return Tail(
            groups=GroupFloor(),
            beyond=GroupFloor(),
            tied_s=tied_s,
            tied_nic_s=tied_nic_s,
            hop_s=self.hop_s,
            mode=mode,
            members=fewest,
            tied_members=members[0],
            message_bytes=self.message_bytes,
        )

    def least_of(self, numbers: Numbers, below_s: float) -> float:
        """A time in which no plan of so many pipelines steps; ``below_s`` if there is none less.

        Raises:
            OutOfTimeError: there was no time to look at all cases.
        """
        least_s = numbers.at_least_s
        best = below_s
        for cases in self._cases(numbers.mode, numbers.pipelines):
            floor: GroupFloor | None = None
            for case in cases:
                aim = best * (1 - TOLERANCE)
                if np.isfinite(best) and case.sync.floor != floor:
                    # Floors only grow: what is too slow wherever it is, is so from here on.
                    floor = case.sync.floor
                    if not self.may_step_in(aim, case.anywhere()):
                        break
                if not np.isfinite(best) or self.may_step_in(aim, case):
                    best = min(best, self._least_s(case, least_s, best))
                if best <= least_s * (1 + TOLERANCE):
                    return best
        return best

    def _cases(self, mode: GradientSyncName, pipelines: tuple[int, int]) -> Iterator[list[Case]]:
        """All cases of plans of so many pipelines; those over one cut together."""
        size = self.problem.gradient_bytes * float(layer_parameters(self.problem.dims))
        tail = self.tail(mode, pipelines)
        found = sync_cases(self.table, mode, pipelines, size)
        for cut_s, at_least_s in self._over_cuts(mode, pipelines[0]):
            over = replace(tail, cut_s=cut_s)
            yield [
                Case(
                    pipelines,
                    sync,
                    replace(over, groups=sync.floor, beyond=sync.beyond),
                    at_least_s,
                )
                for sync in found
            ]

    def _over_cuts(self, mode: GradientSyncName, pipelines: int) -> list[tuple[float, float]]:
        """Cases: (sync of every layer over some cut, no step is shorter); in seconds."""
        both = []
        for cut in region_cuts(self.table, self.classes):
            sync_s = layer_sync_s(self.problem, cut, mode, pipelines)
            both.append(
                (sync_s, least_s(self.problem, cut, self.classes, self.message_bytes, sync_s))
            )
        # Of the cuts that every layer's sync crosses, look at the slowest: or there is none.
        found, slower_least_s = [], 0.0
        for sync_s, at_least_s in sorted(both, reverse=True):
            if sync_s > 0:
                found.append((sync_s, slower_least_s))
            slower_least_s = max(slower_least_s, at_least_s)
        return [*found, (0.0, slower_least_s)]

    def may_step_in(self, time_s: float, case: Case) -> bool:
        """False is a proof that no plan of this case steps in ``time_s``."""
        if self.expired():
            raise OutOfTimeError
        if time_s < case.at_least_s:
            return False
        # What no first stage has time for is no question.
        asked = self.fewest * self.first_layers[0] * self.layer_s <= time_s * (1 + 1e-9)
        if not asked.any():
            return False
        fewest = self.fewest[asked]
        fewest = self.fewest[asked]
        number, within = self._reach(case.sync).islands(self._message_s(time_s, fewest))
        if not len(number):
            return False
        inside = np.array(case.sync.sites)
        classes = self.classes.merged(
            [
                (column.tobytes(), bool(inside[site]))
                for column, site in zip(
                    within[:, self.classes.site].T, self.classes.site, strict=True
                )
            ]
        )
        index = self.table.site[[group[0] for group in classes.devices]]
        chains = chains_in_time(
            self.problem,
            classes,
            np.full(len(number), time_s),
            fewest[number],
            case.tail,
            first_layers=(self.first_layers[0][asked][number], self.first_layers[1][asked][number]),
            allowed=within[:, index],
            beyond=~inside[index],
        )
        worth = self.most[asked][number].astype(float)
        job, options = self.problem.job, self.problem.options
        fewest, most = case.pipelines
        limits = Limits(most, fewest, job.scaling.max_devices, options.max_dollars_per_hour)
        return can_reach(self.total, worth, chains, classes, limits)

    def _message_s(self, time_s: float, microbatches: Ints) -> Floats:
        """Most that a message may take over a hop: the last has all others before it.

        And a whole round, of which the computing is known, about it.
        """
        # Of a backward that is split, W may be elsewhere in time; what is left is no forward less.
        split = self.problem.may_split
        layer_s = 2 * float(self.classes.layer_s[:, 0].min()) if split else self.layer_s
        round_s = min(self.problem.dims.layers * layer_s, time_s)
        others = np.maximum(microbatches - 1, 1)
        return np.minimum(time_s / microbatches, (time_s - round_s) / others)

    def _reach(self, sync: SyncCase) -> Reach:
        key = sync.sites, sync.leaves
        if key not in self._reaches:
            least_s = 0.0
            if sync.leaves:
                inside = np.array(sync.sites)
                least_s = float(self.hops_s[inside][:, ~inside].min(initial=np.inf))
            self._reaches[key] = Reach(self.hop_merges, self._makeup, sync.sites, least_s)
        return self._reaches[key]

    def _least_s(self, case: Case, least_s: float, below_s: float) -> float:
        """A time, close to the largest, in which no plan of this case steps; or infinity."""
        low, high = max(self.compute_s, least_s, case.at_least_s) * (1 - TOLERANCE), below_s
        if not np.isfinite(high):
            if not self.may_step_in(FOR_EVER_S, case):
                return float("inf")
            high = 2 * low
            while not self.may_step_in(high, case):
                low, high = high, 2 * high
        if self.may_step_in(low * (1 + 2 * TOLERANCE), case):
            return low
        while high > low * (1 + TOLERANCE):
            middle = (low * high) ** 0.5
            if self.may_step_in(middle, case):
                high = middle
            else:
                low = middle
        return low

    def slowest_s(self, tail: Tail) -> float:
        """A step of all layers on the slowest device."""
        stage_s = (
            self.problem.dims.layers * self.classes.layer_s.sum(axis=1)
            + self.classes.embedding_s.sum(axis=1)
            + self.classes.head_s.sum(axis=1)
        )
        rounds = self.problem.dims.layers * tail.hop_s[1]
        return float((self.total + 1) * stage_s.max() + rounds) + tail.tied_s

    def argument(self, modes: Sequence[GradientSyncName]) -> str:
        """What the bound on step time rests on."""
        text = (
            "pipelines of whole layers on the devices that there are, their memory, fill and "
            f"drain, and the least that {' or '.join(modes)} must move after the last backward"
        )
        weak = []
        if len(self.hop_merges) > 16:
            weak.append("links differ pair by pair, and only the best of them are counted")
        if (np.bincount(self.table.node) > 1).any():
            weak.append("messages between stages are taken to share no NIC")
        if self.table.uplink_seconds_per_byte.any():
            weak.append("uplinks are counted only as all of a region's together")
        cuts = self.problem.job.stage_boundaries()
        if cuts is not None and len(cuts) > 1:
            weak.append("the job's different boundaries per pipeline are not looked at")
        return text + (f"; weak because {' and '.join(weak)}" if weak else "")


def _makeup(classes: DeviceClasses, sites: int) -> list[int]:
    """``[sites]``; equal numbers for sites with equal devices."""
    numbers: dict[tuple[tuple[int, int], ...], int] = {}
    found = []
    for site in range(sites):
        here = np.flatnonzero(classes.site == site)
        devices = sorted((int(classes.kind[c]), int(classes.count[c])) for c in here)
        found.append(numbers.setdefault(tuple(devices), len(numbers)))
    return found
