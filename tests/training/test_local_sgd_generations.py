"""Islands that are lost, and come: no step and no sample twice, and what the others know stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from diloco_reference import Goes, run_diloco
from generations import Generations
from local_jobs import make_job
from test_generations import plan

from ray_train_geo.errors import TransportError
from ray_train_geo.model.catalog import parameter_shapes
from ray_train_geo.planning.plan import Plan
from ray_train_geo.training.assignment import Outcome
from ray_train_geo.training.buckets import holders_of
from ray_train_geo.training.runtime import StageRuntime
from ray_train_geo.training.standing import Totals

STEPS = 9
Made = Callable[..., Generations]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    all_made = []

    def make(*overrides: str) -> Generations:
        job = make_job(tmp_path, "training.steps=9", "local_sgd.inner_steps=4", *overrides)
        all_made.append(Generations(job))
        return all_made[-1]

    yield make
    for generations in all_made:
        generations.close()


def breaking(runtime: StageRuntime, step: int) -> None:
    """This rank is lost in ``step``, before it has anything to give."""
    steps: Any = runtime._steps
    finish = steps.finish

    def broken(loss_sum: float, asked: tuple[bool, bool], last: bool) -> Totals:
        if steps.step + 1 == step:
            raise TransportError("made up")
        return finish(loss_sum, asked, last)

    steps.finish = broken


def shares(made: Plan) -> list[Sequence[int]]:
    """Microbatches of each pipeline."""
    return [range(p.first_microbatch, p.first_microbatch + p.microbatches) for p in made.pipelines]


def losses(run: Generations) -> list[float]:
    assert sorted(run.records) == list(range(1, STEPS + 1))
    return [run.records[step].loss for step in sorted(run.records)]


def finished(ended: dict[int, Outcome | BaseException]) -> None:
    assert {e.step if isinstance(e, Outcome) else e for e in ended.values()} == {STEPS}


@pytest.mark.parametrize(
    ("lost", "step"), [(2, 7), (2, 8), (0, 8)], ids=["in-a-step", "in-a-merge", "the-hub"]
)
def test_an_island_that_is_lost_contributes_nothing_and_the_others_go_on(
    made: Made, lost: int, step: int
) -> None:
    run = made()
    three = plan(run.job, ["a", "b", "c"], "pipelines=3", "microbatches=[4,1,3]")
    ended = run.run(three, STEPS, before=lambda runtimes: breaking(runtimes[lost], step))
    assert all(isinstance(e, TransportError) for e in ended.values()), ended
    run.lose("abc"[lost])
    common = run.settle()
    assert common is not None
    assert common.step in (step - 2, step - 1), "who was ahead of what is committed has gone back"
    left = [i for i in range(3) if i != lost]
    two = plan(run.job, ["abc"[i] for i in left], "pipelines=2", "microbatches=[3,5]")
    finished(run.run(two, STEPS, common))
    changes = {common.step: [Goes(i, mine) for i, mine in zip(left, shares(two), strict=True)]}
    expected, _ = run_diloco(run.job, run.dims, shares(three), STEPS, changes=changes)
    assert losses(run) == pytest.approx(expected, rel=1e-4)


def test_layers_that_lost_their_island_restart_from_the_global_parameters(made: Made) -> None:
    run = made()
    four = plan(run.job, ["a", "b", "c", "d"], "pipelines=2", "layers=[[0,4,6]]")
    run.run(four, STEPS, before=lambda runtimes: breaking(runtimes[1], 7))
    run.lose("b")
    common = run.settle()
    assert common is not None
    three = plan(run.job, ["c", "d", "a"], "layers=[[0,4,6],[0,6]]")
    finished(run.run(three, STEPS, common))
    lost = {n for n in parameter_shapes(run.dims) if 1 in holders_of(n, four, run.dims)}
    first, second = shares(three)
    goes = [Goes(1, first), Goes(0, second, lost - {"tokens.weight"}, moments_of=1)]
    expected, _ = run_diloco(run.job, run.dims, shares(four), STEPS, changes={common.step: goes})
    assert losses(run) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("delay", [0, 2])
def test_one_that_joins_starts_from_what_all_have_merged(made: Made, delay: int) -> None:
    run = made(f"local_sgd.delay_steps={delay}")
    two = plan(run.job, ["a", "b"], "pipelines=2", "microbatches=[4,4]")
    ended = run.run(two, STEPS, before=lambda runtimes: runtimes[1].interrupt(pause=True))
    outcomes = {(e.step, e.paused) if isinstance(e, Outcome) else e for e in ended.values()}
    assert outcomes == {(2, True)}, "the wish comes round a step later; then everything is merged"
    common = run.settle()
    assert common is not None
    assert common.step == 2
    three = plan(run.job, ["a", "b", "c"], "pipelines=3", "microbatches=[4,1,3]")
    run.lose("b")  # so that a alone is a source
    common = run.settle()
    assert common is not None
    finished(run.run(three, STEPS, common))
    all_names = set(parameter_shapes(run.dims))
    one, other, third = shares(three)
    goes = [Goes(0, one), Goes(0, other, all_names, 0), Goes(0, third, all_names, 0)]
    expected, _ = run_diloco(run.job, run.dims, shares(two), STEPS, closes=[2], changes={2: goes})
    assert losses(run) == pytest.approx(expected, rel=1e-4)
