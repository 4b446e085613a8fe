"""The job spec: what a user hands in, as YAML or as Python objects.

Every field has a description with its unit; the JSON schema (``ray-train-geo schema``) and the
reference page in ``docs/`` are generated from these classes.  Reading never has side effects:
a spec that validates has consistent arithmetic, and nothing has been started.
"""

from __future__ import annotations

import difflib
import itertools
import json
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    Field,
    ValidationError,
    model_validator,
)

from ray_train_geo.errors import SpecError
from ray_train_geo.model.catalog import ModelDims
from ray_train_geo.spec_base import Section
from ray_train_geo.spec_codecs import CodecSpec
from ray_train_geo.spec_local_sgd import LocalSGDSpec
from ray_train_geo.spec_parallelism import (
    GradientSyncChoice,
    GradientSyncName,
    ParallelismSpec,
    ScheduleChoice,
    ScheduleName,
)
from ray_train_geo.spec_sections import (
    CheckpointSpec,
    DataSpec,
    FailureSpec,
    LossScaleSpec,
    ModelSpec,
    Precision,
    RunSpec,
    ScalingSpec,
    TrainingSpec,
)

__all__ = [
    "CheckpointSpec",
    "CodecSpec",
    "DataSpec",
    "FailureSpec",
    "GradientSyncChoice",
    "GradientSyncName",
    "JobSpec",
    "LocalSGDSpec",
    "LossScaleSpec",
    "ModelSpec",
    "ParallelismSpec",
    "Precision",
    "RunSpec",
    "ScalingSpec",
    "ScheduleChoice",
    "ScheduleName",
    "TrainingSpec",
    "load_job",
    "parse_job",
]


class JobSpec(Section):
    """One training job."""

    model: ModelSpec = Field(description="The model.")
    data: DataSpec = Field(description="The training text.")
    training: TrainingSpec = Field(description="What is computed.")
    parallelism: ParallelismSpec = Field(
        default_factory=ParallelismSpec, description="Who computes what, or `auto`."
    )
    codecs: CodecSpec = Field(
        default_factory=CodecSpec, description="What messages are made smaller with."
    )
    local_sgd: LocalSGDSpec | None = Field(
        None,
        description="Steps that pipelines or regions take alone, and how they are merged. "
        "Default: off, every step is one of the whole cluster.",
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
        if self.codecs.feeds_back and self.local_sgd is not None:
            raise ValueError(
                f"codecs.gradients {self.codecs.gradients} feeds back what it leaves out, which "
                "local_sgd does not do: leave one of them out, or choose bf16 or int8"
            )
        if self.codecs.gradients != "none" and par.gradient_sync == "allreduce":
            raise ValueError(
                f"codecs.gradients {self.codecs.gradients} needs one holder that makes each sum: "
                "set parallelism.gradient_sync to sharded_ps, central_ps or auto"
            )
        if self.codecs.gradients == "powersgd" and par.gradient_sync in ("hierarchical", "tree"):
            raise ValueError(
                f"codecs.gradients powersgd has no {par.gradient_sync} sums: set "
                "parallelism.gradient_sync to sharded_ps, central_ps or auto"
            )
        if par.delay_steps and self.codecs.feeds_back:
            raise ValueError(
                f"codecs.gradients {self.codecs.gradients} feeds back what a sum has left out, "
                "which parallelism.delay_steps would need before its step is committed: leave one "
                "of them out, or choose bf16 or int8"
            )
        if par.delay_steps and self.local_sgd is not None:
            raise ValueError(
                "parallelism.delay_steps delays the sum of every step, which local_sgd does away "
                "with: leave one of them out (local_sgd has a delay_steps of its own)"
            )
        if par.delay_steps and self.training.precision == "fp16":
            raise ValueError(
                "parallelism.delay_steps begins a step before the last one's loss scale is known, "
                "which fp16 needs; set training.precision to bf16 or fp32"
            )
        if par.schedule == "zero-bubble" and self.training.compile:
            raise ValueError(
                "parallelism.schedule zero-bubble computes weight gradients apart, which "
                "training.compile does not let it do: leave one of them out"
            )
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
        if self.local_sgd is not None and self.local_sgd.fragments > layers:
            raise ValueError(
                f"local_sgd.fragments ({self.local_sgd.fragments}) is more than the model's layers "
                f"({layers})"
            )
        if self.local_sgd is not None and self.training.precision == "fp16":
            raise ValueError(
                "local_sgd needs one loss scale for all islands, which fp16 does not have; set "
                "training.precision to bf16 or fp32"
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
        kinds = () if field is None else typing.get_args(field.annotation) or (field.annotation,)
        model = kinds[0] if kinds else None  # a section that may be left out is `Section | None`
    return list(model.model_fields) if hasattr(model, "model_fields") else []
