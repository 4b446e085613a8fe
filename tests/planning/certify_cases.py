"""Small random problems and plans, which bounds are tried on."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
from hypothesis import strategies as st

from ray_train_geo.cluster.topology import Device, Link, Topology, Uplink
from ray_train_geo.planning.plan import PipelinePlan, StagePlan
from ray_train_geo.planning.problem import Problem
from ray_train_geo.spec import parse_job

__all__ = [
    "CODECS",
    "MODES",
    "SCHEDULES",
    "machines",
    "pipelines_of",
    "plans",
    "problem",
    "topologies",
]

SCHEDULES = ("1f1b", "gpipe", "zero-bubble")
MODES = ("allreduce", "sharded_ps", "central_ps")
CODECS = ("none", "bf16", "int8", "int4")


def problem(topology, *, layers=4, parallelism=None, scaling=None, tied=True, **training):
    job = parse_job(
        {
            "model": {"layers": layers, "dim": 64, "heads": 4, "tied_embeddings": tied},
            "data": {"path": "python://stdlib"},
            "training": {"steps": 1, "global_batch": 8, "seq_len": 64} | training,
            "parallelism": parallelism or {},
            "scaling": scaling or {},
        }
    )
    return Problem.of(topology, job, 257)


def machines(count, *, per_node=1, regions=1, **changes):
    return tuple(
        Device(
            f"n{i // per_node}/{i % per_node}",
            f"n{i // per_node}",
            region=f"r{i // per_node % regions}",
            **({"price_per_hour": 1.0} | changes),
        )
        for i in range(count)
    )


def pipelines_of(chains, cuts, microbatches, warmups, codecs, deferred=None):
    plans, first = [], 0
    for p, (chain, cut, count, warmup, names) in enumerate(
        zip(chains, cuts, microbatches, warmups, codecs, strict=True)
    ):
        later = deferred[p] if deferred else [0] * len(chain)
        stages = tuple(
            StagePlan(d.id, (cut[s], cut[s + 1]), warmup[s], codec=names[s], deferred=later[s])
            for s, d in enumerate(chain)
        )
        plans.append(PipelinePlan(stages, count, first))
        first += count
    return plans


@st.composite
def topologies(draw):
    regions = draw(st.integers(1, 3))
    devices, nodes = [], draw(st.integers(1, 4))
    for n in range(nodes):
        for i in range(draw(st.integers(1, 3))):
            flops, price = draw(st.sampled_from([(2e10, 1.0), (5e10, 3.0), (8e9, 0.2)]))
            region = f"r{n % regions}"
            devices.append(
                Device(f"n{n}/{i}", f"n{n}", region, flops_per_s=flops, price_per_hour=price)
            )
    links = st.builds(
        Link,
        latency_s=st.sampled_from([0.0, 1e-3, 2e-2]),
        bandwidth_bytes_per_s=st.sampled_from([1e6, 2e7, 1e9]),
        window_bytes=st.sampled_from([1e5, float("inf")]),
    )
    names = [f"r{r}" for r in range(regions)]
    by_node = {}
    if draw(st.booleans()) and nodes > 1:
        by_node = {("n0", "n1"): draw(links), ("n1", "n0"): draw(links)}
    nic = {"n0": Uplink(draw(st.sampled_from([1e6, 1e8])), 2e7)} if draw(st.booleans()) else {}
    uplinks = {}
    if draw(st.booleans()):
        rates = st.sampled_from([2e5, 1e6, 1e7])
        uplinks = {(a, b): draw(rates) for a, b in permutations(names, 2)}
    return Topology(
        tuple(devices),
        node_links=by_node,
        region_links={pair: draw(links) for pair in product(names, names)},
        node_uplinks=nic,
        region_uplinks=uplinks,
    )


@st.composite
def plans(draw, p):
    layers, total = p.dims.layers, p.job.training.total_microbatches
    left = draw(st.permutations(p.topology.devices))
    chains = []
    while left and len(chains) < total and (not chains or draw(st.booleans())):
        depth = draw(st.integers(1, min(layers, len(left))))
        chains.append(left[:depth])
        left = left[depth:]
    cuts = []
    for chain in chains:
        inner = draw(st.permutations(range(1, layers)))[: len(chain) - 1]
        cuts.append((0, *sorted(inner), layers))
    more = draw(st.permutations(range(1, total)))[: len(chains) - 1]
    counts = np.diff([0, *sorted(more), total]).tolist()
    warmups = [
        sorted((draw(st.integers(0, m - 1)) for _ in chain), reverse=True)
        for chain, m in zip(chains, counts, strict=True)
    ]
    codecs = [[draw(st.sampled_from(CODECS)) for _ in chain] for chain in chains]
    deferred = [
        [draw(st.integers(0, m)) for _ in chain] for chain, m in zip(chains, counts, strict=True)
    ]
    return pipelines_of(chains, cuts, counts, warmups, codecs, deferred)
