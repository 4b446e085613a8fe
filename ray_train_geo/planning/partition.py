"""Where to cut a model into stages.

Boundaries of ``s`` stages are ``s + 1`` layer ids: stage ``i`` holds ``boundaries[i]`` up to, not
including, ``boundaries[i + 1]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["even", "weighted"]

_SLACK = 1e-9
"""Stages that differ by less (relative) count as equally slow: sums round."""


def even(layers: int, stages: int) -> tuple[int, ...]:
    """As even as can be; the first stages take what is left over.

    Raises:
        ValueError: not one layer for each stage.
    """
    if not 1 <= stages <= layers:
        raise ValueError(f"can't cut {layers} layers into {stages} stages of at least one layer")
    share, more = divmod(layers, stages)
    return tuple(s * share + min(s, more) for s in range(stages + 1))


def weighted(
    layer_costs: Sequence[float],
    speeds: Sequence[float],
    max_layers: Sequence[int] | None = None,
) -> tuple[int, ...] | None:
    """Boundaries that make the slowest stage as fast as can be, and among those the evenest.

    Dynamic programming over (stage, boundary), O(stages * layers^2), run twice: first for the
    smallest possible maximum of ``cost / speed``, then, among the cuts that reach it, for the
    smallest sum of squared layer counts (ties: longer stages first, as :func:`even`).

    Args:
        layer_costs: ``[layers]``; work of each layer, with the embedding's on the first and the
            head's on the last.
        speeds: ``[stages]``; work per second of each stage's device.
        max_layers: ``[stages]``; how many layers each stage has memory for.

    Returns:
        ``stages + 1`` layer ids, or None if no cut obeys ``max_layers`` with a layer a stage.
    """
    layers, stages = len(layer_costs), len(speeds)
    prefix = np.concatenate([[0.0], np.cumsum(np.asarray(layer_costs, dtype=float))])
    count = np.arange(layers + 1)[None, :] - np.arange(layers + 1)[:, None]  # [from, to]
    cost = np.where(count >= 1, prefix[None, :] - prefix[:, None], np.inf)

    times = []
    for s in range(stages):
        allowed = count <= (layers if max_layers is None else max_layers[s])
        times.append(np.where(allowed, cost / speeds[s], np.inf))

    slowest = np.full(layers + 1, np.inf)
    slowest[0] = 0.0
    for time in times:
        slowest = np.maximum(slowest[:, None], time).min(axis=0)
    if not np.isfinite(slowest[layers]):
        return None

    limit = slowest[layers] * (1 + _SLACK)
    unevenness = np.full(layers + 1, np.inf)
    unevenness[0] = 0.0
    cut_from = []
    for time in times:
        total = np.where(time <= limit, unevenness[:, None] + count**2, np.inf)
        # The last of equal minima: the shortest stage here, the longer ones before it.
        cut_from.append(layers - np.argmin(total[::-1], axis=0))
        unevenness = total.min(axis=0)

    boundaries = [layers]
    for origin in reversed(cut_from):
        boundaries.append(int(origin[boundaries[-1]]))
    return tuple(reversed(boundaries))
