"""The picture of a replay: read back from the figure."""

from __future__ import annotations

import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from ray_train_geo.observe.rendering import to_png, to_svg
from ray_train_geo.observe.replay_picture import replay_picture
from ray_train_geo.replay.run import Replay, replay_trace
from ray_train_geo.spec import parse_job


@pytest.fixture(scope="module")
def replay() -> Replay:
    job = parse_job(
        {
            "model": {"layers": 4, "dim": 512, "heads": 8},
            "data": {"path": "python://stdlib"},
            "training": {"steps": 1, "global_batch": 64, "seq_len": 512, "precision": "fp16"},
            "parallelism": {"stages": 2},
        }
    )
    return replay_trace("aws-p3", job, gpu="T4", until_h=1.0, max_nodes=8)


@pytest.fixture(scope="module")
def figure(replay: Replay) -> Figure:
    return replay_picture(replay)


def test_a_row_for_the_devices_and_one_for_each_policy(replay: Replay, figure: Figure) -> None:
    names = [axes.get_title(loc="left") for axes in figure.axes]
    assert names == ["aws-p3: devices", *(o.policy for o in replay.outcomes)]
    for axes, outcome in zip(figure.axes[1:], replay.outcomes, strict=True):
        said = axes.get_title(loc="right")
        assert f"goodput {outcome.goodput:.1%}" in said
        assert "per million tokens" in said


def test_the_curves_are_those_of_the_replay(replay: Replay, figure: Figure) -> None:
    assert figure.axes[0].get_xlim() == (0.0, 1.0)
    for axes, outcome in zip(figure.axes[1:], replay.outcomes, strict=True):
        (area,) = [c for c in axes.collections if not isinstance(c, PathCollection)]
        drawn = area.get_paths()[0].vertices
        assert drawn[:, 1].max() == pytest.approx(max(rate for *_, rate in outcome.rates()))
        assert drawn[:, 1].min() == 0.0
    tops = {axes.get_ylim()[1] for axes in figure.axes[1:]}
    assert len(tops) == 1, "one scale, so that policies can be compared"


def test_every_loss_has_a_mark(replay: Replay, figure: Figure) -> None:
    for axes, outcome in zip(figure.axes[1:], replay.outcomes, strict=True):
        marks = [c for c in axes.collections if isinstance(c, PathCollection)]
        where = [x * 3600 for c in marks for x in c.get_offsets()[:, 0]]
        assert where == pytest.approx([time_s for time_s, _ in outcome.losses()])
    assert any(outcome.losses() for outcome in replay.outcomes)
    assert not replay.outcomes[-1].losses(), "nobody takes on-demand devices back"


def test_it_renders(figure: Figure) -> None:
    assert to_png(figure, 50).startswith(b"\x89PNG")
    assert to_svg(figure).startswith("<svg")


def test_a_single_policy() -> None:
    job = parse_job(
        {
            "model": {"layers": 4, "dim": 64, "heads": 2},
            "data": {"path": "python://stdlib"},
            "training": {"steps": 1, "global_batch": 8, "seq_len": 64},
        }
    )
    found = replay_trace("aws-p3", job, gpu="T4", until_h=0.01, max_nodes=1, policies=["ours"])
    assert len(replay_picture(found).axes) == 2
