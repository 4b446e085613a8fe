from __future__ import annotations

from ray_train_geo.schedule.gpipe import gpipe
from ray_train_geo.simulation.sharing import groups, renumbered, simplified
from ray_train_geo.simulation.work import Flow, PipelineWork


def pair(*down_resources, rate=4.0, size_bytes=8.0, up=()):
    """Two stages; a hop of ``rate`` over ``down_resources``, and one back over ``up``."""
    down = Flow(0.5, size_bytes, 1 / rate, down_resources)
    back = Flow(0.5, size_bytes, 1 / rate, up)
    return PipelineWork(gpipe(2, 1), (1.0, 1.0), (1.0, 1.0), (down,), (back,))


def resources(pipelines):
    return [p.down[0].resources for p in pipelines]


def test_what_all_flows_fit_into_is_dropped():
    two = [pair(0, 1), pair(0)]
    assert resources(simplified(two, [1 / 8, 1 / 2])) == [(), ()]  # 1 limits one flow only
    assert resources(simplified(two, [1 / 7, 0.0])) == [(0,), (0,)]


def test_what_one_flow_alone_uses_is_part_of_its_link():
    [alone] = simplified([pair(0, 1)], [1 / 2, 1 / 3])
    assert alone.down[0] == Flow(0.5, 8.0, 1 / 2)
    # 2 and 4 into 6: the first flow is slowed by resource 1, so that both fit into 0.
    slowed = simplified([pair(0, 1), pair(0)], [1 / 6, 1 / 2])
    assert resources(slowed) == [(), ()]
    assert [p.down[0].seconds_per_byte for p in slowed] == [1 / 2, 1 / 4]


def test_rounding_does_not_couple():
    tenths = [pair(0, rate=0.1) for _ in range(3)]  # 0.1 + 0.1 + 0.1 > 0.3
    assert resources(simplified(tenths, [1 / 0.3])) == [()] * 3


def test_empty_messages_and_no_limits_share_nothing():
    empty = pair(0, size_bytes=0.0)
    assert resources(simplified([empty, empty, pair(0)], [1 / 4])) == [()] * 3
    unlimited = PipelineWork(
        gpipe(2, 1), (1.0,) * 2, (1.0,) * 2, (Flow(0.0, 1.0, 0.0, (0,)),), (Flow(0.0, 1.0, 0.0),)
    )
    [simple] = simplified([unlimited], [0.0])
    assert simple.down[0] == Flow(0.0, 1.0, 0.0)


def test_groups_are_joined_through_others():
    pipelines = [pair(0), pair(5), pair(1), pair(0, up=(1,)), pair(), pair(7), pair(5)]
    assert groups(pipelines) == [[0, 2, 3], [1, 6], [4], [5]]


def test_groups_that_differ_in_names_only_become_equal():
    seconds_per_byte = [1.0, 2.0, 3.0, 3.0, 2.0]
    one = renumbered([pair(1, 2), pair(2)], seconds_per_byte)
    other = renumbered([pair(4, 3), pair(3)], seconds_per_byte)
    assert one == other
    assert resources(one[0]) == [(0, 1), (1,)]
    assert one[1] == [2.0, 3.0]
    assert renumbered([pair(1, 2), pair(1)], seconds_per_byte) != one
