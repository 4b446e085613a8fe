"""The run's books: which steps are committed and which checkpoints complete, as workers report.

Reports name their generation.  Steps count only while that generation is in force; a checkpoint
counts whenever its last part arrives, as what a generation had committed stays true.  A report may
be heard twice, if a coordinator was replaced meanwhile; it counts once.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Container, Iterable, Mapping
from typing import Any

from ray_train_geo.actors.recorder import Recorder
from ray_train_geo.actors.reports import Committed, PartFailed, PartWritten, Report
from ray_train_geo.errors import StorageError
from ray_train_geo.observe.record import metrics_record
from ray_train_geo.planning.plan import Plan
from ray_train_geo.training.assignment import Start, StepRecord
from ray_train_geo.training.checkpoint import CheckpointPart, CheckpointStore, read_manifest
from ray_train_geo.training.collector import CheckpointCollector
from ray_train_geo.training.identity import check_identity, check_model, identity
from ray_train_geo.training.mission import Mission

__all__ = ["Ledger"]


class Ledger:
    """Safe from several threads."""

    def __init__(self, mission: Mission, store: CheckpointStore, recorder: Recorder) -> None:
        self._mission = mission
        self._store = store
        self._recorder = recorder
        self._identity = identity(mission.job, mission.dims, mission.data_fingerprint)
        self._lock = threading.RLock()
        self._number: int | None = None
        self._predicted_step_s = 0.0
        self._collectors: dict[int, CheckpointCollector] = {}
        self._saving_since: dict[int, float] = {}
        self._announced: tuple[str, str, float, Mapping[str, float]] | None = None
        self._published: Container[int] = ()
        self._inherited = 0
        self.step = 0
        self.saved: tuple[int, str] | None = None

    # ------------------------------------------------------------------ generations

    def open(self, number: int, plan: Plan) -> None:
        """Generation ``number`` is in force."""
        with self._lock:
            self._number, self._predicted_step_s = number, plan.predicted_step_s
            newest = [n for n in self._collectors if n >= number - 1]
            self._collectors = {n: self._collectors[n] for n in newest}
            self._collectors[number] = CheckpointCollector(
                self._store,
                number,
                plan.world_size,
                self._identity,
                plan.to_json(),
                self._mission.job.checkpoint.keep,
            )

    def take_up(self, number: int, plan: Plan) -> None:
        """Go on with the books of a predecessor, whose last generation was ``number``.

        What it had heard it had written down; what it had not will be reported again.

        Raises:
            StorageError, CheckpointError: checkpoints can't be listed.
        """
        self._inherited, self._published = number, frozenset(self._store.complete())
        self.step = self._recorder.step()
        newest = self._store.newest()
        if newest is not None:
            self.saved = read_manifest(newest).step, newest
        self.open(number, plan)

    def close(self) -> None:
        """No generation is in force: steps that are reported late don't count any more."""
        with self._lock:
            self._number = None

    def catch_up(self, number: int, records: Iterable[StepRecord]) -> None:
        """Steps of generation ``number`` that were committed, but whose reports were lost."""
        with self._lock:
            known = {r.step: r for r in records if r.step > self.step}
            for step in sorted(known):
                self._write(number, known[step])

    def announce(self, event: str, reason: str, began_s: float, times: Mapping[str, float]) -> None:
        """With the next committed step, record ``event`` and what it took.

        Args:
            began_s: when it began, by ``time.monotonic()``.
            times: what its parts took, in seconds; may still be filled in.
        """
        with self._lock:
            self._announced = event, reason, began_s, times

    # ------------------------------------------------------------------ reports of workers

    def hear(self, report: Report) -> None:
        """Enter what a worker reports."""
        match report:
            case Committed(number, record):
                self._committed(number, record)
            case PartWritten(number, step, part, state):
                self._part_written(number, step, part, state)
            case PartFailed(number, _, _, error):
                # Older checkpoints stay, and the run ends.
                if number == self._number:
                    self._recorder.fail(error)

    def _committed(self, number: int, record: StepRecord) -> None:
        with self._lock:
            if number != self._number or record.step <= self.step:
                return
            self._write(number, record)
            if self._announced is not None:
                event, reason, began_s, times = self._announced
                self._announced = None
                took_s = time.monotonic() - began_s
                self._recorder.event(
                    event,
                    generation=number,
                    step=record.step,
                    reason=reason,
                    **times,
                    first_commit_s=took_s,
                )

    def _write(self, number: int, record: StepRecord) -> None:
        self.step = record.step
        self._recorder.metrics(
            metrics_record(
                **dataclasses.asdict(record),
                tokens=self._mission.job.training.tokens_per_step,
                predicted_step_s=self._predicted_step_s,
                generation=number,
                bytes_per_token=self._mission.bytes_per_token,
            )
        )

    def _part_written(
        self, number: int, step: int, part: CheckpointPart, state: Mapping[str, Any]
    ) -> None:
        """The last part of a checkpoint publishes it."""
        with self._lock:
            collector = self._collectors.get(number)
            if collector is None or (number == self._inherited and step in self._published):
                return
            began = self._saving_since.setdefault(step, time.monotonic())
            try:
                manifest = collector.add(step, part, state)
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
            if self.saved is None or step >= self.saved[0]:
                self.saved = (step, self._store.location(step))
            self._recorder.changed.notify_all()

    # ------------------------------------------------------------------ where to go on

    def first_start(self) -> Start | None:
        """The checkpoint that the run resumes from, or the weights that it begins with."""
        location = self._mission.resume
        if location is None:
            return self._initial_weights()
        manifest = read_manifest(location)
        check_identity(manifest.identity, self._identity, f"checkpoint {location}")
        aside = self._store.set_aside_after(manifest.step)
        self._recorder.go_back(manifest.step)
        self._recorder.event("resume", step=manifest.step, path=location, set_aside=aside)
        self.step, self.saved = manifest.step, (manifest.step, location)
        return Start(location, manifest)

    def restart(self) -> Start | None:
        """The newest complete checkpoint, or else the beginning: nothing newer is left."""
        newest = self._store.newest() or self._mission.resume
        manifest = read_manifest(newest) if newest is not None else None
        self.go_back(manifest.step if manifest else 0)
        if newest is None or manifest is None:
            return self._initial_weights()
        return Start(newest, manifest)

    def go_back(self, step: int) -> None:
        """What was committed after ``step`` is lost, and will be computed anew."""
        with self._lock:
            self.step = step
            self._recorder.go_back(step)

    def _initial_weights(self) -> Start | None:
        source = self._mission.job.model.init_from
        if source is None:
            return None
        manifest = read_manifest(source)
        check_model(manifest.identity, self._mission.dims, f"model.init_from {source}")
        return Start(source, manifest, weights_only=True)
