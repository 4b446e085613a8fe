"""Model dimensions, the named models, and what a layer of each costs (level 0: no torch).

A *layer* is one transformer block; layers are numbered globally, 0 to ``layers - 1``.  The token
(and position) embedding goes with layer 0, the final norm and output head with the last layer.

FLOPs count a multiply-add as 2 and causal attention in full, as Megatron-LM (Narayanan et al.,
SC 2021, appendix) and DT-FM do.  Activation bytes are what autograd keeps from a microbatch's
forward to its backward in this package's own modules; attention is fused (flash), so nothing
grows with ``seq_len ** 2``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Literal

__all__ = [
    "BYTES_PER_ELEMENT",
    "CATALOG",
    "Family",
    "ModelDims",
    "boundary_bytes",
    "embedding_activation_bytes",
    "embedding_parameters",
    "head_activation_bytes",
    "head_flops",
    "head_parameters",
    "layer_activation_bytes",
    "layer_flops",
    "layer_parameters",
    "parameter_shapes",
    "step_flops",
    "total_parameters",
]

Family = Literal["gpt", "llama"]

BYTES_PER_ELEMENT: Mapping[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of one weight or activation at each training precision."""


@dataclass(frozen=True, slots=True)
class ModelDims:
    """Everything that fixes a model's shape and arithmetic.

    ``gpt``: pre-norm LayerNorm with bias, learned positions, GELU (tanh) MLP of ``ffn_dim``,
    biases everywhere.  ``llama``: RMSNorm, RoPE, SwiGLU MLP of ``ffn_dim``, grouped-query
    attention with ``kv_heads``, no biases.
    """

    family: Family
    layers: int
    dim: int
    heads: int
    kv_heads: int
    ffn_dim: int
    vocab_size: int
    max_seq_len: int
    tied_embeddings: bool
    dropout: float = 0.0
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    init_std: float = 0.02

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


@cache
def layer_parameters(dims: ModelDims) -> int:
    """Parameters of one layer."""
    return sum(prod(shape) for shape in _layer_shapes(dims).values())


@cache
def embedding_parameters(dims: ModelDims) -> int:
    """Parameters of the token embedding and, for gpt, of the learned positions."""
    return sum(prod(shape) for shape in _embedding_shapes(dims).values())


@cache
def head_parameters(dims: ModelDims) -> int:
    """Parameters of the final norm and, unless tied, of the output matrix."""
    return sum(prod(shape) for shape in _head_shapes(dims).values())


def total_parameters(dims: ModelDims) -> int:
    """Parameters of the whole model; a tied matrix counts once."""
    return embedding_parameters(dims) + dims.layers * layer_parameters(dims) + head_parameters(dims)


def parameter_shapes(dims: ModelDims) -> dict[str, tuple[int, ...]]:
    """Canonical name and shape of every parameter of the whole model, front to back.

    These are the names in every stage's state dict and in every checkpoint: layer ids in them
    are global, so that they do not depend on the plan.
    """
    shapes = _embedding_shapes(dims)
    for layer in range(dims.layers):
        for name, shape in _layer_shapes(dims).items():
            shapes[f"layers.{layer}.{name}"] = shape
    return shapes | _head_shapes(dims)


@cache
def layer_flops(dims: ModelDims, seq_len: int, microbatch: int) -> float:
    """Forward FLOPs of one layer on ``microbatch`` sequences of ``seq_len`` tokens.

    For gpt with ``ffn_dim = 4 * dim``: ``24 B s d^2 + 4 B s^2 d``.
    """
    tokens = float(microbatch * seq_len)
    return tokens * (2 * _matrix_parameters(dims) + 4 * seq_len * dims.dim)


@cache
def layer_weight_flops(dims: ModelDims, seq_len: int, microbatch: int) -> float:
    """FLOPs of the gradients of one layer's matrices: its forward's, but for the attention's own.

    Gradients of the layer's input take the rest of a backward.
    """
    return 2.0 * microbatch * seq_len * _matrix_parameters(dims)


def head_flops(dims: ModelDims, seq_len: int, microbatch: int) -> float:
    """Forward FLOPs of the output head (hidden to logits) on one microbatch."""
    return 2.0 * microbatch * seq_len * dims.dim * dims.vocab_size


