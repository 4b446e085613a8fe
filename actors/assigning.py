"""What each worker of a new generation is told: its role, and where its state comes from."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ray_train_geo.actors.crew import Crew
from ray_train_geo.cluster.topology import Topology
from ray_train_geo.model.catalog import ModelDims
from ray_train_geo.planning.plan import Plan
from ray_train_geo.spec import JobSpec
from ray_train_geo.training.assignment import Assignment, Handover, Start
from ray_train_geo.training.buckets import holding_devices
from ray_train_geo.training.copies import CopyDuty, copy_duties, copy_interval, spare_keepers
from ray_train_geo.training.groups import flows_of
from ray_train_geo.training.mission import Mission
from ray_train_geo.training.sources import Sources, sources_of
from ray_train_geo.training.standing import Bequest, Common

__all__ = ["assignments"]


def assignments(
    mission: Mission,
    plan: Plan,
    topology: Topology,
    crew: Crew,
    generation: int,
    transport: Literal["gloo", "nccl"],
    checkpoint_root: str,
    state: Start | Common | None,
) -> list[Assignment]:
    """One assignment a rank.

    Args:
        topology: also of devices without a role, which may have state to give.
        state: what all begin with.
    """
    job, dims = mission.job, mission.dims
    duties = _duties(job, plan, dims, topology)
    flows = flows_of(plan, dims, topology, job.local_sgd)
    sources: dict[str, Sources] = {}
    bequests: dict[str, dict[str, list[Bequest]]] = {}
    keepers: dict[int, int] = {}
    if job.codecs.feeds_back and job.failure.memory_copies != 0:
        keepers = spare_keepers(plan, dims, topology)
    if isinstance(state, Common):
        sources = sources_of(plan, dims, topology, state.holders, job.local_sgd)
        bequests = state.bequests(holding_devices(plan, dims))
    found = []
    for role in plan.roles():
        device = plan.stage(role).device
        start: Start | Handover | None
        if isinstance(state, Common):
            places = {n: crew.info(peer).state for n, peer in sources[device].devices.items()}
            restarts = frozenset(sources[device].restarts)
            left = {
                name: [(crew.info(b.giver).state, b.owner) for b in left_behind]
                for name, left_behind in bequests.get(device, {}).items()
            }
            start = Handover(state.step, state.updates, state.loss_scale, places, restarts, left)
        else:
            start = state
        duty = duties.get(role.rank)
        peer_rank = None if duty is None else duty.peer
        peer = None if peer_rank is None else plan.devices[peer_rank].id
        keeper = keepers.get(role.rank)
        found.append(
            Assignment(
                job=job,
                dims=dims,
                plan=plan,
                rank=role.rank,
                generation=generation,
                hostname=crew.info(device).address,
                deadline_s=_deadline_s(job, plan),
                checkpoint_root=checkpoint_root,
                transport=transport,
                data_fingerprint=mission.data_fingerprint,
                start=start,
                copies=duty,
                copies_to=None if peer is None else crew.info(peer).state,
                spares_to=None if keeper is None else crew.info(plan.devices[keeper].id).state,
                flows=flows,
            )
        )
    return found


def _duties(job: JobSpec, plan: Plan, dims: ModelDims, topology: Topology) -> dict[int, CopyDuty]:
    interval = job.failure.memory_copies
    if interval == 0:
        return {}
    duties = copy_duties(plan, dims, topology)
    if interval is None and duties:
        interval = copy_interval(duties, plan, dims, topology, job.local_sgd is not None)
    return {r: dataclasses.replace(d, interval=interval or 1) for r, d in duties.items()}


def _deadline_s(job: JobSpec, plan: Plan) -> float:
    """Longest wait for one message.

    Ten times the whole predicted step, as a prediction may be off and a machine may be loaded,
    and a minute on top for what is slow once: cold links, first kernels, a data file's pages.
    """
    return job.failure.deadline_s or 60.0 + 10.0 * plan.predicted_step_s
