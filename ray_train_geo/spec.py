"""The job spec: what a user hands in, as YAML or as Python objects.

Every field has a description with its unit; the JSON schema (``ray-train-geo schema``) and the
reference page in ``docs/`` are generated from these classes.  Reading never has side effects:
a spec that validates has consistent arithmetic, and nothing has been started.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from ray_train_geo.errors import SpecError
from ray_train_geo.model.catalog import CATALOG, ModelDims

__all__ = [
    "CheckpointSpec",
    "DataSpec",
    "FailureSpec",
    "JobSpec",
    "LossScaleSpec",
    "ModelSpec",
    "ParallelismSpec",
    "RunSpec",
    "ScalingSpec",
    "TrainingSpec",
    "load_job",
    "parse_job",
]

Precision = Literal["fp32", "bf16", "fp16"]
ScheduleName = Literal["gpipe", "1f1b"]
GradientSyncName = Literal["allreduce", "sharded_ps", "central_ps"]
GradientSyncChoice = Literal["auto", "allreduce", "sharded_ps", "central_ps"]


class _Section(BaseModel):
    # Numbers out of YAML such as "3e-4" (a string in YAML 1.1) are accepted where a number fits.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _none_if_auto(value: Any) -> Any:
    return None if value == "auto" else value


class ModelSpec(_Section):
    """The model: a catalog name, dimensions of one's own, or a name with dimensions changed."""

    name: str | None = Field(
        None,
        description="Catalog name, such as gpt3-small or gpt3-xl-24. Dimensions given beside it "
        "replace the catalog's.",
    )
    family: Literal["gpt", "llama"] | None = Field(
        None, description="Architecture. Default: the catalog's, or gpt."
    )
    layers: int | None = Field(None, ge=1, description="Number of transformer layers.")
    dim: int | None = Field(None, ge=1, description="Hidden size.")
    heads: int | None = Field(None, ge=1, description="Attention heads; must divide dim.")
    kv_heads: int | None = Field(
        None, ge=1, description="Key/value heads (llama, grouped-query). Default: heads."
    )
    ffn_dim: int | None = Field(
        None,
        ge=1,
        description="Hidden size of the MLP. Default: 4 x dim (gpt), or 8/3 x dim rounded up to a "
        "multiple of 32 (llama).",
    )
    vocab_size: int | None = Field(
        None,
        ge=2,
        description="Vocabulary size in tokens. Default: the catalog's, or the tokenizer's.",
    )
    tied_embeddings: bool | None = Field(
        None,
        description="Token embedding and output head share one matrix. Default: the catalog's, "
        "or true.",
    )
    dropout: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Dropout probability on the embedding and on both residual branches. "
        "Default: 0.",
    )
    norm_eps: float | None = Field(
        None, gt=0, description="Epsilon of the norms. Default: the catalog's, or 1e-5."
    )
    rope_theta: float | None = Field(
        None, gt=0, description="RoPE base (llama). Default: the catalog's, or 10000."
    )
    init_std: float | None = Field(
        None, gt=0, description="Standard deviation of the initial weights. Default: 0.02."
    )
    init_from: str | None = Field(
        None,
        description="Start from these weights: a checkpoint made by `ray-train-geo import` (or "
        "any checkpoint of a model of the same dimensions). Optimizer and step start anew.",
    )

    @model_validator(mode="after")
    def _known(self) -> ModelSpec:
        if self.name is not None and self.name not in CATALOG:
            close = difflib.get_close_matches(self.name, CATALOG, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"unknown model name {self.name!r}{hint} (catalog: {', '.join(sorted(CATALOG))}; "
                "or leave name out and give layers, dim and heads)"
            )
        missing = [k for k in ("layers", "dim", "heads") if getattr(self, k) is None]
        if self.name is None and missing:
            raise ValueError(
                f"give either name (from the catalog) or dimensions; missing: {', '.join(missing)}"
            )
        dims = self.dims(vocab_size=self.vocab_size or 256, seq_len=1)
        if dims.dim % dims.heads:
            raise ValueError(f"heads ({dims.heads}) must divide dim ({dims.dim})")
        if dims.family == "llama" and dims.head_dim % 2:
            raise ValueError(
                f"llama rotates pairs: dim / heads must be even, but is {dims.head_dim}"
            )
        if dims.heads % dims.kv_heads:
            raise ValueError(f"kv_heads ({dims.kv_heads}) must divide heads ({dims.heads})")
        if dims.family == "gpt" and dims.kv_heads != dims.heads:
            raise ValueError("kv_heads is for llama; gpt has as many key/value heads as heads")
        return self

    def dims(self, vocab_size: int, seq_len: int) -> ModelDims:
        """The model's dimensions; ``vocab_size`` (tokens) and ``seq_len`` fill what is left open.

        A catalog model keeps the catalog's vocabulary unless ``model.vocab_size`` says otherwise.
        """
        given = {
            f.name: value
            for f in dataclasses.fields(ModelDims)
            if (value := getattr(self, f.name, None)) is not None
        }
        if self.name is not None:
            base = CATALOG[self.name]
            # Sizes that follow from others are derived anew when those are changed.
            if "dim" in given and "ffn_dim" not in given:
                given["ffn_dim"] = _default_ffn(given.get("family", base.family), given["dim"])
            if "heads" in given and "kv_heads" not in given:
                given["kv_heads"] = given["heads"]
            given["max_seq_len"] = max(base.max_seq_len, seq_len)
            return dataclasses.replace(base, **given)
        family = given.setdefault("family", "gpt")
        given.setdefault("kv_heads", given["heads"])
        given.setdefault("ffn_dim", _default_ffn(family, given["dim"]))
        given.setdefault("vocab_size", vocab_size)
        given.setdefault("tied_embeddings", True)
        return ModelDims(**given, max_seq_len=seq_len)


