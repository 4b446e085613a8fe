"""What a simulated step says of itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from ray_train_geo.schedule.timeline import Timeline

__all__ = ["Simulated", "TracedPipeline"]


@dataclass(frozen=True, slots=True)
class TracedPipeline:
    """One pipeline's simulated actions, for a trace.

    Args:
        devices: ``[stages]``; ids.
        start_s: when the timeline's 0 is, in the step (rounds of microbatches follow each other).
    """

    devices: tuple[str, ...]
    timeline: Timeline
    start_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Simulated:
    """One system's step, predicted.

    Args:
        step_s: seconds; the mean over the seeds, where a placement is drawn at random.
        pflop: of the model's step, as published: recomputation counts where it is done.
        efficiency: ``pflops`` over what all devices' peak would do.
        breakdown: seconds by cause; they add up to ``step_s``.
        trace: actions of the first placement, if they were asked for.
        sync_s: (first, last) second of the step in which gradients are summed, for the trace.
        notes: what a reader must know: assumptions, memory that would not do.
    """

    system: str
    scenario: str
    model: str
    global_batch: int
    devices: int
    step_s: float
    pflop: float
    efficiency: float
    breakdown: dict[str, float]
    tokens_per_s: float
    dollars_per_million_tokens: float
    trace: tuple[TracedPipeline, ...] = field(default=(), repr=False)
    sync_s: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    @property
    def pflops(self) -> float:
        """PFLOP per second."""
        return self.pflop / self.step_s
