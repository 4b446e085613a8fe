"""The job spec's section on parallelism: who computes what, and how pipelines talk."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from ray_train_geo.spec_base import AUTO, AutoInt, Section, none_if_auto

__all__ = [
    "GradientSyncChoice",
    "GradientSyncName",
    "ParallelismSpec",
    "ScheduleChoice",
    "ScheduleName",
]

ScheduleName = Literal["gpipe", "1f1b", "zero-bubble"]
ScheduleChoice = Literal["auto", "gpipe", "1f1b", "zero-bubble"]
GradientSyncName = Literal["allreduce", "sharded_ps", "central_ps", "hierarchical", "tree"]
GradientSyncChoice = Literal[
    "auto", "allreduce", "sharded_ps", "central_ps", "hierarchical", "tree"
]

_AutoCounts = Annotated[
    list[int] | None,
    BeforeValidator(none_if_auto),
    WithJsonSchema(
        {"anyOf": [{"type": "array", "items": {"type": "integer", "minimum": 1}}, *AUTO]}
    ),
]
_BOUNDARIES: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_AutoBoundaries = Annotated[
    list[list[int]] | None,
    BeforeValidator(none_if_auto),
    WithJsonSchema({"anyOf": [{"type": "array", "items": _BOUNDARIES}, _BOUNDARIES, *AUTO]}),
]


def _or_auto(schema: dict[str, Any]) -> None:
    """In the JSON schema, a whole section may be the word ``auto``."""
    section = dict(schema)
    schema.clear()
    schema["anyOf"] = [section, {"const": "auto"}]


class ParallelismSpec(Section):
    """Who computes what. `auto` (the default for each field) leaves it to the planner."""

    model_config = ConfigDict(json_schema_extra=_or_auto)

    pipelines: AutoInt = Field(
        None, ge=1, description="Number of pipelines (data-parallel replicas), or auto."
    )
    stages: AutoInt = Field(None, ge=1, description="Stages of each pipeline, or auto.")
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
    schedule: ScheduleChoice = Field(
        "1f1b",
        description="gpipe (all forwards, then all backwards), 1f1b (with as much extra warmup "
        "as link latency asks for and memory allows), zero-bubble (1f1b whose backward computes "
        "weight gradients apart, when the stage would be idle), or auto (1f1b or zero-bubble, "
        "the faster one by the plan's prediction).",
    )
    extra_warmup: AutoInt = Field(
        None,
        ge=0,
        description="1f1b, zero-bubble: warmup forwards beyond the usual one per downstream hop, "
        "in microbatches per hop, or auto.",
    )
    gradient_sync: GradientSyncChoice = Field(
        "auto",
        description="How pipelines sum their gradients: allreduce (a ring), sharded_ps (each "
        "holder of a layer sums one shard for all), central_ps (one holder sums everything), "
        "hierarchical (within each region first, then between regions), tree (within each region "
        "to one holder, between those to one of all), or auto (the fastest by the plan's "
        "prediction).",
    )
    delay_steps: int = Field(
        0,
        ge=0,
        le=1,
        description="1: gradients are summed while the next step is computed, and applied after "
        "it, so each step is computed at the parameters of the step before last. What is computed "
        "then differs a little from 0 (sum, apply, go on), but no step waits for the wire.",
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
    most_flows: int = Field(
        8,
        ge=1,
        le=64,
        description="gloo: most TCP flows that carry one link, where a single one is held up by "
        "its window over a long round trip.",
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
