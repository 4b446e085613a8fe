"""Sums that come a step late: the same curve whoever computes, and whatever happens to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from delayed_reference import run_delayed
from generations import Generations
from local_jobs import VOCAB, make_job, train, worst_difference
from test_generations import plan

from ray_train_geo.errors import SpecError, TransportError
from ray_train_geo.spec import JobSpec
from ray_train_geo.training.assignment import Outcome, Start
from ray_train_geo.training.checkpoint import CheckpointStore, read_manifest
from ray_train_geo.training.runtime import StageRuntime

STEPS = 7
DELAYED = "parallelism.delay_steps=1"
TWO_BY_TWO = ["parallelism.pipelines=2", "parallelism.stages=2"]


def assert_curve(job: JobSpec, losses: Sequence[float]) -> None:
    expected = run_delayed(job, job.dims(VOCAB), len(losses))
    assert list(losses) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "overrides",
    [
        TWO_BY_TWO,
        ["parallelism.layers=[[0,1,3,6],[0,4,6]]", "parallelism.gradient_sync=sharded_ps"],
        [*TWO_BY_TWO, "parallelism.schedule=zero-bubble", "checkpoint.interval=4"],
        ["parallelism.pipelines=1", "parallelism.stages=2"],
    ],
    ids=["2x2", "cut-differently", "zero-bubble-with-checkpoints", "no-peers"],
)
def test_a_step_is_computed_at_the_step_before_last(tmp_path: Path, overrides: list[str]) -> None:
    job = make_job(tmp_path, *overrides, DELAYED, f"training.steps={STEPS}")
    records = train(job).records
    assert [r.step for r in records] == list(range(1, STEPS + 1))
    assert_curve(job, [r.loss for r in records])


def test_it_is_not_what_is_computed_without_delay(tmp_path: Path) -> None:
    at_once = make_job(tmp_path, *TWO_BY_TWO, f"training.steps={STEPS}")
    with pytest.raises(AssertionError):
        assert_curve(at_once, [r.loss for r in train(at_once).records])


def test_bf16_and_codecs_follow_it_nearly(tmp_path: Path) -> None:
    more = [*TWO_BY_TWO, DELAYED, f"training.steps={STEPS}"]
    job = make_job(tmp_path, *more, "training.precision=bf16", "codecs.gradients=int8")
    losses = [r.loss for r in train(job).records]
    assert losses == pytest.approx(run_delayed(job, job.dims(VOCAB), STEPS), rel=2e-2)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    def job(name: str, *more: str) -> JobSpec:
        return make_job(tmp_path, *TWO_BY_TWO, "training.steps=6", f"run.name={name}", *more)

    whole = train(job("whole", DELAYED)).records
    train(job("halves", DELAYED), until=3)
    newest = CheckpointStore(str(job("halves").run.directory / "checkpoints")).newest()
    assert newest is not None
    start = Start(newest, read_manifest(newest))
    assert worst_difference(train(job("halves", DELAYED), start).records, whole[3:]) == 0
    # One without delay reads it, too, and the other way round.
    train(job("at-once"), start, until=4)
    newest = CheckpointStore(str(job("at-once").run.directory / "checkpoints")).newest()
    assert newest is not None
    later = train(job("later", DELAYED), Start(newest, read_manifest(newest))).records
    assert [r.step for r in later] == [5, 6]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Generations]:
    generations = Generations(make_job(tmp_path, DELAYED, f"training.steps={STEPS}"))
    yield generations
    generations.close()


def breaking(runtime: StageRuntime, step: int, moment: str) -> None:
    """This rank is lost: as it sums ``step``, once it has voted, or computing the one after."""
    steps: Any = runtime._steps
    if moment == "computing":
        executor: Any = runtime._executor
        run = executor.run

        def broken(now: int, factor: float, deadline_s: float) -> Any:
            if now == step + 1:
                raise TransportError("made up")
            return run(now, factor, deadline_s)

        executor.run = broken
        return
    voted = steps._voted

    def breaks(summing: Any) -> Any:
        if summing.step != step:
            return voted(summing)
        if moment == "voted":
            voted(summing)
        raise TransportError("made up")

    steps._voted = breaks


@pytest.mark.parametrize(("rank", "moment"), [(3, "summing"), (0, "voted"), (3, "computing")])
def test_a_loss_changes_nothing(run: Generations, rank: int, moment: str) -> None:
    four = plan(run.job, ["a", "b", "c", "d"], "pipelines=2", "stages=2")
    ended = run.run(four, STEPS, before=lambda runtimes: breaking(runtimes[rank], 5, moment))
    assert all(isinstance(e, TransportError) for e in ended.values()), ended
    run.lose("abcd"[rank])
    common = run.settle()
    assert common is not None
    assert common.step in (3, 4, 5)  # whoever is lost may be the only one that has applied step 4
    # Layers move, and somebody new gets some.
    rest = [name for name in "abcd" if name != "abcd"[rank]]
    ended = run.run(plan(run.job, [rest[2], "e", rest[0]], "layers=[[0,2,6],[0,6]]"), STEPS, common)
    assert all(isinstance(e, Outcome) for e in ended.values()), ended
    assert sorted(run.records) == list(range(1, STEPS + 1))
    assert_curve(run.job, [run.records[step].loss for step in sorted(run.records)])


def test_a_pause_changes_nothing(run: Generations) -> None:
    four = plan(run.job, ["a", "b", "c", "d"], "pipelines=2", "stages=2")
    ended = run.run(four, STEPS, before=lambda runtimes: runtimes[1].interrupt(pause=True))
    assert {e.paused for e in ended.values() if isinstance(e, Outcome)} == {True}
    common = run.settle()
    assert common is not None
    run.run(plan(run.job, ["d", "a"], "pipelines=2", "stages=1"), STEPS, common)
    assert_curve(run.job, [run.records[step].loss for step in range(1, STEPS + 1)])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.precision=fp16", "precision to bf16 or fp32"),
        ("codecs.gradients=topk", "choose bf16 or int8"),
        ("local_sgd.inner_steps=4", "a delay_steps of its own"),
    ],
)
def test_what_does_not_go_with_it(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        make_job(tmp_path, DELAYED, override)
