"""What a training log says of the job itself: model, batch, GPUs (level 0).

Read are the dumps of arguments that Megatron-LM and DeepSpeed print (``hidden_size ..... 8192``,
between ``---- arguments ----`` and ``---- end of arguments ----``, or behind ``config.py:print]``),
and the lines by which they and the Hugging Face Trainer tell vocabulary, ranks, parameters and
batch.  DeepSpeed's ``world_size`` leaves model parallelism out, so Megatron's goes first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from ray_train_geo.errors import InputError
from ray_train_geo.model.catalog import ModelDims, total_parameters

__all__ = ["RunSettings", "SettingsReader"]

_GPT2_VOCABULARY = 50257

# GPT-NeoX puts more dots and a remark behind the value.
_ARGUMENT = re.compile(r"(?:^|[\s>|\]:])([a-z][a-z_0-9]*) \.{2,} (\S+?)(?:\.{2,}\w*)?$")
_DEEPSPEED = re.compile(r"config\.py:\d+:print")
_HF_MODEL = re.compile(r"\b(n_embd|n_layer|n_positions|n_head|gradient_checkpointing)=(\w+)")
_HF_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_layers",
    "n_positions": "seq_length",
    "n_head": "num_attention_heads",
    "gradient_checkpointing": "checkpoint_activations",
}
_HF_BATCH = re.compile(r"Total train batch size .*= ([\d,]+)")
_WORLD = re.compile(r"using world size: (\d+)")
_VOCABULARY = re.compile(r"padded vocab \(size: \d+\).*\(new size: (\d+)\)")
_RANK = re.compile(
    r"number of parameters on \(tensor, pipeline\) model parallel rank \((\d+), *(\d+)\): (\d+)"
)
_TOTAL = re.compile(
    r"(?:total number of model parameters|number of trainable parameters|num of parameters)"
    r"\s*[:=]?\s*([\d,]+)",
    re.IGNORECASE,
)


_HINTS = (" ..", "parameters", "vocab", "world size", "train batch size", "verriding config")
"""Nearly all lines have none of these, and need no closer look."""


@dataclass(frozen=True, slots=True)
class RunSettings:
    """What a speed is computed with; None is unknown.

    Args:
        size_b: parameters, in billions (1e9).
        global_batch: sequences of a step.
        recompute: whether the backward computes the layers' forward again.
        notes: what was assumed for ``size_b``, in words.

    Raises:
        InputError: a figure is not positive.
    """

    size_b: float | None = None
    seq_len: int | None = None
    global_batch: int | None = None
    gpus: int | None = None
    recompute: bool | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("size_b", "seq_len", "global_batch", "gpus"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} must be a positive number, but is {value!r}")

    def under(self, given: RunSettings) -> RunSettings:
        """These settings, but for what ``given`` knows better."""
        known = {f.name: getattr(given, f.name) for f in fields(given) if f.name != "notes"}
        known = {name: value for name, value in known.items() if value is not None}
        return replace(self, **known, notes=given.notes if "size_b" in known else self.notes)


class SettingsReader:
    """Takes a log line by line, and knows at any time what it has told of the job."""

    def __init__(self) -> None:
        self._megatron = dict[str, str]()
        self._deepspeed = dict[str, str]()
        self._ranks = dict[tuple[str, str], int]()

    def line(self, text: str) -> None:
        """Any line of the log."""
        if not any(hint in text for hint in _HINTS):
            return
        if found := _ARGUMENT.search(text):
            dump = self._deepspeed if _DEEPSPEED.search(text) else self._megatron
            dump[found[1]] = found[2]
        elif found := _RANK.search(text):
            self._ranks[found[1], found[2]] = int(found[3])
        elif found := _VOCABULARY.search(text):
            self._megatron["padded_vocab_size"] = found[1]
        elif found := _WORLD.search(text):
            self._megatron.setdefault("world_size", found[1])
        elif found := _TOTAL.search(text):
            self._deepspeed["parameters"] = found[1]
        elif found := _HF_BATCH.search(text):
            self._deepspeed["train_batch_size"] = found[1]
        elif "verriding config" in text:
            self._megatron |= {_HF_NAMES[k]: v for k, v in _HF_MODEL.findall(text)}

    def settings(self) -> RunSettings:
        """What is known by now."""
        arguments, deepspeed = self._megatron, self._deepspeed
        size_b, notes = self._size_b()
        return RunSettings(
            size_b=size_b,
            seq_len=_first(arguments, "seq_length", "encoder_seq_length"),
            global_batch=_global_batch(arguments) or _count(deepspeed, "train_batch_size"),
            gpus=_first(arguments, "world_size", "global_num_gpus")
            or _count(deepspeed, "world_size"),
            recompute=_recompute(arguments),
            notes=notes,
        )

    def _size_b(self) -> tuple[float | None, tuple[str, ...]]:
        arguments = self._megatron
        layers, dim = _count(arguments, "num_layers"), _count(arguments, "hidden_size")
        if layers and dim and _dense(arguments):
            vocabulary = _first(arguments, "padded_vocab_size", "vocab_size")
            notes = () if vocabulary else (f"assumed GPT-2's vocabulary of {_GPT2_VOCABULARY}",)
            dims = _dims(arguments, layers, dim, vocabulary or _GPT2_VOCABULARY)
            return total_parameters(dims) / 1e9, notes
        # A tied matrix counts on the first stage and on the last.
        total = _count(self._deepspeed, "parameters") or sum(self._ranks.values())
        return total / 1e9 or None, ()


def _dims(arguments: Mapping[str, str], layers: int, dim: int, vocabulary: int) -> ModelDims:
    """Megatron-LM's GPT, or the llama that its arguments make of it."""
    heads = _count(arguments, "num_attention_heads") or 1
    grouped = arguments.get("group_query_attention") == "True"
    positions = _first(arguments, "max_position_embeddings", "seq_length") or 0
    learned = arguments.get("position_embedding_type", "learned_absolute") == "learned_absolute"
    return ModelDims(
        family="llama" if arguments.get("swiglu") == "True" else "gpt",
        layers=layers,
        dim=dim,
        heads=heads,
        kv_heads=(grouped and _count(arguments, "num_query_groups")) or heads,
        ffn_dim=_count(arguments, "ffn_hidden_size") or 4 * dim,
        vocab_size=vocabulary,
        max_seq_len=positions if learned else 0,
        tied_embeddings=arguments.get("untie_embeddings_and_output_weights") != "True",
    )


