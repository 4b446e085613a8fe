"""What a run that resumes must agree on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from local_jobs import GPT, VOCAB, make_job

from ray_train_geo.errors import CheckpointError
from ray_train_geo.training.identity import check_identity, check_model, identity


def identity_of(folder: Path, *overrides: str, model: dict[str, Any] | None = None) -> Any:
    job = make_job(folder, *overrides, model=model)
    return identity(job, job.dims(VOCAB), "data-1")


@pytest.mark.parametrize(
    "override",
    [
        "parallelism.pipelines=2",
        "parallelism.layers=[0,2,6]",
        "parallelism.gradient_sync=sharded_ps",
        "training.lr=0.1",
        "training.steps=99",
        "training.precision=bf16",
        "training.recompute=true",
        "run.name=other",
        "checkpoint.interval=3",
        "model.init_std=0.5",
    ],
)
def test_who_computes_does_not_matter(tmp_path: Path, override: str) -> None:
    check_identity(identity_of(tmp_path), identity_of(tmp_path, override), "there")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.layers=7", "layers is 6, this job's is 7"),
        ("model.dim=64", "dim is 32, this job's is 64"),
        ("model.vocab_size=300", "vocab_size is 257, this job's is 300"),
        ("model.tied_embeddings=false", "tied_embeddings is True, this job's is False"),
        ("model.dropout=0.2", r"dropout 0\.1, this job has 0\.2"),
        ("training.seed=8", r"training\.seed 7, this job has 8"),
        ("training.global_batch=32", r"training\.global_batch 16, this job has 32"),
        ("training.microbatch=4", r"training\.microbatch 2, this job has 4"),
    ],
)
def test_what_is_computed_does(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=f"^there .*{says}"):
        check_identity(identity_of(tmp_path), identity_of(tmp_path, override), "there")


def test_other_data(tmp_path: Path) -> None:
    now = identity_of(tmp_path) | {"data": "data-2"}
    with pytest.raises(CheckpointError, match="other data; resume with the same"):
        check_identity(identity_of(tmp_path), now, "there")


def test_without_dropout_samples_may_be_grouped_otherwise(tmp_path: Path) -> None:
    plain = {**GPT, "dropout": 0.0}
    check_identity(
        identity_of(tmp_path, model=plain),
        identity_of(tmp_path, "training.microbatch=4", model=plain),
        "there",
    )


def test_weights_alone_need_the_same_dimensions_only(tmp_path: Path) -> None:
    saved = identity_of(tmp_path)
    check_model(saved, make_job(tmp_path, "model.dropout=0").dims(VOCAB), "there")
    check_model({"model": saved["model"]}, make_job(tmp_path).dims(VOCAB), "there")
    with pytest.raises(CheckpointError, match="another model: its heads is 4, this job's is 8"):
        check_model(saved, make_job(tmp_path, "model.heads=8").dims(VOCAB), "there")


def test_a_manifest_that_says_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="another model"):
        check_identity({}, identity_of(tmp_path), "there")
