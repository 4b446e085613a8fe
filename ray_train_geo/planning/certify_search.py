"""Which step times no plan reaches: case by case, by bisection (see `certify`)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np

from ray_train_geo.errors import PlanError
from ray_train_geo.model.catalog import embedding_parameters, layer_parameters
from ray_train_geo.planning.certify_chains import DeviceClasses
from ray_train_geo.planning.certify_cuts import layer_sync_s, least_s, region_cuts
from ray_train_geo.planning.certify_nics import busiest_nic_s
from ray_train_geo.planning.certify_numbers import Numbers, OutOfTimeError
from ray_train_geo.planning.certify_packing import Limits, can_reach
from ray_train_geo.planning.certify_ranges import first_stage_ranges, microbatch_ranges
from ray_train_geo.planning.certify_reach import Reach, makeup
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
from ray_train_geo.planning.certify_visits import VisitChains
from ray_train_geo.planning.codecs import wire_bytes
from ray_train_geo.planning.cost import lower_bound_s
from ray_train_geo.planning.link_table import Floats, Ints, LinkTable
from ray_train_geo.planning.problem import Problem
from ray_train_geo.spec import GradientSyncName

__all__ = ["FOR_EVER_S", "TOLERANCE", "CaseSearch"]

TOLERANCE = 1e-3
"""Relative, of the bisection."""
_MOST_DEVICES_IN_DETAIL = 256
"""With more, first stages are not told apart by their layers: it would take too long."""
_MOST_CLASSES = 8
"""With more, what devices of a node share is not counted: it would take too long."""
_OWN_LAYERS = (1, 1), (2, 2), (3, 4), (5, 1 << 20)
"""Ranges that chains' own first stages are looked at in."""
_LAYERS_RATIO = 1.5
"""Where the largest of all first stages is known so well, each chain's own is looked at, too."""
_EXACT_FIRST = 12
"""Up to so many layers of first stages, those with one or two less are looked at alone."""
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
        self.fewest, self.most = fewest, most
        ranges = first_stage_ranges(problem.dims.layers)
        self.firsts = ranges
        self.in_detail = False
        self.layer_s = float(self.classes.layer_s.sum(axis=1).min())  # on the fastest device
        self.shallowest = self._shallowest()
        self._makeup = makeup(self.classes, len(self.table.latency_s))
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

    @property
    def worth_detail(self) -> bool:
        """Whether the problem is small enough to look at more."""
        return len(self.table.devices) <= _MOST_DEVICES_IN_DETAIL

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
        found = self._distinct(sync_cases(self.table, mode, pipelines, size))
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

    def _distinct(self, cases: Sequence[SyncCase]) -> list[SyncCase]:
        """Of cases that differ by the names of sites only, the first."""
        found: dict[Hashable, SyncCase] = {}
        for case in cases:
            alike = self._reach(case).alike(case.sites)
            found.setdefault((case.floor, case.beyond, case.leaves, alike), case)
        return list(found.values())

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
        if not self._may_step_in(time_s, case, (1, self.problem.dims.layers)):
            return False
        if not self.in_detail:
            return True
        if self.problem.may_split:
            return self._may_step_in(time_s, case, (1, self.problem.dims.layers), visits=True)
        return any(self._one_of(self.firsts, time_s, case, local) for local in (False, True))

    def _one_of(
        self, ranges: Sequence[tuple[int, int]], time_s: float, case: Case, local: bool
    ) -> bool:
        """Whether it may with first stages of one of ``ranges``: all together, then by halves."""
        largest = ranges[0][0], ranges[-1][1]
        if self._ends_early(time_s, case, largest, local):
            return False
        if not self._may_step_in(time_s, case, largest, local, visits=True):
            return False
        middle = len(ranges) // 2
        halves = (ranges[:middle], ranges[middle:]) if middle else ()
        return not halves or any(self._one_of(half, time_s, case, local) for half in halves)

    def _own_firsts(self, largest_first: tuple[int, int]) -> list[tuple[int, int]]:
        """Ranges (fewest, most) that first stages are looked at in, up to the largest.

        What they sum over a NIC comes after all else of their own pipelines.
        """
        most = largest_first[1]
        if largest_first == (1, self.problem.dims.layers):
            if len(self.table.devices) > _MOST_DEVICES_IN_DETAIL:
                return [largest_first]
            return [(a, min(b, most)) for a, b in _OWN_LAYERS if a <= most]
        if most > _LAYERS_RATIO * largest_first[0] or (self.classes.node_size == 1).all():
            return [(1, most)]
        ends = sorted({most, most - 1, most - 2 if most < _EXACT_FIRST else most // 2} - {0, -1})
        return [(a + 1, b) for a, b in pairwise([0, *ends])]

    def _ends_early(
        self, time_s: float, case: Case, largest_first: tuple[int, int], local: bool
    ) -> bool:
        """Whether too little time is left to compute all, or there is no such case."""
        sync = case.sync
        if not local and sync.floor == sync.beyond:
            return True
        group = sync.floor if local else sync.beyond  # of the first layer
        size = self.problem.gradient_bytes * float(layer_parameters(self.problem.dims))
        sync_s = group.latency_s + size * group.seconds_per_byte
        sync_s += (largest_first[0] - 1) * size * sync.floor.seconds_per_byte
        classes, layers = self.classes, largest_first[1]
        if self.shallowest == 1:  # an only stage has all of them
            layers = self.problem.dims.layers
        backward_s = classes.embedding_s[:, 1] + layers * classes.layer_s[:, 1]
        backward_s = backward_s + (self.shallowest == 1) * classes.head_s[:, 1]
        return time_s - sync_s + float(backward_s.max()) < self.compute_s

    def _may_step_in(
        self,
        time_s: float,
        case: Case,
        largest_first: tuple[int, int],
        first_local: bool | None = None,
        visits: bool = False,
    ) -> bool:
        """Of plans whose largest first stage has so many layers, and a cheap group or not.

        Args:
            visits: whether it counts what stages of a node share.
        """
        if self.layer_s * largest_first[0] > time_s * (1 + 1e-9):
            return False
        asked = self.fewest * self.layer_s <= time_s * (1 + 1e-9)
        if not asked.any():
            return False
        fewest = self.fewest[asked]
        number, within = self._reach(case.sync).islands(self._message_s(time_s, fewest))
        if not len(number):
            return False
        own = self._own_firsts(largest_first)
        number, within = np.tile(number, len(own)), np.tile(within, (len(own), 1))
        own_first = np.repeat(np.array(own), len(number) // len(own), axis=0).T
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
        microbatches = fewest[number]
        chains = chains_in_time(
            self.problem,
            classes,
            np.full(len(number), time_s),
            microbatches,
            case.tail,
            largest_first=largest_first,
            own_first=(own_first[0], own_first[1]),
            first_local=None if case.sync.floor == case.sync.beyond else first_local,
            allowed=within[:, index],
            beyond=~(inside[index] | case.sync.leaves),
        )
        worth = self.most[asked][number].astype(float)
        job, options = self.problem.job, self.problem.options
        least, most = case.pipelines
        nics = self._nic_messages(time_s, classes)
        limits = Limits(most, least, job.scaling.max_devices, options.max_dollars_per_hour, nics)
        if not visits or np.isinf(nics).all():
            return can_reach(self.total, worth, chains, classes, limits)
        longest = np.where(np.isfinite(nics), classes.node_size, 1)
        sharing = partial(VisitChains, chains, longest, microbatches)
        return can_reach(self.total, worth, chains, classes, limits, sharing)

    def _nic_messages(self, time_s: float, classes: DeviceClasses) -> Floats:
        """``[classes]``; messages each way that all NICs of its nodes have time for.

        Infinite where devices of a node share nothing, or only some are of the class.
        """
        each_s = self.message_bytes * classes.nic_seconds_per_byte[:, 0]
        shared = classes.pure & (classes.node_size > 1) & (each_s > 0)
        nodes = classes.count / classes.node_size
        return np.where(shared, nodes * time_s / np.where(shared, each_s, 1.0), np.inf)

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
