"""One worker of a plan on a host of the geo lab: what ``benchmarks/worldwide.py`` starts there.

    python benchmarks/lab_worker.py FOLDER RANK STORE_HOST STORE_PORT UNTIL

FOLDER holds ``assignments.pickle`` (assignments by rank) and, where computation is emulated,
``topology.yaml``.  Rank 0 keeps the store, and writes each step's record to ``records.jsonl``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch.distributed import TCPStore

from ray_train_geo.cluster.topology_file import load_topology
from ray_train_geo.errors import StorageError
from ray_train_geo.training.assignment import Assignment, StepRecord
from ray_train_geo.training.checkpoint import CheckpointPart
from ray_train_geo.training.emulation import Emulation
from ray_train_geo.training.links import Links
from ray_train_geo.training.on_time import on_time
from ray_train_geo.training.runtime import StageRuntime

_PATIENCE = timedelta(seconds=120)


class Recorder:
    """Writes what rank 0 commits."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def committed(self, record: StepRecord) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(record)) + "\n")

    def part_written(self, step: int, part: CheckpointPart, state: Mapping[str, Any]) -> None:
        """Nobody goes on from a benchmark."""

    def part_failed(self, step: int, rank: int, error: StorageError) -> None:
        raise error


def main() -> None:
    folder, rank, host, port, until = Path(sys.argv[1]), *sys.argv[2:]
    torch.set_num_threads(1)
    on_time()
    assignments: list[Assignment] = pickle.loads((folder / "assignments.pickle").read_bytes())
    emulated = folder / "topology.yaml"
    emulation = Emulation(load_topology(emulated), links=False) if emulated.exists() else None
    store = TCPStore(
        host, int(port), is_master=rank == "0", wait_for_workers=False, timeout=_PATIENCE
    )
    assignment, device = assignments[int(rank)], torch.device("cpu")
    links = Links(assignment, store, device, emulation)
    runtime = StageRuntime(assignment, links, device, Recorder(folder / "records.jsonl"))
    try:
        runtime.build()
        runtime.run(int(until))
        # Rank 0 leaves last: the others may still ask its store.
        store.add("done", 1)
        if rank == "0":
            while store.add("done", 0) < len(assignments):
                pass
    finally:
        runtime.close()


if __name__ == "__main__":
    main()