def _default_ffn(family: str, dim: int) -> int:
    return 4 * dim if family == "gpt" else -(-8 * dim // 3 // 32) * 32


class DataSpec(_Section):
    """The training text."""

    path: str = Field(
        description="What to train on: a text file, a folder (searched recursively), a .jsonl "
        "file, a memory-mapped .bin token file, an fsspec URL of one of these, or "
        "python://stdlib (the Python standard library's own source files). Every node that holds "
        "a first or last stage must be able to read it."
    )
    format: Literal["auto", "text", "jsonl", "bin"] = Field(
        "auto", description="How to read path; auto goes by the file name's ending."
    )
    glob: str = Field("*", description="Which file names count when path is a folder.")
    text_field: str = Field("text", description="The field of a JSONL object that holds its text.")
    tokenizer: str = Field(
        "byte",
        description="byte (256 byte values and an end-of-document token), or the path of a "
        "Hugging Face `tokenizers` JSON file. For .bin files it only names the vocabulary.",
    )
    bin_dtype: Literal["uint16", "uint32", "int32"] = Field(
        "uint16", description="Type of one token in a headerless .bin file."
    )


class LossScaleSpec(_Section):
    """Dynamic loss scaling (fp16 only)."""

    initial: float = Field(65536.0, gt=0, description="First scale.")
    growth_factor: float = Field(2.0, ge=1, description="Factor after growth_interval good steps.")
    backoff_factor: float = Field(0.5, gt=0, lt=1, description="Factor after an overflow.")
    growth_interval: int = Field(
        2000, ge=1, description="Good steps in a row before the scale grows, in steps."
    )


class TrainingSpec(_Section):
    """What is computed: it does not depend on who computes it."""

    steps: int = Field(ge=1, description="Optimizer steps of the whole run, in steps.")
    global_batch: int = Field(ge=1, description="Sequences of one step, over all pipelines.")
    microbatch: int = Field(
        1, ge=1, description="Sequences of one microbatch; must divide global_batch."
    )
    seq_len: int = Field(ge=1, description="Length of one sequence, in tokens.")
    lr: float = Field(3e-4, gt=0, description="Peak learning rate of AdamW.")
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of the decay.")
    warmup_steps: int = Field(0, ge=0, description="Linear warmup, in steps.")
    lr_schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="After warmup: cosine decay to min_lr, or constant."
    )
    lr_decay_steps: int | None = Field(
        None, ge=1, description="Step at which the decay ends, in steps. Default: steps."
    )
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's beta1 and beta2.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(
        0.1, ge=0, description="Decoupled weight decay of matrices (norms and biases have none)."
    )
    grad_clip: float = Field(
        1.0, ge=0, description="Largest global L2 norm of the gradient; 0 turns clipping off."
    )
    precision: Precision = Field(
        "fp32",
        description="Of weights and activations in forward and backward. Master weights, summed "
        "gradients and optimizer state are always fp32; fp16 scales its loss.",
    )
    loss_scale: LossScaleSpec = Field(
        default_factory=LossScaleSpec, description="Dynamic loss scaling, for fp16."
    )
    recompute: bool = Field(
        False, description="Recompute each layer's activations in the backward pass."
    )
    compile: bool = Field(False, description="Compile each layer with torch.compile.")
    seed: int = Field(
        0, ge=0, lt=2**63, description="Fixes initial weights, sample order and dropout."
    )

    @model_validator(mode="after")
    def _arithmetic(self) -> TrainingSpec:
        if self.global_batch % self.microbatch:
            raise ValueError(
                f"global_batch ({self.global_batch}) is not divisible by microbatch "
                f"({self.microbatch}); change one of them"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) is larger than lr ({self.lr})")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be in [0, 1), but are {self.betas}")
        return self

    @property
    def total_microbatches(self) -> int:
        """Microbatches of one step, over all pipelines."""
        return self.global_batch // self.microbatch

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.seq_len


