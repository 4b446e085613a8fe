"""Elastic decentralized training over GPUs that are far apart, unequal, cheap and unreliable."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_train_geo.driver import Callback
    from ray_train_geo.errors import GeoError, InputError, RunError
    from ray_train_geo.planning.plan import Plan
    from ray_train_geo.planning.request import plan
    from ray_train_geo.replay.run import replay_trace
    from ray_train_geo.spec import JobSpec, load_job, parse_job
    from ray_train_geo.systems.comparison import Comparison, compare
    from ray_train_geo.systems.simulate import simulate
    from ray_train_geo.systems.simulated import Simulated
    from ray_train_geo.trainer import (
        Checkpoint,
        CheckpointConfig,
        FailureConfig,
        GeoTrainer,
        Result,
        RunConfig,
        ScalingConfig,
    )

__all__ = [
    "Callback",
    "Checkpoint",
    "CheckpointConfig",
    "Comparison",
    "FailureConfig",
    "GeoError",
    "GeoTrainer",
    "InputError",
    "JobSpec",
    "Plan",
    "Result",
    "RunConfig",
    "RunError",
    "ScalingConfig",
    "Simulated",
    "compare",
    "load_job",
    "parse_job",
    "plan",
    "replay_trace",
    "simulate",
]

__version__ = "0.1.0"

_HOMES = {
    "Callback": "driver",
    "GeoError": "errors",
    "InputError": "errors",
    "RunError": "errors",
    "Plan": "planning.plan",
    "plan": "planning.request",
    "replay_trace": "replay.run",
    "Comparison": "systems.comparison",
    "compare": "systems.comparison",
    "simulate": "systems.simulate",
    "Simulated": "systems.simulated",
    "JobSpec": "spec",
    "load_job": "spec",
    "parse_job": "spec",
}


def __getattr__(name: str) -> Any:
    # On demand, so that the pure parts import neither torch nor Ray, and work without them.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'trainer')}"), name)
