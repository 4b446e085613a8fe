"""A run's phase, from what its events say."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_train_geo.observe.run_directory import RunDirectory
from ray_train_geo.observe.status import run_status

GENERATION = ("generation", {"generation": 1, "workers": [1, 2]})
WAITING = ("waiting", {"message": "1 of 2 devices", "step": 7})


@pytest.mark.parametrize(
    ("told", "phase"),
    [
        ([], "starting"),
        ([GENERATION], "training"),
        ([WAITING], "waiting"),
        ([GENERATION, WAITING], "waiting"),
        ([GENERATION, WAITING, GENERATION], "training"),
        ([GENERATION, WAITING, ("stop", {"reason": "signal"})], "stopping"),
        ([GENERATION, ("finish", {"phase": "stopped", "step": 3})], "stopped"),
    ],
)
def test_the_phase_is_what_the_last_events_say(
    told: list[tuple[str, dict[str, object]]], phase: str, tmp_path: Path
) -> None:
    run = RunDirectory.create(tmp_path / "job")
    run.append_event("start", steps=10)
    for event, fields in told:
        run.append_event(event, **fields)
    assert run_status(run)["phase"] == phase


def test_an_earlier_session_does_not_count(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "job")
    for event, fields in (("start", {}), GENERATION, ("start", {"steps": 5})):
        run.append_event(event, **fields)
    found = run_status(run)
    assert (found["phase"], found["steps"], found["workers"]) == ("starting", 5, 2)
