import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ray_train_geo.model.catalog import (
    BYTES_PER_ELEMENT,
    CATALOG,
    ModelDims,
    boundary_bytes,
    embedding_activation_bytes,
    embedding_parameters,
    head_activation_bytes,
    head_flops,
    head_parameters,
    layer_activation_bytes,
    layer_flops,
    layer_parameters,
    parameter_shapes,
    step_flops,
    total_parameters,
)
from ray_train_geo.model.dropout import dropout_key
from ray_train_geo.model.stage import StageModule, build_stage, next_token_loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GPT = CATALOG["gpt-tiny"]
LLAMA = CATALOG["llama-tiny"]
MHA = dataclasses.replace(LLAMA, kv_heads=LLAMA.heads)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", sorted(CATALOG))
def test_parameters_are_exactly_those_of_the_module(name: str) -> None:
    dims = CATALOG[name]
    with torch.device("meta"):
        whole = StageModule(dims, 0, dims.layers)
    actual = {n: tuple(p.shape) for n, p in whole.named_parameters()}
    assert actual == parameter_shapes(dims)
    assert total_parameters(dims) == count(whole)
    assert layer_parameters(dims) == count(whole.layers["0"])
    assert whole.tokens is not None
    assert whole.norm is not None
    positions = 0 if whole.positions is None else count(whole.positions)
    assert embedding_parameters(dims) == count(whole.tokens) + positions
    output = 0 if whole.output is None else count(whole.output)
    assert head_parameters(dims) == count(whole.norm) + output


@pytest.mark.parametrize(
    ("name", "published"),
    [  # gpt2: 124,439,808 (Hugging Face); the others as their papers and model cards print them
        ("gpt2", 124_439_808),
        ("tinyllama-1.1b", 1_100_048_384),
        ("llama-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("llama3-8b", 8_030_261_248),
    ],
)
def test_published_parameter_counts(name: str, published: int) -> None:
    assert total_parameters(CATALOG[name]) == published


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("gpt3-small", 125e6),
        ("gpt3-medium", 350e6),
        ("gpt3-large", 760e6),
        ("gpt3-xl", 1.3e9),
        ("gpt3-2.7b", 2.7e9),
        ("gpt3-6.7b", 6.7e9),
        ("gpt3-13b", 13e9),
    ],
)
def test_gpt3_sizes_round_to_the_papers(name: str, published: float) -> None:
    assert total_parameters(CATALOG[name]) == pytest.approx(published, rel=0.02)


def test_layer_flops_of_gpt_are_megatrons() -> None:
    batch, s, d = 3, 100, GPT.dim
    assert layer_flops(GPT, s, batch) == 24 * batch * s * d**2 + 4 * batch * s**2 * d
    assert head_flops(GPT, s, batch) == 2 * batch * s * d * GPT.vocab_size


def test_llama_flops_are_the_matrices_and_attention() -> None:
    s, d, kv, ffn = 64, LLAMA.dim, LLAMA.kv_heads * LLAMA.head_dim, LLAMA.ffn_dim
    matrices = d * (d + 2 * kv) + d * d + 3 * d * ffn
    assert layer_flops(LLAMA, s, 2) == 2 * s * (2 * matrices + 4 * s * d)


@pytest.mark.parametrize(
    ("layers", "batch", "pflop"),
    [  # shared/data/measurements/dtfm_workload_pflop.csv: GPT3-XL, seq_len 2048
        (24, 1024, 23.644),
        (32, 1024, 31.525),
        (40, 1024, 39.406),
        (24, 2048, 47.288),
        (32, 2048, 63.05),
        (40, 2048, 78.813),
        (24, 4096, 94.576),
        (32, 4096, 126.101),
        (40, 4096, 157.626),
    ],
)
def test_step_flops_are_dtfms(layers: int, batch: int, pflop: float) -> None:
    dims = CATALOG[f"gpt3-xl-{layers}"]
    head = 3 * head_flops(dims, 2048, batch)
    measured = (step_flops(dims, 2048, batch, recompute=True) - head) / 1e15
    assert measured == pytest.approx(pflop, rel=1e-4)
    saved = layers * layer_flops(dims, 2048, batch)
    assert step_flops(dims, 2048, batch, recompute=False) == pytest.approx(
        1e15 * measured + head - saved
    )


def saved_bytes(module: StageModule, run: Callable[[], Tensor]) -> int:
    """Bytes of distinct storages that autograd keeps while ``run``'s result is alive."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in parameters:
            kept.setdefault(storage, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
        total = sum(t.untyped_storage().nbytes() for t in kept.values())
    del result
    return total


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dims", [GPT, LLAMA, MHA], ids=["gpt", "llama-gqa", "llama-mha"])
@pytest.mark.parametrize("recompute", [False, True])
def test_layer_activation_bytes_match_autograd(
    dims: ModelDims, precision: str, dropout: float, recompute: bool
) -> None:
    dims = dataclasses.replace(dims, dropout=dropout)
    batch, seq_len = 3, 128
    stage = build_stage(dims, 1, 3, seed=0, recompute=recompute).to(DTYPES[precision])
    hidden = torch.randn(batch, seq_len, dims.dim, dtype=DTYPES[precision], requires_grad=True)
    key = dropout_key(0, 0, 0)
    measured = saved_bytes(stage, lambda: stage(hidden, key))
    if dims.family == "llama" and not recompute:
        # RoPE's tables belong to the stage, not to a layer.
        measured -= 2 * seq_len * dims.head_dim * BYTES_PER_ELEMENT[precision]
    predicted = 2 * layer_activation_bytes(dims, seq_len, batch, precision, recompute)
    # A CPU has no fused RMSNorm: below fp32 it keeps fp32 copies that a GPU doesn't.
    upcasts = dims.family == "llama" and precision == "bf16" and not recompute
    assert predicted == pytest.approx(measured, rel=0.2 if upcasts else 0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dims", [GPT, LLAMA], ids=["gpt", "llama"])
def test_embedding_and_head_bytes_match_autograd(dims: ModelDims, precision: str) -> None:
    # Few layers and a large vocabulary, so that the ends are what is measured.
    dims = dataclasses.replace(dims, layers=1, vocab_size=4000, dropout=0.1)
    batch, seq_len = 2, 64
    stage = build_stage(dims, 0, 1, seed=0).to(DTYPES[precision])
    tokens = torch.randint(dims.vocab_size, (batch, seq_len))
    logits: list[Tensor] = []

    def run() -> Tensor:
        logits.append(stage(tokens, dropout_key(0, 0, 0)))
        return next_token_loss(logits[0], tokens)

    measured = saved_bytes(stage, run) + logits[0].nbytes
    predicted = (
        embedding_activation_bytes(dims, seq_len, batch, precision)
        + layer_activation_bytes(dims, seq_len, batch, precision, recompute=False)
        + head_activation_bytes(dims, seq_len, batch, precision)
    )
    assert predicted == pytest.approx(measured, rel=0.05)


def test_embedding_bytes_are_tokens_and_mask() -> None:
    assert embedding_activation_bytes(GPT, 10, 2, "fp32") == 10 * 2 * 8
    dropped = dataclasses.replace(GPT, dropout=0.1)
    assert embedding_activation_bytes(dropped, 10, 2, "bf16") == 10 * 2 * (8 + GPT.dim)


def test_boundary_is_one_hidden_state() -> None:
    hidden = torch.empty(3, 50, GPT.dim, dtype=torch.bfloat16)
    assert boundary_bytes(GPT, 50, 3, "bf16") == hidden.nbytes
    assert boundary_bytes(GPT, 50, 3, "fp32") == 2 * hidden.nbytes
