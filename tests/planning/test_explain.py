"""Explanations: figures that add up, a bottleneck that is one, gains that come true."""

from __future__ import annotations

import json
from dataclasses import astuple, replace

import pytest

from ray_train_geo.cluster.topology import Device, Link, Topology, Uplink
from ray_train_geo.planning.bottleneck import breakdown, unsynced_s
from ray_train_geo.planning.explain import Explanation, explain
from ray_train_geo.planning.plan import Certificate, PipelinePlan, Plan, StagePlan
from ray_train_geo.planning.predict import predict, predict_plan
from ray_train_geo.planning.problem import Problem
from ray_train_geo.spec import JobSpec, parse_job

GBPS = 1e9 / 8
FAST = Link(1e-4, 100 * GBPS)


def job(global_batch: int = 16, **parallelism: object) -> JobSpec:
    return parse_job(
        {
            "model": {"name": "gpt3-small", "tied_embeddings": False},
            "data": {"path": "x"},
            "training": {
                "steps": 1,
                "global_batch": global_batch,
                "seq_len": 1024,
                "precision": "fp16",
                "recompute": True,
            },
            "parallelism": parallelism,
        }
    )


def device(name: str, region: str, flops_per_s: float = 5e13, kind: str = "V100") -> Device:
    return Device(
        f"{name}/0", name, region, type=kind, flops_per_s=flops_per_s, memory_bytes=16 * 2**30
    )


def topology(
    devices: list[Device],
    between: Link = FAST,
    nic_gbps: float | None = None,
    uplink_gbps: float | None = None,
) -> Topology:
    regions = sorted({d.region for d in devices})
    pairs = [(a, b) for a in regions for b in regions if a != b]
    return Topology(
        tuple(devices),
        region_links=dict.fromkeys(pairs, between) | {(r, r): FAST for r in regions},
        node_uplinks={}
        if nic_gbps is None
        else {d.node: Uplink(nic_gbps * GBPS, nic_gbps * GBPS) for d in devices},
        region_uplinks={} if uplink_gbps is None else dict.fromkeys(pairs, uplink_gbps * GBPS),
    )


def plan_of(
    where: Topology, chains: list[list[int]], cut: tuple[int, ...], microbatches: int = 16
) -> Plan:
    """Pipelines on the numbered devices, all cut alike, with the usual warmup."""
    each = microbatches // len(chains)
    pipelines = tuple(
        PipelinePlan(
            tuple(
                StagePlan(where.devices[d].id, (cut[s], cut[s + 1]), len(chain) - 1 - s, 2**30)
                for s, d in enumerate(chain)
            ),
            each,
            i * each,
        )
        for i, chain in enumerate(chains)
    )
    used = tuple(where.devices[d] for chain in chains for d in chain)
    return Plan(12, pipelines, "1f1b", "sharded_ps", used, 1.0)


ONE_REGION = topology([device(f"n{i}", "east") for i in range(4)])
TWO_REGIONS = topology(
    [device("e0", "east"), device("e1", "east"), device("w0", "west"), device("w1", "west")],
    Link(0.03, 0.2 * GBPS),
)


def test_the_breakdown_adds_up_to_the_step() -> None:
    for where in (ONE_REGION, TWO_REGIONS):
        made = plan_of(where, [[0, 1], [2, 3]], (0, 6, 12))
        explained = explain(made, where, job())
        parts = astuple(explained.breakdown)
        assert sum(parts) == pytest.approx(explained.step_s)
        assert min(parts) >= 0
        assert explained.step_s == predict_plan(made, where, job()).step_s


def test_figures_of_a_stage() -> None:
    made = plan_of(TWO_REGIONS, [[0, 2]], (0, 6, 12))
    (pipeline,) = explain(made, TWO_REGIONS, job()).pipelines
    first, last = pipeline.stages
    assert (first.device, first.region, first.type, first.layers) == (
        "e0/0",
        "east",
        "V100",
        (0, 6),
    )
    assert first.hop is not None
    message_bytes = 1024 * 768 * 2
    assert first.hop.transfer_s == pytest.approx(message_bytes / (0.2 * GBPS))
    assert first.hop.latency_s == 0.03
    step_s = explain(made, TWO_REGIONS, job()).step_s
    assert first.hop.busy == pytest.approx(16 * first.hop.transfer_s / step_s)
    assert first.idle == pytest.approx(1 - first.compute_s / step_s)
    assert (first.memory_bytes, first.device_memory_bytes) == (2**30, 16 * 2**30)
    assert last.hop is None
    assert last.compute_s > first.compute_s, "the head is with the last layers"


