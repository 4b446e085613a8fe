"""Workers that outlive their generations, as threads without Ray, for the tests of this folder."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from local_jobs import VOCAB
from torch.distributed import HashStore

from ray_train_geo.cluster.topology import Device, Topology
from ray_train_geo.model.catalog import parameter_shapes
from ray_train_geo.planning.plan import Plan
from ray_train_geo.spec import JobSpec
from ray_train_geo.training.assignment import Assignment, Handover, Outcome, StepRecord
from ray_train_geo.training.buckets import holding_devices
from ray_train_geo.training.copies import CopyDuty
from ray_train_geo.training.links import Links
from ray_train_geo.training.memory import Memory
from ray_train_geo.training.runtime import StageRuntime
from ray_train_geo.training.sources import sources_of
from ray_train_geo.training.standing import Common, Standing, common_state, settlement
from ray_train_geo.transport.state_stream import StateServer


class _Reporter:
    def __init__(self, records: dict[int, StepRecord]) -> None:
        self._records = records

    def committed(self, record: StepRecord) -> None:
        self._records[record.step] = record

    def part_written(self, *_: Any) -> None:
        """Checkpoints don't matter here."""

    def part_failed(self, *_: Any) -> None:
        raise AssertionError


class Worker:
    """One device's memory and state server, and its runtime of the newest generation."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.server = StateServer("127.0.0.1", self.memory)
        self.runtime: StageRuntime | None = None

    def standing(self) -> Standing:
        assert self.runtime is not None
        return self.runtime.standing()


class Generations:
    """Runs one generation after another, and settles in between as a coordinator does."""

    def __init__(self, job: JobSpec) -> None:
        self.job = job
        self.dims = job.dims(VOCAB)
        self.workers: dict[str, Worker] = {}
        self.records: dict[int, StepRecord] = {}
        self._number = 0

    def run(
        self,
        plan: Plan,
        until: int,
        common: Common | None = None,
        duties: Mapping[int, CopyDuty] | None = None,
        before: Callable[[dict[int, StageRuntime]], None] = lambda runtimes: None,
        ahead: Mapping[int, Links] | None = None,
        spares: Mapping[int, str] | None = None,
    ) -> dict[int, Outcome | BaseException]:
        """One generation to its end; what each rank's run returned or raised.

        Args:
            ahead: what :meth:`links` gave for this plan, while the one before ran.
            before: gets all runtimes, built, before they run.
            spares: of a rank, the device that gets copies of its residuals.
        """
        self._number += 1
        store, ranks = HashStore(), range(plan.world_size)
        for device in plan.devices:
            if device.id not in self.workers:
                self.workers[device.id] = Worker()
        runtimes = {}
        for rank in ranks:
            duty = (duties or {}).get(rank)
            assignment = self._assignment(plan, rank, common, duty, spares or {})
            cpu, memory = torch.device("cpu"), self.workers[plan.devices[rank].id].memory
            links = Links(assignment, store, cpu) if ahead is None else ahead[rank]
            reporter = _Reporter(self.records)
            runtimes[rank] = StageRuntime(assignment, links, cpu, reporter, memory)
        for device, worker in self.workers.items():
            if device not in {d.id for d in plan.devices}:
                worker.memory.enter(self._number)
        for rank, runtime in runtimes.items():
            self.workers[plan.devices[rank].id].runtime = runtime
        built = self._all(runtimes, lambda runtime: runtime.build())
        assert not any(isinstance(b, BaseException) for b in built.values()), built
        before(runtimes)
        ended = self._all(runtimes, lambda runtime: runtime.run(until))
        for runtime in runtimes.values():
            runtime.close()
        return ended

    def links(self, plan: Plan) -> dict[int, Links]:
        """Of the next generation under ``plan``, not yet joined."""
        store, cpu, number = HashStore(), torch.device("cpu"), self._number + 1
        orders = (self._assignment(plan, rank, None, None, {}) for rank in range(plan.world_size))
        return {a.rank: Links(replace(a, generation=number), store, cpu) for a in orders}

    def _assignment(
        self, plan: Plan, rank: int, common: Common | None, duty: CopyDuty | None,
        spares: Mapping[int, str],
    ) -> Assignment:  # fmt: skip
        device, start = plan.devices[rank].id, None
        if common is not None:
            there = Topology(tuple(Device(name, node=name) for name in self.workers))
            holders, local_sgd = common.holders, self.job.local_sgd
            sources = sources_of(plan, self.dims, there, holders, local_sgd)[device]
            places = {n: self.workers[d].server.address for n, d in sources.devices.items()}
            bequests = {
                name: [(self.workers[b.giver].server.address, b.owner) for b in left]
                for name, left in common.bequests(holding_devices(plan, self.dims))
                .get(device, {})
                .items()
            }
            start = Handover(
                common.step, common.updates, common.loss_scale, places,
                frozenset(sources.restarts), bequests,
            )  # fmt: skip
        peer = None if duty is None else duty.peer
        keeper = spares.get(rank)
        return Assignment(
            job=self.job,
            dims=self.dims,
            plan=plan,
            rank=rank,
            generation=self._number,
            hostname="127.0.0.1",
            deadline_s=20.0,
            checkpoint_root=str(self.job.run.directory / "checkpoints"),
            start=start,
            copies=duty,
            spares_to=None if keeper is None else self.workers[keeper].server.address,
            copies_to=None if peer is None else self.workers[plan.devices[peer].id].server.address,
        )

    def _all(
        self, runtimes: Mapping[int, StageRuntime], what: Callable[[StageRuntime], Any]
    ) -> dict[int, Any]:
        results: dict[int, Any] = {}

        def one(rank: int) -> None:
            try:
                results[rank] = what(runtimes[rank])
            except BaseException as e:
                results[rank] = e
                runtimes[rank].abort()

        threads = [threading.Thread(target=one, args=(r,), daemon=True) for r in runtimes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return results

    def lose(self, device: str) -> None:
        """The worker of ``device`` is gone, with all that it had."""
        self.workers.pop(device).server.close()

    def settle(self) -> Common | None:
        """All survivors commit what one of them has; what they can go on from."""
        standings = {device: worker.standing() for device, worker in self.workers.items()}
        _, totals, behind = settlement(standings)
        for device in behind:
            runtime = self.workers[device].runtime
            assert runtime is not None
            assert totals is not None
            standings[device] = runtime.settle(totals)
        for standing in standings.values():
            for record in standing.records:
                self.records.setdefault(record.step, record)
        return common_state(standings, parameter_shapes(self.dims))

    def close(self) -> None:
        for device in list(self.workers):
            self.lose(device)
