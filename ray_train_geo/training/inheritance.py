"""What a stage begins a generation with: initial weights, a checkpoint, or what is in memory.

of an earlier generation of this worker     taken over as it is, not copied
in a copy here                              copied
all else                                    streamed from the peers that have it
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch

from ray_train_geo.model.stage import bare_stage, build_stage
from ray_train_geo.training.assignment import Assignment, Handover, Start
from ray_train_geo.training.buckets import holders_of, make_buckets
from ray_train_geo.training.checkpoint import read_tensors
from ray_train_geo.training.memory import Memory, Snapshot
from ray_train_geo.training.optimizer import MOMENTS
from ray_train_geo.training.outer import OUTER_MOMENTUM, OUTER_TOKENS
from ray_train_geo.training.precision import LossScale
from ray_train_geo.training.residuals import RESIDUAL, saved_residuals, spare_name
from ray_train_geo.training.state import BEHIND, StageState
from ray_train_geo.transport.state_stream import Address, Streams

__all__ = ["Inheritance", "inherit"]

_Tensors = Mapping[str, torch.Tensor]


class Inheritance(NamedTuple):
    """A stage's state at the start of a generation, after ``step`` steps.

    ``seconds`` is how long it took to get it.
    """

    state: StageState
    loss_scale: LossScale
    step: int
    seconds: float


def inherit(
    assignment: Assignment, device: torch.device, memory: Memory, streams: Streams
) -> Inheritance:
    """Build the stage of ``assignment`` on ``device``, with its state.

    A stage that is handed over also becomes what ``memory`` holds live.

    Args:
        streams: what peers give comes through; an abort ends them.

    Raises:
        CheckpointError: the checkpoint can't be read.
        TransportError: a peer does not give what it should have.
    """
    began = time.perf_counter()
    training, start = assignment.job.training, assignment.start
    scale, step = LossScale.start(training.precision, training.loss_scale), 0
    first, last = assignment.plan.stage(assignment.role).layers
    kept: _Tensors = {}
    if start is None:
        module = build_stage(
            assignment.dims, first, last, seed=training.seed, device=device,
            recompute=training.recompute,
        )  # fmt: skip
    else:
        if isinstance(start, Handover):
            kept = _own(memory.live_at(start.step), start)
        weights = {n.removeprefix("model."): t for n, t in kept.items() if n.startswith("model.")}
        module = bare_stage(
            assignment.dims, first, last, weights, device=device, recompute=training.recompute
        )
    sizes = {name: p.numel() for name, p in module.named_parameters()}
    buckets = make_buckets(
        sizes,
        assignment.plan,
        assignment.dims,
        assignment.job.parallelism.bucket_bytes,
        None if assignment.island is None else assignment.island.ranks,
    )
    state = StageState(
        module,
        training,
        buckets,
        kept,
        local_sgd=assignment.island is not None,
        feeds_back=assignment.job.codecs.feeds_back,
        delayed=bool(assignment.job.parallelism.delay_steps),
    )
    match start:
        case Handover():
            _take_over(start, state, kept, memory, streams)
            scale, step = start.loss_scale, start.step
        case Start(weights_only=True):
            _load(start, state, ("model",), updates=0)
            _level(state, {})
        case Start(manifest=manifest):
            kinds = ("model", *MOMENTS, OUTER_MOMENTUM, BEHIND)
            _load(start, state, kinds, manifest.updates)
            _level(state, manifest.checksums)
            _load_residuals(assignment, start, state)
            if training.precision == manifest.identity["precision"]:
                scale = LossScale(manifest.loss_scale, manifest.good_steps)
            step = manifest.step
    return Inheritance(state, scale, step, time.perf_counter() - began)


def _own(tensors: _Tensors, start: Handover) -> _Tensors:
    """Those that stay: what has a source is taken from there."""
    return {n: t for n, t in tensors.items() if n.partition(".")[2] not in start.sources}


def _take_over(
    start: Handover, state: StageState, kept: _Tensors, memory: Memory, streams: Streams
) -> None:
    memory.go_back(start.step)
    copies = _own(memory.copies_at(start.step), start)
    names = [n for n in state.tensors() if n not in kept and not n.startswith(RESIDUAL)]
    wanted: dict[Address, list[str]] = {}
    for name in names:
        kind, _, weight = name.partition(".")
        if name in copies or (weight in start.restarts and kind in ("model", OUTER_TOKENS)):
            continue
        wanted.setdefault(start.sources[weight], []).append(name)
    fetched = streams.fetch_all(wanted, start.step)
    found = {**copies, **fetched}
    state.load({name: found[name] for name in names if name in found}, start.updates)
    if state.outer is not None:
        state.outer.restart(sorted(start.restarts))
        state.refresh()
    # With what earlier stages of this worker held: peers may still fetch that.
    live = memory.live_at(start.step)
    residuals = _residuals(live or memory.copies_at(start.step))
    tensors = {**live, **state.tensors(), **residuals}
    memory.hold(Snapshot(start.step, start.updates, start.loss_scale, tensors))
    if state.residuals is not None:
        state.residuals.keep(residuals)
        for inherited in _bequeathed(start, streams):
            state.residuals.inherit(inherited)


def _residuals(tensors: _Tensors) -> _Tensors:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(RESIDUAL)}


def _bequeathed(start: Handover, streams: Streams) -> Iterator[_Tensors]:
    """Residuals of workers that give layers up or are gone, one of each weight at a time."""
    for turn in range(max(map(len, start.bequests.values()), default=0)):
        wanted: dict[Address, list[str]] = {}
        named: dict[str, str] = {}
        for name, bequests in start.bequests.items():
            if turn < len(bequests):
                giver, owner = bequests[turn]
                there = RESIDUAL + name if owner is None else spare_name(name, owner)
                wanted.setdefault(giver, []).append(there)
                named[there] = RESIDUAL + name
        found = streams.fetch_all(wanted, start.step)
        yield {named[there]: tensor for there, tensor in found.items()}


def _load_residuals(assignment: Assignment, start: Start, state: StageState) -> None:
    """Those of the checkpoint are dealt out to the holders of now: under its plan as they were."""
    if state.residuals is None:
        return
    for name, saved in saved_residuals(start.manifest.checksums).items():
        weight = state.weights.get(name.removeprefix(RESIDUAL))
        if weight is None:
            continue
        holders = holders_of(name.removeprefix(RESIDUAL), assignment.plan, assignment.dims)
        mine = saved[holders.index(assignment.rank) :: len(holders)]
        host = {one: torch.empty(weight.shape) for one in mine}
        read_tensors(start.location, start.manifest, host)
        for tensor in host.values():
            state.residuals.keep({name: tensor})


def _load(start: Start, state: StageState, kinds: tuple[str, ...], updates: int) -> None:
    """What only some checkpoints have is not asked of the others: outer momentum, for one."""
    names = {
        n: t
        for n, t in state.tensors().items()
        if (kind := n.partition(".")[0]) in kinds
        and (kind not in (OUTER_MOMENTUM, BEHIND) or n in start.manifest.checksums)
    }
    # One tensor's host copy at a time would reread the files; a stage's state fits the host.
    host = {n: torch.empty_like(t, device="cpu") for n, t in names.items()}
    read_tensors(start.location, start.manifest, host)
    state.load(host, updates)
    if state.outer is not None:
        state.outer.rebase()


def _level(state: StageState, saved: Collection[str]) -> None:
    """Sums with a delay begin at the weights themselves, if none are ``saved`` for that."""
    for name, behind in (state.behind or {}).items():
        if f"{BEHIND}.{name}" not in saved:
            behind.copy_(state.weights[name].detach())
