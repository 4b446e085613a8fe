"""One pipeline's cost in closed form: fast enough to be asked thousands of times in a search.

A pipeline can't be faster than any of its parts.  With M microbatches,
forward ``F`` and backward ``B`` of each stage, and hops of ``x + l`` down and ``y + m`` up (time
to put a message on the wire, and latency)::

    stage s busy all the time     sum_above(F + x + l) + M (F_s + B_s) + sum_above(B + y + m)
                                  + what its warmup leaves idle (`planning.warmup`)
    hop s full all the time       W + (M - 1) max(x_s, y_s),  W: one microbatch down and up
    turns of stages s < t         sum_above(all) + R + (M - 1 - warmup_t) P: a microbatch from s to
                                  t and back takes R = (warmup_s - warmup_t + 1) P

1F1B with enough warmup reaches the largest of these within a few per cent (the event engine
checks what is chosen); each is a line in M.  GPipe is a forward phase and then a backward phase.
Under zero-bubble a backward that others wait for is B alone, a stage is busy with W, too, and those
that it puts off take the place of the last sum.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ray_train_geo.planning.codecs import codec_s, wire_bytes
from ray_train_geo.planning.cost import memory_bytes_per_s, optimizer_s
from ray_train_geo.planning.memory import stage_parameters
from ray_train_geo.planning.microbatches import makespan_s
from ray_train_geo.planning.problem import Problem
from ray_train_geo.planning.warmup import StageTimes, choose_warmup
from ray_train_geo.schedule.timeline import Hop
from ray_train_geo.schedule.zero_bubble import deferred_weights
from ray_train_geo.spec import ScheduleName

__all__ = [
    "PipelineCost",
    "balanced_cut",
    "choose_deferred",
    "codecs_for",
    "cut_for",
    "hop_and_stage_times",
    "message_sizes",
    "pipeline_cost",
    "stage_times",
]

_AMPLE = 0.5
"""A hop that is busy less than this part of the period gets no codec."""


@dataclass(frozen=True, slots=True)
class PipelineCost:
    """A pipeline that fits its devices, and what it takes.

    Args:
        devices: ``[stages]``; numbers in the problem's link table.
        cut: ``[stages + 1]``; layers.
        codecs, message_bytes: ``[stages - 1]``; of each hop.
        warmup, deferred: ``[stages]``.
        times: of one microbatch, codecs included.
        lines: the makespan, as ``microbatches.makespan_s`` reads it.
        tail_s: ``[stages]``; from the end of a stage's last action to the end of all.
        round_s: one microbatch alone, down and up.
        update_s: ``[stages]``; the optimizer's.
        most: microbatches that there is memory for.
    """

    devices: tuple[int, ...]
    cut: tuple[int, ...]
    codecs: tuple[str, ...]
    warmup: tuple[int, ...]
    deferred: tuple[int, ...]
    times: StageTimes
    message_bytes: tuple[float, ...]
    lines: tuple[tuple[float, float], ...]
    tail_s: tuple[float, ...]
    round_s: float
    update_s: tuple[float, ...]
    most: int

    def makespan_s(self, microbatches: int) -> float:
        """First forward to last backward, in seconds, with the network to itself."""
        return makespan_s(self.lines, microbatches)

    @property
    def period_s(self) -> float:
        """Seconds from one microbatch to the next, in the long run."""
        return max(slope for _, slope in self.lines)


def balanced_cut(
    layers: int, layer_s: Sequence[float], extra_s: Sequence[float], most: Sequence[int]
) -> tuple[int, ...] | None:
    """Boundaries that make the slowest stage as fast as can be; None if memory does not allow any.

    Layers are alike, so a cut is a count for each stage, and handing them out one by one, each to
    the stage that is then the fastest, is optimal: a stage's time only grows with its layers.

    Args:
        layer_s: ``[stages]``; seconds of one layer, forward and backward.
        extra_s: ``[stages]``; what the embedding or the head adds.
        most: ``[stages]``; layers that there is memory for.
    """
    stages = len(layer_s)
    if min(most) < 1 or sum(most) < layers or stages > layers:
        return None
    counts = [1] * stages
    queue = [
        (extra + 2 * one, s)
        for s, (one, extra) in enumerate(zip(layer_s, extra_s, strict=True))
        if most[s] > 1
    ]
    heapq.heapify(queue)
    for _ in range(layers - stages):
        time_s, s = queue[0]
        counts[s] += 1
        if counts[s] < most[s]:
            heapq.heapreplace(queue, (time_s + layer_s[s], s))
        else:
            heapq.heappop(queue)
    boundaries = [0]
    for count in counts:
        boundaries.append(boundaries[-1] + count)
    return tuple(boundaries)


def cut_for(
    problem: Problem, devices: Sequence[int], pipelines: int, microbatches: int
) -> tuple[int, ...] | None:
    """The best cut that fits with the schedule's usual activations, or else with the fewest."""
    stages = len(devices)
    work, all_devices = problem.work, problem.topology.devices
    layer_s = [sum(work.layer[d]) for d in devices]
    extra_s = [0.0] * stages
    extra_s[0] += sum(work.embedding[devices[0]])
    extra_s[-1] += sum(work.head[devices[-1]])
    usual = [min(stages - s, microbatches) for s in range(stages)]
    for in_flight in [[microbatches] * stages] if problem.gpipe else [usual, [1] * stages]:
        most = [
            problem.most_layers(s, stages, held, all_devices[d], pipelines)
            for s, (d, held) in enumerate(zip(devices, in_flight, strict=True))
        ]
        cut = balanced_cut(problem.dims.layers, layer_s, extra_s, most)
        if cut is not None:
            return cut
    return None


