"""What a job asks of fewer devices; without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray_runs import write_job

from ray_train_geo.actors.staffing import fixed_workers, job_for, most_workers
from ray_train_geo.spec import JobSpec, load_job


@pytest.fixture
def job(tmp_path: Path) -> JobSpec:
    return load_job(write_job(tmp_path))


def test_what_a_job_fixes_is_open_while_devices_are_too_few(job: JobSpec) -> None:
    assert (fixed_workers(job), most_workers(job)) == (4, 4)
    assert job_for(job, 4) is job
    fewer = job_for(job, 3)
    assert (fewer.parallelism.pipelines, fewer.parallelism.stages) == (None, None)
    assert fewer.training == job.training, "the global batch stays"
    assert fewer.parallelism.bucket_bytes == job.parallelism.bucket_bytes
