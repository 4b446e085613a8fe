"""``ray-train-geo plan``: its tables, its JSON, its pictures, and what it refuses."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from commands import invoking, lightly, small_job, strict

from ray_train_geo import plan

TOPOLOGY = """
devices:
  - {id: a/0, node: a, region: ohio, type: A100-40G}
  - {id: a/1, node: a, region: ohio, type: A100-40G}
  - {id: b/0, node: b, region: oregon, type: V100-16G, price_per_hour: 1.5}
  - {id: b/1, node: b, region: oregon, type: V100-16G, price_per_hour: 1.5}
links:
  - {from: ohio, to: oregon, latency_ms: 25, bandwidth_gbps: 1.0}
"""
WORLD = (
    "--scenario", "worldwide", "--model", "gpt3-xl", "--global-batch", "64", "--moves", "0",
)  # fmt: skip


@pytest.fixture
def topology(tmp_path: Path) -> Path:
    path = tmp_path / "topology.yaml"
    path.write_text(TOPOLOGY)
    return path


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return small_job(tmp_path)


invoke = invoking("plan")


def test_json_through_the_real_entry_point() -> None:
    """What other tools read; and neither torch nor Ray is needed for it."""
    printed = lightly("plan", *WORLD, "--stages", "4", "--replicas", "8", "--json")
    assert len(printed.splitlines()) == 1
    found = strict(printed)
    assert found.keys() >= {
        "devices", "pipelines", "predicted_step_s", "objective", "lower_bound", "gap", "search_s",
        "explanation",
    }  # fmt: skip
    for device in found["devices"]:
        assert device.keys() >= {"id", "node", "region", "type"}
    assert len(found["pipelines"]) == 8
    assert sum(p["microbatches"] for p in found["pipelines"]) == 64
    for pipeline in found["pipelines"]:
        layers = [stage["layers"] for stage in pipeline["stages"]]
        assert len(layers) == 4
        assert [first for first, _ in layers] == [0, *(last for _, last in layers[:-1])]
        assert layers[-1][1] == 24
    assert found["explanation"]["step_s"] == pytest.approx(found["predicted_step_s"])
    assert found["objective_name"] == "step-time"


def test_the_python_function_finds_the_same() -> None:
    found = strict(invoke(*WORLD, "--stages", 4, "--replicas", 8, "--json").stdout)
    made = plan(
        scenario="worldwide", model="gpt3-xl", global_batch=64, moves=0, stages=4, replicas=8
    ).to_json()
    assert {**found, "search_s": 0.0, "explanation": None} == {
        **strict(json.dumps(made)), "search_s": 0.0, "explanation": None,
    }  # fmt: skip


@pytest.mark.parametrize("columns", [80, 120])
def test_tables_and_reasons(columns: int) -> None:
    text = invoke(*WORLD, "--stages", 4, "--replicas", 8, columns=columns).stdout
    assert max(map(len, text.splitlines())) <= columns
    assert "pipeline 0" in text
    for word in ("device", "layers", "compute", "send", "busy", "mem. GiB", "idle", "V100"):
        assert word in text
    for line in ("s a step predicted", "bottleneck", "bound", "would help", "search"):
        assert line in text


def test_pipelines_that_look_alike_are_shown_once() -> None:
    arguments = ("--scenario", "datacenter", "--model", "gpt3-small", "--global-batch", 64)
    text = invoke(*arguments, "--stages", 1, "--replicas", 64, "--moves", 0).stdout
    assert "pipeline 0 and 63 more like it: 1 microbatches a step each" in text
    assert text.count("device ") == 1


def test_a_job_on_a_topology_file(job: Path, topology: Path) -> None:
    """Its data need not be there."""
    found = strict(invoke(job, "--topology", topology, "--json").stdout)
    assert found["layers"] == 4
    found = strict(
        invoke(
            job, "--topology", topology, "--set", "training.global_batch=6", "--stages", 2,
            "--replicas", 2, "--schedule", "gpipe", "--gradient-sync", "central_ps", "--json",
        ).stdout
    )  # fmt: skip
    assert [len(p["stages"]) for p in found["pipelines"]] == [2, 2]
    assert sum(p["microbatches"] for p in found["pipelines"]) == 6
    assert (found["schedule"], found["gradient_sync"]) == ("gpipe", "central_ps")


def test_a_job_on_a_scenario(job: Path) -> None:
    found = strict(invoke(job, "--scenario", "universities", "--moves", 0, "--json").stdout)
    assert {d["region"].lower() for d in found["devices"]} <= {"ohio", "virginia"}


def test_dollars_and_codecs(topology: Path) -> None:
    arguments = (
        "--topology", topology, "--model", "gpt3-xl", "--global-batch", 32, "--objective",
        "dollars", "--codecs", "int8", "--stages", 4, "--replicas", 1,
    )  # fmt: skip
    text = invoke(*arguments).stdout
    assert "per million tokens" in text
    assert "int8" in text
    found = strict(invoke(*arguments, "--json").stdout)
    assert found["objective_name"] == "dollars"
    assert {s["codec"] for p in found["pipelines"] for s in p["stages"][:-1]} == {"int8"}


@pytest.mark.parametrize("name", ["map.png", "map.svg"])
def test_a_picture(tmp_path: Path, topology: Path, name: str) -> None:
    arguments = ("--topology", topology, "--model", "gpt3-small", "--global-batch", 8)
    invoke(*arguments, "--picture", tmp_path / name)
    content = (tmp_path / name).read_bytes()
    if name.endswith("png"):
        assert content.startswith(b"\x89PNG")
    else:
        assert ET.fromstring(content.decode()).tag.endswith("svg")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "nothing to plan"),
        (("--model", "gpt3-xl", "--global-batch", "8"), "no devices to plan for"),
        ((*WORLD, "--topology", "x.yaml"), "a scenario and a topology"),
        ((*WORLD, "--objective", "dollars", "--max-dollars-per-hour", "0"), "dollars above 0"),
        ((*WORLD, "--budget-s", "0"), "budget_s is 0.0"),
        ((*WORLD, "--codecs", "int9"), "unknown codec 'int9'; did you mean 'int8'"),
        ((*WORLD, "--codecs", ","), "codecs: give a list"),
        ((*WORLD, "--stages", "25"), "more than the model's layers (24)"),
        ((*WORLD, "--stages", "8", "--replicas", "9"), "need 72, but 64 may be used"),
        ((*WORLD, "--picture", "map.pdf"), "must end in .png or .svg"),
        ((*WORLD, "--picture", "no/such/map.png"), "there is no folder no/such"),
        ((*WORLD[2:], "--scenario", "world-wide"), "worldwide"),
        ((*WORLD[:2], *WORLD[4:], "--model", "gpt3xl"), "did you mean 'gpt3-xl'"),
        (("no-job.yaml", "--scenario", "worldwide"), "can't read the job spec no-job.yaml"),
        ((*WORLD, "--set", "training.stepz=3"), "did you mean 'steps'"),
    ],
)
def test_refused(arguments: tuple[str, ...], says: str) -> None:
    result = invoke(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert says in result.stderr
    error = strict(invoke(*arguments, "--json", code=2).stdout)["error"]
    assert says in error["message"]


def test_a_job_and_a_model(job: Path) -> None:
    result = invoke(job, "--scenario", "regional", "--model", "gpt3-xl", code=2)
    assert "a job and a model" in result.stderr


def test_a_wrong_choice_is_told_by_the_option() -> None:
    assert "objective" in invoke(*WORLD, "--objective", "speed", code=2).stderr
