import dataclasses
import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from ray_train_geo.model.catalog import CATALOG, ModelDims, parameter_shapes
from ray_train_geo.model.dropout import dropout_key
from ray_train_geo.model.stage import StageModule, build_stage, initialize, next_token_loss

SMALL = {"layers": 4, "dim": 32, "vocab_size": 50, "max_seq_len": 16}
GPT = dataclasses.replace(CATALOG["gpt-tiny"], ffn_dim=128, dropout=0.1, **SMALL)
LLAMA = dataclasses.replace(CATALOG["llama-tiny"], ffn_dim=96, dropout=0.1, **SMALL)
MODELS = {
    "gpt-tied": GPT,
    "gpt-untied": dataclasses.replace(GPT, tied_embeddings=False),
    "llama-tied": dataclasses.replace(LLAMA, tied_embeddings=True),
    "llama-untied": LLAMA,
}
KEY = dropout_key(7, 1, 2)
models = pytest.mark.parametrize("dims", MODELS.values(), ids=MODELS.keys())


def batch(dims: ModelDims) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(dims.vocab_size, (2, dims.max_seq_len + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def run(stages: list[StageModule], dims: ModelDims) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a pipeline; gradients cross stages as messages would."""
    x, targets = batch(dims)
    ends: list[tuple[Tensor, Tensor]] = []
    hidden = x
    for stage in stages:
        entry = hidden.detach()
        if not stage.is_first:
            entry.requires_grad_()
        hidden = stage(entry, KEY)
        ends.append((entry, hidden))
    loss = next_token_loss(hidden, targets)
    loss.backward()
    for (entry, _), (_, previous) in zip(ends[:0:-1], ends[-2::-1], strict=True):
        previous.backward(entry.grad)
    gradients: dict[str, Tensor] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            assert parameter.grad is not None, name
            # Both holders of a tied matrix have a part of its gradient.
            gradients[name] = gradients.get(name, 0) + parameter.grad
    return loss.detach(), gradients


@models
@settings(deadline=None, max_examples=8)
@given(data=st.data())
def test_any_split_computes_what_the_whole_model_computes(
    dims: ModelDims, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, dims.layers - 1))))
    bounds = [0, *cuts, dims.layers]
    whole_loss, whole = run([build_stage(dims, 0, dims.layers, seed=3)], dims)
    stages = [build_stage(dims, a, b, seed=3) for a, b in itertools.pairwise(bounds)]
    loss, gradients = run(stages, dims)
    assert torch.equal(loss, whole_loss)
    assert gradients.keys() == whole.keys() == parameter_shapes(dims).keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-6, atol=1e-6, msg=name)


@models
def test_recompute_changes_no_bit(dims: ModelDims) -> None:
    loss, gradients = run([build_stage(dims, 0, dims.layers, seed=3)], dims)
    again_loss, again = run([build_stage(dims, 0, dims.layers, seed=3, recompute=True)], dims)
    assert torch.equal(loss, again_loss)
    assert all(torch.equal(gradients[name], again[name]) for name in gradients)


@models
def test_names_are_global(dims: ModelDims) -> None:
    stages = [build_stage(dims, 0, 1, seed=0), build_stage(dims, 1, 4, seed=0)]
    names = [set(s.state_dict()) for s in stages]
    assert names[0] | names[1] == parameter_shapes(dims).keys()
    assert names[0] & names[1] == ({"tokens.weight"} if dims.tied_embeddings else set())
    assert {n.split(".")[1] for n in names[1] if n.startswith("layers.")} == {"1", "2", "3"}


@models
def test_initial_weights_depend_on_seed_and_name_only(dims: ModelDims) -> None:
    whole = build_stage(dims, 0, 4, seed=5).state_dict()
    for first, last in ((0, 1), (1, 2), (2, 4)):
        for name, value in build_stage(dims, first, last, seed=5).state_dict().items():
            assert torch.equal(value, whole[name]), name
    other = build_stage(dims, 0, 4, seed=6).state_dict()
    matrices = [n for n, t in whole.items() if t.dim() == 2]
    assert not any(torch.equal(whole[n], other[n]) for n in matrices)
    assert not torch.equal(whole["layers.0.qkv.weight"], whole["layers.1.qkv.weight"])


def test_initial_weights_have_their_scale() -> None:
    dims = dataclasses.replace(CATALOG["gpt-tiny"], layers=2, init_std=0.05, vocab_size=9000)
    state = build_stage(dims, 0, 2, seed=0).state_dict()  # 9000 x 128: more than one chunk
    assert state["tokens.weight"].std().item() == pytest.approx(0.05, rel=0.02)
    assert state["tokens.weight"][-1].std().item() == pytest.approx(0.05, rel=0.3)
    assert state["layers.0.up.weight"].std().item() == pytest.approx(0.05, rel=0.02)
    for name in ("attention_out", "down"):
        std = state[f"layers.1.{name}.weight"].std().item()
        assert std == pytest.approx(0.05 / 2, rel=0.02)
    for name, tensor in state.items():
        if name.endswith(".bias"):
            assert not tensor.any()
        elif "norm" in name:
            assert (tensor == 1).all()


def test_initialize_fills_low_precision_from_the_same_draws() -> None:
    stage = build_stage(GPT, 0, 4, seed=1)
    half = StageModule(GPT, 0, 4).to(torch.bfloat16)
    initialize(half, seed=1)
    assert half.tokens is not None
    assert stage.tokens is not None
    assert torch.equal(half.tokens.weight, stage.tokens.weight.to(torch.bfloat16))


@models
def test_attention_is_causal(dims: ModelDims) -> None:
    stage = build_stage(dims, 0, dims.layers, seed=0).eval()
    tokens, _ = batch(dims)
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % dims.vocab_size
    with torch.no_grad():
        before, after = stage(tokens), stage(changed)
    torch.testing.assert_close(after[:, :10], before[:, :10])
    assert not torch.allclose(after[:, 10:], before[:, 10:])


def test_dropout_is_off_in_eval_and_needs_a_key_in_training() -> None:
    stage = build_stage(GPT, 0, 4, seed=0)
    tokens, _ = batch(GPT)
    with pytest.raises(ValueError, match="dropout key"):
        stage(tokens)
    assert not torch.equal(stage(tokens, KEY), stage(tokens, dropout_key(7, 1, 3)))
    stage.eval()
    assert torch.equal(stage(tokens, KEY), stage(tokens))


def test_shorter_sequences_than_the_models_context() -> None:
    for dims in (GPT, LLAMA):
        stage = build_stage(dims, 0, dims.layers, seed=0).eval()
        tokens, _ = batch(dims)
        torch.testing.assert_close(stage(tokens[:, :5]), stage(tokens)[:, :5])


@pytest.mark.parametrize(("first", "last"), [(2, 2), (3, 2), (-1, 2), (0, 5)])
def test_layers_outside_the_model_are_refused(first: int, last: int) -> None:
    with pytest.raises(ValueError, match="4 layers"):
        StageModule(GPT, first, last)


def test_loss_is_the_sum_in_fp32() -> None:
    logits = torch.randn(2, 3, 50, dtype=torch.bfloat16)
    targets = torch.randint(50, (2, 3))
    picked = logits.float().log_softmax(-1).gather(-1, targets[..., None])
    loss = next_token_loss(logits, targets)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, -picked.sum())
    assert F.cross_entropy(logits[0].float(), targets[0]) != loss


@pytest.mark.parametrize("dims", [GPT, LLAMA], ids=["gpt", "llama"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_layers_share_one_compilation(dims: ModelDims) -> None:
    """A model of many layers must not be compiled layer by layer, nor step by step."""
    torch._dynamo.reset()
    graphs = CompileCounter()
    stage = build_stage(dims, 0, dims.layers, seed=0)
    eager = build_stage(dims, 0, dims.layers, seed=0)
    for layer in stage.layers.values():
        layer.compile(backend=graphs)
    tokens, _ = batch(dims)
    for step in range(3):
        key = dropout_key(0, step, 0)
        torch.testing.assert_close(stage(tokens, key), eager(tokens, key))
    assert graphs.frame_count == 1


def test_initial_weights_do_not_depend_on_the_processor() -> None:
    """torch's fp32 normals differ between CPUs with and without AVX2; replicas must start equal."""
    program = (
        "import hashlib; from ray_train_geo.model.catalog import CATALOG;"
        "from ray_train_geo.model.stage import build_stage;"
        "stage = build_stage(CATALOG['gpt-tiny'], 0, 1, seed=0);"
        "print(hashlib.sha256(stage.layers['0'].up.weight.detach().numpy().tobytes()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
            check=True,
            capture_output=True,
        ).stdout
        for capability in ("default", "avx2")
    }
    assert len(digests) == 1
