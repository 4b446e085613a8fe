"""The few fitted figures of the published comparison, each with a physical meaning.

They are in ``constants.yaml``, which ``benchmarks/fit_systems.py`` writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources

import yaml

__all__ = [
    "Constants",
    "DeepSpeed",
    "Hardware",
    "Megatron",
    "Pipe",
    "Zero",
    "constants",
]


@dataclass(frozen=True, slots=True)
class Hardware:
    """What serves every system.

    Args:
        v100_fp16_tflops, v100_fp32_tflops, a40_fp16_tflops: of a pipeline stage, recomputation
            counted.
        eight_process_nic_share: of a p3.16xlarge's NIC that messages of its GPUs reach.
        shaped_rate_factor: what links shaped with ``tc`` carry, in parts of their nominal rate.
        collective_window_bytes: under way between two members of a reduce or broadcast.
        nvlink_gbytes_per_s: of a ring inside an instance.
        flow_gbps: of one flow of messages between instances.
    """

    v100_fp16_tflops: float
    v100_fp32_tflops: float
    a40_fp16_tflops: float
    eight_process_nic_share: float
    shaped_rate_factor: float
    collective_window_bytes: float
    nvlink_gbytes_per_s: float
    flow_gbps: float


@dataclass(frozen=True, slots=True)
class Megatron:
    """Megatron-LM.

    Args:
        compute_factor, fp32_compute_factor: of the hardware's rate, in fp16 and in fp32.
        transfer_factor, latency_factor: of an exchange between neighbouring stages.
        shared_nic_factor: of its transfers over a NIC that several GPUs share.
    """

    compute_factor: float
    fp32_compute_factor: float
    transfer_factor: float
    latency_factor: float
    shared_nic_factor: float


@dataclass(frozen=True, slots=True)
class DeepSpeed:
    """DeepSpeed's pipeline engine.

    Args:
        compute_factor: of the hardware's rate.
        transfer_factor: of a hop's messages, which go one at a time.
        shared_nic_factor: by which a NIC that several GPUs share is faster for it than for DT-FM.
    """

    compute_factor: float
    transfer_factor: float
    shared_nic_factor: float


@dataclass(frozen=True, slots=True)
class Zero:
    """ZeRO stage 3.

    Args:
        compute_factor: of the hardware's rate.
        bandwidth_share: of the slowest link of its ring.
        microbatch: sequences of one device at once.
    """

    compute_factor: float
    bandwidth_share: float
    microbatch: int


@dataclass(frozen=True, slots=True)
class Pipe:
    """PyTorch Pipe: of the hardware's rate."""

    compute_factor: float


@dataclass(frozen=True, slots=True)
class Constants:
    """All of ``constants.yaml``."""

    hardware: Hardware
    megatron: Megatron
    deepspeed_pipeline: DeepSpeed
    zero_3: Zero
    pytorch_pipe: Pipe


@cache
def constants() -> Constants:
    """The fitted constants."""
    text = resources.files("ray_train_geo.systems").joinpath("constants.yaml").read_text("utf-8")
    found = yaml.safe_load(text)
    return Constants(
        Hardware(**found["hardware"]),
        Megatron(**found["megatron"]),
        DeepSpeed(**found["deepspeed_pipeline"]),
        Zero(**found["zero_3"]),
        Pipe(**found["pytorch_pipe"]),
    )
