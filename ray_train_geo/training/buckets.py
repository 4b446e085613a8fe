"""Which weights' gradients are summed together, with whom, and in which order (pure).

The holders of a layer may hold different neighbours, when pipelines have different stage
boundaries.  So a bucket belongs to a *set of holders*, and weights go into it in the order in
which backward finishes them:

    pipeline 0:  rank 0 [0 1 2]  rank 1 [3]         holders of 0 1: {0, 2}
    pipeline 1:  rank 2 [0 1]    rank 3 [2 3]       holders of 2:   {0, 3}
                                                    holders of 3:   {1, 3}

Every rank starts its buckets from the last layer to the first.  That is one total order for all
ranks, so no two of them can wait for each other, whatever groups they share.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from ray_train_geo.model.catalog import ModelDims, parameter_shapes
from ray_train_geo.planning.plan import Plan

__all__ = ["Bucket", "depth", "holders_of", "holding_devices", "make_buckets", "packed"]

K = TypeVar("K")

_BYTES_PER_GRADIENT = 4


@dataclass(frozen=True, slots=True)
class Bucket:
    """Gradients that travel as one message.

    Args:
        holders: ranks that hold these weights, in the order of :func:`holders_of`.
        names: weights in the order of the flat buffer.
    """

    holders: tuple[int, ...]
    names: tuple[str, ...]


def depth(name: str, dims: ModelDims) -> int:
    """How deep in the model a weight lies: backward finishes the deepest first.

    The token matrix is last even where it serves as the output head, as its gradient is complete
    only when the first stage is done.
    """
    head, _, rest = name.partition(".")
    match head:
        case "tokens":
            return 0
        case "positions":
            return 1
        case "layers":
            return 2 + int(rest.partition(".")[0])
        case "norm":
            return 2 + dims.layers
        case "output":
            return 3 + dims.layers
    raise KeyError(name)


def holders_of(name: str, plan: Plan, dims: ModelDims) -> tuple[int, ...]:
    """Ranks that hold the weight ``name``, in the order of their ring.

    Ascending; for a tied token matrix first stages, then the last ones: neighbouring pipelines
    are near each other, and so the ring goes the long way along a pipeline only twice.
    """
    at = depth(name, dims)
    layer = min(max(at - 2, 0), dims.layers - 1)
    holders = plan.holders(layer)
    if at == 0 and dims.tied_embeddings:
        holders += tuple(r for r in plan.holders(dims.layers - 1) if r not in holders)
    return holders


def holding_devices(plan: Plan, dims: ModelDims) -> dict[str, list[str]]:
    """Ids of the devices that hold each weight, in the order of :func:`holders_of`."""
    return {
        name: [plan.devices[rank].id for rank in holders_of(name, plan, dims)]
        for name in parameter_shapes(dims)
    }


def make_buckets(
    sizes: Mapping[str, int],
    plan: Plan,
    dims: ModelDims,
    bucket_bytes: int,
    among: Collection[int] | None = None,
) -> list[Bucket]:
    """Pack a rank's weights (name -> elements) into buckets of at most ``bucket_bytes``.

    All ranks of a set of holders get the same buckets for it.  A weight larger than
    ``bucket_bytes`` is a bucket of its own.

    Args:
        among: the ranks that sum gradients with each other; by default all.
    """

    def holders(name: str) -> tuple[int, ...]:
        every = holders_of(name, plan, dims)
        return every if among is None else tuple(rank for rank in every if rank in among)

    names = sorted(sizes, key=lambda n: (-depth(n, dims), n))
    return [Bucket(owners, run) for owners, run in packed(names, holders, sizes, bucket_bytes)]


def packed(
    names: Iterable[str],
    key: Callable[[str], K],
    sizes: Mapping[str, int],
    limit_bytes: int,
) -> list[tuple[K, tuple[str, ...]]]:
    """Cut ``names`` where their key changes, and where a run would exceed ``limit_bytes``."""
    found = []
    for value, group in itertools.groupby(names, key):
        run: list[str] = []
        filled = 0
        for name in group:
            size = sizes[name] * _BYTES_PER_GRADIENT
            if run and filled + size > limit_bytes:
                found.append((value, tuple(run)))
                run, filled = [], 0
            run.append(name)
            filled += size
        found.append((value, tuple(run)))
    return found
