"""What the policies cost: every constant of a replay that is neither the plan's nor the trace's.

Measured on a shared 2-core machine with Ray 2.60 unless a line says otherwise; what nobody measured
says that it is assumed.  All of them can be overridden (``--assume ours.detect_s=1``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from ray_train_geo.errors import SpecError

__all__ = [
    "Assumptions",
    "CheckpointRestartCosts",
    "OursCosts",
    "RestartCosts",
    "TorchftCosts",
    "assumptions",
]


@dataclass(frozen=True, slots=True)
class OursCosts:
    """Ours: re-plan, stream what is missing, go on.

    Args:
        detect_s: until a node that vanished is missed: Ray's health check at 500 ms x 4 saw a
            partition after 5.8 s (a killed worker is noticed within 0.1 s).
        plan_s: until there is a plan for the survivors: the limit that the planner is tested for.
        better_plan_s: until a plan from scratch is found in the background (64 devices: 0.5-2 s).
        rebuild_s: new process groups everywhere, and the pause in which a join or a drain takes
            effect: the runtime's own limit (re-creating a gloo group takes 1-18 ms).
        join_s: from a node's appearance to a worker that can receive: a node 2-3 s, an actor with
            torch 1.2 s.
        overlap_factor: by how much a transfer takes longer while others train (assumed: the
            streams get half of the links).
        copy_steps: steps that are lost where a layer comes from the in-memory copy on a peer.
        step_overhead: what heartbeats, commits and copies cost, of a step: not measured yet; the
            runtime may take 0.03 at most.
    """

    detect_s: float = 5.8
    plan_s: float = 1.0
    better_plan_s: float = 2.0
    rebuild_s: float = 0.5
    join_s: float = 4.0
    overlap_factor: float = 2.0
    copy_steps: float = 1.0
    step_overhead: float = 0.0


@dataclass(frozen=True, slots=True)
class CheckpointRestartCosts:
    """Checkpoint and restart, as a careful operator does it.

    Args:
        detect_s: Ray's default health check calls a killed node dead after 13.5 s.
        restart_s: new processes that can read the checkpoint: ``ray.init`` 4-5 s, an actor with
            torch 1.2 s.
    """

    detect_s: float = 13.5
    restart_s: float = 6.0


@dataclass(frozen=True, slots=True)
class RestartCosts:
    """Restart at every change: Ray Train 2.60, elastic by restart.

    Args:
        replaced_s: outage, detection included, when the new plan has no fewer pipelines.
        shrunk_s: the same when it has fewer (64-66 s).
    """

    replaced_s: float = 31.0
    shrunk_s: float = 65.0


@dataclass(frozen=True, slots=True)
class TorchftCosts:
    """torchft 0.2.0: replica groups.

    Args:
        failure_s: from a kill to the next commit, default settings (1.0 s with a heartbeat of 1 s).
        start_s: until a new group can receive state, as ``join_s`` of ours.
        overlap_factor: as ours: the others train while a group heals (assumed).
        step_overhead: of its heartbeats, quorums and commits: not measured.
    """

    failure_s: float = 5.0
    start_s: float = 4.0
    overlap_factor: float = 2.0
    step_overhead: float = 0.0


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Of all policies."""

    ours: OursCosts = field(default_factory=OursCosts)
    checkpoint_restart: CheckpointRestartCosts = field(default_factory=CheckpointRestartCosts)
    restart: RestartCosts = field(default_factory=RestartCosts)
    torchft_like: TorchftCosts = field(default_factory=TorchftCosts)


def assumptions(overrides: Sequence[str] = ()) -> Assumptions:
    """The usual ones, with ``POLICY.NAME=VALUE`` in place of some.

    Raises:
        SpecError: an unknown name, or a value that is no number from 0 on.
    """
    found = Assumptions()
    known = {
        f"{policy.name.replace('_', '-')}.{cost.name}": (policy.name, cost.name)
        for policy in fields(found)
        for cost in fields(getattr(found, policy.name))
    }
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals or name not in known:
            raise SpecError(f"no assumption {text!r}: give NAME=VALUE, NAME of {', '.join(known)}")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 <= number < math.inf:
            raise SpecError(f"assumption {name}: {value!r} is no number from 0 on")
        policy, cost = known[name]
        costs = dataclasses.replace(getattr(found, policy), **{cost: number})
        found = dataclasses.replace(found, **{policy: costs})
    return found
