"""Sums of encoded gradients: the same bits for all, and what is left out is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_group import MemoryTransport, memory_group

from ray_train_geo.cluster.topology import Device
from ray_train_geo.codecs.workspace import Workspace
from ray_train_geo.planning.plan import PipelinePlan, Plan, StagePlan
from ray_train_geo.spec import GradientSyncName, parse_job
from ray_train_geo.training.buckets import Bucket
from ray_train_geo.training.residuals import Residuals
from ray_train_geo.training.state import StageState
from ray_train_geo.training.sums import gradient_sums
from ray_train_geo.transport import collectives
from ray_train_geo.transport.base import Pending

WORKSPACE = Workspace(torch.device("cpu"))
CODECS = ["bf16", "int8", "topk", "powersgd"]
FEEDBACK = ["topk", "powersgd"]
MODES: list[GradientSyncName] = ["sharded_ps", "central_ps", "hierarchical", "tree"]


class Group(MemoryTransport):
    """Collectives of one thread's ranks: all start before any is waited for."""

    sent_bytes = 0

    def send(self, tensor: torch.Tensor, peer: int) -> Pending:
        self.sent_bytes += tensor.nbytes
        return super().send(tensor, peer)

    def reduce_scatter(self, tensor: torch.Tensor, shards: Sequence[int]) -> Pending:
        return collectives.reduce_scatter(self, tensor, shards)

    def all_gather(self, tensor: torch.Tensor, shards: Sequence[int]) -> Pending:
        return collectives.all_gather(self, tensor, shards)

    def all_to_all(
        self, outgoing: torch.Tensor, sent: Sequence[int],
        incoming: torch.Tensor, received: Sequence[int],
    ) -> Pending:  # fmt: skip
        return collectives.all_to_all(self, outgoing, sent, incoming, received)

    def all_reduce(self, tensor: torch.Tensor) -> Pending:
        size, n = self.size, tensor.numel()
        everybody = torch.cat([tensor] * size)
        gathered = collectives.all_gather(self, everybody, [n] * size)

        def add_up() -> None:
            tensor.copy_(everybody.view(size, n).double().sum(0))

        return collectives.Together([gathered], add_up)