_AUTO: list[Any] = [{"const": "auto"}, {"type": "null"}]
_AutoInt = Annotated[
    int | None,
    BeforeValidator(_none_if_auto),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, *_AUTO]}),
]
_AutoCounts = Annotated[
    list[int] | None,
    BeforeValidator(_none_if_auto),
    WithJsonSchema(
        {"anyOf": [{"type": "array", "items": {"type": "integer", "minimum": 1}}, *_AUTO]}
    ),
]
_BOUNDARIES: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_AutoBoundaries = Annotated[
    list[list[int]] | None,
    BeforeValidator(_none_if_auto),
    WithJsonSchema({"anyOf": [{"type": "array", "items": _BOUNDARIES}, _BOUNDARIES, *_AUTO]}),
]


def _or_auto(schema: dict[str, Any]) -> None:
    """In the JSON schema, a whole section may be the word ``auto``."""
    section = dict(schema)
    schema.clear()
    schema["anyOf"] = [section, {"const": "auto"}]


class ParallelismSpec(_Section):
    """Who computes what. `auto` (the default for each field) leaves it to the planner."""

    model_config = ConfigDict(json_schema_extra=_or_auto)

    pipelines: _AutoInt = Field(
        None, ge=1, description="Number of pipelines (data-parallel replicas), or auto."
    )
    stages: _AutoInt = Field(None, ge=1, description="Stages of each pipeline, or auto.")
    layers: _AutoBoundaries = Field(
        None,
        description="Stage boundaries per pipeline: [0, 3, 8] is two stages, of layers 0-2 and "
        "3-7; the outer ends may be left out ([3]). One list serves all pipelines.",
    )
    microbatches: _AutoCounts = Field(
        None,
        description="Microbatches of each pipeline per step; they must add up to "
        "global_batch / microbatch.",
    )
    schedule: ScheduleName = Field(
        "1f1b",
        description="gpipe (all forwards, then all backwards) or 1f1b (with as much extra warmup "
        "as link latency asks for and memory allows).",
    )
    extra_warmup: _AutoInt = Field(
        None,
        ge=0,
        description="1f1b: warmup forwards beyond the usual one per downstream hop, in "
        "microbatches per hop, or auto.",
    )
    gradient_sync: GradientSyncChoice = Field(
        "auto",
        description="How pipelines sum their gradients: allreduce, sharded_ps (each holder of a "
        "layer sums one shard for all), central_ps (one holder sums everything), or auto (the "
        "fastest by the plan's prediction).",
    )
    bucket_bytes: int = Field(
        25 * 2**20, ge=1, description="Largest gradient message of the sync, in bytes."
    )
    transport: Literal["auto", "gloo", "nccl"] = Field(
        "auto",
        description="What carries tensors between workers: gloo (CPU tensors; GPU tensors are "
        "staged through pinned memory), nccl (CuPy NCCL; one GPU per worker), or auto (nccl "
        "where every worker has a GPU of its own and CuPy is installed).",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_auto(cls, value: Any) -> Any:
        return {} if value == "auto" else value

    @field_validator("layers", mode="before")
    @classmethod
    def _one_list_for_all(cls, value: Any) -> Any:
        if isinstance(value, list) and value and all(isinstance(v, int) for v in value):
            return [value]
        return value


class ScalingSpec(_Section):
    """Which devices may be used."""

    min_devices: int = Field(1, ge=1, description="Fewest devices to train on.")
    max_devices: int | None = Field(
        None, ge=1, description="Most devices to train on. Default: all that are free."
    )
    resources_per_worker: dict[str, float] = Field(
        default_factory=lambda: {"CPU": 1.0},
        description="Ray resources of one stage worker, such as {CPU: 1, GPU: 1}. With a GPU the "
        "stage computes on it; two workers may share one ({GPU: 0.5}).",
    )
    label_selector: dict[str, str] = Field(
        default_factory=dict,
        description="Ray node labels that a node must carry, such as "
        "{ray.io/market-type: spot}. A value may be negated (!spot) or a set (in(a, b)).",
    )
    memory_per_worker_bytes: int | None = Field(
        None, ge=1, description="Memory of one device, in bytes. Default: measured on its node."
    )
    wait_s: float = Field(
        0.0,
        ge=0,
        description="How long to wait for min_devices (asking the autoscaler for them), in "
        "seconds; 0 refuses at once.",
    )
    topology: str | None = Field(
        None,
        description="A topology YAML file with the measured links between regions; devices still "
        "come from Ray.",
    )

    @model_validator(mode="after")
    def _range(self) -> ScalingSpec:
        if self.max_devices is not None and self.max_devices < self.min_devices:
            raise ValueError(
                f"max_devices ({self.max_devices}) is less than min_devices ({self.min_devices})"
            )
        bad = {k: v for k, v in self.resources_per_worker.items() if v < 0}
        if bad:
            raise ValueError(f"resources_per_worker can't be negative: {bad}")
        if not any(self.resources_per_worker.values()):
            raise ValueError("resources_per_worker asks for nothing; give it a CPU or a GPU")
        return self


class CheckpointSpec(_Section):
    """Checkpoints are complete or invisible, asynchronous, and readable under any other plan."""

    interval: int = Field(
        100, ge=0, description="Steps between checkpoints; 0 saves only when the run ends."
    )
    keep: int = Field(3, ge=1, description="How many of the newest checkpoints to keep.")
    storage_path: str | None = Field(
        None,
        description="Where checkpoints go: a path that every node can reach, or an fsspec URL "
        "(s3://bucket/folder). Default: checkpoints/ in the run directory.",
    )


class FailureSpec(_Section):
    """What to do when a worker is lost."""

    max_failures: int = Field(
        3,
        ge=0,
        description="How many lost workers or links to recover from (from the newest complete "
        "checkpoint, on the devices left) before giving up. An error in the job itself is never "
        "tried again.",
    )
    deadline_s: float | None = Field(
        None,
        gt=0,
        description="Longest wait for a message, in seconds. Default: a minute and ten predicted "
        "steps.",
    )


class RunSpec(_Section):
    """Where the run's record goes."""

    name: str = Field(
        "run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="The run's name, and its directory's.",
    )
    storage_path: str = Field(
        "~/ray_train_geo",
        description="Folder that holds run directories (on the head node).",
    )
    trace_steps: int = Field(
        4, ge=0, description="How many steps to record in trace.json, in steps (after the first)."
    )

    @field_validator("storage_path")
    @classmethod
    def _local(cls, value: str) -> str:
        if "://" in value:
            raise ValueError(
                f"storage_path must be a folder on the head node, not a URL ({value}); URLs are "
                "for checkpoint.storage_path"
            )
        return value

    @property
    def directory(self) -> Path:
        """The run directory, ``STORAGE/NAME``, absolute."""
        return Path(self.storage_path).expanduser().absolute() / self.name


class JobSpec(_Section):
    """One training job."""

    model: ModelSpec = Field(description="The model.")
    data: DataSpec = Field(description="The training text.")
    training: TrainingSpec = Field(description="What is computed.")
    parallelism: ParallelismSpec = Field(
        default_factory=ParallelismSpec, description="Who computes what, or `auto`."
    )
    scaling: ScalingSpec = Field(
        default_factory=ScalingSpec, description="Which devices may be used."
    )
    checkpoint: CheckpointSpec = Field(
        default_factory=CheckpointSpec, description="When and where state is saved."
    )
    failure: FailureSpec = Field(
        default_factory=FailureSpec, description="What to do when a worker is lost."
    )
    run: RunSpec = Field(default_factory=RunSpec, description="Where the run's record goes.")

    @model_validator(mode="after")
    def _consistent(self) -> JobSpec:
        """Arithmetic that holds whatever the devices turn out to be."""
        par, layers = self.parallelism, self.dims().layers
        total = self.training.total_microbatches
        boundaries = self.stage_boundaries()
        if par.stages is not None and par.stages > layers:
            raise ValueError(
                f"parallelism.stages ({par.stages}) is more than the model's layers ({layers}); "
                "each stage needs at least one layer"
            )
        if boundaries is not None and par.stages is not None:
            for p, bounds in enumerate(boundaries):
                if len(bounds) - 1 != par.stages:
                    raise ValueError(
                        f"parallelism.layers gives pipeline {p} {len(bounds) - 1} stages "
                        f"({bounds}), but parallelism.stages is {par.stages}"
                    )
        pipelines = self.fixed_pipelines()
        if pipelines is not None and pipelines > total:
            raise ValueError(
                f"parallelism.pipelines ({pipelines}) is more than the microbatches of a step "
                f"({total} = global_batch / microbatch); each pipeline needs at least one"
            )
        if par.microbatches is not None:
            if min(par.microbatches, default=0) < 1:
                raise ValueError("parallelism.microbatches: every pipeline needs at least one")
            if sum(par.microbatches) != total:
                raise ValueError(
                    f"parallelism.microbatches {par.microbatches} add up to "
                    f"{sum(par.microbatches)}, but a step has {total} "
                    f"(global_batch {self.training.global_batch} / microbatch "
                    f"{self.training.microbatch})"
                )
        for name, count in (
            ("layers", len(par.layers) if par.layers and len(par.layers) > 1 else None),
            ("microbatches", len(par.microbatches) if par.microbatches else None),
        ):
            if count is not None and pipelines is not None and count != pipelines:
                raise ValueError(
                    f"parallelism.{name} is for {count} pipelines, but there are {pipelines}"
                )
        return self

    def dims(self, vocab_size: int = 256) -> ModelDims:
        """The model's dimensions, with the tokenizer's ``vocab_size`` where the spec has none."""
        return self.model.dims(vocab_size=vocab_size, seq_len=self.training.seq_len)

    def fixed_pipelines(self) -> int | None:
        """The number of pipelines, if the spec fixes it in any way."""
        par = self.parallelism
        if par.pipelines is not None:
            return par.pipelines
        if par.microbatches is not None:
            return len(par.microbatches)
        if par.layers is not None and len(par.layers) > 1:
            return len(par.layers)
        return None

    def stage_boundaries(self) -> list[list[int]] | None:
        """``parallelism.layers`` with the outer ends filled in, checked against the model.

        Raises:
            ValueError: a boundary out of order or outside the model.
        """
        if self.parallelism.layers is None:
            return None
        layers = self.dims().layers
        full = []
        for p, given in enumerate(self.parallelism.layers):
            bounds = list(given)
            if not bounds or bounds[0] != 0:
                bounds.insert(0, 0)
            if bounds[-1] != layers:
                bounds.append(layers)
            if any(b <= a for a, b in itertools.pairwise(bounds)):
                raise ValueError(
                    f"parallelism.layers of pipeline {p} is {given}: boundaries must grow from 0 "
                    f"to the model's {layers} layers, with at least one layer a stage"
                )
            full.append(bounds)
        return full

    def to_yaml(self) -> str:
        """The whole spec, defaults included, as YAML that reads back equal."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> JobSpec:
    """Read a job spec from a YAML file and apply ``a.b=value`` overrides.

    Raises:
        SpecError: the file can't be read, is no YAML, or is no valid job.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as e:
        raise SpecError(f"can't read the job spec {path}: {e.strerror or e}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise SpecError(f"{path} is not valid YAML: {_yaml_problem(e)}") from None
    return parse_job(raw, overrides, source=str(path))


def _yaml_problem(error: Exception) -> str:
    """What is wrong and where, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error).splitlines()[0]


def parse_job(raw: Any, overrides: Sequence[str] = (), source: str = "job") -> JobSpec:
    """Make a :class:`JobSpec` out of plain data (as YAML gives it) and ``a.b=value`` overrides.

    Raises:
        SpecError: one message with a line for every field that is wrong.
    """
    if not isinstance(raw, dict):
        raise SpecError(f"{source}: a job spec is a mapping with model, data and training")
    try:
        raw = json.loads(json.dumps(raw, default=str))  # a copy, in plain types
    except (ValueError, TypeError, RecursionError) as e:
        raise SpecError(f"{source}: a job spec is plain data: {e}") from None
    for text in overrides:
        _apply_override(raw, text)
    try:
        return JobSpec.model_validate(raw)
    except ValidationError as e:
        lines = [_explain(error) for error in e.errors()]
        raise SpecError(f"{source}: " + "\n".join(lines)) from None


def _apply_override(raw: dict[str, Any], text: str) -> None:
    key, sep, value = text.partition("=")
    parts = key.strip().split(".")
    if not sep or not all(parts):
        raise SpecError(f"--set {text!r}: write it as section.field=value")
    node = raw
    for part in parts[:-1]:
        child = node.get(part)
        if not isinstance(child, dict):  # also replaces `parallelism: auto`
            child = node[part] = {}
        node = child
    try:
        node[parts[-1]] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise SpecError(f"--set {text!r}: {value!r} is not a valid YAML value") from None


def _explain(error: Any) -> str:
    """One line for one of pydantic's errors: where, what, and what to write instead."""
    where = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _fields_at(error["loc"][:-1])
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        return f"{where}: no such field; {hint}"
    if error["type"] == "missing":
        return f"{where}: required, but missing"
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    if error["type"] == "value_error" or isinstance(given, dict):
        return f"{where}: {message}" if where else str(message)
    return f"{where}: {message} (given: {given!r})"


def _fields_at(loc: Sequence[Any]) -> list[str]:
    model: Any = JobSpec
    for part in loc:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        model = field.annotation if field is not None else None
    return list(model.model_fields) if hasattr(model, "model_fields") else []
