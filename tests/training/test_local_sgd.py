"""Local SGD against a plain DiLoCo in one process, whatever islands are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diloco_reference import run_diloco
from local_jobs import VOCAB, make_job, plan_for, train

from ray_train_geo.model.catalog import parameter_shapes
from ray_train_geo.planning.islands import islands
from ray_train_geo.planning.plan import Plan
from ray_train_geo.spec import JobSpec
from ray_train_geo.training.assignment import Start
from ray_train_geo.training.checkpoint import CheckpointStore, read_manifest, read_tensors
from ray_train_geo.training.local import run_local

STEPS = 13

DILOCO = ["local_sgd.inner_steps=4"]
STREAMING = [
    "local_sgd.inner_steps=6",
    "local_sgd.fragments=3",
    "local_sgd.delay_steps=2",
    "local_sgd.mix=0.25",
]
CARRIED = [*STREAMING, "local_sgd.carry=true", "local_sgd.mix=0"]
UNEVEN = ["parallelism.pipelines=3", "parallelism.microbatches=[4,1,3]"]
CUT_DIFFERENTLY = ["parallelism.layers=[[0,1,3,6],[0,4,6]]", "parallelism.microbatches=[5,3]"]
REGIONS = [
    "parallelism.layers=[[0,2,6],[0,3,6],[0,6]]",
    "parallelism.microbatches=[3,2,3]",
    "parallelism.gradient_sync=sharded_ps",
    "local_sgd.across=regions",
]


def planned(job: JobSpec) -> Plan:
    """All but the last device are in one region."""
    made = plan_for(job)
    *near, far = made.devices
    devices = (*(replace(d, region="near") for d in near), replace(far, region="far"))
    return replace(made, devices=devices)


def microbatches(job: JobSpec, made: Plan) -> list[Sequence[int]]:
    assert job.local_sgd is not None
    found = []
    for island in islands(made, job.local_sgd.across):
        pipelines = [made.pipelines[p] for p in island.pipelines]
        found.append([p.first_microbatch + m for p in pipelines for m in range(p.microbatches)])
    return found


def saved_parameters(job: JobSpec) -> dict[str, torch.Tensor]:
    where = CheckpointStore(str(job.run.directory / "checkpoints")).newest()
    assert where is not None
    shapes = parameter_shapes(job.dims(VOCAB))
    tensors = {f"model.{name}": torch.empty(shape) for name, shape in shapes.items()}
    read_tensors(where, read_manifest(where), tensors)
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "overrides",
    [
        [*UNEVEN, *DILOCO],
        [*CUT_DIFFERENTLY, *STREAMING],
        [*CUT_DIFFERENTLY, *DILOCO, "checkpoint.interval=6"],
        [*REGIONS, *DILOCO],
        [*REGIONS, *CARRIED],
    ],
    ids=["diloco", "streaming", "with-checkpoints", "regions", "regions-carried"],
)
def test_islands_train_as_the_papers_say(tmp_path: Path, overrides: list[str]) -> None:
    """Losses of all steps, and the last checkpoint, are those of a plain loop."""
    job = make_job(tmp_path, *overrides)
    made, interval = planned(job), job.checkpoint.interval
    closes = range(interval, STEPS, interval) if interval else ()
    shares = microbatches(job, made)
    assert len(shares) == (2 if overrides[: len(REGIONS)] == REGIONS else len(made.pipelines))
    losses, parameters = run_diloco(job, job.dims(VOCAB), shares, STEPS, closes)
    records = run_local(job, job.dims(VOCAB), made, processes=False, until=STEPS).records
    assert [r.step for r in records] == list(range(1, STEPS + 1))
    assert [r.loss for r in records] == pytest.approx(losses, rel=1e-4)
    for name, tensor in saved_parameters(job).items():
        torch.testing.assert_close(tensor, parameters[name], rtol=1e-3, atol=1e-4)


def test_a_run_goes_on_from_its_checkpoint_and_from_a_synchronous_one(tmp_path: Path) -> None:
    job = make_job(tmp_path, *UNEVEN, *DILOCO, "checkpoint.interval=6", "run.name=whole")
    store = CheckpointStore(str(job.run.directory / "checkpoints"))
    whole = train(job, until=12).records
    where = store.location(6)
    resumed = train(job, Start(where, read_manifest(where)), until=12).records
    # Moments are those of one island, so the other islands' next steps are not quite the same.
    assert [r.loss for r in resumed] == pytest.approx([r.loss for r in whole[6:]], rel=1e-2)
    synchronous = make_job(tmp_path, *UNEVEN, "run.name=synchronous")
    losses = [
        r.loss for r in train(synchronous, Start(where, read_manifest(where)), until=8).records
    ]
    last = CheckpointStore(str(synchronous.run.directory / "checkpoints")).newest()
    assert last is not None
    back = train(job, Start(last, read_manifest(last)), until=10).records
    assert losses[0] == pytest.approx(whole[6].loss, rel=1e-4), "all parameters are the global ones"
    assert [r.step for r in back] == [9, 10]
