"""How fast, how efficient and how dear a step is, as the field computes it (level 0).

    step time --> PFLOPS --> hardware efficiency     counts recomputed layers; no head (DT-FM)
              --> TFLOPs per GPU                     8 x parameters x tokens (BigScience)
              --> MFU                                counts the head; nothing recomputed (PaLM)
              --> tokens/s --> $ per million tokens

The first three disagree by design: say which one a figure is.  Arguments are positive numbers;
anything else is an ``InputError``.
"""

from __future__ import annotations

import math

from ray_train_geo.errors import InputError
from ray_train_geo.model.catalog import ModelDims, head_flops, step_flops

__all__ = [
    "checkpoint_bytes",
    "checkpoint_save_s",
    "dollars_per_million_tokens",
    "dollars_per_step",
    "gpt_parameters",
    "hardware_efficiency",
    "mfu",
    "model_tflops_per_gpu",
    "pflops",
    "step_pflop",
    "tokens_per_s",
]

_WEIGHT_BYTES = 2  # fp16 or bf16
_OPTIMIZER_BYTES = 12  # fp32: weight, first and second moment


def step_pflop(
    *, dims: ModelDims, seq_len: int, global_batch: int, recompute: bool = True
) -> float:
    """PFLOP (1e15) that one step's layers compute, all devices together.

    For gpt ``96 L B s d^2 (1 + s / 6d) / 1e15``, and 72 for 96 without recomputation: a forward,
    a backward of two, and the forward again.  Embedding and head are not counted, as in DT-FM
    (Yuan et al., NeurIPS 2022), which takes the formula from Megatron-LM (Narayanan et al.,
    SC 2021, appendix).
    """
    _positive(seq_len=seq_len, global_batch=global_batch)
    head = 3 * head_flops(dims, seq_len, global_batch)
    return (step_flops(dims, seq_len, global_batch, recompute) - head) / 1e15


def pflops(*, pflop: float, step_s: float) -> float:
    """PFLOP/s of a step of ``pflop``."""
    _positive(pflop=pflop, step_s=step_s)
    return pflop / step_s


def hardware_efficiency(*, pflops: float, peak_flops_per_s: float) -> float:
    """Share of the peak of all devices together that ``pflops`` (PFLOP/s) is; 1 is all of it."""
    _positive(pflops=pflops, peak_flops_per_s=peak_flops_per_s)
    return pflops * 1e15 / peak_flops_per_s


def mfu(
    *, dims: ModelDims, seq_len: int, global_batch: int, step_s: float, peak_flops_per_s: float
) -> float:
    """Model FLOPs utilisation: FLOPs that the model asks for over those that the peak allows.

    Head and attention count, recomputation does not: it is work, but not the model's
    (Chowdhery et al., "PaLM", 2022, appendix B).

    Args:
        peak_flops_per_s: of all devices together.
    """
    _positive(
        seq_len=seq_len,
        global_batch=global_batch,
        step_s=step_s,
        peak_flops_per_s=peak_flops_per_s,
    )
    wanted = step_flops(dims, seq_len, global_batch, recompute=False)
    return wanted / (step_s * peak_flops_per_s)


def model_tflops_per_gpu(
    *,
    size_b: float,
    seq_len: int,
    global_batch: float,
    step_s: float,
    gpus: int,
    recompute: bool = True,
) -> float:
    """TFLOP/s of one GPU by BigScience's formula: two FLOPs per parameter, token and pass.

    ``size_b * 4 * 2 * seq_len * global_batch / (step_s * gpus * 1e3)``: four passes with
    recomputation (forward, twice that backward, forward again), three without.  Attention's
    ``s^2`` term is left out.  (BigScience workshop, GPT-2 notes, "Metrics".)

    Args:
        size_b: parameters, in billions (1e9).
    """
    _positive(size_b=size_b, seq_len=seq_len, global_batch=global_batch, step_s=step_s, gpus=gpus)
    passes = 4 if recompute else 3
    return size_b * passes * 2 * seq_len * global_batch / (step_s * gpus * 1e3)


def gpt_parameters(*, layers: int, dim: int, vocab_size: int, max_seq_len: int) -> int:
    """Parameters of a GPT: ``V h + s h + L (12 h^2 + 13 h) + 2 h``.

    Token and position embeddings; qkv, projection and MLP with biases, and two norms, of each
    layer; the final norm.  The output matrix is the token embedding's.  (Narayanan et al.,
    SC 2021, eq. 2, which leaves the ``2 h`` out.)
    """
    _positive(layers=layers, dim=dim, vocab_size=vocab_size, max_seq_len=max_seq_len)
    return (vocab_size + max_seq_len) * dim + layers * (12 * dim**2 + 13 * dim) + 2 * dim


def tokens_per_s(*, seq_len: int, global_batch: float, step_s: float) -> float:
    """Tokens a second, all devices together."""
    _positive(seq_len=seq_len, global_batch=global_batch, step_s=step_s)
    return seq_len * global_batch / step_s


def dollars_per_step(*, dollars_per_hour: float, step_s: float) -> float:
    """What a step costs on devices that cost ``dollars_per_hour`` together."""
    _positive(step_s=step_s)
    _not_negative(dollars_per_hour=dollars_per_hour)
    return dollars_per_hour * step_s / 3600


def dollars_per_million_tokens(*, dollars_per_hour: float, tokens_per_s: float) -> float:
    """What a million tokens cost on devices that cost ``dollars_per_hour`` together."""
    _positive(tokens_per_s=tokens_per_s)
    _not_negative(dollars_per_hour=dollars_per_hour)
    return dollars_per_hour * 1e6 / (3600 * tokens_per_s)


def checkpoint_bytes(*, parameters: float) -> float:
    """Bytes of a full checkpoint: 2 per parameter for the weights, 12 for Adam's fp32 state."""
    _positive(parameters=parameters)
    return parameters * (_WEIGHT_BYTES + _OPTIMIZER_BYTES)


def checkpoint_save_s(
    *,
    checkpoint_bytes: float,
    writer_bytes_per_s: float,
    writers: int = 1,
    storage_bytes_per_s: float = math.inf,
) -> float:
    """Seconds until ``writers``, each with an equal part, have written a checkpoint.

    Args:
        writer_bytes_per_s: what one writer reaches alone.
        storage_bytes_per_s: what the storage takes from all writers together.
    """
    _positive(
        checkpoint_bytes=checkpoint_bytes, writer_bytes_per_s=writer_bytes_per_s, writers=writers
    )
    if not storage_bytes_per_s > 0:
        raise InputError(f"storage_bytes_per_s must be above 0, but is {storage_bytes_per_s!r}")
    return checkpoint_bytes / min(writers * writer_bytes_per_s, storage_bytes_per_s)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{name} must be a positive number, but is {value!r}")


def _not_negative(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{name} must be 0 or a positive number, but is {value!r}")