def bottleneck(where: Topology, made: Plan, asked: JobSpec | None = None) -> str:
    return explain(made, where, asked or job()).bottleneck


def test_a_slow_stage_is_the_bottleneck() -> None:
    where = topology([device("quick", "east"), device("slow", "east", 5e12, "T4")])
    said = bottleneck(where, plan_of(where, [[0, 1]], (0, 6, 12)))
    assert said.startswith("pipeline 0 stage 1 (slow/0, T4, layers 6-11) computes")
    assert said.endswith("% of the step")


def test_a_slow_hop_is_the_bottleneck() -> None:
    where = topology([device("a", "east"), device("b", "west")], Link(1e-3, 0.02 * GBPS))
    said = bottleneck(where, plan_of(where, [[0, 1]], (0, 6, 12)))
    assert said.startswith("the hop of pipeline 0 stage 0 to 1 (a/0 -> b/0) is full 9")


def test_a_full_nic_is_the_bottleneck() -> None:
    devices = [device(f"n{i}", "east") for i in range(2)]
    devices = [replace(d, id=f"{d.node}/{k}") for d in devices for k in range(2)]
    where = topology(devices, nic_gbps=0.1)
    said = bottleneck(where, plan_of(where, [[0, 2], [1, 3]], (0, 6, 12)))
    assert "NIC" in said
    assert "node n" in said


def test_a_full_uplink_is_the_bottleneck() -> None:
    where = topology(
        [device(f"e{i}", "east") for i in range(2)] + [device(f"w{i}", "west") for i in range(2)],
        uplink_gbps=0.1,
    )
    said = bottleneck(where, plan_of(where, [[0, 2], [1, 3]], (0, 6, 12), 64), job(64))
    assert "the uplink east -> west is full" in said


def test_filling_is_the_bottleneck_of_a_long_pipeline_with_few_microbatches() -> None:
    said = bottleneck(ONE_REGION, plan_of(ONE_REGION, [[0, 1, 2, 3]], (0, 3, 6, 9, 12), 1), job(1))
    assert said.startswith("the pipelines fill, drain and wait for messages")


def test_late_gradients_are_the_bottleneck_and_their_link_is_named() -> None:
    made = plan_of(TWO_REGIONS, [[0, 1], [2, 3]], (0, 6, 12))
    said = bottleneck(TWO_REGIONS, made)
    assert said.startswith("gradient sync is waited for")
    assert "slowest link, e0/0 -> w0/0 (east -> west)" in said or "w0/0 -> e0/0" in said
    for mode in ("allreduce", "central_ps", "hierarchical", "tree"):
        assert "slowest link" in bottleneck(TWO_REGIONS, replace(made, gradient_sync=mode))
    nics = replace(
        TWO_REGIONS,
        node_uplinks={d.node: Uplink(0.05 * GBPS, 0.05 * GBPS) for d in TWO_REGIONS.devices},
    )
    assert "waits for the NIC of node" in bottleneck(nics, made)
    narrow = replace(
        TWO_REGIONS,
        region_uplinks=dict.fromkeys([("east", "west"), ("west", "east")], 0.05 * GBPS),
    )
    assert "waits for the uplinks between regions" in bottleneck(narrow, made)


def changes(explained: Explanation) -> list[str]:
    return [gain.change for gain in explained.gains]


def test_gains_come_true() -> None:
    """What is said to help does, by as much, on the topology that is really so."""
    made = plan_of(TWO_REGIONS, [[0, 2]], (0, 6, 12), 32)
    explained = explain(made, TWO_REGIONS, job(32))
    gains = {g.change: g for g in explained.gains}
    better = topology(list(TWO_REGIONS.devices), Link(0.03, 0.4 * GBPS))
    named = gains["twice the bandwidth between east and west"]
    assert named.step_s == pytest.approx(predict_plan(made, better, job(32)).step_s)
    assert named.saved == pytest.approx(1 - named.step_s / explained.step_s)
    assert "twice the bandwidth between regions" not in gains, "its only part says it all"
    coded = replace(made.pipelines[0].stages[0], codec="int8")
    pipeline = replace(made.pipelines[0], stages=(coded, made.pipelines[0].stages[1]))
    int8_s = predict_plan(replace(made, pipelines=(pipeline,)), TWO_REGIONS, job(32)).step_s
    assert gains["the int8 codec on every hop between nodes"].step_s == pytest.approx(int8_s)


