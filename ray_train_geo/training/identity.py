"""What a run that resumes must agree on with the run it goes on from (pure)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ray_train_geo.errors import CheckpointError
from ray_train_geo.model.catalog import ModelDims
from ray_train_geo.spec import JobSpec

__all__ = ["check_identity", "check_model", "identity"]


def identity(job: JobSpec, dims: ModelDims, data_fingerprint: str) -> dict[str, Any]:
    """Everything that fixes what is computed, as plain JSON; precision may change on a resume."""
    return {
        "precision": job.training.precision,
        "model": dataclasses.asdict(dims),
        "data": data_fingerprint,
        "seed": job.training.seed,
        "global_batch": job.training.global_batch,
        "microbatch": job.training.microbatch,
        "seq_len": job.training.seq_len,
    }


def check_model(saved: Mapping[str, Any], dims: ModelDims, where: str) -> None:
    """The weights at ``where`` fit a model of ``dims``.

    Raises:
        CheckpointError: naming the first dimension that differs.
    """
    found = saved.get("model", {})
    for name, value in dataclasses.asdict(dims).items():
        if name in ("dropout", "init_std"):
            continue  # weights do not depend on them
        if found.get(name) != value:
            raise CheckpointError(
                f"{where} holds another model: its {name} is {found.get(name)!r}, "
                f"this job's is {value!r}"
            )


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """The checkpoint at ``where`` is of the same run, whatever its plan was.

    Raises:
        CheckpointError: naming what differs and what to do.
    """
    check_model(saved, ModelDims(**now["model"]), where)
    dropout = now["model"]["dropout"]
    if saved.get("model", {}).get("dropout") != dropout:
        raise CheckpointError(
            f"{where} was trained with dropout {saved['model'].get('dropout')}, this job has "
            f"{dropout}; resume with the same, or start anew from its weights by model.init_from"
        )
    for name in ("data", "seed", "global_batch", "microbatch", "seq_len"):
        if name == "microbatch" and not dropout:
            continue  # how samples are grouped only matters to dropout's masks
        if saved.get(name) != now[name]:
            what = "other data" if name == "data" else f"training.{name} {saved.get(name)}"
            have = "" if name == "data" else f", this job has {now[name]}"
            raise CheckpointError(
                f"{where} was made with {what}{have}; resume with the same, or start anew from "
                "its weights by model.init_from"
            )
