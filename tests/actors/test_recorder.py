from __future__ import annotations

import pytest

from ray_train_geo.actors.recorder import Recorder
from ray_train_geo.errors import StorageError
from ray_train_geo.observe.run_directory import RunDirectory


@pytest.fixture
def recorder(tmp_path):
    return Recorder(RunDirectory.create(tmp_path / "run"))


def test_what_could_not_be_written_goes_first_once_there_is_room(recorder):
    run = recorder.run
    recorder.metrics({"step": 1})
    kept = run.metrics_path.read_bytes()
    run.metrics_path.unlink()
    run.metrics_path.mkdir()  # nothing can be appended to it
    recorder.metrics({"step": 2})
    recorder.event("late", step=2)
    assert isinstance(recorder.fatal, StorageError)
    first, said = recorder.fatal, recorder.said("late")
    recorder.metrics({"step": 3})
    assert run.events() == []
    assert recorder.fatal is first

    run.metrics_path.rmdir()
    run.metrics_path.write_bytes(kept)
    recorder.event("end")
    assert run.metrics() == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert [e["event"] for e in run.events()] == ["late", "end"]
    assert run.events()[0] == said, "of when it was, not of when it was written"