def test_gains_stand_best_first_and_are_at_most_five() -> None:
    made = plan_of(TWO_REGIONS, [[0, 2], [1, 3]], (0, 6, 12))
    explained = explain(made, TWO_REGIONS, job())
    saved = [g.saved for g in explained.gains]
    assert saved == sorted(saved, reverse=True)
    assert 0 < len(saved) <= 5
    assert min(saved) > 0


def test_faster_devices_help_where_compute_is_all() -> None:
    where = topology([device("quick", "east"), device("slow", "east", 5e12, "T4")])
    explained = explain(plan_of(where, [[0, 1]], (0, 6, 12)), where, job())
    assert changes(explained)[0] == "25% faster devices of type T4"
    assert explained.gains[0].saved == pytest.approx(0.2, abs=0.02)


def test_nics_windows_and_uplinks_are_levers() -> None:
    made = plan_of(TWO_REGIONS, [[0, 2], [1, 3]], (0, 6, 12), 32)
    nics = replace(
        TWO_REGIONS,
        node_uplinks={d.node: Uplink(0.05 * GBPS, 0.05 * GBPS) for d in TWO_REGIONS.devices},
    )
    assert any("NICs' bandwidth" in c for c in changes(explain(made, nics, job(32))))
    windowed = topology(list(TWO_REGIONS.devices), Link(0.03, 10 * GBPS, window_bytes=5e5))
    found = changes(explain(made, windowed, job(32)))
    assert "twice the TCP window between east and west" in found
    assert "twice the bandwidth between east and west" not in found
    narrow = replace(
        topology(list(TWO_REGIONS.devices), Link(0.001, 10 * GBPS)),
        region_uplinks=dict.fromkeys([("east", "west"), ("west", "east")], 0.05 * GBPS),
    )
    assert "twice the shared uplinks between east and west" in changes(
        explain(made, narrow, job(32))
    )


def test_without_sync_only_sync_is_gone() -> None:
    made = plan_of(TWO_REGIONS, [[0, 1], [2, 3]], (0, 6, 12))
    problem = Problem.of(TWO_REGIONS, job(), 257)
    prediction = predict(problem, made.pipelines, made.schedule, made.gradient_sync)
    b = breakdown(problem, made, prediction)
    without = b.compute_s + b.bubble_s + b.commit_s
    least = unsynced_s(problem, made, prediction)
    assert without < least < without + 0.1 * b.sync_s


@pytest.mark.parametrize(
    ("certificate", "says"),
    [
        (None, "no lower bound"),
        (Certificate("step-time", 2.0, 0.0), "no lower bound"),
        (Certificate("step-time", 2.0, 1.6, "Compute."), "a gap of 25.0% (Compute)"),
        (Certificate("dtfm", 31.634, 31.634), "s by DT-FM's cost; no plan is below 31.63: proven"),
        (Certificate("dollars", 0.5, 0.4), "0.5 $ per million tokens"),
    ],
)
def test_the_bound_in_words(certificate: Certificate | None, says: str) -> None:
    made = replace(plan_of(ONE_REGION, [[0, 1]], (0, 6, 12)), certificate=certificate)
    assert says in explain(made, ONE_REGION, job()).bound


def test_names_with_braces_are_only_names() -> None:
    where = topology([device("{a}", "east"), device("b", "east", 5e12)])
    where = where.with_devices([where.devices[0], replace(where.devices[1], id="{0}")])
    assert "{0}" in bottleneck(where, plan_of(where, [[0, 1]], (0, 6, 12)))


def test_it_is_strict_json_and_the_same_each_time() -> None:
    made = plan_of(TWO_REGIONS, [[0, 1], [2, 3]], (0, 6, 12))
    texts = [
        json.dumps(explain(made, TWO_REGIONS, job()).to_json(), allow_nan=False) for _ in range(2)
    ]
    assert texts[0] == texts[1]
    found = json.loads(texts[0])
    assert found.keys() == {"step_s", "breakdown", "bottleneck", "bound", "gains", "pipelines"}
    assert found["pipelines"][0]["stages"][0]["layers"] == [0, 6]


def test_a_device_that_is_gone() -> None:
    made = plan_of(ONE_REGION, [[0, 1]], (0, 6, 12))
    with pytest.raises(KeyError, match="n1/0"):
        explain(made, ONE_REGION.with_devices(ONE_REGION.devices[:1]), job())
