"""Who computed when: read off events, and drawn."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib.text import Text

from ray_train_geo.observe.device_timeline import device_timeline, device_timeline_picture


def generation(number: int, time: float, *devices: str) -> dict[str, Any]:
    workers = [{"device": device, "region": "east"} for device in devices]
    return {"event": "generation", "time": time, "generation": number, "workers": workers}


EVENTS: list[dict[str, Any]] = [
    {"event": "start", "time": 100.0},
    generation(1, 110.0, "a/0", "b$/0"),
    {"event": "checkpoint", "time": 112.0},
    {"event": "failure", "time": 115.0},
    {"event": "waiting", "time": 115.5},
    {"event": "restore", "time": 116.0},
    generation(2, 118.0, "a/0", "c/0"),
    {"event": "finish", "time": 130.0},
]


def test_what_events_say() -> None:
    timeline = device_timeline(EVENTS)
    assert timeline is not None
    assert timeline.rows == {
        "a/0": ("east", ((1, 10.0, 15.0), (2, 18.0, 30.0))),
        "b$/0": ("east", ((1, 10.0, 15.0),)),
        "c/0": ("east", ((2, 18.0, 30.0),)),
    }
    assert timeline.failures == (15.0,)
    assert timeline.waits == ((15.5, 18.0),)
    assert timeline.end_s == 30.0


def test_a_run_that_is_going_on_and_one_that_never_began() -> None:
    timeline = device_timeline([*EVENTS[:3]])
    assert timeline is not None
    assert timeline.rows["a/0"][1] == ((1, 10.0, 12.0),)
    assert device_timeline([EVENTS[0]]) is None
    assert device_timeline([]) is None


def test_the_picture() -> None:
    timeline = device_timeline(EVENTS)
    assert timeline is not None
    figure = device_timeline_picture(timeline)
    figure.draw_without_rendering()
    texts = {t.get_text() for t in figure.findobj(Text)}
    assert {"1", "2", "east a/0", "seconds"} <= texts
    assert any("grey: too few devices" in text for text in texts)
    bars = figure.axes[0].patches
    assert len([b for b in bars if b.get_height() == pytest.approx(0.72)]) == 4


def test_many_devices_are_cut_off_with_a_word() -> None:
    timeline = device_timeline([generation(1, 0.0, *(f"n{i}/0" for i in range(70)))])
    assert timeline is not None
    figure = device_timeline_picture(timeline)
    assert any("6 more devices are not shown" in t.get_text() for t in figure.findobj(Text))
