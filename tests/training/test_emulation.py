"""Emulated devices and links: what is computed is the same, when it is done follows the engine."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from local_jobs import VOCAB, make_job, worst_difference

from ray_train_geo.cluster.topology import Device, Link, Topology
from ray_train_geo.errors import PlanError
from ray_train_geo.model.dropout import dropout_key
from ray_train_geo.model.stage import build_stage
from ray_train_geo.planning.cost import backward_s, forward_s, weight_s
from ray_train_geo.planning.planner import plan
from ray_train_geo.planning.predict import predict_plan
from ray_train_geo.spec import JobSpec
from ray_train_geo.training import emulation
from ray_train_geo.training.assignment import Assignment
from ray_train_geo.training.emulation import Emulation, Pace
from ray_train_geo.training.local import run_local


def far(job: JobSpec, layer_s: float, link: Link, devices: int) -> Topology:
    """Devices on nodes of their own, whose forward of a layer takes ``layer_s``."""
    speed = Device("", "").flops_per_s
    unit = forward_s(job.dims(VOCAB), job.training, (1, 2), Device("", "", flops_per_s=speed))
    return Topology(
        tuple(Device(f"d{i}", f"n{i}", flops_per_s=speed * unit / layer_s) for i in range(devices)),
        default_link=link,
    )


def assignment(job: JobSpec, topology: Topology, rank: int = 0) -> Assignment:
    return Assignment(
        job=job,
        dims=job.dims(VOCAB),
        plan=plan(topology, job, VOCAB),
        rank=rank,
        generation=1,
        hostname="127.0.0.1",
        deadline_s=10.0,
        checkpoint_root="",
    )


def test_a_small_run_takes_what_the_engine_says(tmp_path: Path) -> None:
    job = make_job(
        tmp_path,
        *("parallelism.pipelines=1", "parallelism.stages=3", "parallelism.bucket_bytes=10000000"),
        *("training.global_batch=12", "training.steps=7"),
        model={"layers": 6, "dim": 32, "heads": 4, "dropout": 0.1, "tied_embeddings": False},
    )
    topology = far(job, 0.005, Link(0.01, 1e6), 3)
    made = plan(topology, job, VOCAB)
    dims = job.dims(VOCAB)
    result = run_local(job, dims, made, processes=False, emulated=topology)
    measured_s = statistics.median(r.step_s for r in result.records[2:])
    assert measured_s == pytest.approx(predict_plan(made, topology, job, VOCAB).step_s, rel=0.15)
    assert result.simulated
    # Only the time is emulated: losses and norms are those of a run without.
    plain = run_local(job, dims, made, processes=False, until=3)
    assert not plain.simulated
    assert worst_difference(result.records[:3], plain.records) == 0


def test_under_local_sgd_a_step_waits_for_no_round_trip(tmp_path: Path) -> None:
    """Three islands 60 ms apart; gradients of a step would take 0.1 s more."""
    shape = [
        *("parallelism.pipelines=3", "parallelism.microbatches=[3,3,2]", "training.steps=9"),
        *("parallelism.gradient_sync=sharded_ps", "parallelism.bucket_bytes=10000000"),
    ]
    rounds = ["local_sgd.inner_steps=6", "local_sgd.delay_steps=3", "local_sgd.codec=int8"]
    medians = []
    for overrides in ([], rounds):
        job = make_job(tmp_path, *shape, *overrides)
        topology = far(job, 0.004, Link(0.06, 4e6), 3)
        made = plan(topology, job, VOCAB)
        result = run_local(job, job.dims(VOCAB), made, processes=False, emulated=topology)
        medians.append(statistics.median(r.step_s for r in result.records[1:]))
        predicted_s = predict_plan(made, topology, job, VOCAB).step_s
        assert medians[-1] > 0.9 * predicted_s
    assert medians[1] < medians[0] - 0.2, "two round trips, and the gradients"


def test_a_stage_takes_its_devices_time_and_releases_gradients_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    now = [0.0]

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(emulation.time, "sleep", sleep)
    monkeypatch.setattr(emulation.time, "monotonic", lambda: now[0])
    dims = make_job(tmp_path).dims(VOCAB)
    module = build_stage(dims, 0, 4, seed=0)
    final: list[float] = []
    for layer in reversed(module.layers.values()):
        layer.down.weight.register_post_accumulate_grad_hook(lambda _: final.append(now[0]))
    pace = Pace(list(module.layers.values()), forward_s=1.0, backward_s=4.0)
    with pace("F"):
        output = module(torch.zeros(1, 8, dtype=torch.int64), dropout_key(0, 1, 0))
        now[0] += 0.25  # what is computed is part of the time
    assert slept == [0.75]
    with pace("B"):
        output.sum().backward()
    assert now[0] == 1.0 + 4.0
    assert final == [1.5, 2.5, 3.5, 4.5]
    now[0] += 1.0
    with pace("F"):
        now[0] += 2.0  # longer than it should: nothing to wait for
    assert slept[-1] == 0.0


def test_weights_gradients_come_on_the_way_of_a_w(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(emulation.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))
    monkeypatch.setattr(emulation.time, "monotonic", lambda: now[0])
    module = build_stage(make_job(tmp_path).dims(VOCAB), 0, 2, seed=0)
    split = module.split_backward()
    pace = Pace(list(module.layers.values()), forward_s=1.0, backward_s=1.0, weight_s=2.0)
    final: dict[str, float] = {}
    for name, parameter in module.layers.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _, name=name: final.__setitem__(name, now[0])
        )
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    output = module(tokens, dropout_key(0, 1, 0))
    with pace("B"):
        _, left = split.activations(tokens, output, torch.ones_like(output))
    assert (now[0], final) == (1.0, {})
    with pace("W"):
        split.weights(left)
    assert now[0] == 3.0
    matrices = [f"{i}.{m}.weight" for i in (1, 0) for m in ("down", "up", "attention_out", "qkv")]
    assert [final[name] for name in matrices] == [1.125 + 0.25 * i for i in range(8)]


@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble"])
def test_the_pace_is_that_of_the_plans_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    now = [0.0]
    monkeypatch.setattr(emulation.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))
    monkeypatch.setattr(emulation.time, "monotonic", lambda: now[0])
    job = make_job(
        tmp_path,
        *("parallelism.pipelines=1", "parallelism.stages=2"),
        f"parallelism.schedule={schedule}",
    )
    topology = far(job, 0.004, Link(0.0, 1e9), 2)
    a = assignment(job, topology, rank=1)
    first, last = a.plan.stage(a.role).layers
    module = build_stage(a.dims, first, last, seed=0)
    pace = Emulation(topology).pace(module, a)
    of = a.dims, job.training, (first, last), topology.devices[1]
    seconds = {"F": forward_s(*of), "B": backward_s(*of)}
    if schedule == "zero-bubble":
        seconds["W"] = weight_s(*of)
        seconds["B"] -= seconds["W"]
    for kind, wanted_s in seconds.items():
        start_s = now[0]
        with pace(kind):
            pass
        assert now[0] - start_s == pytest.approx(wanted_s)


def test_what_can_not_be_emulated_is_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path, "parallelism.pipelines=1", "parallelism.stages=2")
    topology = far(job, 0.001, Link(0.0, 1e9), 2)
    made, dims = plan(topology, job, VOCAB), job.dims(VOCAB)
    with pytest.raises(PlanError, match="computes on a CPU, not on cuda:0"):
        run_local(job, dims, made, device="cuda:0", emulated=topology)
    foreign = Topology((Device("elsewhere", "n"),))
    with pytest.raises(PlanError, match="device d0 is not in the topology"):
        run_local(job, dims, made, emulated=foreign)
    apart = Topology(tuple(replace(d, region=d.id) for d in topology.devices), default_link=None)
    with pytest.raises(PlanError, match="no link from device d0 to device d1"):
        run_local(job, dims, made, emulated=apart)
