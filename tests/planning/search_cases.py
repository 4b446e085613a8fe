"""Problems that tests of the planner's search share."""

from __future__ import annotations

from ray_train_geo.cluster.topology import Device, Link, Topology
from ray_train_geo.planning.problem import PlanOptions, Problem
from ray_train_geo.spec import JobSpec, parse_job

__all__ = ["NEAR", "job", "problem", "regions"]


def job(model="gpt3-small", batch=64, training=None, **parallelism) -> JobSpec:
    return parse_job(
        {
            "model": {"name": model},
            "data": {"path": "not-read"},
            "training": {
                "steps": 1,
                "global_batch": batch,
                "seq_len": 1024,
                "precision": "fp16",
                "recompute": True,
            }
            | (training or {}),
            "parallelism": parallelism,
        }
    )


FAR, NEAR = Link(0.05, 1e8), Link(0.001, 1e9)


def regions(counts, *, flops=(5e13,), gpus=1, far=FAR, near=NEAR):
    """Regions a, b, ... of so many nodes each; speeds are dealt out region by region."""
    names = "abcdefgh"[: len(counts)]
    devices = tuple(
        Device(
            f"{r}{n}/{g}",
            f"{r}{n}",
            region=r,
            type="gpu",
            flops_per_s=flops[i % len(flops)],
            memory_bytes=16 * 10**9,
            price_per_hour=flops[i % len(flops)] / 2e13,
        )
        for i, (r, count) in enumerate(zip(names, counts, strict=True))
        for n in range(count)
        for g in range(gpus)
    )
    links = {(r, q): near if r == q else far for r in names for q in names}
    return Topology(devices, region_links=links)


def problem(topology, wish=None, **options) -> Problem:
    return Problem.of(topology, wish or job(), 50257, PlanOptions(**options))
