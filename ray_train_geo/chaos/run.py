"""A job under faults, for real: a cluster, a run, what goes wrong in it, and what must hold after.

cluster ─▶ train ─▶ fault ─▶ fault ... ─▶ stop ─▶ leaks? ─▶ cluster ends ─▶ leaks?
                                                                 │
                      undisturbed reference in this process ─────┴─▶ steps, samples, losses
"""

from __future__ import annotations

import contextlib
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from ray_train_geo.chaos.census import check_cluster, check_machine, shared_memory
from ray_train_geo.chaos.disk import Disk, mounted_disk
from ray_train_geo.chaos.faults import Fault
from ray_train_geo.chaos.goodput import Goodput, goodput
from ray_train_geo.chaos.injector import Injector
from ray_train_geo.chaos.island import Island, island
from ray_train_geo.chaos.local_cluster import local_cluster
from ray_train_geo.chaos.processes import adopting_orphans
from ray_train_geo.chaos.recovery import Recovery, median_step_s, recoveries
from ray_train_geo.chaos.session import Session
from ray_train_geo.chaos.spot import longest_notice_s, nodes_at_first
from ray_train_geo.chaos.tail import RunTail
from ray_train_geo.chaos.trace_player import TracePlayer
from ray_train_geo.chaos.verify import (
    Check,
    check_losses,
    check_lost_steps,
    check_samples,
    check_steps,
)
from ray_train_geo.cluster.traces import SpotTrace
from ray_train_geo.data.dataset import TokenDataset, open_dataset
from ray_train_geo.data.order import SampleOrder
from ray_train_geo.errors import InputError
from ray_train_geo.observe.run_directory import RunDirectory
from ray_train_geo.spec import JobSpec, parse_job
from ray_train_geo.training.reference import run_reference

__all__ = ["ChaosResult", "run_chaos"]

_TOLERANCE = 1e-4
_WAIT_S = 180.0
"""Until all nodes have joined: this machine may have much else to do."""
_NOTICE_S = 30.0
_LIMIT_S = 600.0
_SPARE_S = 300.0
"""For a run under a trace to begin and to end, beyond the trace itself."""


@dataclass(frozen=True, slots=True)
class ChaosResult:
    """What happened, and whether it was as it must be.

    Args:
        phase: how the run ended, as ``train`` says.
        step: the last one.
        median_step_s: of all steps, disturbed or not.
        path: the run directory.
        goodput: of a run under a trace that could be measured.
    """

    seed: int
    phase: str
    step: int
    generations: int
    median_step_s: float
    wall_s: float
    path: str
    recoveries: tuple[Recovery, ...]
    checks: tuple[Check, ...]
    goodput: Goodput | None = None

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "passed": self.passed,
            "phase": self.phase,
            "step": self.step,
            "generations": self.generations,
            "median_step_s": self.median_step_s,
            "wall_s": self.wall_s,
            "path": self.path,
            "recoveries": [r.to_json() for r in self.recoveries],
            "checks": [asdict(c) for c in self.checks],
            "goodput": None if self.goodput is None else self.goodput.to_json(),
        }