def _dense(arguments: Mapping[str, str]) -> bool:
    return arguments.get("num_experts", "None") in ("None", "0", "1", "[1]")


def _global_batch(arguments: Mapping[str, str]) -> int | None:
    """Sequences of a step; before Megatron-LM 2, of a replica times accumulation times replicas."""
    if total := _first(arguments, "global_batch_size", "train_batch_size"):
        return total
    batch, world = _count(arguments, "batch_size"), _count(arguments, "world_size")
    if not (batch and world):
        return None
    parts = (_count(arguments, name) or 1 for name in ("model_parallel_size", "pipe_parallel_size"))
    return batch * (_count(arguments, "gas") or 1) * (world // math.prod(parts))


def _recompute(arguments: Mapping[str, str]) -> bool | None:
    """Selective recomputation is of attention only, which the formulas leave out."""
    granularity = arguments.get("recompute_granularity")
    checkpointed = arguments.get("checkpoint_activations")
    if granularity is None and checkpointed is None:
        return None
    return granularity == "full" or (checkpointed or "").lower() == "true"


def _first(arguments: Mapping[str, str], *names: str) -> int | None:
    """What the first of ``names`` says that says anything."""
    return next(filter(None, (_count(arguments, name) for name in names)), None)


def _count(arguments: Mapping[str, str], name: str) -> int | None:
    """A positive whole number, or None: absent, ``None``, or damaged."""
    text = arguments.get(name, "").replace(",", "")
    return int(text) or None if text.isdecimal() else None
