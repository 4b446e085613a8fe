"""The coordinator: plans, starts workers, records what they commit, and ends in good order.

    run ─▶ generation 1 ─▶ worker lost ─▶ generation 2 ─▶ ... ─▶ finished, stopped or failed

It lives on the driver's node and survives the driver: when the driver is killed (``ray job stop``
allows it three seconds), the coordinator still stops the run after a step, with a checkpoint.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util import get_node_ip_address
from torch.distributed import TCPStore

from ray_train_geo.actors.crew import Crew, LostWorkerError
from ray_train_geo.actors.recorder import Recorder
from ray_train_geo.actors.staffing import staff
from ray_train_geo.errors import GeoError, RunError, StorageError
from ray_train_geo.observe.record import metrics_record
from ray_train_geo.observe.report import write_report
from ray_train_geo.observe.run_directory import RunDirectory
from ray_train_geo.observe.trace import Span, chrome_trace, worker_name
from ray_train_geo.planning.plan import Plan
from ray_train_geo.spec import JobSpec
from ray_train_geo.training.assignment import Assignment, Outcome, Start, StepRecord
from ray_train_geo.training.checkpoint import CheckpointPart, CheckpointStore, read_manifest
from ray_train_geo.training.collector import CheckpointCollector
from ray_train_geo.training.identity import check_identity, check_model, identity
from ray_train_geo.training.mission import (
    Mission,
    Phase,
    Progress,
    Summary,
    checkpoint_root,
)

__all__ = ["Coordinator"]

_remote: Any = ray.remote  # its stubs don't know concurrency groups

_DRIVER_SILENCE_S = 45.0
_REPORTS_DEADLINE_S = 600.0
_BUILD_DEADLINE_S = 900.0


class _StoppedError(Exception):
    """The run was stopped while it waited for devices."""


@dataclass(frozen=True, slots=True)
class _Generation:
    number: int
    plan: Plan
    crew: Crew
    collector: CheckpointCollector


class _Coordinator:
    """All of the coordinator but its being an actor.

    Args:
        handle: what workers report to.
    """

    def __init__(self, mission: Mission, handle: Any) -> None:
        self._mission = mission
        self._job = mission.job
        self._handle = handle
        run = RunDirectory.open(mission.job.run.directory)
        self._held = run.hold()  # until this process ends
        self._recorder = Recorder(run)
        self._store = CheckpointStore(checkpoint_root(mission.job))
        self._identity = identity(mission.job, mission.dims, mission.data_fingerprint)
        self._phase: Phase = "starting"
        self._summary: Summary | None = None
        self._stop_reason: str | None = None
        self._stop_lock = threading.Lock()
        self._generation: _Generation | None = None
        self._step = 0
        self._saved: tuple[int, str] | None = None
        self._saving_since: dict[int, float] = {}
        self._traces: dict[int, tuple[str, list[Span]]] = {}
        self._driver_seen = time.monotonic()

    # ------------------------------------------------------------------ called by the driver

    def run(self) -> None:
        """Train; how it ended is in the summary that :meth:`progress` returns."""
        try:
            phase, error = self._train(), None
        except _StoppedError:
            phase, error = "stopped", None
        except GeoError as e:
            phase, error = "failed", e
        except BaseException as e:
            path = self._recorder.traceback("coordinator", {}, traceback.format_exc())
            phase, error = "failed", RunError(f"the coordinator failed: {e!r} (traceback: {path})")
        self._finish(phase, error)

    def stop(self, reason: str) -> None:
        """Stop after the step that is running, with a checkpoint."""
        with self._stop_lock:
            if self._stop_reason is not None or self._summary is not None:
                return
            self._stop_reason = reason
        self._recorder.event("stop", reason=reason, step=self._step)
        generation = self._generation
        if generation is not None:
            self._phase = "stopping"
            generation.crew.interrupt()

    def progress(self) -> Progress:
        """What is new since the last call; each thing is handed out once."""
        self._driver_seen = time.monotonic()
        summary = self._summary  # before the news: what comes with it is then complete
        return Progress(self._phase, *self._recorder.news(), summary)

    def status(self) -> dict[str, Any]:
        """The run's state, for anyone who asks."""
        return {
            "name": self._job.run.name,
            "phase": self._phase,
            "step": self._step,
            "steps": self._mission.last_step,
            "generation": self._generation.number if self._generation else 0,
            "path": str(self._recorder.run.path),
        }

    # ------------------------------------------------------------------ called by the workers

    def committed(self, number: int, record: StepRecord) -> None:
        """Rank 0 tells of a committed step."""
        generation = self._generation
        if generation is None or number != generation.number:
            return  # of a generation that has ended
        self._step = record.step
        self._recorder.metrics(
            metrics_record(
                **dataclasses.asdict(record),
                tokens=self._job.training.tokens_per_step,
                predicted_step_s=generation.plan.predicted_step_s,
                generation=number,
                bytes_per_token=self._mission.bytes_per_token,
            )
        )

    def part_written(
        self, number: int, step: int, part: CheckpointPart, state: Mapping[str, Any]
    ) -> None:
        """A worker's part of a checkpoint is on storage; the last one publishes it."""
        generation = self._generation
        if generation is None or number != generation.number:
            return
        began = self._saving_since.setdefault(step, time.monotonic())
        try:
            manifest = generation.collector.add(step, part, state)
        except StorageError as e:
            self._recorder.fail(e)
            return
        if manifest is None:
            return
        self._recorder.event(
            "checkpoint",
            step=step,
            path=self._store.location(step),
            seconds=time.monotonic() - began,
            bytes=sum(manifest.files.values()),
            generation=number,
        )
        with self._recorder.changed:
            self._saved = (step, self._store.location(step))
            self._recorder.changed.notify_all()

    def part_failed(self, number: int, step: int, rank: int, error: StorageError) -> None:
        """A worker could not write its part: the run ends, older checkpoints stay."""
        if self._generation is not None and number == self._generation.number:
            self._recorder.fail(error)

    # ------------------------------------------------------------------ the run

    def _train(self) -> Phase:
        mission, recorder = self._mission, self._recorder
        recorder.event("start", pid=os.getpid(), steps=mission.last_step, resume=mission.resume)
        start, failures, number = self._first_start(), 0, 1
        while True:
            try:
                outcome = self._train_generation(number, start)
                break
            except LostWorkerError as e:
                failures, number, step = failures + 1, number + 1, self._step
                recorder.event("failure", message=str(e), generation=number - 1, step=step)
                if failures > self._job.failure.max_failures or self._stop_reason is not None:
                    raise e.error from None
                start = self._restart()
                recorder.event("restore", step=self._step, lost_steps=step - self._step)
        # The workers' last reports may still be on their way.
        if not recorder.wait_for(
            lambda: self._step >= outcome.step and (self._saved or (0, ""))[0] >= outcome.step,
            _REPORTS_DEADLINE_S,
        ):
            raise StorageError(
                f"the checkpoint of step {outcome.step} was not complete after "
                f"{_REPORTS_DEADLINE_S:g} s; the newest complete one: {self._saved}"
            )
        return "finished" if outcome.step >= self._job.training.steps else "stopped"

    def _first_start(self) -> Start | None:
        location = self._mission.resume
        if location is None:
            return self._initial_weights()
        manifest = read_manifest(location)
        check_identity(manifest.identity, self._identity, f"checkpoint {location}")
        aside = self._store.set_aside_after(manifest.step)
        self._recorder.run.truncate_metrics(manifest.step)
        self._recorder.event("resume", step=manifest.step, path=location, set_aside=aside)
        self._step, self._saved = manifest.step, (manifest.step, location)
        return Start(location, manifest)

    def _initial_weights(self) -> Start | None:
        source = self._job.model.init_from
        if source is None:
            return None
        manifest = read_manifest(source)
        check_model(manifest.identity, self._mission.dims, f"model.init_from {source}")
        return Start(source, manifest, weights_only=True)

    def _restart(self) -> Start | None:
        """State for the next generation: the newest complete checkpoint, else the beginning."""
        newest = self._store.newest() or self._mission.resume
        manifest = read_manifest(newest) if newest is not None else None
        self._step = manifest.step if manifest else 0
        self._recorder.run.truncate_metrics(self._step)
        if newest is None or manifest is None:
            return self._initial_weights()
        return Start(newest, manifest)

    def _train_generation(self, number: int, start: Start | None) -> Outcome:
        self._store.clean()
        plan, crew = staff(
            self._mission,
            self._store,
            self._recorder,
            self._handle,
            after_loss=number > 1,
            watch=self._watch_for_stop,
        )
        try:
            collector = CheckpointCollector(
                self._store,
                number,
                plan.world_size,
                self._identity,
                plan.to_json(),
                self._job.checkpoint.keep,
            )
            generation = _Generation(number, plan, crew, collector)
            self._build(generation, start)
            self._generation = generation
            self._phase = "training"
            if self._stop_reason is not None:
                crew.interrupt()
            try:
                return crew.run(self._mission.last_step, self._watch)
            finally:
                self._collect_traces(generation)
        finally:
            crew.dismiss()

    def _build(self, generation: _Generation, start: Start | None) -> None:
        mission, plan, crew = self._mission, generation.plan, generation.crew
        host, transport = get_node_ip_address(), crew.transport()
        # Kept for the generation's life: it is where the workers find each other.
        self._rendezvous = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        assignments = [
            Assignment(
                job=mission.job,
                dims=mission.dims,
                plan=plan,
                rank=role.rank,
                generation=generation.number,
                hostname=crew.info(role.rank).address,
                deadline_s=_deadline_s(mission.job, plan),
                checkpoint_root=self._store.root,
                transport=transport,
                data_fingerprint=mission.data_fingerprint,
                start=start,
            )
            for role in plan.roles()
        ]
        crew.build(assignments, host, self._rendezvous.port, _BUILD_DEADLINE_S)
        workers = [
            {
                "rank": role.rank,
                "pid": crew.info(role.rank).pid,
                "node_id": crew.info(role.rank).node_id,
                "host": crew.info(role.rank).host,
                "region": crew.device(role.rank).region,
                "pipeline": role.pipeline,
                "stage": role.stage,
                "layers": list(plan.stage(role).layers),
                "device": plan.stage(role).device,
            }
            for role in plan.roles()
        ]
        self._recorder.event(
            "generation", generation=generation.number, transport=transport, workers=workers
        )

    def _watch_for_stop(self) -> None:
        """Called while the run waits for devices: there is nothing to save yet."""
        self._watch()
        if self._stop_reason is not None:
            raise _StoppedError

    def _watch(self) -> None:
        """Called while the workers run: what else can end the run?"""
        if self._recorder.fatal is not None:
            raise self._recorder.fatal
        if time.monotonic() - self._driver_seen > _DRIVER_SILENCE_S:
            self.stop("the driver is gone")

    # ------------------------------------------------------------------ the end

    def _collect_traces(self, generation: _Generation) -> None:
        roles = {role.rank: role for role in generation.plan.roles()}
        for rank, spans in generation.crew.traces().items():
            role, info = roles[rank], generation.crew.info(rank)
            layers = generation.plan.stage(role).layers
            name = worker_name(rank, role.pipeline, role.stage, layers, info.host)
            self._traces.setdefault(rank, (name, []))[1].extend(spans)

    def _finish(self, phase: Phase, error: GeoError | None) -> None:
        """Write the last records; what fails here must not hide how the run ended."""
        checkpoint = self._saved[1] if self._saved else None
        run, recorder = self._recorder.run, self._recorder
        if error is not None:
            recorder.event("error", message=str(error), kind=type(error).__name__, step=self._step)
        recorder.event("finish", phase=phase, step=self._step, checkpoint=checkpoint)
        try:
            if any(spans for _, spans in self._traces.values()):
                run.write_json("trace.json", chrome_trace(self._traces), indent=None)
            write_report(run)
        except GeoError as e:
            recorder.fail(e)
        except Exception:
            recorder.traceback("report", {}, traceback.format_exc())
        if error is None and recorder.fatal is not None:
            phase, error = "failed", recorder.fatal
        self._phase = phase
        self._summary = Summary(phase, self._step, checkpoint, str(run.path), error)


