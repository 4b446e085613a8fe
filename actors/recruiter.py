"""Finds devices that a run could use, makes workers ready on them, and says when nodes must go.

In threads of its own: what is new or come back is started, warmed up and measured, and a plan with
it is made, while the others train on.  Only the change of plans interrupts them, at the boundary
of a step.
"""

from __future__ import annotations

import dataclasses
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping

from ray.exceptions import RayError

from ray_train_geo.actors.calls import LostWorkerError
from ray_train_geo.actors.crew import Crew
from ray_train_geo.actors.discovery import devices_on, draining_nodes, live_nodes, matches
from ray_train_geo.actors.offers import Change, Offers, Situation
from ray_train_geo.actors.recorder import Recorder
from ray_train_geo.actors.staffing import fixed_workers, job_for, measured, most_workers
from ray_train_geo.actors.surveying import survey
from ray_train_geo.actors.workforce import Workforce
from ray_train_geo.cluster.topology import Device, Link, Topology
from ray_train_geo.errors import GeoError, PlanError
from ray_train_geo.planning.budget import Budget
from ray_train_geo.planning.corrections import Corrections
from ray_train_geo.planning.flapping import Flapping
from ray_train_geo.planning.plan import Plan
from ray_train_geo.planning.policy import ChangeHistory
from ray_train_geo.planning.replan import replan
from ray_train_geo.training.checkpoint import CheckpointStore
from ray_train_geo.training.mission import Mission

__all__ = ["Recruiter"]

_POLL_S = 0.5
_PLANNING_S = 1.0
_SURVEY_S = 3.0
"""The others' messages are on the same links."""


