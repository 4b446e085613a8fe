"""The sections of a job spec: their fields, and what each section can tell of itself alone.

Every field has a description with its unit; the JSON schema and the reference page in ``docs/``
are generated from these classes.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from ray_train_geo.model.catalog import CATALOG, ModelDims
from ray_train_geo.spec_base import AutoInt, Section

__all__ = [
    "CheckpointSpec",
    "DataSpec",
    "FailureSpec",
    "LossScaleSpec",
    "ModelSpec",
    "Precision",
    "RunSpec",
    "ScalingSpec",
    "TrainingSpec",
]

Precision = Literal["fp32", "bf16", "fp16"]


class ModelSpec(Section):
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


class DataSpec(Section):
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


class LossScaleSpec(Section):
    """Dynamic loss scaling (fp16 only)."""

    initial: float = Field(65536.0, gt=0, description="First scale.")
    growth_factor: float = Field(2.0, ge=1, description="Factor after growth_interval good steps.")
    backoff_factor: float = Field(0.5, gt=0, lt=1, description="Factor after an overflow.")
    growth_interval: int = Field(
        2000, ge=1, description="Good steps in a row before the scale grows, in steps."
    )


class TrainingSpec(Section):
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


class ScalingSpec(Section):
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
        "come from Ray. Default: links are measured at the start.",
    )
    probe_s: float = Field(
        30.0,
        ge=0,
        description="Most seconds to measure bandwidths between machines for before the first "
        "plan, pairs of regions first (3 s when machines join). 0: latencies alone.",
    )
    emulate_links: bool = Field(
        False,
        description="Simulate the links of scaling.topology: messages between workers on CPUs take "
        "as long as they would there. The file must be visible on every node; a change of it "
        "changes the links while the job runs, but not what the planner takes them for.",
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
        if self.emulate_links and self.topology is None:
            raise ValueError("emulate_links needs the links of a topology file: set topology")
        if self.emulate_links and self.resources_per_worker.get("GPU"):
            raise ValueError("emulate_links is for workers on CPUs; ask for no GPU, or turn it off")
        if not any(self.resources_per_worker.values()):
            raise ValueError("resources_per_worker asks for nothing; give it a CPU or a GPU")
        return self


class CheckpointSpec(Section):
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


class FailureSpec(Section):
    """What to do when workers are lost: go on with the others, from what is in memory."""

    max_failures: int = Field(
        3,
        ge=0,
        description="How many failures in a row, with no step committed between them, before "
        "giving up. An error in the job itself is never tried again.",
    )
    memory_copies: AutoInt = Field(
        None,
        ge=0,
        description="Steps between in-memory copies of state that only one node holds, on another "
        "node (in another region, if there is one): its loss then costs at most so many steps. "
        "Each copy sends 12 bytes a parameter while the next step runs, and every worker keeps "
        "two copies of its own state. 0 keeps none; auto is every step, or as seldom as keeps "
        "the predicted cost within 3%.",
    )
    wait_s: float | None = Field(
        None,
        ge=0,
        description="How long a run that has fewer than scaling.min_devices left (or too few to "
        "hold the model) waits for others, in seconds. Default: for ever.",
    )
    coordinator_patience_s: float = Field(
        120.0,
        gt=0,
        description="How long workers train on without a coordinator, and a driver waits for one, "
        "in seconds. Ray starts a killed one again within a few seconds.",
    )
    deadline_s: float | None = Field(
        None,
        gt=0,
        description="Longest wait for a message, in seconds. Default: a minute and ten predicted "
        "steps.",
    )


class RunSpec(Section):
    """Where the run's record goes, and whether the run needs its driver."""

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
    on_driver_exit: Literal["stop", "continue"] = Field(
        "stop",
        description="What a run does when its driver is killed: stop after a step, with a "
        "checkpoint, or continue to its end (`ray-train-geo attach` follows it, "
        "`ray-train-geo stop` stops it). SIGTERM and Ctrl-C always stop it. To continue it needs "
        "a Ray cluster that does not end with the driver.",
    )
    driver_patience_s: float = Field(
        45.0,
        gt=0,
        description="How long nobody may have asked for news until the driver counts as killed, "
        "in seconds.",
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
