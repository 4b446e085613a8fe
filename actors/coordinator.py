"""The coordinator: plans, starts workers, records what they commit, and ends in good order.

    run ─▶ generation 1 ─▶ worker lost ─▶ generation 2 ─▶ ... ─▶ finished, stopped or failed

It lives on the driver's node and survives the driver: when the driver is killed (``ray job stop``
allows it three seconds), the coordinator still stops the run after a step, with a checkpoint; or
goes on, as ``run.on_driver_exit`` says.

It can be killed itself.  Ray starts it again, and the successor goes on from what is in the run
directory: the workers, which have trained on, go on reporting to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any

import ray

from ray_train_geo.actors.elastic import ElasticRun
from ray_train_geo.actors.estate import Estate, Reign
from ray_train_geo.actors.ledger import Ledger
from ray_train_geo.actors.recorder import Recorder
from ray_train_geo.actors.reports import Report
from ray_train_geo.actors.workforce import Workforce, end_workers
from ray_train_geo.errors import GeoError, RunError, StorageError
from ray_train_geo.observe.run_directory import RunDirectory
from ray_train_geo.observe.trace import chrome_trace
from ray_train_geo.training.assignment import Outcome
from ray_train_geo.training.checkpoint import CheckpointStore
from ray_train_geo.training.mission import (
    Mission,
    Phase,
    Progress,
    Summary,
    checkpoint_root,
)

__all__ = ["Coordinator"]

_remote: Any = ray.remote  # its stubs don't know concurrency groups

_REPORTS_DEADLINE_S = 600.0
_LOCK_DEADLINE_S = 10.0
_LOCK_RETRY_S = 0.1


class _StoppedError(Exception):
    """The run was stopped while it waited for devices."""


class _Coordinator:
    """All of the coordinator but its being an actor.

    Args:
        handle: what workers report to.
    """

    def __init__(self, mission: Mission, handle: Any) -> None:
        self._mission = mission
        self._job = mission.job
        run = RunDirectory.open(mission.job.run.directory)
        self._held = _hold(run)  # until this process ends
        self._recorder = Recorder(run)
        self._store = CheckpointStore(checkpoint_root(mission.job))
        self._ledger = Ledger(mission, self._store, self._recorder)
        self._left = Estate.load(run, mission.session)
        incarnation = 1 if self._left is None else self._left.incarnation + 1
        self._estate = Estate(mission.session, incarnation)
        self._workforce = Workforce(mission.session, incarnation, handle)
        self._elastic = ElasticRun(
            mission, self._store, self._recorder, self._ledger, self._workforce, self._keep,
            self._enter, self._watch, self._watch_for_stop,
        )  # fmt: skip
        self._phase: Phase = "starting"
        self._summary: Summary | None = None
        self._stop_reason: str | None = None
        self._stop_lock = threading.Lock()
        self._books_open = threading.Event()
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
        if self._summary is None:
            self._finish(phase, error)

    def stop(self, reason: str) -> None:
        """Stop after the step that is running, with a checkpoint."""
        with self._stop_lock:
            if self._stop_reason is not None or self._summary is not None:
                return
            self._stop_reason = reason
        self._recorder.event("stop", reason=reason, step=self._ledger.step)
        if self._phase != "starting":
            self._phase = "stopping"
        self._elastic.stop()

    def progress(self, after_step: int, events_known: int) -> Progress:
        """What a follower does not know yet; see :meth:`Recorder.news`."""
        self._driver_seen = time.monotonic()
        summary = self._summary  # before the news: what comes with it is then complete
        return Progress(self._phase, *self._recorder.news(after_step, events_known), summary)

    def status(self) -> dict[str, Any]:
        """The run's state, for anyone who asks."""
        return {
            "name": self._job.run.name,
            "phase": self._phase,
            "step": self._ledger.step,
            "steps": self._mission.last_step,
            "generation": self._elastic.generation,
            "path": str(self._recorder.run.path),
        }

    # ------------------------------------------------------------------ called by workers

    def hear(self, reports: Sequence[Report]) -> None:
        """Enter what a worker reports, in its order."""
        self._books_open.wait()
        for report in reports:
            self._ledger.hear(report)

    # ------------------------------------------------------------------ the run

    def _train(self) -> Phase:
        if self._left is None:
            self._recorder.event(
                "start",
                pid=os.getpid(),
                steps=self._mission.last_step,
                resume=self._mission.resume,
                address=ray.get_runtime_context().gcs_address,
            )
            self._estate.save(self._recorder.run)
            return self._phase_after(self._begin())
        reign = self._succeed(self._left)
        if self._summary is not None:
            return self._summary.phase
        return self._phase_after(self._begin() if reign is None else self._go_on(reign))

    def _begin(self) -> Outcome:
        """Begin at the beginning; whoever a predecessor has started is of no use."""
        end_workers(self._mission.session)
        self._store.clean()
        start = self._ledger.first_start()
        self._books_open.set()
        return self._elastic.train(start)

    def _go_on(self, reign: Reign) -> Outcome:
        """Go on with the workers of a predecessor."""
        self._ledger.take_up(reign.generation, reign.plan)
        self._books_open.set()
        return reign.outcome or self._elastic.train(None)

    def _succeed(self, left: Estate) -> Reign | None:
        """Take up what a predecessor has left: its record, a wish to stop, workers.

        Raises:
            RunError: one coordinator after the other was killed.
        """
        recorder = self._recorder
        recorder.take_up()
        self._summary = left.summary
        if left.summary is not None:
            return None
        step = recorder.step()
        failures = 1 if step > left.step else left.failures + 1
        self._estate = dataclasses.replace(
            left, incarnation=left.incarnation + 1, step=step, failures=failures
        )
        self._estate.save(recorder.run)
        if failures > self._job.failure.max_failures:
            raise RunError(
                f"the coordinator was killed {failures} times with no step committed between; the "
                "newest checkpoint can be resumed from"
            )
        if (stop := recorder.said("stop")) is not None and self._stop_reason is None:
            self._stop_reason = stop["reason"]
            self._elastic.stop()
        adopted, away_s = 0, None
        if left.reign is not None and left.reign.outcome is None:
            adopted, away_s = self._elastic.adopt(left.reign)
        recorder.event(
            "coordinator",
            pid=os.getpid(),
            incarnation=self._estate.incarnation,
            step=step,
            adopted=adopted,
            away_s=away_s,
        )
        return left.reign

    def _keep(self, reign: Reign) -> None:
        """For a successor: nothing comes into force before it is written down."""
        self._estate = dataclasses.replace(self._estate, reign=reign)
        self._estate.save(self._recorder.run)

    def _phase_after(self, outcome: Outcome) -> Phase:
        recorder, ledger = self._recorder, self._ledger
        # All workers' reports have been heard; storage may still be at work.
        if not recorder.wait_for(
            lambda: ledger.step >= outcome.step and (ledger.saved or (0, ""))[0] >= outcome.step,
            _REPORTS_DEADLINE_S,
        ):
            raise StorageError(
                f"the checkpoint of step {outcome.step} was not complete after "
                f"{_REPORTS_DEADLINE_S:g} s; the newest complete one: {ledger.saved}"
            )
        return "finished" if outcome.step >= self._job.training.steps else "stopped"

    def _enter(self, phase: Phase) -> None:
        with self._stop_lock:
            self._phase = phase if self._stop_reason is None else "stopping"

    def _watch_for_stop(self) -> None:
        """Called while the run waits for devices: there is nothing to save yet."""
        self._watch()
        if self._stop_reason is not None:
            raise _StoppedError

    def _watch(self) -> None:
        """Called while the workers run: what else can end the run?"""
        if self._recorder.fatal is not None:
            raise self._recorder.fatal
        settings = self._job.run
        if settings.on_driver_exit == "continue":
            return
        if time.monotonic() - self._driver_seen > settings.driver_patience_s:
            self.stop("the driver is gone")

    # ------------------------------------------------------------------ the end

    def _finish(self, phase: Phase, error: GeoError | None) -> None:
        """Write the last records; what fails here must not hide how the run ended."""
        from ray_train_geo.observe.report import write_report  # it draws: slow to import

        end_workers(self._mission.session)
        checkpoint = self._ledger.saved[1] if self._ledger.saved else None
        run, recorder, step = self._recorder.run, self._recorder, self._ledger.step
        if error is not None:
            recorder.event("error", message=str(error), kind=type(error).__name__, step=step)
        recorder.event("finish", phase=phase, step=step, checkpoint=checkpoint)
        try:
            if any(spans for _, spans in self._elastic.traces.values()):
                run.write_json("trace.json", chrome_trace(self._elastic.traces), indent=None)
            write_report(run)
        except GeoError as e:
            recorder.fail(e)
        except Exception:
            recorder.traceback("report", {}, traceback.format_exc())
        if error is None and recorder.fatal is not None:
            phase, error = "failed", recorder.fatal
        summary = Summary(phase, step, checkpoint, str(run.path), error)
        with contextlib.suppress(StorageError):  # then a successor would only do this again
            dataclasses.replace(self._estate, summary=summary).save(run)
        self._phase, self._summary = phase, summary


