"""What no plan can beat: lower bounds on step time and on dollars per million tokens.

The question is asked the other way round.  In a step of ``T`` seconds, a pipeline of given devices
does at most so many microbatches; are there enough devices for pipelines that do all of them?  If
not, no plan steps in ``T``.  Bisection gives the largest such ``T``::

    T -> layers that a device can take, by microbatches and place     certify_time
      -> the cheapest chain of devices for each count of microbatches  certify_chains
      -> most microbatches of all pipelines together                   certify_packing

How much of ``T`` goes to summing gradients depends on where pipelines are, which depends on
their hops: `certify_sync` lists the cases, and the bound is the least of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ray_train_geo.errors import PlanError
from ray_train_geo.model.catalog import layer_parameters
from ray_train_geo.planning.certify_chains import DeviceClasses
from ray_train_geo.planning.certify_nics import nic_bound_s
from ray_train_geo.planning.certify_packing import Limits, can_reach
from ray_train_geo.planning.certify_sync import (
    GroupFloor,
    SyncCase,
    between_nodes,
    components,
    group_floor,
    sync_cases,
    within_nodes,
)
from ray_train_geo.planning.certify_time import Bools, Tail, chains_in_time
from ray_train_geo.planning.codecs import wire_bytes
from ray_train_geo.planning.cost import lower_bound_s
from ray_train_geo.planning.link_table import Floats, Ints, LinkTable
from ray_train_geo.planning.problem import Problem
from ray_train_geo.spec import GradientSyncName

__all__ = ["Bound", "dollars_bound", "step_time_bound"]

_GRADIENT_BYTES = 4
_TOLERANCE = 1e-3
"""Relative, of the bisection."""
_EXACT_COUNTS = 64
_COUNT_RATIO = 1.01
"""Microbatch counts beyond the exact ones are looked at in ranges of this ratio."""
_EXACT_PIPELINES = 12
_PIPELINES_RATIO = 1.3
_TIMES = 1500
_FOR_EVER_S = 1e30
"""Step times that the bound on dollars looks at."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What no plan that the job allows can beat, and why.

    Args:
        value: seconds, or dollars per million tokens.
        argument: one sentence on what the bound rests on, and on what makes it weak.
    """

    value: float
    argument: str


@dataclass(frozen=True, slots=True)
class _Case:
    """Plans of so many pipelines (fewest, most), whose gradients are summed as ``sync`` says.

    Args:
        at_least_s: none of them steps in less.
    """

    pipelines: tuple[int, int]
    sync: SyncCase
    tail: Tail
    at_least_s: float

    def anywhere(self) -> _Case:
        """Wherever the pipelines are."""
        sites = (True,) * len(self.sync.sites)
        return replace(self, sync=replace(self.sync, sites=sites))


class _OutOfTimeError(Exception):
    """Not all cases could be looked at."""


def step_time_bound(
    problem: Problem,
    modes: Sequence[GradientSyncName],
    codecs: Sequence[str],
    expired: Callable[[], bool] = lambda: False,
) -> Bound:
    """The shortest step that any plan could have.

    Args:
        modes: of gradient sync, that a plan may use.
        codecs: that a hop may use.
        expired: whether time is up; then the bound is that of compute alone.

    Raises:
        PlanError: no chain of devices has memory for the model.
    """
    search = _Search(problem, codecs, expired)
    try:
        best = _least_of_all(search, modes)
    except _OutOfTimeError:
        return Bound(
            search.compute_s,
            "all devices compute all the time; weak: there was no time to look at communication",
        )
    return Bound(best * (1 - _TOLERANCE), search.argument(modes))


def _least_of_all(search: _Search, modes: Sequence[GradientSyncName]) -> float:
    """The least bound of all cases.  Raises _OutOfTimeError."""
    best = np.inf
    for cases in search.cases(modes):
        floor: GroupFloor | None = None
        for case in cases:
            aim = best * (1 - _TOLERANCE)
            if np.isfinite(best) and case.sync.floor != floor:
                # Floors only grow: what is too slow wherever it is, is so from here on.
                floor = case.sync.floor
                if not search.may_step_in(aim, case.anywhere()):
                    break
            if not np.isfinite(best) or search.may_step_in(aim, case):
                best = min(best, search.least_s(case, best))
    return float(best)


def dollars_bound(
    problem: Problem, modes: Sequence[GradientSyncName], codecs: Sequence[str]
) -> Bound:
    """The fewest dollars per million tokens that any plan could cost.

    All devices are paid for the whole step, so a plan costs at least the sum over pipelines of
    what each costs until it is done itself.  A microbatch is never cheaper than in a pipeline that
    does all of them, because what comes before the first and after the last counts once.

    Raises:
        PlanError: no chain of devices has memory for the model.
    """
    search = _Search(problem, codecs)
    training, classes = problem.job.training, search.classes.merged([0] * len(search.classes.count))
    price = classes.price_per_hour
    most = search.most_microbatches()
    cheapest = np.inf
    low_s = most * float(classes.layer_s.sum(axis=1).min())  # a layer on the fastest device
    for tail in {search.tail(mode, search.pipelines()) for mode in modes}:
        times = np.append(np.geomspace(low_s, search.slowest_s(tail), _TIMES), _FOR_EVER_S)
        chains = chains_in_time(
            problem, classes, times, np.full(len(times), most), tail, lasting=True
        )
        # Between two of the times: the price of the later one, for as long as the earlier one.
        cheapest = min(cheapest, float((times[:-1] * chains.cheapest(price).cost[1:]).min()))
    tokens = most * training.microbatch * training.seq_len
    dollars = cheapest / 3600 / (tokens / 1e6)
    argument = (
        "the cheapest pipeline that does all microbatches by itself, with whole layers, memory, "
        "fill and drain; weak where the cheapest devices are too few for a pipeline or the job "
        "asks for several pipelines"
    )
    if not price.all():
        argument = "some devices are free, so that the bound is weak: " + argument
    return Bound(dollars * (1 - _TOLERANCE), argument)


class _Search:
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
        training = problem.job.training
        self.total = training.total_microbatches
        usable = problem.topology.devices
        self.compute_s = lower_bound_s(problem.dims, training, usable)
        elements, precision = problem.message_elements, training.precision
        self.message_bytes = min(wire_bytes(c, elements, precision) for c in codecs)
        latency, per_byte = between_nodes(self.table)
        transfer = self.message_bytes * per_byte
        self.hop_merges = components(np.maximum(transfer, transfer.T))
        self.hop_s = self._cheapest_hop_s(latency + transfer)
        self.fewest, self.most = _counts(self.total, problem.job.parallelism.microbatches)
        self.shallowest = self._shallowest()

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
        for_ever = np.array([_FOR_EVER_S])
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
        tied_s, tied_share, commit_s = 0.0, 0.0, 0.0
        if dims.tied_embeddings and mode is not None and len(self.table.devices) > 1:
            # First and last stages; a pipeline of one stage counts once.
            members = 2 * fewest if deep else fewest + 1, 2 * most
            size = _GRADIENT_BYTES * float(dims.vocab_size * dims.dim)
            tied_s, tied_share = group_floor(self.table, mode, members, size)
        if deep or fewest > 1:
            local, across = within_nodes(self.table)[0], between_nodes(self.table)[0]
            commit_s = float(min(2 * local.min(initial=np.inf), (across + across.T).min()))
        return Tail(GroupFloor(), tied_s, tied_share, commit_s, self.hop_s)

    def cases(self, modes: Sequence[GradientSyncName]) -> Iterator[list[_Case]]:
        """All cases of a plan; those of one mode and number of pipelines together."""
        size = _GRADIENT_BYTES * float(layer_parameters(self.problem.dims))
        for pipelines in reversed(_ranges(*self.pipelines())):
            for mode in modes:
                nics_s = nic_bound_s(self.problem, self.classes, mode, pipelines)
                tail = self.tail(mode, pipelines)
                yield [
                    _Case(pipelines, sync, replace(tail, groups=sync.floor), nics_s)
                    for sync in sync_cases(self.table, mode, pipelines, size)
                ]

    def may_step_in(self, time_s: float, case: _Case) -> bool:
        """False is a proof that no plan of this case steps in ``time_s``."""
        if self.expired():
            raise _OutOfTimeError
        if time_s < case.at_least_s:
            return False
        within = self._within_reach(time_s, case.sync.sites)
        allowed = within[:, self.classes.site]
        classes = self.classes.merged([column.tobytes() for column in allowed.T])
        index = self.table.site[[group[0] for group in classes.devices]]
        chains = chains_in_time(
            self.problem,
            classes,
            np.full(len(self.fewest), time_s),
            self.fewest,
            case.tail,
            allowed=within[:, index],
        )
        job, options = self.problem.job, self.problem.options
        limits = Limits(case.pipelines[1], job.scaling.max_devices, options.max_dollars_per_hour)
        return can_reach(self.total, self.most.astype(float), chains, classes, limits)

    def _within_reach(self, time_s: float, meet: tuple[bool, ...]) -> Bools:
        """``[counts, sites]``; sites of pipelines that pass one of the sites ``meet``.

        A hop carries every microbatch, so it takes at most ``time / microbatches`` for each.
        """
        must = np.array(meet)
        costs = np.array([cost for cost, _ in self.hop_merges])
        reach = [must]
        for _, labels in self.hop_merges:
            reach.append(np.isin(labels, labels[must]))
        level: Ints = np.searchsorted(costs, time_s / self.fewest * (1 + 1e-9), side="right")
        return np.array(reach)[level]

    def least_s(self, case: _Case, below_s: float) -> float:
        """A time, close to the largest, in which no plan of this case steps."""
        low, high = max(self.compute_s, case.at_least_s) * (1 - _TOLERANCE), below_s
        if not np.isfinite(high):
            high = 2 * low
            while not self.may_step_in(high, case):
                low, high = high, 2 * high
        while high > low * (1 + _TOLERANCE):
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
        if (np.bincount(self.table.node) > 1).any() or self.table.uplink_seconds_per_byte.any():
            weak.append("messages between stages are taken to share no NIC and no uplink")
        cuts = self.problem.job.stage_boundaries()
        if cuts is not None and len(cuts) > 1:
            weak.append("the job's different boundaries per pipeline are not looked at")
        return text + (f"; weak because {' and '.join(weak)}" if weak else "")


def _counts(total: int, given: Sequence[int] | None) -> tuple[Ints, Ints]:
    """Ranges (fewest, most) that a pipeline's microbatches may be in."""
    if given is not None:
        exact = np.unique(given)
        return exact, exact
    ends = _growing(1, total, _EXACT_COUNTS, _COUNT_RATIO)
    return np.array([a for a, _ in ends]), np.array([b for _, b in ends])


def _ranges(fewest: int, most: int) -> list[tuple[int, int]]:
    return _growing(fewest, most, _EXACT_PIPELINES, _PIPELINES_RATIO)


def _growing(first: int, last: int, exact: int, ratio: float) -> list[tuple[int, int]]:
    """Ranges that cover first..last: single numbers up to ``exact``, then longer and longer."""
    ranges = []
    while first <= last:
        end = first if first < exact else min(last, max(first, int(first * ratio)))
        ranges.append((first, end))
        first = end + 1
    return ranges