def codecs_for(
    problem: Problem, devices: Sequence[int], period_s: float, pipelines: int
) -> tuple[str, ...]:
    """For each hop the codec that frees it: none where the raw message leaves the hop ample time.

    What a hop shares with others counts as if all of them were as busy as it is.
    """
    allowed = problem.codecs
    if len(allowed) == 1:
        return allowed * (len(devices) - 1)
    elements, precision = problem.message_elements, problem.job.training.precision
    chosen = []
    for a, b in pairwise(devices):
        per_byte = problem.busiest_seconds_per_byte(a, b, pipelines)
        seconds = {c: wire_bytes(c, elements, precision) * per_byte for c in allowed}
        raw = "none" if "none" in seconds else max(seconds, key=lambda c: seconds[c])
        if seconds[raw] <= _AMPLE * period_s:
            chosen.append(raw)
        else:  # as little compression as gives ample time; or else as much as there is
            by_size = sorted(allowed, key=lambda c: -seconds[c])
            chosen.append(
                next((c for c in by_size if seconds[c] <= _AMPLE * period_s), by_size[-1])
            )
    return tuple(chosen)


def stage_times(
    problem: Problem,
    devices: Sequence[int],
    cut: Sequence[int],
    codecs: Sequence[str],
    schedule: ScheduleName,
) -> tuple[list[float], list[float], list[float] | None]:
    """Forward, backward, and W if it is apart, of one microbatch on each stage, in seconds.

    Codecs are included.
    """
    work = problem.work
    counts = [b - a for a, b in pairwise(cut)]
    forward = [n * work.layer[d][0] for n, d in zip(counts, devices, strict=True)]
    backward = [n * work.layer[d][1] for n, d in zip(counts, devices, strict=True)]
    for stage, end in ((0, work.embedding[devices[0]]), (-1, work.head[devices[-1]])):
        forward[stage] += end[0]
        backward[stage] += end[1]
    for s, codec in enumerate(codecs):
        if codec == "none":
            continue
        for stage in (s, s + 1):
            seconds = codec_s(
                codec,
                problem.message_elements,
                problem.job.training.precision,
                memory_bytes_per_s(problem.topology.devices[devices[stage]]),
            )
            forward[stage] += seconds
            backward[stage] += seconds
    if schedule != "zero-bubble":
        return forward, backward, None
    weights = [n * work.layer_weights[d] for n, d in zip(counts, devices, strict=True)]
    weights[-1] += work.head[devices[-1]][0]
    return forward, [b - w for b, w in zip(backward, weights, strict=True)], weights


def message_sizes(problem: Problem, codecs: Sequence[str]) -> tuple[float, ...]:
    """Bytes on the wire of a message over each hop."""
    elements, precision = problem.message_elements, problem.job.training.precision
    return tuple(wire_bytes(c, elements, precision) for c in codecs)


def hop_and_stage_times(
    problem: Problem,
    devices: Sequence[int],
    cut: Sequence[int],
    codecs: Sequence[str],
    schedule: ScheduleName,
) -> StageTimes:
    """A pipeline's times with NICs and uplinks to itself."""
    forward, backward, weights = stage_times(problem, devices, cut, codecs, schedule)
    down: list[Hop] = []
    up: list[Hop] = []
    for (a, b), size in zip(pairwise(devices), message_sizes(problem, codecs), strict=True):
        for hops, source, target in ((down, a, b), (up, b, a)):
            latency, per_byte = problem.hop(source, target)
            hops.append(Hop(latency, size * per_byte))
    later = None if weights is None else tuple(weights)
    return StageTimes(tuple(forward), tuple(backward), tuple(down), tuple(up), later)


