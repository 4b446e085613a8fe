"""Speed of a logged run: step time, tokens/s, TFLOPs per GPU (level 0)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ray_train_geo.errors import InputError
from ray_train_geo.observe.log_settings import RunSettings
from ray_train_geo.observe.metrics import model_tflops_per_gpu
from ray_train_geo.observe.training_logs import Timing, TrainingLog

__all__ = ["RunSpeed", "run_speed"]

_FLAGS = {
    "size_b": "--size-b",
    "seq_len": "--seq",
    "samples_per_s": "--global-batch",
    "gpus": "--gpus",
}
"""What TFLOPs need, and how to tell it."""


@dataclass(frozen=True, slots=True)
class RunSpeed:
    """A row of figures; what neither the log nor its reader knows is None.

    Args:
        status: ``failed`` of itself, ``stopped`` by the scheduler, ``error``: the log can't be
            read.  A run that failed or was stopped has the speed that it had until then.
        reason: of every status but ``ok``.
        timed: entries of the log that count, after ``skipped`` ones.
        step_s: mean seconds of a step; what is below follows from it.
        median_step_s: beside the mean, it tells whether a few slow steps made that.
        tflops_per_gpu: BigScience's, `metrics.model_tflops_per_gpu`.
        notes: what was assumed, or is missing.
    """

    path: str
    status: Literal["ok", "failed", "stopped", "error"]
    reason: str | None = None
    format: str | None = None
    timed: int = 0
    skipped: int = 0
    step_s: float | None = None
    median_step_s: float | None = None
    samples_per_s: float | None = None
    tokens_per_s: float | None = None
    tflops_per_gpu: float | None = None
    size_b: float | None = None
    seq_len: int | None = None
    global_batch: int | None = None
    gpus: int | None = None
    recompute: bool | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "notes": list(self.notes)}


def run_speed(log: TrainingLog, *, skip: int = 1, given: RunSettings | None = None) -> RunSpeed:
    """What ``log`` amounts to.

    Args:
        skip: entries left out at the start, as warmup; all count where there are no more.
        given: what is known better than the log tells it.

    Raises:
        InputError: ``skip`` is negative.
    """
    if skip < 0:
        raise InputError(f"skip must be 0 or more, but is {skip}")
    given = given or RunSettings()
    settings = log.settings.under(given)
    speed = RunSpeed(
        path=str(log.path),
        status="ok" if log.ending is None else log.ending.status,
        reason=None if log.ending is None else log.ending.reason,
        format=log.format,
        size_b=settings.size_b,
        seq_len=settings.seq_len,
        global_batch=settings.global_batch,
        gpus=settings.gpus,
        recompute=settings.recompute,
        notes=log.notes + settings.notes,
    )
    if not log.timings:
        reason = speed.reason or "no iteration was logged"
        return replace(speed, status=log.ending.status if log.ending else "failed", reason=reason)
    kept, notes = _steady(log.timings, skip)
    speed = replace(
        speed,
        timed=len(kept),
        skipped=len(log.timings) - len(kept),
        global_batch=given.global_batch or kept[-1].global_batch or settings.global_batch,
        notes=speed.notes + notes,
    )
    return _with_tflops(_with_rates(speed, kept))


def _steady(timings: Sequence[Timing], skip: int) -> tuple[Sequence[Timing], tuple[str, ...]]:
    """The timings after warmup, all of the last batch size."""
    notes = []
    last = timings[-1].global_batch
    alike = [t for t in timings if t.global_batch == last]
    if len(alike) < len(timings):
        notes.append(f"the global batch changed: only steps of {last} count")
    if len(alike) > skip:
        alike = alike[skip:]
    elif skip:
        notes.append(f"no more than {len(alike)} timed: warmup is in it")
    return alike, tuple(notes)


def _with_rates(speed: RunSpeed, timings: Sequence[Timing]) -> RunSpeed:
    batch, seconds = speed.global_batch, [t.step_s for t in timings if t.step_s]
    rates = [t.samples_per_s for t in timings if t.samples_per_s]
    if rates and batch:
        seconds = [batch / rate for rate in rates]
    step_s = statistics.fmean(seconds) if seconds else None
    samples_per_s = batch / step_s if batch and step_s else None
    if rates:
        samples_per_s = statistics.harmonic_mean(rates)
    tokens = [t.tokens for t in timings if t.tokens]
    tokens_per_s = None
    if samples_per_s and speed.seq_len:
        tokens_per_s = samples_per_s * speed.seq_len
    elif step_s and tokens:
        tokens_per_s = statistics.fmean(tokens) / step_s
    return replace(
        speed,
        step_s=step_s,
        median_step_s=statistics.median(seconds) if seconds else None,
        samples_per_s=samples_per_s,
        tokens_per_s=tokens_per_s,
    )


def _with_tflops(speed: RunSpeed) -> RunSpeed:
    if not (speed.size_b and speed.seq_len and speed.samples_per_s and speed.gpus):
        missing = ", ".join(flag for name, flag in _FLAGS.items() if not getattr(speed, name))
        return replace(speed, notes=(*speed.notes, f"no TFLOPs without {missing}"))
    notes = speed.notes
    if speed.recompute is None:
        notes += ("assumed that activations are recomputed",)
    tflops = model_tflops_per_gpu(
        size_b=speed.size_b,
        seq_len=speed.seq_len,
        global_batch=speed.samples_per_s,
        step_s=1.0,
        gpus=speed.gpus,
        recompute=speed.recompute is not False,
    )
    return replace(speed, tflops_per_gpu=tflops, notes=notes)
