"""Error feedback and the elastic life of a layer: a re-plan loses nothing that matters."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from generations import Generations
from local_jobs import make_job, train, worst_difference
from test_generations import breaking, plan

from ray_train_geo.errors import TransportError
from ray_train_geo.spec import JobSpec
from ray_train_geo.training.assignment import Outcome, Start
from ray_train_geo.training.checkpoint import CheckpointStore, read_manifest
from ray_train_geo.training.residuals import saved_residuals

STEPS = 12
Made = Callable[..., Generations]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    all_made = []

    def make(codec: str, *overrides: str) -> Generations:
        job = make_job(
            tmp_path,
            f"codecs.gradients={codec}",
            "parallelism.gradient_sync=sharded_ps",
            "codecs.topk_stride=1",
            f"training.steps={STEPS}",
            *overrides,
        )
        all_made.append(Generations(job))
        return all_made[-1]

    yield make
    for generations in all_made:
        generations.close()


def losses(run: Generations) -> list[float]:
    assert sorted(run.records) == list(range(1, STEPS + 1)), "no step lost, none twice"
    return [run.records[step].loss for step in range(1, STEPS + 1)]


def worst(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / y for x, y in zip(a, b, strict=True))


def total_residual(run: Generations, devices: Iterable[str]) -> dict[str, torch.Tensor]:
    """Of each weight, the residuals of the workers of ``devices`` together."""
    found: dict[str, torch.Tensor] = {}
    for device in devices:
        runtime = run.workers[device].runtime
        assert runtime is not None
        residuals = runtime._state.residuals
        assert residuals is not None
        parts = [
            residuals._parts(residuals._now), residuals._unsent,
            residuals._parts(residuals._inherited), residuals._unsent_inherited,
        ]  # fmt: skip
        for name, tensor in itertools.chain.from_iterable(p.items() for p in parts):
            found[name] = found.get(name, torch.zeros(())) + tensor.double()
    return found


def uninterrupted(made: Made, codec: str) -> list[float]:
    run = made(codec)
    run.run(plan(run.job, ["a", "b", "c"], "pipelines=3", "stages=1"), STEPS)
    return losses(run)


@pytest.mark.parametrize(
    ("codec", "spared", "allowed"),
    [("topk", False, 1e-3), ("topk", True, 1e-3), ("powersgd", True, 1e-6)],
    ids=["topk-without-copies", "topk", "powersgd"],
)
def test_a_killed_replica_that_is_replaced_leaves_the_curve(
    made: Made, codec: str, spared: bool, allowed: float
) -> None:
    run = made(codec)
    three = plan(run.job, ["a", "b", "c"], "pipelines=3", "stages=1")
    keepers = {0: "b", 1: "c", 2: "a"} if spared else {}
    ended = run.run(
        three, STEPS, before=lambda runtimes: breaking(runtimes[2], 6, False), spares=keepers
    )
    assert all(isinstance(e, TransportError) for e in ended.values()), ended
    run.lose("b")
    common = run.settle()
    assert common is not None
    assert common.step == 5
    again = plan(run.job, ["a", "c", "d"], "pipelines=3", "stages=1")
    ended = run.run(again, STEPS, common)
    assert all(isinstance(e, Outcome) for e in ended.values()), ended
    assert worst(losses(run), uninterrupted(made, codec)) < allowed


@pytest.mark.parametrize("codec", ["topk", "powersgd"])
def test_layers_that_move_take_their_residuals_along(made: Made, codec: str) -> None:
    run = made(codec)
    four = plan(run.job, ["a", "b", "c", "d"], "pipelines=2", "stages=2")
    run.run(four, 5)
    before = total_residual(run, "abcd")
    assert all(float(t.abs().max()) > 0 for n, t in before.items() if n.endswith("qkv.weight"))
    common = run.settle()
    assert common is not None
    after: list[dict[str, torch.Tensor]] = []
    moved = plan(run.job, ["e", "d", "a", "b"], "layers=[[0,2,6],[0,4,6]]")
    run.run(moved, 5, common, before=lambda _: after.append(total_residual(run, "edab")))
    assert_equal(after[0], before)
    # One pipeline sums with nobody: what is left goes into its next gradient.
    common = run.settle()
    assert common is not None
    alone = plan(run.job, ["b"], "pipelines=1", "stages=1")
    run.run(alone, 5, common, before=lambda _: after.append(total_residual(run, "b")))
    assert_equal(after[1], before)
    common = run.settle()
    assert common is not None
    run.run(alone, STEPS, common)
    assert total_residual(run, "b") == {}
    losses(run)


def assert_equal(after: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    assert after.keys() >= before.keys()
    for name, tensor in after.items():
        wanted = before.get(name, torch.zeros_like(tensor))
        torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-6)


def test_a_second_failure_before_the_first_step_loses_and_doubles_nothing(made: Made) -> None:
    run = made("powersgd")
    run.run(plan(run.job, ["a", "b", "c", "d"], "pipelines=2", "stages=2"), 5)
    before = total_residual(run, "abcd")
    for layers in ("[[0,2,6],[0,4,6]]", "[[0,3,6],[0,1,6]]"):
        common = run.settle()
        assert common is not None
        # "d" and "a" swap ends, so that layers go both ways, and nobody commits anything.
        moved = plan(run.job, ["d", "c", "b", "a"], f"layers={layers}")
        run.run(moved, STEPS, common, before=lambda runtimes: breaking(runtimes[0], 6, False))
    common = run.settle()
    assert common is not None
    assert common.step == 5
    after: list[dict[str, torch.Tensor]] = []
    last = plan(run.job, ["b", "c"], "pipelines=2", "stages=1")
    run.run(last, 5, common, before=lambda _: after.append(total_residual(run, "bc")))
    assert_equal(after[0], before)


def test_a_checkpoint_keeps_what_each_holder_had() -> None:
    saved = ["model.a", "residual.a@10", "residual.a@2", "residual.b@0", "exp_avg.a"]
    assert saved_residuals(saved) == {
        "residual.a": ["residual.a@2", "residual.a@10"],
        "residual.b": ["residual.b@0"],
    }


@pytest.mark.parametrize("codec", ["topk", "powersgd"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, codec: str) -> None:
    def job(name: str) -> JobSpec:
        return make_job(
            tmp_path, f"codecs.gradients={codec}", "parallelism.pipelines=2",
            "parallelism.stages=1", "training.steps=6", f"run.name={name}",
        )  # fmt: skip

    whole = train(job("whole")).records
    train(job("halves"), until=3)
    newest = CheckpointStore(str(job("halves").run.directory / "checkpoints")).newest()
    assert newest is not None
    rest = train(job("halves"), start=Start(newest, read_manifest(newest))).records
    assert worst_difference(rest, whole[3:]) == 0
