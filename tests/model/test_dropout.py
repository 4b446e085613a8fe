import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from ray_train_geo.model.dropout import (
    ATTENTION,
    EMBEDDING,
    MLP,
    _mix,
    _mix_,
    _signed,
    dropout,
    dropout_key,
    layer_keys,
)

WORDS = st.integers(0, 2**64 - 1)


def mask(key: Tensor, site: int = MLP, p: float = 0.5, size: int = 2**18) -> Tensor:
    return dropout(torch.ones(size), p, key, site) != 0


def keys(seed: int = 0, step: int = 0, microbatch: int = 0, layers: int = 4) -> tuple[Tensor, ...]:
    return layer_keys(dropout_key(seed, step, microbatch), 0, layers)


@given(st.lists(WORDS, min_size=1, max_size=8))
def test_tensor_hash_is_splitmix64s_finaliser(words: list[int]) -> None:
    hashed = _mix_(torch.tensor([_signed(w) for w in words]))
    assert hashed.tolist() == [_signed(_mix(w)) for w in words]


def test_splitmix64_reference_stream() -> None:
    # The published first outputs of splitmix64 from state 1234567.
    gamma, state, outputs = 0x9E3779B97F4A7C15, 1234567, []
    for _ in range(3):
        state = (state + gamma) % 2**64
        outputs.append(_mix(state))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_masks_never_change() -> None:
    """Golden bits: another mask would make resumed runs differ from uninterrupted ones."""
    key = layer_keys(dropout_key(1, 2, 3), 5, 6)[0]
    kept = dropout(torch.ones(24), 0.5, key, ATTENTION) != 0
    assert "".join(str(int(k)) for k in kept) == "110010110111111100001100"


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mean_and_scale(p: float) -> None:
    x = torch.full((2**20,), 3.0)
    out = dropout(x, p, keys()[0], MLP)
    kept = out[out != 0]
    quantised = round((1 - p) * 65536) / 65536
    assert torch.equal(kept, torch.full_like(kept, 3.0 / quantised))
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(kept.numel() / x.numel() - (1 - p)) < 5 * deviation


def test_every_one_of_the_four_draws_of_a_hash_is_fair() -> None:
    kept = mask(keys()[0], p=0.5, size=2**20).view(-1, 4).double().mean(0)
    assert (kept - 0.5).abs().max() < 5 * 0.5 / 2**9


def test_distinct_streams_are_independent() -> None:
    streams = {
        "base": mask(keys()[0]),
        "seed": mask(keys(seed=1)[0]),
        "step": mask(keys(step=1)[0]),
        "microbatch": mask(keys(microbatch=1)[0]),
        "layer": mask(keys()[1]),
        "attention": mask(keys()[0], ATTENTION),
        "embedding": mask(keys()[0], EMBEDDING),
        "shifted by one": mask(keys()[0]).roll(1),
        "shifted by one hash": mask(keys()[0]).roll(4),
        "shifted by a row": mask(keys()[0]).roll(256),
    }
    for (a, left), (b, right) in itertools.combinations(streams.items(), 2):
        agreement = (left == right).double().mean().item()
        assert abs(agreement - 0.5) < 5 * 0.5 / 2**9, (a, b)


def test_seed_step_and_microbatch_do_not_stand_in_for_each_other() -> None:
    drawn = {int(dropout_key(*triple)) for triple in itertools.product(range(8), repeat=3)}
    assert len(drawn) == 8**3
    assert int(dropout_key(2**63 - 1, 10**9, 10**6)) not in drawn


def test_the_key_of_a_layer_does_not_depend_on_the_stage() -> None:
    key = dropout_key(3, 4, 5)
    split = layer_keys(key, 0, 3) + layer_keys(key, 3, 7)
    assert [int(k) for k in split] == [int(k) for k in layer_keys(key, 0, 7)]
    assert len({int(k) for k in split}) == 7


@given(size=st.integers(0, 40))
def test_mask_is_by_flat_index_whatever_the_shape(size: int) -> None:
    key = keys()[0]
    long = dropout(torch.ones(40), 0.5, key, MLP)
    assert torch.equal(dropout(torch.ones(size), 0.5, key, MLP), long[:size])
    assert torch.equal(dropout(torch.ones(4, 10), 0.5, key, MLP), long.view(4, 10))
    halves = torch.ones(4, 10, dtype=torch.bfloat16)
    assert torch.equal(dropout(halves, 0.5, key, MLP).float(), long.view(4, 10))


def test_gradient_has_the_forwards_mask() -> None:
    x = torch.randn(64, requires_grad=True)
    key = keys()[2]
    dropout(x, 0.25, key, MLP).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, dropout(torch.ones(64), 0.25, key, MLP))


def test_off_without_a_key_or_a_probability() -> None:
    x = torch.randn(8)
    assert dropout(x, 0.5, None, MLP) is x
    assert dropout(x, 0.0, keys()[0], MLP) is x
    assert dropout(torch.ones(4096), 1 - 1e-9, keys()[0], MLP).count_nonzero() < 8


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiles_once_for_all_keys() -> None:
    graphs = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, key: dropout(x, 0.5, key, MLP), backend=graphs)
    x = torch.ones(64)
    for step in range(12):
        for key in keys(step=step):
            assert torch.equal(compiled(x, key), dropout(x, 0.5, key, MLP))
    assert graphs.frame_count == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_same_bits_on_the_gpu() -> None:
    x, key = torch.randn(3, 1001, 7), keys()[1]
    on_gpu = dropout(x.cuda(), 0.1, key, ATTENTION)
    assert torch.equal(on_gpu.cpu(), dropout(x, 0.1, key, ATTENTION))
