"""The workers of a run as Ray actors: started, found again by their names, and ended.

They are detached, so that a coordinator that is killed does not take them along: its successor
finds them.  Whoever ends a run for good ends them, too; and a worker that hears from nobody ends
itself (see :mod:`ray_train_geo.actors.stage_worker`).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_train_geo.actors.stage_worker import Adopted, StageWorker
from ray_train_geo.cluster.topology import Device
from ray_train_geo.spec import JobSpec

__all__ = ["NAMESPACE", "Workforce", "end_worker", "end_workers", "take_over"]

NAMESPACE = "ray_train_geo"
_ADOPTION_DEADLINE_S = 3.0


class Workforce:
    """Starts workers.

    Args:
        session: of the mission.
        incarnation: of the coordinator: no two workers ever have the same name.
        coordinator: the actor that workers report to.
    """

    def __init__(self, session: str, incarnation: int, coordinator: Any) -> None:
        self.session = session
        self._incarnation = incarnation
        self._coordinator = coordinator
        self._count = itertools.count()  # one step of it is safe from several threads

    def start(self, device: Device, job: JobSpec) -> tuple[str, Any]:
        """A worker's name, and the actor; whether it can start shows when it is called."""
        name = f"{_prefix(self.session)}{self._incarnation}-{next(self._count)}"
        needs = dict(job.scaling.resources_per_worker)
        cpus, gpus = needs.pop("CPU", 0.0), needs.pop("GPU", 0.0)
        options: dict[str, Any] = {}
        if gpus:
            # What NCCL transports need so that a posted receive can't hold up computation; see
            # transport.nccl.  On a CPU there is nothing to set: Ray gives a worker as many threads
            # as it has cores, and one without an environment of its own starts seconds sooner.
            needed = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_MODULE_LOADING": "EAGER"}
            options["runtime_env"] = {
                "env_vars": {"OMP_NUM_THREADS": str(max(1, int(cpus))), **needed}
            }
        actor: Any = StageWorker  # what @ray.remote has made of the class
        worker = actor.options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=cpus,
            num_gpus=gpus,
            resources=needs or None,
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(device.node, soft=False),
            **options,
        ).remote(self._coordinator, job.failure.coordinator_patience_s)
        return name, worker


def take_over(session: str, names: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Adopted]]:
    """The session's workers for a new coordinator.  Those that ``names`` lacks end.

    Args:
        names: of the workers that are wanted, by device id.

    Returns:
        Those of them that are there, and what they say if they answer in time, by device id.
    """
    there = _workers_of(session)
    end_workers(session, keep=names.values())
    found = {device: there[name] for device, name in names.items() if name in there}
    calls = {device: worker.adopt.remote() for device, worker in found.items()}
    if calls:
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=_ADOPTION_DEADLINE_S)
    said: dict[str, Adopted] = {}
    for device, call in calls.items():
        with contextlib.suppress(RayError):  # its pulse will tell
            said[device] = ray.get(call, timeout=0)
    return found, said


def end_workers(session: str, keep: Collection[str] = ()) -> None:
    """End all workers of the session but those called ``keep``."""
    for name, worker in _workers_of(session).items():
        if name not in keep:
            end_worker(worker)


def end_worker(worker: Any) -> None:
    with contextlib.suppress(RayError):
        ray.kill(worker)


def _prefix(session: str) -> str:
    return f"worker-{session}-"


def _workers_of(session: str) -> dict[str, Any]:
    """The session's workers that Ray knows to be there, by name."""
    found = {}
    for actor in list_named_actors(all_namespaces=True):
        name = actor["name"]
        if actor["namespace"] == NAMESPACE and name.startswith(_prefix(session)):
            with contextlib.suppress(ValueError):  # it has ended since
                found[name] = ray.get_actor(name, NAMESPACE)
    return found