def _hold(run: RunDirectory) -> int:
    """Hold the run directory, once a predecessor's process has let go of it."""
    until = time.monotonic() + _LOCK_DEADLINE_S
    while time.monotonic() < until:
        with contextlib.suppress(StorageError):
            return run.hold()
        time.sleep(_LOCK_RETRY_S)
    return run.hold()


@_remote(concurrency_groups={"control": 2, "reports": 1}, num_cpus=0)
class Coordinator:
    """The actor: it trains in a thread of its own; ``reports`` keep their order."""

    def __init__(self, mission: Mission) -> None:
        self._handle = ray.get_runtime_context().current_actor
        self._coordinator = _Coordinator(mission, self._handle)
        self._patience_s = mission.job.run.driver_patience_s
        # Not for the driver to call: a successor may have none.  Nor for the actor itself: Ray
        # fails a call to an actor that it is starting again.
        threading.Thread(target=self._live, name="run", daemon=True).start()

    def _live(self) -> None:
        self._coordinator.run()
        # A driver that lives fetches the summary and ends this actor; if it is dead, nobody else
        # would.
        time.sleep(self._patience_s)
        ray.kill(self._handle)

    @ray.method(concurrency_group="control")
    def stop(self, reason: str) -> None:
        self._coordinator.stop(reason)

    @ray.method(concurrency_group="control")
    def progress(self, after_step: int, events_known: int) -> Progress:
        return self._coordinator.progress(after_step, events_known)

    @ray.method(concurrency_group="control")
    def status(self) -> dict[str, Any]:
        return self._coordinator.status()

    @ray.method(concurrency_group="reports")
    def hear(self, reports: Sequence[Report]) -> None:
        self._coordinator.hear(reports)
