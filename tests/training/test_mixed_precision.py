"""bf16 and fp16: curves within their precision, and overflows that no worker applies."""

from __future__ import annotations

import dataclasses
import functools
import threading
from pathlib import Path

import pytest
import torch
from local_jobs import LLAMA, VOCAB, make_job, train

from ray_train_geo.errors import DivergedError
from ray_train_geo.model.catalog import parameter_shapes
from ray_train_geo.model.stage import build_stage
from ray_train_geo.observe.record import metrics_record
from ray_train_geo.training import local
from ray_train_geo.training.assignment import Outcome, Start, StepRecord
from ray_train_geo.training.checkpoint import CheckpointStore, read_manifest, read_tensors
from ray_train_geo.training.precision import LossScale
from ray_train_geo.training.reference import run_reference
from ray_train_geo.training.runtime import StageRuntime
from ray_train_geo.training.standing import Totals
from ray_train_geo.training.stepping import Synchronous

# With embeddings of 0.02 RMSNorm makes single gradients so steep that fp16 would overflow.
STEADY = {**LLAMA, "init_std": 0.1}
GRID = ["parallelism.pipelines=2", "parallelism.stages=2"]
# Relative, of loss and norm: about four times what was measured over these 30 steps.  bf16 has 8
# bits of mantissa, fp16 11.
BOUNDS = {"bf16": (2e-3, 8e-2), "fp16": (2e-4, 2e-2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixed")


@functools.cache
def reference(folder: Path, family: str) -> list[StepRecord]:
    job = make_job(folder, model=STEADY if family == "llama" else None)
    return run_reference(job, job.dims(VOCAB))


@pytest.mark.parametrize(
    ("precision", "family", "plan"),
    [
        ("bf16", "gpt", GRID),
        ("fp16", "gpt", GRID),
        ("bf16", "llama", ["parallelism.layers=[[0,2,6],[0,5,6]]", "training.recompute=true"]),
        pytest.param(
            *("bf16", "gpt", [*GRID, "parallelism.schedule=zero-bubble"]), marks=pytest.mark.soak
        ),
        ("fp16", "gpt", [*GRID, "parallelism.schedule=zero-bubble", "training.recompute=true"]),
        (
            "fp16",
            "llama",
            [
                "parallelism.pipelines=1",
                "parallelism.layers=[0,1,3,6]",
                "training.loss_scale.initial=1024",
            ],
        ),
    ],
)
def test_curves_are_fp32s_within_precision(
    folder: Path, precision: str, family: str, plan: list[str]
) -> None:
    job = make_job(
        folder,
        *plan,
        f"training.precision={precision}",
        f"run.name={precision}-{family}",
        model=STEADY if family == "llama" else None,
    )
    records, expected = train(job).records, reference(folder, family)
    loss_bound, norm_bound = BOUNDS[precision]
    assert [r.step for r in records] == [r.step for r in expected]
    assert [r.loss for r in records] == pytest.approx([r.loss for r in expected], rel=loss_bound)
    assert [r.grad_norm for r in records] == pytest.approx(
        [r.grad_norm for r in expected], rel=norm_bound
    )
    assert [r.loss for r in records] != [r.loss for r in expected], "it did compute in less"
    assert records[-1].loss < records[0].loss - 1


def test_the_plan_does_not_matter_to_bf16_either(folder: Path) -> None:
    curves = []
    for name, plan in {
        "a": ["parallelism.pipelines=1", "parallelism.stages=1"],
        "b": ["parallelism.layers=[[0,2,6],[0,1,5,6]]", "parallelism.gradient_sync=sharded_ps"],
    }.items():
        job = make_job(folder, *plan, "training.precision=bf16", f"run.name=bf16-{name}")
        curves.append([(r.loss, r.grad_norm) for r in train(job, until=12).records])
    for one, other in zip(*curves, strict=True):
        assert one == pytest.approx(other, rel=2e-3)


# ------------------------------------------------------------------ overflows on 2 x 2

OVERFLOWING = ["training.precision=fp16", f"training.loss_scale.initial={2**40}"]


class Witness:
    """Makes :func:`run_local`'s workers tell how they ended, and what weights they hold."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.outcomes: dict[int, Outcome] = {}
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        witness, lock = self, threading.Lock()

        class Watched(StageRuntime):
            def run(self, until: int) -> Outcome:
                outcome = super().run(until)
                with lock:
                    witness.outcomes[self.assignment.rank] = outcome
                    witness.weights[self.assignment.rank] = {
                        n: t.clone() for n, t in self._state.tensors().items()
                    }
                return outcome

        monkeypatch.setattr(local, "StageRuntime", Watched)

    def common(self) -> tuple[Outcome, dict[str, torch.Tensor]]:
        """The outcome and weights that all workers agree on."""
        assert len(self.outcomes) == 4
        assert len({dataclasses.astuple(o) for o in self.outcomes.values()}) == 1
        merged: dict[str, torch.Tensor] = {}
        for held in self.weights.values():
            for name, tensor in held.items():
                assert torch.equal(merged.setdefault(name, tensor), tensor), name
        return self.outcomes[0], merged


@pytest.fixture
def witness(monkeypatch: pytest.MonkeyPatch) -> Witness:
    return Witness(monkeypatch)


def test_an_overflow_is_skipped_by_all_and_lowers_the_scale_once(
    folder: Path, witness: Witness
) -> None:
    job = make_job(folder, *GRID, *OVERFLOWING, "run.name=overflow")
    records = train(job, until=1).records
    outcome, held = witness.common()
    assert records[0].skipped
    assert records[0].loss_scale == 2**40, "that of this step; the next one's is lower"
    assert outcome == Outcome(1, False, updates=0, loss_scale=LossScale(2.0**39, 0))
    whole = build_stage(job.dims(VOCAB), 0, 6, seed=7)
    initial = {f"model.{n}": p.detach() for n, p in whole.named_parameters()}
    for name, tensor in held.items():
        if name in initial:
            assert torch.equal(tensor, initial[name]), f"{name} changed in a skipped step"
        else:
            assert not tensor.any(), f"{name} moved in a skipped step"


def test_the_scale_falls_until_steps_are_good_again(folder: Path, witness: Witness) -> None:
    job = make_job(folder, *GRID, *OVERFLOWING, "training.lr_schedule=constant", "run.name=falling")
    records = train(job).records
    outcome, _ = witness.common()
    skipped = [r.skipped for r in records]
    first_good = skipped.index(False)
    assert 5 <= first_good <= 25
    assert skipped == [True] * first_good + [False] * (30 - first_good)
    assert [r.loss_scale for r in records[: first_good + 1]] == [
        2.0 ** (40 - i) for i in range(first_good + 1)
    ]
    assert {r.loss_scale for r in records[first_good:]} == {2.0 ** (40 - first_good)}
    assert outcome.updates == 30 - first_good
    # Nothing was learned while steps were skipped, and then it was.
    spread = [r.loss for r in records[: first_good + 1]]
    assert max(spread) - min(spread) < 0.1
    assert records[-1].loss < records[0].loss - 0.1
    for record in records[: first_good + 1]:
        line = metrics_record(
            **dataclasses.asdict(record),
            tokens=256,
            predicted_step_s=1.0,
            generation=1,
            bytes_per_token=1.0,
        )
        assert (line["skipped"], line["loss_scale"]) == (record.skipped, record.loss_scale)


def test_one_stage_that_overflows_stops_all(
    folder: Path, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An infinite gradient on rank 3 alone, in step 3 alone."""
    finish = Synchronous.finish

    def spoiled(self: Synchronous, loss_sum: float, asked: tuple[bool, bool], last: bool) -> Totals:
        if (self.step, self._assignment.rank) != (2, 3):
            return finish(self, loss_sum, asked, last)
        with monkeypatch.context() as patch:
            self._state.buffers[0][0] = float("inf")
            patch.setattr(self._state, "squared_norm", lambda rank: float("inf"))
            return finish(self, loss_sum, asked, last)

    monkeypatch.setattr(Synchronous, "finish", spoiled)
    job = make_job(folder, *GRID, "training.precision=fp16", "run.name=one-stage")
    records = train(job, until=3).records
    outcome, _ = witness.common()
    assert [r.skipped for r in records] == [False, False, True]
    assert outcome == Outcome(3, False, updates=2, loss_scale=LossScale(2.0**15, 0))


def test_scale_and_growth_survive_a_resume_under_another_plan(folder: Path) -> None:
    scaling = [
        "training.precision=fp16",
        "training.loss_scale.initial=8",
        "training.loss_scale.growth_interval=4",
    ]
    whole = train(make_job(folder, *GRID, *scaling, "run.name=growth-whole"), until=14).records
    assert [r.loss_scale for r in whole] == [8.0] * 4 + [16.0] * 4 + [32.0] * 4 + [64.0] * 2
    job = make_job(folder, *GRID, *scaling, "run.name=growth-stopped")
    train(job, until=6)
    location = CheckpointStore(str(job.run.directory / "checkpoints")).newest()
    assert location is not None
    manifest = read_manifest(location)
    assert (manifest.loss_scale, manifest.good_steps) == (16.0, 2)
    job = make_job(
        folder, "parallelism.pipelines=1", "parallelism.stages=3", *scaling, "run.name=growth-on"
    )
    later = train(job, start=Start(location, manifest), until=14).records
    assert [r.loss_scale for r in later] == [r.loss_scale for r in whole[6:]]
    assert [r.loss for r in later] == pytest.approx([r.loss for r in whole[6:]], rel=2e-4)


def test_skipped_steps_do_not_count_as_updates_after_a_resume(
    folder: Path, witness: Witness
) -> None:
    job = make_job(folder, *GRID, *OVERFLOWING, "run.name=skip-stopped")
    train(job, until=4)
    location = CheckpointStore(str(job.run.directory / "checkpoints")).newest()
    assert location is not None
    manifest = read_manifest(location)
    assert (manifest.step, manifest.updates, manifest.loss_scale) == (4, 0, 2.0**36)
    state = {f"exp_avg.{n}": torch.ones(s) for n, s in parameter_shapes(job.dims(VOCAB)).items()}
    read_tensors(location, manifest, state)
    assert not any(t.any() for t in state.values())
    records = train(job, start=Start(location, manifest), until=6).records
    outcome, _ = witness.common()
    assert [r.loss_scale for r in records] == [2.0**36, 2.0**35]
    assert outcome.updates == 0


def test_a_resume_from_fp32_starts_with_the_initial_scale(folder: Path) -> None:
    job = make_job(folder, "parallelism.pipelines=1", "run.name=from-fp32")
    train(job, until=2)
    location = CheckpointStore(str(job.run.directory / "checkpoints")).newest()
    assert location is not None
    job = make_job(folder, "parallelism.pipelines=1", "training.precision=fp16", "run.name=to-fp16")
    records = train(job, start=Start(location, read_manifest(location)), until=4).records
    assert [(r.step, r.loss_scale, r.skipped) for r in records] == [
        (3, 65536.0, False),
        (4, 65536.0, False),
    ]


@pytest.mark.parametrize(("precision", "says"), [("fp32", "step 2: loss"), ("fp16", "every loss")])
def test_what_never_gets_finite_is_an_error(folder: Path, precision: str, says: str) -> None:
    job = make_job(
        folder,
        *GRID,
        f"training.precision={precision}",
        "training.lr=1e30",
        "training.warmup_steps=0",
        "training.steps=60",
        f"run.name=diverged-{precision}",
    )
    with pytest.raises(DivergedError, match=says):
        train(job)
