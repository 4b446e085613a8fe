"""Repairs of a plan: few layers move, because all that can stay as it was does.

::

    plan in force    [a b X d]  [e f g h]     X has left, s is not in use
    mend             [a b s d]  or  [a b d]   s takes its place, or its neighbours its layers
    dissolve                    [e f g h]     and a, b, d are not in use any more

    with what is not in use, one after the other, what helps most:
    replace          [a s c d]                a slow or badly placed device
    deepen           [a b s c d]              a pipeline
    found            [s t u v]                another pipeline

Pipelines keep their numbers (*slots*), because a job may fix the cut of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from math import prod

import numpy as np
from scipy.optimize import linear_sum_assignment

from ray_train_geo.planning.constructions import Shape
from ray_train_geo.planning.evaluate import Chain, Evaluation, Evaluator
from ray_train_geo.planning.transition import Layers
from ray_train_geo.spec import GradientSyncName

__all__ = ["Broken", "Repairer", "State", "allows"]

_MOST_CUTS = 16
"""Ways to share the layers of those who left that are all tried."""

_POSITIONS = 2
"""Places in a pipeline where a new stage is tried: those with the least to send."""

_WORTH = 1e-3
"""A device that is not in use is taken in only for so much of the objective, relative."""

Broken = Sequence[tuple[int | None, Layers]]
"""The stages of a pipeline in the plan in force: device (None: it left) and layers."""

Slots = tuple[Chain | None, ...]


@dataclass(frozen=True, slots=True)
class State:
    """A plan under repair.

    Args:
        slots: pipelines by their numbers; None is dissolved, or not yet mended.
        spare: devices that are not in use and could be.
        found: the slots' evaluation; None while there is no pipeline.
    """

    slots: Slots
    spare: tuple[int, ...]
    found: Evaluation | None = None


class Repairer:
    """Tries repairs, by what ``evaluator`` says of them.

    Args:
        held: by device number, the layers that it holds now.
        tries: plans that may be evaluated.
        expired: whether time is up.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        held: Mapping[int, Layers],
        tries: int,
        expired: Callable[[], bool],
    ) -> None:
        self._evaluate = evaluator
        self._problem = evaluator.problem
        self._shape = Shape.of(evaluator.problem)
        self._held = held
        self._twin = evaluator.problem.twins
        self._tries = tries
        self._expired = expired
        self._modes: tuple[GradientSyncName, ...] | None = None

    def mend(self, start: State, broken: Mapping[int, Broken]) -> State:
        """Give every broken pipeline what it lacks, one after the other, or dissolve it."""
        state = self._adopted(start)
        for slot, stages in broken.items():
            state = self._adopted(self._mended(state, slot, stages))
        return state

    def dissolve(self, start: State, broken: Mapping[int, Broken]) -> State:
        """Make spare devices of what is left of the broken pipelines."""
        freed = [d for stages in broken.values() for d, _ in stages if d is not None]
        return self._adopted(replace(start, spare=(*start.spare, *freed)))

    def use_spares(self, state: State) -> State:
        """Take in, one after the other, what helps most, and let boundaries settle."""
        before = set(state.slots)
        while state.spare and not self._over():
            best = self._best(self._uses(state))
            if best is None or (
                state.found is not None and _value(best.found) >= _value(state.found) * (1 - _WORTH)
            ):
                break
            state = self._adopted(best)
        return self._adopted(self._settled(state, before))

    def _over(self) -> bool:
        return self._tries <= 0 or self._expired()

    def _adopted(self, state: State) -> State:
        """``state`` with its best gradient-sync mode; until the next, all is judged by that one."""
        self._modes = None
        state = self._evaluated(state) or state
        if state.found is not None:
            self._modes = (state.found.gradient_sync,)
        return state

    def _evaluated(self, state: State) -> State | None:
        """``state`` with its evaluation, and its cuts and codecs as they were chosen."""
        present = [i for i, chain in enumerate(state.slots) if chain is not None]
        chains = tuple(chain for chain in state.slots if chain is not None)
        fixed = self._problem.job.parallelism.microbatches
        found = None
        if chains:
            counts = [fixed[i] for i in present] if fixed else None
            found = self._evaluate(chains, self._modes, counts)
        if found is None:
            return None
        self._tries -= 1
        slots = list(state.slots)
        for i, chain in zip(present, found.candidate, strict=True):
            slots[i] = chain
        return State(tuple(slots), state.spare, found)

    def _best(self, states: Iterator[State]) -> State | None:
        best: State | None = None
        for state in states:
            tried = self._evaluated(state)
            if tried is not None and (best is None or _rank(tried) < _rank(best)):
                best = tried
            if best is not None and self._over():
                break
        return best

    def _with(
        self, state: State, slot: int, chain: Chain, freed: Sequence[int] = ()
    ) -> Iterator[State]:
        """``state`` with another pipeline in ``slot``, if the job allows one of such depth."""
        stages, cut = self._shape.stages, self._shape.cut(slot)
        depth = len(chain.devices)
        if stages not in (None, depth) or (cut is not None and len(cut) != depth + 1):
            return
        slots = [*state.slots, None] if slot == len(state.slots) else list(state.slots)
        slots[slot] = chain if cut is None else replace(chain, cut=cut)
        spare = (d for d in state.spare if d not in chain.devices)
        yield State(tuple(slots), (*spare, *freed))

    def _mended(self, state: State, slot: int, broken: Broken) -> State:
        """First without anyone new; then each gap is filled in turn, where that is better."""
        best, stages = self._completed(state, slot, broken), list(broken)
        for i, (device, run) in enumerate(broken):
            if device is not None:
                continue
            used = {d for d, _ in stages}
            before = list(stages)
            for x in self._distinct([d for d in state.spare if d not in used]):
                filled = [*before[:i], (x, run), *before[i + 1 :]]
                tried = self._completed(state, slot, filled)
                if tried is not None and (best is None or _rank(tried) < _rank(best)):
                    best, stages = tried, filled
        if best is None or (state.found is not None and _rank(state) < _rank(best)):
            freed = (d for d, _ in broken if d is not None)
            return replace(state, spare=(*state.spare, *freed))
        return best

    def _completed(self, state: State, slot: int, stages: Broken) -> State | None:
        return self._best(
            s for chain in _completions(stages) for s in self._with(state, slot, chain)
        )

    def _distinct(self, devices: Sequence[int]) -> list[int]:
        """One of each kind that is alike in all that counts: speed, links, and what it holds."""
        first: dict[tuple[int, Layers | None], int] = {}
        for d in devices:
            first.setdefault((self._twin[d], self._held.get(d)), d)
        return list(first.values())

    def _uses(self, state: State) -> Iterator[State]:
        yield from self._founded(state)
        newcomers = self._distinct(state.spare)
        alike = self._alike(state)
        for slot, chain in alike.items():
            for x in newcomers:
                for i in self._positions(chain.devices, x):
                    devices = (*chain.devices[:i], x, *chain.devices[i:])
                    yield from self._with(state, slot, Chain(devices))
        for slot, i in self._busiest_first(state):
            if slot not in alike:
                continue
            chain, device = alike[slot], alike[slot].devices[i]
            for x in newcomers:
                if self._twin[x] == self._twin[device]:
                    continue
                devices = (*chain.devices[:i], x, *chain.devices[i + 1 :])
                yield from self._with(state, slot, Chain(devices, chain.cut), (device,))
                if self._problem.kinds[x] != self._problem.kinds[device]:
                    yield from self._with(state, slot, Chain(devices), (device,))

    def _alike(self, state: State) -> dict[int, Chain]:
        """One pipeline, by its slot, of each set that is cut alike on twins."""
        first: dict[tuple[object, ...], tuple[int, Chain]] = {}
        for slot, chain in enumerate(state.slots):
            if chain is not None:
                key = chain.cut, tuple(self._twin[d] for d in chain.devices)
                first.setdefault(key, (slot, chain))
        return dict(first.values())

    def _founded(self, state: State) -> Iterator[State]:
        """New pipelines: along others, each stage next to a holder of its layers, or by themselves.

        Of the fastest spare devices, anywhere or in one region or of one kind.
        """
        slot = next((i for i, c in enumerate(state.slots) if c is None), len(state.slots))
        if slot == len(state.slots) and self._shape.pipelines is not None:
            return
        devices, table = self._problem.topology.devices, self._problem.table
        groups: dict[tuple[str, int], list[int]] = {}
        for d in sorted(state.spare):
            of = ("", 0), ("region", int(table.region[d])), ("kind", self._problem.kinds[d])
            for key in of:
                groups.setdefault(key, []).append(d)
        seen: set[tuple[int, ...]] = set()
        others = self._alike(state).values()
        for depth in range(1, min(len(state.spare), self._problem.dims.layers) + 1):
            for group in groups.values():
                fastest = sorted(group, key=lambda d: -devices[d].flops_per_s)[:depth]
                team = tuple(sorted(fastest))
                if len(team) < depth or team in seen:
                    continue
                seen.add(team)
                for other in others:
                    if len(other.devices) == depth:
                        chain = self._alongside(team, other.devices)
                        yield from self._with(state, slot, Chain(chain, other.cut))
                yield from self._with(state, slot, Chain(team))

    def _alongside(self, team: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
        """``team`` in the order in which each is nearest to its counterpart in ``other``."""
        apart_s = np.array([[self._round_trip_s(a, b) for b in team] for a in other])
        return tuple(team[i] for i in linear_sum_assignment(apart_s)[1].tolist())

    def _round_trip_s(self, a: int, b: int) -> float:
        """A message there and one back."""
        there, back = self._problem.hop(a, b), self._problem.hop(b, a)
        return there[0] + back[0] + self._problem.message_bytes * (there[1] + back[1])

    def _positions(self, chain: Sequence[int], x: int) -> list[int]:
        """Where in ``chain`` a stage on ``x`` adds the least to what a microbatch travels."""

        def added_s(i: int) -> float:
            left, right = chain[i - 1 : i] if i else (), chain[i : i + 1]
            more = sum(self._round_trip_s(a, x) for a in (*left, *right))
            less = self._round_trip_s(left[0], right[0]) if left and right else 0.0
            return float(f"{more - less:.9g}")

        return sorted(range(len(chain) + 1), key=added_s)[:_POSITIONS]

    def _busiest_first(self, state: State) -> list[tuple[int, int]]:
        """(slot, stage) of all stages: those first that compute or send the longest."""
        if state.found is None:
            return []
        present = [i for i, chain in enumerate(state.slots) if chain is not None]
        order: list[tuple[float, int, int]] = []
        for slot, cost in zip(present, state.found.pipelines, strict=True):
            times = cost.times
            for s in range(len(cost.devices)):
                hops = (*times.down[max(0, s - 1) : s + 1], *times.up[max(0, s - 1) : s + 1])
                sent_s = max((hop.latency_s + hop.transfer_s for hop in hops), default=0.0)
                busy_s = times.work_s[s] + sent_s
                order.append((-float(f"{busy_s:.9g}"), slot, s))
        return [(slot, s) for _, slot, s in sorted(order)]

    def _settled(self, state: State, before: set[Chain | None]) -> State:
        """Boundaries of the pipelines that changed, a layer at a time, while that helps."""
        while state.found is not None and not self._over():
            best = self._best(self._shifted(state, before))
            if best is None or _rank(best) >= _rank(state):
                break
            state = best
        return state

    def _shifted(self, state: State, before: set[Chain | None]) -> Iterator[State]:
        for slot, chain in enumerate(state.slots):
            if chain is None or chain.cut is None or chain in before:
                continue
            for i in range(1, len(chain.devices)):
                for by in (-1, 1):
                    cut = (*chain.cut[:i], chain.cut[i] + by, *chain.cut[i + 1 :])
                    if self._shape.cuts is None and cut[i - 1] < cut[i] < cut[i + 1]:
                        yield from self._with(state, slot, replace(chain, cut=cut))


def _value(found: Evaluation | None) -> float:
    assert found is not None  # of evaluated states only
    return found.value


def _rank(state: State) -> tuple[float, int, int]:
    assert state.found is not None  # of evaluated states only
    return state.found.rank


def _completions(stages: Broken) -> Iterator[Chain]:
    """A pipeline of the devices that are there: neighbours share what lies between them.

    Ends with the cut that suits its devices best, whatever moves.
    """
    there = [(device, run) for device, run in stages if device is not None]
    if not there:
        return
    devices = tuple(device for device, _ in there)
    between = [range(a[1], b[0] + 1) for (_, a), (_, b) in pairwise(there)]
    if prod(map(len, between)) > _MOST_CUTS:
        between = [range(r[len(r) // 2], r[len(r) // 2] + 1) for r in between]
    for inner in product(*between):
        yield Chain(devices, (0, *inner, stages[-1][1][1]))
    yield Chain(devices)


def allows(shape: Shape, chains: Sequence[Chain]) -> bool:
    """Whether the job allows so many pipelines of such depths and cuts."""
    if shape.pipelines not in (None, len(chains)):
        return False
    return all(
        shape.stages in (None, len(chain.devices))
        and (fixed := shape.cut(i)) in (None, chain.cut or fixed)
        for i, chain in enumerate(chains)
    )
