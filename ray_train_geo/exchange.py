"""Import from and export to Hugging Face: checkpoints of ours on one side, folders on the other."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from ray_train_geo.driver import find_checkpoint
from ray_train_geo.errors import CheckpointError, StorageError
from ray_train_geo.model.catalog import ModelDims, parameter_shapes
from ray_train_geo.model.huggingface import read_huggingface, write_huggingface
from ray_train_geo.training.checkpoint import (
    CheckpointStore,
    read_manifest,
    read_tensors,
    write_part,
)

__all__ = ["export_huggingface", "import_huggingface"]


def export_huggingface(source: str, folder: Path, tokenizer_json: Path | None = None) -> ModelDims:
    """Write the weights of a checkpoint (or of a run's newest one) as a Hugging Face folder.

    Raises:
        CheckpointError: there is no complete checkpoint at ``source``, or it is corrupt.
        StorageError: ``folder`` can't be written.
    """
    location = find_checkpoint(source)
    manifest = read_manifest(location)
    try:
        dims = ModelDims(**manifest.identity["model"])
    except (KeyError, TypeError):
        raise CheckpointError(f"checkpoint {location} does not say what model it holds") from None
    state = {name: torch.empty(shape) for name, shape in parameter_shapes(dims).items()}
    read_tensors(location, manifest, {f"model.{name}": t for name, t in state.items()})
    try:
        write_huggingface(folder, dims, state, tokenizer_json)
    except OSError as e:
        raise StorageError(f"can't write {folder}: {e.strerror or e}") from None
    return dims


def import_huggingface(folder: Path, out: Path) -> Path:
    """Turn a Hugging Face folder into a checkpoint to start from, and a job spec that does so.

    Returns:
        The job spec, ``OUT/job.yaml``; the weights are in ``OUT/checkpoints``.

    Raises:
        CheckpointError, SpecError: the folder holds no model that can be imported.
        StorageError: ``out`` can't be written.
    """
    dims, state = read_huggingface(folder)
    store = CheckpointStore(str(out.absolute() / "checkpoints"))
    part = write_part(store.writing(0, 0), 0, {f"model.{n}": t for n, t in state.items()})
    identity = {"model": dataclasses.asdict(dims)}
    fields: dict[str, Any] = {"updates": 0, "loss_scale": 1.0, "good_steps": 0}
    store.publish(0, 0, [part], {**fields, "identity": identity})
    tokenizer = "byte"
    if (folder / "tokenizer.json").exists():
        shutil.copyfile(folder / "tokenizer.json", out / "tokenizer.json")
        tokenizer = str(out.absolute() / "tokenizer.json")
    model = dataclasses.asdict(dims)
    seq_len = model.pop("max_seq_len")
    job = {
        "model": {**model, "init_from": store.location(0)},
        "data": {"path": "python://stdlib", "tokenizer": tokenizer},
        "training": {"steps": 100, "global_batch": 8, "seq_len": seq_len, "lr": 1e-5},
        "run": {"name": out.name},
    }
    path = out / "job.yaml"
    path.write_text(
        "# Made by `ray-train-geo import`: set data.path and training to your own.\n"
        + yaml.safe_dump(job, sort_keys=False)
    )
    return path