class Recruiter:
    """Looks for changes until it is closed.

    Args:
        workforce: starts workers.
        history: of changes of the run's devices.
        corrections: of what was measured.
    """

    def __init__(
        self,
        mission: Mission,
        store: CheckpointStore,
        recorder: Recorder,
        workforce: Workforce,
        offers: Offers,
        history: ChangeHistory,
        corrections: Corrections,
    ) -> None:
        self._mission = mission
        self._store = store
        self._recorder = recorder
        self._workforce = workforce
        self._offers = offers
        self._history = history
        self._corrections = corrections
        self._flapping = Flapping()
        self._machines = {n.id: n.machine for n in live_nodes()}
        self._declined = set(self._machines)
        self._starting: Crew | None = None
        self._bench: tuple[Crew, Mapping[tuple[str, str], Link]] | None = None
        self._again = False
        # Two: a worker that takes long to start must not hold up a notice.
        self._threads = [
            threading.Thread(target=self._keep, args=(look,), name=look.__name__, daemon=True)
            for look in (self._watch_drains, self._recruit)
        ]
        for thread in self._threads:
            thread.start()

    def lost(self, devices: Collection[Device]) -> None:
        """Devices were lost."""
        self._again = True
        self._went({d.node for d in devices})
        self.reconsider()

    def resume(self) -> None:
        """The change that was offered has been dealt with."""
        self.reconsider()
        self._offers.resume()

    def reconsider(self) -> None:
        """Things have changed: what was of no use before may be of use now."""
        self._declined.clear()

    def _went(self, nodes: Collection[str]) -> None:
        now_s = time.monotonic()
        # The same machine comes back as another node.
        for machine in {self._machines.get(node, node) for node in nodes}:
            self._flapping.went(machine, now_s)

    def close(self) -> None:
        """End the threads, and a worker that is being started; the offers are closed."""
        starting = self._starting
        if starting is not None:
            starting.dismiss()
        for thread in self._threads:
            thread.join()
        if self._bench is not None:
            self._bench[0].dismiss()

    def _keep(self, look: Callable[[Situation], None]) -> None:
        while not self._offers.closed.wait(_POLL_S):
            situation = self._offers.situation()
            if situation is None:
                continue
            try:
                look(situation)
            except (RayError, LostWorkerError, GeoError) as e:
                # A node that came may be gone again; what is there next time counts.
                if not self._offers.closed.is_set():
                    self._recorder.event("recruiting", message=str(e).splitlines()[0])
            except Exception:
                self._recorder.traceback("recruiter", {}, traceback.format_exc())

    # ------------------------------------------------------------------ nodes that must go

    def _watch_drains(self, situation: Situation) -> None:
        draining = draining_nodes()
        used = draining & {d.node for d in situation.plan.devices}
        if not used or situation.waiting:
            return
        if self._offers.propose(lambda now: self._without(now, draining)):
            self._went(used)

    def _without(self, now: Situation, draining: Collection[str]) -> Change | None:
        leaving = frozenset(d.id for d in now.topology.devices if d.node in draining)
        if now.waiting or not leaving & {d.id for d in now.plan.devices}:
            return None
        try:
            plan = self._replan(now, now.topology, leaving)
        except PlanError:
            return None  # the rest can't hold the model: go on for as long as the node lasts
        return Change("drain", "a node is being drained", now.plan, plan, leaving=leaving)

    # ------------------------------------------------------------------ nodes that come

    def _recruit(self, situation: Situation) -> None:
        if self._offers.pending:
            return
        devices = self._free(situation)
        if not devices and not (self._bench is not None and self._again):
            return
        bench, self._bench, self._again = self._bench, None, False
        crew, links = bench or (None, {})
        try:
            if devices:
                crew, found = self._ready(devices, situation, crew)
                links = {**links, **found}
            assert crew is not None
            crew.drop(crew.lost())
            recruits, known = crew, links
            if self._offers.propose(lambda now: self._with(now, recruits, known)):
                for device in recruits.devices:
                    self._flapping.came(self._machines.get(device.node), time.monotonic())
                return
        except BaseException:
            if crew is not None:
                crew.dismiss()
            raise
        if self._short(situation, crew) and not self._offers.closed.is_set():
            # They alone don't help, but with some more the job could have its own plan again.
            self._bench = crew, links
            return
        self._declined |= {d.node for d in crew.devices}
        crew.dismiss()

    def _ready(
        self, devices: list[Device], situation: Situation, bench: Crew | None
    ) -> tuple[Crew, dict[tuple[str, str], Link]]:
        """Workers on ``devices`` and those of the bench, and the new ones' links."""
        began = time.monotonic()
        nodes = sorted({d.node for d in devices})
        self._recorder.event("recruit", devices=[d.id for d in devices], nodes=nodes)
        crew = Crew(devices, self._mission.job, self._workforce, self._recorder)
        self._starting = crew
        try:
            measured(crew, self._mission, self._store)
            crew.warm_up(self._mission)
            links: dict[tuple[str, str], Link] = {}
            if self._mission.job.scaling.topology is None:
                # Who was there when these workers began to start may be gone by now.
                there = (self._offers.situation() or situation).spots
                job = self._mission.job
                budget_s = min(_SURVEY_S, job.scaling.probe_s)
                links = survey(crew, there, job.parallelism.most_flows, budget_s)
        except BaseException:
            crew.dismiss()
            self._went({d.node for d in devices})
            raise
        finally:
            self._starting = None
        self._recorder.event(
            "recruits",
            devices=[d.id for d in devices],
            nodes=nodes,
            seconds=time.monotonic() - began,
        )
        if bench is not None:
            crew.join(bench)
        return crew, links

    def _short(self, now: Situation, recruits: Crew) -> bool:
        """Whether even with the recruits there are fewer devices than the job's plan fixes."""
        fixed = fixed_workers(self._mission.job)
        there = len(now.topology.devices) + len(recruits.devices)
        return fixed is not None and there < fixed

    def _free(self, now: Situation) -> list[Device]:
        """Devices to try: not of the crew, not declined before, not those that keep failing."""
        scaling, most = self._mission.job.scaling, most_workers(self._mission.job)
        draining = draining_nodes()
        bench = self._bench[0].devices if self._bench is not None else ()
        ours = (*now.topology.devices, *bench)
        staying = sum(d.node not in draining for d in ours)
        taken = {d.id for d in ours}
        found: list[Device] = []
        # Last those that were lost: Ray may take a while to see that such a node is dead.
        for node in sorted(live_nodes(), key=lambda n: self._flapping.losses(n.machine)):
            self._machines[node.id] = node.machine
            out = self._flapping.kept_out(node.machine, time.monotonic())
            if out or node.id in draining or node.id in self._declined:
                continue
            if matches(node.labels, scaling.label_selector):
                found += devices_on(node, scaling, most, taken)
        return found if most is None else found[: max(0, most - staying)]

    def _with(
        self,
        now: Situation,
        crew: Crew,
        links: Mapping[tuple[str, str], Link],
    ) -> Change | None:
        """The change that the recruits make, if they are worth one."""
        # A change that was offered meanwhile may have brought them already.
        crew.drop({d.id for d in now.topology.devices})
        ready = crew.devices
        if not ready:
            return None
        topology = dataclasses.replace(
            now.topology,
            devices=(*now.topology.devices, *ready),
            node_links={**now.topology.node_links, **links},
        ).striped(self._mission.job.parallelism.most_flows)
        plan = None
        if not now.waiting:
            plan = self._replan(now, topology, frozenset())
            if not {d.id for d in ready} & {d.id for d in plan.devices}:
                return None
        return Change("join", "devices came", now.plan, plan, crew, topology)

    def _replan(self, now: Situation, topology: Topology, leaving: frozenset[str]) -> Plan:
        return replan(
            now.plan,
            self._corrections.apply(topology),
            job_for(self._mission.job, len(topology.devices) - len(leaving)),
            self._mission.vocab_size,
            budget=Budget(_PLANNING_S),
            expected_s=self._history.expected_s(topology.devices, time.monotonic()),
            leaving=leaving,
        ).plan
