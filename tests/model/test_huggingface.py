import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

from ray_train_geo.errors import CheckpointError, SpecError
from ray_train_geo.model.catalog import CATALOG, ModelDims, parameter_shapes
from ray_train_geo.model.huggingface import read_huggingface, write_huggingface
from ray_train_geo.model.stage import StageModule, build_stage

GPT = GPT2Config(
    n_layer=3, n_embd=32, n_head=4, n_positions=24, vocab_size=61, n_inner=96,
    layer_norm_epsilon=1e-3, resid_pdrop=0.2, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
LLAMA = LlamaConfig(
    num_hidden_layers=3, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=80, max_position_embeddings=24, vocab_size=61, rms_norm_eps=1e-3,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip


def variant(config: Any, **changes: Any) -> Any:
    return type(config)(**(config.to_dict() | changes))


CONFIGS = {
    "gpt-tied": GPT,
    "gpt-untied": variant(GPT, tie_word_embeddings=False),
    "llama-gqa": LLAMA,
    "llama-mha": variant(LLAMA, num_key_value_heads=4),
    "llama-tied": variant(LLAMA, tie_word_embeddings=True),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
TOKENS = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(0))


def make(config: Any, folder: Path, **save: Any) -> torch.nn.Module:
    """A random model by transformers, saved to ``folder``: all weights far from their defaults."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder, **save)
    return model


def stage_logits(dims: ModelDims, state: dict[str, Tensor]) -> Tensor:
    whole = StageModule(dims, 0, dims.layers).eval()
    whole.load_state_dict(state)
    with torch.no_grad():
        return whole(TOKENS)


@configs
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_reads_what_transformers_wrote(config: Any, shard: str, tmp_path: Path) -> None:
    model = make(config, tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    dims, state = read_huggingface(tmp_path)
    assert {n: tuple(t.shape) for n, t in state.items()} == parameter_shapes(dims)
    with torch.no_grad():
        expected = model(TOKENS).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(stage_logits(dims, state), expected, rtol=0, atol=1e-4)


@configs
def test_transformers_reads_what_we_wrote(config: Any, tmp_path: Path) -> None:
    make(config, tmp_path / "theirs")
    dims, state = read_huggingface(tmp_path / "theirs")
    write_huggingface(tmp_path / "ours", dims, state)
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values()), report
    with torch.no_grad():
        logits = model.eval()(TOKENS).logits
    torch.testing.assert_close(logits, stage_logits(dims, state), rtol=0, atol=1e-4)
    again_dims, again = read_huggingface(tmp_path / "ours")
    assert again_dims == dims
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_dims_come_from_the_config(tmp_path: Path) -> None:
    make(GPT, tmp_path / "gpt")
    assert read_huggingface(tmp_path / "gpt")[0] == ModelDims(
        "gpt", 3, 32, 4, 4, 96, 61, 24, True, dropout=0.2, norm_eps=1e-3
    )
    make(LLAMA, tmp_path / "llama")
    assert read_huggingface(tmp_path / "llama")[0] == ModelDims(
        "llama", 3, 32, 4, 2, 80, 61, 24, False, norm_eps=1e-3, rope_theta=500.0
    )


def test_reads_rope_theta_of_older_transformers(tmp_path: Path) -> None:
    make(LLAMA, tmp_path)
    change_config(tmp_path, rope_parameters=None, rope_scaling=None, rope_theta=777.0)
    assert read_huggingface(tmp_path)[0].rope_theta == 777.0


def test_reads_the_first_gpt2_files(tmp_path: Path) -> None:
    """As on the hub: the bare model's names, and attention's mask as a buffer."""
    make(GPT, tmp_path)
    _, state = read_huggingface(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
    save_file(old, tmp_path / "model.safetensors")
    _, again = read_huggingface(tmp_path)
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_half_precision_is_read_as_fp32_and_written_as_given(tmp_path: Path) -> None:
    dims = dataclasses.replace(CATALOG["llama-tiny"], layers=1)
    whole = build_stage(dims, 0, 1, seed=0).to(torch.bfloat16)
    write_huggingface(tmp_path, dims, whole.state_dict())
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype is torch.bfloat16
    _, state = read_huggingface(tmp_path)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(state[name], tensor.float())


def test_tokenizer_goes_along(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"far": 0, "away": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    dims = dataclasses.replace(CATALOG["gpt-tiny"], layers=1)
    state = build_stage(dims, 0, 1, seed=0).state_dict()
    write_huggingface(tmp_path / "model", dims, state, tmp_path / "words.json")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert loaded("away far").input_ids == [1, 0]


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (LLAMA, {"model_type": "mixtral"}, "'mixtral' is not supported; known: gpt2, llama"),
        (GPT, {"activation_function": "relu"}, "activation_function is 'relu'"),
        (GPT, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse"),
        (GPT, {"n_head": 5}, "5 heads must divide the width 32"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (LLAMA, {"attention_bias": True}, "attention_bias is True"),
        (LLAMA, {"head_dim": 16}, "head_dim is 16"),
        (LLAMA, {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'llama3'"),
        (LLAMA, {"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "'linear'"),
    ],
)
def test_what_we_do_not_compute_is_refused(
    config: Any, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make(config, tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(SpecError, match=message):
        read_huggingface(tmp_path)


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    weights_file = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"can't read .*config\.json"):
        read_huggingface(tmp_path)
    make(GPT, tmp_path)
    weights = load_file(weights_file)

    def refused(tensors: dict[str, Tensor], message: str) -> None:
        save_file(tensors, weights_file)
        with pytest.raises(CheckpointError, match=message):
            read_huggingface(tmp_path)

    name = "transformer.h.1.mlp.c_fc.weight"
    refused({n: t for n, t in weights.items() if n != name}, f"no '{name}'")
    refused(weights | {"transformer.adapter": torch.ones(2)}, "'transformer.adapter'")
    refused(weights | {name: torch.ones(2, 2)}, r"layers\.1\.up\.weight has shape \[2, 2\]")
    weights_file.write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="can't read the weights"):
        read_huggingface(tmp_path)
    weights_file.unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        read_huggingface(tmp_path)
    (tmp_path / "config.json").write_text("{}{}")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_huggingface(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match="has no 'n_embd'"):
        read_huggingface(tmp_path)


def test_an_incomplete_state_is_not_written(tmp_path: Path) -> None:
    dims = dataclasses.replace(CATALOG["gpt-tiny"], layers=2)
    state = build_stage(dims, 0, 2, seed=0).state_dict()
    short = {n: t for n, t in state.items() if n != "norm.bias"}
    with pytest.raises(CheckpointError, match=r"'norm\.bias' is missing"):
        write_huggingface(tmp_path / "out", dims, short)
    with pytest.raises(CheckpointError, match="'extra' has no place"):
        write_huggingface(tmp_path / "out", dims, state | {"extra": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"norm\.bias has shape \[3\]"):
        write_huggingface(tmp_path / "out", dims, state | {"norm.bias": torch.ones(3)})
    assert not (tmp_path / "out").exists()
