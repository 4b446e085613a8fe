"""The workers of a generation, as one: start them, call them all, find out who failed first."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_train_geo.actors.recorder import Recorder
from ray_train_geo.actors.stage_worker import StageWorker, WorkerInfo
from ray_train_geo.cluster.topology import DEFAULT_LINK, Device, Link
from ray_train_geo.errors import ClusterError, GeoError, TransportError, WorkerError
from ray_train_geo.model.catalog import ModelDims
from ray_train_geo.observe.trace import Span
from ray_train_geo.planning.plan import Plan
from ray_train_geo.spec import JobSpec
from ray_train_geo.training.assignment import Assignment, Outcome

__all__ = ["Crew", "LostWorkerError"]

_HELLO_DEADLINE_S = 180.0
_PING_DEADLINE_S = 60.0
_POLL_S = 0.5
_WITNESS_S = 3.0
_TRACE_DEADLINE_S = 30.0


class LostWorkerError(Exception):
    """A worker or a link was lost: what was computed is sound, and may go on without it."""

    def __init__(self, error: GeoError) -> None:
        super().__init__(str(error))
        self.error = error


class Crew:
    """One Ray actor a device.

    Args:
        devices: where to start workers.
        coordinator: the actor that workers report to.
    """

    def __init__(
        self, devices: Sequence[Device], job: JobSpec, coordinator: Any, recorder: Recorder
    ) -> None:
        self._job = job
        self._recorder = recorder
        self.devices = tuple(devices)
        self._workers = {d.id: _start(d, job, coordinator) for d in devices}
        self._infos: dict[str, WorkerInfo] = {}
        self._ranks: list[str] = []

    def hello(self, dims: ModelDims, checkpoint_root: str, probe: str) -> Mapping[str, WorkerInfo]:
        """Where every worker is and how fast, by device id.

        Raises:
            ClusterError: a worker did not start.
            LostWorkerError: a worker was lost again.
        """
        calls = {
            device: worker.hello.remote(dims, self._job.training, checkpoint_root, probe)
            for device, worker in self._workers.items()
        }
        try:
            self._infos = self._all(calls, _HELLO_DEADLINE_S)
        except GetTimeoutError:
            raise ClusterError(
                f"Ray did not start all {len(calls)} workers within {_HELLO_DEADLINE_S:g} s; are "
                "the resources in scaling.resources_per_worker still free?"
            ) from None
        return self._infos

    def links(self) -> dict[tuple[str, str], Link]:
        """The links between all pairs of the crew's nodes, with measured latency.

        One worker of each node pings one of every other.  Bandwidth is not measured: it is that of
        the default link.

        Raises:
            LostWorkerError: a worker is gone, or can't reach another.
        """
        first = {info.node_id: device for device, info in reversed(self._infos.items())}
        places = {n: (self._infos[d].address, self._infos[d].ping_port) for n, d in first.items()}
        if len(places) < 2:
            return {}
        calls = {
            device: self._workers[device].ping.remote(
                {n: p for n, p in places.items() if n != node}
            )
            for node, device in first.items()
        }
        try:
            answers = self._all(calls, _PING_DEADLINE_S)
        except GetTimeoutError:
            error = TransportError(f"the nodes did not ping each other in {_PING_DEADLINE_S:g} s")
            raise LostWorkerError(error) from None
        return {
            (node, other): Link(round_trip / 2, DEFAULT_LINK.bandwidth_bytes_per_s)
            for node, device in first.items()
            for other, round_trip in answers[device].items()
        }

    def assign(self, plan: Plan) -> None:
        """Give out the plan's roles; workers without one end."""
        self._ranks = [plan.stage(role).device for role in plan.roles()]
        for device in set(self._workers) - set(self._ranks):
            _kill(self._workers.pop(device))

    def info(self, rank: int) -> WorkerInfo:
        return self._infos[self._ranks[rank]]

    def device(self, rank: int) -> Device:
        return next(d for d in self.devices if d.id == self._ranks[rank])

    def transport(self) -> Literal["gloo", "nccl"]:
        """What the job asks for, or the best that all workers can use.

        Raises:
            ClusterError: nccl is asked for, but a worker can't use it.
        """
        wanted = self._job.parallelism.transport
        gpus = self._job.scaling.resources_per_worker.get("GPU", 0.0)
        without = [self.info(r) for r in range(len(self._ranks)) if not self.info(r).nccl]
        if wanted == "nccl" and (without or gpus < 1):
            where = f"{without[0].host} ({without[0].device})" if without else "a shared GPU"
            raise ClusterError(
                f"parallelism.transport is nccl, but {where} can't use it: it needs a whole GPU "
                "a worker and `pip install ray-train-geo[gpu]` on every node"
            )
        return "gloo" if wanted == "gloo" or without or gpus < 1 else "nccl"

    def build(
        self, assignments: Sequence[Assignment], host: str, port: int, within_s: float
    ) -> None:
        """All workers take their roles.

        Raises:
            GeoError: what the first worker to fail raised.
            LostWorkerError: a worker or link was lost.
        """
        calls = {a.rank: self._worker(a.rank).build.remote(a, host, port) for a in assignments}
        try:
            self._all(calls, within_s)
        except GetTimeoutError:
            error = TransportError(f"the workers did not find each other within {within_s:g} s")
            raise LostWorkerError(error) from None

    def run(self, until: int, watch: Callable[[], None]) -> Outcome:
        """All workers run steps; ``watch`` is called all the while and may raise.

        Raises:
            GeoError, LostWorkerError: as :meth:`build`; or what ``watch`` raised.
        """
        calls = {rank: self._worker(rank).run.remote(until) for rank in range(len(self._ranks))}
        outcome: Outcome = self._all(calls, None, watch)[0]
        return outcome

    def interrupt(self) -> None:
        """Ask all workers to stop after a step (the same one for all)."""
        for worker in self._workers.values():
            worker.interrupt.remote()

    def traces(self) -> dict[int, list[Span]]:
        """What the workers recorded; those that don't answer are left out."""
        spans = {}
        calls = {r: self._worker(r).trace.remote() for r in range(len(self._ranks))}
        for rank, call in calls.items():
            with contextlib.suppress(RayError):
                spans[rank] = ray.get(call, timeout=_TRACE_DEADLINE_S)
        return spans

    def dismiss(self) -> None:
        """End all workers."""
        for worker in self._workers.values():
            _kill(worker)
        self._workers = {}

    # ------------------------------------------------------------------ calling all workers

    def _worker(self, rank: int) -> Any:
        return self._workers[self._ranks[rank]]

    def _all(
        self,
        calls: Mapping[Any, Any],
        within_s: float | None,
        watch: Callable[[], None] | None = None,
    ) -> dict[Any, Any]:
        """Results of ``calls`` by key; the first failure aborts the other workers' calls."""
        deadline = None if within_s is None else time.monotonic() + within_s
        keys, results = {call: key for key, call in calls.items()}, dict[Any, Any]()
        while len(results) < len(calls):
            waiting = [c for c in keys if keys[c] not in results]
            done, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
            if not done:
                done, _ = ray.wait(waiting, num_returns=1, timeout=_POLL_S)
            try:
                for call in done:
                    key = keys[call]
                    results[key] = ray.get(call)
                if watch is not None:
                    watch()
            except RayError as e:
                self._abort()
                raise self._root_cause(keys, key, e) from None
            except BaseException:
                self._abort()
                raise
            if deadline is not None and time.monotonic() > deadline:
                self._abort()
                raise GetTimeoutError
        return results

    def _abort(self) -> None:
        for worker in self._workers.values():
            worker.abort.remote()

    def _root_cause(self, keys: Mapping[Any, Any], first: Any, error: RayError) -> Exception:
        """The error that the others follow from.

        A worker that dies breaks its neighbours' links, and their error may come first: so all
        are heard, and an error of one's own beats a death, which beats a broken link.
        """
        errors: dict[Any, RayError] = {first: error}
        ray.wait(list(keys), num_returns=len(keys), timeout=_WITNESS_S)
        for call, key in keys.items():
            if key not in errors:
                try:
                    ray.get(call, timeout=0)
                except GetTimeoutError:
                    continue
                except RayError as e:
                    errors[key] = e
        for key, heard in errors.items():
            cause = _cause(heard)
            if isinstance(cause, GeoError) and not isinstance(cause, TransportError):
                return cause
            if isinstance(heard, RayTaskError) and not isinstance(cause, GeoError):
                return self._own_error(key, heard, cause)
        for key, heard in errors.items():
            if isinstance(heard, RayActorError):
                reason = str(heard).strip().splitlines()
                text = next((line for line in reason[1:] if "died" in line), reason[0])
                return LostWorkerError(WorkerError(f"{self._name(key)} was lost: {text.strip()}"))
        cause = _cause(error)
        if isinstance(cause, GeoError):
            return LostWorkerError(type(cause)(f"{self._name(first)}: {cause}"))
        return LostWorkerError(WorkerError(f"{self._name(first)}: {cause}"))

    def _own_error(self, key: Any, error: RayTaskError, cause: BaseException) -> WorkerError:
        name = self._name(key)
        path = self._recorder.traceback(f"worker-{key}", {"worker": name}, str(error))
        text = str(cause).strip().splitlines()
        return WorkerError(
            f"{name} failed: {type(cause).__name__}: {text[0] if text else ''} "
            f"(full traceback: {path})"
        )

    def _name(self, key: Any) -> str:
        if not isinstance(key, int):
            return f"the worker of device {key}"
        info = self.info(key)
        return f"worker rank {key} (pid {info.pid} on {info.host}, {info.device})"


def _start(device: Device, job: JobSpec, coordinator: Any) -> Any:
    needs = dict(job.scaling.resources_per_worker)
    cpus, gpus = needs.pop("CPU", 0.0), needs.pop("GPU", 0.0)
    environment = {"OMP_NUM_THREADS": str(max(1, int(cpus)))}
    if gpus:
        # What NCCL transports need so that a posted receive can't hold up computation; see
        # transport.nccl.
        environment |= {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_MODULE_LOADING": "EAGER"}
    actor: Any = StageWorker  # what @ray.remote has made of the class
    return actor.options(
        num_cpus=cpus,
        num_gpus=gpus,
        resources=needs or None,
        max_restarts=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(device.node, soft=False),
        runtime_env={"env_vars": environment},
    ).remote(coordinator)


def _kill(worker: Any) -> None:
    with contextlib.suppress(RayError):
        ray.kill(worker)


def _cause(error: RayError) -> BaseException:
    cause = error.cause if isinstance(error, RayTaskError) else error
    return cause if isinstance(cause, BaseException) else error
