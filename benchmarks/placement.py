"""A scheduled placement beside random ones, on emulated links: is it as much better as predicted?

The planner places a job on eight hosts of DT-FM's regional and world-wide cases; then the very
same plan runs with its devices shuffled.  Links are the geo lab's (real sockets, real gloo, the
published latencies, bandwidths scaled); devices are emulated, as in ``benchmarks/worldwide.py``.

    python benchmarks/placement.py [--random 4] [--steps 3] [--scale 0.01] [--only NAME] [--json]

Printed: the mean step of the random placements over the scheduled one's, measured and simulated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
from collections.abc import Mapping
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from worldwide import LAYERS, PIPELINES, STAGES, VOCAB, Case, job_of, measure, paced

from ray_train_geo.cluster.topology import Topology
from ray_train_geo.lab.lab import Lab
from ray_train_geo.planning.budget import Budget
from ray_train_geo.planning.plan import Plan
from ray_train_geo.planning.planner import plan as make_plan
from ray_train_geo.planning.predict import predict_plan
from ray_train_geo.spec import JobSpec

HOSTS = PIPELINES * STAGES
SCENARIOS = ("regional", "worldwide")


def shuffled(plan: Plan, seed: int) -> Plan:
    """The plan with its stages on other devices; all else stays."""
    devices = list(plan.devices)
    random.Random(seed).shuffle(devices)
    left = iter(devices)
    pipelines = tuple(
        dataclasses.replace(
            p, stages=tuple(dataclasses.replace(s, device=next(left).id) for s in p.stages)
        )
        for p in plan.pipelines
    )
    return dataclasses.replace(plan, pipelines=pipelines, devices=tuple(devices))


def compare(scenario: str, job: JobSpec, arguments: argparse.Namespace) -> dict[str, Any]:
    """Steps of the scheduled plan and of random ones, in seconds."""
    with Lab(scenario, hosts=HOSTS, scale=arguments.scale) as lab:
        topology: Topology = paced(lab.topology, job, arguments.forward_ms / 1000)
        best = make_plan(topology, job, VOCAB, budget=Budget(10.0), prove=False)
        plans = [best, *(shuffled(best, seed) for seed in range(arguments.random))]
        predicted = [predict_plan(p, topology, job, VOCAB).step_s for p in plans]
        measured = []
        for number, plan in enumerate(plans):
            name = f"{scenario}, {'random ' + str(number) if number else 'scheduled'}"
            found = measure(lab, Case(name, {}), job, plan, topology)
            measured.append(statistics.median(found["steps_s"]))
            if not arguments.json:
                print(line(name, measured[-1], predicted[number]), flush=True)
    factors = [statistics.mean(x[1:]) / x[0] for x in (measured, predicted)]
    return {
        "scenario": scenario,
        "measured_s": measured,
        "simulated_s": predicted,
        "measured_factor": factors[0],
        "simulated_factor": factors[1],
        "load": os.getloadavg()[0],
    }


def line(name: str, measured: float, simulated: float) -> str:
    return f"{name:24}{measured:11.2f}{simulated:11.2f}{simulated / measured - 1:+9.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--random", type=int, default=4, help="random placements of each scenario")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each placement")
    parser.add_argument(
        "--scale", type=float, default=0.01, help="what bandwidths are multiplied by"
    )
    parser.add_argument("--forward-ms", type=float, default=20.0, help="of a stage and microbatch")
    parser.add_argument("--microbatches", type=int, default=16, help="of a step, both pipelines")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--only", action="append", choices=SCENARIOS)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    settings: Mapping[str, Mapping[str, Any]] = {"parallelism": {"gradient_sync": "allreduce"}}
    job = job_of(settings, arguments, arguments.steps)
    if not arguments.json:
        print(f"{PIPELINES} pipelines of {STAGES} stages, {LAYERS} layers")
        print(f"{'seconds a step':24}{'measured':>11}{'simulated':>11}{'error':>9}")
    rows = []
    for scenario in SCENARIOS:
        if arguments.only and scenario not in arguments.only:
            continue
        row = compare(scenario, job, arguments)
        rows.append(row)
        if not arguments.json:
            measured, simulated = row["measured_factor"], row["simulated_factor"]
            print(line(f"{scenario}: factor", measured, simulated), f" load {row['load']:.0f}")
    if arguments.json:
        print(json.dumps({"scale": arguments.scale, "scenarios": rows}))


if __name__ == "__main__":
    main()
