"""One Llama layer: RMSNorm, rotary grouped-query attention, SwiGLU (Touvron et al., 2023)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_train_geo.model.catalog import ModelDims
from ray_train_geo.model.dropout import ATTENTION, MLP, dropout
from ray_train_geo.model.split_backward import Linear

__all__ = ["LlamaLayer", "rotary_tables"]


def rotary_tables(
    dims: ModelDims, seq_len: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """RoPE's cosines and signed sines, each ``[seq_len, 1, head_dim]`` (Su et al., 2021).

    Element ``i`` of a head turns together with ``i + head_dim / 2``, as in Hugging Face's weights.
    Computed in fp32 whatever the ``dtype`` of the result; no state, so nothing in checkpoints.
    """
    half = torch.arange(0, dims.head_dim, 2, device=device, dtype=torch.float32)
    frequencies = dims.rope_theta ** -(half / dims.head_dim)
    positions = torch.arange(seq_len, device=device, dtype=torch.float32)
    angles = torch.outer(positions, frequencies).unsqueeze(1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def _rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Turn the pairs of ``x`` ``[microbatch, seq_len, heads, head_dim]`` by position."""
    # Swapping the halves is a roll; the sines carry the sign.
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)


class LlamaLayer(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``, with dropout on both branches."""

    def __init__(self, dims: ModelDims) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = dims.heads, dims.kv_heads, dims.head_dim
        self.dropout = dims.dropout
        kv_dim = dims.kv_heads * dims.head_dim
        self.attention_norm = nn.RMSNorm(dims.dim, dims.norm_eps)
        self.qkv = Linear(dims.dim, dims.dim + 2 * kv_dim, bias=False)
        self.attention_out = Linear(dims.dim, dims.dim, bias=False)
        self.mlp_norm = nn.RMSNorm(dims.dim, dims.norm_eps)
        self.gate_up = Linear(dims.dim, 2 * dims.ffn_dim, bias=False)
        self.down = Linear(dims.ffn_dim, dims.dim, bias=False)

    def forward(self, x: Tensor, key: Tensor | None, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Hidden states ``[microbatch, seq_len, dim]`` to the same shape.

        Args:
            key: the layer's dropout key, or None for no dropout.
            rotary: :func:`rotary_tables` of this ``seq_len``.
        """
        mixed = self._attention(self.attention_norm(x), rotary)
        x = x + dropout(mixed, self.dropout, key, ATTENTION)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + dropout(self.down(F.silu(gate) * up), self.dropout, key, MLP)

    def _attention(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        turned = self.heads + self.kv_heads
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        qk, v = heads.split((turned, self.kv_heads), dim=2)
        q, k = _rotate(qk, *rotary).split((self.heads, self.kv_heads), dim=2)
        # A copy of v alone lets go of the unrotated q and k, which a view of it would keep alive.
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.contiguous().transpose(1, 2)
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.kv_heads != self.heads
        )
        out: Tensor = self.attention_out(mixed.transpose(1, 2).flatten(2))
        return out
