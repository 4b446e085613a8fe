"""A worker that a plan leaves out, without Ray."""

from __future__ import annotations

from typing import Any

import torch

from ray_train_geo.actors.stage_worker import StageWorker
from ray_train_geo.training.memory import Memory, Snapshot
from ray_train_geo.training.precision import LossScale
from ray_train_geo.training.standing import Standing, settlement


class Role:
    """The runtime of a generation in which this worker had committed step 7."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.closed = False

    def standing(self) -> Standing:
        state = {"model.weight": torch.zeros(1)}
        self.memory.hold(Snapshot(7, 7, LossScale(1.0, 0), state))
        return Standing(7, None, None, (), self.memory.holdings())

    def close(self) -> None:
        self.closed = True


def test_who_is_left_out_gives_what_it_has_and_need_not_follow() -> None:
    actor: Any = StageWorker
    worker = object.__new__(actor.__ray_metadata__.modified_class)
    worker._memory, worker._emulated, worker._ended_as = Memory(), None, None
    worker._ahead = None
    role = worker._runtime = Role(worker._memory)
    assert worker.standing(0).step == 7
    worker.give(3)
    assert role.closed
    assert worker._memory.give(3, 7, ["model.weight"])["model.weight"] == 0
    left = worker.standing(0)
    assert [holding.step for holding in left.holdings] == [7]
    others = Standing(12, None, None, (), ())
    assert settlement({"other": others, "left out": left}) == (12, None, [])
