"""The run directory: nothing is lost, nothing is torn, and errors say where and why."""

from __future__ import annotations

import json
import os
import resource
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from ray_train_geo.errors import StorageError
from ray_train_geo.observe.run_directory import RunDirectory


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """Real failing writes: the kernel writes what fits, then fails with EFBIG (as with ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_create_makes_the_folders_and_leaves_no_probe(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "a" / "b" / "job")
    assert sorted(p.name for p in run.path.iterdir()) == ["checkpoints", "errors"]
    assert run.moved_aside is None


def test_an_earlier_run_is_moved_aside_each_time(tmp_path: Path) -> None:
    for i in range(3):
        run = RunDirectory.create(tmp_path / "job")
        run.append_metrics({"step": i})
    assert run.moved_aside == tmp_path / "job.2"
    assert RunDirectory.open(tmp_path / "job.1").metrics() == [{"step": 0}]
    assert RunDirectory.open(tmp_path / "job.2").metrics() == [{"step": 1}]
    assert run.metrics() == [{"step": 2}]


def test_a_folder_that_is_no_run_is_used_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    run = RunDirectory.create(tmp_path)
    assert run.moved_aside is None
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["job", "job/deeper"])
def test_a_file_in_the_way_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "job").write_text("a file")
    with pytest.raises(StorageError, match=r"job.*file is in the way"):
        RunDirectory.create(tmp_path / name)
    assert (tmp_path / "job").read_text() == "a file"


def test_a_file_system_that_takes_no_files_is_refused() -> None:
    with pytest.raises(StorageError, match=r"can't use the run directory /proc/job.*storage_path"):
        RunDirectory.create(Path("/proc/job"))


def test_creation_probes_by_writing(tmp_path: Path) -> None:
    with file_size_limit(100), pytest.raises(StorageError, match="can't use the run directory"):
        RunDirectory.create(tmp_path / "job")
    assert not list((tmp_path / "job").glob(".probe*"))


def test_open_wants_a_run(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        RunDirectory.open(tmp_path / "missing")
    with pytest.raises(StorageError, match=r"none of job\.yaml"):
        RunDirectory.open(tmp_path)
    (tmp_path / "job.yaml").write_text("model: {}")
    assert RunDirectory.open(tmp_path).metrics() == []
    assert RunDirectory.open(tmp_path).events() == []


def test_lines_are_strict_json(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "job")
    run.append_metrics(
        {"step": 1, "loss": float("nan"), "x": [np.float32(0.5), -np.inf], "n": np.int64(3)}
    )
    run.append_event("checkpoint", path=tmp_path, layers=(0, 2), ok=True, none=None)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not strict JSON")

    record = json.loads(run.metrics_path.read_text(), parse_constant=refuse)
    assert record == {"step": 1, "loss": None, "x": [0.5, None], "n": 3}
    (event,) = run.events()
    assert list(event)[:2] == ["time", "event"]
    assert event["path"] == str(tmp_path)
    assert event["layers"] == [0, 2]
    with pytest.raises(TypeError, match="object"):
        run.append_event("odd", what=object())


def test_a_failed_append_takes_its_torn_line_back(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "job")
    run.append_metrics({"step": 0})
    before = run.metrics_path.read_bytes()
    with (
        file_size_limit(len(before) + 10),
        pytest.raises(StorageError, match=r"can't append to .*metrics\.jsonl.*too large"),
    ):
        run.append_metrics({"step": 1, "loss": 3.25})
    assert run.metrics_path.read_bytes() == before
    run.append_metrics({"step": 1})
    assert run.metrics() == [{"step": 0}, {"step": 1}]


@pytest.mark.parametrize("torn", ['{"step": 1', '{"step": 1}', '{"step": 1, "x": "' + "y" * 9999])
def test_a_line_torn_by_a_kill_is_skipped_then_cut_off(tmp_path: Path, torn: str) -> None:
    run = RunDirectory.create(tmp_path / "job")
    run.append_metrics({"step": 0})
    with run.metrics_path.open("a") as file:
        file.write(torn)
    assert run.metrics() == [{"step": 0}]
    run.append_metrics({"step": 2})
    assert run.metrics() == [{"step": 0}, {"step": 2}]
    assert run.metrics_path.read_text().count("\n") == 2


def test_a_damaged_line_in_the_middle_does_not_hide_the_rest(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "job")
    run.metrics_path.write_bytes(b'{"step": 0}\n\xff\xfe{\n[1]\n{"step": 1}\n')
    assert run.metrics() == [{"step": 0}, {"step": 1}]


def test_threads_may_append_at_once(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "job")

    def write(thread: int) -> None:
        for i in range(50):
            run.append_event("tick", thread=thread, i=i)

    threads = [threading.Thread(target=write, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = {(e["thread"], e["i"]) for e in run.events()}
    assert seen == {(t, i) for t in range(4) for i in range(50)}


def test_truncate_metrics_keeps_the_steps_up_to_the_checkpoint(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "job")
    for step in range(6):
        run.append_metrics({"step": step})
    run.truncate_metrics(after_step=3)
    assert [r["step"] for r in run.metrics()] == [0, 1, 2, 3]
    run.append_metrics({"step": 4})
    assert [r["step"] for r in run.metrics()] == [0, 1, 2, 3, 4]


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "job")
    run.write_json("plan.json", {"layers": 4})
    with file_size_limit(50), pytest.raises(StorageError, match=r"can't write .*plan\.json"):
        run.write_json("plan.json", {"layers": list(range(100))})
    assert run.read_json("plan.json") == {"layers": 4}
    assert not list(run.path.glob(".plan*"))


def test_written_files_can_be_read_by_others(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "job")
    path = run.write_text("job.yaml", "name: \u00e9 \udcff\n")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o644
    assert path.read_text(encoding="utf-8") == "name: \u00e9 \\udcff\n"


def test_read_json_tells_missing_from_damaged(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "job")
    assert run.read_json("trace.json") is None
    run.trace_path.write_text("{")
    with pytest.raises(StorageError, match=r"trace\.json is damaged"):
        run.read_json("trace.json")


def test_errors_stay_inside_errors_and_never_replace_each_other(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "job")
    first = run.write_error("../rank 1/10.0.0.1", "one")
    second = run.write_error("../rank 1/10.0.0.1", "two")
    third = run.write_error("///", "three")
    assert first.parent == second.parent == third.parent == run.errors_path
    assert [p.read_text() for p in (first, second, third)] == ["one", "two", "three"]
    assert first.name == "rank_1_10.0.0.1.txt"


def test_a_directory_is_held_by_one_run_at_a_time(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    run.append_event("start")
    held = run.hold()
    for take in (run.hold, lambda: RunDirectory.create(run.path)):
        with pytest.raises(StorageError, match="a run is going on"):
            take()
    assert run.events(), "the run that goes on was not moved aside"
    os.close(held)
    assert RunDirectory.create(run.path).moved_aside == tmp_path / "run.1"
