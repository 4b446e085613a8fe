"""Weights from and to Hugging Face's format, for GPT-2 and Llama: config.json and safetensors.

``transformers`` is not needed: what is read and written here is the files' format only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ray_train_geo.errors import CheckpointError, SpecError
from ray_train_geo.model.catalog import ModelDims, parameter_shapes

__all__ = ["read_huggingface", "write_huggingface"]

# Ours -> theirs, inside one layer.  A Llama's fused matrices are theirs stacked by rows.
_GPT_LAYER = {
    "attention_norm": "ln_1",
    "qkv": "attn.c_attn",
    "attention_out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}
_LLAMA_LAYER = {
    "attention_norm": ("input_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_out": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
_GPT_OUTER = {
    "tokens.weight": "transformer.wte.weight",
    "positions.weight": "transformer.wpe.weight",
    "norm.weight": "transformer.ln_f.weight",
    "norm.bias": "transformer.ln_f.bias",
    "output.weight": "lm_head.weight",
}
_LLAMA_OUTER = {
    "tokens.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# Buffers that old files hold beside the weights.
_BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")


def read_huggingface(folder: Path) -> tuple[ModelDims, dict[str, Tensor]]:
    """Dimensions and weights of a GPT-2 or Llama model folder, as ``transformers`` saves it.

    Args:
        folder: holds ``config.json``, and ``model.safetensors`` or its sharded index.

    Returns:
        The dimensions, and fp32 CPU tensors by canonical name
        (:func:`~ray_train_geo.model.catalog.parameter_shapes`).

    Raises:
        CheckpointError: a file or a weight is missing, unreadable, left over or of another shape.
        SpecError: the config asks for something that this package's models don't compute.
    """
    folder = Path(folder)
    dims = _dims_of(_read_json(folder / "config.json"), folder)
    theirs = _read_weights(folder)
    if dims.family == "gpt":
        # The first GPT-2 files have the bare model's names.
        theirs = {
            name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": t
            for name, t in theirs.items()
        }
    state = {}
    for name, shape in parameter_shapes(dims).items():
        rows = []
        for source in _their_names(dims, name):
            if source not in theirs:
                raise CheckpointError(f"{folder}: the weights have no {source!r}; is it complete?")
            rows.append(theirs.pop(source).float())
        tensor = rows[0] if len(rows) == 1 else torch.cat(rows)
        if _is_conv1d(dims, name):
            tensor = tensor.t().contiguous()
        if tensor.shape != shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {list(tensor.shape)}, but config.json says "
                f"{list(shape)}; the weights and the config are not of one model"
            )
        state[name] = tensor
    if dims.tied_embeddings:
        theirs.pop("lm_head.weight", None)
    if theirs:
        raise CheckpointError(
            f"{folder}: {len(theirs)} weights have no place in a {dims.family} model, such as "
            f"{min(theirs)!r}; only plain GPT-2 and Llama causal language models can be read"
        )
    return dims, state


def write_huggingface(
    folder: Path, dims: ModelDims, state: Mapping[str, Tensor], tokenizer_json: Path | None = None
) -> None:
    """Write a folder that ``transformers.AutoModelForCausalLM`` loads.

    Args:
        folder: made if missing; files in it are replaced.
        state: every parameter of the model by canonical name; their dtype is kept.
        tokenizer_json: a Hugging Face ``tokenizers`` file to put beside the weights.

    Raises:
        CheckpointError: ``state`` is not exactly a model of ``dims``.
    """
    folder = Path(folder)
    shapes = parameter_shapes(dims)
    if shapes.keys() != state.keys():
        wrong = min(shapes.keys() ^ state.keys())
        what = "is missing from" if wrong in shapes else "has no place in"
        raise CheckpointError(f"can't write {folder}: {wrong!r} {what} the model")
    theirs: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        tensor = state[name].detach().cpu()
        if tensor.shape != shape:
            raise CheckpointError(
                f"can't write {folder}: {name} has shape {list(tensor.shape)}, not {list(shape)}"
            )
        if _is_conv1d(dims, name):
            tensor = tensor.t()
        targets = _their_names(dims, name)
        parts = (tensor,) if len(targets) == 1 else tensor.split(_row_counts(dims, name))
        # Clones: parts of one tensor share memory, which safetensors refuses.
        theirs |= {
            target: part.clone(memory_format=torch.contiguous_format)
            for target, part in zip(targets, parts, strict=True)
        }
    config = _config_of(dims) | {"dtype": str(theirs[targets[0]].dtype).removeprefix("torch.")}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(theirs, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)
    if tokenizer_json is not None:
        shutil.copyfile(tokenizer_json, folder / "tokenizer.json")
        _write_json(
            folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}
        )


def _their_names(dims: ModelDims, name: str) -> tuple[str, ...]:
    """The Hugging Face weights that make up our ``name``, stacked by rows."""
    gpt = dims.family == "gpt"
    outer = _GPT_OUTER if gpt else _LLAMA_OUTER
    if name in outer:
        return (outer[name],)
    _, layer, module, kind = name.split(".")
    if gpt:
        return (f"transformer.h.{layer}.{_GPT_LAYER[module]}.{kind}",)
    return tuple(f"model.layers.{layer}.{part}.{kind}" for part in _LLAMA_LAYER[module])


def _is_conv1d(dims: ModelDims, name: str) -> bool:
    """GPT-2 keeps its layers' matrices as ``[in, out]``."""
    return (
        dims.family == "gpt"
        and name.startswith("layers.")
        and name.endswith((".qkv.weight", ".attention_out.weight", ".up.weight", ".down.weight"))
    )


