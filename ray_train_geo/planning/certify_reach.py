"""Which sites one pipeline can be on: a hop carries every microbatch, so slow hops join few.

The more microbatches a pipeline does, the faster its hops must be.  At every speed, sites fall
apart into islands that hops of that speed join, and the pipeline is on one of them::

    m small:   (ohio -- virginia -- tokyo -- seoul)
    m larger:  (ohio -- virginia) (tokyo -- seoul)
    m large:   (ohio) (virginia) (tokyo) (seoul)

Islands with the same devices are one kind, and all of a kind are one island: by symmetry that
loses nothing but who stands where.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ray_train_geo.planning.link_table import Floats, Ints

__all__ = ["Reach"]

Bools = NDArray[np.bool_]

_MOST_KINDS = 6
"""Where there are more kinds of islands at a speed (links are noisy), all are one."""


class Reach:
    """Kinds of islands by the time that a message may take.

    Args:
        merges: as :func:`~ray_train_geo.planning.certify_sync.components` gives them, of the time
            of a message.
        makeup: ``[sites]``; equal numbers for sites with equal devices.
        meet: sites of which every pipeline passes one.
        least_s: a message takes over some hop of every pipeline.
    """

    def __init__(
        self,
        merges: Sequence[tuple[float, Ints]],
        makeup: Sequence[int],
        meet: Sequence[bool],
        least_s: float = 0.0,
    ) -> None:
        self._least_s = least_s
        self._costs = np.array([cost for cost, _ in merges])
        alone = np.arange(len(makeup))
        self._kinds = [
            _kinds(labels, makeup, np.array(meet))
            for labels in (alone, *(labels for _, labels in merges))
        ]

    def islands(self, message_s: Floats) -> tuple[Ints, Bools]:
        """For each of ``n`` pipelines all kinds of islands that it can be on.

        Args:
            message_s: ``[n]``; most that a message may take over any hop.

        Returns:
            ``[q]``, numbers of pipelines, ascending; and ``[q, sites]``, those of one kind.
        """
        fast = message_s * (1 + 1e-9)
        asked = np.flatnonzero(fast >= self._least_s)
        level = np.searchsorted(self._costs, fast[asked], side="right")
        kinds = [self._kinds[at] for at in level]
        number = np.repeat(asked, [len(k) for k in kinds])
        none = np.zeros((0, self._kinds[0].shape[1]), dtype=bool)
        return number, np.concatenate([none, *kinds])


def _kinds(labels: Ints, makeup: Sequence[int], meet: Bools) -> Bools:
    """``[kinds, sites]``; the islands that pass ``meet``, by the devices that they have."""
    found: dict[tuple[int, ...], Bools] = {}
    for label in np.unique(labels):
        island = labels == label
        if (island & meet).any():
            kind = tuple(sorted(makeup[site] for site in np.flatnonzero(island).tolist()))
            found[kind] = found.get(kind, np.zeros(len(labels), dtype=bool)) | island
    together: Bools = np.array(list(found.values()), dtype=bool).reshape(-1, len(labels))
    if len(found) > _MOST_KINDS:
        together = np.logical_or.reduce(together, axis=0)[None, :]
    return together
