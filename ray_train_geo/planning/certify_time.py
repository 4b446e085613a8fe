"""How many layers a device can take if a pipeline is to be done in time.

With ``m`` microbatches, a stage of ``k`` layers behind ``l`` others, forward ``f`` and backward
``b`` of a layer, ``w = f + b``, and hops of ``h`` down and up, no schedule is done before each of

- the stage's last backward has ended, the stages above have run theirs, and the first stage,
  which ends last, is synchronised and updated: ``l w' + hops h + m k w + exposed``;
- the stage is updated: ``l f' + m k w + optimizer k``;
- its own gradients, which start with its last backward, are synchronised:
  ``l f' + m k w - k b + sync(k) + optimizer k``

where ``f'``, ``w'`` are the fastest device's, and there are at least ``l / most`` hops above.
Each is linear in ``k``, so that each gives the most layers in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ray_train_geo.model.catalog import (
    embedding_parameters,
    head_parameters,
    layer_parameters,
)
from ray_train_geo.planning.certify_chains import Chains, DeviceClasses
from ray_train_geo.planning.certify_sync import GroupFloor
from ray_train_geo.planning.link_table import Floats, Ints
from ray_train_geo.planning.problem import Problem

__all__ = ["Tail", "chains_in_time"]

Bools = NDArray[np.bool_]

_GRADIENT_BYTES = 4
_SLACK = 1e-9
_MANY = 1 << 40


@dataclass(frozen=True, slots=True)
class Tail:
    """What comes after the backwards of every plan that is looked at.

    Args:
        groups: of the layers' gradients.
        tied_s, tied_nic_share: of a tied token matrix, on first and last stages; 0 without one.
        commit_s: the round of scalars at the end.
        hop_s: of the cheapest hop: (down, down and up).
    """

    groups: GroupFloor
    tied_s: float
    tied_nic_share: float
    commit_s: float
    hop_s: tuple[float, float]


def chains_in_time(
    problem: Problem,
    classes: DeviceClasses,
    time_s: Floats,
    microbatches: Ints,
    tail: Tail,
    *,
    allowed: Bools | None = None,
    lasting: bool = False,
) -> Chains:
    """Chains that can do ``microbatches[i]`` and have stepped by ``time_s[i]`` as far as one sees.

    Args:
        time_s, microbatches: ``[n]``.
        allowed: ``[n, classes]``; devices that may be used at all.
        lasting: only limits for which the least time of a chain divided by ``m`` does not grow
            with ``m``: GPipe's memory does not count, nor what runs beside the last backward.
    """
    layers = problem.dims.layers
    above = np.arange(layers)[None, :, None]
    left_s = (time_s - tail.commit_s)[:, None, None]
    many = microbatches[:, None, None]
    memory = _memory(problem, classes, None if lasting or not problem.gpipe else microbatches)
    fastest = classes.layer_s[classes.layer_s.sum(axis=1).argmin()]
    first, inner, last, only = (
        _Stage.of(problem, classes, tail, first, last)
        for first, last in ((True, False), (False, False), (False, True), (True, True))
    )

    fits = np.maximum(memory[0], memory[1])
    longest = np.floor(left_s / (many * inner.work_s[1]) * (1 + _SLACK) + _SLACK)
    longest = np.clip(np.minimum(longest, fits[:, None, :]).max(axis=2), 1, layers)[:, :, None]
    hops = np.ceil(above / longest)
    down_s = above * fastest[0] + hops * tail.hop_s[0]
    round_s = above * fastest.sum() + hops * tail.hop_s[1]
    exposed_s = first.exposed_s(longest)

    def most(stage: _Stage, behind: slice, memory: Ints, exposed_s: Floats) -> Ints:
        found = stage.most_layers(
            many, left_s - round_s[:, behind] - exposed_s, left_s - down_s[:, behind], lasting
        )
        found = np.minimum(found, memory[:, None, :])
        return found if allowed is None else np.where(allowed[:, None, :], found, 0)

    nothing, anywhere = slice(0, 1), slice(None)
    tables = (
        most(first, nothing, memory[0], exposed_s),
        most(inner, anywhere, memory[1], exposed_s),
        most(last, anywhere, memory[2], exposed_s),
        most(only, nothing, memory[3], np.zeros((1, 1, 1))),
    )
    return _as_the_job_says(problem, tables)


def _memory(
    problem: Problem, classes: DeviceClasses, microbatches: Ints | None
) -> tuple[Ints, Ints, Ints, Ints]:
    """``[n or 1, classes]`` each; for one microbatch or all (a power of two of them) at once."""
    if microbatches is None:
        first, inner, last, only = classes.most_layers(problem, 1)
        return first[None], inner[None], last[None], only[None]
    held = 2 ** np.floor(np.log2(microbatches)).astype(np.int64)
    known = {int(h): classes.most_layers(problem, int(h)) for h in np.unique(held)}
    first, inner, last, only = (np.stack([known[int(h)][i] for h in held]) for i in range(4))
    return first, inner, last, only


def _as_the_job_says(problem: Problem, tables: tuple[Ints, Ints, Ints, Ints]) -> Chains:
    """With the depth, or the boundaries, that the job fixes for all pipelines."""
    first, inner, last, only = tables
    layers, cuts = problem.dims.layers, problem.job.stage_boundaries()
    depth = problem.job.parallelism.stages
    if cuts is not None and len(cuts) == 1:
        depth = len(cuts[0]) - 1
        runs = np.zeros(layers, dtype=np.int64)
        for a, b in pairwise(cuts[0]):
            runs[a] = b - a
        exactly = runs[None, :, None]
        first = np.where(first >= exactly[:, :1], exactly[:, :1], 0)
        inner = np.where(inner >= exactly, exactly, 0)
        final = (exactly > 0) & (np.arange(layers)[None, :, None] + exactly == layers)
        last = np.where(final, last, 0)
    return Chains(layers, first[:, 0], inner, last, only[:, 0], depth)


@dataclass(frozen=True, slots=True, eq=False)
class _Stage:
    """What a stage takes, ``[classes]``: (without any layer, for each layer)."""

    work_s: tuple[Floats, Floats]
    backward_s: tuple[Floats, Floats]
    optimizer_s: tuple[Floats, Floats]
    sync_s: tuple[Floats, Floats]
    nic_s: tuple[Floats, Floats]

    @classmethod
    def of(
        cls, problem: Problem, classes: DeviceClasses, tail: Tail, first: bool, last: bool
    ) -> _Stage:
        dims, groups = problem.dims, tail.groups
        layer = layer_parameters(dims)
        tokens = dims.vocab_size * dims.dim if dims.tied_embeddings else 0
        extra = first * (embedding_parameters(dims) - tokens) + last * head_parameters(dims)
        ends = first * classes.embedding_s + last * classes.head_s
        shares_tokens = first != last  # with the other end of its own pipeline, if nobody else
        per_parameter = _GRADIENT_BYTES * groups.seconds_per_byte
        alone = _GRADIENT_BYTES * classes.nic_seconds_per_byte
        none = np.zeros(len(classes.count))
        return cls(
            work_s=(ends.sum(axis=1), classes.layer_s.sum(axis=1)),
            backward_s=(ends[:, 1], classes.layer_s[:, 1]),
            optimizer_s=(
                classes.optimizer_s * (extra + tokens * (first or last)),
                classes.optimizer_s * layer,
            ),
            sync_s=(
                none + groups.latency_s + per_parameter * extra + shares_tokens * tail.tied_s,
                none + per_parameter * layer,
            ),
            nic_s=(
                alone * (groups.nic_share * extra + shares_tokens * tail.tied_nic_share * tokens),
                alone * groups.nic_share * layer,
            ),
        )

    def most_layers(
        self, many: Ints, round_left_s: Floats, down_left_s: Floats, lasting: bool
    ) -> Ints:
        """Most layers by each of the module's limits; ``[n, layers above, classes]``."""
        found: Floats = (round_left_s - many * self.work_s[0]) / (many * self.work_s[1])
        after = [self.optimizer_s]
        if not lasting:
            after += [self._after_backward(self.sync_s), self._after_backward(self.nic_s)]
        for constant, per_layer in after:
            room_s = down_left_s - many * self.work_s[0] - constant
            found = np.minimum(found, room_s / (many * self.work_s[1] + per_layer))
        whole: Ints = np.clip(np.floor(found * (1 + _SLACK) + _SLACK), 0, _MANY).astype(np.int64)
        return whole

    def exposed_s(self, longest: Floats) -> Floats:
        """``[n, 1, 1]``; the least that comes after the last backward, of 1 to so many layers."""
        update = self.optimizer_s[0] + self.optimizer_s[1]
        least = np.broadcast_to(update, (len(longest), 1, len(update)))
        for sync in (self.sync_s, self.nic_s):
            constant, per_layer = self._after_backward(sync)
            ends = constant + per_layer, constant + per_layer * longest
            least = np.maximum(least, np.minimum(*ends))
        found: Floats = least.min(axis=2, keepdims=True)
        return found

    def _after_backward(self, sync: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
        """Sync and update, less the last backward that they start with."""
        constant, per_layer = (sync[i] - self.backward_s[i] + self.optimizer_s[i] for i in range(2))
        return constant, per_layer
