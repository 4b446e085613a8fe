"""A plan and a crew for it: plan on what is known, start workers, measure, and plan again."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray_train_geo.actors.crew import Crew
from ray_train_geo.actors.discovery import wait_for_devices
from ray_train_geo.actors.recorder import Recorder
from ray_train_geo.actors.surveying import survey
from ray_train_geo.actors.workforce import Workforce
from ray_train_geo.cluster.topology import Device, Topology
from ray_train_geo.cluster.topology_file import load_topology
from ray_train_geo.errors import StorageError
from ray_train_geo.planning.budget import Budget
from ray_train_geo.planning.plan import Plan
from ray_train_geo.planning.planner import plan as make_plan
from ray_train_geo.spec import JobSpec
from ray_train_geo.training.checkpoint import CheckpointStore
from ray_train_geo.training.mission import Mission, check_space

__all__ = ["fixed_workers", "job_for", "measured", "most_workers", "staff"]

_PLANNING_S = 10.0
"""The driver waits for the coordinator while it plans."""


def staff(
    mission: Mission,
    store: CheckpointStore,
    recorder: Recorder,
    workforce: Workforce,
    after_loss: bool,
    watch: Callable[[], None],
) -> tuple[Topology, Plan, Crew]:
    """What Ray has free, a plan for it, and the workers that will carry it out.

    Args:
        workforce: starts workers.
        after_loss: a crew was just dismissed, and Ray is still freeing what it had.
        watch: called while waiting for devices; what it raises ends the wait.

    Raises:
        ClusterError: too few devices.
        PlanError: no plan fits them.
        StorageError: checkpoints have no room, or storage is not shared by all nodes.
        LostWorkerError: a worker was lost while it started.
    """
    job = mission.job
    links = load_topology(Path(job.scaling.topology)) if job.scaling.topology else None
    fixed = fixed_workers(job)
    wanted = most_workers(job)
    needed = max(fixed or 1, job.scaling.min_devices)
    devices = wait_for_devices(job.scaling, needed, wanted, after_loss, watch)
    first = make_plan(
        _topology(devices, links), job, mission.vocab_size, budget=Budget(_PLANNING_S), prove=False
    )
    # After the plan: a model that fits no memory should not be called too large for the disk.
    check_space(mission.dims, job.checkpoint.keep, store)
    used = {stage.device for pipeline in first.pipelines for stage in pipeline.stages}
    # Where the plan is open, all devices are measured before it is made.
    chosen = [d for d in devices if fixed is None or d.id in used][:wanted]
    crew = Crew(chosen, job, workforce, recorder)
    try:
        topology = _topology(measured(crew, mission, store), links)
        if links is None:
            found = survey(crew, {}, job.parallelism.most_flows, job.scaling.probe_s)
            topology = dataclasses.replace(topology, node_links=found)
        topology = topology.striped(job.parallelism.most_flows)
        began = time.perf_counter()
        plan = make_plan(topology, job, mission.vocab_size, budget=Budget(_PLANNING_S))
        plan = dataclasses.replace(plan, search_s=time.perf_counter() - began)
        crew.release_unused(plan)
    except BaseException:
        crew.dismiss()
        raise
    recorder.event("topology", links=_links_json(topology), simulated=job.scaling.emulate_links)
    return topology, plan, crew


def measured(crew: Crew, mission: Mission, store: CheckpointStore) -> list[Device]:
    """The crew's devices with their measured speed and memory; all share the storage.

    Raises:
        ClusterError, LostWorkerError: as :meth:`Crew.hello`.
        StorageError: storage is not shared with a node.
    """
    scaling = mission.job.scaling
    probe = store.probe()
    infos = crew.hello(mission.dims, store.root, probe)
    store.remove_probe(probe)
    blind = sorted({i.host for i in infos.values() if not i.sees_storage})
    if blind:
        raise StorageError(
            f"checkpoint storage {store.root} is not shared with {', '.join(blind)}; set "
            "checkpoint.storage_path to a shared folder or an fsspec URL"
        )
    share = min(1.0, scaling.resources_per_worker.get("GPU", 0.0) or 1.0)
    found = []
    for device in crew.devices:
        info, memory = infos[device.id], device.memory_bytes
        if info.memory_bytes is not None and scaling.memory_per_worker_bytes is None:
            memory = int(info.memory_bytes * share)
        found.append(dataclasses.replace(device, flops_per_s=info.flops_per_s, memory_bytes=memory))
    crew.measured(_level(found))
    return list(crew.devices)


def _level(devices: list[Device]) -> list[Device]:
    """Devices of one type on one node are equally fast.

    They were measured side by side, and what differs is who got the processor when: a plan must not
    be fitted to that.
    """
    speeds: dict[tuple[str, str], list[float]] = {}
    for device in devices:
        speeds.setdefault((device.node, device.type), []).append(device.flops_per_s)
    return [
        dataclasses.replace(d, flops_per_s=statistics.median(speeds[d.node, d.type]))
        for d in devices
    ]


def fixed_workers(job: JobSpec) -> int | None:
    """How many workers the spec fixes, if it does."""
    pipelines, boundaries = job.fixed_pipelines(), job.stage_boundaries()
    if boundaries is not None:
        if len(boundaries) > 1:
            return sum(len(b) - 1 for b in boundaries)
        return (len(boundaries[0]) - 1) * pipelines if pipelines is not None else None
    if pipelines is not None and job.parallelism.stages is not None:
        return pipelines * job.parallelism.stages
    return None


def most_workers(job: JobSpec) -> int | None:
    """How many workers the job can use at most, if there is a limit."""
    return fixed_workers(job) or job.scaling.max_devices


def job_for(job: JobSpec, devices: int) -> JobSpec:
    """The job as it is planned for ``devices`` survivors.

    Where they are too few for the parallelism that the spec fixes, the plan is open until there
    are enough again: a smaller or uneven plan computes the same.
    """
    fixed = fixed_workers(job)
    pipelines = job.fixed_pipelines()
    if devices >= (fixed or pipelines or 1):
        return job
    free = {"pipelines": None, "stages": None, "layers": None, "microbatches": None}
    return job.model_copy(update={"parallelism": job.parallelism.model_copy(update=free)})


def _topology(devices: list[Device], links: Topology | None) -> Topology:
    if links is None:
        return Topology(tuple(devices))
    return links.with_devices(devices)


def _links_json(topology: Topology) -> list[dict[str, Any]]:
    """The links that were measured, or read from a file."""
    links = {**topology.region_links, **topology.node_links}
    return [
        {
            "from": source,
            "to": target,
            "latency_s": link.latency_s,
            "bandwidth_bytes_per_s": link.bandwidth_bytes_per_s,
        }
        for (source, target), link in links.items()
    ]
