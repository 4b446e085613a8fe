"""The job spec: what it accepts, what it fills in, and how it says no."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.errors import SpecError
from ray_train_geo.model.catalog import CATALOG
from ray_train_geo.spec import JobSpec, load_job, parse_job


def raw(**sections: Any) -> dict[str, Any]:
    return {
        "model": {"layers": 6, "dim": 32, "heads": 4},
        "data": {"path": "python://stdlib"},
        "training": {"steps": 10, "global_batch": 16, "microbatch": 2, "seq_len": 8},
        **sections,
    }


def refused(*overrides: str, **sections: Any) -> str:
    with pytest.raises(SpecError) as error:
        parse_job(raw(**sections), overrides)
    return str(error.value)


# ------------------------------------------------------------------ what is filled in


def test_defaults() -> None:
    job = parse_job(raw())
    assert job.parallelism.pipelines is None
    assert job.parallelism.schedule == "1f1b"
    assert job.training.precision == "fp32"
    assert job.training.total_microbatches == 8
    assert job.training.tokens_per_step == 128
    assert job.run.directory == Path("~/ray_train_geo/run").expanduser()
    assert job.fixed_pipelines() is None
    assert job.stage_boundaries() is None


def test_dimensions_follow_from_others() -> None:
    gpt = parse_job(raw()).dims(vocab_size=300)
    assert (gpt.family, gpt.ffn_dim, gpt.kv_heads, gpt.vocab_size) == ("gpt", 128, 4, 300)
    assert (gpt.max_seq_len, gpt.tied_embeddings, gpt.dropout) == (8, True, 0.0)
    llama = parse_job(raw(), ["model.family=llama", "model.kv_heads=2"]).dims()
    assert (llama.kv_heads, llama.ffn_dim) == (2, 96)  # 8/3 x 32, to a multiple of 32


def test_a_catalog_model_may_be_changed() -> None:
    base = CATALOG["gpt3-small"]
    plain = parse_job(raw(model={"name": "gpt3-small"})).dims(vocab_size=257)
    assert plain == base, "the catalog's vocabulary, not the tokenizer's"
    wider = parse_job(raw(model={"name": "gpt3-small", "dim": 960, "vocab_size": 300})).dims()
    assert (wider.dim, wider.ffn_dim, wider.vocab_size, wider.layers) == (960, 3840, 300, 12)
    long = parse_job(raw(model={"name": "gpt-tiny"}), ["training.seq_len=4096"]).dims()
    assert long.max_seq_len == 4096


@pytest.mark.parametrize(
    ("given", "full"),
    [
        ("[0, 3, 6]", [[0, 3, 6]]),
        ("[3]", [[0, 3, 6]]),
        ("[1, 2]", [[0, 1, 2, 6]]),
        ("[]", [[0, 6]]),
        ("[[0, 2, 6], [5]]", [[0, 2, 6], [0, 5, 6]]),
        ("[[], [0, 6]]", [[0, 6], [0, 6]]),
    ],
)
def test_the_outer_stage_boundaries_may_be_left_out(given: str, full: list[list[int]]) -> None:
    job = parse_job(raw(), [f"parallelism.layers={given}"])
    if job.parallelism.layers:
        assert job.stage_boundaries() == full


@pytest.mark.parametrize(
    ("parallelism", "pipelines"),
    [
        ({"pipelines": 3}, 3),
        ({"microbatches": [5, 3]}, 2),
        ({"layers": [[3], [2], [1]]}, 3),
        ({"layers": [3]}, None),
        ("auto", None),
        ({"pipelines": "auto", "stages": "auto", "layers": "auto"}, None),
    ],
)
def test_what_fixes_the_number_of_pipelines(parallelism: Any, pipelines: int | None) -> None:
    assert parse_job(raw(parallelism=parallelism)).fixed_pipelines() == pipelines


def test_numbers_as_yaml_gives_them(tmp_path: Path) -> None:
    """YAML 1.1 reads 3e-4 as a string."""
    path = tmp_path / "job.yaml"
    path.write_text(
        "model: {name: gpt-tiny}\ndata: {path: x}\n"
        "training: {steps: 1, global_batch: 1, seq_len: 4, lr: 3e-4, eps: 1e-8}\n"
    )
    training = load_job(path).training
    assert (training.lr, training.eps) == (3e-4, 1e-8)


def test_yaml_round_trip(tmp_path: Path) -> None:
    job = parse_job(
        raw(), ["parallelism.layers=[[2],[4]]", "parallelism.microbatches=[3,5]", "run.name=a.b-1"]
    )
    path = tmp_path / "job.yaml"
    path.write_text(job.to_yaml())
    assert load_job(path) == job


@given(
    st.integers(1, 6),
    st.integers(1, 8),
    st.sampled_from(["fp32", "bf16", "fp16"]),
    st.floats(0, 0.99),
    st.integers(0, 2**63 - 1),
)
def test_any_valid_job_round_trips(
    stages: int, pipelines: int, precision: str, dropout: float, seed: int
) -> None:
    job = parse_job(
        raw(),
        [
            f"parallelism.stages={stages}",
            f"parallelism.pipelines={pipelines}",
            f"training.precision={precision}",
            f"model.dropout={dropout!r}",
            f"training.seed={seed}",
        ],
    )
    assert JobSpec.model_validate(json.loads(job.model_dump_json())) == job
    assert job.model.dropout == dropout


def test_every_field_is_documented() -> None:
    def walk(model: Any, prefix: str = "") -> None:
        for name, field in model.model_fields.items():
            assert field.description, f"{prefix}{name}"
            if hasattr(field.annotation, "model_fields"):
                walk(field.annotation, f"{prefix}{name}.")

    walk(JobSpec)


# ------------------------------------------------------------------ --set


def test_overrides() -> None:
    job = parse_job(
        raw(parallelism="auto"),
        [
            "training.steps=7",
            "training.lr=1e-2",
            "parallelism.pipelines=2",
            "scaling.resources_per_worker={CPU: 0.5}",
            "data.path=a=b",
            "training.loss_scale.initial=8",
            "run.name='5'",
            "training.steps=9",
        ],
    )
    assert job.training.steps == 9, "the last one counts"
    assert job.training.lr == 0.01
    assert job.parallelism.pipelines == 2
    assert job.scaling.resources_per_worker == {"CPU": 0.5}
    assert job.data.path == "a=b"
    assert job.training.loss_scale.initial == 8
    assert job.run.name == "5"


def test_overrides_do_not_change_what_they_are_given() -> None:
    given = raw()
    parse_job(given, ["training.steps=99", "checkpoint.keep=9"])
    assert given == raw()


@pytest.mark.parametrize("text", ["training.steps", "=3", "training.=3", ".steps=3", ""])
def test_an_override_without_key_or_value(text: str) -> None:
    assert "write it as section.field=value" in refused(text)


def test_an_override_that_is_no_yaml() -> None:
    assert "'[1, 2' is not a valid YAML value" in refused("parallelism.layers=[1, 2")


# ------------------------------------------------------------------ how it says no


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.stepz=3", "training.stepz: no such field; did you mean 'steps'?"),
        ("trainign.steps=3", "trainign: no such field; did you mean 'training'?"),
        ("training.loss_scale.begin=3", "training.loss_scale.begin: no such field; known: "),
        ("training.steps=many", "training.steps: "),
        ("training.steps=0", "training.steps: Input should be greater than or equal to 1"),
        ("training.lr=.inf", "training.lr: "),
        ("training.lr=.nan", "training.lr: "),
        ("training.microbatch=3", "global_batch (16) is not divisible by microbatch (3)"),
        ("training.min_lr=1", "min_lr (1.0) is larger than lr (0.0003)"),
        ("training.betas=[0.9, 1.0]", "betas must be in [0, 1)"),
        ("training.precision=fp8", "training.precision: Input should be 'fp32', 'bf16' or 'fp16'"),
        ("model.name=gpt3-smal", "unknown model name 'gpt3-smal'; did you mean 'gpt3-small'?"),
        ("model.heads=5", "heads (5) must divide dim (32)"),
        ("model.kv_heads=2", "kv_heads is for llama"),
        ("model.dropout=1", "model.dropout: "),
        ("model.dim=null", "missing: dim"),
        ("data.path=null", "data.path: "),
        ("parallelism.stages=7", "stages (7) is more than the model's layers (6)"),
        ("parallelism.pipelines=9", "pipelines (9) is more than the microbatches of a step (8"),
        ("parallelism.layers=[0,3,3,6]", "boundaries must grow from 0 to the model's 6 layers"),
        ("parallelism.layers=[0,9]", "boundaries must grow"),
        ("parallelism.layers=[[1,2],[4,3]]", "of pipeline 1 is [4, 3]"),
        ("parallelism.microbatches=[4,3]", "8"),
        ("parallelism.microbatches=[8,0]", "microbatches"),
        ("parallelism.schedule=zigzag", "parallelism.schedule: Input should be 'auto', 'gpipe',"),
        ("scaling.max_devices=0", "scaling.max_devices: "),
        ("scaling.resources_per_worker={CPU: 0}", "asks for nothing"),
        ("scaling.resources_per_worker={CPU: -1}", "can't be negative"),
        ("run.name=a/b", "run.name: "),
        ("run.storage_path=s3://b/x", "must be a folder on the head node, not a URL"),
        ("checkpoint.keep=0", "checkpoint.keep: "),
    ],
)
def test_one_wrong_field_is_one_line(override: str, says: str) -> None:
    message = refused(override)
    assert says in message
    assert "\n" not in message
    assert "pydantic" not in message


def test_fields_that_contradict_each_other() -> None:
    assert "stages is 3" in refused("parallelism.layers=[3]", "parallelism.stages=3")
    assert "layers is for 2 pipelines, but there are 3" in refused(
        "parallelism.layers=[[3],[2]]", "parallelism.pipelines=3"
    )
    assert "microbatches is for 2 pipelines, but there are 1" in refused(
        "parallelism.microbatches=[4,4]", "parallelism.pipelines=1"
    )
    assert "set parallelism.gradient_sync to sharded_ps, central_ps or auto" in refused(
        "codecs.gradients=int8", "parallelism.gradient_sync=allreduce"
    )
    assert "max_devices (1) is less than min_devices (2)" in refused(
        "scaling.min_devices=2", "scaling.max_devices=1"
    )
    assert "emulate_links needs the links" in refused("scaling.emulate_links=true")
    assert "emulate_links is for workers on CPUs" in refused(
        "scaling.emulate_links=true",
        "scaling.topology=links.yaml",
        "scaling.resources_per_worker={GPU: 1}",
    )
    assert "zero-bubble computes weight gradients apart, which training.compile" in refused(
        "parallelism.schedule=zero-bubble", "training.compile=true"
    )
    assert "must divide heads" in refused("model.family=llama", "model.kv_heads=3")
    assert "must be even" in refused("model.family=llama", "model.dim=12")


def test_every_wrong_field_has_its_line() -> None:
    message = refused("training.stepz=3", "model.dim=-1", "checkpoint.keep=x")
    assert len(message.splitlines()) == 3
    for where in ("training.stepz", "model.dim", "checkpoint.keep"):
        assert where in message


def test_missing_sections_are_named() -> None:
    with pytest.raises(SpecError) as error:
        parse_job({"model": {"name": "gpt2"}})
    assert "data: required, but missing" in str(error.value)
    assert "training: required, but missing" in str(error.value)


@pytest.mark.parametrize("content", [None, [], "model", 3])
def test_what_is_no_mapping(content: Any) -> None:
    with pytest.raises(SpecError, match="a job spec is a mapping with model, data and training"):
        parse_job(content)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: 1\nmodel: [1, 2", "is not valid YAML: line 2, column 13: expected ',' or ']'"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"", "a job spec is a mapping"),
        (b"!!python/object:os.system {}", "is not valid YAML"),
        (b"model: &a [*a]", "a job spec is plain data: Circular reference"),
        (b"2020-01-01: x", "a job spec is plain data: keys must be"),
    ],
)
def test_a_file_that_is_no_job(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=says) as error:
        load_job(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="can't read the job spec"):
        load_job(tmp_path / "none.yaml")
    with pytest.raises(SpecError, match="can't read the job spec"):
        load_job(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["local_sgd.inner_step=4"], "did you mean 'inner_steps'"),
        (["local_sgd.fragments=60"], "fragments (60) is more than inner_steps (50)"),
        (["local_sgd.delay_steps=50"], "delay_steps (50) must be less than inner_steps (50)"),
        (["local_sgd.fragments=7"], "more than the model's layers"),
        (["local_sgd.mix=0.3", "training.precision=fp16"], "training.precision to bf16 or fp32"),
    ],
)
def test_local_sgd_that_can_not_be(overrides: list[str], message: str) -> None:
    raw = {
        "model": {"layers": 4, "dim": 8, "heads": 2},
        "data": {"path": "x"},
        "training": {"steps": 3, "global_batch": 4, "seq_len": 8},
    }
    assert parse_job(raw).local_sgd is None
    with pytest.raises(SpecError, match=re.escape(message)):
        parse_job(raw, overrides)
