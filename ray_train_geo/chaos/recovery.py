"""How long the run took to get over each fault, from its own record (level 0)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ray_train_geo.chaos.faults import Fault

__all__ = ["Injection", "Recovery", "median_step_s", "recoveries"]

Records = Sequence[Mapping[str, Any]]

_CHANGES = ("recovery", "reshape")


@dataclass(frozen=True, slots=True)
class Injection:
    """A fault that was injected.

    Args:
        time: unix seconds.
        target: what it befell.
        phase: what the worker that it befell was doing, where that is known.
        step: the newest committed one.
        generation: the number of the one in force.
    """

    fault: Fault
    time: float
    target: str
    phase: str | None
    step: int
    generation: int


@dataclass(frozen=True, slots=True)
class Recovery:
    """What an injection led to; None is what did not happen.

    Args:
        injection: the fault.
        noticed_s: from the fault until the run knew that something was lost, and what.
        settle_s, plan_s, transfer_s, build_s: as the run's ``recovery`` event says.
        commit_s: from the fault to the first committed step of the next generation (or simply the
            next step, where none followed).
        pause_s: between the last step before that one and it.
        lost_steps: committed steps that had to be computed anew.
    """

    injection: Injection
    noticed_s: float | None = None
    settle_s: float | None = None
    plan_s: float | None = None
    transfer_s: float | None = None
    build_s: float | None = None
    commit_s: float | None = None
    pause_s: float | None = None
    lost_steps: int | None = None

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        return {**found, "injection": {**found["injection"], "fault": str(self.injection.fault)}}


def recoveries(
    injections: Sequence[Injection], events: Records, records: Records
) -> list[Recovery]:
    """One for each injection."""
    return [_recovery(injection, events, records) for injection in injections]


def _recovery(i: Injection, events: Records, records: Records) -> Recovery:
    later = [e for e in events if e["time"] >= i.time]
    after = [r for r in records if r["time"] >= i.time]
    changes = (e for e in later if e.get("event") in _CHANGES)
    change = next((e for e in changes if int(e.get("generation", 0)) > i.generation), None)
    if change is None:
        # Nothing had to change, as when the coordinator alone is replaced.
        commit_s, pause_s = _commit(i, after[:1], records)
        return Recovery(i, commit_s=commit_s, pause_s=pause_s)
    between = [e for e in later if e["time"] <= change["time"]]
    failures = [e for e in between if e.get("event") == "failure"]
    restores = [e for e in between if e.get("event") == "restore"]
    commit_s, pause_s = _commit(
        i, [r for r in after if int(r["generation"]) > i.generation], records
    )
    return Recovery(
        i,
        noticed_s=failures[0]["time"] - i.time if failures else None,
        settle_s=change.get("settle_s"),
        plan_s=change.get("plan_s"),
        transfer_s=change.get("transfer_s"),
        build_s=change.get("build_s"),
        commit_s=commit_s,
        pause_s=pause_s,
        lost_steps=sum(int(r["lost_steps"]) for r in restores),
    )


def _commit(i: Injection, new: Records, records: Records) -> tuple[float | None, float | None]:
    """Until the first of ``new`` from the fault, and from the step before."""
    if not new:
        return None, None
    at = new[0]["time"]
    before = [r["time"] for r in records if r["time"] < at]
    return at - i.time, at - max(before) if before else None


def median_step_s(records: Records) -> float:
    """Of all committed steps; 0 if there are none."""
    return statistics.median(r["step_s"] for r in records) if records else 0.0
