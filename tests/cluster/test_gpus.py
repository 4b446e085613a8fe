from __future__ import annotations

from pathlib import Path

import pytest

from ray_train_geo.cluster.gpus import gpu, gpu_types, gpu_variants
from ray_train_geo.cluster.topology import Device
from ray_train_geo.errors import SpecError


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        # Ray's accelerator types
        ("V100", "V100-16G"),
        ("T4", "T4"),
        ("A10G", "A10G"),
        ("A100", "A100-40G"),
        ("A100-40G", "A100-40G"),
        ("A100-80G", "A100-80G"),
        ("H100", "H100"),
        ("H200", "H200"),
        ("L4", "L4"),
        # the driver's names
        ("Tesla V100-SXM2-16GB", "V100-16G"),
        ("Tesla V100-SXM3-32GB", "V100-32G"),
        ("Tesla T4", "T4"),
        ("NVIDIA A40", "A40"),
        ("NVIDIA A100-SXM4-80GB", "A100-80G"),
        ("NVIDIA A100 80GB PCIe", "A100-80G"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 3090", "RTX3090"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        # clouds' and people's
        ("nvidia-tesla-v100", "V100-16G"),
        ("nvidia-a100-80gb", "A100-80G"),
        ("NVIDIA-A100-SXM4-80GB", "A100-80G"),
        ("Tesla-V100", "V100-16G"),
        ("rtx-4090", "RTX4090"),
        ("a100_80gib", "A100-80G"),
    ],
)
def test_usual_spellings(spelling, name):
    assert gpu(spelling).name == name


@pytest.mark.parametrize(
    "other_card",
    ["A10", "L40S", "H100 PCIe", "RTX 3090 Ti", "V100S", "A100-60G", "T4 A40", "cpu", "gpu", ""],
)
def test_another_card_is_not_taken_for_one_of_these(other_card):
    assert gpu_variants(other_card) == ()
    with pytest.raises(SpecError, match=r"no GPU type .* it has V100-16G, .*, L4"):
        gpu(other_card)


def test_a_close_name_is_offered():
    with pytest.raises(SpecError, match="did you mean A10G"):
        gpu("A10")


def test_a_name_without_a_size_means_all_sizes():
    assert [t.name for t in gpu_variants("A100")] == ["A100-40G", "A100-80G"]


def test_the_catalog_is_plausible():
    assert len({t.name for t in gpu_types()}) == len(gpu_types()) == 12
    for t in gpu_types():
        assert gpu(t.name) is t
        # What error-correcting codes take is a sixteenth; the rest is binary units.
        assert 15 / 16 <= t.memory_bytes / (t.nominal_gb * 2**30) <= 1
        assert t.memory_bytes >= t.nominal_gb * 1e9
        peaks = dict(t.peak_flops_per_s)
        assert {"fp32", "fp16"} <= peaks.keys()
        assert 1e12 < peaks["fp32"] < peaks["fp16"] <= 989e12
        assert peaks.get("bf16", peaks["fp16"]) == peaks["fp16"]
        assert 0.2 < t.sustained_fraction < 0.6
        assert 0 < t.price_per_hour("spot") < t.price_per_hour("on-demand") < 10
        assert t.source
        assert t.sustained_source
        assert t.price_source


def test_cards_without_bf16_compute_it_as_fp32():
    without = {t.name for t in gpu_types() if "bf16" not in dict(t.peak_flops_per_s)}
    assert without == {"V100-16G", "V100-32G", "T4"}
    v100 = gpu("V100")
    assert v100.sustained_flops_per_s("bf16") == v100.sustained_flops_per_s("fp32")
    assert v100.sustained_flops_per_s("bf16") < v100.sustained_flops_per_s("fp16") / 5


def test_a_v100_sustains_what_dtfm_measured():
    assert 40e12 <= gpu("V100").sustained_flops_per_s("fp16") <= 55e12


def test_device():
    t = gpu("T4")
    device = t.device("a/0", "a", "ohio", market_type="spot")
    assert device == Device(
        id="a/0",
        node="a",
        region="ohio",
        market_type="spot",
        type="T4",
        flops_per_s=t.sustained_flops_per_s("fp16"),
        memory_bytes=15 * 2**30,
        price_per_hour=t.price_per_hour("spot"),
        flops_by_precision=device.flops_by_precision,
    )
    assert device.at_precision("fp16").flops_per_s == device.flops_per_s
    assert device.at_precision("fp32").flops_per_s == t.sustained_flops_per_s("fp32")


def markdown() -> str:
    """The catalog as docs/topology.md shows it; TFLOP/s, GiB, dollars."""
    lines = [
        "| type | GiB | peak fp16, TFLOP/s | sustained fp16 | bf16 | fp32 | on demand | spot |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for t in gpu_types():
        sustained = [f"{t.sustained_flops_per_s(p) / 1e12:.1f}" for p in ("fp16", "bf16", "fp32")]
        prices = [f"${t.price_per_hour(m):.2f}" for m in ("on-demand", "spot")]
        peak = f"{dict(t.peak_flops_per_s)['fp16'] / 1e12:g}"
        cells = [t.name, f"{t.memory_bytes / 2**30:g}", peak, *sustained, *prices]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def test_the_docs_show_the_catalog():
    page = Path(__file__).parents[2] / "docs" / "topology.md"
    assert page.read_text().endswith(markdown()), f"end {page} with:\n{markdown()}"
