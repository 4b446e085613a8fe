from __future__ import annotations

import pytest

from ray_train_geo.schedule.one_f_one_b import one_f_one_b
from ray_train_geo.simulation.engine import simulate
from ray_train_geo.simulation.static_shares import shared_actions, with_static_shares
from ray_train_geo.simulation.work import Flow, PipelineWork


def pipeline(microbatches, resources=(0,), size=2.0, warmup=4):
    flow = Flow(0.1, size, 0.1, resources)
    quiet = Flow(0.1, size, 0.1)
    actions = one_f_one_b([warmup, 0], microbatches)
    return PipelineWork(actions, (0.5, 0.5), (1.0, 1.0), (flow,), (quiet,))


def test_a_share_is_a_flows_part_of_the_bytes():
    found = with_static_shares([pipeline(10), pipeline(30)], [1.0])
    # 80 bytes at 1 byte/s: 80 s for 10 messages of 2 bytes, and for 30.
    assert [p.down[0].seconds_per_byte for p in found] == [pytest.approx(4), pytest.approx(80 / 60)]
    assert all(p.down[0].resources == () for p in found)
    assert found[0].up == pipeline(10).up


def test_what_can_not_saturate_costs_nothing():
    assert with_static_shares([pipeline(10), pipeline(10)], [0.01]) == [
        pipeline(10, resources=()),
        pipeline(10, resources=()),
    ]


def test_only_pipelines_that_share_count():
    shared, alone = pipeline(5), pipeline(7, resources=())
    assert shared_actions([shared, alone, shared], [1.0]) == 2 * 2 * 10
    assert shared_actions([shared, alone], [1.0]) == 0, "a resource of one flow is its link"


@pytest.mark.parametrize("per_byte", [0.2, 0.5, 1.5])
def test_near_fair_sharing_and_never_beyond_capacity(per_byte):
    work = [pipeline(20), pipeline(20), pipeline(40)]
    fair = max(t.makespan_s for t in simulate(work, [per_byte]))
    static = max(t.makespan_s for t in simulate(with_static_shares(work, [per_byte]), []))
    assert static >= 80 * 2.0 * per_byte
    assert 0.85 * fair <= static <= 1.35 * fair
