"""Seconds that the event engine takes for one step of a whole plan.

Every stage computes for 50 + 100 ms a microbatch, +-10%; a hop sends 10 MB over its own link
(1.25 GB/s +-10%, 10 ms) and, where NICs are shared, through those of nodes of eight devices.

    python benchmarks/engine.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import random
import time

os.environ["OMP_NUM_THREADS"] = "1"

from ray_train_geo.schedule.one_f_one_b import one_f_one_b
from ray_train_geo.simulation.engine import simulate
from ray_train_geo.simulation.work import Flow, PipelineWork

STAGES, NODE = 8, 8
FORWARD_S, LATENCY_S, MESSAGE_BYTES, LINK_BYTES_PER_S = 0.05, 0.01, 1e7, 1.25e9


def plan(devices: int, batch: int, scattered: bool) -> tuple[list[PipelineWork], int]:
    """Pipelines, and the number of nodes; resources are NICs out of nodes, then into them."""
    rng = random.Random(0)
    nodes, pipelines = devices // NODE, devices // STAGES
    places = [device // NODE for device in range(devices)]
    if scattered:
        rng.shuffle(places)
    else:  # a node holds one stage of eight pipelines
        places = [p // NODE * STAGES + s for p in range(pipelines) for s in range(STAGES)]

    def noisy(value: float) -> float:
        return value * rng.uniform(0.9, 1.1)

    def flow(source: int, target: int) -> Flow:
        a, b = places[source], places[target]
        nics = (a, nodes + b) if a != b else ()
        return Flow(LATENCY_S, MESSAGE_BYTES, noisy(1 / LINK_BYTES_PER_S), nics)

    actions = one_f_one_b([2 * (STAGES - 1 - s) for s in range(STAGES)], batch // pipelines)
    work = []
    for first in range(0, devices, STAGES):
        hops = [(d, d + 1) for d in range(first, first + STAGES - 1)]
        work.append(
            PipelineWork(
                actions,
                tuple(noisy(FORWARD_S) for _ in range(STAGES)),
                tuple(noisy(2 * FORWARD_S) for _ in range(STAGES)),
                tuple(flow(a, b) for a, b in hops),
                tuple(flow(b, a) for a, b in hops),
            )
        )
    return work, nodes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print(f"{'devices':>7} {'batch':>6}  {'placement':30} {'step s':>7} {'seconds':>8}")
    for devices, batch in ((64, 1024), (1024, 4096)):
        for name, scattered, nic_bytes_per_s in (
            ("nothing shared", False, None),
            ("NICs that never fill up", False, 16 * LINK_BYTES_PER_S * 1.2),
            ("NICs shared, a stage a node", False, LINK_BYTES_PER_S),
            ("NICs shared, scattered devices", True, LINK_BYTES_PER_S),
        ):
            work, nodes = plan(devices, batch, scattered)
            per_byte = 0.0 if nic_bytes_per_s is None else 1 / nic_bytes_per_s
            seconds = []
            for _ in range(rounds):
                started = time.process_time()
                timelines = simulate(work, [per_byte] * (2 * nodes))
                seconds.append(time.process_time() - started)
            step_s = max(t.makespan_s for t in timelines)
            print(f"{devices:>7} {batch:>6}  {name:30} {step_s:>7.2f} {min(seconds):>8.3f}")


if __name__ == "__main__":
    main()
