"""Topologies whose links differ by class only, on which planner and certificate are judged.

    python benchmarks/class_structured.py [--first 0] [--seeds 20] [--batch 1024] [--codecs none]

Regions of equal nodes; one link within a node, one within a region, and one or two (continents)
between regions; one or two kinds of GPU, each kind a region's.  Every row is one of them: our
plan's predicted step, the certificate's bound, the gap, and what both took.  It asserts nothing.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from itertools import permutations

from planner import VOCAB, job

from ray_train_geo.cluster.gpus import gpu
from ray_train_geo.cluster.topology import Link, Topology, Uplink
from ray_train_geo.planning.planner import plan
from ray_train_geo.planning.problem import PlanOptions

_GBPS = 1e9 / 8  # bytes per second
_WINDOW_BYTES = 16.6e6
_KINDS = ("V100-16G", "V100-16G", "V100-16G", "A40", "A100-40G", "A100-80G", "A10G", "T4")


def class_structured(seed: int) -> Topology:
    """A topology of 8 to 64 devices that depends on the seed alone."""
    rng = random.Random(seed)
    regions = rng.randint(2, 8)
    on_node = rng.choice([1, 2, 4, 8])
    most = max(1, 64 // (regions * on_node))
    nodes = rng.randint(max(1, most // 2), most)
    kinds = [rng.choice(_KINDS)] * 2
    if rng.random() < 0.4:
        kinds[1] = rng.choice(_KINDS)
    nic_gbps = rng.choice([10.0, 25.0, 100.0])
    inside = Link(rng.choice([0.1, 0.5, 1.0, 5.0]) / 1e3, nic_gbps * rng.choice([0.2, 1.0]) * _GBPS)
    continents = rng.choice([1, 1, 2])
    far = Link(rng.choice([80, 120]) / 1e3, rng.choice([0.5, 0.8]) * _GBPS, _WINDOW_BYTES)
    near = Link(rng.choice([5, 10, 35]) / 1e3, rng.choice([1.0, 1.25, 2.5]) * _GBPS, _WINDOW_BYTES)
    devices = tuple(
        gpu(kinds[r % 2]).device(f"r{r}/n{n}/{i}", f"r{r}/n{n}", f"r{r}")
        for r in range(regions)
        for n in range(nodes)
        for i in range(on_node)
    )
    names = [f"r{r}" for r in range(regions)]
    home = {name: r * continents // regions for r, name in enumerate(names)}
    return Topology(
        devices,
        node_links={(d.node, d.node): Link(0.0, 200 * _GBPS) for d in devices if on_node > 1},
        region_links={(n, n): inside for n in names}
        | {(a, b): near if home[a] == home[b] else far for a, b in permutations(names, 2)},
        node_uplinks={d.node: Uplink(nic_gbps * _GBPS, nic_gbps * _GBPS) for d in devices},
        default_link=None,
    )


def described(topology: Topology) -> str:
    """Such as ``4 x 2 x 8 A40 + T4``: regions, nodes of each, devices of each node."""
    regions = {d.region for d in topology.devices}
    nodes = {d.node for d in topology.devices}
    kinds = dict.fromkeys(d.type for d in topology.devices)
    each = len(nodes) // len(regions), len(topology.devices) // len(nodes)
    return f"{len(regions)} x {each[0]} x {each[1]} {' + '.join(kinds)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=20, help="how many")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--codecs", default="none")
    args = parser.parse_args()
    options = PlanOptions(codecs=tuple(args.codecs.split(",")))
    gaps = []
    for seed in range(args.first, args.first + args.seeds):
        topology = class_structured(seed)
        began = time.process_time()
        found = plan(topology, job(args.batch), VOCAB, options)
        took_s = time.process_time() - began
        assert found.certificate is not None
        gaps.append(found.certificate.gap)
        print(
            f"{seed:3d} {described(topology):28s} plan {found.predicted_step_s:8.3f} s  bound "
            f"{found.certificate.lower_bound:8.3f}  gap {gaps[-1]:6.1%}  "
            f"{len(found.pipelines)} pipelines on {found.world_size} of {len(topology.devices)}, "
            f"{found.gradient_sync}, {took_s:.1f} CPU s",
            flush=True,
        )
    print(f"median gap {statistics.median(gaps):.1%}")


if __name__ == "__main__":
    main()