def choose_deferred(
    problem: Problem,
    devices: Sequence[int],
    cut: Sequence[int],
    times: StageTimes,
    warmup: Sequence[int],
    microbatches: int,
    pipelines: int,
) -> tuple[int, ...]:
    """Of how many microbatches each stage puts off W, as far as memory allows beside the warmup."""
    if times.weight_s is None:
        return (0,) * len(devices)
    room = [
        problem.most_deferred(run, problem.topology.devices[d], w + 1, microbatches, pipelines)
        for run, d, w in zip(pairwise(cut), devices, warmup, strict=True)
    ]
    return deferred_weights(times.tail_s, times.weight_s, room)


def pipeline_cost(
    problem: Problem,
    devices: Sequence[int],
    pipelines: int,
    microbatches: int,
    cut: Sequence[int] | None = None,
    codecs: Sequence[str] | None = None,
) -> PipelineCost | None:
    """Cut, codecs, warmup and cost of the pipeline on ``devices``.

    Args:
        pipelines: of the whole plan.
        microbatches: about how many this pipeline will get.
        cut, codecs: taken as given, where given.

    Returns:
        None if the model does not fit.
    """
    if cut is None:
        cut = cut_for(problem, devices, pipelines, microbatches)
        if cut is None:
            return None
    stages = len(devices)
    if codecs is None:
        raw = ("none",) * (stages - 1)
        forward, backward, _ = stage_times(problem, devices, cut, raw, "1f1b")
        period_s = max(f + b for f, b in zip(forward, backward, strict=True))
        codecs = codecs_for(problem, devices, period_s, pipelines)
    times = hop_and_stage_times(problem, devices, cut, codecs, problem.schedules[0])
    room = [
        problem.most_in_flight(run, problem.topology.devices[d], microbatches, pipelines)
        for run, d in zip(pairwise(cut), devices, strict=True)
    ]
    if min(room) < (microbatches if problem.gpipe else 1):
        return None
    if problem.gpipe:
        warmup = (microbatches,) * stages
    else:
        extra = problem.job.parallelism.extra_warmup
        warmup = choose_warmup(times, microbatches, room, extra)
    deferred = choose_deferred(problem, devices, cut, times, warmup, microbatches, pipelines)
    tail_s = tuple(times.tail_s)
    if times.weight_s is not None:
        put_off = zip(tail_s, deferred, times.weight_s, strict=True)
        tail_s = tuple(max(0.0, tail - later * w) for tail, later, w in put_off)
    return PipelineCost(
        devices=tuple(devices),
        cut=tuple(cut),
        codecs=tuple(codecs),
        warmup=warmup,
        deferred=deferred,
        times=times,
        message_bytes=message_sizes(problem, codecs),
        lines=_gpipe_lines(times) if problem.gpipe else _lines(times, tail_s, warmup, microbatches),
        tail_s=tail_s,
        round_s=times.round_s,
        update_s=tuple(
            optimizer_s(stage_parameters(problem.dims, run), problem.topology.devices[d])
            for run, d in zip(pairwise(cut), devices, strict=True)
        ),
        most=min(room) if problem.gpipe else problem.job.training.total_microbatches,
    )


def _gpipe_lines(times: StageTimes) -> tuple[tuple[float, float], ...]:
    """A forward phase as long as its slowest stage or hop makes it, and a backward phase."""
    slowest_f = max(*times.forward_s, *(hop.transfer_s for hop in times.down), 0.0)
    slowest_b = max(*times.backward_s, *(hop.transfer_s for hop in times.up), 0.0)
    return ((times.round_s - slowest_f - slowest_b, slowest_f + slowest_b),)


def _lines(
    times: StageTimes, tail_s: Sequence[float], warmup: Sequence[int], microbatches: int
) -> tuple[tuple[float, float], ...]:
    """The makespan's lines under 1F1B and zero-bubble."""
    lines = {times.turns(warmup, microbatches)}
    for head, tail, idle, work in zip(
        times.head_s, tail_s, times.idle_s(warmup), times.work_s, strict=True
    ):
        lines.add((head + tail + idle, work))
    for hop in (*times.down, *times.up):
        lines.add((times.round_s - hop.transfer_s, hop.transfer_s))
    # A line without slope is the round itself, which the last stage's line is never below.
    return tuple(sorted(line for line in lines if line[1] > 0))
