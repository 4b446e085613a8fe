"""All systems of the published comparison, by the names of its data, and ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import get_args

from ray_train_geo.spec_parallelism import GradientSyncChoice
from ray_train_geo.systems import deepspeed, dtfm, megatron, torch_pipe, zero
from ray_train_geo.systems.case import Case, Outcome
from ray_train_geo.systems.constants import constants
from ray_train_geo.systems.ours import ours
from ray_train_geo.systems.settings import Setting

__all__ = ["SYSTEMS", "System"]


@dataclass(frozen=True, slots=True)
class System:
    """One system.

    Args:
        options: what ``--set`` can say of it.
        head: whether its model has an output head.
    """

    name: str
    description: str
    options: Mapping[str, Setting]
    run: Callable[[Case], Outcome]

    @property
    def settings(self) -> dict[str, str]:
        """Help of each setting, with its default."""
        return {
            name: f"{option.help} (default: {option.default or option.without})"
            for name, option in self.options.items()
        }


_GRID = {
    "stages": Setting("of a pipeline", without="what the devices give"),
    "replicas": Setting("data-parallel", without="what the devices give"),
}
_YES = ("yes", "no")
_NOISE = {
    "jitter_percent": Setting("standard deviation of an action's time"),
    "straggler_percent": Setting("by which the first pipeline's first stage is slower"),
    "traffic_percent": Setting("of a message's time on the wire that computing takes longer"),
}


def _work(precision: str, microbatch: str = "1") -> dict[str, Setting]:
    return {
        "microbatch": Setting("sequences of a microbatch", microbatch),
        "precision": Setting("of weights and messages", precision, ("fp16", "bf16", "fp32")),
        "recompute": Setting("activations in the backward", "yes", _YES),
    }


_SEEDS = {"seeds": Setting("placements that the mean is taken of", "3")}
_ZERO = {
    **_work("fp16", str(constants().zero_3.microbatch)),
    "bucket_mb": Setting("largest collective, in megabytes", "500"),
    "cpu_offload": Setting("optimizer on the host", "no", _YES),
}


def _shape(tensor: int, stages: int | None) -> dict[str, Setting]:
    return {
        **_GRID,
        "tensor": Setting("devices that share each layer", str(tensor)),
        "stages": Setting("of a pipeline", str(stages or ""), without="what the devices give"),
    }


_ALL = (
    System(
        "ours",
        "ray_train_geo: our planner's plan, in the event engine",
        {
            **_GRID,
            **_work("fp16"),
            "schedule": Setting("of a pipeline", "1f1b", ("auto", "1f1b", "gpipe", "zero-bubble")),
            "gradient_sync": Setting(
                "how gradients are summed",
                "auto",
                get_args(GradientSyncChoice),
            ),
            "codecs": Setting(
                "that hops may use",
                "none",
                ("none", "none+int8", "none+bf16+int8", "none+int8+int4"),
            ),
            "head": Setting("an output head over the vocabulary, as DT-FM has none", "no", _YES),
        },
        ours,
    ),
    System(
        "dtfm_scheduled",
        "DT-FM with the placement that its scheduler finds",
        {**_GRID, **_work("fp16"), **_NOISE},
        dtfm.scheduled,
    ),
    System(
        "dtfm_random",
        "DT-FM with devices in random order",
        {**_GRID, **_work("fp16"), **_SEEDS, **_NOISE},
        dtfm.random_complete,
    ),
    System(
        "dtfm_random_fair",
        "DT-FM with nodes in random order",
        {**_GRID, **_work("fp16"), **_SEEDS, **_NOISE},
        dtfm.random_fair,
    ),
    System(
        "dtfm_random_complete",
        "DT-FM with devices in random order",
        {**_GRID, **_work("fp16"), **_SEEDS, **_NOISE},
        dtfm.random_complete,
    ),
    System(
        "megatron_p8",
        "Megatron-LM, 8 pipeline stages",
        {**_shape(1, 8), **_work("fp16")},
        megatron.default_placement,
    ),
    System(
        "megatron_p8_random",
        "Megatron-LM, 8 pipeline stages, ranks in random order",
        {**_shape(1, 8), **_work("fp16"), **_SEEDS},
        megatron.random_placement,
    ),
    System(
        "megatron_p4t2",
        "Megatron-LM, 4 pipeline stages, 2 tensor-parallel",
        {**_shape(2, 4), **_work("fp16")},
        megatron.default_placement,
    ),
    System(
        "megatron_p2t4",
        "Megatron-LM, 2 pipeline stages, 4 tensor-parallel",
        {**_shape(4, 2), **_work("fp16")},
        megatron.default_placement,
    ),
    System(
        "megatron_t8",
        "Megatron-LM, 8 tensor-parallel",
        {**_shape(8, 1), **_work("fp16")},
        megatron.default_placement,
    ),
    System(
        "megatron_lm",
        "Megatron-LM, any shape",
        {**_shape(1, None), **_work("fp32")},
        megatron.default_placement,
    ),
    System(
        "deepspeed_pp",
        "DeepSpeed's pipeline engine",
        {**_shape(1, 8), **_work("fp16")} | {"tensor": Setting("always 1", "1", ("1",))},
        deepspeed.pipeline,
    ),
    System(
        "deepspeed_3d",
        "Megatron-LM with DeepSpeed's ZeRO-1: tensor, pipeline and data parallelism",
        {**_shape(4, 4), **_work("fp16")},
        megatron.default_placement,
    ),
    System("zero_s1", "DeepSpeed ZeRO stage 1", _ZERO, zero.stage_1),
    System("zero_s3", "DeepSpeed ZeRO stage 3", _ZERO, zero.stage_3),
    System(
        "torch_pipe",
        "PyTorch Pipe on the GPUs of one instance",
        {**_GRID, **_work("fp32"), "recompute": Setting("activations in the backward", "no", _YES)},
        torch_pipe.pipe,
    ),
    System(
        "torch_pipe_fairscale_fsdp",
        "Fairscale's pipe with fully sharded data parallelism",
        {**_GRID, **_work("fp32"), "recompute": Setting("activations in the backward", "no", _YES)},
        torch_pipe.fairscale,
    ),
    System(
        "dtfm_gpipe",
        "DT-FM's first pipelines: GPipe",
        {**_GRID, **_work("fp32"), **_NOISE},
        dtfm.single_pipeline,
    ),
    System(
        "dtfm_1f1b",
        "DT-FM's first pipelines: 1F1B",
        {
            **_GRID,
            **_work("fp32"),
            **_NOISE,
            "schedule": Setting("of a pipeline", "1f1b", ("1f1b", "gpipe")),
        },
        dtfm.single_pipeline,
    ),
    System(
        "dtfm_gpipe_central_ps",
        "DT-FM's first pipelines: GPipe, with replicas and a central PS",
        {**_GRID, **_work("fp32"), **_NOISE},
        dtfm.single_pipeline,
    ),
)

SYSTEMS: dict[str, System] = {system.name: system for system in _ALL}
"""By name."""
