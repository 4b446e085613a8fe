"""A generation that breaks, and the next one: no step lost, none repeated, the same curve."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from generations import Generations
from local_jobs import VOCAB, make_job, plan_for, worst_difference

from ray_train_geo.cluster.topology import Topology
from ray_train_geo.errors import TransportError
from ray_train_geo.planning.plan import Plan
from ray_train_geo.spec import JobSpec
from ray_train_geo.training.assignment import Outcome
from ray_train_geo.training.copies import copy_duties
from ray_train_geo.training.reference import run_reference
from ray_train_geo.training.runtime import StageRuntime
from ray_train_geo.training.standing import Common

STEPS = 9
TWO_BY_TWO = ["parallelism.pipelines=2", "parallelism.stages=2"]
Made = Callable[..., Generations]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    all_made = []

    def make(*overrides: str) -> Generations:
        all_made.append(Generations(make_job(tmp_path, "training.steps=9", *overrides)))
        return all_made[-1]

    yield make
    for generations in all_made:
        generations.close()


def plan(job: JobSpec, devices: list[str], *parallelism: str) -> Plan:
    """A plan like ``parallelism``, on ``devices``."""
    raw: dict[str, Any] = {"pipelines": None, "stages": None, "layers": None, "microbatches": None}
    for text in parallelism:
        name, _, value = text.partition("=")
        raw[name] = yaml.safe_load(value)
    shaped = job.model_copy(update={"parallelism": job.parallelism.model_copy(update=raw)})
    found = plan_for(shaped, len(devices))
    names = {d.id: new for d, new in zip(found.devices, devices, strict=True)}
    return replace(
        found,
        devices=tuple(replace(d, id=names[d.id], node=names[d.id]) for d in found.devices),
        pipelines=tuple(
            replace(p, stages=tuple(replace(s, device=names[s.device]) for s in p.stages))
            for p in found.pipelines
        ),
    )


def breaking(runtime: StageRuntime, step: int, after: bool) -> None:
    """The commit of ``step`` breaks at this rank, before it has voted or after."""
    steps: Any = runtime._steps
    ballot = steps._ballot
    original, calls = ballot.agree, [runtime.step]

    def agree(mine: Sequence[float], deadline_s: float) -> list[float]:
        calls[0] += 1
        if calls[0] != step:
            return original(mine, deadline_s)
        if after:
            original(mine, deadline_s)
        raise TransportError("made up")

    ballot.agree = agree


def assert_curve(generations: Generations) -> None:
    records = [generations.records[step] for step in sorted(generations.records)]
    reference = run_reference(generations.job, generations.job.dims(VOCAB))
    assert worst_difference(records, reference) < 1e-4


@pytest.mark.parametrize("after", [True, False], ids=["others-committed", "nobody-committed"])
def test_a_commit_that_broke_on_one_worker(made: Made, after: bool) -> None:
    run = made()
    four = plan(run.job, ["a", "b", "c", "d"], "pipelines=2", "stages=2")
    ended = run.run(four, STEPS, before=lambda runtimes: breaking(runtimes[3], 4, after))
    assert all(isinstance(e, TransportError) for e in ended.values()), ended
    run.lose("b")  # the last stage of the first pipeline
    common = run.settle()
    assert common is not None
    # The abort may also reach the others before the result: then all replay.
    assert common.step in ((3, 4) if after else (3,))
    three = plan(run.job, ["c", "d", "a"], "layers=[[0,2,6],[0,6]]")
    ended = run.run(three, STEPS, common)
    assert [e.step for e in ended.values() if isinstance(e, Outcome)] == [STEPS] * 3, ended
    assert_curve(run)


def test_kept_tensors_are_not_copied_and_only_missing_ones_travel(made: Made) -> None:
    run = made()
    two = plan(run.job, ["a", "b"], "pipelines=1", "layers=[[0,4,6]]")
    run.run(two, 3)
    kept = run.workers["a"].runtime
    assert kept is not None
    before = {n: t.data_ptr() for n, t in kept._state.tensors().items()}
    common = run.settle()
    assert common is not None
    moved = plan(run.job, ["a", "b"], "pipelines=1", "layers=[[0,2,6]]")
    run.run(moved, STEPS, common)
    assert run.workers["a"].runtime is not None
    after = {n: t.data_ptr() for n, t in run.workers["a"].runtime._state.tensors().items()}
    assert after.items() <= before.items()
    assert len(after) < len(before)
    assert_curve(run)


def test_a_pause_ends_all_after_the_same_step_and_saves_nothing(made: Made) -> None:
    run = made()
    four = plan(run.job, ["a", "b", "c", "d"], "pipelines=2", "stages=2")
    ended = run.run(four, STEPS, before=lambda runtimes: runtimes[2].interrupt(pause=True))
    outcomes = [e for e in ended.values() if isinstance(e, Outcome)]
    assert [(o.step, o.paused) for o in outcomes] == [(1, True)] * 4
    assert not (run.job.run.directory / "checkpoints").exists()
    common = run.settle()
    joined = plan(run.job, ["a", "e", "c", "d"], "layers=[[0,1,6],[0,5,6]]")
    run.run(joined, STEPS, common)
    assert_curve(run)


@pytest.mark.parametrize("interval", [1, 3])
def test_one_pipeline_goes_on_from_the_in_memory_copies(made: Made, interval: int) -> None:
    run = made("training.precision=fp32")
    three = plan(run.job, ["a", "b", "c"], "pipelines=1", "stages=3")
    duties = copy_duties(three, run.dims, Topology(three.devices))
    duties = {rank: replace(duty, interval=interval) for rank, duty in duties.items()}
    assert {duty.peer for duty in duties.values()} <= {0, 1, 2}
    run.run(three, STEPS, None, duties, lambda runtimes: breaking(runtimes[1], 6, False))
    run.lose("b")
    common = run.settle()
    assert common is not None, "what b had is with its peer"
    assert 0 <= 5 - common.step <= interval
    two = plan(run.job, ["c", "a"], "pipelines=1", "stages=2")
    run.records = {s: r for s, r in run.records.items() if s <= common.step}
    run.run(two, STEPS, common, copy_duties(two, run.dims, Topology(two.devices)))
    assert_curve(run)
    assert len(run.workers["a"].memory.holdings()) <= 3, "older copies are let go"


def test_without_copies_a_lost_pipeline_is_lost(made: Made) -> None:
    run = made()
    two = plan(run.job, ["a", "b"], "pipelines=1", "stages=2")
    run.run(two, 3)
    run.lose("b")
    assert run.settle() is None


def test_an_old_generation_is_refused(made: Made) -> None:
    run = made()
    one = plan(run.job, ["a"], "pipelines=1", "stages=1")
    run.run(one, 2)
    memory = run.workers["a"].memory
    memory.enter(5)
    with pytest.raises(TransportError, match="generation 4"):
        memory.give(4, 2, [])
    with pytest.raises(TransportError, match="generation 4"):
        memory.take(4, 2, {}, {})
    memory.close()
    with pytest.raises(TransportError, match="generation 5 is not being built"):
        memory.give(5, 2, [])
    assert isinstance(run.settle(), Common)
    assert not [t for t in threading.enumerate() if t.name.startswith("copy-state")]
