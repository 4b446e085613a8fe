"""What a coordinator leaves to its successor: a small file in the run directory.

It is replaced whole before the workers are told of a new generation, so that no number is ever
used twice: a successor goes on with the generation that the file names, or with a later one.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass

from ray_train_geo.actors.stage_worker import WorkerInfo
from ray_train_geo.cluster.topology import Topology
from ray_train_geo.observe.run_directory import RunDirectory
from ray_train_geo.planning.plan import Plan
from ray_train_geo.training.assignment import Outcome
from ray_train_geo.training.mission import Summary

__all__ = ["Estate", "Reign"]

_FILE = ".coordinator"


@dataclass(frozen=True, slots=True)
class Reign:
    """A generation in force, or being built.

    Args:
        topology: of the crew's devices.
        workers: name and whereabouts of each device's worker.
        outcome: how the run of steps ended, if it was the last one.
    """

    generation: int
    plan: Plan
    topology: Topology
    workers: Mapping[str, tuple[str, WorkerInfo]]
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True)
class Estate:
    """All that a successor must know.

    Args:
        session: of the mission; that of an earlier session is none of its business.
        incarnation: how many coordinators there have been.
        step: committed when the last one began.
        failures: coordinators that have died one after the other with no step between them.
        reign: None while the first workers are being started.
        summary: the run has ended, and how.
    """

    session: str
    incarnation: int = 1
    step: int = 0
    failures: int = 0
    reign: Reign | None = None
    summary: Summary | None = None

    def save(self, run: RunDirectory) -> None:
        """Write it, atomically.

        Raises:
            StorageError: it can't be written.
        """
        run.write_bytes(_FILE, pickle.dumps(self))

    @classmethod
    def load(cls, run: RunDirectory, session: str) -> Estate | None:
        """What the predecessor left, if there was one in this session."""
        data = run.read_bytes(_FILE)
        found = None if data is None else pickle.loads(data)
        return found if isinstance(found, cls) and found.session == session else None
