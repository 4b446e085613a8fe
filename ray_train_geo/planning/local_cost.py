"""What a step costs where sums come seldom, or late.

Under local SGD: sums inside of islands, and merges once a round.  Without it all pipelines are one
island, and nothing is merged.  With delayed sums: what of them a whole step does not hide.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ray_train_geo.planning.codecs import wire_bytes
from ray_train_geo.planning.cost import committed_s
from ray_train_geo.planning.islands import together
from ray_train_geo.planning.link_table import Floats, Ints, LinkTable
from ray_train_geo.planning.problem import Problem
from ray_train_geo.planning.sync_cost import SyncGroups, sync_groups, synced_s

__all__ = ["delayed_s", "ended_s", "step_groups"]

_FP32_BYTES = 4
_SAMPLE_ELEMENTS = 2**20


def step_groups(
    problem: Problem, chains: Sequence[Sequence[int]], cuts: Sequence[Sequence[int]]
) -> list[SyncGroups]:
    """The groups that sum gradients in every step.

    Args:
        chains: ``[pipelines][stages]``; device numbers.
        cuts: ``[pipelines][stages + 1]``; boundaries of layers.
    """
    if problem.job.local_sgd is None:
        return sync_groups(problem.dims, cuts, problem.gradient_bytes)
    return [
        SyncGroups(groups.size_bytes, _stages(chains, island)[groups.members])
        for island in _islands(problem, chains)
        for groups in sync_groups(problem.dims, [cuts[p] for p in island], problem.gradient_bytes)
    ]


def ended_s(
    problem: Problem,
    chains: Sequence[Sequence[int]],
    cuts: Sequence[Sequence[int]],
    updated_s: Floats,
) -> float:
    """How long a step takes, its commit included; under local SGD on average over a round.

    A commit that comes a step later costs only what its round trip is longer than a step.  Of the
    merges of a round, what ``delay_steps`` of each fragment do not hide is waited for.

    Args:
        updated_s: ``[stages]``, counted pipeline by pipeline; when each has its new parameters.
    """
    devices = np.array([d for chain in chains for d in chain])
    firsts = np.array([chain[0] for chain in chains for _ in chain])
    spec, table = problem.job.local_sgd, problem.table
    if spec is None:
        return committed_s(updated_s, devices, firsts, table)
    root = devices[:1]
    there, back = table.hops(devices, root)[0], table.hops(root, devices)[0]
    step_s = max(float(updated_s.max()), float(np.where(devices == root, 0.0, there + back).max()))
    hidden_s = min(spec.fragments * spec.delay_steps, spec.inner_steps) * step_s
    merged_s = spec.fragments * _merged_s(problem, chains, cuts)
    return step_s + max(0.0, merged_s - hidden_s) / spec.inner_steps


def delayed_s(
    chains: Sequence[Sequence[int]],
    done_s: Floats,
    last_start_s: Floats,
    end_s: Floats,
    update_s: Floats,
    table: LinkTable,
) -> float:
    """A step whose sums are applied at the end of the next one, in seconds.

    A step's sums must be complete when those of the next one begin (at its last backward), and its
    commit must have come round when that backward has ended.  That activations and sums are on the
    same links meanwhile is not counted.

    Args:
        done_s: ``[stages]``, counted pipeline by pipeline, as all others: when sums are complete.
        last_start_s, end_s: begin and end of the last backward.
        update_s: what an update takes.
    """
    devices = np.array([d for chain in chains for d in chain])
    root = devices[:1]
    there = np.where(devices == root, 0.0, table.hops(devices, root)[0])
    back = np.where(devices == root, 0.0, table.hops(root, devices)[0])
    return max(
        float((end_s + update_s).max()),
        float((done_s - last_start_s).max()),
        float((done_s + there).max() + (back - end_s + update_s).max()),
    )


def _merged_s(
    problem: Problem, chains: Sequence[Sequence[int]], cuts: Sequence[Sequence[int]]
) -> float:
    """One fragment's merge, in seconds: shards between the first pipelines of all islands."""
    spec = problem.job.local_sgd
    assert spec is not None
    speakers = [island[0] for island in _islands(problem, chains)]
    stages = _stages(chains, speakers)
    devices = np.array([d for chain in chains for d in chain])
    encoded = wire_bytes(spec.codec, _SAMPLE_ELEMENTS, "fp32") / (_FP32_BYTES * _SAMPLE_ELEMENTS)
    groups = [
        SyncGroups(g.size_bytes * encoded / spec.fragments, stages[g.members])
        for g in sync_groups(problem.dims, [cuts[p] for p in speakers])
    ]
    at_once = np.zeros(len(devices))
    done = synced_s(groups, "sharded_ps", devices, at_once, at_once, problem.table)
    return float(done.max())


def _islands(problem: Problem, chains: Sequence[Sequence[int]]) -> list[list[int]]:
    assert problem.job.local_sgd is not None
    region = problem.table.region
    regions = [frozenset(region[list(chain)].tolist()) for chain in chains]
    return together(regions, problem.job.local_sgd.across)


def _stages(chains: Sequence[Sequence[int]], pipelines: Sequence[int]) -> Ints:
    """Numbers of the stages of ``pipelines``, counted over all."""
    offsets = np.cumsum([0, *map(len, chains)])
    return np.concatenate([np.arange(offsets[p], offsets[p + 1]) for p in pipelines])
