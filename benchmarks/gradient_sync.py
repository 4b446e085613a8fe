"""One gradient sync of eight members in two, three and four regions: each mode, measured beside
predicted.

    python benchmarks/gradient_sync.py [--megabytes 1] [--repeats 2] [--only "share"] [--json]

Members are threads of this process that send over real gloo groups; links, NICs and uplinks are
simulated (``transport/shaping.py``).  All members begin at once, with every bucket ready, so that
nothing hides behind a backward.  What is predicted is the planner's closed form.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import get_args

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from torch.distributed import HashStore

from ray_train_geo.cluster.topology import Device, Link, Topology, Uplink
from ray_train_geo.observe.trace import Tracer
from ray_train_geo.planning.link_table import LinkTable
from ray_train_geo.planning.shard_sizes import shares_by_speed
from ray_train_geo.planning.sync_cost import SyncGroups, synced_s
from ray_train_geo.planning.sync_routes import Route, route_of, sites_of
from ray_train_geo.spec import GradientSyncName
from ray_train_geo.training.buckets import Bucket
from ray_train_geo.training.exact_sums import ExactSums
from ray_train_geo.training.gradient_sync import GradientSync
from ray_train_geo.transport.gloo import GlooEndpoint
from ray_train_geo.transport.shaping import Shaper

MBIT = 1e6 / 8  # bytes per second
DEADLINE_S = 120.0
BUCKETS = 4
MEMBERS = 8
NO_LIMIT = 1e10  # bytes per second


@dataclass(frozen=True, slots=True)
class Network:
    """Where members are, and what joins them.

    Args:
        sizes: members of each region.
        uplink_bytes_per_s: shared by all flows between two regions.
        nics: of some nodes; the others' are no limit.
    """

    name: str
    sizes: tuple[int, ...]
    near: Link
    far: Link
    uplink_bytes_per_s: float | None = None
    nics: Mapping[int, float] = field(default_factory=dict)

    @property
    def topology(self) -> Topology:
        regions = [f"r{r}" for r, size in enumerate(self.sizes) for _ in range(size)]
        devices = tuple(Device(f"n{i}/0", f"n{i}", region=r) for i, r in enumerate(regions))
        pairs = list(product(dict.fromkeys(regions), repeat=2))
        uplinks = {(a, b): self.uplink_bytes_per_s for a, b in pairs if a != b}
        return Topology(
            devices,
            region_links={(a, b): self.near if a == b else self.far for a, b in pairs},
            region_uplinks={k: v for k, v in uplinks.items() if v is not None},
            node_uplinks={
                d.node: Uplink(*[self.nics.get(i, NO_LIMIT)] * 2) for i, d in enumerate(devices)
            },
        )


def link(latency_ms: float, mbit: float) -> Link:
    return Link(latency_ms / 1000, mbit * MBIT)


NETWORKS = (
    Network("2 regions, links of their own", (4, 4), link(1, 40), link(40, 10)),
    Network("2 regions share an uplink", (4, 4), link(1, 40), link(40, 10), 10 * MBIT),
    Network("5 + 3 share an uplink", (5, 3), link(1, 40), link(40, 10), 10 * MBIT),
    Network("4 regions share uplinks", (2, 2, 2, 2), link(1, 40), link(60, 10), 5 * MBIT),
    Network("4 regions, far and fast", (2, 2, 2, 2), link(1, 80), link(120, 80)),
    Network("one slow NIC of 8", (4, 4), link(1, 40), link(20, 40), nics={7: 4 * MBIT}),
)


def predicted_s(
    network: Network, mode: GradientSyncName, size_bytes: int, shares: list[float] | None
) -> float:
    members, zeros = np.arange(MEMBERS), np.zeros(MEMBERS)
    return float(
        synced_s(
            [SyncGroups(np.array([float(size_bytes)]), members[None, :])],
            mode,
            members,
            zeros,
            zeros,
            LinkTable.of(network.topology),
            size_bytes / BUCKETS,
            None if shares is None else np.array(shares),
        ).max()
    )


def measured_s(
    network: Network,
    mode: GradientSyncName,
    size_bytes: int,
    shares: list[float] | None,
    repeats: int,
) -> float:
    """Median time until the last member has all sums."""
    topology, store = network.topology, HashStore()
    devices, shaper = [d.id for d in topology.devices], Shaper(topology)
    ranks = tuple(range(MEMBERS))
    sites = sites_of([d.region for d in topology.devices], [d.node for d in topology.devices])
    routes: dict[tuple[int, ...], Route] = {}
    if mode != "allreduce":
        routes[ranks] = route_of(mode, sites, shares)
    together, took_s = threading.Barrier(MEMBERS), np.zeros((repeats, MEMBERS))
    failed: list[BaseException] = []

    def work(rank: int) -> None:
        endpoint = GlooEndpoint(store, "127.0.0.1", DEADLINE_S)
        inner, second = (endpoint.connect(name, rank, MEMBERS) for name in ("first", "second"))
        transport = shaper.wrap(inner, devices, DEADLINE_S, second)
        buckets = [Bucket(ranks, (f"layers.{i}.w",)) for i in range(BUCKETS)]
        buffers = {i: torch.ones(size_bytes // BUCKETS // 4) for i in range(BUCKETS)}
        sums = ExactSums(buckets, buffers, {ranks: transport}, mode, routes)
        sync = GradientSync(buckets, {ranks: transport}, sums, Tracer(enabled=False))
        for repeat in range(repeats):
            together.wait()
            began = time.perf_counter()
            sync.begin(repeat)
            for bucket in range(BUCKETS):
                sync.ready(bucket)
            sync.finish(DEADLINE_S)
            took_s[repeat, rank] = time.perf_counter() - began
        together.wait()
        transport.close()

    def guarded(rank: int) -> None:
        try:
            work(rank)
        except BaseException as e:
            failed.append(e)
            together.abort()

    threads = [threading.Thread(target=guarded, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return statistics.median(took_s.max(axis=1).tolist())


@dataclass(frozen=True, slots=True)
class Row:
    network: str
    mode: str
    predicted_s: float
    measured_s: float

    def __str__(self) -> str:
        off = self.predicted_s / self.measured_s - 1
        return (
            f"{self.network:32} {self.mode:24} {self.predicted_s:9.3f} {self.measured_s:9.3f} "
            f"{off:+7.1%}"
        )


def rows(size_bytes: int, repeats: int, only: str) -> Iterator[Row]:
    for network in NETWORKS:
        if only not in network.name:
            continue
        cases: list[tuple[str, GradientSyncName, list[float] | None]] = [
            (mode, mode, None) for mode in get_args(GradientSyncName)
        ]
        if network.nics:
            table = LinkTable.of(network.topology)
            shares = shares_by_speed(size_bytes, np.arange(MEMBERS), table).tolist()
            cases.append(("sharded_ps, by speed", "sharded_ps", shares))
        for name, mode, shares in cases:
            yield Row(
                network.name,
                name,
                predicted_s(network, mode, size_bytes, shares),
                measured_s(network, mode, size_bytes, shares, repeats),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--megabytes", type=float, default=1.0, help="gradients of each member")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", default="", help="networks with this in their names")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    if not args.json:
        heading = f"{'predicted':>9} {'measured':>9} {'error':>7}"
        print(f"simulated links, {args.megabytes:g} MB\n{'network':32} {'mode':24} {heading}")
    for row in rows(int(args.megabytes * 1e6), args.repeats, args.only):
        found.append(row)
        if not args.json:
            print(row, flush=True)
    if args.json:
        print(json.dumps({"megabytes": args.megabytes, "rows": [asdict(row) for row in found]}))


if __name__ == "__main__":
    main()
