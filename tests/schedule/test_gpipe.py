from __future__ import annotations

import pytest

from ray_train_geo.schedule.gpipe import gpipe
from ray_train_geo.schedule.one_f_one_b import validate
from ray_train_geo.schedule.timeline import Hop, timeline


def picture(actions, backward_s=1.0):
    stages = len(actions)
    hops = [Hop(0.0, 0.0)] * (stages - 1)
    run = timeline(actions, [1.0] * stages, [backward_s] * stages, hops, hops)
    return run.ascii(round(run.makespan_s)).split()


def test_picture_of_four_stages():
    assert picture(gpipe(4, 4)) == [
        "0123......abcd",
        ".0123....abcd.",
        "..0123..abcd..",
        "...0123abcd...",
    ]


def test_picture_when_backward_takes_twice_as_long():
    assert picture(gpipe(2, 3), backward_s=2.0) == [
        "012...aabbcc",
        ".012aabbcc..",
    ]


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (1, 5), (7, 1), (8, 16)])
def test_is_complete_and_holds_everything(stages, microbatches):
    actions = gpipe(stages, microbatches)
    validate(actions)
    hops = [Hop(0.0, 0.0)] * (stages - 1)
    run = timeline(actions, [1.0] * stages, [1.0] * stages, hops, hops)
    assert [run.peak_in_flight(s) for s in range(stages)] == [microbatches] * stages


@pytest.mark.parametrize(("stages", "microbatches"), [(0, 1), (1, 0)])
def test_refuses_nothing_to_do(stages, microbatches):
    with pytest.raises(ValueError, match="needs stages and microbatches"):
        gpipe(stages, microbatches)
