"""A stage in the middle, with channels that only note what happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ray_train_geo.model.catalog import CATALOG
from ray_train_geo.model.stage import build_stage
from ray_train_geo.observe.trace import Tracer
from ray_train_geo.schedule.actions import Kind
from ray_train_geo.schedule.make import make_schedule
from ray_train_geo.training.executor import Edges, StageExecutor

DIMS = CATALOG["gpt-tiny"]


class Channel:
    def __init__(self, happened: list[str]) -> None:
        self._happened = happened

    def begin(self, *_: Any) -> None: ...

    def receive(self, name: str, *_: Any) -> torch.Tensor:
        return torch.ones(1, 4, DIMS.dim)

    def send(self, message: torch.Tensor, name: str, *_: Any) -> None:
        assert message.shape == (1, 4, DIMS.dim)
        self._happened.append(f"send {name}")

    def finish(self, *_: Any) -> None: ...


def run(schedule: Any) -> tuple[list[str], Tracer]:
    happened: list[str] = []

    @contextmanager
    def pace(kind: Kind) -> Iterator[None]:
        yield
        happened.append(kind)

    module, tracer = build_stage(DIMS, 1, 2, seed=0), Tracer()
    channels: list[Any] = [Channel(happened) for _ in range(4)]
    executor = StageExecutor(
        module=module,
        actions=make_schedule(schedule, [2, 1, 0], [0, 1, 2], 3)[1],
        first_microbatch=0,
        batches=lambda step, microbatch: pytest.fail("a stage in the middle asks for no data"),
        edges=Edges(*channels),
        seed=0,
        tracer=tracer,
        before_last_gradients=lambda: happened.append("last"),
        pace=pace,
    )
    assert executor.run(1, 1.0, 1.0) is None
    assert all(p.grad is not None for p in module.parameters())
    return happened, tracer


def test_a_gradient_leaves_after_b_and_the_last_w_completes_the_step() -> None:
    happened, tracer = run("zero-bubble")
    assert " ".join(happened) == (
        "F send F0 F send F1 B send B0 F send F2 B send B1 W B send B2 W last W"
    )
    names = [span.name for span in tracer.drain() if span.category == "weights"]
    assert names == ["W0", "W1", "W2"]


def test_a_whole_backward_completes_the_step_itself() -> None:
    happened, tracer = run("1f1b")
    assert " ".join(happened) == (
        "F send F0 F send F1 B send B0 F send F2 B send B1 last B send B2"
    )
    assert not [span for span in tracer.drain() if span.category == "weights"]
