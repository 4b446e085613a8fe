from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from search_cases import job

from ray_train_geo.cluster.topology import Device, Topology
from ray_train_geo.model.catalog import (
    CATALOG,
    boundary_bytes,
    head_activation_bytes,
    layer_activation_bytes,
    total_parameters,
)
from ray_train_geo.planning.memory import (
    CPU_OVERHEAD_BYTES,
    GPU_OVERHEAD_BYTES,
    is_cpu,
    largest,
    stage_memory_bytes,
    stage_parameters,
)
from ray_train_geo.planning.problem import Problem
from ray_train_geo.spec import FailureSpec, TrainingSpec

TIED = CATALOG["gpt-tiny"]
UNTIED = CATALOG["llama-tiny"]
FP32 = TrainingSpec(steps=1, global_batch=8, microbatch=2, seq_len=64)


@pytest.mark.parametrize("dims", [TIED, UNTIED])
def test_stages_hold_all_parameters(dims):
    whole = total_parameters(dims)
    assert stage_parameters(dims, (0, dims.layers)) == whole
    parts = stage_parameters(dims, (0, 1)) + stage_parameters(dims, (1, dims.layers))
    copy = dims.vocab_size * dims.dim if dims.tied_embeddings else 0
    assert parts == whole + copy


@pytest.mark.parametrize(
    ("precision", "cpu", "weights", "gradients", "snapshot", "overhead"),
    [
        ("fp32", True, 4, 4, 12, CPU_OVERHEAD_BYTES),
        ("fp32", False, 4, 4, 0, GPU_OVERHEAD_BYTES),
        ("bf16", False, 6, 6, 0, GPU_OVERHEAD_BYTES),
        ("fp16", True, 6, 6, 12, CPU_OVERHEAD_BYTES),
    ],
)
def test_bytes_per_parameter(precision, cpu, weights, gradients, snapshot, overhead):
    training = FP32.model_copy(update={"precision": precision})
    e = stage_memory_bytes(TIED, training, (1, 3), 1, cpu=cpu)
    n = stage_parameters(TIED, (1, 3))
    assert (e.parameters, e.gradients, e.optimizer, e.snapshot) == (
        weights * n,
        gradients * n,
        8 * n,
        snapshot * n,
    )
    assert e.overhead == overhead
    assert e.total == sum(
        (e.parameters, e.gradients, e.optimizer, e.snapshot, e.activations, e.messages, overhead)
    )
    copied = stage_memory_bytes(TIED, training, (1, 3), 1, cpu=cpu, memory_copies=True)
    assert copied.copies == (4 * 12 * n if cpu else 0)
    assert copied.total == e.total + copied.copies
    alone = stage_memory_bytes(TIED, training, (1, 3), 1, cpu=cpu, local_sgd=True)
    assert alone.local_sgd == (32 if cpu else 12) * n
    assert alone.total == e.total + alone.local_sgd


@pytest.mark.parametrize(
    ("memory_copies", "nodes", "copied"), [("auto", 2, True), (0, 2, False), ("auto", 1, False)]
)
def test_copies_count_where_the_job_wants_them_and_there_is_another_node(
    memory_copies, nodes, copied
):
    devices = [Device(f"d{i}", f"n{i % nodes}", type="cpu") for i in range(2)]
    wish = job(model="gpt-tiny").model_copy(
        update={"failure": FailureSpec(memory_copies=memory_copies)}
    )
    asked = Problem.of(Topology(tuple(devices)), wish, 257)
    assert (asked.memory((0, 1), 1, devices[0], 1).copies > 0) == copied


def test_activations_by_hand():
    layer = layer_activation_bytes(TIED, 64, 2, "fp32", False)
    message = boundary_bytes(TIED, 64, 2, "fp32")
    middle = stage_memory_bytes(TIED, FP32, (1, 3), 10, cpu=True)
    assert middle.activations == 10 * 2 * layer + layer
    assert middle.messages == (2 * (10 + 12) + 10) * message  # two neighbours, outputs
    last = stage_memory_bytes(TIED, FP32, (3, 4), 2, cpu=True)
    head = head_activation_bytes(TIED, 64, 2, "fp32")
    assert last.activations == 2 * (layer + head) + layer + head
    assert last.messages == (8 + 4) * message
    alone = stage_memory_bytes(TIED, FP32, (0, 4), 1, cpu=True)
    assert alone.messages == 0


def test_sync_buckets_count_up_to_the_stages_gradients():
    n = stage_parameters(TIED, (0, 4))
    few = stage_memory_bytes(TIED, FP32, (0, 4), 1, cpu=True, sync_bucket_bytes=1000)
    all_ = stage_memory_bytes(TIED, FP32, (0, 4), 1, cpu=True, sync_bucket_bytes=10**12)
    assert (few.messages, all_.messages) == (2000, 2 * 4 * n)


def test_recomputation_keeps_only_inputs_and_one_layer():
    training = FP32.model_copy(update={"recompute": True})
    e = stage_memory_bytes(TIED, training, (1, 3), 10, cpu=True)
    kept = layer_activation_bytes(TIED, 64, 2, "fp32", True)
    assert e.activations == 20 * kept + layer_activation_bytes(TIED, 64, 2, "fp32", False)


@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 30))
def test_more_layers_or_microbatches_never_need_less(first, count, in_flight):
    last = min(first + count, TIED.layers)
    needs = stage_memory_bytes(TIED, FP32, (first, last), in_flight, cpu=True).total
    assert stage_memory_bytes(TIED, FP32, (first, last), in_flight + 1, cpu=True).total > needs
    if last < TIED.layers - 1:
        wider = stage_memory_bytes(TIED, FP32, (first, last + 1), in_flight, cpu=True)
        assert wider.total > needs


def test_published_size_of_mixed_precision_adam():
    # ZeRO (Rajbhandari et al., 2020): 16 B per parameter; here 4 more, as gradients sum in fp32.
    dims = CATALOG["gpt3-xl"]
    training = replace_training(seq_len=2048, precision="bf16")
    e = stage_memory_bytes(dims, training, (0, dims.layers), 1, cpu=False)
    assert e.parameters + e.gradients + e.optimizer == 20 * total_parameters(dims)


def replace_training(**changes):
    return FP32.model_copy(update=changes)


@given(st.integers(0, 50), st.integers(1, 30))
def test_largest(limit, most):
    expected = max([n for n in range(1, most + 1) if 3 * n <= limit], default=0)
    assert largest(lambda n: 3 * n, limit, most) == expected


def test_is_cpu():
    device = Device("a", "a")
    assert is_cpu(device)
    assert is_cpu(replace(device, type="CPU-epyc"))
    assert not is_cpu(replace(device, type="A100-80G"))


def test_describe_names_every_part():
    text = stage_memory_bytes(TIED, FP32, (1, 3), 1, cpu=True).describe()
    assert text.startswith("0.3")
    for part in ("parameters", "gradients", "optimizer", "activations", "messages", "overhead"):
        assert f"{part} 0." in text
