"""The replay: a trace and a job in, what each policy makes of them out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ray_train_geo.cluster.topology import Topology
from ray_train_geo.cluster.topology_file import load_topology
from ray_train_geo.cluster.traces import load_trace
from ray_train_geo.errors import SpecError
from ray_train_geo.planning.request import PlanRequest, request
from ray_train_geo.replay.assumptions import Assumptions, assumptions
from ray_train_geo.replay.checkpoints import Checkpoints
from ray_train_geo.replay.fixed_shape import FixedShape
from ray_train_geo.replay.fleet import Fleet, Hardware, fleet_of
from ray_train_geo.replay.ledger import Ledger
from ray_train_geo.replay.on_demand import OnDemand
from ray_train_geo.replay.ours import Ours
from ray_train_geo.replay.outcome import Outcome
from ray_train_geo.replay.plan_book import PlanBook
from ray_train_geo.replay.policy import Policy, play
from ray_train_geo.replay.reference import reference_steps
from ray_train_geo.replay.restarting import Restarting, careful_outage, plain_outage
from ray_train_geo.replay.torchft_like import TorchftLike
from ray_train_geo.spec import JobSpec, Precision

__all__ = ["POLICIES", "PolicyName", "Replay", "replay_fleet", "replay_trace"]

PolicyName = Literal["ours", "checkpoint-restart", "restart", "torchft-like", "on-demand"]

POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)


@dataclass(frozen=True, slots=True)
class Replay:
    """What came out.

    Args:
        outcomes: of each policy, in the order of :data:`POLICIES`.
    """

    trace: str
    fleet: Fleet
    outcomes: tuple[Outcome, ...]

    def to_json(self) -> dict[str, Any]:
        """All figures of all policies, and how many devices were there when."""
        return {
            "trace": self.trace,
            "seconds": self.fleet.end_s,
            "mean_devices": self.fleet.mean_devices,
            "devices": [
                {"start_s": start_s, "end_s": end_s, "devices": len(self.fleet.devices(nodes))}
                for start_s, end_s, nodes in self.fleet.phases
            ],
            "policies": [outcome.to_json() for outcome in self.outcomes],
        }


def replay_trace(
    trace: str | Path,
    job: JobSpec | str | Path | None = None,
    *,
    model: str | None = None,
    global_batch: int | None = None,
    seq_len: int | None = None,
    microbatch: int | None = None,
    precision: Precision | None = None,
    recompute: bool | None = None,
    vocab_size: int | None = None,
    codecs: Sequence[str] | None = None,
    gpu: str | None = None,
    gpus_per_node: int | None = None,
    regions: Sequence[str] = (),
    topology: Topology | str | Path | None = None,
    policies: Sequence[str] = POLICIES,
    until_h: float | None = None,
    max_nodes: int | None = None,
    notice_s: float | None = None,
    checkpoint_interval_s: float | None = None,
    assume: Sequence[str] = (),
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> Replay:
    """Replay a spot trace: what a job would have got done under each policy.

    ::

        replay_trace("aws-p3", model="gpt3-xl", global_batch=512, gpu="V100-16G")
        replay_trace("trace.csv", "job.yaml", topology="cluster.yaml", policies=["ours"])

    Args:
        trace: a file, or a name in ``ray_train_geo.cluster.traces.TRACES``.
        job: a job spec, or its file; or else a ``model`` with its ``global_batch`` (as `plan`).
        gpu: what a node holds, a type of the catalog; not beside a ``topology``.
        gpus_per_node: Default: 1.
        regions: nodes are dealt to them in turn; several need links known from DT-FM's
            measurements.  Default: one.
        topology: nodes that the trace's nodes stand for, and the links between them.
        policies: names in :data:`POLICIES`.
        until_h: hours to replay.  Default: to the trace's last event.
        max_nodes: that are used at the same time.  Default: all.
        notice_s: warning before each removal that the trace does not announce.  Default: none.
        checkpoint_interval_s: Default: Young's optimum for each policy.
        assume: ``POLICY.NAME=VALUE``, in place of `replay.assumptions`.
        seed: of the planner, and of who leaves where a trace has only counts.
        overrides: ``section.field=value`` for the job.

    Raises:
        SpecError: the request makes no sense, or the trace, job or topology is faulty.
        PlanError: no plan fits, even when most devices are there.
    """
    chosen = _policies(policies)
    costs = assumptions(assume)
    _check_numbers(
        until_h=until_h,
        max_nodes=max_nodes,
        gpus_per_node=gpus_per_node,
        notice_s=notice_s,
        checkpoint_interval_s=checkpoint_interval_s,
    )
    read = load_trace(trace, seed)
    if until_h is not None:
        read = read.until(until_h * 3600)
    if notice_s is not None:
        read = read.with_notice(notice_s)
    if topology is None:
        hardware = Hardware(gpu, gpus_per_node or 1, tuple(regions) or ("local",))
        fleet = fleet_of(read, hardware, max_nodes=max_nodes)
    elif gpu is not None or gpus_per_node is not None or regions:
        raise SpecError("a topology says what its nodes are; leave out gpu, gpus_per_node, regions")
    else:
        network = topology if isinstance(topology, Topology) else load_topology(topology)
        fleet = fleet_of(read, topology=network, max_nodes=max_nodes)
    asked = request(
        job,
        topology=fleet.topology,
        model=model,
        global_batch=global_batch,
        seq_len=seq_len,
        microbatch=microbatch,
        precision=precision,
        recompute=recompute,
        vocab_size=vocab_size,
        codecs=codecs,
        seed=seed,
        overrides=overrides,
    )
    outcomes = replay_fleet(fleet, asked, chosen, costs, checkpoint_interval_s)
    return Replay(read.name, fleet, outcomes)


def replay_fleet(
    fleet: Fleet,
    asked: PlanRequest,
    policies: Sequence[PolicyName] = POLICIES,
    costs: Assumptions | None = None,
    checkpoint_interval_s: float | None = None,
) -> tuple[Outcome, ...]:
    """What each policy makes of ``fleet``.

    Args:
        asked: the job; its topology is the fleet's.

    Raises:
        PlanError: no plan fits, even when most devices are there.
    """
    book = PlanBook(asked)
    book.check(fleet.largest())
    played = _Played(fleet, book, costs or Assumptions(), checkpoint_interval_s)
    runs = {name: played.by(name) for name in policies}
    spot = [run.ledger for name, run in runs.items() if name != "on-demand"]
    outcomes = []
    for name, run in runs.items():
        alone = name == "on-demand"
        ledgers = [run.ledger] if alone else spot
        steps = reference_steps(run.ledger.fleet, book, ledgers)
        outcomes.append(
            Outcome.of(
                name,
                "on-demand" if alone else "spot",
                run.ledger,
                asked.job,
                run.replans,
                played.fixed_stages(name),
                steps * asked.job.training.global_batch,
            )
        )
    return tuple(outcomes)


class _Played:
    """Makes and plays the policies of one replay."""

    def __init__(
        self, fleet: Fleet, book: PlanBook, costs: Assumptions, interval_s: float | None
    ) -> None:
        self._fleet, self._book, self._costs, self._interval_s = fleet, book, costs, interval_s
        self._known_shape: FixedShape | None = None

    def by(self, name: PolicyName) -> Policy:
        """The policy ``name``, after all has happened."""
        policy = self._made(name)
        play(policy)
        return policy

    def fixed_stages(self, name: PolicyName) -> int | None:
        """The depth of all pipelines under a policy that keeps to one."""
        return None if name in ("ours", "on-demand") else self._shape.stages

    def _made(self, name: PolicyName) -> Policy:
        fleet, book, costs = self._fleet, self._book, self._costs
        match name:
            case "ours":
                expected_s = fleet.mean_interval_s("joined", "left")
                saves = self._checkpoints("left")
                return Ours(Ledger(fleet), book, saves, costs.ours, expected_s)
            case "checkpoint-restart":
                outage_s = careful_outage(costs.checkpoint_restart)
                saves = self._checkpoints("left")
                return Restarting(Ledger(fleet), self._shape, saves, outage_s, at_joins=False)
            case "restart":
                outage_s = plain_outage(costs.restart)
                saves = self._checkpoints("left", "joined")
                return Restarting(Ledger(fleet), self._shape, saves, outage_s, at_joins=True)
            case "torchft-like":
                saves = self._checkpoints("left")
                return TorchftLike(Ledger(fleet), self._shape, saves, costs.torchft_like)
            case "on-demand":
                return OnDemand(Ledger(fleet.steady()), book)

    @property
    def _shape(self) -> FixedShape:
        if self._known_shape is None:
            usual = self._fleet.typical()
            if self._book.best(usual) is None:
                usual = self._fleet.largest()
            self._known_shape = FixedShape(self._book, usual)
        return self._known_shape

    def _checkpoints(self, *failures: str) -> Checkpoints:
        every_s = self._fleet.mean_interval_s(*failures)
        return Checkpoints(self._fleet.topology, self._book.dims, every_s, self._interval_s)


def _policies(names: Sequence[str]) -> tuple[PolicyName, ...]:
    unknown = [name for name in names if name not in POLICIES]
    if unknown or not names:
        what = f"unknown policy {unknown[0]!r}" if unknown else "no policy"
        raise SpecError(f"{what}: choose of {', '.join(POLICIES)}")
    return tuple(name for name in POLICIES if name in names)


def _check_numbers(**given: float | None) -> None:
    for name, value in given.items():
        if value is not None and not 0 < value < math.inf:
            raise SpecError(f"{name} is {value}: give a number above 0, or leave it out")