@_remote(concurrency_groups={"control": 2, "reports": 1}, num_cpus=0)
class Coordinator:
    """The actor: ``run`` takes the run's time, ``reports`` keep their order."""

    def __init__(self, mission: Mission) -> None:
        handle = ray.get_runtime_context().current_actor
        self._coordinator = _Coordinator(mission, handle)

    def run(self) -> None:
        self._coordinator.run()
        # A driver that lives fetches the summary and ends this actor; if it is dead, nobody else
        # would.
        time.sleep(_DRIVER_SILENCE_S)
        ray.actor.exit_actor()

    @ray.method(concurrency_group="control")
    def stop(self, reason: str) -> None:
        self._coordinator.stop(reason)

    @ray.method(concurrency_group="control")
    def progress(self) -> Progress:
        return self._coordinator.progress()

    @ray.method(concurrency_group="control")
    def status(self) -> dict[str, Any]:
        return self._coordinator.status()

    @ray.method(concurrency_group="reports")
    def committed(self, generation: int, record: StepRecord) -> None:
        self._coordinator.committed(generation, record)

    @ray.method(concurrency_group="reports")
    def part_written(
        self, generation: int, step: int, part: CheckpointPart, state: dict[str, Any]
    ) -> None:
        self._coordinator.part_written(generation, step, part, state)

    @ray.method(concurrency_group="reports")
    def part_failed(self, generation: int, step: int, rank: int, error: StorageError) -> None:
        self._coordinator.part_failed(generation, step, rank, error)


def _deadline_s(job: JobSpec, plan: Plan) -> float:
    """Longest wait for one message.

    Ten times the whole predicted step, as a prediction may be off and a machine may be loaded,
    and a minute on top for what is slow once: cold links, first kernels, a data file's pages.
    """
    return job.failure.deadline_s or 60.0 + 10.0 * plan.predicted_step_s
