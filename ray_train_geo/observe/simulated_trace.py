"""A simulated step as a Chrome trace, to open in https://ui.perfetto.dev (level 0)."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ray_train_geo.observe.trace import Category, Span, chrome_trace
from ray_train_geo.schedule.actions import Kind
from ray_train_geo.systems.simulated import Simulated

__all__ = ["simulated_trace"]

_CATEGORIES: dict[Kind, Category] = {"F": "forward", "B": "backward", "W": "weights"}
_STEP = 0


def simulated_trace(found: Simulated) -> dict[str, Any]:
    """One process for each stage of each pipeline, as a real run's trace has.

    Rounds of microbatches that one pipeline does after each other are on the same lines, and
    their microbatches are numbered on.

    Args:
        found: simulated with its trace.

    Returns:
        As :func:`~ray_train_geo.observe.trace.chrome_trace`; time 0 is the step's first action.
    """
    workers: dict[int, tuple[str, list[Span]]] = {}
    first_rank: dict[tuple[str, ...], int] = {}  # of each pipeline, by its devices
    done: Counter[tuple[str, ...]] = Counter()  # microbatches, in rounds before
    for traced in found.trace:
        key, run = traced.devices, traced.timeline
        if key not in first_rank:
            pipeline, first_rank[key] = len(first_rank), len(workers)
            for stage, device in enumerate(key):
                rank = len(workers)
                name = f"rank {rank}: pipeline {pipeline}, stage {stage}, device {device}"
                workers[rank] = name, []
        for stage, kind, number, start_s, end_s in run.spans():
            microbatch = done[key] + number
            _, spans = workers[first_rank[key] + stage]
            spans.append(
                Span(
                    _CATEGORIES[kind],
                    f"{kind}{microbatch}",
                    traced.start_s + start_s,
                    end_s - start_s,
                    _STEP,
                    microbatch,
                )
            )
        done[key] += sum(action.kind == "F" for action in run.actions[0])
    if found.sync_s is not None:
        first_s, last_s = found.sync_s
        for _, spans in workers.values():
            spans.append(Span("sync", "gradients", first_s, last_s - first_s, _STEP))
    return chrome_trace(workers)
