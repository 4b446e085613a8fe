"""A stand-in for the systems' models: times that a test can tell beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray_train_geo.cluster.topology import Topology
from ray_train_geo.errors import PlanError
from ray_train_geo.systems.simulated import Simulated


@dataclass
class Systems:
    """Takes the place of ``simulate``; remembers what it was asked.

    Args:
        step_s: seconds by system; one that is missing can't do anything.
    """

    step_s: Mapping[str, float]
    asked: list[dict[str, Any]] = field(default_factory=list)

    def __call__(
        self,
        system: str,
        model: str,
        global_batch: int,
        *,
        scenario: str | None = None,
        topology: Topology | None = None,
        settings: Mapping[str, str] | None = None,
        trace: bool = False,
    ) -> Simulated:
        self.asked.append(
            {
                "system": system,
                "model": model,
                "global_batch": global_batch,
                "scenario": scenario,
                "topology": topology,
                "settings": dict(settings or {}),
            }
        )
        if system not in self.step_s:
            raise PlanError(f"{system} needs one node:\n  give it less")
        return simulated(system, self.step_s[system], model, global_batch)


def simulated(
    system: str, step_s: float, model: str = "gpt3-xl-24", global_batch: int = 1024, **more: Any
) -> Simulated:
    figures: dict[str, Any] = {
        "scenario": "worldwide",
        "devices": 64,
        "pflop": 20.0,
        "efficiency": 0.25,
        "breakdown": {"compute": 0.75 * step_s, "gradient sync": 0.25 * step_s},
        "tokens_per_s": 1e5,
        "dollars_per_million_tokens": 0.125,
        **more,
    }
    return Simulated(
        system=system, model=model, global_batch=global_batch, step_s=step_s, **figures
    )
