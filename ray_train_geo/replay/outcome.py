"""What a policy made of a fleet: samples, device-seconds, dollars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray_train_geo.cluster.gpus import gpu_variants
from ray_train_geo.cluster.topology import Device, MarketType
from ray_train_geo.replay.fleet import Fleet
from ray_train_geo.replay.ledger import Ledger, Span
from ray_train_geo.spec import JobSpec

__all__ = ["Outcome", "usd"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one policy.  All device-seconds of the fleet are productive, lost, downtime or idle.

    Args:
        market_type: of the devices that it uses.
        steps: committed and never undone.
        undone_steps: committed, and done once more later.
        cut_off_steps: under way when training stopped.
        productive_device_s: in steps that were committed for good.
        lost_device_s: in steps that were undone or cut off.
        downtime_device_s: of all devices while training is stopped, checkpoints included.
        idle_device_s: of devices that are there and in no plan.
        downtime_s: in which no step ran although devices enough were there.
        waiting_s: in which too few devices were there.
        replans: plans that came into force, the first included.
        fixed_stages: of each pipeline, where the policy keeps to one depth.
        usd_spot, usd_on_demand: what the fleet costs by the catalog's prices (or the topology's);
            None where one is not known.
        reference_samples: what the same devices would have done undisturbed, each fleet on the
            best plan that is known for it.
    """

    policy: str
    market_type: MarketType
    seconds: float
    samples: int
    tokens: int
    steps: int
    undone_steps: int
    cut_off_steps: int
    productive_device_s: float
    lost_device_s: float
    downtime_device_s: float
    idle_device_s: float
    downtime_s: float
    waiting_s: float
    joins: int
    leaves: int
    notices: int
    replans: int
    fixed_stages: int | None
    usd_spot: float | None
    usd_on_demand: float | None
    reference_samples: float
    global_batch: int
    spans: Sequence[Span]

    @classmethod
    def of(
        cls,
        policy: str,
        market_type: MarketType,
        ledger: Ledger,
        job: JobSpec,
        replans: int,
        fixed_stages: int | None,
        reference_samples: float,
    ) -> Outcome:
        """Add up what the ledger says; nodes that are there from the start have not joined."""
        fleet, spans = ledger.fleet, ledger.spans
        later = [c for c in fleet.changes if c.time_s > 0]
        steps = sum(s.steps for s in spans if s.kind == "training")
        samples = steps * job.training.global_batch
        there = [fleet.device_s(s.start_s, s.end_s) for s in spans]
        training = [(s, d) for s, d in zip(spans, there, strict=True) if s.kind == "training"]
        stopped = [(s, d) for s, d in zip(spans, there, strict=True) if s.kind == "stopped"]
        waiting = [(s, d) for s, d in zip(spans, there, strict=True) if s.kind == "waiting"]
        return cls(
            policy=policy,
            market_type=market_type,
            seconds=fleet.end_s,
            samples=samples,
            tokens=samples * job.training.seq_len,
            steps=steps,
            undone_steps=sum(s.undone for s in spans),
            cut_off_steps=sum(s.cut_off for s in spans),
            productive_device_s=sum(s.devices * s.productive_s for s, _ in training),
            lost_device_s=sum(s.devices * s.lost_s for s, _ in training),
            downtime_device_s=sum(d for _, d in stopped)
            + sum(s.devices * s.saving_s for s, _ in training),
            idle_device_s=sum(d for _, d in waiting)
            + sum(d - s.devices * s.seconds for s, d in training),
            downtime_s=sum(s.seconds for s, _ in stopped) + sum(s.saving_s for s, _ in training),
            waiting_s=sum(s.seconds for s, _ in waiting),
            joins=sum(len(c.joined) for c in later),
            leaves=sum(len(c.left) for c in later),
            notices=sum(len(c.noticed) for c in later),
            replans=replans,
            fixed_stages=fixed_stages,
            usd_spot=usd(fleet, "spot"),
            usd_on_demand=usd(fleet, "on-demand"),
            reference_samples=reference_samples,
            global_batch=job.training.global_batch,
            spans=tuple(spans),
        )

    @property
    def goodput(self) -> float:
        """Of what the same devices would have done undisturbed; 0 if that is nothing."""
        return self.samples / self.reference_samples if self.reference_samples else 0.0

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.seconds

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def device_s(self) -> float:
        """All device-seconds of the fleet."""
        return (
            self.productive_device_s
            + self.lost_device_s
            + self.downtime_device_s
            + self.idle_device_s
        )

    def usd_per_million_tokens(self, market_type: MarketType) -> float | None:
        """None where a price is not known, or nothing was done."""
        total = self.usd_spot if market_type == "spot" else self.usd_on_demand
        return None if total is None or not self.tokens else total / (self.tokens / 1e6)

    def rates(self) -> list[tuple[float, float, float]]:
        """``(start_s, end_s, samples per second)`` of what was committed for good, span by span."""
        return [
            (s.start_s, s.end_s, max(0, s.steps) * self.global_batch / s.seconds)
            if s.kind == "training"
            else (s.start_s, s.end_s, 0.0)
            for s in self.spans
        ]

    def losses(self) -> list[tuple[float, float]]:
        """``(moment, device-seconds)`` of work that was lost when training stopped."""
        return [
            (s.end_s, s.devices * s.lost_s)
            for s in self.spans
            if s.kind == "training" and (s.undone or s.cut_off) and s.end_s < self.seconds
        ]

    def to_json(self) -> dict[str, Any]:
        """All figures, and the timeline."""
        return {
            "policy": self.policy,
            "market_type": self.market_type,
            "fixed_stages": self.fixed_stages,
            "goodput": self.goodput,
            "seconds": self.seconds,
            "samples": self.samples,
            "tokens": self.tokens,
            "samples_per_s": self.samples_per_s,
            "tokens_per_s": self.tokens_per_s,
            "reference_samples": self.reference_samples,
            "steps": self.steps,
            "undone_steps": self.undone_steps,
            "cut_off_steps": self.cut_off_steps,
            "productive_device_s": self.productive_device_s,
            "lost_device_s": self.lost_device_s,
            "downtime_device_s": self.downtime_device_s,
            "idle_device_s": self.idle_device_s,
            "device_s": self.device_s,
            "downtime_s": self.downtime_s,
            "waiting_s": self.waiting_s,
            "events": {
                "joins": self.joins,
                "leaves": self.leaves,
                "notices": self.notices,
                "replans": self.replans,
            },
            "usd": {"spot": self.usd_spot, "on-demand": self.usd_on_demand},
            "usd_per_million_tokens": {
                "spot": self.usd_per_million_tokens("spot"),
                "on-demand": self.usd_per_million_tokens("on-demand"),
            },
            "timeline": [
                {
                    "state": s.kind,
                    "start_s": s.start_s,
                    "end_s": s.end_s,
                    "devices": s.devices,
                    "step_s": None if math.isinf(s.step_s) else s.step_s,
                    "steps": s.steps,
                    "undone_steps": s.undone,
                }
                for s in self.spans
            ],
        }


def usd(fleet: Fleet, market_type: MarketType) -> float | None:
    """What all devices cost while they are there; None where a price is not known."""
    total = 0.0
    for start_s, end_s, nodes in fleet.phases:
        for device in fleet.devices(nodes):
            price = _price_per_hour(device, market_type)
            if price is None:
                return None
            total += price * (end_s - start_s) / 3600
    return total


def _price_per_hour(device: Device, market_type: MarketType) -> float | None:
    """The device's own, or for the other market the catalog's for its type."""
    if device.market_type == market_type and device.price_per_hour:
        return device.price_per_hour
    known = gpu_variants(device.type)
    return known[0].price_per_hour(market_type) if known else None
