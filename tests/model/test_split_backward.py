"""A backward in two parts gives the gradients of one, and lets go of what it no longer needs."""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter

import pytest
import torch
from torch import Tensor

from ray_train_geo.model.catalog import (
    BYTES_PER_ELEMENT,
    CATALOG,
    ModelDims,
    head_deferred_bytes,
    layer_deferred_bytes,
)
from ray_train_geo.model.dropout import dropout_key
from ray_train_geo.model.split_backward import Deferred, LeftForW, linear
from ray_train_geo.model.stage import StageModule, build_stage, next_token_loss

MICROBATCH, SEQ_LEN, LAYERS = 2, 16, 4
DIMS = {
    "gpt": dataclasses.replace(CATALOG["gpt-tiny"], dim=32, ffn_dim=128, dropout=0.1),
    "llama": dataclasses.replace(CATALOG["llama-tiny"], dim=32, ffn_dim=88),
}
DIMS["tied llama"] = dataclasses.replace(DIMS["llama"], tied_embeddings=True)


def stage(
    dims: ModelDims, layers: tuple[int, int], recompute: bool, dtype: torch.dtype
) -> StageModule:
    module = build_stage(dims, *layers, seed=1, recompute=recompute)
    return module.to(dtype)


def forward(module: StageModule, index: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Microbatch ``index``: the stage's input, its output, and the gradient of that."""
    generator = torch.Generator().manual_seed(index)
    shape = MICROBATCH, SEQ_LEN
    tokens = torch.randint(0, 257, shape, generator=generator)
    dtype = next(module.parameters()).dtype
    hidden, gradient = (
        torch.randn(*shape, module.dims.dim, generator=generator).to(dtype) for _ in range(2)
    )
    x = tokens if module.is_first else hidden.requires_grad_()
    output = module(x, dropout_key(0, 1, index))
    if module.is_last:
        return x, next_token_loss(output, tokens) / 100, None
    return x, output, gradient


@pytest.mark.parametrize("family", sorted(DIMS))
@pytest.mark.parametrize("layers", [(0, 2), (1, 3), (2, 4), (0, 4)])
@pytest.mark.parametrize(
    ("recompute", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)]
)
def test_gradients_are_those_of_one_backward(
    family: str, layers: tuple[int, int], recompute: bool, dtype: torch.dtype
) -> None:
    dims = DIMS[family]
    whole, parts = (stage(dims, layers, recompute, dtype) for _ in range(2))
    split = parts.split_backward()
    counts: Counter[str] = Counter()
    for name, parameter in parts.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: counts.update([name]))
    left: list[LeftForW] = []
    for index in range(3):
        x, output, gradient = forward(whole, index)
        torch.autograd.backward(output, gradient)
        y, output, gradient = forward(parts, index)
        found, for_w = split.activations(y, output, gradient)
        left.append(for_w)
        assert (found is None) == (x.grad is None)
        if found is not None:
            assert torch.equal(found, x.grad)
    assert not counts
    for for_w in left:
        split.weights(for_w)
    assert counts == dict.fromkeys(dict(parts.named_parameters()), 3), "once a microbatch, in W"
    for (name, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, other.grad), name


def test_after_b_only_what_w_needs_is_left() -> None:
    """Inputs and output gradients of the linear maps, as the planner counts them."""
    dims = dataclasses.replace(DIMS["gpt"], dropout=0.0, tied_embeddings=False)
    module = stage(dims, (2, 4), False, torch.float32)
    split = module.split_backward()
    kept: list[weakref.ref[Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x, output, gradient = forward(module, 0)
    _, left = split.activations(x, output, gradient)
    held = {t.data_ptr(): t.nbytes for p in left.products for t in (p.x, p.gradient)}
    expected = 2 * layer_deferred_bytes(dims, SEQ_LEN, MICROBATCH, "fp32")
    expected += head_deferred_bytes(dims, SEQ_LEN, MICROBATCH, "fp32")
    assert sum(held.values()) == expected
    weights = {p.data_ptr() for p in module.parameters()}
    alive = [t for ref in kept if (t := ref()) is not None]
    assert len(alive) < len(kept)
    assert {t.data_ptr() for t in alive} <= weights | held.keys() | {x.data_ptr()}


def test_a_forward_without_gradients_leaves_nothing() -> None:
    deferred, weight = Deferred(), torch.ones(3, 2, requires_grad=True)
    with torch.no_grad():
        y = linear(torch.ones(1, 2), weight, None, deferred)
    assert torch.equal(y, torch.full((1, 3), 2.0))
    assert not deferred.take()


def test_every_precision_has_a_size() -> None:
    for precision in BYTES_PER_ELEMENT:
        assert layer_deferred_bytes(DIMS["llama"], 1, 1, precision) == BYTES_PER_ELEMENT[
            precision
        ] * (6 * 32 + 2 * 16 + 3 * 88)