def step_flops(dims: ModelDims, seq_len: int, global_batch: int, recompute: bool) -> float:
    """FLOPs of one step over ``global_batch`` sequences, all devices together.

    A backward costs two forwards; ``recompute`` adds one more forward of the layers.  Without the
    head and with ``recompute`` this is DT-FM's ``96 L B s d^2 (1 + s / 6d)``.
    """
    forwards = 4 if recompute else 3
    layers = forwards * dims.layers * layer_flops(dims, seq_len, global_batch)
    return layers + 3 * head_flops(dims, seq_len, global_batch)


def layer_activation_bytes(
    dims: ModelDims, seq_len: int, microbatch: int, precision: str, recompute: bool
) -> int:
    """Bytes that one layer keeps from the forward of a microbatch to its backward.

    With ``recompute`` only the layer's input; a stage then also needs one layer's full
    activations, once, while it runs a backward.
    """
    d, ffn, kv = dims.dim, dims.ffn_dim, dims.kv_heads * dims.head_dim
    if recompute:
        elements, fp32_elements, masks = d, 0, 0
    elif dims.family == "gpt":
        # Both norms' input and output, qkv, attention's output, before and after the GELU.
        elements = 4 * d + 3 * d + d + 2 * ffn
        fp32_elements = 4 + dims.heads  # the norms' mean and rstd, attention's logsumexp
        masks = 2 * d
    else:
        # Both norms' input, normalised input and output; rotated q and k, v, attention's output;
        # gate, up, silu(gate) and their product.
        elements = 6 * d + (d + 2 * kv) + d + 4 * ffn
        fp32_elements = 2 + dims.heads
        masks = 2 * d
    if not dims.dropout:
        masks = 0
    per_token = elements * BYTES_PER_ELEMENT[precision] + 4 * fp32_elements + masks
    return microbatch * seq_len * per_token


def layer_deferred_bytes(dims: ModelDims, seq_len: int, microbatch: int, precision: str) -> int:
    """Bytes that one layer keeps of a microbatch from a backward without weight gradients to these.

    Input and output gradient of each of its linear maps; recomputation changes nothing.
    """
    d, ffn, kv = dims.dim, dims.ffn_dim, dims.kv_heads * dims.head_dim
    # Of qkv, attention's output, up (gate and up are one) and down.
    inputs = d + d + d + ffn
    gradients = (d + 2 * kv) + d + (ffn if dims.family == "gpt" else 2 * ffn) + d
    return microbatch * seq_len * (inputs + gradients) * BYTES_PER_ELEMENT[precision]


def embedding_activation_bytes(
    dims: ModelDims, seq_len: int, microbatch: int, precision: str
) -> int:
    """Bytes that the embedding keeps of a microbatch: int64 tokens and the dropout mask.

    Its output is layer 0's input and counted there, so ``precision`` changes nothing.
    """
    BYTES_PER_ELEMENT[precision]
    return microbatch * seq_len * (8 + (dims.dim if dims.dropout else 0))


def head_activation_bytes(dims: ModelDims, seq_len: int, microbatch: int, precision: str) -> int:
    """Bytes that the final norm, output head and loss hold of a microbatch.

    Logits at ``precision`` and the loss's fp32 log-probabilities, which both live until the loss
    is done; the norm's input and output (llama: also its normalised input).
    """
    element = BYTES_PER_ELEMENT[precision]
    norm = (2 if dims.family == "gpt" else 3) * dims.dim * element + 8
    return microbatch * seq_len * (norm + dims.vocab_size * (element + 4) + 8)


def head_deferred_bytes(dims: ModelDims, seq_len: int, microbatch: int, precision: str) -> int:
    """As :func:`layer_deferred_bytes`, of the output head: the norm's output, logits' gradient."""
    return microbatch * seq_len * (dims.dim + dims.vocab_size) * BYTES_PER_ELEMENT[precision]


def boundary_bytes(dims: ModelDims, seq_len: int, microbatch: int, precision: str) -> int:
    """Bytes of one message between stages: the hidden state of a microbatch, or its gradient."""
    return microbatch * seq_len * dims.dim * BYTES_PER_ELEMENT[precision]


@cache
def _matrix_parameters(dims: ModelDims) -> int:
    """Of one layer."""
    return sum(prod(shape) for shape in _layer_shapes(dims).values() if len(shape) == 2)


def _embedding_shapes(dims: ModelDims) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"tokens.weight": (dims.vocab_size, dims.dim)}
    if dims.family == "gpt":
        shapes["positions.weight"] = (dims.max_seq_len, dims.dim)
    return shapes


