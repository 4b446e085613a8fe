"""Asking for a plan: what is meant, and what is refused before anything is searched."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ray_train_geo
from ray_train_geo.cluster.scenarios import scenario
from ray_train_geo.cluster.topology import Device, Link, Topology
from ray_train_geo.cluster.topology_file import dump_topology
from ray_train_geo.errors import PlanError, SpecError
from ray_train_geo.planning.request import plan, request
from ray_train_geo.planning.validate import validate_plan
from ray_train_geo.spec import JobSpec, parse_job

LINK = Link(0.01, 1e9 / 8)
FOUR = Topology(
    tuple(
        Device(
            f"{r}{i}/0", f"{r}{i}", r, type="V100", flops_per_s=5e13, memory_bytes=16 * 2**30,
            price_per_hour=1.0,
        )
        for r in "ab"
        for i in range(2)
    ),
    region_links={("a", "b"): LINK, ("b", "a"): LINK},
)  # fmt: skip
SMALL: dict[str, Any] = {
    "topology": FOUR, "model": "gpt3-small", "global_batch": 16, "moves": 20,
}  # fmt: skip


def job(**model: Any) -> JobSpec:
    return parse_job(
        {
            "model": model or {"name": "gpt3-small"},
            "data": {"path": "x"},
            "training": {"steps": 9, "global_batch": 8, "seq_len": 512},
        }
    )


def test_a_model_on_a_topology() -> None:
    made = plan(**SMALL)
    asked = request(**SMALL)
    validate_plan(made, FOUR, asked.job, asked.vocab_size)
    assert made.search_s > 0
    training = asked.job.training
    assert (training.global_batch, training.microbatch, training.seq_len) == (16, 1, 2048)
    assert (training.precision, training.recompute) == ("fp16", True)


def test_it_is_what_the_package_exports() -> None:
    assert ray_train_geo.plan is plan


def test_a_model_on_a_scenario_by_name() -> None:
    asked = request(scenario="universities", model="gpt3-xl", global_batch=64)
    assert asked.topology == scenario("universities")


def test_a_job_on_a_topology_file(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(job().to_yaml())
    dump_topology(FOUR, tmp_path / "four.yaml")
    asked = request(tmp_path / "job.yaml", topology=str(tmp_path / "four.yaml"))
    assert asked.job == job()
    assert {d.id for d in asked.topology.devices} == {d.id for d in FOUR.devices}


def test_what_is_given_beside_a_job_takes_the_place_of_the_jobs() -> None:
    asked = request(
        job(), topology=FOUR, global_batch=12, stages=2, replicas=2, gradient_sync="allreduce"
    )
    assert asked.job.training.global_batch == 12
    assert (asked.job.training.steps, asked.job.training.precision) == (9, "fp32")
    assert (asked.job.parallelism.stages, asked.job.parallelism.pipelines) == (2, 2)
    made = asked.plan()
    assert [len(p.stages) for p in made.pipelines] == [2, 2]
    assert made.gradient_sync == "allreduce"


def test_overrides_of_what_has_no_argument() -> None:
    asked = request(**SMALL, overrides=["parallelism.extra_warmup=0", "scaling.max_devices=2"])
    assert asked.job.parallelism.extra_warmup == 0
    assert asked.plan().world_size <= 2
    asked = request(topology=FOUR, model="gpt2", overrides=["training.global_batch=4"])
    assert asked.job.training.global_batch == 4


def test_the_same_request_gives_the_same_plan() -> None:
    first, second = (replace(plan(**SMALL, seed=3), search_s=0.0) for _ in range(2))
    assert first == second


def test_a_budget_ends_the_search() -> None:
    wide = {**SMALL, "topology": scenario("regional"), "moves": None}
    made = plan(**{**wide, "budget_s": 0.2})
    assert made.search_s < 5
    assert made.pipelines


def test_dollars() -> None:
    made = plan(**SMALL, objective="dollars", max_dollars_per_hour=2.0)
    assert made.certificate is not None
    assert made.certificate.objective == "dollars"
    assert sum(d.price_per_hour for d in made.devices) <= 2


def test_the_vocabulary() -> None:
    dims = {"layers": 2, "dim": 32, "heads": 2}
    assert request(job(**dims), topology=FOUR).vocab_size == 257
    assert request(job(**dims), topology=FOUR, vocab_size=999).vocab_size == 999
    tokens = job(**dims).model_copy(
        update={"data": job().data.model_copy(update={"tokenizer": "tokens.json"})}
    )
    with pytest.raises(SpecError, match=r"that of tokens\.json: give vocab_size"):
        request(tokens, topology=FOUR)
    assert request(tokens, topology=FOUR, overrides=["model.vocab_size=999"])


UNPRICED = FOUR.with_devices(replace(d, price_per_hour=0.0) for d in FOUR.devices)
BROKEN = replace(FOUR, region_links={("a", "b"): LINK})


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"model": None}, "nothing to plan"),
        ({"job": job()}, "a job and a model"),
        ({"topology": None}, "no devices to plan for"),
        ({"scenario": "worldwide"}, "a scenario and a topology"),
        ({"topology": None, "scenario": "wordlwide"}, "worldwide"),
        ({"topology": "no/such.yaml"}, r"can't read the topology no/such\.yaml"),
        ({"model": "gpt3-sml"}, "unknown model name 'gpt3-sml'; did you mean 'gpt3-small'"),
        ({"global_batch": None}, "also give the global batch"),
        ({"global_batch": 0}, "training.global_batch"),
        ({"global_batch": 16, "microbatch": 3}, "not divisible by microbatch"),
        ({"seq_len": -1}, "training.seq_len"),
        ({"precision": "fp8"}, "training.precision"),
        ({"schedule": "1fb1"}, "parallelism.schedule"),
        ({"gradient_sync": "ring"}, "parallelism.gradient_sync"),
        ({"stages": 13}, "more than the model's layers"),
        ({"replicas": 17}, "more than the microbatches"),
        ({"stages": 0}, "parallelism.stages"),
        ({"objective": "dolars"}, "unknown objective 'dolars'; did you mean 'dollars'"),
        ({"codecs": ["in8"]}, "unknown codec 'in8'; did you mean 'int8'"),
        ({"codecs": []}, "codecs: give a list"),
        ({"codecs": "int8"}, "codecs: give a list"),
        ({"objective": "dollars", "topology": UNPRICED}, "'dollars' needs a price .* a0/0, .* 1 m"),
        ({"max_dollars_per_hour": 1.0, "topology": UNPRICED}, "max_dollars_per_hour needs a price"),
        ({"max_dollars_per_hour": -1.0}, "max_dollars_per_hour is -1"),
        ({"budget_s": 0.0}, "budget_s is 0.0: give seconds above 0"),
        ({"budget_s": math.nan}, "budget_s is nan"),
        ({"moves": -1}, "moves is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"overrides": ["training.stepz=3"]}, "did you mean 'steps'"),
    ],
)
def test_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        request(**{**SMALL, **wrong})


def test_a_link_that_leads_one_way() -> None:
    with pytest.raises(SpecError, match="one-way"):
        plan(**{**SMALL, "topology": BROKEN})


def test_too_few_devices() -> None:
    with pytest.raises(PlanError, match="too few devices"):
        plan(**{**SMALL, "topology": Topology(())})
    with pytest.raises(PlanError, match="need 6, but 4 may be used"):
        plan(**SMALL, stages=3, replicas=2)


def test_a_model_that_fits_nowhere() -> None:
    with pytest.raises(PlanError, match="but the device has"):
        plan(topology=FOUR, model="gpt3-13b", global_batch=4, moves=0)
