"""What a faster network does to a step, by the event engine: it never makes one slower.

Random plans of 2 to 6 pipelines of 2 to 6 stages, on nodes whose NICs fill up; of each, three
times, something gets faster by 1 to 100 %: a NIC, all NICs, all links, one link, or all latencies.

    python benchmarks/monotonicity.py [--plans 1000] [--seed 0]
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

os.environ["OMP_NUM_THREADS"] = "1"


from ray_train_geo.schedule.gpipe import gpipe
from ray_train_geo.schedule.one_f_one_b import one_f_one_b
from ray_train_geo.simulation.engine import simulate
from ray_train_geo.simulation.work import Flow, PipelineWork

CHANGES = ("one NIC", "all NICs", "all links", "one link", "all latencies")
GAINS = (1.01, 1.1, 1.5, 2.0)
ROUNDING = 1e-9

Plan = tuple[list[PipelineWork], list[float]]
"""Pipelines, and seconds per byte of the NICs out of nodes and then into them."""


def random_plan(rng: random.Random) -> Plan:
    """A forward takes a second, more or less; a message has one byte."""
    stages, pipelines = rng.randint(2, 6), rng.randint(2, 6)
    microbatches = rng.choice([4, 8, 16])
    nodes = rng.randint(2, stages * pipelines // 2 + 1)
    message_s = rng.choice([0.2, 0.5, 1.0, 2.0])
    latency_s = [[rng.choice([0.0, 0.05, 0.5, 2.0]) for _ in range(nodes)] for _ in range(nodes)]
    link_s = [[message_s * rng.uniform(0.5, 2) for _ in range(nodes)] for _ in range(nodes)]
    hops = rng.choice([1, 2])
    warmup = [min(microbatches, hops * (stages - 1 - s)) for s in range(stages)]
    actions = rng.choice([gpipe(stages, microbatches), one_f_one_b(warmup, microbatches)])

    def flow(a: int, b: int) -> Flow:
        if a == b:
            return Flow(0.0, 1.0, message_s / 20)
        return Flow(latency_s[a][b], 1.0, link_s[a][b], (a, nodes + b))

    def pipeline() -> PipelineWork:
        places = [rng.randrange(nodes) for _ in range(stages)]
        forward_s = tuple(rng.uniform(0.9, 1.1) for _ in places)
        return PipelineWork(
            actions,
            forward_s,
            tuple(2 * seconds for seconds in forward_s),
            tuple(flow(a, b) for a, b in pairwise(places)),
            tuple(flow(b, a) for a, b in pairwise(places)),
        )

    work = [pipeline() for _ in range(pipelines)]
    return work, [message_s * rng.uniform(0.5, 1.5) for _ in range(2 * nodes)]


def faster(rng: random.Random, plan: Plan, change: str) -> Plan:
    work, nics = plan
    gain = rng.choice(GAINS)
    if change == "all NICs":
        return work, [seconds / gain for seconds in nics]
    if change == "one NIC":
        chosen = rng.randrange(len(nics))
        return work, [s / gain if i == chosen else s for i, s in enumerate(nics)]
    one = rng.randrange(len(work)), rng.randrange(len(work[0].down))

    def quick(flow: Flow) -> Flow:
        if change == "all latencies":
            return replace(flow, latency_s=flow.latency_s / gain)
        return replace(flow, seconds_per_byte=flow.seconds_per_byte / gain)

    def some(flows: Sequence[Flow], wanted: Callable[[int], bool]) -> tuple[Flow, ...]:
        return tuple(quick(flow) if wanted(hop) else flow for hop, flow in enumerate(flows))

    if change == "one link":
        p, hop = one
        changed = replace(work[p], down=some(work[p].down, lambda h: h == hop))
        return [changed if i == p else w for i, w in enumerate(work)], nics
    return [
        replace(w, down=some(w.down, lambda _: True), up=some(w.up, lambda _: True)) for w in work
    ], nics


def step_s(plan: Plan) -> float:
    return max(timeline.makespan_s for timeline in simulate(*plan))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found: dict[str, list[float]] = {}
    for number in range(args.plans):
        rng = random.Random(f"{args.seed}/{number}")
        plan = random_plan(rng)
        before_s = step_s(plan)
        for change in rng.sample(CHANGES, 3):
            after_s = step_s(faster(rng, plan, change))
            found.setdefault(change, []).append(after_s / before_s - 1)
    print(f"{'faster':13} {'plans':>6} {'slower':>7} {'worst':>9} {'median':>7}")
    for change in CHANGES:
        by = found.get(change, [0.0])
        slower = sum(x > ROUNDING for x in by)
        print(
            f"{change:13} {len(by):>6} {slower:>7} {max(by):>+9.1e} {statistics.median(by):>+7.1%}"
        )


if __name__ == "__main__":
    main()
