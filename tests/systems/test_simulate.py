"""Predicting a step: names, shapes, and what no system can beat."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_train_geo.errors import InputError, SpecError
from ray_train_geo.model.catalog import CATALOG, layer_flops
from ray_train_geo.systems.catalog import SYSTEMS
from ray_train_geo.systems.constants import constants
from ray_train_geo.systems.networks import single_pipeline_topology
from ray_train_geo.systems.simulate import simulate

MODEL = "gpt3-xl-24"
FAST_LINK = 1e15  # bytes per second: as good as no transfer time


def pipeline(system, stages, batch, latency_s=0.0, bandwidth=FAST_LINK, **chosen):
    cluster = single_pipeline_topology(stages, latency_s, bandwidth)
    given_ = {"stages": str(stages), **chosen}
    return simulate(system, MODEL, batch, topology=cluster, settings=given_)


@pytest.mark.parametrize("stages", [1, 2, 3, 8, 12])
@pytest.mark.parametrize("microbatches", [1, 5, 64])
def test_gpipe_without_a_network_takes_its_slots(stages, microbatches):
    rate = constants().hardware.v100_fp32_tflops * 1e12
    slot_s = 4 * 24 / stages * layer_flops(CATALOG[MODEL], 2048, 1) / rate
    found = pipeline("dtfm_gpipe", stages, microbatches)
    assert found.step_s == pytest.approx((microbatches + stages - 1) * slot_s, rel=1e-6)


@settings(max_examples=25)
@given(
    st.sampled_from(["dtfm_gpipe", "dtfm_1f1b", "megatron_lm"]),
    st.sampled_from([2, 4, 6]),
    st.integers(1, 20),
    st.floats(0, 0.2),
    st.floats(1e7, 1e10),
    st.floats(1.0, 5.0),
)
def test_better_links_never_slow_a_step(system, stages, batch, latency_s, bandwidth, better):
    step_s = pipeline(system, stages, batch, latency_s, bandwidth).step_s
    assert pipeline(system, stages, batch, latency_s / better, bandwidth).step_s <= step_s * (
        1 + 1e-9
    )
    assert pipeline(system, stages, batch, latency_s, bandwidth * better).step_s <= step_s * (
        1 + 1e-9
    )


@settings(max_examples=25)
@given(st.sampled_from([2, 4, 6]), st.integers(1, 70), st.floats(0, 0.1), st.floats(1e7, 1e10))
def test_no_step_is_below_compute_or_a_links_bytes(stages, batch, latency_s, bandwidth):
    found = pipeline("dtfm_gpipe", stages, batch, latency_s, bandwidth)
    hardware = constants().hardware
    flops = 4 * 24 * layer_flops(CATALOG[MODEL], 2048, batch)
    assert found.step_s >= flops / (stages * hardware.v100_fp32_tflops * 1e12) * (1 - 1e-9)
    size = batch * 2048 * 2048 * 4
    assert found.step_s >= size / (bandwidth * hardware.shaped_rate_factor)


def test_the_breakdown_adds_up_and_the_figures_follow():
    found = simulate("dtfm_scheduled", MODEL, 1024, scenario="universities")
    assert sum(found.breakdown.values()) == pytest.approx(found.step_s)
    assert found.pflop == pytest.approx(23.644, rel=1e-3)  # as published
    assert found.pflops == pytest.approx(found.pflop / found.step_s)
    assert found.efficiency == pytest.approx(found.pflops / (64 * 0.125))
    assert found.tokens_per_s == pytest.approx(1024 * 2048 / found.step_s)
    assert found.dollars_per_million_tokens > 0


def test_same_question_same_answer():
    ask = [simulate("dtfm_random", MODEL, 512, scenario="worldwide").step_s for _ in range(2)]
    assert ask[0] == ask[1]


def test_a_straggler_and_jitter_slow_a_step():
    plain = pipeline("dtfm_gpipe", 4, 16).step_s
    assert pipeline("dtfm_gpipe", 4, 16, jitter_percent="20").step_s > plain * 1.02
    assert pipeline("dtfm_gpipe", 4, 16, straggler_percent="50").step_s > plain * 1.3
    far = pipeline("dtfm_gpipe", 4, 16, bandwidth=1e8).step_s
    assert pipeline("dtfm_gpipe", 4, 16, 0.0, 1e8, traffic_percent="50").step_s > far * 1.05


def test_a_trace_covers_all_rounds():
    found = simulate("dtfm_scheduled", MODEL, 1024, scenario="universities", trace=True)
    assert len(found.trace) == 2 * 8  # two rounds of 64 microbatches, eight pipelines
    ends = [t.start_s + t.timeline.makespan_s for t in found.trace]
    assert max(ends) == pytest.approx(found.step_s - found.breakdown["gradient_sync"])


@pytest.mark.parametrize("system", [s for s in SYSTEMS if s != "ours"])
def test_every_system_answers_on_the_published_clusters(system):
    found = simulate(system, MODEL, 1024, scenario="universities")
    assert math.isfinite(found.step_s)
    assert found.step_s > 5.0


def test_ours_is_faster_than_megatrons_default_across_the_world():
    ours = simulate("ours", MODEL, 1024, scenario="worldwide")
    peer = simulate("megatron_p8", MODEL, 1024, scenario="worldwide")
    assert ours.step_s < peer.step_s / 2
    assert sum(ours.breakdown.values()) == pytest.approx(ours.step_s)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"system": "dtfm_schedule"}, "did you mean dtfm_scheduled"),
        ({"system": "slurm"}, "there are ours, dtfm_scheduled"),
        ({"model": "gpt3-xxl"}, "no model 'gpt3-xxl'"),
        ({"scenario": "moon"}, "no scenario 'moon'"),
        ({"global_batch": 0}, "at least 1 sequence"),
        ({"global_batch": 1023}, "multiple of 8, such as 1016 or 1024"),
        ({"settings": {"stages": "8", "replicas": "7"}}, "56 devices, and there are 64"),
        ({"settings": {"stages": "5"}}, "60 devices.*stages x replicas can be 1 x 64, 2 x 32"),
        ({"settings": {"stages": "64"}}, "64 stages, but gpt3-xl-24 has 24 layers"),
        ({"settings": {"stage": "8"}}, "did you mean stages"),
        ({"settings": {"stages": "eight"}}, "whole number of at least 1, not 'eight'"),
        ({"settings": {"stages": "0"}}, "whole number of at least 1"),
        ({"settings": {"precision": "fp8"}}, "one of fp16, bf16, fp32"),
        (
            {"system": "megatron_lm", "settings": {"tensor": "8", "stages": "4", "replicas": "4"}},
            "8 tensor-parallel x 4 stages x 4 replicas are 128 devices",
        ),
        ({"topology": single_pipeline_topology(8, 0.0, 1e9)}, "either a scenario or a topology"),
        ({"scenario": None}, "either a scenario or a topology"),
    ],
)
def test_refuses_what_cannot_be(arguments, message):
    asked = {
        "system": "dtfm_random",
        "model": MODEL,
        "global_batch": 1024,
        "scenario": "worldwide",
        **arguments,
    }
    with pytest.raises(InputError, match=message):
        simulate(asked.pop("system"), asked.pop("model"), asked.pop("global_batch"), **asked)


@pytest.mark.parametrize(
    "figures", [(0, 0.0, 1e9), (4, -1.0, 1e9), (4, 0.0, 0.0), (4, 0.0, math.nan)]
)
def test_refuses_a_network_that_cannot_be(figures):
    with pytest.raises(SpecError):
        single_pipeline_topology(*figures)
