"""What must be true of a run after all that happened to it (level 0)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_train_geo.data.order import SampleOrder

__all__ = ["Check", "check_losses", "check_lost_steps", "check_samples", "check_steps"]

_NAMED = 5

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Check:
    """One property, whether it holds, and the figures behind that."""

    name: str
    passed: bool
    detail: str


def check_steps(records: Records, last: int) -> Check:
    """Steps 1 to ``last`` are there, each once and in order."""
    steps = [int(r["step"]) for r in records]
    counts = Counter(steps)
    wrong = [s for s in range(1, last + 1) if counts[s] != 1] + [s for s in counts if s > last]
    if wrong:
        seen = ", ".join(f"{s} ({counts[s]} times)" for s in sorted(wrong)[:_NAMED])
        return Check("steps", False, f"{len(wrong)} of {last} steps are wrong: {seen}")
    if steps != sorted(steps):
        return Check("steps", False, "they are not in order")
    return Check("steps", last > 0, f"each of {last} once")


def check_samples(records: Records, order: SampleOrder) -> Check:
    """Every sample was trained on once an epoch.

    Args:
        order: that of the job: which samples a step holds follows from it, whoever computes it.
    """
    by_epoch: dict[int, list[np.ndarray[Any, np.dtype[np.int64]]]] = {}
    count = order.global_batch // order.microbatch
    for record in records:
        step = int(record["step"])
        for microbatch in range(count):
            first = (step - 1) * order.global_batch + microbatch * order.microbatch
            indices = order.indices(step, microbatch)
            epoch, offset = divmod(first, order.samples)
            while len(indices):
                room = order.samples - offset
                by_epoch.setdefault(epoch, []).append(indices[:room])
                indices, epoch, offset = indices[room:], epoch + 1, 0
    trained, repeated, missing = 0, 0, 0
    newest = max(by_epoch, default=0)
    for epoch, parts in by_epoch.items():
        samples = np.concatenate(parts)
        different = len(np.unique(samples))
        trained += len(samples)
        repeated += len(samples) - different
        missing += order.samples - different if epoch < newest else 0
    passed = bool(trained) and not repeated and not missing
    detail = f"{trained} of {order.samples} an epoch: {repeated} repeated, {missing} left out"
    return Check("samples", passed, detail)


def check_losses(records: Records, reference: Sequence[float], tolerance: float) -> Check:
    """Each step's loss is that of the undisturbed run.

    Args:
        reference: losses of steps 1, 2 ...
        tolerance: largest relative difference.
    """
    worst, at = 0.0, 0
    compared = 0
    for record in records:
        step, loss = int(record["step"]), record["loss"]
        if not 1 <= step <= len(reference):
            continue
        expected = reference[step - 1]
        off = math.inf if loss is None else abs(loss - expected) / max(abs(expected), 1e-12)
        compared += 1
        if off > worst:
            worst, at = off, step
    if not compared:
        return Check("losses", False, "there is none to compare")
    where = f" (step {at})" if at else ""
    detail = f"{compared} steps, at most {worst:.1e} from the undisturbed run's{where}"
    return Check("losses", worst <= tolerance, f"{detail}; {tolerance:g} is allowed")


def check_lost_steps(restores: Records, interval: int | None) -> Check:
    """Steps that were committed and had to be computed anew are within what was promised.

    Args:
        restores: ``restore`` events.
        interval: steps between in-memory copies, None where the run chose it; what comes from a
            checkpoint may cost more.
    """
    lost = [int(r["lost_steps"]) for r in restores]
    warm = [int(r["lost_steps"]) for r in restores if r.get("source") == "memory"]
    over = [] if interval is None else [steps for steps in warm if steps > interval]
    cold = len(restores) - len(warm)
    detail = f"{sum(lost)} in {len(lost)} restores, {max(lost, default=0)} at most"
    if cold:
        detail += f"; {cold} from a checkpoint"
    if over:
        detail += f"; {len(over)} of them over the {interval} that in-memory copies allow"
    return Check("lost steps", not over, detail)
