"""The planner beside what others would do with the same devices, all in the event engine.

    python benchmarks/planner.py [--random 200] [--seeds 20] [--only worldwide,mixed] [--json]

Every row is one topology: DT-FM's own plan (its objective's optimum, 8 stages, even layers),
Megatron-LM's default placement and the best of many random ones, each with the gradient sync and
schedule of our plan; then our plan, its certificate, and how long the search took.  Further tables:
DT-FM's objective, what DT-FM's plan costs as DT-FM runs it, unequal GPUs, scale, and re-planning.
It asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

from ray_train_geo.cluster.random_topology import random_topology
from ray_train_geo.cluster.scenarios import scenario
from ray_train_geo.cluster.topology import Topology
from ray_train_geo.planning.baselines import (
    best_even_plan,
    even_plan,
    megatron_chains,
    random_chains,
)
from ray_train_geo.planning.budget import Budget
from ray_train_geo.planning.dtfm_assignment import dtfm_assignment
from ray_train_geo.planning.plan import Plan
from ray_train_geo.planning.planner import plan
from ray_train_geo.planning.problem import PlanOptions, Problem
from ray_train_geo.planning.replan import ReplanResult, replan
from ray_train_geo.spec import JobSpec, parse_job

DTFM = ("datacenter", "datacenter-spot", "universities", "regional", "worldwide")
NAMED = (*DTFM, "fluidstack-2", "fluidstack-3")
STAGES = 8
SIMULATED = 8
VOCAB = 50257


def job(batch: int = 1024, model: str = "gpt3-xl-24", **parallelism: Any) -> JobSpec:
    """GPT-3 XL as DT-FM trains it."""
    return parse_job(
        {
            "model": {"name": model},
            "data": {"path": "not-read"},
            "training": {
                "steps": 1,
                "global_batch": batch,
                "seq_len": 2048,
                "precision": "fp16",
                "recompute": True,
            },
            "parallelism": parallelism,
        }
    )


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = call()
    return result, time.perf_counter() - began


def peers(
    topology: Topology, sync: str, randoms: int, ours_s: float, schedule: str = "1f1b"
) -> dict[str, float]:
    """Step seconds of others' placements of GPT-3 XL, batch 1024, all by the event engine.

    Of random ones, those are left out that must take longer than one that was simulated, and,
    beyond the most promising eight, those that must take longer than ours.
    """
    problem = Problem.of(topology, job(gradient_sync=sync, schedule=schedule), VOCAB)
    found = dtfm_assignment(topology, STAGES, len(topology.devices) // STAGES, prove=False)
    index = problem.table.index
    placements = {
        "dtfm": [[index[d] for d in pipeline] for pipeline in found.pipelines],
        "megatron": megatron_chains(problem, STAGES),
    }
    steps = {n: even_plan(problem, p).predicted_step_s for n, p in placements.items()}
    if randoms:
        seeds = (random_chains(problem, STAGES, seed) for seed in range(randoms))
        steps["random"] = best_even_plan(problem, seeds, ours_s, SIMULATED).predicted_step_s
    return steps


def against_peers(names: Sequence[str], randoms: int) -> Iterator[dict[str, Any]]:
    for name in names:
        topology = scenario(name)
        known: dict[str, dict[str, float]] = {}
        for codecs in (("none",), ("none", "int8")):
            options = PlanOptions(codecs=codecs)
            ours, seconds = timed(lambda t=topology, o=options: plan(t, job(), VOCAB, o))
            sync = ours.gradient_sync
            others = known[sync] = known.get(sync) or peers(
                topology, sync, randoms, ours.predicted_step_s
            )
            yield {
                "case": name,
                "codecs": "+".join(codecs),
                "sync": ours.gradient_sync,
                **others,
                "ours": ours.predicted_step_s,
                "best peer / ours": min(others.values()) / ours.predicted_step_s,
                "pipelines": len(ours.pipelines),
                "devices": ours.world_size,
                "bound": ours.certificate.lower_bound,
                "gap": ours.certificate.gap,
                "search_s": seconds,
            }


def dtfm_objective() -> Iterator[dict[str, Any]]:
    for name in DTFM:
        topology = scenario(name)
        alone, plan_s = timed(lambda t=topology: dtfm_assignment(t, 8, 8, prove=False))
        proven, proof_s = timed(lambda t=topology: dtfm_assignment(t, 8, 8))
        yield {
            "case": name,
            "cost": proven.cost.total_s,
            "bound": proven.lower_bound,
            "gap": proven.cost.total_s / proven.lower_bound - 1,
            "plan alone": alone.cost.total_s,
            "plan_s": plan_s,
            "with proof_s": proof_s,
        }


def as_dtfm_runs_it() -> Iterator[dict[str, Any]]:
    for name in DTFM:
        topology = scenario(name)
        theirs = peers(topology, "central_ps", 0, 0.0, "gpipe")["dtfm"]
        row = {"case": name, "dtfm (GPipe, central PS)": theirs}
        for codecs in (("none",), ("none", "int8")):
            ours = plan(topology, job(), VOCAB, PlanOptions(codecs=codecs)).predicted_step_s
            row |= {f"ours {'+'.join(codecs)}": ours, f"x {'+'.join(codecs)}": theirs / ours}
        yield row


def unequal() -> Iterator[dict[str, Any]]:
    topology = scenario("mixed")
    ours, seconds = timed(lambda: plan(topology, job(), VOCAB))
    problem = Problem.of(topology, job(gradient_sync=ours.gradient_sync), VOCAB)
    even: dict[int, float] = {}
    for stages in range(1, 25):
        chains = megatron_chains(problem, stages)
        if len(chains) <= 1024:
            even[stages] = even_plan(problem, chains).predicted_step_s
    # Even layers on our plan's own pipelines, where they are all of one depth.
    index = problem.table.index
    same = [[index[s.device] for s in p.stages] for p in ours.pipelines]
    alike = len({len(c) for c in same}) == 1
    memory = max(
        s.memory_bytes / problem.devices[s.device].memory_bytes
        for s in chain(*(p.stages for p in ours.pipelines))
    )
    yield {
        "ours": ours.predicted_step_s,
        "even layers, 8 stages": even[STAGES],
        "even layers, best depth": min(even.values()),
        "even layers, our pipelines": even_plan(problem, same).predicted_step_s if alike else None,
        "used": f"{ours.world_size} of {len(topology.devices)}",
        "fullest memory": memory,
        "gap": ours.certificate.gap,
        "search_s": seconds,
    }


def scale() -> Iterator[dict[str, Any]]:
    for devices, regions, batch, budgets in (
        (1024, 16, 4096, (5, 30, 120)),
        (10_000, 16, 16384, (60,)),
    ):
        topology = random_topology(1, devices=devices, regions=regions)
        for budget_s in budgets:
            found, seconds = timed(
                lambda t=topology, b=batch, s=budget_s: plan(t, job(b), VOCAB, budget=Budget(s))
            )
            yield {
                "devices": devices,
                "budget_s": budget_s,
                "took_s": seconds,
                "step_s": found.predicted_step_s,
                "used": found.world_size,
                "gap": found.certificate.gap,
                "peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            }


def replanning(every: int = 4) -> Iterator[dict[str, Any]]:
    def next_plan(before: Plan, topology: Topology) -> tuple[ReplanResult, float]:
        return timed(lambda: replan(before, topology, job(), VOCAB, PlanOptions(moves=0)))

    for name in ("worldwide", "datacenter"):
        topology = scenario(name)
        old = plan(topology, job(), VOCAB)
        seconds, slower, moved = [], [], []
        for left in old.devices[::every]:
            rest = topology.with_devices(d for d in topology.devices if d.id != left.id)
            found, leave_s = next_plan(old, rest)
            again, join_s = next_plan(found.plan, topology)
            seconds += [leave_s, join_s]
            slower.append(found.plan.predicted_step_s / old.predicted_step_s)
            moved += [found.transition.layers_moved, again.transition.layers_moved]
        yield {
            "case": name,
            "changes": len(seconds),
            "median_s": statistics.median(seconds),
            "slowest_s": max(seconds),
            "most layers moved": max(moved),
            "step after a leave / before (median)": statistics.median(slower),
        }


def shown(title: str, rows: Iterator[dict[str, Any]], quiet: bool) -> list[dict[str, Any]]:
    """All rows; each is printed as soon as it is there."""
    found: list[dict[str, Any]] = []
    if not quiet:
        print(f"\n{title}")
    for row in rows:
        cells = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()]
        widths = [max(len(name), 16 if name == "case" else 8) for name in row]
        if not quiet:
            lines = [list(row), cells] if not found else [cells]
            for line in lines:
                print("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)), flush=True)
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--random", type=int, default=200, help="random placements of each case")
    parser.add_argument("--seeds", type=int, default=20, help="random topologies")
    parser.add_argument("--only", help="these scenarios only, without the other tables")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    names = [*NAMED, *(f"random-{seed}" for seed in range(args.seeds))]
    if args.only:
        names = args.only.split(",")
    results = {
        "peers": shown("step seconds", against_peers(names, args.random), args.json),
    }
    gaps = [row["gap"] for row in results["peers"]]
    if not args.json:
        slower = [row["case"] for row in results["peers"] if row["best peer / ours"] < 1]
        print(f"slower than a peer: {', '.join(slower) or 'none'}")
        print(f"median gap of all rows: {statistics.median(gaps):.1%}")
    if not args.only:
        for title, rows in (
            ("DT-FM's objective, 8 x 8", dtfm_objective()),
            ("DT-FM's plan as DT-FM runs it", as_dtfm_runs_it()),
            ("32 A100 + 64 V100 + 32 T4", unequal()),
            ("scale", scale()),
            ("re-planning, first plan", replanning()),
        ):
            results[title] = shown(title, rows, args.json)
    load = os.getloadavg()
    if args.json:
        print(json.dumps({**results, "load": load}))
    else:
        print(f"load average: {load[0]:.2f} {load[1]:.2f} {load[2]:.2f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
