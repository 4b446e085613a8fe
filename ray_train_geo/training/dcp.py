"""torch's checkpoint format (DCP), one writer or reader at a time.

A module of its own, and imported where it is first needed: DCP brings DTensor and sympy along,
a third of what a worker would otherwise load before it can start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

__all__ = ["Written", "complete", "read", "write"]

Written: TypeAlias = tuple[SavePlan, list[WriteResult]]
"""What one writer tells whoever completes the checkpoint."""


def write(location: str, rank: int, tensors: Mapping[str, torch.Tensor]) -> Written:
    """Write ``rank``'s ``tensors`` into the folder or fsspec URL ``location``."""
    writer, planner = _writer(location), dcp.DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(tensors), is_coordinator=False)
    writer.set_up_storage_writer(False, rank=rank, use_collectives=False)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    return plan, writer.write_data(planner.finish_plan(plan), planner).wait()


def complete(location: str, written: Sequence[Written]) -> set[str]:
    """Write the metadata over all parts.

    Returns:
        The names of the parts' files.
    """
    writer, planner = _writer(location), dcp.DefaultSavePlanner(flatten_state_dict=False)
    writer.set_up_storage_writer(True)
    _, metadata = planner.create_global_plan([plan for plan, _ in written])
    writer.finish(metadata, [results for _, results in written])
    return {result.storage_data.relative_path for _, results in written for result in results}


def read(location: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill ``tensors`` (by name): DCP's ``load``, but without a process group."""
    reader: FileSystemReader = (
        FsspecReader(location) if _is_url(location) else FileSystemReader(location)
    )
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    metadata = reader.read_metadata()
    planner.set_up_planner(dict(tensors), metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    (plan,) = reader.prepare_global_plan(planner.create_global_plan([plan]))
    reader.read_data(planner.finish_plan(plan), planner).wait()


def _writer(location: str) -> FileSystemWriter:
    return FsspecWriter(location) if _is_url(location) else FileSystemWriter(location)


def _is_url(location: str) -> bool:
    return "://" in location
