"""The command line, in this process: what each command prints, and its exit code."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from ray_train_geo.cli import app
from ray_train_geo.errors import SpecError
from ray_train_geo.model.stage import build_stage
from ray_train_geo.observe.record import metrics_record
from ray_train_geo.observe.run_directory import RunDirectory
from ray_train_geo.spec import JobSpec, load_job
from ray_train_geo.training.checkpoint import CheckpointStore, read_manifest, read_tensors

TOPOLOGY = """
devices:
  - {id: a/0, node: a, region: ohio, type: A100, flops_per_s: 1.0e+12, memory_bytes: 8.0e+9}
  - {id: a/1, node: a, region: ohio, type: A100, flops_per_s: 1.0e+12, memory_bytes: 8.0e+9}
  - {id: b/0, node: b, region: oregon, type: V100, flops_per_s: 4.0e+11, memory_bytes: 8.0e+9}
  - {id: b/1, node: b, region: oregon, type: V100, flops_per_s: 4.0e+11, memory_bytes: 8.0e+9}
links:
  - {from: ohio, to: oregon, latency_ms: 25, bandwidth_gbps: 1.0}
"""


@pytest.fixture
def job_path(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    job = {
        "model": {"layers": 4, "dim": 16, "heads": 2},
        "data": {"path": str(tmp_path / "text.txt")},
        "training": {"steps": 5, "global_batch": 8, "seq_len": 16},
        "run": {"name": "cli", "storage_path": str(tmp_path / "runs")},
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def invoke(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def as_json(*arguments: object, code: int = 0) -> Any:
    return json.loads(invoke(*arguments, "--json", code=code).stdout)


# ------------------------------------------------------------------ validate, schema, --set


def test_validate(job_path: Path) -> None:
    text = invoke("validate", job_path).stdout
    assert "is valid" in text
    assert "1,801 tokens" in text
    assert as_json("validate", job_path) == {
        "valid": True,
        "parameters": 17_520,
        "tokens": 1801,
        "samples": 112,
        "epochs": pytest.approx(40 / 112),
    }


def test_validate_makes_nothing(job_path: Path, tmp_path: Path) -> None:
    invoke("validate", job_path)
    assert not (tmp_path / "runs").exists()


def test_a_wrong_field(job_path: Path) -> None:
    result = invoke("validate", job_path, "--set", "training.stepz=4", code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "training.stepz: no such field; did you mean 'steps'?" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    error = as_json("validate", job_path, "--set", "training.stepz=4", code=2)["error"]
    assert error["kind"] == "SpecError"
    assert "training.stepz" in error["message"]


def test_set_overrides_the_file(job_path: Path) -> None:
    found = as_json("validate", job_path, "--set", "training.steps=10", "--set", "model.layers=2")
    assert found["epochs"] == pytest.approx(80 / 112)
    assert found["parameters"] < 17_520


def test_the_schema_is_valid_and_agrees_with_the_spec(job_path: Path) -> None:
    schema = json.loads(invoke("schema").stdout)
    validator = jsonschema.validators.validator_for(schema)
    validator.check_schema(schema)
    raw = yaml.safe_load(job_path.read_text())
    jsonschema.validate(raw, schema)
    jsonschema.validate(load_job(job_path).model_dump(mode="json"), schema)
    raw["training"]["stepz"] = 3
    with pytest.raises(jsonschema.ValidationError, match="stepz"):
        jsonschema.validate(raw, schema)


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[1].glob("examples/*.yaml")), ids=lambda p: p.name
)
def test_examples_fit_the_schema(path: Path) -> None:
    jsonschema.validate(yaml.safe_load(path.read_text()), JobSpec.model_json_schema())


def test_help_names_every_command() -> None:
    text = invoke("--help").stdout
    for command in (
        *("train", "validate", "plan", "simulate", "compare", "replay", "logs"),
        *("submit", "status", "export", "import", "watch-node"),
    ):
        assert command in text


# ------------------------------------------------------------------ plan


def test_plan_for_a_topology_file(job_path: Path, tmp_path: Path) -> None:
    (tmp_path / "topology.yaml").write_text(TOPOLOGY)
    arguments = ("plan", job_path, "--topology", tmp_path / "topology.yaml")
    plan = as_json(*arguments, "--set", "parallelism.pipelines=2", "--set", "parallelism.stages=2")
    # What other tools read.
    assert plan.keys() >= {
        "devices",
        "pipelines",
        "predicted_step_s",
        "objective",
        "lower_bound",
        "gap",
        "search_s",
    }
    assert {d["id"] for d in plan["devices"]} == {"a/0", "a/1", "b/0", "b/1"}
    for device in plan["devices"]:
        assert device.keys() >= {"id", "node", "region", "type"}
    assert sum(p["microbatches"] for p in plan["pipelines"]) == 8
    for pipeline in plan["pipelines"]:
        layers = [stage["layers"] for stage in pipeline["stages"]]
        assert [first for first, _ in layers] == [0, *(last for _, last in layers[:-1])]
        assert layers[-1][1] == 4
        regions = {stage["device"][0] for stage in pipeline["stages"]}
        assert len(regions) == 1, "a pipeline stays in one region if it can"
    assert 0 < plan["lower_bound"] <= plan["predicted_step_s"]
    assert plan["search_s"] > 0


def test_plan_as_a_table(job_path: Path, tmp_path: Path) -> None:
    (tmp_path / "topology.yaml").write_text(TOPOLOGY)
    text = invoke("plan", job_path, "--topology", tmp_path / "topology.yaml").stdout
    assert "pipeline 0" in text
    assert "s a step predicted" in text


def test_a_plan_that_can_not_be(job_path: Path, tmp_path: Path) -> None:
    (tmp_path / "topology.yaml").write_text(TOPOLOGY)
    arguments = ["plan", job_path, "--topology", tmp_path / "topology.yaml", "--set"]
    message = as_json(*arguments, "parallelism.pipelines=5", code=2)["error"]["message"]
    assert "5" in message
    message = as_json("plan", job_path, "--topology", tmp_path / "none.yaml", code=2)["error"]
    assert message["kind"] == SpecError.__name__


# ------------------------------------------------------------------ status


def finished_run(path: Path) -> RunDirectory:
    run = RunDirectory.create(path)
    run.append_event("start", pid=1, steps=3, resume=None)
    run.append_event("generation", generation=1, workers=[{"rank": 0}, {"rank": 1}])
    for step in (1, 2, 3):
        run.append_metrics(
            metrics_record(
                time=1e9 + step,
                step=step,
                loss=5.0 - step,
                grad_norm=1.0,
                learning_rate=1e-3,
                loss_scale=1.0,
                skipped=False,
                step_s=0.5,
                tokens=100,
                predicted_step_s=0.4,
                generation=1,
                bytes_per_token=1.0,
            )
        )
    run.append_event("checkpoint", step=3, path="/there/step-00000003", generation=1)
    run.append_event("finish", phase="finished", step=3, checkpoint="/there/step-00000003")
    return run


def test_status_of_a_finished_run(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "runs/cli")
    found = as_json("status", run.path)
    assert found["phase"] == "finished"
    assert (found["step"], found["steps"], found["loss"], found["workers"]) == (3, 3, 2.0, 2)
    assert found["tokens_per_s"] == 200
    assert found["checkpoint"] == "/there/step-00000003"
    assert "finished" in invoke("status", run.path).stdout


def test_status_by_the_job_spec(job_path: Path, tmp_path: Path) -> None:
    finished_run(tmp_path / "runs/cli")
    assert as_json("status", job_path)["step"] == 3
    assert "no run at" in invoke("status", tmp_path / "nothing", code=2).stderr
    result = invoke("status", job_path, "--set", "run.name=other", code=2)
    assert "runs/other" in result.stderr


# ------------------------------------------------------------------ export, import


def huggingface_folder(path: Path, family: str) -> Path:
    import transformers

    torch.manual_seed(1)
    model: Any
    if family == "gpt":
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=257, n_positions=32, n_embd=16, n_layer=2, n_head=2)
        )
    else:
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=257,
                max_position_embeddings=32,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )
    model.save_pretrained(path)
    return path


def logits_of(path: Path) -> torch.Tensor:
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' own making
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(24).view(2, 12)).logits
    return found


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_import_then_export_gives_the_same_model(tmp_path: Path, family: str) -> None:
    theirs = huggingface_folder(tmp_path / "theirs", family)
    found = as_json("import", theirs, tmp_path / "imported")
    job = load_job(found["job"])
    assert job.model.family == family
    assert job.model.init_from is not None
    # What a worker would compute from it.
    dims = job.dims()
    stage = build_stage(dims, 0, dims.layers, seed=0).eval()
    state = {f"model.{n}": p.data for n, p in stage.named_parameters()}
    read_tensors(job.model.init_from, read_manifest(job.model.init_from), state)
    expected = logits_of(theirs)
    torch.testing.assert_close(
        stage(torch.arange(24).view(2, 12)).detach(), expected, rtol=1e-4, atol=1e-4
    )
    exported = as_json("export", tmp_path / "imported", tmp_path / "exported")
    assert exported == {"path": str(tmp_path / "exported"), "family": family, "layers": 2}
    torch.testing.assert_close(logits_of(tmp_path / "exported"), expected, rtol=1e-5, atol=1e-5)


def test_an_imported_job_validates(tmp_path: Path) -> None:
    theirs = huggingface_folder(tmp_path / "theirs", "gpt")
    found = as_json("import", theirs, tmp_path / "imported")
    assert as_json("validate", found["job"])["valid"]


def test_export_of_what_is_no_checkpoint(tmp_path: Path) -> None:
    result = invoke("export", tmp_path / "nothing", tmp_path / "out", code=2)
    assert "no complete checkpoint" in result.stderr
    assert not (tmp_path / "out").exists()
    store = CheckpointStore(str(tmp_path / "run/checkpoints"))
    store.remove_probe(store.probe())
    invoke("export", tmp_path / "run", tmp_path / "out", code=2)


def test_import_of_what_is_no_model(tmp_path: Path) -> None:
    result = invoke("import", tmp_path / "nothing", tmp_path / "out", code=2)
    assert re.search("nothing", result.stderr)
    assert not (tmp_path / "out").exists()
