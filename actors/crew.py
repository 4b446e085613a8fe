"""A run's workers, as one: start them, call them all, find out who failed first.

A crew outlives generations: those that are lost leave it, and recruits join it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.exceptions import GetTimeoutError, RayError

from ray_train_geo.actors.ahead import Ahead, Rendezvous
from ray_train_geo.actors.calls import Calls, LostWorkerError
from ray_train_geo.actors.estate import Reign
from ray_train_geo.actors.recorder import Recorder
from ray_train_geo.actors.stage_worker import WorkerInfo
from ray_train_geo.actors.workforce import Workforce, end_worker, take_over
from ray_train_geo.cluster.probing import Place
from ray_train_geo.cluster.topology import Device
from ray_train_geo.errors import ClusterError, TransportError
from ray_train_geo.model.catalog import ModelDims
from ray_train_geo.observe.trace import Span
from ray_train_geo.planning.plan import Plan
from ray_train_geo.spec import JobSpec
from ray_train_geo.training.assignment import Assignment, Outcome
from ray_train_geo.training.gauge import Observed
from ray_train_geo.training.mission import Mission
from ray_train_geo.training.standing import Standing, Totals
from ray_train_geo.transport.pulse import Pulse
from ray_train_geo.transport.reading import Station

__all__ = ["Crew", "LostWorkerError", "Spot"]

_HELLO_DEADLINE_S = 180.0
_ASK_DEADLINE_S = 60.0
_STANDING_DEADLINE_S = 20.0
_TRACE_DEADLINE_S = 2.0
_OBSERVED_DEADLINE_S = 1.0


@dataclass(frozen=True, slots=True)
class Spot:
    """A node, as one of its workers knows it.

    Args:
        device: that worker's.
    """

    place: Place
    station: Station
    device: str


class Crew:
    """One Ray actor a device.

    Args:
        devices: where to start workers.
        workforce: starts them.
    """

    def __init__(
        self, devices: Sequence[Device], job: JobSpec, workforce: Workforce, recorder: Recorder
    ) -> None:
        self._job = job
        self._devices = {d.id: d for d in devices}
        started = {d.id: workforce.start(d, job) for d in devices}
        self._names = {device: name for device, (name, _) in started.items()}
        self._workers = {device: worker for device, (_, worker) in started.items()}
        self._infos: dict[str, WorkerInfo] = {}
        self._ranks: list[str] = []
        self._begun: Mapping[str, int] = {}
        self._generation = 0
        self._rendezvous: Rendezvous | None = None
        self._pulse = Pulse()
        self._calls = Calls(recorder, self._name, self.lost, self.abort)

    def adopt(self, session: str, reign: Reign) -> float | None:
        """Take over those of a predecessor's workers that are still there; others end.

        Returns:
            For how long they have heard from no coordinator, in seconds, if one says so.
        """
        workers = reign.workers
        found, said = take_over(session, {d: name for d, (name, _) in workers.items()})
        self._workers |= found
        self._begun = {device: adopted.begun for device, adopted in said.items()}
        self._names |= {device: workers[device][0] for device in found}
        self._devices |= {d.id: d for d in reign.topology.devices if d.id in found}
        # Of those that are gone, too: messages say where they were.
        self._infos |= {device: info for device, (_, info) in workers.items()}
        self._watch(found)
        silences = (adopted.silence_s for adopted in said.values())
        return min((s for s in silences if s is not None), default=None)

    def roster(self) -> dict[str, tuple[str, WorkerInfo]]:
        """Name and whereabouts of every worker, by device id: what :meth:`adopt` takes."""
        return {d: (self._names[d], self._infos[d]) for d in self._workers}

    @property
    def devices(self) -> tuple[Device, ...]:
        return tuple(self._devices.values())

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
            self._infos = self._calls.all(calls, _HELLO_DEADLINE_S)
        except GetTimeoutError:
            raise ClusterError(
                f"Ray did not start all {len(calls)} workers within {_HELLO_DEADLINE_S:g} s; are "
                "the resources in scaling.resources_per_worker still free?"
            ) from None
        self._watch(self._infos)
        return self._infos

    def warm_up(self, mission: Mission) -> None:
        """All workers do what takes long the first time, such as to open the job's data.

        Raises:
            GeoError: the first worker that can't.
            LostWorkerError: a worker was lost.
        """
        what = mission.job, mission.dims, mission.data_fingerprint
        calls = {device: worker.warm_up.remote(*what) for device, worker in self._workers.items()}
        self._calls.all(calls, _HELLO_DEADLINE_S)

    def measured(self, devices: Sequence[Device]) -> None:
        """What is known of the devices by now."""
        self._devices = {d.id: d for d in devices}

    def spots(self) -> dict[str, Spot]:
        """One worker of each node."""
        found = {}
        for device in reversed(self._workers):
            info = self._infos[device]
            place = Place(info.node_id, self._devices[device].region, info.address)
            found[info.node_id] = Spot(place, info.station, device)
        return found

    def ask(self, method: str, arguments: Mapping[str, tuple[Any, ...]], what: str) -> Any:
        """Call ``method`` of several workers: their answers, by device id.

        Args:
            what: they do by that, if it takes too long.

        Raises:
            LostWorkerError: a worker is gone, or can't reach another.
        """
        calls = {d: getattr(self._workers[d], method).remote(*a) for d, a in arguments.items()}
        try:
            return self._calls.all(calls, _ASK_DEADLINE_S)
        except GetTimeoutError:
            error = TransportError(f"{what} took more than {_ASK_DEADLINE_S:g} s")
            raise LostWorkerError(error) from None

    def release_unused(self, plan: Plan) -> None:
        """End the workers that ``plan`` has no role for."""
        self.drop(set(self._workers) - {d.id for d in plan.devices})

    def assign(self, generation: int, plan: Plan) -> None:
        """Give out the plan's roles; workers without one wait for the next plan."""
        self._generation = generation
        self._ranks = [plan.stage(role).device for role in plan.roles()]

    def info(self, device: str) -> WorkerInfo:
        return self._infos[device]

    def join(self, recruits: Crew) -> None:
        """Take over all workers of another crew, which is empty afterwards."""
        self._devices |= recruits._devices
        self._workers |= recruits._workers
        self._infos |= recruits._infos
        self._names |= recruits._names
        self._watch(recruits._workers)
        recruits._workers = {}
        recruits.dismiss()

    def transport(self, plan: Plan) -> Literal["gloo", "nccl"]:
        """What the job asks for, or the best that all of the plan's workers can use.

        Raises:
            ClusterError: nccl is asked for, but a worker can't use it.
        """
        wanted = self._job.parallelism.transport
        gpus = self._job.scaling.resources_per_worker.get("GPU", 0.0)
        infos = (self._infos[d.id] for d in plan.devices)
        without = [info for info in infos if not info.nccl]
        if wanted == "nccl" and (without or gpus < 1):
            where = f"{without[0].host} ({without[0].device})" if without else "a shared GPU"
            raise ClusterError(
                f"parallelism.transport is nccl, but {where} can't use it: it needs a whole GPU "
                "a worker and `pip install ray-train-geo[gpu]` on every node"
            )
        return "gloo" if wanted == "gloo" or without or gpus < 1 else "nccl"

    def prepare(self, assignments: Sequence[Assignment]) -> Ahead:
        """Workers make the links of a next generation, while the one before trains on."""
        rendezvous = Rendezvous()
        devices = [a.device for a in assignments]
        calls = {
            self._workers[device].prepare.remote(a, rendezvous.host, rendezvous.port): device
            for device, a in zip(devices, assignments, strict=True)
        }
        return Ahead(assignments[0].generation, assignments[0].plan, rendezvous, calls)

    def forsake(self, ahead: Ahead) -> None:
        """Nobody will use these links."""
        for device in ahead.devices:
            if device in self._workers:
                self._workers[device].forsake.remote()

    def build(
        self, assignments: Sequence[Assignment], within_s: float, ahead: Ahead | None = None
    ) -> float:
        """All workers take their roles; those without one give of the state that they have.

        Args:
            ahead: links of this generation that are made.

        Returns:
            Seconds until the last one had its state.

        Raises:
            GeoError: what the first worker to fail raised.
            LostWorkerError: a worker or link was lost.
        """
        for device in set(self._workers) - set(self._ranks):
            self._workers[device].give.remote(self._generation)
        # Where the workers find each other.  Its end releases whoever waits for one to come.
        made = ahead is not None
        at = self._rendezvous = Rendezvous() if ahead is None else ahead.rendezvous
        calls = {
            self._ranks[a.rank]: self._worker(a.rank).build.remote(a, at.host, at.port, made)
            for a in assignments
        }
        try:
            return max(map(float, self._calls.all(calls, within_s, self._watch_pulse).values()))
        except GetTimeoutError:
            error = TransportError(f"the workers did not find each other within {within_s:g} s")
            raise LostWorkerError(error) from None

    def run(self, until: int, watch: Callable[[], None], begun: bool = False) -> Outcome:
        """All workers run steps; ``watch`` is called all the while and may raise.

        Args:
            begun: they do already, for a predecessor.

        Raises:
            GeoError, LostWorkerError: as :meth:`build`; or what ``watch`` raised.
        """

        def both() -> None:
            self._watch_pulse()
            watch()

        for device in self._ranks:
            if device not in self._workers:
                raise self._calls.loss(device, "it died while there was no coordinator")
            if begun and self._begun.get(device, self._generation) != self._generation:
                raise LostWorkerError(TransportError("the generation was not built everywhere"))
        workers = {device: self._workers[device] for device in self._ranks}
        calls = {
            device: worker.outcome.remote(self._generation) if begun else worker.run.remote(until)
            for device, worker in workers.items()
        }
        outcome: Outcome = self._calls.all(calls, None, both)[self._ranks[0]]
        return outcome

    def stop(self) -> None:
        """Ask all workers to stop after a step (the same one for all)."""
        for worker in list(self._workers.values()):
            worker.stop.remote()

    def pause(self) -> None:
        """Ask all workers to end the generation after a step, for the next one."""
        for worker in list(self._workers.values()):
            worker.pause.remote(self._generation)

    def observed(self) -> dict[str, Observed]:
        """What workers measured since the last call, by device; from any thread.

        Who does not answer at once is left out.
        """
        calls = {worker.observe.remote(): d for d, worker in list(self._workers.items())}
        if not calls:
            return {}
        done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=_OBSERVED_DEADLINE_S)
        seen: dict[str, Observed] = {}
        for call in done:
            with contextlib.suppress(RayError):
                answer: Observed | None = ray.get(call)
                if answer is not None:
                    seen[calls[call]] = answer
        return seen

    # ------------------------------------------------------------------ between generations

    def lost(self) -> dict[str, str]:
        """Devices that have stopped answering, and how that showed."""
        return {d: why for d, why in self._pulse.lost().items() if d in self._workers}

    def silence_s(self, device: str) -> float:
        return self._pulse.silence_s(device)

    def abort(self) -> None:
        """End the generation everywhere at once."""
        self._rendezvous = None
        for worker in list(self._workers.values()):
            worker.abort.remote(self._generation)

    def standings(self, after: int, within_s: float = 0.0) -> dict[str, Standing]:
        """Where all stand whose generation has ended; those that don't answer leave the crew.

        Args:
            after: only records of later steps are wanted.
            within_s: what a worker may take to notice that, beyond some seconds for its answer.

        Raises:
            GeoError: a worker raised something of its own.
        """
        calls = {device: worker.standing.remote(after) for device, worker in self._workers.items()}
        return self._from_survivors(calls, within_s)

    def settle(self, behind: Collection[str], totals: Totals, after: int) -> dict[str, Standing]:
        """The workers ``behind`` commit what others have; otherwise as :meth:`standings`."""
        calls = {device: self._workers[device].settle.remote(totals, after) for device in behind}
        return self._from_survivors(calls)

    def _from_survivors(self, calls: Mapping[str, Any], within_s: float = 0.0) -> dict[str, Any]:
        answers, gone = self._calls.survivors(calls, _STANDING_DEADLINE_S + within_s)
        self.drop(gone)
        return answers

    def roll(self, plan: Plan) -> list[dict[str, Any]]:
        """Who plays which role of ``plan``, as plain JSON."""
        return [
            {
                "rank": role.rank,
                "pid": self._infos[device].pid,
                "node_id": self._infos[device].node_id,
                "host": self._infos[device].host,
                "region": self._devices[device].region,
                "pipeline": role.pipeline,
                "stage": role.stage,
                "layers": list(plan.stage(role).layers),
                "device": device,
            }
            for role in plan.roles()
            for device in [plan.stage(role).device]
        ]

    def traces(self) -> dict[int, tuple[str, list[Span]]]:
        """Host and what was recorded there, by rank; those that don't answer are left out."""
        spans = {}
        calls = {
            rank: self._workers[device].trace.remote()
            for rank, device in enumerate(self._ranks)
            if device in self._workers
        }
        for rank, call in calls.items():
            with contextlib.suppress(RayError):
                host = self._infos[self._ranks[rank]].host
                spans[rank] = host, ray.get(call, timeout=_TRACE_DEADLINE_S)
        return spans

    def drop(self, devices: Collection[str]) -> None:
        """End the workers of ``devices``; they are no longer of the crew."""
        for device in list(devices):
            worker = self._workers.pop(device, None)
            if worker is not None:
                end_worker(worker)
            self._devices.pop(device, None)
            self._names.pop(device, None)
            self._pulse.forget(device)

    def dismiss(self) -> None:
        """End all workers."""
        self.drop(list(self._workers))
        self._pulse.close()

    # ------------------------------------------------------------------ names

    def _worker(self, rank: int) -> Any:
        return self._workers[self._ranks[rank]]

    def _name(self, device: str) -> str:
        info = self._infos.get(device)
        if info is None:
            return f"the worker of device {device}"
        where = f"pid {info.pid} on {info.host}, {info.device}"
        if device not in self._ranks:
            return f"an idle worker ({where})"
        return f"worker rank {self._ranks.index(device)} ({where})"

    def _watch(self, devices: Collection[str]) -> None:
        """Hear these workers' pulse; those that can't be reached are waited for together."""
        if devices:
            with ThreadPoolExecutor(len(devices), "watch") as pool:
                for device in devices:
                    info = self._infos[device]
                    pool.submit(self._pulse.watch, device, info.address, info.station.ping_port)

    def _watch_pulse(self) -> None:
        for device, why in self.lost().items():
            if device in self._ranks:
                raise self._calls.loss(device, why)
            self.drop([device])  # nobody waits for an idle worker
