"""Names that others rely on: the package's exports, and the job spec's fields."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import ray_train_geo
from ray_train_geo.spec import JobSpec

EXPORTED = [
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

# Users' files, other tools and later issues name these.
FIELDS: dict[str, object] = {
    "model.name": "gpt3-small",
    "model.dropout": 0.1,
    "training.steps": 3,
    "training.global_batch": 12,
    "training.microbatch": 2,
    "training.seq_len": 16,
    "training.precision": "bf16",
    "training.seed": 5,
    "parallelism.pipelines": 2,
    "parallelism.stages": 3,
    "parallelism.layers": [[0, 2, 4, 12], [0, 1, 2, 12]],
    "parallelism.microbatches": [4, 2],
    "parallelism.schedule": "gpipe",
    "parallelism.gradient_sync": "central_ps",
    "data.path": "python://stdlib",
    "run.name": "x",
    "run.storage_path": "/tmp/x",
    "checkpoint.interval": 7,
}


def test_the_exported_names() -> None:
    assert ray_train_geo.__all__ == EXPORTED


@pytest.mark.parametrize("name", EXPORTED)
def test_each_resolves_to_what_it_says(name: str) -> None:
    found = getattr(ray_train_geo, name)
    assert found.__name__ == name
    assert found.__doc__, "documented"


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="'ray_train_geo' has no attribute 'nothing'"):
        _ = ray_train_geo.nothing


def test_the_version_is_the_installed_ones() -> None:
    from importlib.metadata import version

    assert ray_train_geo.__version__ == version("ray-train-geo")


def test_importing_the_package_is_cheap() -> None:
    code = (
        "import sys, ray_train_geo as r; r.parse_job; r.plan; r.Plan; r.GeoError;"
        "r.simulate; r.compare; r.replay_trace; r.Simulated; r.Comparison;"
        "print([m for m in ('torch', 'ray', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_specs_names() -> None:
    raw: dict[str, dict[str, Any]] = {}
    for key, value in FIELDS.items():
        section, field = key.split(".")
        raw.setdefault(section, {})[field] = value
    job = JobSpec.model_validate(raw)
    for key, value in FIELDS.items():
        section, field = key.split(".")
        assert getattr(getattr(job, section), field) == value


def test_the_sections() -> None:
    assert list(JobSpec.model_fields) == [
        "model",
        "data",
        "training",
        "parallelism",
        "codecs",
        "local_sgd",
        "scaling",
        "checkpoint",
        "failure",
        "run",
    ]
