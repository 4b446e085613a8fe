"""How many layers a device can take if a pipeline is to be done in time.

With ``m`` microbatches, a stage of ``k`` layers behind ``l`` others, forward ``f`` and backward
``b`` of a layer, ``w = f + b``, and hops of ``h`` down and up, no schedule is done before each of

- the stage's last backward has ended, the stages above have run theirs, and the first stage,
  which ends last, is synchronised and updated: ``l w' + hops h + m k w + exposed``;
- the stage is updated: ``l f' + m k w + optimizer k``;
- its own gradients, which start with its last backward, are synchronised:
  ``l f' + m k w - k b + sync(k) + optimizer k``;
- all gradients of the layers above, which start no sooner, have passed a cut between regions, if
  all layers must: ``l f' + m k w - k b + (l + k) cut + optimizer k``

where ``f'``, ``w'`` are the fastest device's, and there are at least ``l / most`` hops above.
Where weight gradients may be computed apart, that may be after a stage's last message: then the
first of these is not asked, and the last one for the stage's own layers alone.  Each is linear in
``k``, so that each gives the most layers in closed form.

And what a stage holds of a microbatch, from its forward to its backward, it holds for a round trip
through all that is below.  So ``h`` microbatches at a time, for which there is memory beside the
layers, are at most ``h / round trip`` a second (Little's law)::

    h >= m ((L - l) w' + hops below h) / (T - l w' - hops above h - exposed)
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
from ray_train_geo.planning.certify_nics import node_share
from ray_train_geo.planning.certify_sync import GroupFloor
from ray_train_geo.planning.link_table import Floats, Ints
from ray_train_geo.planning.problem import Problem
from ray_train_geo.spec import GradientSyncName

__all__ = ["Tail", "chains_in_time"]

Bools = NDArray[np.bool_]

_SLACK = 1e-9
_MANY = 1 << 40
_MOST_HELD = 64
"""Microbatches that are told apart in a stage's memory."""


@dataclass(frozen=True, slots=True)
class Tail:
    """What comes after the backwards of every plan that is looked at.

    Args:
        groups: of the layers' gradients.
        beyond: of the layers of devices that no cheaper group can be with.
        tied_s: of a tied token matrix, on first and last stages; 0 without one.
        tied_nic_s: that some NIC is busy with it and with the first layer.
        hop_s: of the cheapest hop: (down, down and up).
        mode: of gradient sync; None: nothing is summed.
        members, tied_members: fewest of a layer's group, and of the tied token matrix's.
        message_bytes: of the smallest message between stages.
        cut_s: of every layer's sync over one cut between regions; 0: perhaps not all cross it.
    """

    groups: GroupFloor
    beyond: GroupFloor
    tied_s: float
    tied_nic_s: float
    hop_s: tuple[float, float]
    mode: GradientSyncName | None
    members: int
    tied_members: int
    message_bytes: float
    cut_s: float = 0.0


