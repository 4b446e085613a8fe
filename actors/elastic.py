"""A run as a chain of generations: each is one plan in force, until something changes.

staff ─▶ build ─▶ run ─▶ finished or stopped
           ▲       ├─▶ paused: recruits are ready, or a node is being drained
           │       └─▶ lost a worker, a node or a link: abort everywhere
           │                  │
           └─ plan ◀─ settle the last commit, find the newest state that is still there
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

from ray_train_geo.actors.ahead import Ahead
from ray_train_geo.actors.assigning import assignments
from ray_train_geo.actors.calls import LostWorkerError
from ray_train_geo.actors.crew import Crew
from ray_train_geo.actors.estate import Reign
from ray_train_geo.actors.improver import Improver
from ray_train_geo.actors.laps import Laps
from ray_train_geo.actors.ledger import Ledger
from ray_train_geo.actors.offers import Cause, Change, Offers, Situation
from ray_train_geo.actors.recorder import Recorder
from ray_train_geo.actors.recruiter import Recruiter
from ray_train_geo.actors.staffing import job_for, staff
from ray_train_geo.actors.workforce import Workforce
from ray_train_geo.cluster.topology import Topology
from ray_train_geo.errors import ClusterError, PlanError
from ray_train_geo.model.catalog import parameter_shapes
from ray_train_geo.observe.trace import Span, worker_name
from ray_train_geo.planning.budget import Budget
from ray_train_geo.planning.corrections import Corrections
from ray_train_geo.planning.plan import Plan
from ray_train_geo.planning.policy import ChangeHistory
from ray_train_geo.planning.replan import replan
from ray_train_geo.training.assignment import Assignment, Outcome, Start
from ray_train_geo.training.checkpoint import CheckpointStore
from ray_train_geo.training.mission import Mission, Phase
from ray_train_geo.training.standing import Common, Standing, common_state, settlement

__all__ = ["ElasticRun"]

_BUILD_DEADLINE_S = 900.0
_PLANNING_S = 0.5
_POLL_S = 0.1


class ElasticRun:
    """Trains from a start to an outcome, whoever comes and goes.

    Args:
        workforce: starts workers.
        keep: is given what a successor must know, before it comes into force.
        phase: is told what the run is doing.
        watch: called all the while; what it raises ends the run.
        waiting: called instead while the run waits for devices.
    """

    def __init__(
        self,
        mission: Mission,
        store: CheckpointStore,
        recorder: Recorder,
        ledger: Ledger,
        workforce: Workforce,
        keep: Callable[[Reign], None],
        phase: Callable[[Phase], None],
        watch: Callable[[], None],
        waiting: Callable[[], None],
    ) -> None:
        self._mission = mission
        self._store = store
        self._recorder = recorder
        self._ledger = ledger
        self._workforce = workforce
        self._keep = keep
        self._phase = phase
        self._watch = watch
        self._waiting = waiting
        self._stopping = False
        self._crew: Crew | None = None
        self._change: Change | None = None
        self._ahead: Ahead | None = None
        self._numbered = 0
        self._situation: Situation | None = None
        self._leaving: frozenset[str] = frozenset()
        self._times: dict[str, float] = {}
        self._cause: Cause = "start"
        self._figures: Mapping[str, float] = {}
        self._corrections = Corrections()
        self.generation = 0
        self.traces: dict[int, tuple[str, list[Span]]] = {}

    def stop(self) -> None:
        """End the run after the step that is running, with a checkpoint; from any thread."""
        self._stopping = True
        if self._crew is not None:
            self._crew.stop()

    def adopt(self, reign: Reign) -> tuple[int, float | None]:
        """Take over a predecessor's generation, whose workers train on; :meth:`train` goes on.

        Returns:
            How many workers are there, and for how long they had no coordinator, in seconds (None
            if none of them says so).
        """
        crew = Crew([], self._mission.job, self._workforce, self._recorder)
        away_s = crew.adopt(self._workforce.session, reign)
        self.generation, self._plan, self._topology = reign.generation, reign.plan, reign.topology
        self._numbered = reign.generation
        crew.assign(reign.generation, reign.plan)
        self._crew = crew
        return len(crew.devices), away_s

    def train(self, start: Start | None) -> Outcome:
        """Run generations until the last step, or :meth:`stop`.

        Args:
            start: what the first generation begins with, unless it has begun long ago.

        Raises:
            GeoError: the run can't go on.
        """
        begun = self._crew is not None
        crew = self._crew = self._crew or self._staff()
        try:
            offers, history = Offers(lambda: self._situation, self._offered), ChangeHistory()
            recruiter = Recruiter(
                self._mission, self._store, self._recorder, self._workforce,
                offers, history, self._corrections,
            )  # fmt: skip
            improver = Improver(
                self._mission, self._recorder,
                offers, history, self._corrections, recruiter.reconsider,
            )  # fmt: skip
            improver.start()
            if begun:  # what was lost, or was about to come, when nobody looked
                there = {d.id for d in crew.devices}
                recruiter.lost([d for d in self._topology.devices if d.id not in there])
            try:
                outcome = self._generations(crew, recruiter, start, begun)
            finally:
                offers.close()
                recruiter.close()
                improver.join()
                if self._change is not None and self._change.recruits is not None:
                    self._change.recruits.dismiss()
            self._keep(self._reign(crew, outcome))
            return outcome
        finally:
            crew.dismiss()

    def _staff(self) -> Crew:
        """The first crew; with another try for each that is lost before it has started."""
        failures, crew = 0, None
        while crew is None:
            with self._counting(failures := failures + 1):
                self._topology, self._plan, crew = staff(
                    self._mission, self._store, self._recorder, self._workforce,
                    after_loss=failures > 1, watch=self._waiting,
                )  # fmt: skip
        return crew

    def _reign(self, crew: Crew, outcome: Outcome | None = None) -> Reign:
        return Reign(self.generation, self._plan, self._topology, crew.roster(), outcome)

    @contextlib.contextmanager
    def _counting(self, failures: int) -> Iterator[None]:
        """A loss in here is one of ``failures`` in a row, and forgiven unless they are too many."""
        try:
            yield
        except LostWorkerError as e:
            self._failed(e, failures)

    def _generations(
        self, crew: Crew, recruiter: Recruiter, start: Start | None, begun: bool
    ) -> Outcome:
        state: Start | Common | None = start
        failures, reached = 0, -1
        while True:
            try:
                if not begun:
                    self._build_generation(crew, state)
                outcome = self._run_generation(crew, begun)
                if not outcome.paused:
                    self._collect_traces(crew)
                    return outcome
                began_s, event, reason = time.monotonic(), "reshape", ""
                self._times, self._cause, self._figures = {}, "better plan", {}
            except LostWorkerError as e:
                began_s, event, reason = time.monotonic(), "recovery", str(e)
                self._ahead = None  # the abort ends it, too
                silence_s = max((crew.silence_s(d) for d in crew.lost()), default=0.0)
                self._times = {"detection_s": silence_s}
                self._cause, self._figures = "failure", {}
                crew.abort()
                failures = 1 if self._ledger.step > reached else failures + 1
                reached = self._ledger.step
                self._failed(e, failures)
            finally:
                self._situation, begun = None, False
            state, why = self._prepare(crew, recruiter)
            self._ledger.announce(event, reason or why, began_s, self._times)

    def _failed(self, error: LostWorkerError, failures: int) -> None:
        self._recorder.event(
            "failure", message=str(error), generation=self.generation, step=self._ledger.step
        )
        if failures > self._mission.job.failure.max_failures:
            raise error.error from None

    # ------------------------------------------------------------------ one generation

    def _build_generation(self, crew: Crew, state: Start | Common | None) -> None:
        plan, recorder = self._plan, self._recorder
        ahead = self._made_ahead(crew)
        self.generation = self._next_number() if ahead is None else ahead.generation
        crew.assign(self.generation, plan)
        self._keep(self._reign(crew))
        recorder.run.write_json("plan.json", plan.to_json())
        recorder.event(
            "plan",
            predicted_step_s=plan.predicted_step_s,
            notes=list(plan.notes),
            cause=self._cause,
            **self._figures,
        )
        orders = self._orders(crew, plan, self._topology, self.generation, state)
        began_s = time.monotonic()
        fetched_s = crew.build(orders, _BUILD_DEADLINE_S, ahead)
        self._times |= {"transfer_s": fetched_s, "build_s": time.monotonic() - began_s}
        crew.drop([d.id for d in crew.devices if d.id in self._leaving])
        self._leaving = frozenset()
        self._topology = self._topology.with_devices(crew.devices)
        self._ledger.open(self.generation, plan)
        recorder.event(
            "generation",
            generation=self.generation,
            transport=orders[0].transport,
            links_ahead=ahead is not None,
            workers=crew.roll(plan),
        )

    def _orders(
        self,
        crew: Crew,
        plan: Plan,
        topology: Topology,
        generation: int,
        state: Start | Common | None,
    ) -> list[Assignment]:
        return assignments(
            self._mission, plan, topology, crew, generation, crew.transport(plan),
            self._store.root, state,
        )  # fmt: skip

    def _next_number(self) -> int:
        """No generation ever has that of another, nor that of links that were made ahead."""
        self._numbered += 1
        return self._numbered

    def _prepare_links(self, crew: Crew, change: Change) -> Ahead | None:
        """Have the links of the change's plan made, where that can be done beside training."""
        plan, topology = change.plan, change.topology or self._topology
        if plan is None or self._mission.job.scaling.emulate_links:
            return None
        if change.recruits is not None:
            crew.join(change.recruits)
        there = {d.id for d in crew.devices}
        # Of NCCL one communicator more can get in the way of kernels that wait for each other.
        if not {d.id for d in plan.devices} <= there or crew.transport(plan) != "gloo":
            return None
        orders = self._orders(crew, plan, topology, self._next_number(), None)
        return crew.prepare(orders)

    def _made_ahead(self, crew: Crew) -> Ahead | None:
        """The links that were made ahead, if they are those of the plan that is now in force."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or (ahead.made and ahead.plan is self._plan):
            return ahead
        crew.forsake(ahead)
        return None

    def _run_generation(self, crew: Crew, begun: bool) -> Outcome:
        """Run steps; or, if they have ``begun`` for a predecessor, see how they end."""
        self._phase("training")
        self._pausing = self._preparing = False
        if self._stopping:
            crew.stop()
        self._situation = self._now(crew, waiting=False)
        return crew.run(self._mission.last_step, self._watch_changes, begun)

    def _now(self, crew: Crew, waiting: bool) -> Situation:
        parts = ("settle_s", "plan_s", "build_s")
        pause_s = None
        if self._times.keys() >= {*parts}:
            pause_s = sum(self._times[part] for part in parts) - self._times["transfer_s"]
        return Situation(
            self.generation, self._cause, pause_s,
            self._topology, self._plan, crew.spots(), crew, waiting,
        )  # fmt: skip

    def _watch_changes(self) -> None:
        self._watch()
        change, crew = self._change, self._crew
        if change is None or crew is None or self._pausing:
            return
        if not self._preparing:
            self._preparing, self._ahead = True, self._prepare_links(crew, change)
        if self._ahead is None or not self._ahead.pending():
            self._pausing = True
            crew.pause()

    def _offered(self, change: Change) -> None:
        self._change = change

    # ------------------------------------------------------------------ between generations

    def _prepare(self, crew: Crew, recruiter: Recruiter) -> tuple[Start | Common | None, str]:
        """Settle, plan, and find the state to go on from; also why things change, if known."""
        before, laps = crew.devices, Laps(self._times)
        standings = self._settled(crew)
        laps.lap("settle_s")
        there = {d.id for d in crew.devices}
        if gone := [d for d in before if d.id not in there]:
            recruiter.lost(gone)
        why = self._admit(crew, recruiter)
        if not self._plan_next(crew):
            self._wait_for_devices(crew, recruiter)
            standings = crew.standings(self._ledger.step)
        laps.lap("plan_s")
        return self._newest(standings), why

    def _settled(self, crew: Crew) -> dict[str, Standing]:
        """Where the survivors stand, once all have committed what one of them has."""
        standings = crew.standings(self._ledger.step, within_s=self._plan.predicted_step_s)
        self._ledger.close()
        _, totals, behind = settlement(standings)
        if totals is not None:
            for device in behind:
                standings.pop(device)
            standings |= crew.settle(behind, totals, self._ledger.step)
        for standing in standings.values():
            self._ledger.catch_up(self.generation, standing.records)
        self._collect_traces(crew)
        return standings

    def _newest(self, standings: dict[str, Standing]) -> Start | Common | None:
        """The newest state that is still there: in memory, or else in a checkpoint."""
        step, names = self._ledger.step, parameter_shapes(self._mission.dims)
        common = common_state(standings, names, step)
        state: Start | Common | None = common
        if common is None:
            state = self._ledger.restart()
        elif common.step < step:
            self._ledger.go_back(common.step)
        self._recorder.event(
            "restore",
            step=self._ledger.step,
            lost_steps=step - self._ledger.step,
            source="checkpoint" if common is None else "memory",
        )
        return state

    def _admit(self, crew: Crew, recruiter: Recruiter) -> str:
        """Let the change come into force that was offered, if any; returns its reason."""
        change, self._change = self._change, None
        self._topology = self._topology.with_devices(crew.devices)
        self._proposed: Plan | None = None
        if change is None:
            return ""
        if change.recruits is not None:
            crew.join(change.recruits)  # unless they have
        if change.topology is not None:
            self._topology = change.topology.with_devices(crew.devices)
        self._leaving = change.leaving
        if change.base is self._plan:
            self._proposed = change.plan
        if self._cause != "failure":
            self._cause, self._figures = change.cause, change.figures
        recruiter.resume()
        return change.reason

    def _plan_next(self, crew: Crew) -> bool:
        """Plan for the crew as it is; whether there is a plan."""
        mission = self._mission
        ready = {d.id for d in crew.devices} - self._leaving
        if len(ready) < max(1, mission.job.scaling.min_devices):
            self._shortage = f"{len(ready)} of {mission.job.scaling.min_devices} devices are there"
            return False
        if self._proposed is not None and {d.id for d in self._proposed.devices} <= ready:
            self._plan = self._proposed
            return True
        try:
            self._plan = replan(
                self._plan,
                self._corrections.apply(self._topology),
                job_for(mission.job, len(ready)),
                mission.vocab_size,
                budget=Budget(_PLANNING_S),
                leaving=self._leaving,
            ).plan
        except PlanError as e:
            self._shortage = f"no plan fits the {len(ready)} devices that are there: {e}"
            return False
        return True

    def _wait_for_devices(self, crew: Crew, recruiter: Recruiter) -> None:
        """Wait until there is a plan again.

        Raises:
            ClusterError: not within ``failure.wait_s``.
        """
        patience_s = self._mission.job.failure.wait_s
        began_s = time.monotonic()
        self._recorder.event("waiting", message=self._shortage, step=self._ledger.step)
        self._phase("waiting")
        while True:
            self._situation = self._now(crew, waiting=True)
            while self._change is None and not crew.lost():
                self._waiting()
                if patience_s is not None and time.monotonic() - began_s > patience_s:
                    raise ClusterError(
                        f"{self._shortage}, and no others came within {patience_s:g} s "
                        "(failure.wait_s); the newest checkpoint can be resumed from"
                    )
                time.sleep(_POLL_S)
            self._situation = None
            if gone := crew.lost():
                recruiter.lost([d for d in crew.devices if d.id in gone])
                crew.drop(gone)
            self._admit(crew, recruiter)
            if self._plan_next(crew):
                return

    def _collect_traces(self, crew: Crew) -> None:
        """What the workers of the generation that has ended recorded."""
        roles = {role.rank: role for role in self._plan.roles()}
        for rank, (host, spans) in crew.traces().items():
            role = roles[rank]
            layers = self._plan.stage(role).layers
            name = worker_name(rank, role.pipeline, role.stage, layers, host)
            self.traces.setdefault(rank, (name, []))[1].extend(spans)