def _layer_shapes(dims: ModelDims) -> dict[str, tuple[int, ...]]:
    d, ffn, kv = dims.dim, dims.ffn_dim, dims.kv_heads * dims.head_dim
    if dims.family == "gpt":
        return {
            "attention_norm.weight": (d,),
            "attention_norm.bias": (d,),
            "qkv.weight": (3 * d, d),
            "qkv.bias": (3 * d,),
            "attention_out.weight": (d, d),
            "attention_out.bias": (d,),
            "mlp_norm.weight": (d,),
            "mlp_norm.bias": (d,),
            "up.weight": (ffn, d),
            "up.bias": (ffn,),
            "down.weight": (d, ffn),
            "down.bias": (d,),
        }
    return {
        "attention_norm.weight": (d,),
        "qkv.weight": (d + 2 * kv, d),
        "attention_out.weight": (d, d),
        "mlp_norm.weight": (d,),
        "gate_up.weight": (2 * ffn, d),
        "down.weight": (d, ffn),
    }


def _head_shapes(dims: ModelDims) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"norm.weight": (dims.dim,)}
    if dims.family == "gpt":
        shapes["norm.bias"] = (dims.dim,)
    if not dims.tied_embeddings:
        shapes["output.weight"] = (dims.vocab_size, dims.dim)
    return shapes


def _gpt(layers: int, dim: int, heads: int, vocab_size: int, max_seq_len: int) -> ModelDims:
    return ModelDims(
        family="gpt",
        layers=layers,
        dim=dim,
        heads=heads,
        kv_heads=heads,
        ffn_dim=4 * dim,
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
        tied_embeddings=True,
    )


def _gpt3(layers: int, dim: int, heads: int) -> ModelDims:
    return _gpt(layers, dim, heads, vocab_size=50257, max_seq_len=2048)


def _llama(
    layers: int,
    dim: int,
    heads: int,
    kv_heads: int,
    ffn_dim: int,
    max_seq_len: int,
    vocab_size: int = 32000,
) -> ModelDims:
    return ModelDims(
        family="llama",
        layers=layers,
        dim=dim,
        heads=heads,
        kv_heads=kv_heads,
        ffn_dim=ffn_dim,
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
        tied_embeddings=False,
    )


CATALOG: dict[str, ModelDims] = {
    # For tests and first runs; the vocabulary is the byte tokenizer's.
    "gpt-tiny": _gpt(4, 128, 4, vocab_size=257, max_seq_len=256),
    "llama-tiny": _llama(4, 128, 4, 2, 352, max_seq_len=256, vocab_size=257),
    # Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
    "gpt2": _gpt(12, 768, 12, vocab_size=50257, max_seq_len=1024),
    # Brown et al., "Language Models are Few-Shot Learners", 2020, table 2.1.  13B's printed width,
    # 5140, is no multiple of its 40 heads; 5120 is meant.
    "gpt3-small": _gpt3(12, 768, 12),
    "gpt3-medium": _gpt3(24, 1024, 16),
    "gpt3-large": _gpt3(24, 1536, 16),
    # XL with 16 heads, and deeper ones of the same width: as DT-FM trains them (Yuan et al.,
    # "Decentralized Training of Foundation Models in Heterogeneous Environments", 2022).
    "gpt3-xl": _gpt3(24, 2048, 16),
    "gpt3-xl-24": _gpt3(24, 2048, 16),
    "gpt3-xl-32": _gpt3(32, 2048, 16),
    "gpt3-xl-40": _gpt3(40, 2048, 16),
    "gpt3-2.7b": _gpt3(32, 2560, 32),
    "gpt3-6.7b": _gpt3(32, 4096, 32),
    "gpt3-13b": _gpt3(40, 5120, 40),
    # Zhang et al., "TinyLlama", 2024.
    "tinyllama-1.1b": _llama(22, 2048, 32, 4, 5632, max_seq_len=2048),
    # Touvron et al., "LLaMA", 2023, table 2, and "Llama 2", 2023, table 1.
    "llama-7b": replace(_llama(32, 4096, 32, 32, 11008, max_seq_len=2048), norm_eps=1e-6),
    "llama2-13b": _llama(40, 5120, 40, 40, 13824, max_seq_len=4096),
    # Grattafiori et al., "The Llama 3 Herd of Models", 2024, table 3.
    "llama3-8b": replace(
        _llama(32, 4096, 32, 8, 14336, max_seq_len=8192, vocab_size=128256), rope_theta=500_000.0
    ),
}
"""The models that a job spec can name."""
