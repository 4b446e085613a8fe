"""A run that stops and goes on, under whatever plan, gives the uninterrupted run's curve."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from local_jobs import GPT, LLAMA, make_job, train, worst_difference

from ray_train_geo.errors import CheckpointError
from ray_train_geo.training.assignment import Start, StepRecord
from ray_train_geo.training.checkpoint import CheckpointStore, read_manifest

STOP = 10
MODELS: dict[str, dict[str, Any]] = {
    "gpt": GPT,
    # With embeddings of 0.02 RMSNorm is so steep that even another order of sums shows: the
    # norm of an uninterrupted run differs by 2e-5 between plans.
    "llama": {**LLAMA, "init_std": 0.1},
    "gpt-untied": {**GPT, "tied_embeddings": False},
}
FIRST = {
    "gpt": ["parallelism.layers=[[0,2,6],[0,5,6]]", "parallelism.microbatches=[5,3]"],
    "llama": ["parallelism.layers=[[0,6],[0,1,4,6]]", "parallelism.gradient_sync=sharded_ps"],
    "gpt-untied": ["parallelism.pipelines=1", "parallelism.stages=3"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@functools.cache
def uninterrupted(folder: Path, model: str) -> tuple[StepRecord, ...]:
    job = make_job(folder, *FIRST[model], f"run.name={model}-whole", model=MODELS[model])
    return tuple(train(job).records)


@functools.cache
def stopped(folder: Path, model: str) -> Start:
    """A run under :data:`FIRST` that ended after step 10, with the checkpoint that it left."""
    job = make_job(folder, *FIRST[model], f"run.name={model}-stopped", model=MODELS[model])
    result = train(job, until=STOP)
    assert result.outcome is not None
    assert result.outcome.step == STOP
    newest = CheckpointStore(str(job.run.directory / "checkpoints")).newest()
    assert newest is not None
    return Start(newest, read_manifest(newest))


@pytest.mark.parametrize(
    ("model", "plan"),
    [
        ("gpt", ["parallelism.pipelines=1", "parallelism.stages=1"]),
        ("gpt", ["parallelism.layers=[[0,1,3,6],[0,4,6]]", "parallelism.gradient_sync=central_ps"]),
        pytest.param(
            "gpt",
            ["parallelism.pipelines=3", "parallelism.stages=1", "parallelism.schedule=gpipe"],
            marks=pytest.mark.soak,
        ),
        pytest.param(
            "gpt",
            ["parallelism.pipelines=1", "parallelism.layers=[0,1,4,6]"],
            marks=pytest.mark.soak,
        ),
        ("gpt", ["parallelism.stages=2", "parallelism.microbatches=[2,6]", "training.recompute=1"]),
        ("llama", ["parallelism.pipelines=2", "parallelism.stages=2"]),
        (
            "llama",
            ["parallelism.pipelines=1", "parallelism.stages=6", "parallelism.schedule=gpipe"],
        ),
        ("gpt-untied", ["parallelism.pipelines=2", "parallelism.gradient_sync=sharded_ps"]),
    ],
)
def test_steps_after_a_resume(folder: Path, model: str, plan: list[str]) -> None:
    name = "".join(c if c.isalnum() else "_" for c in f"{model}-{plan}")
    job = make_job(
        folder, *plan, "parallelism.bucket_bytes=7000", f"run.name={name}"[:90], model=MODELS[model]
    )
    records = train(job, start=stopped(folder, model)).records
    assert [r.step for r in records] == list(range(STOP + 1, 31))
    assert worst_difference(records, list(uninterrupted(folder, model)[STOP:])) < 1e-5
    rates = [r.learning_rate for r in uninterrupted(folder, model)[STOP:]]
    assert [r.learning_rate for r in records] == rates


def test_the_same_plan_gives_the_same_bits(folder: Path) -> None:
    job = make_job(folder, *FIRST["gpt"], "run.name=same-plan")
    records = train(job, start=stopped(folder, "gpt"), until=20).records
    assert worst_difference(records, list(uninterrupted(folder, "gpt")[STOP:20])) == 0


def test_stopping_changes_nothing_before_the_stop(folder: Path) -> None:
    manifest = stopped(folder, "gpt").manifest
    assert (manifest.step, manifest.updates) == (STOP, STOP)
    assert manifest.identity["seed"] == 7
    assert manifest.plan is not None


def test_again_and_again_from_each_checkpoint(folder: Path) -> None:
    """Stop at 10, 13 and 21, each time with another plan."""
    plans = [["parallelism.stages=2"], ["parallelism.pipelines=2"], ["parallelism.layers=[0,5,6]"]]
    start, records = stopped(folder, "gpt"), list[StepRecord]()
    for i, (until, plan) in enumerate(zip((13, 21, 30), plans, strict=True)):
        fixed = [] if "pipelines" in plan[0] else ["parallelism.pipelines=1"]
        job = make_job(folder, *plan, *fixed, f"run.name=chain-{i}")
        records += train(job, start=start, until=until).records
        newest = CheckpointStore(str(job.run.directory / "checkpoints")).newest()
        assert newest is not None
        start = Start(newest, read_manifest(newest))
    assert worst_difference(records, list(uninterrupted(folder, "gpt")[STOP:])) < 1e-5


def test_checkpoints_on_the_way_do_not_change_the_curve(folder: Path) -> None:
    job = make_job(
        folder, "parallelism.pipelines=2", "checkpoint.interval=4", "checkpoint.keep=2",
        "run.name=interval",
    )  # fmt: skip
    records = train(job, start=stopped(folder, "gpt"), until=17).records
    assert worst_difference(records, list(uninterrupted(folder, "gpt")[STOP:17])) < 1e-5
    store = CheckpointStore(str(job.run.directory / "checkpoints"))
    assert store.complete() == [16, 17]


def test_starting_from_weights_only_begins_at_step_1(folder: Path) -> None:
    job = make_job(folder, "parallelism.pipelines=1", "run.name=weights")
    start = stopped(folder, "gpt")
    records = train(job, start=Start(start.location, start.manifest, True), until=3).records
    assert [r.step for r in records] == [1, 2, 3]
    first, later = uninterrupted(folder, "gpt")[0], uninterrupted(folder, "gpt")[STOP]
    assert records[0].loss < first.loss - 0.5, "the weights are those of step 10"
    assert records[0].loss == pytest.approx(later.loss, abs=0.5)
    assert records[0].learning_rate == first.learning_rate


def test_a_damaged_checkpoint_stops_all_workers_with_one_error(folder: Path) -> None:
    job = make_job(folder, "parallelism.stages=2", "parallelism.pipelines=1", "run.name=to-damage")
    train(job, until=1)
    location = CheckpointStore(str(job.run.directory / "checkpoints")).newest()
    assert location is not None
    manifest = read_manifest(location)
    path = Path(location, "__0_0.distcp")
    data = bytearray(path.read_bytes())
    for at in range(0, len(data), 512):
        data[at] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"step-00000001"):
        train(job, start=Start(location, manifest), until=2)