def chains_in_time(
    problem: Problem,
    classes: DeviceClasses,
    time_s: Floats,
    microbatches: Ints,
    tail: Tail,
    *,
    first_layers: tuple[Ints, Ints] | None = None,
    allowed: Bools | None = None,
    beyond: Bools | None = None,
    lasting: bool = False,
) -> Chains:
    """Chains that can do ``microbatches[i]`` and have stepped by ``time_s[i]`` as far as one sees.

    Args:
        time_s, microbatches: ``[n]``.
        first_layers: ``[n]`` each; fewest and most of a first stage.
        allowed: ``[n, classes]``; devices that may be used at all.
        beyond: ``[classes]``; whose layers' groups take ``tail.beyond``.
        lasting: only limits for which the least time of a chain divided by ``m`` does not grow
            with ``m``: GPipe's memory does not count, nor what runs beside the last backward.
    """
    layers = problem.dims.layers
    above = np.arange(layers)[None, :, None]
    left_s = time_s[:, None, None]
    many = microbatches[:, None, None]
    alone = classes.most_layers(problem, 1, tail.members)
    fastest = classes.layer_s[classes.layer_s.sum(axis=1).argmin()]
    far = np.zeros(len(classes.count), dtype=bool) if beyond is None else beyond
    first, inner, last, only = (
        _Stage.of(problem, classes, tail, far, first, last)
        for first, last in ((True, False), (False, False), (False, True), (True, True))
    )

    longest = np.floor(left_s / (many * inner.work_s[1]) * (1 + _SLACK) + _SLACK)
    longest = np.minimum(longest, np.maximum(alone[0], alone[1]))
    longest = np.clip(longest.max(axis=2), 1, layers)
    longest = longest.astype(np.int64)[:, :, None]
    hops = np.ceil(above / longest)
    down_s = above * fastest[0] + hops * tail.hop_s[0]
    round_s = down_s if problem.may_split else above * fastest.sum() + hops * tail.hop_s[1]
    fewest, highest = np.ones_like(longest), longest
    if first_layers is not None:
        fewest = np.minimum(first_layers[0][:, None, None], longest)
        highest = np.minimum(first_layers[1][:, None, None], longest)
    exposed_s = first.exposed_s(fewest, highest) * (not problem.may_split)

    # A backward without W is no shorter than a forward.
    backward = fastest[0] if problem.may_split else fastest[1]
    below_s = (layers - above) * (fastest[0] + backward) + 2 * classes.head_s[:, 0].min()
    below_s = below_s + (np.ceil((layers - above) / longest) - 1) * tail.hop_s[1]
    held = _held(problem, many, below_s, left_s - round_s - exposed_s, lasting)
    memory = _memory(problem, classes, held, tail.members, lasting)

    # All messages to a node of one device pass its NIC, of inner stages from both sides.
    above_cut_s: Floats = np.multiply(tail.cut_s, above) * (not problem.may_split)
    single = np.where(classes.node_size == 1, classes.nic_seconds_per_byte[:, 0], 0.0)
    crossing_s = many * tail.message_bytes * single

    def most(stage: _Stage, behind: slice, memory: Ints, exposed_s: Floats, sides: int) -> Ints:
        found = stage.most_layers(
            many,
            left_s - round_s[:, behind] - exposed_s,
            left_s - down_s[:, behind],
            above_cut_s[:, behind],
            lasting,
        )
        found = np.minimum(found, memory)
        found = np.where(sides * crossing_s <= left_s * (1 + _SLACK), found, 0)
        return found if allowed is None else np.where(allowed[:, None, :], found, 0)

    nothing, anywhere = slice(0, 1), slice(None)
    tables = (
        np.minimum(most(first, nothing, memory[0], exposed_s, 1), highest),
        most(inner, anywhere, memory[1], exposed_s, 2),
        most(last, anywhere, memory[2], exposed_s, 1),
        most(only, nothing, memory[3], np.zeros((1, 1, 1)), 0),
    )
    return _as_the_job_says(problem, tables)


def _held(problem: Problem, many: Ints, below_s: Floats, left_s: Floats, lasting: bool) -> Ints:
    """``[n, layers above, 1]``; microbatches that a stage holds at a time at least, up to a limit.

    Args:
        many: microbatches of the pipeline.
        below_s: from the begin of a forward to the end of its backward.
        left_s: from a stage's first forward to its last backward.
    """
    if problem.gpipe and not lasting:
        held = 2.0 ** np.floor(np.log2(many)) + 0 * below_s  # all: few different numbers suffice
    else:
        held = np.ceil(many * below_s / np.maximum(left_s, below_s) * (1 - _SLACK) - _SLACK)
        held = np.clip(held, 1, np.minimum(many, _MOST_HELD))
    return held[:, :, 0].astype(np.int64)


