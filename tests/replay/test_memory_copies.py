"""In-memory copies: on another node, in another region if there is one."""

from __future__ import annotations

from ray_train_geo.cluster.topology import Device
from ray_train_geo.planning.plan import PipelinePlan, Plan, StagePlan
from ray_train_geo.replay.memory_copies import copied, keeper


def plan(*names: str) -> Plan:
    """One pipeline, a layer each, on devices ``node/gpu@region``."""
    devices = []
    for name in names:
        device, _, region = name.partition("@")
        devices.append(Device(device, device.partition("/")[0], region or "here"))
    stages = tuple(StagePlan(d.id, (i, i + 1), 0) for i, d in enumerate(devices))
    pipeline = PipelinePlan(stages, 1, 0)
    return Plan(len(names), (pipeline,), "1f1b", "allreduce", tuple(devices), 1.0)


def keepers(made: Plan) -> list[str | None]:
    found = [keeper(made, rank) for rank in range(len(made.devices))]
    return [None if device is None else device.id for device in found]


def test_the_next_node_keeps_it() -> None:
    assert keepers(plan("a/0", "b/0", "c/0")) == ["b/0", "c/0", "a/0"]
    assert keepers(plan("a/0", "a/1", "b/0")) == ["b/0", "b/0", "a/0"]


def test_another_region_comes_first() -> None:
    made = plan("a/0@east", "b/0@east", "c/0@west", "d/0@west")
    assert keepers(made) == ["c/0", "c/0", "a/0", "a/0"]


def test_a_single_node_keeps_nothing_elsewhere() -> None:
    assert keepers(plan("a/0", "a/1")) == [None, None]
    assert not copied(plan("a/0", "a/1"), [0], {"a/0"})


def test_what_outlives_whom() -> None:
    made = plan("a/0", "b/0", "c/0")
    assert copied(made, [0], {"a/0"})
    assert not copied(made, [0], {"a/0", "b/0"})
    assert copied(made, [1], {"a/0", "b/0"})
    assert copied(made, [], {"a/0", "b/0", "c/0"})
