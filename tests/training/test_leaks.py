"""Workers that outlive many generations hold no more than after the first few."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
from generations import Generations
from local_jobs import make_job, plan_for

from ray_train_geo.training.runtime import StageRuntime

WARM, GENERATIONS = 3, 12
SETTLE_S = 1.5


def held() -> tuple[int, int]:
    """The fewest threads and file descriptors of this process while those of the last end."""
    process, threads, descriptors = psutil.Process(), [], []
    until = time.monotonic() + SETTLE_S
    while time.monotonic() < until:
        gc.collect()
        threads.append(process.num_threads())
        descriptors.append(process.num_fds())
        time.sleep(0.05)
    return min(threads), min(descriptors)


def test_generations_leave_nothing_behind(tmp_path: Path) -> None:
    job = make_job(
        tmp_path, "training.steps=1000", "parallelism.pipelines=2", "parallelism.stages=1"
    )
    plan, generations, numbers = plan_for(job, 2), Generations(job), iter(range(GENERATIONS))

    def end(runtimes: Mapping[int, StageRuntime]) -> None:
        """Every other one is aborted in the midst of a step."""
        if next(numbers) % 2:
            runtimes[0].interrupt(pause=True)
        else:
            threading.Timer(0.05, runtimes[1].abort).start()

    common, before = None, (0, 0)
    try:
        for number in range(GENERATIONS):
            generations.run(plan, 1000, common, before=end)
            common = generations.settle()
            if number == WARM:
                before = held()
        after = held()
    finally:
        generations.close()
    # One generation's may still be on their way.  Eight that leak leave over 16 and 80.
    assert after[0] - before[0] <= 2, "threads"
    assert after[1] - before[1] <= 4, "file descriptors"
