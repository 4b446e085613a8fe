"""``ray-train-geo replay``: its table, its JSON, its picture, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import invoking, lightly, refusing, small_job

from ray_train_geo import replay_trace

SHORT = ("--gpu", "T4", "--until-h", "0.5", "--max-nodes", "4")


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return small_job(tmp_path)


invoke = invoking("replay")


refused = refusing(invoke)


def test_a_row_for_each_policy_fits_80_columns(job: Path) -> None:
    out = invoke("aws-p3", job, *SHORT).stdout
    lines = out.splitlines()
    assert "aws-p3: 0.5 h, 4 devices on average" in lines[0]
    names = [line.split()[0] for line in lines[3:-1]]
    assert names == ["ours", "checkpoint-restart", "restart", "torchft-like", "on-demand"]
    assert lines[-1].startswith("checkpoint-restart, restart, torchft-like: all pipelines have ")
    assert all(len(line) <= 80 for line in lines)
    assert "…" not in out
    assert invoke("aws-p3", job, *SHORT, columns=140).stdout.count("%") == out.count("%")


def test_json_is_the_python_function_s(job: Path) -> None:
    arguments = ("aws-p3", job, *SHORT, "--policy", "restart", "--policy", "ours")
    told: Any = json.loads(invoke(*arguments, "--json").stdout)
    found = replay_trace(
        "aws-p3", job, gpu="T4", until_h=0.5, max_nodes=4, policies=["ours", "restart"]
    )
    assert told == json.loads(json.dumps(found.to_json()))
    assert [p["policy"] for p in told["policies"]] == ["ours", "restart"]


def test_a_model_in_place_of_a_job() -> None:
    arguments = ("gcp-a100", "--model", "gpt2", "--global-batch", "8", "--gpu", "A100-40G")
    more = ("--until-h", "0.3", "--max-nodes", "4", "--policy", "ours", "--json")
    (ours,) = json.loads(invoke(*arguments, *more).stdout)["policies"]
    assert ours["tokens"] == ours["samples"] * 1024


def test_overrides_reach_the_job_and_the_assumptions(job: Path) -> None:
    arguments = ("aws-p3", job, *SHORT, "--policy", "ours", "--json")
    usual = json.loads(invoke(*arguments).stdout)["policies"][0]
    longer = json.loads(invoke(*arguments, "--set", "training.seq_len=128").stdout)["policies"][0]
    slower = json.loads(invoke(*arguments, "--assume", "ours.step_overhead=1").stdout)["policies"][
        0
    ]
    assert longer["tokens"] == longer["samples"] * 128
    assert slower["samples"] == pytest.approx(usual["samples"] / 2, rel=0.02)


@pytest.mark.parametrize("name", ["timeline.png", "timeline.svg"])
def test_pictures(job: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    invoke("aws-p3", job, *SHORT, "--policy", "ours", "--picture", path)
    assert path.stat().st_size > 2000


def test_a_topology_and_a_trace_of_our_own(job: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("time_s,op,node\n0,add,one\n0,add,two\n60,notice,one\n180,remove,one\n")
    topology = tmp_path / "topology.yaml"
    topology.write_text("nodes:\n  - {node: n, region: ohio, type: T4, count: 2}\n")
    arguments = (trace, job, "--topology", topology, "--until-h", "0.1", "--policy", "ours")
    (ours,) = json.loads(invoke(*arguments, "--json").stdout)["policies"]
    assert ours["events"] == {
        "joins": 0,
        "leaves": 1,
        "notices": 1,
        "replans": ours["events"]["replans"],
    }
    assert ours["undone_steps"] == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nothing.csv", "--model", "gpt2", "--global-batch", "8", "--gpu", "T4"), "nothing.csv"),
        (("aws-p3", "--model", "gpt2", "--global-batch", "8"), "give the GPU type"),
        (("aws-p3", "--model", "gpt2", "--gpu", "T4"), "also give the global batch"),
        (("aws-p3", "--gpu", "T4"), "nothing to plan"),
        (("aws-p3", "--model", "gpt9", "--global-batch", "8", "--gpu", "T4"), "gpt9"),
        (("aws-p3", "--gpu", "T4", "--policy", "our"), "unknown policy 'our'"),
        (("aws-p3", "--gpu", "T4", "--assume", "ours.x=1"), "no assumption 'ours.x=1'"),
        (("aws-p3", "--gpu", "T4", "--picture", "x.gif"), "must end in .png or .svg"),
        (("aws-p3", "--gpu", "T4", "--picture", "no/where/x.png"), "there is no folder"),
        (
            ("aws-p3", "--model", "gpt3-13b", "--global-batch", "8", "--gpu", "T4",
             "--until-h", "1", "--max-nodes", "2"),
            "no plan fits",
        ),
    ],
)  # fmt: skip
def test_refused(arguments: tuple[str, ...], says: str) -> None:
    assert says in refused(*arguments)


def test_a_refusal_is_json_where_json_is_asked_for() -> None:
    result = invoke("aws-p3", "--gpu", "T4", "--json", code=2)
    assert json.loads(result.stdout)["error"]["kind"] == "SpecError"


def test_neither_torch_nor_ray_is_imported(job: Path) -> None:
    assert "ours" in lightly("replay", "aws-p3", job, "--gpu", "T4", "--until-h", "0.1")
