"""What a log tells of its job: the dumps of arguments of Megatron-LM, DeepSpeed and others."""

from __future__ import annotations

import math

import pytest

from ray_train_geo.errors import InputError
from ray_train_geo.model.catalog import CATALOG, total_parameters
from ray_train_geo.observe.log_settings import RunSettings, SettingsReader


def read(*lines: str) -> RunSettings:
    reader = SettingsReader()
    for line in lines:
        reader.line(line)
    return reader.settings()


def arguments(**values: object) -> list[str]:
    return [f"  {name} {'.' * (48 - len(name))} {value}" for name, value in values.items()]


GPT2 = {
    "num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "seq_length": 1024,
    "max_position_embeddings": 1024, "padded_vocab_size": 50257,
}  # fmt: skip


def test_nothing_is_known_of_nothing() -> None:
    assert read() == read("a line", "dots ... of all kinds", "x .. y z") == RunSettings()


def test_megatrons_arguments() -> None:
    found = read(
        *arguments(**GPT2, world_size=64, global_batch_size=1024, recompute_granularity="full")
    )
    assert found == RunSettings(0.124439808, 1024, 1024, 64, True)


@pytest.mark.parametrize("prefix", ["> ", "[default0]:", "[rank0]:", "0: "])
def test_what_launchers_put_before_lines(prefix: str) -> None:
    found = read(*(prefix + line for line in arguments(**GPT2, world_size=8)))
    assert (found.size_b, found.gpus) == (0.124439808, 8)


def test_the_padded_vocabulary_counts() -> None:
    del_padded = {k: v for k, v in GPT2.items() if k != "padded_vocab_size"}
    lines = arguments(**del_padded, vocab_size=50257)
    assert read(*lines).size_b == 0.124439808
    padded = read(*lines, " > padded vocab (size: 50257) with 47 dummy tokens (new size: 50304)")
    assert padded.size_b == pytest.approx(0.124439808 + 47 * 768e-9)
    assumed = read(*arguments(**del_padded, vocab_size="None"))
    assert assumed.size_b == 0.124439808
    assert assumed.notes == ("assumed GPT-2's vocabulary of 50257",)


def test_a_llama_by_megatrons_arguments() -> None:
    dims = CATALOG["llama3-8b"]
    found = read(
        *arguments(
            num_layers=dims.layers,
            hidden_size=dims.dim,
            num_attention_heads=dims.heads,
            group_query_attention=True,
            num_query_groups=dims.kv_heads,
            ffn_hidden_size=dims.ffn_dim,
            swiglu=True,
            untie_embeddings_and_output_weights=True,
            position_embedding_type="rope",
            padded_vocab_size=dims.vocab_size,
        )
    )
    assert found.size_b == total_parameters(dims) / 1e9


def test_rotary_positions_are_no_parameters() -> None:
    rotary = read(*arguments(**GPT2, position_embedding_type="rope"))
    assert rotary.size_b == pytest.approx(0.124439808 - 1024 * 768e-9)


def test_a_mixture_of_experts_is_not_counted_by_its_width() -> None:
    assert read(*arguments(**GPT2, num_experts=8)).size_b is None
    assert read(*arguments(**GPT2, num_experts="[1]")).size_b == 0.124439808


def test_parameters_by_rank_are_summed_once_each() -> None:
    line = " > number of parameters on (tensor, pipeline) model parallel rank ({}, {}): {}"
    ranks = [line.format(t, p, 10**9 + p) for p in range(2) for t in range(4)]
    assert read(*ranks, *ranks).size_b == pytest.approx(8 + 4e-9)


@pytest.mark.parametrize(
    "line",
    [
        "Total number of model parameters: 16,345,177",
        "  Number of trainable parameters = 16,345,177",
        "num of parameters 16345177",
    ],
)
def test_totals_in_words(line: str) -> None:
    assert read(line).size_b == 0.016345177


def test_the_batch_before_megatron_2() -> None:
    # Rows of BigScience's: a pipeline of 16, and ZeRO.
    pipeline = {"batch_size": 4, "gas": 256, "model_parallel_size": 4, "pipe_parallel_size": 16}
    assert read(*arguments(**pipeline, world_size=64)).global_batch == 1024
    zero = {"batch_size": 48, "model_parallel_size": 4}
    assert read(*arguments(**zero, world_size=64)).global_batch == 768
    assert read(*arguments(**zero)).global_batch is None


def test_deepspeeds_world_leaves_model_parallelism_out() -> None:
    prefix = "[2021-05-27 19:49:22,949] [INFO] [config.py:904:print] "
    deepspeed = [prefix + x for x in arguments(train_batch_size=1024, world_size=1)]
    assert read(*deepspeed) == RunSettings(global_batch=1024, gpus=1)
    world = "using world size: 64 and model-parallel size: 4"
    assert read(world, *deepspeed).gpus == 64
    assert read(*arguments(world_size=64, global_batch_size=32), *deepspeed).global_batch == 32


def test_gpt_neox_puts_a_remark_behind() -> None:
    line = "  {} {} {}{}updated"
    lines = [
        line.format(name, "." * 20, value, "." * 24)
        for name, value in (GPT2 | {"train_batch_size": 32, "global_num_gpus": 8}).items()
    ]
    assert read(*lines) == RunSettings(0.124439808, 1024, 32, 8)


def test_the_hugging_face_trainer() -> None:
    found = read(
        "INFO:__main__:Overriding config: n_embd=768,n_head=12,n_layer=12,n_positions=1024,"
        "gradient_checkpointing=true,use_cache=False",
        "  Total train batch size (w. parallel, distributed & accumulation) = 1,024",
    )
    assert found.size_b == 0.124439808
    assert (found.seq_len, found.global_batch, found.recompute) == (1024, 1024, True)


@pytest.mark.parametrize(
    ("values", "recompute"),
    [
        ({}, None),
        ({"checkpoint_activations": True}, True),
        ({"checkpoint_activations": False}, False),
        ({"recompute_granularity": "full"}, True),
        ({"recompute_granularity": "selective"}, False),
        ({"recompute_granularity": "None"}, False),
    ],
)
def test_recomputation(values: dict[str, object], recompute: bool | None) -> None:
    assert read(*arguments(**values)).recompute is recompute


def test_damaged_values_are_unknown() -> None:
    lines = arguments(world_size="None", seq_length="10x", global_batch_size="-4", hidden_size=0)
    assert read(*lines) == RunSettings()


def test_what_is_given_goes_before_what_is_read() -> None:
    log = RunSettings(1.0, 1024, None, 64, None, ("assumed something",))
    assert log.under(RunSettings()) == log
    assert log.under(RunSettings(gpus=8, recompute=False)) == RunSettings(
        1.0, 1024, None, 8, False, ("assumed something",)
    )
    assert log.under(RunSettings(size_b=2.0)).notes == ()


@pytest.mark.parametrize("wrong", [0, -1.5, math.nan, math.inf])
def test_figures_must_be_positive(wrong: float) -> None:
    with pytest.raises(InputError, match="size_b must be a positive number"):
        RunSettings(size_b=wrong)
