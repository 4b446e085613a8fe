from __future__ import annotations

import pytest

from ray_train_geo.schedule.gpipe import gpipe
from ray_train_geo.schedule.pipeline_run import PipelineRun


class Slow:
    """A wire on which everything takes its time, and that remembers when messages were there."""

    def __init__(self, transfer_s=0.0, latency_s=0.0):
        self.transfer_s, self.latency_s = transfer_s, latency_s
        self.ready_s = []

    def send(self, ready_s):
        self.ready_s.append(ready_s)
        return ready_s + self.transfer_s + self.latency_s


def test_stages_wait_for_messages_in_the_order_of_their_schedules():
    down, up = Slow(latency_s=4.0), Slow(transfer_s=1.0)
    run = PipelineRun(gpipe(2, 2), [1.0, 1.0], [2.0, 2.0], [down], [up])
    assert run.stuck() == ["stage 0 waits at F0", "stage 1 waits at F0"]
    run.run()
    assert down.ready_s == [1.0, 2.0]
    assert run.starts_s == [[0.0, 1.0, 10.0, 12.0], [5.0, 6.0, 7.0, 9.0]]
    assert up.ready_s == [9.0, 11.0]
    assert run.ends_s[0] == [1.0, 2.0, 12.0, 14.0]
    assert run.stuck() == []


def test_who_gets_a_message_runs_on():
    run = PipelineRun(
        gpipe(3, 1), [1.0] * 3, [2.0] * 3, [Slow(latency_s=2.0), Slow()], [Slow()] * 2
    )
    run.run()
    assert run.ends_s == [[1.0, 11.0], [4.0, 9.0], [5.0, 7.0]]
    assert run.stuck() == []


@pytest.mark.parametrize(("seconds", "wires"), [(1, 1), (2, 0), (2, 2)])
def test_refuses_lengths_that_do_not_match(seconds, wires):
    hops = [Slow()] * wires
    with pytest.raises(ValueError, match="2 stages"):
        PipelineRun(gpipe(2, 1), [1.0] * seconds, [1.0] * 2, hops, hops)


def test_a_blocking_send_holds_its_stage_until_the_message_has_left():
    down, up = Slow(transfer_s=3.0, latency_s=10.0), Slow()
    run = PipelineRun(gpipe(2, 2), [1.0] * 2, [2.0] * 2, [down], [up], blocking_sends=True)
    run.run()
    assert down.ready_s == [1.0, 5.0]
    assert run.starts_s[0][:2] == [0.0, 4.0]
    assert run.starts_s[1] == [14.0, 18.0, 19.0, 21.0]


def test_every_action_at_its_own_pace():
    run = PipelineRun(gpipe(1, 2), [1.0], [2.0], [], [], pace=[[1.0, 3.0, 0.5, 1.0]])
    run.run()
    assert run.ends_s == [[1.0, 4.0, 5.0, 7.0]]
    with pytest.raises(ValueError, match="pace is needed for every action"):
        PipelineRun(gpipe(1, 2), [1.0], [2.0], [], [], pace=[[1.0]])
