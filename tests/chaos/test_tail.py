"""A run's record is followed as it grows, is torn, and is replaced."""

from __future__ import annotations

from pathlib import Path

from ray_train_geo.chaos.tail import RunTail
from ray_train_geo.observe.run_directory import RunDirectory


def test_what_is_new(tmp_path: Path) -> None:
    tail = RunTail(tmp_path / "run")
    tail.poll()
    assert (tail.step, tail.workers, tail.generation, tail.coordinator_pid) == (0, [], None, None)
    run = RunDirectory.create(tmp_path / "run")
    run.append_event("start", pid=7)
    run.append_event("generation", generation=1, workers=[{"pid": 8}])
    tail.poll()
    assert tail.coordinator_pid == 7
    assert tail.workers == [{"pid": 8}]
    assert not tail.training
    run.append_metrics({"step": 1, "generation": 1})
    run.append_metrics({"step": 2, "generation": 1})
    tail.poll()
    assert tail.training
    assert tail.step == 2


def test_steps_that_are_taken_back(tmp_path: Path) -> None:
    tail = RunTail(tmp_path / "run")
    run = RunDirectory.create(tmp_path / "run")
    for step in (1, 2, 3):
        run.append_metrics({"step": step})
    tail.poll()
    run.truncate_metrics(1)
    tail.poll()
    assert tail.step == 1
    run.append_metrics({"step": 2})
    tail.poll()
    assert [r["step"] for r in tail.records] == [1, 2]


def test_a_line_counts_once_its_end_is_there(tmp_path: Path) -> None:
    path, tail = tmp_path / "metrics.jsonl", RunTail(tmp_path)
    path.write_text('{"step": 1}\n{"st')
    tail.poll()
    assert [r["step"] for r in tail.records] == [1]
    with path.open("a") as file:
        file.write('ep": 2}\n')
    tail.poll()
    assert [r["step"] for r in tail.records] == [1, 2]


def test_what_an_earlier_run_of_the_name_has_left(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    RunDirectory.create(folder).append_metrics({"step": 7})
    tail = RunTail(folder)
    tail.poll()
    assert tail.records == []
    folder.rename(tmp_path / "run.1")
    RunDirectory.create(folder).append_metrics({"step": 1})
    tail.poll()
    assert tail.step == 1
