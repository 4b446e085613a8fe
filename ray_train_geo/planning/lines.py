"""Devices in a line, near ones next to each other, cut into islands: many ways to do so.

Islands are regions, or regions that are near each other, up to all devices together; inside an
island, devices stand by region, fastest first, node by node, or with equal devices together.
Slow, expensive or far devices may be left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from ray_train_geo.planning.geography import distances_s, islands, walk
from ray_train_geo.planning.problem import Problem

__all__ = ["Line", "lines"]

Line = tuple[tuple[int, ...], ...]
"""Islands of device numbers."""

_LEFT_OUT = 4
"""How many of the slowest kinds of devices, or of the smallest islands, may be left out."""

_DEVICES = 200_000
"""Devices in all lines together: 3,000 lines of 64 devices, 20 of 10,000."""


def lines(problem: Problem, usable: Sequence[int], most: int | None) -> Iterator[Line]:
    """Distinct lines of ``usable`` devices, of at most ``most`` of them, simplest first."""
    seen: set[Line] = set()
    left = max(_DEVICES, 8 * len(usable))
    for line in _all_lines(problem, usable, most):
        if not line or line in seen:
            continue
        seen.add(line)
        yield line
        left -= sum(map(len, line))
        if left <= 0:
            return


def _all_lines(problem: Problem, usable: Sequence[int], most: int | None) -> Iterator[Line]:
    devices, region = problem.topology.devices, problem.table.region.tolist()
    away = distances_s(problem)
    path = walk(away)
    order = _nearness(problem, usable)
    for subset in _subsets(problem, usable, most, order):
        inside: dict[int, list[int]] = {}
        for d in sorted(subset, key=order.__getitem__):
            inside.setdefault(region[d], []).append(d)
        mixed = len({problem.kinds[d] for d in subset}) > 1
        for partition in islands(away, path):
            parts = [[d for r in part for d in inside.get(r, ())] for part in partition]
            parts = [p for p in parts if p]
            yield tuple(tuple(p) for p in parts)
            if mixed:  # the same islands, but equal devices together
                by_kind = [sorted(p, key=lambda d: -_worth(problem, d)) for p in parts]
                yield tuple(tuple(p) for p in by_kind)
                yield tuple(run for p in by_kind for run in _runs(problem, p))
            largest = sorted(parts, key=lambda p: -sum(devices[d].flops_per_s for d in p))
            for count in range(1, min(len(parts), _LEFT_OUT)):
                yield tuple(tuple(p) for p in largest[:count])
                yield (tuple(d for p in largest[:count] for d in p),)


def _worth(problem: Problem, device: int) -> float:
    """What a device is worth: its speed, or its speed per dollar."""
    found = problem.topology.devices[device]
    if problem.options.objective == "dollars" and found.price_per_hour > 0:
        return found.flops_per_s / found.price_per_hour
    return found.flops_per_s


def _nearness(problem: Problem, usable: Sequence[int]) -> dict[int, int]:
    """Places of devices within their regions: the most worth first, large nodes first."""
    devices = problem.topology.devices
    on_node: dict[str, int] = {}
    for d in usable:
        on_node[devices[d].node] = on_node.get(devices[d].node, 0) + 1

    def key(d: int) -> tuple[float, int, str, int]:
        return -_worth(problem, d), -on_node[devices[d].node], devices[d].node, d

    return {d: place for place, d in enumerate(sorted(usable, key=key))}


def _subsets(
    problem: Problem, usable: Sequence[int], most: int | None, order: dict[int, int]
) -> Iterator[Sequence[int]]:
    """All devices, what the job's limits leave of them, and all but the slowest kinds."""
    devices, budget = problem.topology.devices, problem.options.max_dollars_per_hour
    by_worth = sorted(usable, key=order.__getitem__)
    if budget is not None:
        per_dollar = sorted(
            by_worth,
            key=lambda d: -devices[d].flops_per_s / max(devices[d].price_per_hour, 1e-9),
        )
        totals = accumulate(devices[d].price_per_hour for d in per_dollar)
        yield per_dollar[: sum(total <= budget for total in totals)]
    if most is not None and most < len(usable):
        yield by_worth[:most]
    yield usable
    worths = sorted({_worth(problem, d) for d in usable}, reverse=True)
    for least in worths[:-1][: -_LEFT_OUT - 1 : -1]:
        yield [d for d in usable if _worth(problem, d) >= least]


def _runs(problem: Problem, part: Sequence[int]) -> list[tuple[int, ...]]:
    """Runs of devices of one kind."""
    runs: list[list[int]] = []
    for d in part:
        if runs and problem.kinds[runs[-1][0]] == problem.kinds[d]:
            runs[-1].append(d)
        else:
            runs.append([d])
    return [tuple(r) for r in runs]
