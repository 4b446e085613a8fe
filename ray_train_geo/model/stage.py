"""A stage: a contiguous run of layers, with the embedding and the head where they belong.

Names in a stage's state dict are global (``layers.7.qkv.weight`` is the model's layer 7 on every
stage that holds it), and initial weights depend on the seed and that name only: the split of a
model into stages changes neither what is stored nor what is computed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ray_train_geo.model.catalog import ModelDims
from ray_train_geo.model.dropout import EMBEDDING, dropout, layer_keys
from ray_train_geo.model.gpt import GPTLayer
from ray_train_geo.model.llama import LlamaLayer, rotary_tables
from ray_train_geo.model.split_backward import Deferred, Linear, SplitBackward, linear

__all__ = ["StageModule", "bare_stage", "build_stage", "initialize", "next_token_loss"]

_INIT_CHUNK_ELEMENTS = 2**20


class StageModule(nn.Module):
    """Layers ``[first, last)`` of a model.

    Attributes (those that the stage does not hold are None):
        tokens: token embedding, on the first stage; with tied embeddings the last stage holds a
            copy, which is its output matrix.  Keeping both copies equal (summed gradients) is the
            caller's work.
        positions: learned positions, first stage of a gpt.
        layers: layers by global id.
        norm: final norm, last stage.
        output: output matrix, last stage, unless tied.

    Args:
        recompute: keep only each layer's input, and run its forward again in the backward.

    Raises:
        ValueError: ``[first, last)`` is empty or outside the model.
    """

    def __init__(self, dims: ModelDims, first: int, last: int, *, recompute: bool = False) -> None:
        super().__init__()
        if not 0 <= first < last <= dims.layers:
            raise ValueError(f"layers [{first}, {last}) of a model of {dims.layers} layers")
        self.dims, self.first, self.last, self.recompute = dims, first, last, recompute
        gpt = dims.family == "gpt"
        tied_copy = self.is_last and dims.tied_embeddings
        self.tokens = (
            nn.Embedding(dims.vocab_size, dims.dim) if self.is_first or tied_copy else None
        )
        self.positions = nn.Embedding(dims.max_seq_len, dims.dim) if self.is_first and gpt else None
        self.layers = nn.ModuleDict(
            {str(i): GPTLayer(dims) if gpt else LlamaLayer(dims) for i in range(first, last)}
        )
        norm = nn.LayerNorm if gpt else nn.RMSNorm
        self.norm = norm(dims.dim, dims.norm_eps) if self.is_last else None
        self.output = (
            Linear(dims.dim, dims.vocab_size, bias=False)
            if self.is_last and not dims.tied_embeddings
            else None
        )
        self._tied_deferred: Deferred | None = None

    @property
    def is_first(self) -> bool:
        return self.first == 0

    @property
    def is_last(self) -> bool:
        return self.last == self.dims.layers

    def forward(self, x: Tensor, key: Tensor | None = None) -> Tensor:
        """Run the stage on one microbatch.

        Args:
            x: int64 tokens ``[microbatch, seq_len]`` on the first stage, else hidden states
                ``[microbatch, seq_len, dim]``.
            key: the microbatch's :func:`~ray_train_geo.model.dropout.dropout_key`.  Not used when
                the model has no dropout or is in eval mode.

        Returns:
            Hidden states ``[microbatch, seq_len, dim]``, or on the last stage logits
            ``[microbatch, seq_len, vocab_size]``.

        Raises:
            ValueError: the model needs a dropout key, and there is none.
        """
        keys = self._layer_keys(key)
        if self.is_first:
            x = self._embed(x, keys[0])
        rotary: tuple[tuple[Tensor, Tensor], ...] = ()
        if self.dims.family == "llama":
            rotary = (rotary_tables(self.dims, x.shape[1], x.device, x.dtype),)
        for layer, layer_key in zip(self.layers.values(), keys, strict=True):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(
                    layer, x, layer_key, *rotary, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = layer(x, layer_key, *rotary)
        return self._logits(x) if self.is_last else x

    def _layer_keys(self, key: Tensor | None) -> tuple[Tensor | None, ...]:
        if not self.training or self.dims.dropout == 0:
            return (None,) * len(self.layers)
        if key is None:
            raise ValueError("a stage with dropout needs a dropout key when it trains")
        return layer_keys(key, self.first, self.last)

    def _embed(self, tokens: Tensor, key: Tensor | None) -> Tensor:
        assert self.tokens is not None
        x: Tensor = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        return dropout(x, self.dims.dropout, key, EMBEDDING)

    def _logits(self, x: Tensor) -> Tensor:
        assert self.norm is not None
        x = self.norm(x)
        if self.output is not None:
            logits: Tensor = self.output(x)
            return logits
        assert self.tokens is not None
        return linear(x, self.tokens.weight, None, self._tied_deferred)

    def split_backward(self) -> SplitBackward:
        """From now on a backward leaves the weights' gradients for later."""
        deferred, split = Deferred(), set[Tensor]()
        for module in self.modules():
            if isinstance(module, Linear):
                module.deferred = deferred
                split.update(module.parameters())
        if self.is_last and self.tokens is not None and not self.is_first:
            # As both ends of the model the matrix has two gradients, which autograd adds up.
            self._tied_deferred = deferred
            split.add(self.tokens.weight)
        return SplitBackward(deferred, [p for p in self.parameters() if p not in split])


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy SUMMED over tokens, in fp32: the caller divides by the global token count.

    Args:
        logits: ``[microbatch, seq_len, vocab_size]``.
        targets: int64 ``[microbatch, seq_len]``, each the token that follows.
    """
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="sum")


@torch.no_grad()
def initialize(module: StageModule, seed: int) -> None:
    """Fill every parameter, in place, from ``seed`` and the parameter's canonical name.

    As GPT-2: weights normal with ``init_std``, projections back into the residual stream further
    divided by ``sqrt(2 * layers)``, biases 0, norms 1.
    """
    dims = module.dims
    for name, parameter in module.named_parameters():
        if name.endswith(".bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            residual = name.endswith((".attention_out.weight", ".down.weight"))
            std = dims.init_std / math.sqrt(2 * dims.layers) if residual else dims.init_std
            _fill_normal(parameter, std, seed, name)


def _fill_normal(parameter: Tensor, std: float, seed: int, name: str) -> None:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    # Drawn in fp64: fp32 normals differ in the last bit between CPUs with and without AVX2, and
    # two replicas of a layer must start equal.  In chunks, so that only one needs the room.
    for chunk in parameter.view(-1).split(_INIT_CHUNK_ELEMENTS):
        draws = torch.empty(chunk.numel(), dtype=torch.float64)
        chunk.copy_(draws.normal_(0.0, std, generator=generator))


def build_stage(
    dims: ModelDims,
    first: int,
    last: int,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    recompute: bool = False,
) -> StageModule:
    """A stage with initial weights, in fp32 on ``device``; arguments as :class:`StageModule`."""
    module = bare_stage(dims, first, last, {}, device=device, recompute=recompute)
    initialize(module, seed)
    return module


def bare_stage(
    dims: ModelDims,
    first: int,
    last: int,
    weights: Mapping[str, Tensor],
    *,
    device: torch.device | str = "cpu",
    recompute: bool = False,
) -> StageModule:
    """A stage around ``weights`` (by name, of its own shapes); the others have no values yet.

    Args:
        device: where those others are.
    """
    with torch.device("meta"), _Uninitialised():
        module = StageModule(dims, first, last, recompute=recompute)
    state = {
        name: weights[name] if name in weights else torch.empty(p.shape, device=device)
        for name, p in module.named_parameters()
    }
    module.load_state_dict(state, assign=True)
    return module


class _Uninitialised(TorchFunctionMode):
    """Modules made in here get no first values.

    On ``meta`` they would be for nothing, and torch imports its compiler to make them.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else given["tensor"]
        return func(*args, **given)