class Stage:
    """What the sums see of a stage's state: two matrices and a vector in one bucket."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], ranks: int) -> None:
        self.weights = {f"layers.{i}.w": torch.zeros(s) for i, s in enumerate(shapes)}
        self.buckets = [Bucket(tuple(range(ranks)), tuple(self.weights))]
        self.buffers = {0: torch.zeros(sum(w.numel() for w in self.weights.values()))}
        moments = {
            name: torch.randn(w.shape, generator=torch.Generator().manual_seed(i))
            for i, (name, w) in enumerate(self.weights.items())
        }
        self.optimizer = type("Optimizer", (), {"moments": {"exp_avg": moments}})
        self.residuals: Residuals | None = Residuals(self.buckets, self.weights)


def plan_of(mode: GradientSyncName, ranks: int) -> Plan:
    """Pipelines of one stage each, in regions of two, whose holders make unequal shards."""
    devices = tuple(Device(f"d{r}", f"n{r}", region=f"r{r // 2}") for r in range(ranks))
    pipelines = tuple(
        PipelinePlan((StagePlan(d.id, (0, 1), 0, shard=1.0 + r % 2),), 1, r)
        for r, d in enumerate(devices)
    )
    return Plan(1, pipelines, "1f1b", mode, devices, 1.0)


class Ranks:
    """All holders of a bucket."""

    def __init__(
        self, codec: str, mode: GradientSyncName, shapes: Sequence[tuple[int, ...]], ranks: int = 3
    ) -> None:
        job = parse_job(
            {
                "model": {"layers": 1, "dim": 8, "heads": 1},
                "data": {"path": "x"},
                "training": {"steps": 1, "global_batch": 1, "seq_len": 1},
                "codecs": {"gradients": codec, "powersgd_rank": 2},
            }
        )
        lines = memory_group(ranks)[0]._lines
        self.groups = [Group(rank, ranks, lines) for rank in range(ranks)]
        self.stages = [Stage(shapes, ranks) for _ in range(ranks)]
        for stage in self.stages:
            if not job.codecs.feeds_back:
                stage.residuals = None
        self.sums = [
            gradient_sums(
                job,
                plan_of(mode, ranks),
                cast(StageState, stage),
                {tuple(range(ranks)): group},
                WORKSPACE,
            )
            for stage, group in zip(self.stages, self.groups, strict=True)
        ]

    def add_up(
        self, gradients: torch.Tensor, step: int = 1, scale: float = 1.0, commit: bool = True
    ) -> list[torch.Tensor]:
        """What each rank has as the sum of ``gradients``, ``[ranks, elements]``."""
        running = []
        for stage, sums, gradient in zip(self.stages, self.sums, gradients, strict=True):
            if stage.residuals is not None:
                stage.residuals.begin()
            stage.buffers[0].copy_(gradient * scale)
            sums.begin(step, scale)
            running.append(sums.rounds(0))
        while all(pending := [next(rounds, None) for rounds in running]):
            for one in pending:
                assert one is not None
                one.wait(1.0)
        assert pending == [None] * len(running), "equally many rounds"
        for stage in self.stages:
            if commit and stage.residuals is not None:
                stage.residuals.commit()
        return [stage.buffers[0] / scale for stage in self.stages]

    def residual(self) -> torch.Tensor:
        """Of all ranks together, flat."""
        flat = [
            torch.cat([t.flatten() for t in s.residuals.tensors().values()])
            for s in self.stages
            if s.residuals is not None
        ]
        return torch.stack(flat).double().sum(0)


def drawn(seed: int, ranks: int, elements: int) -> torch.Tensor:
    return torch.randn(ranks, elements, generator=torch.Generator().manual_seed(seed))


SHAPES = [(24, 16), (16,), (40, 12)]
ELEMENTS = 24 * 16 + 16 + 40 * 12

shapes_of = st.lists(
    st.one_of(st.tuples(st.integers(1, 60)), st.tuples(st.integers(1, 40), st.integers(1, 40))),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("codec", CODECS)
@given(shapes=shapes_of, ranks=st.integers(2, 5), mode=st.sampled_from(MODES), seed=st.integers(0))
@settings(max_examples=25)
def test_all_end_with_the_same_bits(
    codec: str, shapes: list[tuple[int, ...]], ranks: int, mode: GradientSyncName, seed: int
) -> None:
    elements = sum(math.prod(s) for s in shapes)
    summed = Ranks(codec, mode, shapes, ranks).add_up(drawn(seed % 2**31, ranks, elements))
    assert all(torch.equal(summed[0], other) for other in summed)
    assert summed[0].isfinite().all()


@pytest.mark.parametrize("codec", FEEDBACK)
@given(
    shapes=shapes_of,
    ranks=st.integers(2, 4),
    mode=st.sampled_from(MODES),
    scales=st.lists(st.sampled_from([1.0, 2.0**10, 2.0**16]), min_size=1, max_size=4),
)
@settings(max_examples=25)
def test_what_is_left_out_is_kept(
    codec: str,
    shapes: list[tuple[int, ...]],
    ranks: int,
    mode: GradientSyncName,
    scales: list[float],
) -> None:
    elements = sum(math.prod(s) for s in shapes)
    run = Ranks(codec, mode, shapes, ranks)
    for step, scale in enumerate(scales, 1):
        gradients, before = drawn(step, ranks, elements), run.residual()
        summed = run.add_up(gradients, step, scale)[0].double()
        wanted = gradients.double().sum(0) + before
        torch.testing.assert_close(summed + run.residual(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("codec", "within"), [("bf16", 2.0**-7), ("int8", 0.03)])
def test_stateless_sums_are_near(codec: str, within: float, mode: GradientSyncName) -> None:
    gradients = drawn(1, 3, ELEMENTS)
    summed = Ranks(codec, mode, SHAPES).add_up(gradients)[0]
    largest = float(gradients.abs().max())
    assert float((summed - gradients.sum(0)).abs().max()) < 4 * largest * within


@pytest.mark.parametrize("codec", FEEDBACK)
def test_a_steady_gradient_gets_through(codec: str) -> None:
    run, gradients = Ranks(codec, "sharded_ps", SHAPES), drawn(4, 3, ELEMENTS)
    total, kept = torch.zeros(ELEMENTS), []
    for step in range(1, 61):
        total += run.add_up(gradients, step)[0]
        kept.append(float(run.residual().norm()))
    assert kept[-1] < 1.5 * kept[29], "the residual has stopped growing"
    mean, wanted = total / 60, gradients.sum(0)
    assert float((mean - wanted).norm()) < 0.35 * float(wanted.norm())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("codec", CODECS)
def test_an_overflow_reaches_all_and_leaves_nothing_behind(codec: str, bad: float) -> None:
    run, gradients = Ranks(codec, "sharded_ps", SHAPES), drawn(5, 3, ELEMENTS)
    run.add_up(gradients)
    before = run.residual() if codec in FEEDBACK else None
    spoilt = gradients.clone()
    # Every value: what a sparse codec does not look at is not sent.
    spoilt[1] = bad
    summed = run.add_up(spoilt, step=2, commit=False)
    assert not any(s.isfinite().all() for s in summed)
    if codec in FEEDBACK:
        assert before is not None
        assert torch.equal(run.residual(), before)
    assert run.add_up(gradients, step=2)[0].isfinite().all()


def test_bytes() -> None:
    shapes, ranks = [(512, 512)], 2
    raw = 2 * 512 * 512 * 4 * (ranks - 1)  # of all ranks: a part there, and the sum back
    most = {"bf16": 0.5, "int8": 0.255, "topk": 0.021, "powersgd": 0.025}
    for codec, ratio in most.items():
        run = Ranks(codec, "sharded_ps", shapes, ranks)
        run.add_up(drawn(6, ranks, 512 * 512))
        assert sum(g.sent_bytes for g in run.groups) <= ratio * raw, codec


def test_scales_do_not_change_what_is_kept() -> None:
    plain, scaled = (Ranks("topk", "sharded_ps", SHAPES) for _ in range(2))
    for step in (1, 2, 3):
        gradients = drawn(step, 3, ELEMENTS)
        a = plain.add_up(gradients, step)[0]
        b = scaled.add_up(gradients, step, scale=2.0 ** (4 * step))[0]
        assert torch.equal(a, b)
    assert torch.equal(plain.residual(), scaled.residual())
