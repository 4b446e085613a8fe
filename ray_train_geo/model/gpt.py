"""One GPT layer: pre-norm attention and GELU MLP (Radford et al., 2019)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ray_train_geo.model.catalog import ModelDims
from ray_train_geo.model.dropout import ATTENTION, MLP, dropout
from ray_train_geo.model.split_backward import Linear

__all__ = ["GPTLayer"]


class GPTLayer(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``, with dropout on both branches.

    Attention probabilities have no dropout: fused kernels can't take a mask that is a function of
    the microbatch (see :mod:`ray_train_geo.model.dropout`).
    """

    def __init__(self, dims: ModelDims) -> None:
        super().__init__()
        self.heads = dims.heads
        self.dropout = dims.dropout
        self.attention_norm = nn.LayerNorm(dims.dim, dims.norm_eps)
        self.qkv = Linear(dims.dim, 3 * dims.dim)
        self.attention_out = Linear(dims.dim, dims.dim)
        self.mlp_norm = nn.LayerNorm(dims.dim, dims.norm_eps)
        self.up = Linear(dims.dim, dims.ffn_dim)
        self.down = Linear(dims.ffn_dim, dims.dim)

    def forward(self, x: Tensor, key: Tensor | None) -> Tensor:
        """Hidden states ``[microbatch, seq_len, dim]`` to the same shape.

        Args:
            key: the layer's dropout key, or None for no dropout.
        """
        x = x + dropout(self._attention(self.attention_norm(x)), self.dropout, key, ATTENTION)
        hidden = F.gelu(self.up(self.mlp_norm(x)), approximate="tanh")
        return x + dropout(self.down(hidden), self.dropout, key, MLP)

    def _attention(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.attention_out(mixed.transpose(1, 2).flatten(2))
        return out
