from __future__ import annotations

import pytest

from ray_train_geo.schedule.gpipe import gpipe
from ray_train_geo.schedule.pipeline_run import PipelineRun


class Post:
    """A wire that somebody else empties."""

    latency_s = 0.0

    def __init__(self):
        self.taken = []

    def send(self, microbatch, ready_s):
        self.taken.append((microbatch, ready_s))


class Instant:
    latency_s = 0.0

    def send(self, microbatch, ready_s):
        return ready_s


def test_a_stage_runs_until_it_needs_what_has_not_come():
    down, up = Post(), Post()
    run = PipelineRun(gpipe(2, 2), [1.0, 1.0], [2.0, 2.0], [down], [up])
    run.start()
    assert down.taken == [(0, 1.0), (1, 2.0)]
    assert run.ends_s == [[1.0, 2.0], []]
    assert run.stuck() == ["stage 0 waits at B0", "stage 1 waits at F0"]

    run.deliver(1, "F", 1, 5.0)  # out of order: F0 comes first in the schedule
    assert run.ends_s[1] == []
    run.deliver(1, "F", 0, 6.0)
    assert run.starts_s[1] == [6.0, 7.0, 8.0, 10.0]
    assert up.taken == [(0, 10.0), (1, 12.0)]
    run.deliver(0, "B", 0, 11.0)
    run.deliver(0, "B", 1, 20.0)
    assert run.ends_s[0] == [1.0, 2.0, 13.0, 22.0]
    assert run.stuck() == []


def test_who_gets_a_message_runs_on():
    posted = Post()
    run = PipelineRun(gpipe(3, 1), [1.0] * 3, [2.0] * 3, [posted, Instant()], [Instant()] * 2)
    run.start()
    run.deliver(1, "F", 0, 3.0)
    assert run.ends_s == [[1.0, 11.0], [4.0, 9.0], [5.0, 7.0]]
    assert run.stuck() == []


@pytest.mark.parametrize(("seconds", "wires"), [(1, 1), (2, 0), (2, 2)])
def test_refuses_lengths_that_do_not_match(seconds, wires):
    hops = [Instant()] * wires
    with pytest.raises(ValueError, match="2 stages"):
        PipelineRun(gpipe(2, 1), [1.0] * seconds, [1.0] * 2, hops, hops)


def test_a_blocking_send_holds_its_stage_until_it_is_resumed():
    down, up = Post(), Post()
    run = PipelineRun(gpipe(2, 2), [1.0] * 2, [2.0] * 2, [down], [up], blocking_sends=True)
    run.start()
    assert run.ends_s == [[1.0], []]
    run.resume(0, 4.0)
    assert run.ends_s == [[1.0, 5.0], []]
    run.resume(0, 9.0)
    assert run.stuck() == ["stage 0 waits at B0", "stage 1 waits at F0"]


def test_resuming_a_stage_that_does_not_wait_changes_nothing():
    run = PipelineRun(gpipe(2, 1), [1.0] * 2, [2.0] * 2, [Post()], [Post()])
    run.start()
    run.resume(0, 100.0)
    run.deliver(1, "F", 0, 1.0)
    run.deliver(0, "B", 0, 4.0)
    assert run.ends_s[0] == [1.0, 6.0]


def test_every_action_at_its_own_pace():
    run = PipelineRun(gpipe(1, 2), [1.0], [2.0], [], [], pace=[[1.0, 3.0, 0.5, 1.0]])
    run.start()
    assert run.ends_s == [[1.0, 4.0, 5.0, 7.0]]
    with pytest.raises(ValueError, match="pace is needed for every action"):
        PipelineRun(gpipe(1, 2), [1.0], [2.0], [], [], pace=[[1.0]])
