"""The runner without Ray: processes or threads, and one clear error when a worker fails."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import psutil
import pytest
from local_jobs import VOCAB, make_job, plan_for, train, worst_difference

from ray_train_geo.errors import DataError, GeoError, StorageError, WorkerError
from ray_train_geo.spec import JobSpec
from ray_train_geo.training import inheritance
from ray_train_geo.training.checkpoint import CheckpointStore
from ray_train_geo.training.local import LocalResult, run_local

PLAN = ["parallelism.pipelines=1", "parallelism.stages=2"]


def in_processes(job: JobSpec, until: int | None = None) -> LocalResult:
    return run_local(job, job.dims(VOCAB), plan_for(job), until=until)


def test_processes_give_what_threads_give(tmp_path: Path) -> None:
    job = make_job(tmp_path, *PLAN, "training.steps=4")
    threads = train(job)
    (tmp_path / "test").rename(tmp_path / "threads")
    processes = in_processes(job)
    assert [r.step for r in processes.records] == [1, 2, 3, 4]
    assert worst_difference(processes.records, threads.records) == 0
    assert processes.outcome is not None
    assert processes.outcome.step == processes.outcome.updates == 4
    assert not processes.outcome.interrupted
    assert CheckpointStore(str(tmp_path / "test/checkpoints")).complete() == [4]


def test_stops_early_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    job = make_job(tmp_path, *PLAN, "checkpoint.interval=2", "checkpoint.keep=2")
    result = train(job, until=5)
    assert [r.step for r in result.records] == [1, 2, 3, 4, 5]
    assert CheckpointStore(str(tmp_path / "test/checkpoints")).complete() == [4, 5]


def test_a_killed_process_ends_the_run_at_once(tmp_path: Path) -> None:
    job = make_job(tmp_path, *PLAN, "training.steps=100000", "checkpoint.interval=2")
    errors: list[GeoError] = []

    def run() -> None:
        try:
            in_processes(job)
        except GeoError as e:
            errors.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    workers: list[psutil.Process] = []
    try:
        store = CheckpointStore(str(job.run.directory / "checkpoints"))
        deadline = time.monotonic() + 100
        while store.newest() is None:  # until they train
            assert time.monotonic() < deadline
            time.sleep(0.1)
        workers = [p for p in psutil.Process().children() if "spawn_main" in str(p.cmdline())]
        assert len(workers) == 2
        began = time.monotonic()
        workers[0].kill()
        thread.join(30)
        assert not thread.is_alive()
        assert time.monotonic() - began < 10
        assert isinstance(errors[0], WorkerError)
        assert "ended without a word" in str(errors[0])
        psutil.wait_procs(workers, timeout=10)
        assert not any(p.is_running() for p in workers), "the other one ends too"
    finally:
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()


def test_wrong_data_is_one_error_although_the_others_wait(tmp_path: Path) -> None:
    job = make_job(
        tmp_path, "parallelism.pipelines=1", "parallelism.layers=[0,2,4,6]", "data.path=/nowhere"
    )
    began = time.monotonic()
    with pytest.raises(DataError, match="/nowhere does not exist"):
        train(job)
    assert time.monotonic() - began < 10


def test_storage_that_fails_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    job = make_job(tmp_path, *PLAN, f"checkpoint.storage_path={tmp_path}/file")
    with pytest.raises(StorageError, match="can't write the checkpoint"):
        train(job, until=1)


def test_an_exception_of_ones_own_comes_with_its_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("made up")

    monkeypatch.setattr(inheritance, "build_stage", broken)
    with pytest.raises(WorkerError, match="made up") as error:
        train(make_job(tmp_path, *PLAN))
    assert "in broken" in str(error.value)