def _row_counts(dims: ModelDims, name: str) -> list[int]:
    """Rows of each part of a fused Llama matrix."""
    kv = dims.kv_heads * dims.head_dim
    return [dims.dim, kv, kv] if ".qkv." in name else [dims.ffn_dim, dims.ffn_dim]


def _dims_of(config: Mapping[str, Any], folder: Path) -> ModelDims:
    readers = {"gpt2": _gpt_dims, "llama": _llama_dims}
    kind = config.get("model_type")
    if kind not in readers:
        raise SpecError(
            f"{folder}/config.json: model_type {kind!r} is not supported; known: gpt2, llama"
        )
    try:
        dims = readers[kind](config, f"{folder}/config.json")
    except KeyError as e:
        raise CheckpointError(f"{folder}/config.json has no {e.args[0]!r}") from None
    if dims.dim % dims.heads or dims.heads % dims.kv_heads:
        raise SpecError(
            f"{folder}/config.json: {dims.heads} heads must divide the width {dims.dim}, and "
            f"{dims.kv_heads} key/value heads the heads"
        )
    return dims


def _gpt_dims(config: Mapping[str, Any], where: str) -> ModelDims:
    _require(config, where, "activation_function", "gelu_new", "gelu_new", "gelu_pytorch_tanh")
    _require(config, where, "scale_attn_weights", True, True)
    _require(config, where, "scale_attn_by_inverse_layer_idx", False, False)
    _require(config, where, "add_cross_attention", False, False)
    dim = config["n_embd"]
    return ModelDims(
        family="gpt",
        layers=config["n_layer"],
        dim=dim,
        heads=config["n_head"],
        kv_heads=config["n_head"],
        ffn_dim=config.get("n_inner") or 4 * dim,
        vocab_size=config["vocab_size"],
        max_seq_len=config["n_positions"],
        tied_embeddings=config.get("tie_word_embeddings", True),
        dropout=config.get("resid_pdrop", 0.1),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        init_std=config.get("initializer_range", 0.02),
    )


def _llama_dims(config: Mapping[str, Any], where: str) -> ModelDims:
    dim, heads = config["hidden_size"], config["num_attention_heads"]
    _require(config, where, "hidden_act", "silu", "silu")
    _require(config, where, "attention_bias", False, False)
    _require(config, where, "mlp_bias", False, False)
    _require(config, where, "head_dim", None, None, dim // heads)
    # transformers 5 has rope_parameters; before it, rope_theta and rope_scaling.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise SpecError(f"{where}: scaled RoPE ({kind!r}) is not supported; only plain RoPE is")
    return ModelDims(
        family="llama",
        layers=config["num_hidden_layers"],
        dim=dim,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        ffn_dim=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        max_seq_len=config.get("max_position_embeddings", 2048),
        tied_embeddings=config.get("tie_word_embeddings", False),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
        init_std=config.get("initializer_range", 0.02),
    )


def _require(
    config: Mapping[str, Any], where: str, field: str, default: object, *supported: object
) -> None:
    value = config.get(field, default)
    if value not in supported:
        known = " or ".join(repr(s) for s in supported)
        raise SpecError(f"{where}: {field} is {value!r}, but only {known} is supported")


def _config_of(dims: ModelDims) -> dict[str, Any]:
    common = {
        "vocab_size": dims.vocab_size,
        "tie_word_embeddings": dims.tied_embeddings,
        "initializer_range": dims.init_std,
        # Not known here; left out, transformers would put its own vocabulary's.
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if dims.family == "gpt":
        return common | {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "activation_function": "gelu_new",
            "n_layer": dims.layers,
            "n_embd": dims.dim,
            "n_head": dims.heads,
            "n_inner": dims.ffn_dim,
            "n_positions": dims.max_seq_len,
            "layer_norm_epsilon": dims.norm_eps,
            "embd_pdrop": dims.dropout,
            "resid_pdrop": dims.dropout,
            "attn_pdrop": 0.0,
        }
    return common | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "num_hidden_layers": dims.layers,
        "hidden_size": dims.dim,
        "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_heads,
        "intermediate_size": dims.ffn_dim,
        "max_position_embeddings": dims.max_seq_len,
        "rms_norm_eps": dims.norm_eps,
        "rope_theta": dims.rope_theta,
    }


def _read_weights(folder: Path) -> dict[str, Tensor]:
    files = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not (folder / files[0]).exists():
        if not index.exists():
            raise CheckpointError(
                f"{folder} has neither model.safetensors nor {index.name}; weights in other "
                "formats must be saved as safetensors first"
            )
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map")
        files = sorted(set(weight_map.values()))
    weights: dict[str, Tensor] = {}
    for name in files:
        path = folder / name
        try:
            weights.update(_read_safetensors(path))
        except (OSError, SafetensorError) as e:
            raise CheckpointError(f"can't read the weights in {path}: {e}") from None
    return weights


def _read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        for name in names:
            if not name.endswith(_BUFFERS):
                yield name, file.get_tensor(name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise CheckpointError(f"can't read {path}: {e.strerror or e}") from None
    except ValueError as e:
        raise CheckpointError(f"{path} is not valid JSON: {e}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
