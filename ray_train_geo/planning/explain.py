"""Why a plan takes as long as it does: where the step goes, what limits it, what would help.

All figures are of the event engine's timeline (`planning.predict`) of one step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ray_train_geo.cluster.topology import Topology
from ray_train_geo.planning.bottleneck import (
    Breakdown,
    bottleneck,
    breakdown,
    compute_s,
    unsynced_s,
)
from ray_train_geo.planning.budget import Budget
from ray_train_geo.planning.codecs import wire_bytes
from ray_train_geo.planning.levers import Gain, gains
from ray_train_geo.planning.plan import Certificate, Objective, PipelinePlan, Plan
from ray_train_geo.planning.predict import Prediction, predict
from ray_train_geo.planning.problem import Problem
from ray_train_geo.schedule.timeline import Timeline
from ray_train_geo.spec import JobSpec

__all__ = ["Explanation", "HopFigures", "PipelineFigures", "StageFigures", "explain"]

_PROVEN = 1e-6
"""A gap that only rounding explains."""

_UNITS: dict[Objective, str] = {
    "step-time": "s a step",
    "dollars": "$ per million tokens",
    "dtfm": "s by DT-FM's cost",
}


@dataclass(frozen=True, slots=True)
class HopFigures:
    """The hop from a stage to the next one, in its slower direction.

    Args:
        transfer_s: one message on the wire, with NICs and uplinks to itself.
        latency_s: one way.
        busy: part of the step that all its messages take on the wire, 0 to 1.
    """

    codec: str
    transfer_s: float
    latency_s: float
    busy: float


@dataclass(frozen=True, slots=True)
class StageFigures:
    """One stage in one step.

    Args:
        layers: ``(first, last_exclusive)``.
        compute_s: all its forwards and backwards.
        idle: part of the step in which it computes nothing, 0 to 1.
        hop: to the next stage; None on the last.
        memory_bytes, device_memory_bytes: predicted peak, and what there is.
    """

    device: str
    node: str
    region: str
    type: str
    layers: tuple[int, int]
    compute_s: float
    idle: float
    hop: HopFigures | None
    memory_bytes: int
    device_memory_bytes: int


@dataclass(frozen=True, slots=True)
class PipelineFigures:
    """One pipeline in one step; ``makespan_s`` is from its first forward to its last backward."""

    microbatches: int
    makespan_s: float
    stages: tuple[StageFigures, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a plan does with its step.

    Args:
        step_s: the predicted step, in seconds.
        breakdown: where it goes.
        bottleneck: what limits it, in one sentence.
        bound: how far it can be from the best plan, in one sentence.
        gains: what would help most, best first.
    """

    step_s: float
    breakdown: Breakdown
    bottleneck: str
    bound: str
    gains: tuple[Gain, ...]
    pipelines: tuple[PipelineFigures, ...] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON: finite numbers, strings, lists and dictionaries."""
        return dataclasses.asdict(self)


def explain(
    plan: Plan,
    topology: Topology,
    job: JobSpec,
    vocab_size: int = 257,
    budget: Budget | None = None,
) -> Explanation:
    """Explain ``plan`` of ``job`` on ``topology``.

    Args:
        vocab_size: the tokenizer's, in tokens; for models that don't name their own.
        budget: of time for trying what would help.

    Raises:
        KeyError: a device of the plan is not in the topology.
        ValueError: two devices that must talk have no link.
    """
    problem = Problem.of(topology, job, vocab_size)
    prediction = predict(problem, plan.pipelines, plan.schedule, plan.gradient_sync)
    return Explanation(
        step_s=prediction.step_s,
        breakdown=breakdown(problem, plan, prediction),
        bottleneck=bottleneck(problem, plan, prediction),
        bound=_bound(plan.certificate),
        gains=gains(
            problem,
            plan,
            prediction.step_s,
            unsynced_s(problem, plan, prediction),
            budget=budget,
        ),
        pipelines=_figures(problem, plan.pipelines, prediction),
    )


def _figures(
    problem: Problem, pipelines: Sequence[PipelinePlan], prediction: Prediction
) -> tuple[PipelineFigures, ...]:
    return tuple(
        PipelineFigures(p.microbatches, t.makespan_s, _stages(problem, p, t, prediction.step_s))
        for p, t in zip(pipelines, prediction.timelines, strict=True)
    )


def _stages(
    problem: Problem, pipeline: PipelinePlan, timeline: Timeline, step_s: float
) -> tuple[StageFigures, ...]:
    elements, precision = problem.message_elements, problem.job.training.precision
    index = problem.table.index
    hops: list[HopFigures | None] = []
    for a, b in pairwise(pipeline.stages):
        size = wire_bytes(a.codec, elements, precision)
        ends = index[a.device], index[b.device]
        latency_s, per_byte = max(
            (problem.hop(*ends), problem.hop(*ends[::-1])), key=lambda hop: (hop[1], hop[0])
        )
        transfer_s = size * per_byte
        busy = pipeline.microbatches * transfer_s / step_s
        hops.append(HopFigures(a.codec, transfer_s, latency_s, busy))
    figures = []
    for s, (stage, hop) in enumerate(zip(pipeline.stages, [*hops, None], strict=True)):
        device = problem.devices[stage.device]
        busy_s = compute_s(timeline, s)
        figures.append(
            StageFigures(
                device=device.id,
                node=device.node,
                region=device.region,
                type=device.type,
                layers=stage.layers,
                compute_s=busy_s,
                idle=max(0.0, 1 - busy_s / step_s),
                hop=hop,
                memory_bytes=stage.memory_bytes,
                device_memory_bytes=device.memory_bytes,
            )
        )
    return tuple(figures)


def _bound(certificate: Certificate | None) -> str:
    if certificate is None or certificate.lower_bound <= 0:
        return "no lower bound is known: nothing says how far this plan is from the best"
    unit, value, least = _UNITS[certificate.objective], certificate.value, certificate.lower_bound
    said = f"{value:.4g} {unit}; no plan is below {least:.4g}"
    best = "proven best" if certificate.gap < _PROVEN else f"a gap of {certificate.gap:.1%}"
    reason = f" ({certificate.argument.rstrip('.')})" if certificate.argument else ""
    return f"{said}: {best}{reason}"