def run_chaos(
    job: JobSpec,
    faults: Sequence[Fault] = (),
    *,
    trace: SpotTrace | None = None,
    seed: int = 0,
    nodes: int = 4,
    workers_per_node: int = 1,
    replace: bool = True,
    limit_s: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> ChaosResult:
    """Train ``job`` on a cluster of its own while ``faults`` happen, then look at what it did.

    Args:
        job: it trains in fp32; where its workers run is up to the cluster.
        trace: instead of faults: when nodes come and go, in seconds of the run (`chaos.spot`).
        nodes: at the beginning, with one CPU for each of ``workers_per_node``; a trace has its own.
        replace: a new node for each that is gone for good, once the run is over that.
        limit_s: the run is stopped after that, whatever is left to inject.  Default: 600, or the
            trace's length and 300.
        say: is told what happens.

    Raises:
        InputError: the job, or a fault that this machine can't do.
        ClusterError: Ray does not start here.
    """
    if job.training.precision != "fp32":
        raise InputError(
            f"training.precision is {job.training.precision}, but the undisturbed reference trains "
            "in fp32: add --set training.precision=fp32"
        )
    data = open_dataset(job.data, job.training.seq_len)
    shared = shared_memory()
    spared = [child.pid for child in psutil.Process().children(recursive=True)]
    if trace is None:
        drains = [f.seconds for f in faults if f.kind == "drain" and f.seconds is not None]
        notice_s, limit_s = max(drains, default=_NOTICE_S), limit_s or _LIMIT_S
    else:
        nodes, notice_s = len(nodes_at_first(trace)), longest_notice_s(trace) or _NOTICE_S
        limit_s = limit_s or trace.end_s + _SPARE_S
    began = time.monotonic()
    with adopting_orphans(), _storage(job, faults) as (placed, disk):
        tail = RunTail(placed.run.directory)
        say(f"starting a cluster of {nodes} nodes")
        with (
            _network(faults) as network,
            local_cluster(nodes, workers_per_node, notice_s=notice_s, network=network) as cluster,
        ):
            disturbance: Injector | TracePlayer
            if trace is None:
                rng = random.Random(seed)
                disturbance = Injector(
                    cluster, tail, tuple(faults), rng, replace=replace, disk=disk
                )
            else:
                disturbance = TracePlayer(cluster, tail, trace)
            session = Session(placed, cluster, tail, disturbance, say, disk)
            try:
                session.train(limit_s)
                checks = [*session.checks(), *session.census.checks(), *check_cluster(cluster)]
            finally:
                session.end()
        checks += check_machine(spared, shared, session.pids)
    say(f"training the undisturbed reference: {tail.step} steps")
    return ChaosResult(
        seed=seed,
        phase=session.phase,
        step=tail.step,
        generations=len(tail.of_kind("generation")),
        median_step_s=median_step_s(tail.records),
        wall_s=time.monotonic() - began,
        path=str(job.run.directory),
        recoveries=tuple(recoveries(disturbance.injections, tail.events, tail.records)),
        checks=(*checks, *_record_checks(tail, placed, data)),
        goodput=None
        if isinstance(disturbance, Injector)
        else goodput(
            tail.records,
            tail.of_kind("generation"),
            disturbance.presences(),
            until_s=min(session.ended_s, disturbance.end_s),
            devices_per_node=workers_per_node,
            started_s=session.started_s,
            interval=job.checkpoint.interval,
        ),
    )


def _record_checks(tail: RunTail, job: JobSpec, data: TokenDataset) -> list[Check]:
    """What the run has written down, beside an undisturbed run of its steps."""
    training, dims = job.training, job.dims(data.vocab_size)
    order = SampleOrder(training.seed, data.samples, training.global_batch, training.microbatch)
    torch.set_num_threads(1)  # as the workers, beside whatever else this machine does
    reference = run_reference(job, dims, until=tail.step) if tail.step else []
    return [
        check_steps(tail.records, tail.step),
        check_samples(tail.records, order),
        check_losses(tail.records, [r.loss for r in reference], _TOLERANCE),
        check_lost_steps(tail.of_kind("restore"), job.failure.memory_copies),
    ]


@contextlib.contextmanager
def _storage(job: JobSpec, faults: Sequence[Fault]) -> Iterator[tuple[JobSpec, Disk | None]]:
    """The job as it is run, and a disk of its own where one is to be filled.

    What the run leaves on that is moved to where the job wants it.
    """
    if all(f.kind != "fill-disk" for f in faults):
        yield _placed(job), None
        return
    if not job.checkpoint.interval:
        raise InputError(
            "fill-disk ends a run, which is resumed from its newest checkpoint, but this one "
            "makes none: add --set checkpoint.interval=10"
        )
    directory = RunDirectory.create(job.run.directory).path
    with mounted_disk() as disk:
        try:
            yield _placed(job, disk.path), disk
        finally:
            if (left := disk.path / directory.name).exists():
                shutil.copytree(left, directory, dirs_exist_ok=True)


def _placed(job: JobSpec, storage: Path | None = None) -> JobSpec:
    """The job with workers of one CPU each, on whatever nodes there are.

    Args:
        storage: for everything that it writes.
    """
    raw = job.model_dump(mode="json", exclude_unset=True)
    scaling = raw.get("scaling", {})
    for field in ("topology", "label_selector"):
        scaling.pop(field, None)
    raw["scaling"] = {**scaling, "resources_per_worker": {"CPU": 1}, "wait_s": _WAIT_S}
    if storage is not None:
        raw["run"] = {**raw.get("run", {}), "storage_path": str(storage)}
        raw.get("checkpoint", {}).pop("storage_path", None)
    return parse_job(raw)


@contextlib.contextmanager
def _network(faults: Sequence[Fault]) -> Iterator[Island | None]:
    """A network that can be cut, if there is anything to cut."""
    if any(f.kind == "partition" for f in faults):
        with island() as found:
            yield found
    else:
        yield None
