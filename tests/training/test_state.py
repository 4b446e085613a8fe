"""A stage's state: master weights, flat gradient buffers, and what a step changes."""

from __future__ import annotations

import pytest
import torch

from ray_train_geo.model.catalog import ModelDims, parameter_shapes
from ray_train_geo.model.stage import build_stage, next_token_loss
from ray_train_geo.spec import Precision, TrainingSpec
from ray_train_geo.training.buckets import Bucket, depth
from ray_train_geo.training.precision import DTYPES
from ray_train_geo.training.state import StageState

DIMS = ModelDims(
    family="gpt",
    layers=2,
    dim=8,
    heads=2,
    kv_heads=2,
    ffn_dim=16,
    vocab_size=13,
    max_seq_len=6,
    tied_embeddings=True,
)
PRECISIONS: list[Precision] = ["fp32", "bf16", "fp16"]
TOKENS = torch.arange(12).view(2, 6) % 13


def make(precision: Precision = "fp32", holders: tuple[int, ...] = (0,)) -> StageState:
    training = TrainingSpec(
        steps=10, global_batch=2, microbatch=2, seq_len=6, lr=0.01, precision=precision
    )
    module = build_stage(DIMS, 0, DIMS.layers, seed=3)
    names = sorted(parameter_shapes(DIMS), key=lambda n: (-depth(n, DIMS), n))
    half = len(names) // 2
    buckets = [Bucket(holders, tuple(names[:half])), Bucket((0, 9), tuple(names[half:]))]
    return StageState(module, training, buckets)


def backward(state: StageState, scale: float = 1.0) -> None:
    (next_token_loss(state.module(TOKENS), TOKENS.roll(-1)) * scale).backward()


def reference_gradients(passes: int = 1) -> dict[str, torch.Tensor]:
    module = build_stage(DIMS, 0, DIMS.layers, seed=3)
    for _ in range(passes):
        next_token_loss(module(TOKENS), TOKENS.roll(-1)).backward()
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def gradients(state: StageState) -> dict[str, torch.Tensor]:
    found = {n: w.grad for n, w in state.weights.items() if w.grad is not None}
    for index, buffer in state.buffers.items():
        bucket = state.buckets[index]
        sizes = [state.weights[n].numel() for n in bucket.names]
        for name, part in zip(bucket.names, buffer.split(sizes), strict=True):
            assert torch.equal(part.view_as(state.weights[name]), found[name])
    return found


def squares(state: StageState, bucket: int) -> float:
    return sum(float(g.double().square().sum()) for g in state.gradients(bucket))


def test_gradients_add_up_in_the_flat_buffers() -> None:
    state = make()
    state.on_gradient(lambda name: None)
    backward(state)
    backward(state)
    expected = reference_gradients(passes=2)
    found = gradients(state)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    state.clear_gradients()
    assert not any(g.any() for i in range(2) for g in state.gradients(i))


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("fp16", 0.01)])
def test_low_precision_gradients_add_up_in_fp32(precision: Precision, tolerance: float) -> None:
    state = make(precision)
    state.on_gradient(lambda name: None)
    for _ in range(4):
        backward(state)
    assert all(b.dtype == torch.float32 for b in state.buffers.values())
    assert all(p.dtype == DTYPES[precision] for p in state.module.parameters())
    assert all(p.grad is None for p in state.module.parameters()), "dropped once added"
    expected, found = reference_gradients(passes=4), gradients(state)
    for name, gradient in expected.items():
        error = torch.linalg.vector_norm(found[name] - gradient)
        assert error <= tolerance * torch.linalg.vector_norm(gradient) + 1e-3, name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_weight_arrives_once_a_backward_with_its_gradient_in_place(
    precision: Precision,
) -> None:
    state, arrived = make(precision), list[str]()

    def note(name: str) -> None:
        assert gradients(state)[name].any() or name.endswith("bias"), name
        arrived.append(name)

    state.on_gradient(note)
    backward(state)
    # In fp32 only what others hold too: nobody waits for the rest.
    expected = [name for index in state.buffers for name in state.buckets[index].names]
    assert len(state.buffers) == (1 if precision == "fp32" else 2)
    assert sorted(arrived) == sorted(expected)
    # Backward finishes the deepest layers first, the tied matrix last.
    assert arrived[-1] in ("tokens.weight", "positions.weight")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_apply_moves_master_weights_and_the_modules_follow(precision: Precision) -> None:
    state = make(precision)
    state.on_gradient(lambda name: None)
    before = {n: w.detach().clone() for n, w in state.weights.items()}
    backward(state)
    state.apply(learning_rate=0.01, factor=1.0)
    assert state.updates == 1
    parameters = dict(state.module.named_parameters())
    for name, weight in state.weights.items():
        assert weight.dtype == torch.float32
        assert not torch.equal(weight, before[name]), name
        assert torch.equal(parameters[name], weight.to(DTYPES[precision])), name


def test_apply_takes_the_gradients_times_the_factor() -> None:
    """AdamW's first moment after one step is (1 - beta1) x gradient."""
    state = make()
    state.on_gradient(lambda name: None)
    backward(state)
    expected = {n: g.clone() * 0.25 * 0.1 for n, g in gradients(state).items()}
    state.apply(0.01, factor=0.25)
    moments = state.tensors()
    for name in expected:
        torch.testing.assert_close(moments[f"exp_avg.{name}"], expected[name])


def test_the_norm_counts_what_this_rank_answers_for() -> None:
    state = make(holders=(0, 4))
    state.on_gradient(lambda name: None)
    backward(state)
    both = [squares(state, i) for i in range(2)]
    assert state.squared_norm(0) == pytest.approx(sum(both))
    assert state.squared_norm(4) == 0.0, "rank 0 is the first holder of both"
    lone = make(holders=(3, 4))
    lone.on_gradient(lambda name: None)
    backward(lone)
    mine, other = (squares(lone, i) for i in range(2))
    assert lone.squared_norm(3) == pytest.approx(mine)
    assert lone.squared_norm(0) == pytest.approx(other)


def test_the_norm_of_an_overflow_is_not_finite() -> None:
    state = make()
    backward(state)
    state.gradients(0)[0].view(-1)[1] = float("inf")
    assert state.squared_norm(0) == float("inf")
    state.gradients(1)[0].view(-1)[0] = float("nan")
    assert state.squared_norm(0) != state.squared_norm(0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_tensors_gives_load_takes(precision: Precision) -> None:
    state = make(precision)
    state.on_gradient(lambda name: None)
    for _ in range(3):
        state.clear_gradients()
        backward(state)
        state.apply(0.01, 1.0)
    saved = {n: t.clone() for n, t in state.tensors().items()}
    names = parameter_shapes(DIMS)
    assert set(saved) == {f"{k}.{n}" for k in ("model", "exp_avg", "exp_avg_sq") for n in names}
    other = make(precision)
    other.on_gradient(lambda name: None)
    other.load(saved, updates=3)
    assert other.updates == 3
    for both in (state, other):
        both.clear_gradients()
        backward(both)
        both.apply(0.01, 1.0)
    for name, tensor in state.tensors().items():
        assert torch.equal(other.tensors()[name], tensor), name


def test_a_part_of_the_state_can_be_named_and_loaded() -> None:
    state = make()
    part = state.tensors(["norm.weight"])
    assert set(part) == {"model.norm.weight", "exp_avg.norm.weight", "exp_avg_sq.norm.weight"}
    state.load({"model.norm.weight": torch.full((8,), 5.0)}, updates=0)
    assert state.module.norm is not None
    assert torch.equal(state.module.norm.weight.detach(), torch.full((8,), 5.0))