def _memory(
    problem: Problem, classes: DeviceClasses, held: Ints, pipelines: int, lasting: bool
) -> tuple[Ints, Ints, Ints, Ints]:
    """``[n, layers above or 1, classes]`` each: layers of a first, inner, last, and only stage.

    Args:
        held: ``[n, layers above]``; microbatches on any stage but the last, which holds one.
    """
    last_holds = held[:, :1] if problem.gpipe and not lasting else np.ones_like(held[:, :1])
    counts, which = np.unique(np.concatenate([held, last_holds], axis=1), return_inverse=True)
    which = which.reshape(len(held), -1)
    tables = [classes.most_layers(problem, int(h), pipelines) for h in counts]
    first, inner, last, only = (np.stack([table[i] for table in tables]) for i in range(4))
    return first[which[:, :1]], inner[which[:, :-1]], last[which[:, -1:]], only[which[:, -1:]]


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
    """What a stage takes, ``[classes]``: (without any layer, for each layer).

    Args:
        tied_nic_s: that some NIC is busy with a tied token matrix and the first layer.
    """

    work_s: tuple[Floats, Floats]
    backward_s: tuple[Floats, Floats]
    optimizer_s: tuple[Floats, Floats]
    sync_s: tuple[Floats, Floats]
    nic_s: tuple[Floats, Floats]
    cut_s: tuple[Floats, Floats]
    tied_nic_s: float

    @classmethod
    def of(
        cls,
        problem: Problem,
        classes: DeviceClasses,
        tail: Tail,
        beyond: Bools,
        first: bool,
        last: bool,
    ) -> _Stage:
        dims, groups, far = problem.dims, tail.groups, tail.beyond
        layer = layer_parameters(dims)
        tokens = dims.vocab_size * dims.dim if dims.tied_embeddings else 0
        extra = first * (embedding_parameters(dims) - tokens) + last * head_parameters(dims)
        ends = first * classes.embedding_s + last * classes.head_s
        shares_tokens = first != last  # with the other end of its own pipeline, if nobody else
        latency_s = np.where(beyond, far.latency_s, groups.latency_s)
        per_byte = np.where(beyond, far.seconds_per_byte, groups.seconds_per_byte)
        per_parameter = problem.gradient_bytes * per_byte
        share, tied_share = _nic_seconds_per_byte(classes, tail)
        none = np.zeros(len(classes.count))
        return cls(
            work_s=(ends.sum(axis=1), classes.layer_s.sum(axis=1)),
            backward_s=(ends[:, 1], classes.layer_s[:, 1]),
            optimizer_s=(
                classes.optimizer_s * (extra + tokens * (first or last)),
                classes.optimizer_s * layer,
            ),
            sync_s=(
                latency_s + per_parameter * extra + shares_tokens * tail.tied_s,
                per_parameter * layer,
            ),
            nic_s=(
                problem.gradient_bytes * (share * extra + shares_tokens * tied_share * tokens),
                problem.gradient_bytes * share * layer,
            ),
            cut_s=(none, none + tail.cut_s),
            tied_nic_s=shares_tokens * tail.tied_nic_s,
        )

    def most_layers(
        self, many: Ints, round_left_s: Floats, down_left_s: Floats, cut_s: Floats, lasting: bool
    ) -> Ints:
        """Most layers by each of the module's limits; ``[n, layers above, classes]``.

        Args:
            cut_s: that the layers above need of a cut, once this stage's last backward begins.
        """
        found: Floats = (round_left_s - many * self.work_s[0]) / (many * self.work_s[1])
        after = [(self.optimizer_s, down_left_s)]
        if not lasting:
            after += [(self._after_backward(s), down_left_s) for s in (self.sync_s, self.nic_s)]
            after.append((self._after_backward(self.cut_s), down_left_s - cut_s))
        for (constant, per_layer), left_s in after:
            room_s = left_s - many * self.work_s[0] - constant
            found = np.minimum(found, room_s / (many * self.work_s[1] + per_layer))
        whole: Ints = np.clip(np.floor(found * (1 + _SLACK) + _SLACK), 0, _MANY).astype(np.int64)
        return whole

    def exposed_s(self, fewest: Floats, highest: Floats) -> Floats:
        """``[n, 1, 1]``; the least that comes after the last backward, of so many layers."""
        backward_s = self.backward_s
        ends = [(self.optimizer_s[0], self.optimizer_s[1])]
        ends += [self._after_backward(s) for s in (self.sync_s, self.nic_s)]
        ends.append((self.tied_nic_s - backward_s[0], -backward_s[1]))
        least = np.zeros(1)
        for constant, per_layer in ends:
            either = np.minimum(constant + per_layer * fewest, constant + per_layer * highest)
            least = np.maximum(least, either)
        found: Floats = least.min(axis=2, keepdims=True)
        return found

    def _after_backward(self, sync: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
        """Sync and update, less the last backward that they start with."""
        constant, per_layer = (sync[i] - self.backward_s[i] + self.optimizer_s[i] for i in range(2))
        return constant, per_layer


def _nic_seconds_per_byte(classes: DeviceClasses, tail: Tail) -> tuple[Floats, Floats]:
    """``[classes]``; NIC seconds for a byte of a layer's gradients, and of the tied tokens'."""
    if tail.mode is None:
        return np.zeros(len(classes.count)), np.zeros(len(classes.count))
    nic = classes.nic_seconds_per_byte[:, 1 if tail.mode == "central_ps" else 0]
    return (
        nic * node_share(tail.mode, tail.members, classes.node_size),
        nic * node_share(tail.mode, tail.tied_members, classes.node_size),
    )
